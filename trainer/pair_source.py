"""Steps of preference pairs: a seeded permutation of the prompts, so many a step, both completions of a pair in one packed row.

Rows mix the two paths of BVPO where their losses are weighted; where their gradients are looked at one by one, a row holds one
path of one group of prompts.
"""

from __future__ import annotations

import copy
import hashlib
from collections.abc import Callable, Iterable, Iterator
from functools import cached_property

import numpy as np
import torch

from longtrace import kernels as K

from .config import Refusal
from .paths import GROUPS
from .preference import PATHS
from .preferences import PairSet
from .source import IGNORE, PairBatch


class PairSource:
    """Steps over a set of pairs: endless, or `epochs` passes."""

    def __init__(
        self,
        pairs: PairSet,
        prompts: np.ndarray,
        *,
        tokens_per_row: int,
        pairs_per_step: int,
        seed: int,
        epochs: float | None = None,
        weights: Callable[[int], tuple[float, float]] = lambda step: (1.0, 1.0),
        grouped: bool = False,
    ):
        """prompts: numbers of the prompts to use. weights: what a pair's loss is multiplied by, (trace, empty), in a step (from 0).
        grouped: rows of one path and one of up to GROUPS groups. Raises Refusal where a pair does not fit a row."""
        if len(prompts) == 0:
            raise Refusal("no pairs to train on: every row was left out")
        self.pairs, self.numbers, self.seed = pairs, np.asarray(prompts), seed
        self.tokens_per_row, self.grouped = tokens_per_row, grouped
        self.pairs_per_step = min(pairs_per_step, len(self.numbers))  # no step holds all pairs more than once
        self.weights = weights
        longest = int(self.pair_lengths[self.numbers].max())
        if longest > tokens_per_row:
            raise Refusal(
                f"a pair of {longest:,} tokens does not fit --tokens-per-row {tokens_per_row:,}, which holds both of its completions"
            )
        self.reference: np.ndarray | None = None  # (documents,) float64: summed log-probs of the reference model
        self.steps = self.epoch = self.cursor = 0
        self.metrics: dict[str, float] = {}
        self.prompts_in_all = None if epochs is None else max(1, round(len(self.numbers) * epochs))
        self._shuffle()

    @cached_property
    def pair_lengths(self) -> np.ndarray:
        """(prompts, paths) tokens of both completions with their prompts."""
        return self.pairs.lengths.reshape(len(self.pairs), len(self.pairs.paths), 2).sum(-1)

    def _shuffle(self) -> None:
        self.order = np.random.default_rng((self.seed, self.epoch)).permutation(self.numbers)

    def _take(self, n: int) -> list[int]:
        taken: list[int] = []
        while len(taken) < n:
            if self.cursor == len(self.order):
                self.epoch, self.cursor = self.epoch + 1, 0
                self._shuffle()
            part = self.order[self.cursor : self.cursor + n - len(taken)]
            taken += part.tolist()
            self.cursor += len(part)
        return taken

    # ---- the loop's side ------------------------------------------------------------------------------------------

    def next(self, say: Callable[[str], None] = lambda text: None) -> list[PairBatch]:
        """The packed rows of one optimizer step."""
        n = self.pairs_per_step
        if self.prompts_in_all is not None:
            n = min(n, self.prompts_in_all - self.taken)
        weights = self.weights(self.steps)
        self.metrics = {"alpha": weights[0]} if len(self.pairs.paths) > 1 else {}
        self.steps += 1
        return self.rows(self._take(n), weights)

    def rows(self, numbers: list[int], weights: tuple[float, float] = (1.0, 1.0)) -> list[PairBatch]:
        """Packed rows of these prompts, every pair of theirs in one row."""
        paths = range(len(self.pairs.paths))
        if not self.grouped:
            return self._pack([(i, path) for i in numbers for path in paths], weights)
        groups = np.array_split(np.array(numbers), min(GROUPS, len(numbers)))
        return [
            batch
            for g, group in enumerate(groups)
            for path in paths
            for batch in self._pack([(i, path) for i in group.tolist()], weights, g)
        ]

    def _pack(self, units: list[tuple[int, int]], weights: tuple[float, float], group: int = 0) -> list[PairBatch]:
        rows = K.pack([int(self.pair_lengths[unit]) for unit in units], self.tokens_per_row)
        return [self._collate([units[i] for i in row], weights, group) for row in rows]

    def _collate(self, units: list[tuple[int, int]], weights: tuple[float, float], group: int) -> PairBatch:
        """Puts pairs (prompt, path) one after another into a packed row."""
        pairs, several = self.pairs, len(self.pairs.paths)
        documents = [2 * (several * i + path) + side for i, path in units for side in (0, 1)]
        spans = [slice(*pairs.offsets[d : d + 2].tolist()) for d in documents]
        lengths, prompts = pairs.lengths[documents], pairs.prompts[documents]
        ids = np.concatenate([pairs.tokens[span] for span in spans]).astype(np.int64)
        labels = np.full(len(ids), IGNORE, dtype=np.int64)
        ends = np.cumsum(lengths)
        for end, length, prompt in zip(ends, lengths, prompts):  # a token's label is the one after it
            labels[end - length + prompt - 1 : end - 1] = ids[end - length + prompt : end]
        number = [PATHS.index(pairs.paths[path]) for _, path in units]
        return PairBatch(
            torch.from_numpy(ids),
            torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
            torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
            int(lengths.max()),
            torch.from_numpy(labels),
            [int(pairs.source[i]) for i, _ in units],
            sizes=(lengths - prompts).tolist(),
            path=torch.tensor(number),
            weight=torch.tensor([weights[p] for p in number], dtype=torch.float64),
            count=len(units) / several,  # so that a step's counts add up to its prompts
            reference=None if self.reference is None else torch.from_numpy(self.reference[documents]),
            group=group,
            completions=documents,
        )

    # ---- the reference ----------------------------------------------------------------------------------------------

    def first_pass(self, steps: int) -> Iterator[PairBatch]:
        """The rows in which each pair that `steps` steps come to is trained on for the first time, as they will be packed."""
        ahead = copy.copy(self)
        ahead.steps = ahead.epoch = ahead.cursor = 0
        ahead._shuffle()
        for _ in range(min(steps, -(-len(self.numbers) // self.pairs_per_step))):
            yield from ahead.next()

    def completions_ahead(self, steps: int) -> int:
        """How many completions `first_pass` comes to."""
        n = min(steps, -(-len(self.numbers) // self.pairs_per_step)) * self.pairs_per_step
        if self.prompts_in_all is not None:
            n = min(n, self.prompts_in_all)
        return 2 * len(self.pairs.paths) * n

    def keep_reference(self, found: Iterable[tuple[PairBatch, np.ndarray]]) -> None:
        """Takes the summed log-probs of `first_pass`'s rows; of a pair met twice, those it had first."""
        reference = np.full(len(self.pairs.lengths), np.nan)
        for batch, values in found:
            for d, value in zip(batch.completions, values):
                if np.isnan(reference[d]):
                    reference[d] = value
        self.reference = reference

    # ---- its state --------------------------------------------------------------------------------------------------

    def steps_left(self) -> int:
        """Steps until `epochs` are done; the last may hold fewer pairs, so that no pair is seen more often than another."""
        return max(0, -(-(self.prompts_in_all - self.taken) // self.pairs_per_step))

    @property
    def taken(self) -> int:
        """Prompts seen so far, again and again."""
        return self.epoch * len(self.order) + self.cursor

    @property
    def progress(self) -> float:
        """Epochs seen so far."""
        return self.epoch + self.cursor / len(self.order)

    @property
    def run(self) -> dict:
        """What a place in the data means nothing without."""
        chosen = hashlib.sha256(np.ascontiguousarray(self.numbers, dtype="<i8").data).hexdigest()
        return {"--pairs-per-step": self.pairs_per_step, "--seed": self.seed, "--eval-fraction": chosen}

    def state_dict(self) -> dict:
        position = {name: getattr(self, name) for name in ("steps", "epoch", "cursor")}
        return position | {"data": self.fingerprint, "run": self.run}

    @cached_property
    def fingerprint(self) -> str:
        return self.pairs.fingerprint

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict, tensors: dict[str, torch.Tensor]) -> None:
        if state["data"] != self.fingerprint:
            raise Refusal(
                "the pairs changed since the checkpoint was saved (tokens differ); resume with the same --data, --template, --alpha's paths "
                "and tokenizer, or start a new run with another --out"
            )
        for flag, value in self.run.items():
            if state["run"][flag] != value:
                raise Refusal(
                    f"{flag} differs from the checkpoint's, so its place in the data means nothing here: pass the same, or start a new run "
                    "with another --out"
                )
        for name in ("steps", "epoch", "cursor"):
            setattr(self, name, state[name])
        self._shuffle()

"""From tokenised documents to packed micro-batches: no padding, no truncation, and a cursor that resumes exactly."""

from __future__ import annotations

import hashlib
from collections.abc import Callable
from dataclasses import dataclass, field
from functools import cached_property

import numpy as np
import torch

from longtrace import kernels as K

from .config import Refusal
from .traces import TraceSet

IGNORE = -100


@dataclass
class PackedBatch:
    """One packed row of T tokens; documents never see each other."""

    input_ids: torch.Tensor  # (T,) int64
    position_ids: torch.Tensor  # (T,) int64, restarts at 0 in every document
    cu_seqlens: torch.Tensor  # (documents + 1,) int32
    max_seqlen: int
    labels: torch.Tensor  # (T,) int64: the next token where it is a target, else -100
    documents: list[int]  # row numbers in reading order, for messages

    def __post_init__(self):
        lengths = {len(self.input_ids), len(self.position_ids), len(self.labels), int(self.cu_seqlens[-1])}
        assert len(lengths) == 1, f"arrays of a packed batch differ in length: {lengths}"

    def to(self, device: torch.device) -> PackedBatch:
        moved = [t.to(device, non_blocking=True) for t in (self.input_ids, self.position_ids, self.cu_seqlens)]
        return PackedBatch(*moved, self.max_seqlen, self.labels.to(device, non_blocking=True), self.documents)

    @property
    def tokens(self) -> int:
        return len(self.input_ids)


@dataclass
class RolloutBatch(PackedBatch):
    """A packed row of prompts with their completions. Arrays over its N target tokens, in order; fp32 but `sequence`."""

    advantage: torch.Tensor  # (N,) of the token's completion
    weight: torch.Tensor  # (N,) the token's share of the loss, before the division by the step's count
    sequence: torch.Tensor  # (N,) int64: which completion of the row
    count: float  # the row's share of the step's normaliser
    old_log_prob: torch.Tensor | None = None  # (N,) at the weights that wrote it; None: today's are those
    ref_log_prob: torch.Tensor | None = None  # (N,) of the reference model
    rollout_log_prob: torch.Tensor | None = None  # (N,) as the engine saw it

    ARRAYS = ("advantage", "weight", "sequence", "old_log_prob", "ref_log_prob", "rollout_log_prob")

    def __post_init__(self):
        super().__post_init__()
        targets = int((self.labels != IGNORE).sum())
        for name in self.ARRAYS:
            array = getattr(self, name)
            assert array is None or array.shape == (targets,), f"{name}: {tuple(array.shape)}, {targets} target tokens"

    def to(self, device: torch.device) -> RolloutBatch:
        arrays = {name: getattr(self, name) for name in self.ARRAYS}
        arrays = {name: None if a is None else a.to(device, non_blocking=True) for name, a in arrays.items()}
        return RolloutBatch(**vars(super().to(device)), **arrays, count=self.count)


@dataclass
class PairBatch(PackedBatch):
    """A packed row of P preference pairs: documents 2p and 2p + 1 are the chosen and the rejected of pair p."""

    sizes: list[int]  # (2P,) target tokens of each document
    path: torch.Tensor  # (P,) int64: 0 trace, 1 empty
    weight: torch.Tensor  # (P,) float64: the pair's share of the loss, before the division by the step's count
    count: float  # the row's share of the step's normaliser
    reference: torch.Tensor | None = None  # (2P,) float64: summed log-probs under the reference model
    group: int = 0  # of the step's prompts: rows whose gradients are one sample of the step's
    completions: list[int] = field(default_factory=list)  # (2P,) number of each document in the data

    def __post_init__(self):
        super().__post_init__()
        targets, pairs = int((self.labels != IGNORE).sum()), len(self.path)
        assert sum(self.sizes) == targets, f"sizes hold {sum(self.sizes)} of {targets} target tokens"
        assert len(self.sizes) == 2 * pairs == len(self.cu_seqlens) - 1, f"{pairs} pairs, {len(self.sizes)} completions"

    def to(self, device: torch.device) -> PairBatch:
        def moved(x: torch.Tensor | None) -> torch.Tensor | None:
            return None if x is None else x.to(device, non_blocking=True)

        return PairBatch(
            **vars(super().to(device)), sizes=self.sizes, path=moved(self.path), weight=moved(self.weight),
            count=self.count, reference=moved(self.reference), group=self.group, completions=self.completions,
        )  # fmt: skip


def collate(traces: TraceSet, documents: list[int]) -> PackedBatch:
    """Puts documents (indices into `traces`) one after another into a packed row."""
    spans = [(int(traces.offsets[d]), int(traces.offsets[d + 1])) for d in documents]
    lengths = np.array([b - a for a, b in spans], dtype=np.int32)
    ids = np.concatenate([traces.tokens[a:b] for a, b in spans]).astype(np.int64)
    mask = np.concatenate([traces.loss_mask[a:b] for a, b in spans])
    # the first token of a document is never a target, so the shift cannot cross from one into the next
    labels = np.full(len(ids), IGNORE, dtype=np.int64)
    labels[:-1][mask[1:]] = ids[1:][mask[1:]]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])
    return PackedBatch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(cu_seqlens),
        int(lengths.max()),
        torch.from_numpy(labels),
        [int(traces.source[d]) for d in documents],
    )


class TraceSource:
    """Steps of packed rows over a set of documents: endless, or `epochs` passes.

    Each epoch packs a fresh seeded permutation (best-fit decreasing) and shuffles the rows, so batches are not sorted
    by length. `next()` gives the micro-batches of one optimizer step.
    """

    def __init__(
        self,
        traces: TraceSet,
        documents: np.ndarray,
        tokens_per_row: int,
        rows_per_step: int,
        seed: int,
        epochs: float | None = None,
    ):
        if len(documents) == 0:
            raise Refusal("no documents to train on: every row was left out")
        longest = int(traces.lengths[documents].max())
        if longest > tokens_per_row:
            raise Refusal(f"a document of {longest:,} tokens does not fit --tokens-per-row {tokens_per_row:,}")
        self.traces, self.documents, self.seed = traces, documents, seed
        self.tokens_per_row, self.rows_per_step = tokens_per_row, rows_per_step
        self.epoch = self.cursor = self.rows_seen = 0
        self.metrics: dict[str, float] = {}
        self._pack()
        self.rows_in_all = None if epochs is None else max(1, round(len(self.rows) * epochs))

    def _pack(self):
        order = np.random.default_rng((self.seed, self.epoch))
        documents = order.permutation(self.documents)
        rows = K.pack(self.traces.lengths[documents].tolist(), self.tokens_per_row)
        order.shuffle(rows)
        self.rows = [documents[row].tolist() for row in rows]

    @property
    def rows_per_epoch(self) -> int:
        return len(self.rows)

    @property
    def fill(self) -> float:
        """Share of the row slots of an epoch that hold a token."""
        return int(self.traces.lengths[self.documents].sum()) / (len(self.rows) * self.tokens_per_row)

    def steps_left(self) -> int:
        """Steps until `epochs` are done; the last may hold fewer rows, so that no row is seen more often than another."""
        return max(0, -(-(self.rows_in_all - self.rows_seen) // self.rows_per_step))

    def next(self, say: Callable[[str], None] = lambda text: None) -> list[PackedBatch]:
        left = self.rows_per_step if self.rows_in_all is None else self.rows_in_all - self.rows_seen
        batches = []
        for _ in range(min(self.rows_per_step, left)):
            if self.cursor == len(self.rows):
                self.epoch, self.cursor = self.epoch + 1, 0
                self._pack()
            batches.append(collate(self.traces, self.rows[self.cursor]))
            self.cursor += 1
        self.rows_seen += len(batches)
        return batches

    def all_rows(self) -> list[PackedBatch]:
        """Every packed row of the current epoch, for evaluation."""
        return [collate(self.traces, row) for row in self.rows]

    @property
    def progress(self) -> float:
        """Epochs seen so far."""
        return self.epoch + self.cursor / len(self.rows)

    @property
    def packing(self) -> dict:
        """What decides which row comes when, besides the tokens themselves."""
        chosen = hashlib.sha256(np.ascontiguousarray(self.documents, dtype="<i8").data).hexdigest()
        return {"tokens_per_row": self.tokens_per_row, "seed": self.seed, "documents": chosen}

    def state_dict(self) -> dict:
        position = {"epoch": self.epoch, "cursor": self.cursor, "rows_seen": self.rows_seen}
        return position | {"data": self.fingerprint, "packing": self.packing}

    @cached_property
    def fingerprint(self) -> str:
        return self.traces.fingerprint

    def tensors(self) -> dict[str, torch.Tensor]:
        return {}

    def load_state_dict(self, state: dict, tensors: dict[str, torch.Tensor]) -> None:
        if state["data"] != self.fingerprint:
            raise Refusal(
                "the data changed since the checkpoint was saved (tokens differ); resume with the same --data, --template, "
                "--max-tokens and tokenizer, or start a new run with another --out"
            )
        for key, flag in (("tokens_per_row", "--tokens-per-row"), ("seed", "--seed"), ("documents", "--eval-fraction")):
            if state["packing"][key] != self.packing[key]:
                raise Refusal(
                    f"{flag} differs from the checkpoint's, so its place in the data means nothing here: pass the same, or start a "
                    "new run with another --out (--model may be an exported checkpoint)"
                )
        self.epoch, self.cursor, self.rows_seen = state["epoch"], state["cursor"], state["rows_seen"]
        self._pack()

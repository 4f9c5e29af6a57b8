"""GRPO's source of steps: prompts -> a group of completions each -> rewards -> advantages -> packed rows.

A rollout is drawn from the weights as they are, scored, and dealt out over `steps_per_rollout` optimizer steps. Groups
whose rewards are all equal carry no gradient: they leave before the forward and stay in the denominators.
"""

from __future__ import annotations

import copy
import math
import re
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from functools import cached_property
from itertools import islice
from typing import Literal

import numpy as np
import torch

from longtrace import kernels as K

from .checkpoint import MetricsLog
from .config import Refusal
from .evaluate import prompt_of
from .model import DTYPES, Model
from .objectives import token_weights
from .prompts import Prompt, fingerprint
from .rewards import Rewards
from .rollout import Completion, Sampling
from .source import IGNORE, RolloutBatch
from .verifier import Verifier

REFLECTION = re.compile(r"\b(wait|mistake|however|but|retry|error|verify|wrong|evaluate|check)\b", re.I)  # R1's list


@dataclass
class Experience:
    """A prompt with one completion that carries a gradient, on its way into a packed row."""

    prompt: list[int]
    completion: list[int]
    advantage: float
    number: int  # of the prompt in the data
    rollout_log_prob: np.ndarray | None = None  # (completion,) fp32, as the engine saw it
    old_log_prob: np.ndarray | None = None  # by the trainer, at the weights that wrote it
    ref_log_prob: np.ndarray | None = None

    def __len__(self) -> int:
        return len(self.prompt) + len(self.completion)


@dataclass
class Step:
    """What one optimizer step trains on."""

    experiences: list[Experience]
    counted: list[int]  # lengths of all the completions in the denominators, those without a gradient too


@dataclass
class Group:
    """A prompt's completions, scored."""

    number: int  # of the prompt in the data
    completions: list[Completion]
    rewards: np.ndarray  # (n,) NaN: not scored, or masked
    parts: dict[str, np.ndarray]  # each reward before weighting
    apart: list[tuple[float, np.ndarray]] | None = None  # (weight, reward (n,)): normalised one by one, then summed

    @property
    def normalised(self) -> list[tuple[float, np.ndarray]]:
        """What is set against its mean within the group: the sum of the rewards, or each."""
        return [(1.0, self.rewards)] if self.apart is None else self.apart

    @property
    def mixed(self) -> bool:
        scored = [values[np.isfinite(values)] for _, values in self.normalised]
        return any(len(values) > 1 and bool(values.max() > values.min()) for values in scored)


Score = Callable[[Sequence[Prompt], Sequence[Completion]], tuple[np.ndarray, dict[str, np.ndarray]]]
"""(rewards (n,), each part (n,)) of completions and their prompts; NaN where one cannot be scored."""


POSITION = ("epoch", "cursor", "rollouts", "steps", "reset_at")


class RolloutSource:
    """Steps of GRPO over a set of prompts: endless, or until `epochs` passes over the prompts are done."""

    def __init__(
        self, config, model: Model, engine, prompts: list[Prompt], score: Score, rewards: Rewards | None = None
    ):
        """`rewards`: what `score` asks; its weights, and the verdicts of its pool, which are part of the state."""
        self.config, self.model, self.engine, self.prompts, self.score = config, model, engine, prompts, score
        self.weights = rewards.weights if rewards else {}
        self.verifier: Verifier | None = rewards.pool if rewards else None
        self.tokens_per_row = config.tokens_per_row
        self.epoch = self.cursor = self.rollouts = self.steps = self.reset_at = 0
        self.buffer: list[Step] = []  # replaced, never changed in place: `_at_boundary` may hold it
        self._at_boundary = self.buffer  # as of the last state_dict
        self.metrics: dict[str, float] = {}
        self.samples: MetricsLog | None = None  # where a few completions of every rollout go
        self.reference = _frozen_copy(model, DTYPES[config.dtype]) if config.beta and not model.lora else None
        self.generate_seconds = self.score_seconds = 0.0  # of the last rollout
        self._shuffle()

    # ---- the loop's side ------------------------------------------------------------------------------------------

    def next(self, say: Callable[[str], None] = lambda text: None) -> list[RolloutBatch]:
        """The packed rows of one optimizer step; none when no group of it carries a gradient."""
        self.metrics = {}
        if not self.buffer:
            self.buffer = self._roll_out(say)
        step, *self.buffer = self.buffer
        self.steps += 1
        return self._rows(step)

    def steps_left(self) -> int:
        asked = math.ceil(self.config.epochs * len(self.prompts) / self.config.prompts_per_rollout)
        return max(0, asked * self.config.steps_per_rollout - self.steps)

    @property
    def progress(self) -> float:
        """Epochs of prompts seen so far."""
        return self.epoch + self.cursor / len(self.prompts)

    @cached_property
    def fingerprint(self) -> str:
        return fingerprint(self.prompts)

    def state_dict(self) -> dict:
        self._at_boundary = self.buffer
        position = {name: getattr(self, name) for name in POSITION} | {"run": self._run}
        return position | {
            "data": self.fingerprint,
            "buffer": len(self.buffer),  # steps; what they train on is in the tensors
            "verifier": self.verifier.state_dict() if self.verifier else None,
        }

    def tensors(self) -> dict[str, torch.Tensor]:
        """What a checkpoint holds besides, as of the last state_dict: the reference's weights and the rollout buffer."""
        tensors = {f"reference.{name}": weight for name, weight in self._reference_weights.items()}
        return tensors | {f"buffer.{name}": values for name, values in as_tensors(self._at_boundary).items()}

    @property
    def _reference_weights(self) -> dict[str, torch.Tensor]:
        return {} if self.reference is None else dict(self.reference.named_parameters())

    def load_state_dict(self, state: dict, tensors: dict[str, torch.Tensor]) -> None:
        if state["data"] != self.fingerprint:
            raise Refusal(
                "the prompts changed since the checkpoint was saved; resume with the same --data, --template and tokenizer, "
                "or start a new run with another --out"
            )
        for name, value in self._run.items():
            if state["run"][name] != value:
                raise Refusal(
                    f"{name} differs from the checkpoint's ({state['run'][name]}, now {value}): pass the same"
                )
        saved: dict[str, dict[str, torch.Tensor]] = {"reference": {}, "buffer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            saved[part][rest] = tensor
        held = self._reference_weights
        if {name: x.shape for name, x in held.items()} != {name: x.shape for name, x in saved["reference"].items()}:
            raise Refusal("the checkpoint's reference model is another than this run's; same --model and --beta?")
        buffer = from_tensors(saved["buffer"])
        if len(buffer) != state["buffer"]:
            raise Refusal(
                f"the checkpoint's rollout buffer holds {len(buffer)} steps, its state says {state['buffer']}: "
                "it cannot be trusted"
            )
        with torch.no_grad():
            for name, tensor in held.items():
                tensor.copy_(saved["reference"][name])
        for name in POSITION:
            setattr(self, name, state[name])
        self.buffer = self._at_boundary = buffer
        if self.verifier and state["verifier"]:
            self.verifier.load_state_dict(state["verifier"])
        self._shuffle()

    @property
    def _run(self) -> dict:
        """What a place in the data, and a buffer, mean nothing without."""
        return {
            "--seed": self.config.seed,
            "a reference (--beta)": bool(self.config.beta),
            "--temperature": self.config.temperature,  # the buffer's log-probs are at it
        }

    # ---- a rollout ------------------------------------------------------------------------------------------------

    def _shuffle(self) -> None:
        self.order = np.random.default_rng((self.config.seed, self.epoch)).permutation(len(self.prompts)).tolist()

    def _take(self, n: int) -> list[int]:
        taken = []
        while len(taken) < n:
            if self.cursor == len(self.prompts):
                self.epoch, self.cursor = self.epoch + 1, 0
                self._shuffle()
            taken.append(self.order[self.cursor])
            self.cursor += 1
        return taken

    def _roll_out(self, say: Callable[[str], None]) -> list[Step]:
        config = self.config
        if self.reference is not None and 0 < config.reference_reset <= self.steps - self.reset_at:
            self.reset_at = self.steps
            with torch.no_grad():
                for kept, now in zip(self.reference.parameters(), self.model.base.parameters()):
                    kept.copy_(now)
        groups: list[Group] = []
        self.generate_seconds = self.score_seconds = 0.0
        counts = Counter(self.verifier.counts) if self.verifier else None
        for attempt in range(1 + config.resample):
            missing = config.prompts_per_rollout - sum(g.mixed for g in groups)
            if attempt and not missing:
                break
            groups += self._generate(self._take(missing if attempt else config.prompts_per_rollout), attempt, say)
        self._tell(groups)
        if counts is not None:
            self.metrics |= {f"verifier_{what}": n - counts[what] for what, n in self.verifier.counts.items()}
        if config.resample:  # the batch is full of mixed groups, where there were enough of them
            spare = [g for g in groups if not g.mixed]
            groups = [g for g in groups if g.mixed]
            groups += spare[: config.prompts_per_rollout - len(groups)]
            np.random.default_rng((config.seed, self.rollouts)).shuffle(groups)  # the spare ones not all in one step
        experiences, counted = self._advantages(groups)
        self.rollouts += 1
        kept = [e for group in experiences for e in group]
        if config.steps_per_rollout > 1:  # else the forward that trains is that of the weights that wrote
            for e, values in zip(kept, self.log_probs(kept)):
                e.old_log_prob = values
        if config.beta:
            with self._as_reference() as reference:
                for e, values in zip(kept, self.log_probs(kept, reference)):
                    e.ref_log_prob = values
        parts = np.array_split(np.arange(len(groups)), config.steps_per_rollout)
        return [
            Step([e for g in part for e in experiences[g]], [n for g in part for n in counted[g]]) for part in parts
        ]

    def _generate(self, numbers: list[int], attempt: int, say: Callable[[str], None]) -> list[Group]:
        config = self.config
        prompts = [self.prompts[n] for n in numbers]
        began, wanted = time.perf_counter(), len(prompts) * config.group_size
        done = self.engine.generate(
            [p.tokens for p in prompts],
            sampling_of(config),
            samples=config.group_size,
            seed=(config.seed, self.rollouts, attempt),
            progress=lambda ended, tokens: say(f"rollout: {ended} of {wanted} completions, {tokens:,} tokens"),
        )
        scoring = time.perf_counter()
        self.generate_seconds += scoring - began
        flat = [(p, c) for p, group in zip(prompts, done) for c in group]
        rewards, parts = self.score([p for p, _ in flat], [c for _, c in flat])
        self.score_seconds += time.perf_counter() - scoring
        cut = np.array([not c.finished for _, c in flat])
        rewards = cut_off_rewards(rewards, cut, config.cut_off)
        each = {name: cut_off_rewards(values, cut, config.cut_off) for name, values in parts.items()}
        n, groups = config.group_size, []
        for i, (number, group) in enumerate(zip(numbers, done)):
            here = slice(i * n, (i + 1) * n)
            apart = [(weight, each[name][here]) for name, weight in self.weights.items()]
            groups.append(
                Group(
                    number, group, rewards[here], {name: values[here] for name, values in parts.items()},
                    apart if config.scale_rewards == "each" else None,
                )
            )  # fmt: skip
        return groups

    def _advantages(self, groups: list[Group]) -> tuple[list[list[Experience]], list[list[int]]]:
        """For each group: what carries a gradient, and the lengths of what is counted."""
        config = self.config
        offsets = np.cumsum([0] + [len(g.rewards) for g in groups])
        total = np.zeros(offsets[-1])
        for i, (weight, _) in enumerate(groups[0].normalised):
            found = K.group_advantages(
                torch.from_numpy(np.concatenate([g.normalised[i][1] for g in groups])),
                offsets.tolist(),
                scale="none" if config.scale_rewards == "none" else "group_std",
                baseline=config.baseline,
            )
            total += weight * found.values.numpy()
        if config.scale_rewards == "each":  # GDPO: the sum must not grow with the number of rewards
            scored = total[~np.isnan(np.concatenate([g.rewards for g in groups]))]
            total /= (scored.std(ddof=1) if len(scored) > 1 else 0.0) + 1e-4
        values = total.tolist()
        needed = bool(config.beta or config.entropy_bonus)  # then an advantage of 0 still has a gradient
        experiences, counted = [], []
        for group, start in zip(groups, offsets):
            masked = np.isnan(group.rewards)
            counted.append([len(c.tokens) for c, out in zip(group.completions, masked) if not out])
            experiences.append(
                [
                    Experience(
                        self.prompts[group.number].tokens,
                        c.tokens,
                        values[start + i],
                        group.number,
                        np.asarray(c.log_probs, dtype=np.float32),
                    )
                    for i, c in enumerate(group.completions)
                    if not masked[i] and (needed or values[start + i] != 0)
                ]
            )
        return experiences, counted

    def _rows(self, step: Step) -> list[RolloutBatch]:
        if not step.experiences:
            return []
        weights, share = token_weights(
            self.config.loss, [len(e.completion) for e in step.experiences], self.config.max_new_tokens
        )
        _, total = token_weights(self.config.loss, step.counted, self.config.max_new_tokens)
        packed = K.pack([len(e) for e in step.experiences], self.tokens_per_row)
        batches = []
        for row in packed:
            _, here = token_weights(
                self.config.loss, [len(step.experiences[i].completion) for i in row], self.config.max_new_tokens
            )
            batches.append(collate([step.experiences[i] for i in row], [weights[i] for i in row], here))
        batches[0].count += total - share  # what left still counts
        return batches

    # ---- log-probabilities ------------------------------------------------------------------------------------------

    @torch.no_grad()
    def log_probs(self, experiences: list[Experience], hf=None) -> list[np.ndarray]:
        """Of every completion's tokens at the sampling temperature, by the trainer's own forward (or `hf`'s)."""
        model = self.model if hf is None else Model(hf, self.model.tokenizer, self.model.source, False, "")
        training = model.hf.training
        model.hf.eval()
        found: list[np.ndarray] = [np.zeros(0, np.float32)] * len(experiences)
        head = model.head()
        for row in K.pack([len(e) for e in experiences], self.tokens_per_row):
            batch = collate([experiences[i] for i in row], [1.0] * len(row), 0.0).to(model.device)
            values = K.linear_log_prob(
                model.hidden(batch),
                head.weight,
                batch.labels[batch.labels != IGNORE],
                linear_bias=head.bias,
                logit_scale=head.logit_scale,
                softcap=head.softcap,
                temperature=self.config.temperature,
                budget_mb=self.config.head_budget_mb or None,
            ).log_prob.float()
            lengths = [len(experiences[i].completion) for i in row]
            for i, part in zip(row, values.cpu().split(lengths)):
                found[i] = part.numpy()
        model.hf.train(training)
        return found

    @contextmanager
    def _as_reference(self) -> Iterator:
        if self.reference is not None:
            yield self.reference
        else:
            with self.model.hf.disable_adapter():
                yield None

    # ---- what there is to say ---------------------------------------------------------------------------------------

    def _tell(self, groups: list[Group]) -> None:
        completions = [c for g in groups for c in g.completions]
        rewards = np.concatenate([g.rewards for g in groups])
        lengths = np.array([len(c.tokens) for c in completions])
        constant = [g for g in groups if not g.mixed and np.isfinite(g.rewards).any()]
        # by the verdicts where there are any: a wrong answer may well be paid for its format
        marks = [g.parts.get("accuracy", g.rewards) for g in constant]
        right = [m for m in marks if np.nanmax(m, initial=-math.inf) > 0]
        texts = [self.model.tokenizer.decode(c.tokens, skip_special_tokens=True) for c in completions]
        words = sum(len(text.split()) for text in texts)
        told = {
            "reward": _mean(rewards),
            "reward_std": float(np.nanstd(rewards)) if np.isfinite(rewards).any() else 0.0,
            "groups_all_right": len(right),
            "groups_all_wrong": len(constant) - len(right),
            "groups_mixed": sum(g.mixed for g in groups),
            "completion_tokens": float(lengths.mean()),
            "cut_off": float(np.mean([not c.finished for c in completions])),
            "reflections": 1000 * sum(len(REFLECTION.findall(text)) for text in texts) / max(words, 1),
            "generated": int(lengths.sum()),
            "generate_seconds": self.generate_seconds,
            "generate_tok_per_sec": float(lengths.sum()) / self.generate_seconds if self.generate_seconds else None,
            "score_seconds": self.score_seconds,
        }
        for name in groups[0].parts:
            told[f"reward_{name}"] = _mean(np.concatenate([g.parts[name] for g in groups]))
        if "accuracy" in groups[0].parts:
            verdicts = np.concatenate([g.parts["accuracy"] for g in groups])
            told["tokens_right"], told["tokens_wrong"] = _mean(lengths[verdicts == 1]), _mean(lengths[verdicts == 0])
        self.metrics = {name: value for name, value in told.items() if value is not None}
        if self.samples:
            group = groups[0]
            for i, completion in enumerate(group.completions[:2]):
                self.samples.append(
                    {
                        "step": self.steps + 1,
                        "problem": str(prompt_of(self.prompts[group.number].row)[-1]["content"]),
                        "completion": self.prompts[group.number].text_of(texts[i]),
                        "reward": None if math.isnan(group.rewards[i]) else float(group.rewards[i]),
                        "cut_off": not completion.finished,
                        "tokens": len(completion.tokens),
                    }
                )


def sampling_of(config) -> Sampling:
    return Sampling(config.max_new_tokens, config.temperature, config.top_p, config.top_k, tuple(config.stop))


def cut_off_rewards(rewards: np.ndarray, cut_off: np.ndarray, rule: Literal["penalty", "mask"]) -> np.ndarray:
    """Rewards (n,) after what becomes of completions that were cut off: those without a reward get 0, or all leave (NaN)."""
    return np.where(cut_off, math.nan if rule == "mask" else np.nan_to_num(rewards, nan=0.0), rewards)


def collate(experiences: list[Experience], weights: list[float], count: float) -> RolloutBatch:
    """Puts prompts and completions one after another into a packed row; only completions are targets."""
    lengths = np.array([len(e) for e in experiences])
    ids = np.concatenate([np.array(e.prompt + e.completion, dtype=np.int64) for e in experiences])
    ends = np.cumsum(lengths)
    labels = np.full(len(ids), IGNORE, dtype=np.int64)
    for e, end in zip(experiences, ends):  # a token's label is the one after it
        labels[end - len(e.completion) - 1 : end - 1] = e.completion
    sizes = [len(e.completion) for e in experiences]

    def each(values, dtype=np.float32) -> torch.Tensor:
        return torch.from_numpy(np.repeat(np.array(values, dtype=dtype), sizes))

    def joined(name: str) -> torch.Tensor | None:
        arrays = [getattr(e, name) for e in experiences]
        return None if arrays[0] is None else torch.from_numpy(np.concatenate(arrays))

    return RolloutBatch(
        torch.from_numpy(ids),
        torch.from_numpy(np.concatenate([np.arange(n) for n in lengths])),
        torch.from_numpy(np.concatenate([[0], ends]).astype(np.int32)),
        int(lengths.max()),
        torch.from_numpy(labels),
        [e.number for e in experiences],
        advantage=each([e.advantage for e in experiences]),
        weight=each(weights),
        sequence=each(range(len(experiences)), np.int64),
        count=count,
        old_log_prob=joined("old_log_prob"),
        ref_log_prob=joined("ref_log_prob"),
        rollout_log_prob=joined("rollout_log_prob"),
    )


LOG_PROBS = ("rollout_log_prob", "old_log_prob", "ref_log_prob")


def as_tensors(steps: Sequence[Step]) -> dict[str, torch.Tensor]:
    """Steps as a few flat arrays, for a checkpoint: 4 bytes a token of prompt and completion, and 4 for each of a
    completion token's log-probs. None for no steps."""
    if not steps:
        return {}
    experiences = [e for step in steps for e in step.experiences]
    sizes = [[e.number, len(e.prompt), len(e.completion)] for e in experiences]
    tokens = [np.array(part, dtype=np.int32) for e in experiences for part in (e.prompt, e.completion)]
    tensors = {
        "steps": torch.tensor([[len(step.experiences), len(step.counted)] for step in steps]),
        "counted": torch.tensor([n for step in steps for n in step.counted], dtype=torch.int64),
        "experiences": torch.tensor(sizes, dtype=torch.int64).reshape(-1, 3),
        "advantages": torch.tensor([e.advantage for e in experiences], dtype=torch.float64),
        "tokens": torch.from_numpy(np.concatenate([np.zeros(0, np.int32), *tokens])),
    }
    for name in LOG_PROBS:
        if experiences and getattr(experiences[0], name) is not None:
            tensors[name] = torch.from_numpy(np.concatenate([getattr(e, name) for e in experiences]))
    return tensors


def from_tensors(tensors: dict[str, torch.Tensor]) -> list[Step]:
    """The steps that `as_tensors` took apart; they share no memory with the tensors."""
    if not tensors:
        return []
    numbers, prompts, completions = (column.tolist() for column in tensors["experiences"].T)
    spans = [n for pair in zip(prompts, completions) for n in pair]
    tokens = [part.tolist() for part in tensors["tokens"].split(spans)] if spans else []
    log_probs = {
        name: [part.numpy().copy() for part in tensors[name].split(completions)]
        for name in LOG_PROBS
        if name in tensors
    }
    experiences = [
        Experience(tokens[2 * i], tokens[2 * i + 1], advantage, numbers[i], **{k: v[i] for k, v in log_probs.items()})
        for i, advantage in enumerate(tensors["advantages"].tolist())
    ]
    counted = iter(tensors["counted"].tolist())
    waiting = iter(experiences)
    return [Step(list(islice(waiting, n)), list(islice(counted, m))) for n, m in tensors["steps"].tolist()]


def _frozen_copy(model: Model, dtype: torch.dtype):
    """The model as it is now, in the compute dtype, without gradients."""
    reference = copy.deepcopy(model.hf).requires_grad_(False)
    for (
        parameter
    ) in reference.parameters():  # not `.to(dtype)`: it would round rotary frequencies, which the policy keeps
        parameter.data = parameter.data.to(dtype)
    return reference.eval()


def _mean(values: np.ndarray) -> float | None:
    values = values[np.isfinite(values)]
    return float(values.mean()) if len(values) else None

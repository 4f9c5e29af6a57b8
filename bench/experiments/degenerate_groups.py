"""What does leaving out degenerate groups save? A GRPO step on the same rollout, with them in the forward and without.

A group whose rewards are all equal has advantages of 0 and no gradient. `left out` trains as `longtrace grpo` does;
`kept` sends every completion through the model, as trainers do that only mask. Same weights, same completions, same
objective, in turn; the learning rate is 0, so no step changes what the next one sees. Gradients are compared in the
compute dtype of the timed steps, and in fp32 on a smaller rollout, where nothing but the order of sums may differ.
"""

from __future__ import annotations

import tempfile
from dataclasses import replace
from pathlib import Path

import numpy as np
import torch

from longtrace.trainer.config import Refusal
from longtrace.trainer.experience import Prompt, RolloutSource
from longtrace.trainer.grpo import GRPOConfig, check
from longtrace.trainer.model import DTYPES, Masters, load_model
from longtrace.trainer.objectives import PolicyGradient
from longtrace.trainer.rollout import Completion
from longtrace.trainer.rows import Row
from longtrace.trainer.source import RolloutBatch
from longtrace.trainer.train import make_optimizer

from .. import BenchConfig, grpo, harness
from ..device import Clock, measure
from ..harness import console

SHARES = (0.25, 0.5, 0.75)  # of the groups, all right or all wrong
PROMPT, GROUPS, GROUP = 32, 8, 8
FP32_TOKENS = 16  # of a completion, where gradients are compared in fp32
BOUND = 1e-5  # relative error of the gradients in fp32


class Replay:
    """An engine and a score that give the same rollout every time: random completions, a share of the groups degenerate."""

    def __init__(self, vocabulary: int, tokens: int, share: float):
        draw = np.random.default_rng(0)

        def completion() -> Completion:
            length = int(draw.integers(tokens // 2, tokens + 1))
            return Completion(draw.integers(5, vocabulary, length).tolist(), [0.0] * length, True)

        self.prompts = [Prompt(draw.integers(5, vocabulary, PROMPT).tolist(), Row([{"content": ""}], None, "", {}), None)
                        for _ in range(GROUPS)]  # fmt: skip
        self.completions = [[completion() for _ in range(GROUP)] for _ in range(GROUPS)]
        self.rewards = draw.permuted(np.tile(np.arange(GROUP) % 2, (GROUPS, 1)), axis=1).astype(float)
        for group in range(round(share * GROUPS)):
            self.rewards[group] = group % 2

    def generate(self, prompts, sampling, **_) -> list[list[Completion]]:
        return self.completions

    def score(self, asked, done) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        return self.rewards.flatten(), {"accuracy": self.rewards.flatten()}


class Trainee:
    """A model, its masters and AdamW at a learning rate of 0."""

    def __init__(self, folder: Path, out: Path, dtype: str, tokens: int):
        self.config = check(GRPOConfig(
            model=str(folder), data=[], out=out, max_tokens=PROMPT + tokens + 1, max_new_tokens=tokens, tokens_per_row=4096,
            prompts_per_rollout=GROUPS, group_size=GROUP, lr=0.0, dtype=dtype, rope="none", device="cpu",
            activation_checkpointing="off",
        ))  # fmt: skip
        self.model = load_model(self.config)
        self.vocabulary, self.tokens = len(self.model.head().weight), tokens
        self.masters = Masters(self.model, DTYPES[dtype])
        self.optimizer = make_optimizer(self.config, self.masters)
        self.objective = PolicyGradient()

    def rows(self, share: float, keep: bool) -> list[RolloutBatch]:
        """The step's packed rows. A bonus makes the source keep every group; the objective knows nothing of it."""
        config = replace(self.config, entropy_bonus=1.0) if keep else self.config
        replay = Replay(self.vocabulary, self.tokens, share)
        return RolloutSource(config, self.model, replay, replay.prompts, replay.score).next()

    def backward(self, batches: list[RolloutBatch]) -> None:
        count = sum(self.objective.count(batch) for batch in batches)
        for batch in batches:
            (self.objective(self.model.hidden(batch), self.model.head(), batch)[0] / count).backward()

    def step(self, batches: list[RolloutBatch]) -> None:
        self.backward(batches)
        torch.nn.utils.get_total_norm(self.masters.gradients())
        self.optimizer.step()
        self.masters.zero_grad()
        self.masters.publish()

    def difference(self, share: float) -> float:
        """Relative Frobenius distance between the gradients without and with the degenerate groups."""
        gradients = []
        for keep in (False, True):
            self.backward(self.rows(share, keep))
            gradients.append([g.clone() for g in self.masters.gradients()])
            self.masters.zero_grad()
        apart = sum(float((a - b).norm()) ** 2 for a, b in zip(*gradients, strict=True))
        return (apart / sum(float(b.norm()) ** 2 for b in gradients[1])) ** 0.5


def bench(config: BenchConfig) -> None:
    """Times and compares, prints the checks, draws degenerate_groups.png, writes the record. Raises Refusal if one fails."""
    tokens = 16 if config.quick else config.tokens or 64
    shares = {f"{share:.0%} of the groups": share for share in SHARES}
    machine = harness.machine(harness.threads_here(config.threads))
    torch.set_num_threads(machine["threads"])
    with tempfile.TemporaryDirectory(prefix="longtrace-bench-") as name:
        folder, what = grpo._model(config, Path(name))
        exact = Trainee(folder, Path(name) / "fp32", "fp32", min(tokens, FP32_TOKENS))
        error = exact.difference(0.5)
        del exact
        trainee = Trainee(folder, Path(name) / "bf16", "bf16", tokens)
        rows = [row for case, share in shares.items() for row in _measure(trainee, case, share, config.repeats)]
    ratios = {case: _ratio(rows, case) for case in shares}
    checks = [f"{'holds' if error <= BOUND else 'FAILS'}: gradients in fp32 differ by {error:.1e}, at most {BOUND:.0e}"]
    what = (
        f"{what}; {GROUPS} groups of {GROUP} completions of {tokens // 2} to {tokens} tokens, prompts of {PROMPT}; bf16"
    )
    columns = {"degenerate": "degenerate", "impl": "", "ms": "ms a step", "ms_min": "min", "ms_max": "max",
               "tokens": "tokens", "rows": "rows", "grad_err": "gradients differ"}  # fmt: skip
    formats = {"ms": ",.0f", "ms_min": ",.0f", "ms_max": ",.0f", "tokens": ",", "grad_err": ".1e"}
    harness.print_table(f"A GRPO step with and without degenerate groups\n{what}", columns, rows, formats)
    for case, ratio in ratios.items():
        console.print(f"{case}: kept / left out {ratio:.2f}", highlight=False)
    for line in checks:
        console.print(line, style="green" if line.startswith("holds") else "bold red", highlight=False)
    record = harness.write_record(
        "degenerate_groups", config.json, machine=machine, rows=rows, ratios=ratios, checks=checks, setting=what,
        fp32_gradients_differ=error,
    )  # fmt: skip
    panels = [(f"{case} degenerate: ms", [r for r in rows if r["degenerate"] == case], "ms", ",.0f") for case in shares]
    note = f"{what}\n{machine['cpu']}, {machine['threads']} threads, {machine['date']}"
    harness.bar_picture(
        record.parent / "degenerate_groups.png", "A GRPO step, degenerate groups left out", panels, note
    )
    console.print(f"record in {record}, picture beside it", highlight=False)
    if failed := [line for line in checks if line.startswith("FAILS")]:
        raise Refusal(f"bench degenerate_groups: {len(failed)} of {len(checks)} checks failed")


def _measure(trainee: Trainee, case: str, share: float, repeats: int) -> list[dict]:
    error = trainee.difference(share)
    batches = {"longtrace: left out": trainee.rows(share, False), "kept": trainee.rows(share, True)}
    times = measure({name: lambda b=b: trainee.step(b) for name, b in batches.items()}, Clock("cpu"), repeats=repeats)
    if times.failed:
        raise RuntimeError(f"bench degenerate_groups: {times.failed}")
    return [
        {"impl": name, "degenerate": case, **times.row(name), "tokens": sum(batch.tokens for batch in here), "rows": len(here),
         "grad_err": error if name != "kept" else None}
        for name, here in batches.items()
    ]  # fmt: skip


def _ratio(rows: list[dict], case: str) -> float:
    left_out, kept = (row["ms"] for row in rows if row["degenerate"] == case)
    return kept / left_out

"""What does BVPO's blend buy in training, at equal tokens? Trace-only DPO, empty-only, alpha 0.5, estimated alpha, K-trace DPO.

On the model whose traces can be listed (`enumerable`), so that what is compared is exact: the marginal loss, and the chance of the
right answer with and without a thought, after training on sampled pairs. Every arm sees as many tokens; the rate of each is the best
of three on other seeds. A small batch, where variance rules, and a large one, where bias does.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, vmap

from longtrace import kernels as K
from longtrace.trainer.paths import GROUPS, START, significant
from longtrace.trainer.preference import preference_loss

from .. import BenchConfig, harness
from ..harness import console
from ..head_report import _figure
from . import bvpo_theorems, enumerable, toy
from .bvpo_theorems import BETA, Pairs
from .enumerable import PROMPT, Params

RATES = (1e-3, 3e-3, 1e-2)  # Adam
ARMS = {  # name: (label, traces an answer, share of the trace path; None: estimated)
    "trace": ("traces alone (DPO)", 1, 1.0),
    "empty": ("empty path alone", 1, 0.0),
    "half": ("alpha = 0.5 (BVPO)", 1, 0.5),
    "auto": ("alpha estimated", 1, None),
    "k_trace": ("4 traces an answer", 4, 1.0),
}
STUDENT = {6: 2.571, 3: 4.303}  # 95 % of t, by runs


@dataclass(frozen=True)
class Size:
    cold_start: int = 200
    prompts: int = 8
    letters: int = 4
    batches: tuple[int, ...] = (4, 32)
    trace_steps: tuple[int, ...] = (120, 48)  # of the trace-only arm, by batch: sets the tokens of all
    tuning: int = 2  # seeds that choose the rate
    seeds: int = 6  # seeds that count


QUICK = Size(cold_start=40, prompts=4, letters=2, batches=(4, 16), trace_steps=(12, 6), tuning=1, seeds=3)


def tokens_of(arm: str, letters: int) -> int:
    """Tokens that one prompt costs: two sequences of prompt, thought, END and answer for each trace, two for the empty path."""
    _, traces, share = ARMS[arm]
    with_trace, without = 2 * (PROMPT + letters + 2), 2 * (PROMPT + 2)
    return (traces * with_trace if share != 0 else 0) + (without if share != 1 else 0)


class Runs:
    """Several seeds of an arm trained at once: weights (seeds, weights), each seed with its data, its Adam and its alpha."""

    def __init__(self, pairs: Pairs, start: Params, arm: str, batch: int, seeds: list[int], lr: float):
        self.pairs, self.batch = pairs, batch
        _, self.traces, self.share = ARMS[arm]
        self.shapes = {name: p.shape for name, p in start.items()}
        flat = torch.cat([p.flatten() for p in start.values()])
        self.weights = flat.repeat(len(seeds), 1).requires_grad_()
        self.optimizer = torch.optim.Adam([self.weights], lr=lr)  # elementwise: the seeds do not touch
        self.generators = [torch.Generator().manual_seed(seed) for seed in seeds]
        self.running = [K.RunningStatistics() for _ in seeds]
        self.alphas = torch.full((len(seeds),), START if self.share is None else self.share, dtype=torch.float64)
        self.trusted = [False] * len(seeds)
        self.groups = min(GROUPS, batch) if self.share is None else 1

    def params(self, weights: Tensor) -> Params:
        parts = weights.split([math.prod(shape) for shape in self.shapes.values()])
        return {name: part.view(shape) for part, (name, shape) in zip(parts, self.shapes.items())}

    def step(self) -> None:
        """One optimizer step of every seed."""
        by_path = self.path_gradients()
        if self.share is None:
            self._estimate(*by_path)
        trace, empty = (0.0 if g is None else g.mean(1) for g in by_path)
        share = self.alphas[:, None]
        self.weights.grad = share * trace + (1 - share) * empty
        self.optimizer.step()

    def path_gradients(self) -> list[Tensor | None]:
        """Of freshly sampled pairs: each path's gradients by group, (seeds, groups, weights); None where it has no share."""
        shape = (self.batch // self.groups, self.groups)
        data = [self.pairs.sample(shape, generator) for generator in self.generators]
        if self.traces > 1:  # more traces of the same answers
            for seed, generator in zip(data, self.generators):
                for answer, trace in (("right", "good"), ("wrong", "bad")):
                    chances = self.pairs.posterior.mT[seed["x"], seed[answer]]
                    drawn = torch.multinomial(chances.flatten(0, 1), self.traces, replacement=True, generator=generator)
                    seed[trace] = drawn.view(*shape, self.traces)
        else:
            data = [seed | {side: seed[side][..., None] for side in ("good", "bad")} for seed in data]
        stacked = {key: torch.stack([seed[key] for seed in data]).transpose(1, 2) for key in data[0]}
        wanted = ((self._trace_loss, self.share != 0), (self._empty_loss, self.share != 1))
        return [self._gradients(loss, stacked) if has_share else None for loss, has_share in wanted]

    def _gradients(self, loss, data: dict[str, Tensor]) -> Tensor:
        """The gradient of the mean loss of each group: (seeds, groups, weights)."""
        each = vmap(vmap(grad(loss), in_dims=(None, 0)), in_dims=(0, 0))
        return each(self.weights.detach(), data)

    def _trace_loss(self, weights: Tensor, data: dict[str, Tensor]) -> Tensor:
        """Of one group: data (pairs,), traces (pairs, traces of an answer)."""
        prompts, many = self.pairs.prompts[data["x"]], data["good"].shape[1]

        def sides(trace: Tensor, answer: Tensor):
            answers = answer.repeat_interleave(many)
            words = self.pairs.traces[trace.flatten()]
            found = enumerable.joint(self.pairs.model, self.params(weights), prompts.repeat_interleave(many, 0), words)
            before = self.pairs.reference[data["x"].repeat_interleave(many), trace.flatten(), answers]
            return found.gather(1, answers[:, None])[:, 0], before

        return _loss(sides(data["good"], data["right"]), sides(data["bad"], data["wrong"]))

    def _empty_loss(self, weights: Tensor, data: dict[str, Tensor]) -> Tensor:
        prompts = self.pairs.prompts[data["x"]]
        found = enumerable.joint(self.pairs.model, self.params(weights), prompts, prompts[:, :0])
        before = self.pairs.reference_empty[data["x"]]

        def side(answer: Tensor):
            return found.gather(1, answer[:, None])[:, 0], before.gather(1, answer[:, None])[:, 0]

        return _loss(side(data["right"]), side(data["wrong_empty"]))

    def _estimate(self, trace: Tensor, empty: Tensor) -> None:
        """The trainer's rule: statistics averaged over steps; START until the estimate is away from it."""
        counts = [self.batch // self.groups] * self.groups
        for i, running in enumerate(self.running):
            running.update(K.path_statistics(trace[i] * counts[0], empty[i] * counts[0], counts))
            best = K.optimal_alpha(running.value(), self.batch)
            self.trusted[i] |= significant(best, running.steps)
            self.alphas[i] = best.alpha if self.trusted[i] else START

    @torch.no_grad()
    def evaluate(self) -> list[dict[str, float]]:
        """Exact, of each seed: marginal loss, chance of the right answer with a thought and without."""
        rows, pairs = [], self.pairs
        for weights in self.weights:
            params = self.params(weights)
            joint, empty = (
                enumerable.every_joint(pairs.model, params, pairs.prompts, words)
                for words in (pairs.traces, pairs.nothing)
            )
            rows.append({
                "loss": float(pairs.loss_of(joint)),
                "thinking": float(enumerable.solved(joint, pairs.right).mean()),
                "not_thinking": float(enumerable.solved(empty, pairs.right).mean()),
            })  # fmt: skip
        return rows


def _loss(chosen: tuple[Tensor, Tensor], rejected: tuple[Tensor, Tensor]) -> Tensor:
    """The trainer's DPO loss, mean over pairs, of (policy's, reference's) log-probabilities."""
    return preference_loss("dpo", chosen[0], rejected[0], beta=BETA, reference=(chosen[1], rejected[1]))[0].mean()


def train(pairs: Pairs, start: Params, arm: str, batch: int, steps: int, lr: float, seeds: list[int]):
    """The finished runs and the mean alpha over the seeds of every step."""
    runs, alphas = Runs(pairs, start, arm, batch, seeds, lr), []
    for _ in range(steps):
        runs.step()
        alphas.append(float(runs.alphas.mean()))
    return runs, alphas


def bench(config: BenchConfig) -> None:
    """Trains, prints the checks, draws bvpo_training.png, writes the record. Raises Refusal if a check fails."""
    size = QUICK if config.quick else Size()
    torch.set_num_threads(1)  # a model this small is slower on more
    machine = harness.machine(1)
    start, pairs = bvpo_theorems.make_pairs(size.cold_start, size.prompts, size.letters)
    before = Runs(pairs, start, "trace", 1, [0], 1.0).evaluate()[0]
    rows, curves = [], {}
    for batch, trace_steps in zip(size.batches, size.trace_steps):
        tokens = trace_steps * batch * tokens_of("trace", size.letters)
        for arm in ARMS:
            steps = round(tokens / (batch * tokens_of(arm, size.letters)))
            by_rate = {}
            for lr in RATES:
                runs, alphas = train(pairs, start, arm, batch, steps, lr, list(range(size.tuning + size.seeds)))
                by_rate[lr] = (runs.evaluate(), alphas)
            rate = min(RATES, key=lambda lr: np.mean([row["loss"] for row in by_rate[lr][0][: size.tuning]]))
            found, curves[f"{arm}, B = {batch}"] = by_rate[rate][0][size.tuning :], by_rate[rate][1]
            rows.append({"impl": arm, "batch": batch, "steps": steps, "tokens": tokens, "lr": rate,
                         "alpha": float(np.mean(by_rate[rate][1])), **_means(found),
                         "by_rate": {f"{lr:g}": float(np.mean([r["loss"] for r in all_[0][size.tuning :]])) for lr, all_ in by_rate.items()}})  # fmt: skip
            console.print(f"B = {batch}, {ARMS[arm][0]}: {steps} steps, rate {rate:g}, L_m {rows[-1]['loss']:.4f} +- {rows[-1]['loss_half']:.4f}", highlight=False)  # fmt: skip
    columns = {"batch": "B", "impl": "", "steps": "steps", "lr": "rate", "alpha": "mean alpha", "loss": "L_m", "loss_half": "+- (95 %)", "loss_sd": "sd of seeds",
               "thinking": "solved, thinking", "thinking_half": "+-", "not_thinking": "without", "not_thinking_half": "+- "}  # fmt: skip
    formats = dict.fromkeys(("loss", "loss_half", "loss_sd"), ".4f") | dict.fromkeys(("alpha",), ".2f")
    formats |= dict.fromkeys(("thinking", "thinking_half", "not_thinking", "not_thinking_half"), ".3f")
    harness.print_table(
        "Exact marginal loss and chance of the right answer after training at equal tokens", columns, rows, formats
    )
    console.print(f"before: L_m {before['loss']:.4f}, solved {before['thinking']:.3f} thinking, {before['not_thinking']:.3f} without", highlight=False)  # fmt: skip
    checks = toy.hold([] if config.quick else _checks(rows, before))  # a few steps say nothing
    what = (
        f"{size.prompts} prompts, traces of {size.letters} letters; {size.seeds} seeds, 95 % intervals; Adam's rate the best of "
        f"{', '.join(f'{r:g}' for r in RATES)} on {size.tuning} other seeds; tokens by batch: "
        + ", ".join(f"{row['tokens']:,}" for row in rows if row["impl"] == "trace")
    )
    record = harness.write_record(
        "bvpo_training", config.json, machine=machine, rows=rows, ratios={}, setting=what, before=before, alphas=curves,
        checks=checks,
    )  # fmt: skip
    _picture(record.parent / "bvpo_training.png", rows, before, curves, size.batches, what)
    console.print(f"record in {record}, picture beside it", highlight=False)
    toy.refuse_failed("bvpo_training", checks)


def _means(found: list[dict[str, float]]) -> dict[str, float]:
    """Mean over seeds, half the 95 % interval of the mean, standard deviation and the seeds' values of each quantity."""
    row: dict = {}
    for key in found[0]:
        values = [r[key] for r in found]
        sd = float(np.std(values, ddof=1))
        row |= {key: float(np.mean(values)), f"{key}_sd": sd, f"{key}_seeds": [round(v, 6) for v in values],
                f"{key}_half": STUDENT[len(values)] * sd / len(values) ** 0.5}  # fmt: skip
    return row


def _checks(rows: list[dict], before: dict[str, float]) -> list[tuple[bool, str]]:
    by = {(row["impl"], row["batch"]): row for row in rows}
    small, large = sorted({row["batch"] for row in rows})
    alphas = [by["auto", batch]["alpha"] for batch in (small, large)]
    return [
        (abs(before["loss"] - math.log(2)) < 1e-9, f"training starts at ln 2 ({before['loss']:.9f})"),
        (all(by[arm, large]["loss"] + by[arm, large]["loss_half"] < before["loss"] for arm in ("trace", "half", "auto", "k_trace")),
         f"every arm with traces lowers the marginal loss at B = {large}"),
        (alphas[0] < alphas[1], f"the estimated alpha is larger in the larger batch ({alphas[0]:.2f}, {alphas[1]:.2f})"),
    ]  # fmt: skip


COLOURS = dict(zip(ARMS, ("#c0392b", "#1f9d63", "#15181e", "#2f6fde", "#b7791f")))


def _picture(
    path: Path, rows: list[dict], before: dict[str, float], curves, batches: tuple[int, ...], note: str
) -> None:
    figure, axes = _figure("BVPO at equal tokens, on a transformer whose every trace is listed", note, 3, 4.4)
    panels = (
        ("loss", "Exact marginal loss, lower is better (dots: seeds; dotted: before)"),
        ("thinking", "Chance of the right answer; hollow: without a thought"),
    )
    for ax, (key, title) in zip(axes, panels):
        for i, row in enumerate(rows):
            x, colour = i % len(ARMS) + (len(ARMS) + 1) * batches.index(row["batch"]), COLOURS[row["impl"]]
            label = ARMS[row["impl"]][0] if i < len(ARMS) else None
            ax.errorbar(x, row[key], row[f"{key}_half"], fmt="o", capsize=4, color=colour, label=label)
            if key == "loss":
                ax.plot([x + 0.25] * len(row["loss_seeds"]), row["loss_seeds"], ".", color=colour, alpha=0.4)
            else:
                other, half = row["not_thinking"], row["not_thinking_half"]
                ax.errorbar(x + 0.35, other, half, fmt="o", capsize=4, color=colour, markerfacecolor="white")
        ax.axhline(before[key], color="#9aa4b2", linestyle=":", linewidth=1.2)
        middle = (len(ARMS) - 1) / 2
        ax.set_xticks(
            [middle + (len(ARMS) + 1) * i for i in range(len(batches))], [f"B = {batch}" for batch in batches]
        )
        ax.grid(axis="x", visible=False)
        ax.set_title(title, loc="left", fontsize=10, color="#5d6673")
    axes[1].axhline(before["not_thinking"], color="#9aa4b2", linestyle=":", linewidth=1.2)
    axes[0].legend(frameon=False, fontsize=8)
    for batch, style in zip(batches, ("-", "--")):
        line = curves[f"auto, B = {batch}"]
        axes[2].plot(np.arange(1, len(line) + 1) / len(line), line, style, color=COLOURS["auto"], label=f"B = {batch}")
    axes[2].axhline(0.5, color=COLOURS["half"], linewidth=1)
    axes[2].set_ylim(0, 1)
    axes[2].set_xlabel("share of the tokens")
    axes[2].set_title("The estimated alpha, mean of the seeds", loc="left", fontsize=10, color="#5d6673")
    axes[2].legend(frameon=False, fontsize=8)
    figure.savefig(path)

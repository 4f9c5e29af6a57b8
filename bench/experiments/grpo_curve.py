"""Does reinforcement learning teach, or does anything that goes on? Curves of three seeds beside two controls.

From one cold start (traces of a teacher who errs in 15 % of the steps), for each seed: GRPO; GRPO whose rewards are dealt out at
random over the rollout (same rewards, no information); and more fine-tuning on the teacher's traces, about as many tokens as GRPO
trained on, at the same peak rate. Held-out pass@1 at temperature 1, on problems that none of them has seen.
"""

from __future__ import annotations

import dataclasses
import random
import tempfile
from pathlib import Path

import numpy as np
import torch
from matplotlib.backends.backend_agg import FigureCanvasAgg
from matplotlib.figure import Figure

from longtrace.trainer import demo, grpo, tasks, train
from longtrace.trainer.config import Refusal, SFTConfig
from longtrace.trainer.model import load_model
from longtrace.trainer.rollout import Engine

from .. import BenchConfig, harness
from ..harness import console

SEEDS = (0, 1, 2)
STUDENT = 4.303  # 95 % of t with two degrees of freedom: three seeds
BAND = (
    0.84,
    0.94,
)  # of GRPO's mean over the seeds, whatever commit: the first record's 95 % interval, rounded outwards
SAMPLES, HELD_OUT, EVERY = 4, 128, 10
ARMS = {"grpo": "GRPO", "permuted": "GRPO, rewards permuted", "sft": "more fine-tuning"}
_shuffle = random.Random(0)


def permuted(completions: list[str], rows: list[dict]) -> list[float]:
    """The rewards of a batch, dealt out at random."""
    rewards = [float(tasks.solved(row, text)) for text, row in zip(completions, rows)]
    _shuffle.shuffle(rewards)
    return rewards


def bench(config: BenchConfig) -> None:
    """Trains, prints the checks, draws grpo_curve.png, writes the record. Raises Refusal if a check fails."""
    recipe = dataclasses.replace(demo.QUICK, optimizer_steps=100) if config.quick else demo.FULL
    steps = 4 if config.quick else config.steps or recipe.rl_steps
    seeds = SEEDS[:1] if config.quick else SEEDS
    torch.set_num_threads(1)  # a model this small is no faster on more
    machine = harness.machine(1)
    with tempfile.TemporaryDirectory(prefix="longtrace-bench-") as folder:
        cold, curves = Path(folder) / "cold", {arm: [] for arm in ARMS}
        _cold_start(recipe, cold)
        start = _rate(recipe, cold)
        console.print(f"cold start: pass@1 {start:.3f}", highlight=False)
        for seed in seeds:
            trained = 0  # tokens
            for arm in ARMS:
                _shuffle.seed(seed)
                out = Path(folder) / f"{arm}-{seed}"
                if arm == "sft":
                    curve = [(0, start), (steps, _more_sft(recipe, cold, out, seed, trained))]
                else:
                    found = grpo.grpo(_grpo(recipe, cold, out, seed, steps, arm))
                    trained = trained or sum(row["tokens"] for row in found.metrics)
                    curve = [(row["step"], row["eval_pass@1"]) for row in found.metrics if "eval_pass@1" in row]
                    curve = [(0, start), *curve]
                curves[arm].append(curve)
                console.print(f"seed {seed}, {ARMS[arm]}: pass@1 {curve[-1][1]:.3f}", highlight=False)
    rows = [_row(arm, curves[arm], start, steps) for arm in ARMS]
    by_arm = {row["impl"]: row for row in rows}
    checks = [] if config.quick else _checks(by_arm, start)  # a few steps say nothing
    columns = {
        "impl": "",
        "pass_at_1": "pass@1",
        "half": "+- (95 %)",
        "low": "worst seed",
        "high": "best seed",
        "seeds": "seeds",
    }
    harness.print_table(
        "Held-out pass@1 at temperature 1", columns, rows, dict.fromkeys(("pass_at_1", "half", "low", "high"), ".3f")
    )
    for check in checks:
        console.print(check, style="green" if check.startswith("holds") else "bold red", highlight=False)
    what = f"{steps} steps, {recipe.rl_prompts} problems x 8, chains of {recipe.steps_of_a_chain}; {HELD_OUT} x {SAMPLES} held out"
    record = harness.write_record(
        "grpo_curve", config.json, machine=machine, rows=rows, ratios={}, setting=what, cold_start=start, curves=curves,
        checks=checks,
    )  # fmt: skip
    _picture(record.parent / "grpo_curve.png", curves, what)
    console.print(f"record in {record}, picture beside it", highlight=False)
    if failed := [check for check in checks if check.startswith("FAILS")]:
        raise Refusal(f"bench grpo_curve: {len(failed)} of {len(checks)} checks failed")


def _checks(rows: dict[str, dict], start: float) -> list[str]:
    grpo, permuted, sft = (rows[arm] for arm in ARMS)
    return [
        f"{'holds' if holds else 'FAILS'}: {text}"
        for holds, text in (
            (grpo["low"] >= 0.7, f"every seed of GRPO reaches 0.7 (worst {grpo['low']:.3f})"),
            (
                BAND[0] <= grpo["pass_at_1"] <= BAND[1],
                f"GRPO's mean stays in the committed band, {BAND[0]} to {BAND[1]} ({grpo['pass_at_1']:.3f})",
            ),
            (
                permuted["high"] < start + 0.05,
                f"permuted rewards do not rise ({start:.3f} to {permuted['high']:.3f} at best)",
            ),
            (grpo["low"] > sft["high"], f"GRPO's worst seed is above the best of more fine-tuning ({sft['high']:.3f})"),
        )
    ]


def _sft(recipe, model: Path, out: Path, seed: int, steps: int) -> None:
    train.sft(
        SFTConfig(
            model=str(model), data=[recipe.data(0, errors=recipe.errors)], out=out, max_tokens=256,
            tokens_per_row=recipe.tokens_per_row, steps=steps, lr=recipe.lr, warmup=0.05, dtype="fp32",
            activation_checkpointing="off", seed=seed,
        )
    )  # fmt: skip


def _cold_start(recipe, out: Path) -> None:
    base = out.with_name("base")
    tokenizer = demo.make_tokenizer([recipe.data(0, style=style) for style in ("concise", "answer")])
    demo.make_model(tokenizer, 0).save_pretrained(base)
    tokenizer.save_pretrained(base)
    _sft(recipe, base, out, 0, recipe.optimizer_steps)


def _more_sft(recipe, cold: Path, out: Path, seed: int, tokens: int) -> float:
    recipe = dataclasses.replace(recipe, lr=recipe.rl_lr)
    _sft(recipe, cold, out, seed, max(1, round(tokens / recipe.tokens_per_row)))
    return _rate(recipe, out)


def _grpo(recipe, model: Path, out: Path, seed: int, steps: int, arm: str) -> grpo.GRPOConfig:
    return grpo.GRPOConfig(
        model=str(model), data=[recipe.data(0)], eval_data=[recipe.data(0, "test")], eval_limit=HELD_OUT,
        eval_samples=SAMPLES, eval_every=EVERY, out=out, max_tokens=256, tokens_per_row=2048,
        max_new_tokens=recipe.max_new_tokens, prompts_per_rollout=recipe.rl_prompts, steps=steps, lr=recipe.rl_lr,
        schedule="constant", warmup=0, dtype="fp32", activation_checkpointing="off", seed=seed,
        reward=["accuracy"] if arm == "grpo" else [f"{__name__}:permuted"],
    )  # fmt: skip


def _rate(recipe, folder: Path) -> float:
    """Held-out pass@1 of a folder, by the engine of the loop, with the samples of seed 0."""
    config = _grpo(recipe, folder, folder / "unused", 0, 1, "grpo")
    model = load_model(config)
    held_out = grpo.read_prompts(config.eval_data, model, config, limit=HELD_OUT)
    return grpo.evaluate(Engine.of(model, config.slots), held_out, config)["eval_pass@1"]


def _row(arm: str, curves: list[list[tuple[int, float]]], start: float, steps: int) -> dict:
    final = [curve[-1][1] for curve in curves]
    half = STUDENT * float(np.std(final, ddof=1)) / len(final) ** 0.5 if len(final) == len(SEEDS) else None
    return {"impl": arm, "pass_at_1": float(np.mean(final)), "half": half, "low": min(final), "high": max(final), "start": start,
            "steps": steps, "seeds": ", ".join(f"{value:.3f}" for value in final)}  # fmt: skip


def _picture(path: Path, curves: dict[str, list], note: str) -> None:
    figure = Figure(figsize=(7.5, 4), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    ax = figure.subplots()
    for (arm, label), colour in zip(ARMS.items(), ("#2f6fde", "#c0392b", "#9aa4b2")):
        for i, curve in enumerate(curves[arm]):
            ax.plot(*zip(*curve), color=colour, linewidth=1.6, alpha=0.9, label=label if i == 0 else None)
    ax.set_ylim(0, 1)
    ax.set_xlabel("optimizer step of GRPO (more fine-tuning: as many tokens)")
    ax.set_ylabel("held-out pass@1")
    ax.legend(frameon=False)
    ax.spines[["top", "right"]].set_visible(False)
    figure.supxlabel(note, x=0.012, ha="left", fontsize=8, color="#5d6673")
    figure.savefig(path)

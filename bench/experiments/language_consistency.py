"""Does the language reward keep a thought in one language, and what does it cost? DeepSeek-R1's ablation on two alphabets.

Problems are asked in English. The cold start's teacher writes each line of the working in Latin or in Cyrillic words, switches
between lines, and calculates better in Cyrillic, so that right answers alone are a reason to leave the prompt's language.
Then GRPO with accuracy alone, and with the share of Latin words added to it at R1's weight, 1; three seeds of each.
"""

from __future__ import annotations

import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from longtrace.trainer import answers, grpo, rewards, tasks
from longtrace.trainer.task_common import whole_trace

from .. import BenchConfig, harness
from ..harness import console
from ..head_report import _figure
from . import toy

WORDS = {
    "Latin": {"+": "plus", "-": "minus", "*": "times", "=": "gives"},
    "Cyrillic": {"+": "плюс", "-": "минус", "*": "на", "=": "даёт"},
}
ERRORS = {"Latin": 0.15, "Cyrillic": 0.03}  # share of the teacher's steps that are wrong
SWITCHES = 0.25  # of the lines are written in the other alphabet than the line before
LINES = 4  # of working
COLD_START, RL, SEEDS = 1000, 30, (0, 1, 2)  # steps, steps, runs of each arm
PROBLEMS, HELD_OUT, SAMPLES = 9600, 128, 4
WEIGHTS = {"accuracy": 0.0, "accuracy + language": 1.0}  # of the share of Latin words in the reward
COLOURS = {"accuracy": "#c0392b", "accuracy + language": "#2f6fde"}


def rows(split: str, count: int) -> Iterator[dict]:
    """Generated chains whose working is in two alphabets, with the teacher's errors."""
    rng = random.Random(split)
    for row in tasks.rows(f"chain,steps={LINES},modulus=10,rows={count},split={split}"):
        yield row | {"trace": _trace(row["trace"], rng)}


def _trace(right: str, rng: random.Random) -> str:
    """A right trace as the teacher writes it: the same operations, words for signs, and what its errors lead to."""
    steps = re.findall(r"^\d+\. (\d) (.) (\d) = (\d)$", right, re.M)
    value, alphabet, lines = int(steps[0][0]), rng.choice(list(WORDS)), []
    for i, (_, sign, b, _) in enumerate(steps, 1):
        if rng.random() < SWITCHES:
            alphabet = next(other for other in WORDS if other != alphabet)
        result = {"+": value + int(b), "-": value - int(b), "*": value * int(b)}[sign]
        if rng.random() < ERRORS[alphabet]:
            result += rng.randrange(1, 10)
        words = WORDS[alphabet]
        lines.append(f"{i}. {value} {words[sign]} {b} {words['=']} {result % 10}")
        value = result % 10
    return whole_trace(lines, str(value))


def bench(config: BenchConfig) -> None:
    """Trains, prints the checks, draws language_consistency.png, writes the record. Raises Refusal if a check fails."""
    cold_start, steps = (60, 3) if config.quick else (COLD_START, config.steps or RL)
    seeds, held_out, samples = (SEEDS[:1], 32, 2) if config.quick else (SEEDS, HELD_OUT, SAMPLES)
    torch.set_num_threads(1)  # a model this small is no faster on more
    machine = harness.machine(1)
    curves: dict[str, dict[str, list]] = {arm: {"consistency": [], "accuracy": []} for arm in WEIGHTS}
    with tempfile.TemporaryDirectory(prefix="longtrace-bench-") as name:
        folder = Path(name)
        teacher = list(rows("train", PROBLEMS))
        cold = toy.cold_start(folder, teacher, steps=cold_start)
        train = toy.write_rows(folder / "problems.jsonl", teacher)
        test = toy.write_rows(folder / "held-out.jsonl", rows("test", held_out))
        found = [{"impl": "cold start", "seed": None} | _measure(cold, test, samples)]
        for seed in seeds:
            for arm, weight in WEIGHTS.items():
                out = folder / f"{weight}-{seed}"
                result = grpo.grpo(
                    _config(cold, train, out, seed, steps=steps, reward=["accuracy", f"language:en={weight}"])
                )
                curves[arm]["consistency"].append([row["reward_language:en"] for row in result.metrics])
                curves[arm]["accuracy"].append([row["reward_accuracy"] for row in result.metrics])
                found.append({"impl": arm, "seed": seed} | _measure(out, test, samples))
                console.print("  ".join(f"{k} {v}" for k, v in found[-1].items()), highlight=False)
    what = (
        f"{steps} steps of 16 problems x 8, chains of {LINES}; teacher's errors {ERRORS['Latin']:.0%} of the lines in Latin, "
        f"{ERRORS['Cyrillic']:.0%} in Cyrillic; {len(seeds)} seeds; {held_out} x {samples} held out"
    )
    table = [_summary(arm, [row for row in found if row["impl"] == arm]) for arm in ("cold start", *WEIGHTS)]
    columns = {"impl": "", "consistency": "Latin words", "consistency_seeds": "seeds", "one_language": "all-Latin thoughts",
               "accuracy": "pass@1", "accuracy_seeds": "seeds"}  # fmt: skip
    harness.print_table("Held out", columns, table, dict.fromkeys(("consistency", "one_language", "accuracy"), ".3f"))
    checks = [] if config.quick else toy.hold(_checks(found))  # a few steps say nothing
    record = harness.write_record(
        "language_consistency", config.json, machine=machine, rows=table, ratios={}, setting=what, runs=found, curves=curves,
        checks=checks,
    )  # fmt: skip
    _picture(record.parent / "language_consistency.png", curves, found[0], what)
    console.print(f"record in {record}, picture beside it", highlight=False)
    toy.refuse_failed("language_consistency", checks)


def _config(model: Path, data: Path, out: Path, seed: int, **more) -> grpo.GRPOConfig:
    return toy.grpo_config(model, data, out, seed=seed, max_new_tokens=10 * LINES + 20, **more)


def _measure(model: Path, test: Path, samples: int) -> dict[str, float]:
    """On held-out problems at temperature 1: pass@1, the mean share of Latin words, the share of thoughts that have no others,
    and pass@1 of thoughts all in one alphabet."""
    done = toy.sample(_config(model, test, model / "unused", 0), samples)
    right = np.array([verdict == 1 for verdict in rewards.score(done)])
    latin = np.array([rewards.language_consistency(answers.thought_of(c.text), "en") for c in done])

    def rate(part: np.ndarray) -> float | None:
        return float(right[part].mean()) if part.any() else None

    return {
        "accuracy": float(right.mean()),
        "consistency": float(latin.mean()),
        "one_language": float((latin == 1).mean()),
        "accuracy_all_latin": rate(latin == 1),
        "accuracy_all_cyrillic": rate(latin == 0),
        "cut_off": float(np.mean([not c.finished for c in done])),
    }


def _summary(arm: str, runs: list[dict]) -> dict:
    row = {"impl": arm}
    for key in ("consistency", "one_language", "accuracy"):
        row[key] = float(np.mean([run[key] for run in runs]))
        row[f"{key}_seeds"] = ", ".join(f"{run[key]:.3f}" for run in runs)
    return row


def _checks(found: list[dict]) -> list[tuple[bool, str]]:
    cold = found[0]
    alone, rewarded = ([row for row in found if row["impl"] == arm] for arm in WEIGHTS)
    highest, lowest = max(r["consistency"] for r in alone), min(r["consistency"] for r in rewarded)
    gained = min(row["accuracy"] for row in found[1:])
    return [
        (lowest >= 0.95, f"with the reward every seed writes at least 95 % Latin words (lowest {lowest:.3f})"),
        (highest <= cold["consistency"] + 0.05, f"without it no seed comes nearer the prompt's language ({cold['consistency']:.3f}, then at most {highest:.3f})"),
        (gained > cold["accuracy"], f"every run answers better than its cold start ({cold['accuracy']:.3f}, then at least {gained:.3f})"),
    ]  # fmt: skip


def _picture(path: Path, curves: dict[str, dict[str, list]], cold: dict, note: str) -> None:
    figure, axes = _figure("GRPO with and without a reward for the prompt's language", note, 2, 4.2)
    for ax, key, label in zip(axes, ("consistency", "accuracy"), ("share of words in Latin letters", "right answers")):
        for arm in WEIGHTS:
            toy.draw(ax, curves[arm][key], f"reward: {arm}", color=COLOURS[arm])
        ax.axhline(cold[key], color="#9aa4b2", linestyle=":", linewidth=1.2, label="cold start, held out")
        ax.set_ylim(0, 1.02)
        ax.set_xlabel(f"step of GRPO (means of {toy.WINDOW} steps; bands: lowest to highest seed)")
        ax.set_ylabel(f"{label}, in rollouts")
        ax.legend(frameon=False, fontsize=9)
    figure.savefig(path)

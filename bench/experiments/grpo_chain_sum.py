"""Does GRPO teach a language model of 135M weights to add? reasoning_gym's chain_sum, each seed against its own start.

Sums and differences of two or three one-digit terms; what the test asks is never trained on (the same terms in another order may
be). The held-out problems are answered before and after, four times each at temperature 1: the mean difference of a
problem's two rates has a bootstrap interval over problems. Greedy answers show what narrower sampling cannot explain.
"""

from __future__ import annotations

import json
import tempfile
import time
from dataclasses import dataclass, replace
from itertools import islice
from pathlib import Path

import numpy as np
import torch

from longtrace.trainer import demo, grpo, train
from longtrace.trainer.config import Refusal, SFTConfig
from longtrace.trainer.experience import sampling_of
from longtrace.trainer.model import DTYPES, load_model
from longtrace.trainer.rewards import score
from longtrace.trainer.rollout import Engine
from longtrace.trainer.rows import read_rows

from .. import BenchConfig, harness
from ..harness import console
from ..head_report import _figure

SEEDS, STEPS = (0, 1, 2), 100
HELD_OUT, SAMPLES, DRAWS = 256, 4, 10_000  # problems, completions of each, draws of the bootstrap
TASK = "reasoning_gym:chain_sum,min_terms=2,max_terms=3,min_digits=1,max_digits=1"
# problem i is drawn from seed + i: seeds that lie closer than the size share problems
TRAIN, TEST = f"{TASK},seed=0,size=4000", f"{TASK},seed=1000000,size=1000"
# the bare problem, which ends in "=", and the answer behind it: in training a prompt costs as much as a completion
TEMPLATE = "{% for m in messages %}{{ m.content if m.role == 'user' else ' ' + m.content + eos_token }}{% endfor %}"
COLUMNS = {
    "impl": "", "start": "pass@1 before", "end": "after", "difference": "difference", "low": "from", "high": "to",
    "greedy_start": "greedy before", "greedy_end": "after", "updates": "updates", "written": "tokens written",
    "trained": "tokens trained on", "minutes": "minutes", "cpu_minutes": "of CPU time",
}  # fmt: skip
FORMATS = (
    dict.fromkeys(("start", "end", "greedy_start", "greedy_end"), ".3f")
    | dict.fromkeys(("difference", "low", "high"), "+.3f")
    | dict.fromkeys(("updates", "written", "trained"), ",.0f")
    | dict.fromkeys(("minutes", "cpu_minutes"), ".1f")
)


def bench(config: BenchConfig) -> None:
    """Trains, prints the checks, draws grpo_chain_sum.png, writes the record, where other seeds of the same setting stay.
    Raises Refusal without --model, and if a check fails."""
    if not (config.model or config.quick):
        raise Refusal(
            "bench grpo_chain_sum: found no --model; accepted: a model folder (random weights are never right)"
        )
    threads = 1 if config.quick else harness.threads_here(config.threads)  # a model so small is no faster on more
    torch.set_num_threads(threads)
    machine = harness.machine(threads)
    path = config.json or Path("runs/bench/grpo_chain_sum.json")
    with tempfile.TemporaryDirectory(prefix="longtrace-bench-") as folder:
        recipe, what = _recipe(config, Path(folder))
        console.print(f"grpo_chain_sum: {what}; {threads} threads", highlight=False)
        seeds, curves = _earlier(path, what)
        for seed in config.seeds or (SEEDS[:1] if config.quick else SEEDS):
            name = f"seed {seed}"
            seeds[name], curves[name] = _train(replace(recipe, seed=seed, out=recipe.out / name))
            rows = [seeds[key] for key in sorted(seeds)]
            checks = [] if config.quick else _checks(rows)  # a few steps say nothing
            rows += [_all(rows)] if len(rows) > 1 else []
            harness.write_record(  # after each seed: the next one takes its time
                "grpo_chain_sum",
                path,
                machine=machine,
                rows=rows,
                ratios={},
                setting=what,
                curves=curves,
                checks=checks,
            )
    _picture(path.parent / "grpo_chain_sum.png", rows, curves, what)
    harness.print_table("Held-out pass@1 at temperature 1, and greedy", COLUMNS, rows, FORMATS)
    for check in checks:
        console.print(check, style="green" if check.startswith("holds") else "bold red", highlight=False)
    console.print(f"record in {path}, picture beside it", highlight=False)
    if failed := [check for check in checks if check.startswith("FAILS")]:
        raise Refusal(f"bench grpo_chain_sum: {len(failed)} of {len(checks)} checks failed")


# ----------------------------------------------------------------------------------------------------------------------
# What is run


def _recipe(config: BenchConfig, folder: Path) -> tuple[grpo.GRPOConfig, str]:
    """The run, but for its seed, and what it is in words."""
    trained, left_out, held_out = _problems(folder, 24 if config.quick else HELD_OUT)
    template = folder / "template.jinja"
    template.write_text(TEMPLATE)
    shared = dict(template=str(template), max_tokens=128, activation_checkpointing="off", warmup=0)
    if config.quick:
        model, weights = _small(folder, shared), "0.4M weights, fine-tuned on a few answers"
        size = dict(dtype="fp32", lr=3e-4, steps=4, prompts_per_rollout=8)
    else:
        model, weights = Path(config.model).resolve(), f"weights of {Path(config.model).resolve().name}"
        size = dict(dtype="bf16", lr=2e-5, steps=config.steps or STEPS, prompts_per_rollout=16)
    recipe = grpo.GRPOConfig(
        model=str(model), data=[str(folder / "train.jsonl")], eval_data=[str(folder / "test.jsonl")], eval_limit=0,
        eval_samples=SAMPLES, out=folder, tokens_per_row=2048, group_size=8, max_new_tokens=48, stop=["\n"], **size, **shared,
    )  # fmt: skip
    what = (
        f"{weights}; {recipe.steps} steps of {recipe.prompts_per_rollout} problems x {recipe.group_size}, up to "
        f"{recipe.max_new_tokens} new tokens, lr {recipe.lr:g}, {recipe.dtype}; {trained:,} problems to train on "
        f"({left_out:,} left out), {held_out} x {SAMPLES} held out"
    )
    return recipe, what


def _problems(folder: Path, held_out: int) -> tuple[int, int, int]:
    """Writes test.jsonl, distinct problems, and train.jsonl, problems as drawn but for those of the test; how many there
    are to train on, were left out, and are held out."""
    test: dict[str, dict] = {}
    for row in read_rows(TEST):
        test.setdefault(row.raw["problem"], row.raw)
    test = dict(islice(test.items(), held_out))
    drawn = [row.raw for row in read_rows(TRAIN)]
    kept = [row for row in drawn if row["problem"] not in test]
    for name, chosen in (("train", kept), ("test", test.values())):
        (folder / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in chosen))
    return len(kept), len(drawn) - len(kept), len(test)


def _small(folder: Path, shared: dict) -> Path:
    """A model for --quick: the demo's, fine-tuned on answers until some are right."""
    rows = [json.loads(line) for line in (folder / "train.jsonl").read_text().splitlines()]
    turns = [
        {"messages": [{"role": "user", "content": r["problem"]}, {"role": "assistant", "content": r["answer"]}]}
        for r in rows
    ]
    (folder / "answers.jsonl").write_text("".join(json.dumps(turn) + "\n" for turn in turns))
    tokenizer = demo.make_tokenizer(["generated:chain,rows=100"])
    demo.make_model(tokenizer, 0).save_pretrained(folder / "base")
    tokenizer.save_pretrained(folder / "base")
    train.sft(
        SFTConfig(
            model=str(folder / "base"), data=[str(folder / "answers.jsonl")], out=folder / "small", tokens_per_row=1024,
            steps=60, lr=3e-3, dtype="fp32", **shared,
        )
    )  # fmt: skip
    return folder / "small"


def _train(recipe: grpo.GRPOConfig) -> tuple[dict, list[float]]:
    """One seed: its row, and the mean reward of each rollout."""
    before = _answers(recipe, recipe.model)
    began = time.process_time()
    steps = grpo.grpo(replace(recipe, eval_data=[])).metrics
    cpu = time.process_time() - began
    after = _answers(recipe, str(recipe.out))
    row = {
        "impl": f"seed {recipe.seed}",
        **_paired(before.right, after.right),
        "greedy_start": float(before.greedy.mean()),
        "greedy_end": float(after.greedy.mean()),
        "updates": sum(step["tokens"] > 0 for step in steps),  # a rollout without a mixed group makes none
        "written": sum(step["generated"] for step in steps),
        "trained": sum(step["tokens"] for step in steps),  # prompts too
        "minutes": steps[-1]["seconds"] / 60,
        "cpu_minutes": cpu / 60,  # of all threads, waiting for each other included: what a busy machine cannot hide
        "tokens_start": before.tokens,
        "tokens_end": after.tokens,
        "cut_off_start": before.cut_off,
        "cut_off_end": after.cut_off,
        "right_start": _digits(before.right),  # of SAMPLES, problem by problem
        "right_end": _digits(after.right),
    }
    console.print(f"{row['impl']}: pass@1 {row['start']:.3f} to {row['end']:.3f}", highlight=False)
    return row, [step["reward"] for step in steps]


@dataclass(frozen=True)
class Answers:
    """How a model answers the held-out problems."""

    right: np.ndarray  # (problems, SAMPLES) bool, at temperature 1
    greedy: np.ndarray  # (problems, 1) bool
    tokens: float  # mean length of the samples
    cut_off: float  # share of them


def _answers(recipe: grpo.GRPOConfig, folder: str) -> Answers:
    """The held-out answers of a model folder, by the engine, in the precision of the rollouts."""
    model = load_model(replace(recipe, model=folder))
    for parameter in model.hf.parameters():
        parameter.data = parameter.data.to(DTYPES[recipe.dtype])
    prompts = grpo.read_prompts(recipe.eval_data, model, recipe)
    engine = Engine.of(model, recipe.slots)

    def asked(samples: int, temperature: float) -> tuple[np.ndarray, list]:
        sampling = replace(sampling_of(recipe), temperature=temperature)
        stream = (recipe.seed, grpo.EVALUATION)
        groups = engine.generate([p.tokens for p in prompts], sampling, samples=samples, seed=stream)
        done = [c for group in groups for c in group]
        verdicts = score(grpo.as_scored(model.tokenizer, [p for p in prompts for _ in range(samples)], done))
        return np.array([verdict == 1 for verdict in verdicts]).reshape(-1, samples), done

    greedy, _ = asked(1, 0.0)
    right, done = asked(SAMPLES, recipe.temperature)
    lengths, finished = [len(c.tokens) for c in done], [c.finished for c in done]
    return Answers(right, greedy, float(np.mean(lengths)), 1 - float(np.mean(finished)))


# ----------------------------------------------------------------------------------------------------------------------
# What is left of it


def _paired(before: np.ndarray, after: np.ndarray) -> dict[str, float]:
    """Rates of (problems, samples) verdicts, their difference, and its 95 % percentile bootstrap interval over problems."""
    before, after = before.mean(1), after.mean(1)
    drawn = np.random.default_rng(0).integers(len(before), size=(DRAWS, len(before)))
    low, high = np.quantile((after - before)[drawn].mean(1), (0.025, 0.975))
    return {
        "start": float(before.mean()),
        "end": float(after.mean()),
        "difference": float((after - before).mean()),
        "low": float(low),
        "high": float(high),
    }


def _all(rows: list[dict]) -> dict:
    """The seeds as one: all their samples of a problem side by side. The interval is over problems, not over seeds."""
    before, after = (
        np.stack([list(map(int, row[key])) for row in rows], 1) / SAMPLES for key in ("right_start", "right_end")
    )
    means = {key: float(np.mean([row[key] for row in rows])) for key in ("greedy_start", "greedy_end")}
    sums = {key: sum(row[key] for row in rows) for key in ("updates", "written", "trained", "minutes", "cpu_minutes")}
    return {"impl": f"{len(rows)} seeds", **_paired(before, after), **means, **sums}


def _digits(right: np.ndarray) -> str:
    return "".join(map(str, right.sum(1)))


def _earlier(path: Path, what: str) -> tuple[dict[str, dict], dict[str, list[float]]]:
    """Rows and curves by seed of a record of the same setting: 15 minutes a seed need not be one sitting."""
    if not path.is_file() or (record := json.loads(path.read_text()))["setting"] != what:
        return {}, {}
    return {row["impl"]: row for row in record["rows"] if row["impl"] in record["curves"]}, record["curves"]


def _checks(seeds: list[dict]) -> list[str]:
    starts, lowest = [row["start"] for row in seeds], min(row["low"] for row in seeds)
    return [
        f"{'holds' if holds else 'FAILS'}: {text}"
        for holds, text in (
            (min(starts) >= 0.1 and max(starts) <= 0.3, f"pass@1 starts between 0.1 and 0.3 ({min(starts):.3f} to {max(starts):.3f})"),
            (lowest > 0, f"each seed's interval of the paired difference lies above 0 (lowest {lowest:+.3f})"),
        )
    ]  # fmt: skip


def _picture(path: Path, rows: list[dict], curves: dict[str, list[float]], note: str) -> None:
    figure, (rewards, rates) = _figure("GRPO on sums of two or three one-digit terms", note, 2, 4)
    width = min(5, *map(len, curves.values()))
    for i, name in enumerate(sorted(curves)):
        curve = np.array(curves[name])
        smooth = np.convolve(curve, np.ones(width) / width, "valid")
        rewards.plot(range(1, len(curve) + 1), curve, color=f"C{i}", linewidth=0.8, alpha=0.35)
        rewards.plot(range(width, len(curve) + 1), smooth, color=f"C{i}", linewidth=1.8, label=name)
    rewards.set_xlabel(f"optimizer step (thick: mean of the last {width})")
    rewards.set_ylabel("mean reward of a rollout")
    rewards.legend(frameon=False)
    at = np.arange(len(rows))
    start = np.array([row["start"] for row in rows])
    spread = [[row["difference"] - row["low"] for row in rows], [row["high"] - row["difference"] for row in rows]]
    rates.plot(at, start, "o", color="#9aa4b2", label="before")
    rates.errorbar(at, [row["end"] for row in rows], spread, fmt="o", color="#15181e", capsize=4,
                   label="after, with the 95 % interval of the paired difference")  # fmt: skip
    rates.set_xticks(at, [row["impl"] for row in rows])
    rates.set_ylabel("held-out pass@1 at temperature 1")
    for ax in (rewards, rates):
        ax.set_ylim(bottom=0)
    rates.legend(frameon=False, loc="upper center", bbox_to_anchor=(0.5, -0.14), ncols=2)
    figure.savefig(path)

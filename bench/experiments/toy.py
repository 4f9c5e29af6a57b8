"""What the toy experiments of reinforcement learning share: the demo's Llama, taught rows made in the experiment, then GRPO.

Seconds, not hours: 0.4M weights, one thread, rows as JSON lines in a temporary folder.
"""

from __future__ import annotations

import json
from collections.abc import Iterable, Sequence
from pathlib import Path

import numpy as np

from longtrace.trainer import demo, grpo, train
from longtrace.trainer.config import Refusal, SFTConfig
from longtrace.trainer.model import load_model
from longtrace.trainer.rewards import Completion
from longtrace.trainer.rollout import Engine

from ..harness import console

WINDOW = 5  # steps whose mean a curve shows


def write_rows(path: Path, rows: Iterable[dict]) -> Path:
    """Rows as JSON lines."""
    path.write_text("".join(json.dumps(row, ensure_ascii=False) + "\n" for row in rows))
    return path


def cold_start(folder: Path, rows: Sequence[dict], *, steps: int, **tokenizer) -> Path:
    """FOLDER/cold: the demo's Llama, from random weights, after `steps` of fine-tuning on rows with `problem` and `trace`.

    tokenizer: options of `demo.learn_tokenizer`.
    """
    learned = demo.learn_tokenizer((text for row in rows for text in (row["problem"], row["trace"])), **tokenizer)
    demo.make_model(learned, 0).save_pretrained(folder / "base")
    learned.save_pretrained(folder / "base")
    train.sft(
        SFTConfig(
            model=str(folder / "base"), data=[str(write_rows(folder / "traces.jsonl", rows))], out=folder / "cold",
            max_tokens=256, tokens_per_row=704, steps=steps, lr=3e-3, warmup=0.05, dtype="fp32",
            activation_checkpointing="off",
        )
    )  # fmt: skip
    return folder / "cold"


def grpo_config(model: Path, data: Path, out: Path, **more) -> grpo.GRPOConfig:
    """The demo's GRPO: 16 prompts x 8 completions a step at a constant rate of 3e-4."""
    return grpo.GRPOConfig(
        model=str(model), data=[str(data)], out=out, max_tokens=256, tokens_per_row=2048, prompts_per_rollout=16,
        lr=3e-4, warmup=0, dtype="fp32", activation_checkpointing="off", **more,
    )  # fmt: skip


def sample(config: grpo.GRPOConfig, samples: int) -> list[Completion]:
    """`samples` completions of each of config.data's prompts by config.model, prompt by prompt; the same random streams every time."""
    model = load_model(config)
    prompts = grpo.read_prompts(config.data, model, config, checkable=False)
    engine = Engine.of(model, config.slots)
    streams = (config.seed, grpo.EVALUATION)
    done = engine.generate([p.tokens for p in prompts], grpo.sampling_of(config), samples=samples, seed=streams)
    flat = [(p, c) for p, group in zip(prompts, done) for c in group]
    return grpo.as_scored(model.tokenizer, [p for p, _ in flat], [c for _, c in flat])


def hold(found: Sequence[tuple[bool, str]]) -> list[str]:
    """Prints the checks and returns them as lines that hold or fail."""
    lines = [f"{'holds' if holds else 'FAILS'}: {text}" for holds, text in found]
    for line in lines:
        console.print(line, style="green" if line.startswith("holds") else "bold red", highlight=False)
    return lines


def refuse_failed(name: str, checks: Sequence[str]) -> None:
    """Raises Refusal where a check failed."""
    if failed := [line for line in checks if line.startswith("FAILS")]:
        raise Refusal(f"bench {name}: {len(failed)} of {len(checks)} checks failed")


def draw(ax, curves: Sequence[Sequence[float]], label: str, **line) -> None:
    """The mean over seeds of a quantity against steps, each point the mean of WINDOW steps, in the band of the seeds."""
    window = min(WINDOW, min(map(len, curves)))
    means = np.array([np.convolve(values, np.full(window, 1 / window), "valid") for values in curves])
    steps = np.arange(means.shape[1]) + (window + 1) / 2
    drawn = ax.plot(steps, means.mean(0), label=label, linewidth=1.8, **line)[0]
    ax.fill_between(steps, means.min(0), means.max(0), color=drawn.get_color(), alpha=0.15, linewidth=0)

"""`longtrace sample`: rejection sampling. Several completions of each problem, verified; those that pass are rows for SFT.

longtrace sample --model runs/rl --data problems.jsonl --samples 8 --per-problem 2 --out runs/sampled
longtrace sft --model BASE --data runs/sampled/kept.jsonl --out runs/sft
"""

from __future__ import annotations

import json
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .checkpoint import write_atomic
from .experience import sampling_of
from .keep import choose, kept_table, passes, row_of
from .model import choose_device
from .prompts import Prompt, as_scored
from .rewards import Rewards
from .rollout import Engine
from .samples import DRAWN, PROVENANCE, Prompts, SamplingConfig, check, console, draw, load_engine, said_of, weights_of


@dataclass(kw_only=True)
class SampleConfig(SamplingConfig):
    """Rejection sampling: several completions of each problem, and those that pass as rows to train on."""

    out: Path
    """Folder: samples.jsonl (every completion with its verdict), kept.jsonl (rows for `longtrace sft`), card.json. The same command goes on where it was stopped."""

    # what is kept
    require: list[str] = field(default_factory=lambda: ["accuracy"])
    """Rewards that a completion has to reach, with the least of each (1 where none is given): accuracy format language:en=0.9 module:function=0.5 (docs/rewards.md lists them)."""
    per_problem: int = 0
    """Most rows kept of a problem (0 = all that pass; equal ones count once)."""
    prefer: Literal["random", "shortest"] = "random"
    """Which are kept where more pass than --per-problem."""


def sample(config: SampleConfig) -> dict[str, Any]:
    """Samples, verifies, keeps; returns what card.json holds. Raises Refusal for input or arguments that cannot be used.

    Whether, and where, the command was stopped and given again changes nothing: see `samples`.
    """
    check(config, per_problem=0)
    engine = load_engine(config)
    with said_of("--require"):
        rewards = Rewards(config.require, device=str(choose_device(config.device)))
    prompts = Prompts(config, engine, checkable="accuracy" in rewards.weights)
    drawn = {name: getattr(config, name) for name in DRAWN} | {
        "rewards": sorted(rewards.weights),
        "prompts": prompts.fingerprint,
        "weights": weights_of(engine),
    }

    def rows(batch: list[Prompt], start: int, progress: Callable[[int, int], None]) -> list[dict[str, Any]]:
        return rows_of(config, engine, rewards, batch, start, progress)

    least = rewards.weights
    draw(config, prompts, rows, drawn, each=config.samples, good=lambda row: passes(row, least), word="pass")
    counts = choose(
        config.out / "samples.jsonl", config.out / "kept.jsonl", problems=prompts.count, each=config.samples,
        least=least, per_problem=config.per_problem, prefer=config.prefer, seed=config.seed,
    )  # fmt: skip
    kept = {"require": least, "per_problem": config.per_problem, "prefer": config.prefer}
    card = {"data": config.data, "drawn": drawn, "kept": kept, "counts": counts}
    write_atomic(config.out / "card.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    console.print(kept_table(counts, least))
    console.print(f"rows for `longtrace sft --data`: {config.out / 'kept.jsonl'}", markup=False, soft_wrap=True)
    return card


def rows_of(
    config: SampleConfig, engine: Engine, rewards: Rewards, batch: list[Prompt], start: int,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """The completions of a batch of problems, the first of them number `start`, verified."""
    k = config.samples
    found = engine.generate(
        [prompt.tokens for prompt in batch], sampling_of(config), samples=k, seed=(config.seed, start),
        progress=progress,
    )  # fmt: skip
    asked = [prompt for prompt in batch for _ in range(k)]
    scored = as_scored(engine.tokenizer, asked, [completion for group in found for completion in group])
    with said_of("--require"):
        parts = rewards(scored).parts
    how = {name: getattr(config, name) for name in PROVENANCE}
    return [
        row_of(
            prompt,
            completion,
            {name: part[i] for name, part in parts.items()},
            how | {"problem": start + i // k, "sample": i % k},
        )
        for i, (prompt, completion) in enumerate(zip(asked, scored))
    ]

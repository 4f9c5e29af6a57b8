"""`longtrace pairs`: preference pairs. Several completions of each prompt with and without a thought, their answers scored.

longtrace pairs --model MODEL --data problems.jsonl --samples 8 --out runs/pairs
longtrace prefer --model MODEL --data runs/pairs/pairs.jsonl --alpha 0.5 --out runs/bvpo
"""

from __future__ import annotations

import json
import math
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Literal

from .answers import after_thought
from .checkpoint import write_atomic
from .config import Refusal
from .experience import sampling_of
from .model import choose_device
from .pairing import choose_pairs, outcome, pairs_table, sample_row, score_of
from .prompts import Prompt, as_scored
from .rewards import Completion, Rewards
from .rollout import Engine
from .samples import DRAWN, PROVENANCE, Prompts, SamplingConfig, check, console, draw, load_engine, weights_of
from .shapes import CLOSE, OPEN, assistant_text


@dataclass(kw_only=True)
class PairsConfig(SamplingConfig):
    """Preference pairs: completions of each prompt with and without a thought, the best answer against the worst."""

    out: Path
    """Folder: samples.jsonl (every completion with its verdicts), pairs.jsonl (rows for `longtrace prefer`), card.json. The same command goes on where it was stopped."""
    samples: int = 4
    """Completions of each prompt on each path."""

    # pairs
    paths: list[Literal["trace", "empty"]] = field(default_factory=lambda: ["trace", "empty"])
    """trace = the model thinks, then answers; empty = it is given an empty thought and answers at once (BVPO)."""
    reward: list[str] = field(default_factory=lambda: ["accuracy"])
    """What scores an answer, added up by weight: accuracy model:FOLDER judge:http://HOST:PORT=0.1 module:function (docs/rewards.md lists them). The thought is not shown to them."""
    min_margin: float = 0.0
    """Least difference of scores between the best and the worst; equal scores never make a pair."""
    keep_one_path: bool = False
    """Keep prompts that have a pair on one of two paths only."""


def pairs(config: PairsConfig) -> dict[str, Any]:
    """Samples, scores, pairs; returns what card.json holds. Raises Refusal for input or arguments that cannot be used.

    Whether, and where, the command was stopped and given again changes nothing: see `samples`.
    """
    check_pairs(config)
    rewards = Rewards(config.reward, device=str(choose_device(config.device)))
    engine = load_engine(config)
    checkable = "accuracy" in rewards.weights
    prompts = Prompts(config, engine, checkable=checkable, empty="empty" in config.paths)
    paths = sorted(config.paths, reverse=True)  # trace first, however they were asked for
    if len(paths) > 1 and prompts.closed:
        raise Refusal(
            f"--paths trace empty: the template closes the thought of {prompts.closed:,} of {prompts.count:,} prompts itself, so "
            "both paths begin alike; accepted: one path, or a --template that leaves the thought open"
        )
    drawn = {name: getattr(config, name) for name in DRAWN} | {
        "paths": paths,
        "rewards": sorted(rewards.weights),
        "prompts": prompts.fingerprint,
        "weights": weights_of(engine),
    }

    def rows(batch: list[Prompt], start: int, progress: Callable[[int, int], None]) -> list[dict[str, Any]]:
        return rows_of(config, engine, rewards, paths, batch, start, progress)

    weights, each = rewards.weights, config.samples * len(paths)
    draw(
        config, prompts, rows, drawn, each=each, good=lambda row: score_of(row, weights) is not None, word="scored"
    )  # fmt: skip
    counts = choose_pairs(
        config.out / "samples.jsonl", config.out / "pairs.jsonl", prompts=prompts.count, each=config.samples,
        paths=paths, weights=weights, min_margin=config.min_margin, keep_one_path=config.keep_one_path,
        seed=config.seed,
    )  # fmt: skip
    how = {"reward": weights, "min_margin": config.min_margin, "keep_one_path": config.keep_one_path}
    card = {"data": config.data, "drawn": drawn, "paired": how, "counts": counts}
    write_atomic(config.out / "card.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    console.print(pairs_table(counts, config.min_margin))
    console.print(outcome(counts, config.keep_one_path), highlight=False, soft_wrap=True)
    console.print(f"rows for `longtrace prefer --data`: {config.out / 'pairs.jsonl'}", markup=False, soft_wrap=True)
    return card


def check_pairs(config: PairsConfig) -> None:
    """Raises Refusal for options that are out of range or do not fit."""
    check(config, samples=2, min_margin=0)
    if not config.paths or len(set(config.paths)) != len(config.paths):
        raise Refusal(f"--paths {' '.join(config.paths) or 'none'}: accepted: trace, empty or both, each once")
    for spec in config.reward:
        if spec.partition("=")[0] == "format":
            raise Refusal(
                f"--reward {spec}: it reads the thought, and only the answer is scored; accepted: other rewards"
            )


def rows_of(
    config: PairsConfig, engine: Engine, rewards: Rewards, paths: list[str], batch: list[Prompt], start: int,
    progress: Callable[[int, int], None],
) -> list[dict[str, Any]]:  # fmt: skip
    """The completions of a batch of prompts, the first of them number `start`, with their answers scored."""
    k = config.samples
    prompts = [prompt if path == "trace" else prompt.without_thought() for prompt in batch for path in paths]
    found = engine.generate(
        [prompt.tokens for prompt in prompts], sampling_of(config), samples=k, seed=(config.seed, start),
        progress=progress,
    )  # fmt: skip
    asked = [prompt for prompt in prompts for _ in range(k)]
    written = as_scored(engine.tokenizer, asked, [completion for group in found for completion in group])
    marks = score_answers(engine.tokenizer, rewards, written)
    how = {name: getattr(config, name) for name in PROVENANCE}
    return [
        sample_row(
            prompt,
            paths[i // k % len(paths)],
            prompt.text_of(completion.text),
            finished=completion.finished,
            tokens=completion.tokens,
            rewards=mark,
            provenance=how | {"problem": start + i // (k * len(paths)), "sample": i % k},
        )
        for i, (prompt, completion, mark) in enumerate(zip(asked, written, marks))
    ]


def score_answers(tokenizer, rewards: Rewards, written: list[Completion]) -> list[dict[str, float | None] | None]:
    """The rewards of each completion's answer, which is all they see of it; None for one that has no answer to score."""
    answers = [answer_of(completion) for completion in written]
    there = [i for i, answer in enumerate(answers) if answer is not None]
    lengths = (
        [len(ids) for ids in tokenizer([answers[i] for i in there], add_special_tokens=False)["input_ids"]]
        if there
        else []
    )
    bare = [Completion(answers[i], written[i].row, True, False, length) for i, length in zip(there, lengths)]
    parts = rewards(bare).parts if bare else {}
    marks: list[dict[str, float | None] | None] = [None] * len(written)
    for n, i in enumerate(there):
        values = {name: float(part[n]) for name, part in parts.items()}
        marks[i] = {name: None if math.isnan(value) else value for name, value in values.items()}
    return marks


def answer_of(completion: Completion) -> str | None:
    """What follows the thought, whatever tags that has, without blanks around; None where it was cut off, the thought does
    not end or begins again, or nothing follows."""
    try:
        text = assistant_text(completion.text)
    except Refusal:  # a call in Harmony channels
        return None
    if completion.thinking is False:  # the prompt holds an empty thought: a thought now is one too many
        answer = None if OPEN in text or CLOSE in text else text
    else:
        answer = after_thought(text, completion.thinking)
    return answer.strip() or None if completion.finished and answer else None

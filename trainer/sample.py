"""`longtrace sample`: rejection sampling. Several completions of each problem, verified; those that pass are rows for SFT.

longtrace sample --model runs/rl --data problems.jsonl --samples 8 --per-problem 2 --out runs/sampled
longtrace sft --model BASE --data runs/sampled/kept.jsonl --out runs/sft
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn

from longtrace import kernels as K

from .checkpoint import write_atomic
from .config import Refusal, to_yaml
from .experience import sampling_of
from .keep import choose, kept_table, passes, row_of
from .model import DTYPES, choose_device, fuse_layers, load_for_generation
from .prompts import Prompt, as_scored, fingerprint, prompts_of
from .rewards import Rewards
from .rollout import Engine

console = Console()


@dataclass(kw_only=True)
class SampleConfig:
    """Rejection sampling: several completions of each problem, and those that pass as rows to train on."""

    model: str
    """Hugging Face folder or hub name."""
    data: list[str]
    """Problems: rows with a problem and an answer (file.jsonl, file.parquet, hub/name), generated:chain,steps=4, reasoning_gym:chain_sum."""
    out: Path
    """Folder: samples.jsonl (every completion with its verdict), kept.jsonl (rows for `longtrace sft`), card.json. The same command goes on where it was stopped."""
    limit: int = 0
    """Problems taken, from the first on (0 = all)."""
    columns: list[str] = field(default_factory=list)
    """Renames fields of the rows: old=new."""
    template: str = "auto"
    """auto = the model's own, or one of ours if it has none; model = its own only; longtrace = one that keeps the thought; or a .jinja file."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read, have no answer or are too long (counted) instead of stopping at the first."""

    # sampling
    samples: int = 4
    """Completions of each problem."""
    max_new_tokens: int = 2048
    """Longest completion, in tokens; one that is cut off is never kept."""
    temperature: float = 1.0
    """Sampling temperature (0 = greedy)."""
    top_p: float = 1.0
    """Share of the probability mass sampled from."""
    top_k: int = 0
    """Tokens sampled from (0 = all)."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a completion."""
    seed: int = 0
    """Seeds the sampling, and the choice among those that pass."""

    # what is kept
    require: list[str] = field(default_factory=lambda: ["accuracy"])
    """Rewards that a completion has to reach, with the least of each (1 where none is given): accuracy format language:en=0.9 module:function=0.5 (docs/rewards.md lists them)."""
    per_problem: int = 0
    """Most rows kept of a problem (0 = all that pass; equal ones count once)."""
    prefer: Literal["random", "shortest"] = "random"
    """Which are kept where more pass than --per-problem."""

    # the machine
    batch_size: int = 64
    """Problems sampled, checked and written at once: what a kill loses at most."""
    slots: int = 128
    """Completions decoded at once."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute precision; auto = the file's own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to sample."""


RANGES = {
    "limit": 0, "samples": 1, "max_new_tokens": 1, "temperature": 0, "top_k": 0, "seed": 0, "per_problem": 0,
    "batch_size": 1, "slots": 1,
}  # fmt: skip
DRAWN = ("model", "samples", "max_new_tokens", "temperature", "top_p", "top_k", "stop", "seed", "batch_size", "dtype")
"""Options that decide what is written, beside the prompts; the others may change when a command goes on."""


def check(config: SampleConfig) -> None:
    """Raises Refusal for options that are out of range or do not fit."""
    for name, low in RANGES.items():
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= low):
            raise Refusal(f"--{name.replace('_', '-')} {value}: accepted: {low} or more")
    if not 0 < config.top_p <= 1:
        raise Refusal(f"--top-p {config.top_p}: accepted: above 0, up to 1")
    if config.temperature == 0 and config.samples > 1:
        raise Refusal(f"--temperature 0: --samples {config.samples} would all be the same; accepted: above 0")
    if "" in config.stop:
        raise Refusal("--stop: found an empty string, which ends everything; accepted: text")


def sample(config: SampleConfig) -> dict[str, Any]:
    """Samples, verifies, keeps; returns what card.json holds. Raises Refusal for input or arguments that cannot be used.

    Whether, and where, the command was stopped and given again changes nothing: a batch of problems is written whole or drawn
    anew, and every completion has a random stream of its own.
    """
    check(config)
    engine = load_engine(config)
    with said_of("--require"):
        rewards = Rewards(config.require, device=str(choose_device(config.device)))
    context = getattr(engine.model.config.get_text_config(), "max_position_embeddings", None) or 2**62
    if config.max_new_tokens >= context:
        raise Refusal(f"--max-new-tokens {config.max_new_tokens:,}: accepted: below the model's context ({context:,})")
    bad: list[str] = []
    problems = 0

    def prompts() -> Iterator[Prompt]:
        return prompts_of(
            config.data, engine.tokenizer, template=config.template, columns=config.columns, limit=config.limit,
            longest=context - config.max_new_tokens, room="the model's context less --max-new-tokens",
            checkable="accuracy" in rewards.weights, skip_bad_rows=config.skip_bad_rows, bad_rows=bad,
        )  # fmt: skip

    def counted() -> Iterator[Prompt]:
        nonlocal problems
        for prompt in prompts():
            problems += 1
            yield prompt

    drawn = {name: getattr(config, name) for name in DRAWN} | {
        "rewards": sorted(rewards.weights),
        "prompts": fingerprint(
            counted()
        ),  # a first pass over all of them: what cannot be used is refused before the work
        "weights": weights_fingerprint(engine.model),
    }
    if bad:
        console.print(f"{len(bad):,} rows left out, the first: {bad[0]}", markup=False)
    if not problems:
        raise Refusal(f"--data {' '.join(config.data)}: no problem to sample from")
    done = begin(config, drawn, problems)
    if done:
        console.print(f"{done:,} of {problems:,} problems were sampled before")
    if done < problems:
        write_samples(config, engine, rewards, islice(prompts(), done, None), done, problems)
    counts = choose(
        config.out / "samples.jsonl", config.out / "kept.jsonl", problems=problems, each=config.samples,
        least=rewards.weights, per_problem=config.per_problem, prefer=config.prefer, seed=config.seed,
    )  # fmt: skip
    kept = {"require": rewards.weights, "per_problem": config.per_problem, "prefer": config.prefer}
    card = {"data": config.data, "drawn": drawn, "kept": kept, "counts": counts}
    write_atomic(config.out / "card.json", json.dumps(card, indent=1, ensure_ascii=False) + "\n")
    console.print(kept_table(counts, rewards.weights))
    console.print(f"rows for `longtrace sft --data`: {config.out / 'kept.jsonl'}", markup=False, soft_wrap=True)
    return card


def load_engine(config: SampleConfig) -> Engine:
    """What writes the completions."""
    model, tokenizer = load_for_generation(config.model, choose_device(config.device), DTYPES.get(config.dtype, "auto"))
    model.set_attn_implementation(K.register_attention())
    fuse_layers(model)
    return Engine(model, tokenizer, config.slots)


def weights_fingerprint(model) -> str:
    """SHA-256 (hex) of the first values of every weight: training moves them all, so a retrained model has another."""
    digest = hashlib.sha256()
    for name, weight in model.named_parameters():
        first = weight.detach().flatten()[:4096].to("cpu", torch.float32)
        digest.update(name.encode() + first.numpy().tobytes())
    return digest.hexdigest()


def begin(config: SampleConfig, drawn: dict[str, Any], problems: int) -> int:
    """How many problems the folder holds whole batches of; samples.jsonl is cut back to them.

    Raises Refusal for a folder of something else, or of samples that were drawn in another way.
    """
    card, samples = config.out / "card.json", config.out / "samples.jsonl"
    if not card.exists():
        if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
            raise Refusal(f"--out {config.out}: holds something other than samples; accepted: a new or empty folder")
        write_atomic(card, json.dumps({"drawn": drawn}, indent=1) + "\n")
    try:
        before = json.loads(card.read_bytes())["drawn"]
    except (ValueError, KeyError, TypeError):
        raise Refusal(f"{card}: not the card of a sampling; accepted: another --out") from None
    for name, now in json.loads(json.dumps(drawn)).items():
        if before.get(name) != now:
            values = "" if name in ("prompts", "weights") else f" ({before.get(name)}, now {now})"
            what = name.replace("_", "-")
            raise Refusal(
                f"--out {config.out}: its samples were drawn with other {what}{values}; accepted: the same, or another --out"
            )
    write_atomic(config.out / "config.yaml", to_yaml(config))
    samples.touch()
    lines = size = whole = whole_size = 0
    with samples.open("rb") as file:
        for line in file:
            if not line.endswith(b"\n"):
                break  # torn by a kill
            lines, size = lines + 1, size + len(line)
            if lines % (config.batch_size * config.samples) == 0 or lines == problems * config.samples:
                whole, whole_size = lines, size
    os.truncate(samples, whole_size)
    return whole // config.samples


def write_samples(
    config: SampleConfig, engine: Engine, rewards: Rewards, prompts: Iterator[Prompt], done: int, problems: int
) -> None:
    """Completes, verifies and appends to samples.jsonl, one batch of problems after the other from number `done` on."""
    k, began, spoke = config.samples, time.perf_counter(), time.perf_counter()
    how = {name: getattr(config, name) for name in ("model", "seed", "temperature", "top_p", "top_k", "max_new_tokens")}
    ended = tokens = passed = 0  # completions of whole batches, since this command began
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("completions · {task.fields[line]}"), TimeRemainingColumn()
    with (
        (config.out / "samples.jsonl").open("ab") as file,
        Progress(*columns, console=Console(stderr=True), transient=True) as bar,
    ):
        task = bar.add_task("", total=problems * k, completed=done * k, line="")

        def line(more: int = 0) -> str:
            rate = f"{(tokens + more) / (time.perf_counter() - began):,.0f} tokens/s"
            return f"{passed / ended:.0%} pass · {rate}" if ended else rate

        for start in range(done, problems, config.batch_size):
            batch = list(islice(prompts, config.batch_size))
            found = engine.generate(
                [prompt.tokens for prompt in batch], sampling_of(config), samples=k, seed=(config.seed, start),
                progress=lambda n, more, at=start * k: bar.update(task, completed=at + n, line=line(more)),
            )  # fmt: skip
            asked = [prompt for prompt in batch for _ in range(k)]
            scored = as_scored(engine.tokenizer, asked, [completion for group in found for completion in group])
            with said_of("--require"):
                parts = rewards(scored).parts
            for i, (prompt, completion) in enumerate(zip(asked, scored)):
                number = {"problem": start + i // k, "sample": i % k}
                row = row_of(prompt, completion, {name: part[i] for name, part in parts.items()}, how | number)
                text = json.dumps(row, ensure_ascii=False, default=str)
                file.write(text.encode("utf-8", "backslashreplace") + b"\n")
                ended, tokens, passed = ended + 1, tokens + completion.tokens, passed + passes(row, rewards.weights)
            file.flush()
            os.fsync(file.fileno())
            if not console.is_terminal and time.perf_counter() - spoke > 10:
                spoke = time.perf_counter()
                console.print(f"{(start + len(batch)) * k:,}/{problems * k:,} completions · {line()}", highlight=False)


@contextlib.contextmanager
def said_of(option: str) -> Iterator[None]:
    """Refusals of rewards name the option that asked for them here."""
    try:
        yield
    except Refusal as refusal:
        raise Refusal(str(refusal).replace("--reward", option)) from None

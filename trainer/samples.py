"""samples.jsonl: several completions of every prompt with their verdicts, written a batch of prompts at a time.

A batch is on the disk whole or is drawn anew, and every completion has a random stream of its own: whether, and where, a
command was stopped and given again changes nothing. `longtrace sample` and `longtrace pairs` are made of this.
"""

from __future__ import annotations

import contextlib
import hashlib
import json
import math
import os
import time
from collections.abc import Callable, Iterator
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
from .model import DTYPES, choose_device, fuse_layers, load_for_generation
from .prompts import Prompt, fingerprint, prompts_of
from .rollout import Engine
from .served import ServedEngine
from .servers import is_address

console = Console()


@dataclass(kw_only=True)
class SamplingConfig:
    """What commands that sample completions of prompts share."""

    model: str
    """Hugging Face folder or hub name; with a server, of its tokenizer and template."""
    data: list[str]
    """Prompts: rows with a problem and an answer (file.jsonl, file.parquet, hub/name), generated:chain,steps=4, reasoning_gym:chain_sum."""
    out: Path
    """Folder of what comes out. The same command goes on where it was stopped."""
    limit: int = 0
    """Prompts taken, from the first on (0 = all)."""
    columns: list[str] = field(default_factory=list)
    """Renames fields of the rows: old=new."""
    template: str = "auto"
    """auto = the model's own, or one of ours if it has none; model = its own only; longtrace = one that keeps the thought; or a .jinja file."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read, cannot be checked or are too long (counted) instead of stopping at the first."""

    # sampling
    samples: int = 4
    """Completions of each prompt."""
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
    """Seeds the sampling, and what is drawn among equals."""

    # the machine
    engine: Literal["own", "vllm", "sglang"] = "own"
    """What writes the completions: own = --model, here; vllm, sglang = the model that a server at --server serves."""
    server: str = ""
    """The server's address, http://HOST:PORT."""
    server_timeout: float = 1800.0
    """Seconds one request to the server may take."""
    batch_size: int = 64
    """Prompts sampled, checked and written at once: what a kill loses at most."""
    slots: int = 128
    """Completions decoded at once (of a server: requests in flight)."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute precision; auto = the file's own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to sample, and where a reward model scores."""


RANGES = {
    "limit": 0, "samples": 1, "max_new_tokens": 1, "temperature": 0, "top_k": 0, "seed": 0, "batch_size": 1, "slots": 1,
}  # fmt: skip
DRAWN = ("model", "samples", "max_new_tokens", "temperature", "top_p", "top_k", "stop", "seed", "batch_size", "dtype")
"""Options that decide what is written, beside the prompts; the others may change when a command goes on."""
PROVENANCE = ("model", "seed", "temperature", "top_p", "top_k", "max_new_tokens")
"""Options that a row names as where it comes from."""


def check(config: SamplingConfig, **ranges: float) -> None:
    """Raises Refusal for options that are out of range or do not fit. ranges: least values of a command's own options."""
    for name, low in (RANGES | ranges).items():
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= low):
            raise Refusal(f"--{name.replace('_', '-')} {value}: accepted: {low} or more")
    if not 0 < config.top_p <= 1:
        raise Refusal(f"--top-p {config.top_p}: accepted: above 0, up to 1")
    if config.temperature == 0 and config.samples > 1:
        raise Refusal(f"--temperature 0: --samples {config.samples} would all be the same; accepted: above 0")
    if "" in config.stop:
        raise Refusal("--stop: found an empty string, which ends everything; accepted: text")
    if config.engine == "own" and config.server:
        raise Refusal(f"--server {config.server} needs --engine vllm or --engine sglang")
    if config.engine != "own" and not is_address(config.server):
        raise Refusal(f"--engine {config.engine}: found --server {config.server!r}; accepted: http://HOST:PORT")
    if not config.server_timeout > 0:
        raise Refusal(f"--server-timeout {config.server_timeout}: accepted: above 0")


def load_engine(config: SamplingConfig) -> Engine:
    """What writes the completions."""
    if config.engine != "own":
        engine = ServedEngine.of_folder(
            config.engine, config.server, config.model, slots=config.slots, timeout=config.server_timeout
        )
        engine.connect()
        return engine
    model, tokenizer = load_for_generation(config.model, choose_device(config.device), DTYPES.get(config.dtype, "auto"))
    model.set_attn_implementation(K.register_attention())
    fuse_layers(model)
    return Engine(model, tokenizer, config.slots)


def weights_of(engine: Engine) -> str:
    """What tells the weights that write from others: for a server's the name it gives them; for our own SHA-256 (hex) of
    the first values of every weight, since training moves them all."""
    if isinstance(engine, ServedEngine):
        return f"served as {engine.name}"
    digest = hashlib.sha256()
    for name, weight in engine.model.named_parameters():
        first = weight.detach().flatten()[:4096].to("cpu", torch.float32)
        digest.update(name.encode() + first.numpy().tobytes())
    return digest.hexdigest()


class Prompts:
    """The prompts of a command, read as often as needed, none held.

    The first pass is over all of them, so that what cannot be used is refused before the work; it leaves `count`,
    `fingerprint` and `closed`, how many hold a closed thought already. checkable: only rows whose answers can be checked.
    empty: with the tokens of an empty thought besides. Raises Refusal.
    """

    def __init__(self, config: SamplingConfig, engine: Engine, *, checkable: bool, empty: bool = False):
        context = engine.context if isinstance(engine, ServedEngine) else _trained_context(engine.model)
        context = context or 2**62
        if config.max_new_tokens >= context:
            raise Refusal(
                f"--max-new-tokens {config.max_new_tokens:,}: accepted: below the model's context ({context:,})"
            )
        self.config, self.tokenizer = config, engine.tokenizer
        self.longest, self.checkable, self.empty = context - config.max_new_tokens, checkable, empty
        bad: list[str] = []
        self.count = self.closed = 0
        self.fingerprint = fingerprint(self._counted(bad))
        if bad:
            console.print(f"{len(bad):,} rows left out, the first: {bad[0]}", markup=False)
        if not self.count:
            raise Refusal(f"--data {' '.join(config.data)}: no problem to sample from")

    def _counted(self, bad: list[str]) -> Iterator[Prompt]:
        for prompt in self.read(bad):
            self.count += 1
            self.closed += prompt.tokens == prompt.empty
            yield prompt

    def read(self, bad: list[str] | None = None) -> Iterator[Prompt]:
        config = self.config
        return prompts_of(
            config.data, self.tokenizer, template=config.template, columns=config.columns, limit=config.limit,
            longest=self.longest, room="the model's context less --max-new-tokens", checkable=self.checkable,
            empty=self.empty, skip_bad_rows=config.skip_bad_rows, bad_rows=bad,
        )  # fmt: skip


def _trained_context(model) -> int | None:
    return getattr(model.config.get_text_config(), "max_position_embeddings", None)


def begin(config: SamplingConfig, drawn: dict[str, Any], prompts: int, each: int) -> int:
    """How many prompts the folder holds whole batches of, `each` lines a prompt; samples.jsonl is cut back to them.

    Raises Refusal for a folder of something else, or of samples that were drawn in another way.
    """
    card, samples = config.out / "card.json", config.out / "samples.jsonl"
    if not card.exists():
        if config.out.exists() and (not config.out.is_dir() or any(config.out.iterdir())):
            raise Refusal(f"--out {config.out}: holds something other than samples; accepted: a new or empty folder")
        write_atomic(card, json.dumps({"drawn": drawn}, indent=1) + "\n")
    try:
        before = json.loads(card.read_bytes())["drawn"]
        before.keys()
    except (ValueError, KeyError, TypeError, AttributeError):
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
            if lines % (config.batch_size * each) == 0 or lines == prompts * each:
                whole, whole_size = lines, size
    os.truncate(samples, whole_size)
    return whole // each


Rows = Callable[[list[Prompt], int, Callable[[int, int], None]], list[dict[str, Any]]]
"""(a batch of prompts, the number of its first, progress as `Engine.generate` takes it) -> its completions, `each` a prompt."""


def draw(
    config: SamplingConfig, prompts: Prompts, rows_of: Rows, drawn: dict[str, Any], *, each: int,
    good: Callable[[dict[str, Any]], bool], word: str,
) -> None:  # fmt: skip
    """Fills samples.jsonl, `each` lines a prompt, going on where it was stopped.

    drawn: what decides what is written. good, word: what is counted while it runs ("41% pass"). Raises Refusal as `begin`.
    """
    total = prompts.count
    done = begin(config, drawn, total, each)
    if done:
        console.print(f"{done:,} of {total:,} problems were sampled before")
    if done == total:
        return
    began, spoke = time.perf_counter(), time.perf_counter()
    ended = tokens = counted = 0  # completions of whole batches, since this command began
    columns = BarColumn(), MofNCompleteColumn(), TextColumn("completions · {task.fields[line]}"), TimeRemainingColumn()
    with (
        (config.out / "samples.jsonl").open("ab") as file,
        Progress(*columns, console=Console(stderr=True), transient=True) as bar,
    ):
        task = bar.add_task("", total=total * each, completed=done * each, line="")

        def line(more: int = 0) -> str:
            rate = f"{(tokens + more) / (time.perf_counter() - began):,.0f} tokens/s"
            return f"{counted / ended:.0%} {word} · {rate}" if ended else rate

        coming = islice(prompts.read(), done, None)
        for start in range(done, total, config.batch_size):
            batch = list(islice(coming, config.batch_size))

            def progress(n: int, more: int, at: int = start * each) -> None:
                bar.update(task, completed=at + n, line=line(more))

            for row in rows_of(batch, start, progress):
                text = json.dumps(row, ensure_ascii=False, default=str)
                file.write(text.encode("utf-8", "backslashreplace") + b"\n")
                ended, tokens, counted = ended + 1, tokens + row["tokens"], counted + good(row)
            file.flush()
            os.fsync(file.fileno())
            if not console.is_terminal and time.perf_counter() - spoke > 10:
                spoke = time.perf_counter()
                done_now = (start + len(batch)) * each
                console.print(f"{done_now:,}/{total * each:,} completions · {line()}", highlight=False)


def groups(samples: Path, prompts: int, each: int) -> Iterator[tuple[list[bytes], list[dict[str, Any]]]]:
    """The lines of samples.jsonl, and what they hold, one prompt at a time. Raises Refusal for a line that was changed."""
    with samples.open("rb") as file:
        for prompt in range(prompts):
            lines = list(islice(file, each))
            try:
                yield lines, [json.loads(line) for line in lines]
            except ValueError:
                where = f"{samples}: lines {prompt * each + 1:,} to {(prompt + 1) * each:,}"
                raise Refusal(f"{where}: broken JSON; accepted: the file as it was written, or another --out") from None


class WholeFile:
    """Lines that take the place of `path` together, once the last of them is on the disk; sha256 of what was written."""

    def __init__(self, path: Path):
        self.path, self.beside, self.digest = path, path.with_name(path.name + ".part"), hashlib.sha256()

    def __enter__(self) -> WholeFile:
        self.file = self.beside.open("wb")
        return self

    def write(self, line: bytes) -> None:
        self.file.write(line)
        self.digest.update(line)

    def __exit__(self, kind, *_) -> None:
        with self.file:
            if kind is None:
                self.file.flush()
                os.fsync(self.file.fileno())
        if kind is None:
            os.replace(self.beside, self.path)

    @property
    def sha256(self) -> str:
        return self.digest.hexdigest()


@contextlib.contextmanager
def said_of(option: str) -> Iterator[None]:
    """Refusals of rewards name the option that asked for them here."""
    try:
        yield
    except Refusal as refusal:
        raise Refusal(str(refusal).replace("--reward", option)) from None

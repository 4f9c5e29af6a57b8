"""`longtrace evaluate`: the solved rate of a model on problems, by generation, with its uncertainty and what was cut off."""

from __future__ import annotations

import json
import math
import random
import time
from collections import Counter
from collections.abc import Iterable, Sequence
from dataclasses import dataclass, field
from itertools import chain, islice
from pathlib import Path
from typing import Any, Literal

import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn
from rich.table import Table

from . import rewards, tasks, traces
from .checkpoint import write_atomic
from .config import Refusal, parse_columns
from .model import DTYPES, choose_device, load_for_generation
from .rows import Row

console = Console()


@dataclass(kw_only=True)
class EvaluateConfig:
    """Solved rate of a model on problems, by generation."""

    model: str
    """Hugging Face folder or hub name."""
    data: list[str]
    """Problems: generated:chain,steps=8,split=test, or a file whose rows have a problem and an answer."""
    limit: int = 300
    """Problems taken, from the first on (0 = all)."""
    max_new_tokens: int = 2048
    """Longest completion, in tokens; longer ones are cut off, which is counted apart from wrong."""
    batch_size: int = 64
    """Problems answered at once; lower it when memory runs out."""
    temperature: float = 0.0
    """Sampling temperature (0 = greedy)."""
    top_p: float = 1.0
    """Share of the probability mass sampled from."""
    template: str = "auto"
    """auto = the model's own, longtrace = one that keeps the thought, or a .jinja file."""
    columns: list[str] = field(default_factory=list)
    """Renames fields of the rows: old=new."""
    dtype: Literal["auto", "bf16", "fp32"] = "auto"
    """Compute precision; auto = the file's own."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to generate."""
    seed: int = 0
    """Seeds the sampling."""
    out: Path | None = None
    """Also write everything, completions included, to this JSON file."""


def wilson(successes: int, n: int, z: float = 1.96) -> tuple[float, float]:
    """The Wilson score interval of a rate (95 % at z = 1.96); (0, 1) for n = 0. Wilson, JASA 22 (1927)."""
    if n == 0:
        return 0.0, 1.0
    p = successes / n
    centre = (p + z * z / (2 * n)) / (1 + z * z / n)
    half = z / (1 + z * z / n) * (p * (1 - p) / n + z * z / (4 * n * n)) ** 0.5
    return min(p, max(0.0, centre - half)), max(p, min(1.0, centre + half))  # the rate lies within, rounding or not


def pass_at_k(num_samples: int, num_correct: int, k: int) -> float:
    """The probability that one of k samples is right, unbiased from num_samples of which num_correct are.

    Chen et al. 2021, arXiv:2107.03374, eq. 1. Raises ValueError unless 0 <= num_correct <= num_samples >= k >= 1.
    """
    if not (0 <= num_correct <= num_samples and 1 <= k <= num_samples):
        raise ValueError(
            f"pass@{k} of {num_samples} samples, {num_correct} right: needs 1 <= k <= samples, right <= samples"
        )
    return 1.0 - math.comb(num_samples - num_correct, k) / math.comb(num_samples, k)


def cons_at_k(
    answers: Sequence[str | None], gold: str, k: int, generator: random.Random | None = None, draws: int = 1000
) -> float:
    """The probability that the majority of k answers, drawn without replacement, is `gold`; None votes for nothing.

    Tied answers share the vote. With k = len(answers) the value is exact, else the mean of `draws` draws of `generator`
    (none: seed 0). Source: Wang et al. 2023 (self-consistency), arXiv:2203.11171; R1 calls it cons@k. Raises ValueError
    for k outside 1 to len(answers).
    """
    if not 1 <= k <= len(answers):
        raise ValueError(f"cons@{k} of {len(answers)} answers: accepted: 1 to {len(answers)}")

    def share(chosen: Sequence[str | None]) -> float:
        votes = Counter(a for a in chosen if a is not None)
        most = max(votes.values(), default=0)
        winners = [answer for answer, n in votes.items() if n == most]
        return (gold in winners) / max(len(winners), 1)

    if k == len(answers):
        return share(answers)
    generator = generator or random.Random(0)
    return sum(share(generator.sample(list(answers), k)) for _ in range(draws)) / draws


def is_right(row: Row, completion: str) -> bool:
    """Whether a completion's final answer, read after the thought, is right: the verdict that RL rewards (`rewards.score`)."""
    return rewards.score([rewards.Completion(completion, row)])[0] == 1.0


def prompt_of(row: Row) -> list[dict[str, Any]]:
    """The messages a model is asked with: all before the last assistant turn, or all when there is none."""
    turns = [i for i, message in enumerate(row.messages) if message["role"] == "assistant"]
    return row.messages[: turns[-1]] if turns else row.messages


@torch.inference_mode()
def complete(
    model,
    tokenizer,
    prompts: list[str],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    progress: bool = True,
) -> list[tuple[str, int, bool]]:
    """One completion per rendered prompt, in order: (text without special tokens, tokens, whether it ended itself).

    Prompts of similar length share a left-padded batch. Raises Refusal when prompt and completion exceed the context.
    """
    ids = tokenizer(prompts, add_special_tokens=False)["input_ids"]
    longest = max(map(len, ids))
    context = getattr(model.config.get_text_config(), "max_position_embeddings", None)
    if context and longest + max_new_tokens > context:
        raise Refusal(
            f"--max-new-tokens {max_new_tokens:,}: with a prompt of {longest:,} tokens more than the model's context; "
            f"accepted: up to {context - longest:,}"
        )
    ends = model.generation_config.eos_token_id
    ends = set(ends if isinstance(ends, list) else [ends]) | {tokenizer.eos_token_id}
    ends.discard(None)
    pad = tokenizer.pad_token_id if tokenizer.pad_token_id is not None else tokenizer.eos_token_id
    sampling = {"do_sample": True, "temperature": temperature, "top_p": top_p, "top_k": 0}
    order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
    done: list[tuple[str, int, bool]] = [("", 0, False)] * len(ids)
    columns = TextColumn("{task.description}"), BarColumn(), MofNCompleteColumn(), TextColumn("problems")
    with Progress(
        *columns, TimeElapsedColumn(), console=Console(stderr=True), transient=True, disable=not progress
    ) as bar:
        task = bar.add_task("Generating", total=len(ids))
        for start in range(0, len(order), batch_size):
            batch = order[start : start + batch_size]
            width = len(ids[batch[-1]])
            padding = [width - len(ids[i]) for i in batch]
            out = model.generate(
                input_ids=torch.tensor([[pad] * p + ids[i] for p, i in zip(padding, batch)], device=model.device),
                attention_mask=torch.tensor([[0] * p + [1] * (width - p) for p in padding], device=model.device),
                max_new_tokens=max_new_tokens,
                pad_token_id=pad,
                eos_token_id=sorted(ends),
                **(sampling if temperature else {"do_sample": False}),
            )
            for i, tokens in zip(batch, out[:, width:].tolist()):
                end = next((k for k, token in enumerate(tokens) if token in ends), None)
                written = tokens if end is None else tokens[: end + 1]
                done[i] = tokenizer.decode(written, skip_special_tokens=True), len(written), end is not None
            bar.update(task, advance=len(batch))
    return done


def solved_rate(
    model,
    tokenizer,
    rows: Iterable[Row],
    *,
    max_new_tokens: int,
    batch_size: int = 64,
    temperature: float = 0.0,
    top_p: float = 1.0,
    template: str = "auto",
    progress: bool = True,
) -> dict[str, Any]:
    """Share of problems solved, one completion each.

    Returns solved_rate with its 95 % interval ci_low, ci_high (Wilson), n, cut_off (completions that reached
    max_new_tokens: not solved, and not a wrong answer either), mean_tokens of a completion, seconds, tokens_per_s, and
    samples: for every problem where, problem, completion, answer, solved, cut_off, tokens. Raises Refusal for no rows, or
    rows with nothing to compare with.
    """
    rows = list(rows)
    if not rows:
        raise Refusal("--data: no problems found; accepted: at least one")
    for row in rows:
        if rewards.kind_of(row) is None:
            raise Refusal(f"{row.where}: answer: missing; accepted: rows with an answer to compare with, or tests")
    jinja = traces.chat_template(tokenizer, template)
    prompts = [
        tokenizer.apply_chat_template(prompt_of(row), chat_template=jinja, tokenize=False, add_generation_prompt=True)
        for row in rows
    ]
    began = time.perf_counter()
    done = complete(
        model,
        tokenizer,
        prompts,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        temperature=temperature,
        top_p=top_p,
        progress=progress,
    )
    seconds = time.perf_counter() - began
    opened = [prompt.rstrip().endswith("<think>") for prompt in prompts]  # by the template
    texts = ["<think>\n" + text if thought else text for thought, (text, _, _) in zip(opened, done)]
    verdicts = rewards.score([rewards.Completion(t, row, ended) for t, row, (_, _, ended) in zip(texts, rows, done)])
    samples = []
    for row, text, verdict, (_, tokens, ended) in zip(rows, texts, verdicts, done):
        samples.append(
            {
                "where": row.where,
                "problem": prompt_of(row)[-1]["content"],
                "completion": text,
                "answer": row.answer,
                "solved": verdict == 1.0,
                "cut_off": not ended,
                "tokens": tokens,
            }
        )
    solved, total = sum(s["solved"] for s in samples), sum(s["tokens"] for s in samples)
    low, high = wilson(solved, len(rows))
    return {
        "solved_rate": solved / len(rows),
        "ci_low": low,
        "ci_high": high,
        "n": len(rows),
        "cut_off": sum(s["cut_off"] for s in samples),
        "mean_tokens": total / len(rows),
        "seconds": seconds,
        "tokens_per_s": total / seconds,
        "samples": samples,
    }


def evaluate(config: EvaluateConfig) -> dict[str, Any]:
    """Prints the solved rate of a model folder and returns what `solved_rate` does. Raises Refusal for unusable input."""
    for name, least in (("limit", 0), ("max_new_tokens", 1), ("batch_size", 1), ("temperature", 0)):
        if getattr(config, name) < least:
            raise Refusal(f"--{name.replace('_', '-')} {getattr(config, name)}: accepted: {least} or more")
    sources = [traces.read_rows(spec, columns=parse_columns(config.columns)) for spec in config.data]
    rows = list(islice(chain.from_iterable(sources), config.limit or None))
    for spec in config.data:
        if spec.startswith("generated:") and tasks.parse(spec).split == "train":
            console.print(f"[yellow]{escape(spec)} are training problems; add split=test for held-out ones[/]")
    # not `model.to(dtype)`: it would round rotary frequencies
    model, tokenizer = load_for_generation(config.model, choose_device(config.device), DTYPES.get(config.dtype, "auto"))
    torch.manual_seed(config.seed)
    result = solved_rate(
        model,
        tokenizer,
        rows,
        max_new_tokens=config.max_new_tokens,
        batch_size=config.batch_size,
        temperature=config.temperature,
        top_p=config.top_p,
        template=config.template,
    )
    console.print(result_table(config.model, result))
    if result["cut_off"]:
        console.print(
            f"{result['cut_off']} of {result['n']} completions were cut off at --max-new-tokens {config.max_new_tokens:,}: "
            "they count as not solved"
        )
    if config.out:
        asked = {k: str(v) if isinstance(v, Path) else v for k, v in vars(config).items()}
        config.out.parent.mkdir(parents=True, exist_ok=True)
        write_atomic(config.out, json.dumps({"config": asked, **result}, indent=1, ensure_ascii=False) + "\n")
        console.print(f"everything, completions included, in {escape(str(config.out))}")
    return result


def result_table(name: str, result: dict[str, Any]) -> Table:
    """One model's result as a small table."""
    table = Table(box=None, header_style="bold", padding=(0, 3, 0, 0), title=escape(name), title_justify="left")
    for column in ("solved", "95 % interval", "problems", "cut off", "tokens each", "tokens/s"):
        table.add_column(column, justify="right")
    table.add_row(
        f"{result['solved_rate']:.1%}",
        f"{result['ci_low']:.1%} to {result['ci_high']:.1%}",
        str(result["n"]),
        str(result["cut_off"]),
        f"{result['mean_tokens']:,.0f}",
        f"{result['tokens_per_s']:,.0f}",
    )
    return table

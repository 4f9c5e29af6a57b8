"""What rejection sampling keeps: a completion as a row to train on, which rows pass, and which of a problem's are chosen."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Mapping
from pathlib import Path
from typing import Any, Literal

import numpy as np
from rich.table import Table

from .evaluate import pass_at_k, prompt_of
from .prompts import Prompt
from .rewards import Completion
from .samples import WholeFile, groups
from .shapes import REASONING_FIELDS

TEXTS = {"messages", "conversations", "text", "system", "prompt", "problem", "completion", "trace", "content"}
"""Fields of a row that hold its texts, beside those of a thought: a sampled row brings its own, and keeps all others."""


def row_of(
    prompt: Prompt, written: Completion, rewards: Mapping[str, float], provenance: dict[str, Any]
) -> dict[str, Any]:
    """A completion as a row: problem, trace and answer (messages where there is more than a problem), the other fields of the
    row it answers, the verdicts and where it comes from. `correct` is None where it was cut off or not checked."""
    asked, trace = prompt_of(prompt.row), prompt.text_of(written.text)
    if [message["role"] for message in asked] == ["user"]:
        said = {"problem": asked[0]["content"], "trace": trace}
    else:
        said = {"messages": [*asked, {"role": "assistant", "content": trace}]}
    marks = {name: None if math.isnan(value) else float(value) for name, value in rewards.items()}
    accuracy = marks.get("accuracy")
    verdict = {
        "answer": prompt.row.answer,
        "correct": None if accuracy is None or not written.finished else accuracy == 1,
        "finished": written.finished,
        "tokens": written.tokens,
        "rewards": marks,
        "provenance": provenance,
    }
    return other_fields(prompt) | said | verdict


def other_fields(prompt: Prompt) -> dict[str, Any]:
    """The fields of a prompt's row beside its texts: a sampled row keeps them."""
    gone = TEXTS | {*REASONING_FIELDS, "finish_reason"}
    return {key: value for key, value in prompt.row.raw.items() if key not in gone}


def passes(row: dict[str, Any], least: Mapping[str, float]) -> bool:
    """Whether a row may be kept: it has a text, was not cut off, and no reward is below the least that is asked of it."""
    marks, whole = row["rewards"], row["finished"] and bool(text_of(row).strip())
    return whole and all(marks[name] is not None and marks[name] >= low for name, low in least.items())


def choose(
    samples: Path,
    kept: Path,
    *,
    problems: int,
    each: int,
    least: Mapping[str, float],
    per_problem: int,
    prefer: Literal["random", "shortest"],
    seed: int,
) -> dict[str, Any]:
    """Writes to `kept` the chosen lines of `samples`, `each` lines a problem, as they stand there; returns the counts.

    Of rows with the same text one stays. Holds one problem at a time; `kept` is replaced when it is whole. Raises Refusal
    for a line that is not what was written.
    """
    names = ("cut_off", "right", "wrong", "tokens", "passed", "duplicates", "kept", "problems_kept", "tokens_kept")
    counts = Counter({"problems": problems, "samples": problems * each} | dict.fromkeys(names, 0))
    solved = 0.0
    with WholeFile(kept) as out:
        for problem, (lines, rows) in enumerate(groups(samples, problems, each)):
            right = sum(row["correct"] is True for row in rows)
            solved += pass_at_k(each, right, each)
            passing = [i for i, row in enumerate(rows) if passes(row, least)]
            chosen = pick(rows, passing, per_problem, prefer, np.random.default_rng((seed, problem)))
            counts.update(
                cut_off=sum(not row["finished"] for row in rows),
                right=right,
                wrong=sum(row["correct"] is False for row in rows),
                tokens=sum(row["tokens"] for row in rows),
                passed=len(passing),
                duplicates=len(passing) - len({text_of(rows[i]) for i in passing}),
                kept=len(chosen),
                problems_kept=bool(chosen),
                tokens_kept=sum(rows[i]["tokens"] for i in chosen),
            )
            for i in chosen:
                out.write(lines[i])
    rates = {"pass@1": counts["right"] / counts["samples"], f"pass@{each}": solved / problems}
    return dict(counts) | (rates if "accuracy" in least else {}) | {"sha256": out.sha256}


def pick(
    rows: list[dict[str, Any]], passing: list[int], most: int, prefer: str, draw: np.random.Generator
) -> list[int]:
    """The numbers of the rows to keep, ascending: distinct ones, `most` of them at most (0 = all)."""
    distinct = {text_of(rows[i]): i for i in reversed(passing)}  # the first of equal ones
    order = draw.permutation(sorted(distinct.values())).tolist()
    if prefer == "shortest":
        order.sort(key=lambda i: rows[i]["tokens"])
    return sorted(order[: most or None])


def text_of(row: dict[str, Any]) -> str:
    return row["trace"] if "trace" in row else row["messages"][-1]["content"]


def kept_table(counts: dict[str, Any], least: Mapping[str, float]) -> Table:
    """The counts as a table to print."""
    table = Table(title="Rejection sampling", title_justify="left", title_style="bold", box=None, padding=(0, 3, 0, 0))
    for name in ("", "completions", "%", "tokens"):
        table.add_column(name, justify="right" if name else "left")

    def line(name: str, count: int, tokens: int | None = None, style: str | None = None) -> None:
        shown = "" if tokens is None else f"{tokens:,}"
        table.add_row(name, f"{count:,}", f"{100 * count / counts['samples']:.1f}", shown, style=style)

    line(f"of {counts['problems']:,} problems", counts["samples"], counts["tokens"])
    if "accuracy" in least:
        line("right", counts["right"])
        line("wrong", counts["wrong"])
    line("cut off", counts["cut_off"], style="yellow" if counts["cut_off"] else None)
    line("pass (" + ", ".join(f"{name} ≥ {low:g}" for name, low in least.items()) + ")", counts["passed"])
    line("the same as another", counts["duplicates"])
    line(f"kept, of {counts['problems_kept']:,} problems", counts["kept"], counts["tokens_kept"], "bold")
    rates = {name: value for name, value in counts.items() if name.startswith("pass@")}
    table.caption_justify, table.caption_style = "left", "bold"
    table.caption = "  ".join(f"{name} {value:.1%}" for name, value in rates.items())
    return table

"""Which of a prompt's completions become a preference pair: the best against the worst of each path, and what is counted."""

from __future__ import annotations

import json
from collections.abc import Mapping, Sequence
from pathlib import Path
from statistics import mean, median
from typing import Any

import numpy as np
from rich.table import Table

from .config import Refusal
from .evaluate import prompt_of
from .keep import other_fields
from .pair_shapes import is_dialogue
from .prompts import Prompt
from .samples import WholeFile, groups
from .shapes import CLOSE, assistant_text, split_thought

PREFIX = {"trace": "", "empty": "empty_"}
SIDES = ("chosen", "rejected")
OWN = {
    "prompt", "path", "completion", "tokens", "finished", "rewards", "scores", "provenance", "chosen", "rejected",
    "empty_chosen", "empty_rejected", "tools",
}  # fmt: skip
"""Fields that a sample or a pair has of its own, and tools, which the model was not shown; all others are those of the row."""


def sample_row(
    prompt: Prompt, path: str, text: str, *, finished: bool, tokens: int, rewards: Mapping[str, float | None] | None,
    provenance: dict[str, Any],
) -> dict[str, Any]:  # fmt: skip
    """A completion with its verdicts. rewards: None where there was no answer to score, a None in it where a reward has no
    verdict. The prompt is text where it is one user's message, and read as such; else the list of messages."""
    asked = prompt_of(prompt.row)
    plain = [message["role"] for message in asked] == ["user"] and not is_dialogue(asked[0]["content"])
    said = asked[0]["content"] if plain else asked
    fields = {key: value for key, value in other_fields(prompt).items() if key not in OWN}
    return fields | {
        "prompt": said, "path": path, "completion": text, "finished": finished, "tokens": tokens, "rewards": rewards,
        "provenance": provenance,
    }  # fmt: skip


def score_of(row: Mapping[str, Any], weights: Mapping[str, float]) -> float | None:
    """The weighted sum of a sample's rewards; None where it was cut off, has no answer, or lacks a verdict."""
    marks = row["rewards"]
    if not row["finished"] or marks is None or any(marks[name] is None for name in weights):
        return None
    return sum(weight * marks[name] for name, weight in weights.items())


def as_trained(text: str) -> str:
    """A completion as the trainer reads it: the thought in its one form, an empty one gone, no blanks around."""
    try:
        text = assistant_text(text)
    except Refusal:  # a call in Harmony channels
        return text.strip()
    part = split_thought(text)
    return part.final if part.closed and part.thought is None else text.strip()


def pick(
    texts: Sequence[str], scores: Sequence[float | None], min_margin: float, draw: np.random.Generator
) -> tuple[int, int] | str:
    """(best, worst), the numbers of a pair; or why there is none: "few", "tie", "margin".

    Of texts that training reads as equal the first counts. Ties among the best, and among the worst, are broken by `draw`.
    """
    scored = {as_trained(texts[i]): i for i in reversed(range(len(texts))) if scores[i] is not None}
    numbers = sorted(scored.values())
    if len(numbers) < 2:
        return "few"
    best, worst = max(scores[i] for i in numbers), min(scores[i] for i in numbers)
    if best == worst:
        return "tie"
    if best - worst < min_margin * (1 - 1e-9):  # 0.3 - 0.2 is 0.1 but for rounding
        return "margin"
    top, bottom = ([i for i in numbers if scores[i] == score] for score in (best, worst))
    return int(draw.choice(top)), int(draw.choice(bottom))


class PathCounts:
    """What is counted of a path."""

    def __init__(self):
        self.samples = self.cut_off = self.no_answer = self.no_verdict = self.duplicates = self.without_thought = 0
        self.few = self.tie = self.margin = self.pairs = 0
        self.scores: list[float] = []
        self.margins: list[float] = []
        self.lengths: dict[str, list[int]] = {side: [] for side in SIDES}

    def see(self, rows: Sequence[Mapping[str, Any]], scores: Sequence[float | None]) -> None:
        self.samples += len(rows)
        for row, score in zip(rows, scores):
            self.cut_off += not row["finished"]
            self.no_answer += row["finished"] and row["rewards"] is None
            self.no_verdict += row["finished"] and row["rewards"] is not None and score is None
            self.without_thought += score is not None and CLOSE not in row["completion"]
        self.scores += [score for score in scores if score is not None]
        texts = [as_trained(row["completion"]) for row, score in zip(rows, scores) if score is not None]
        self.duplicates += len(texts) - len(set(texts))

    def wrote(self, pair: Mapping[str, Mapping[str, Any]], scores: Sequence[float]) -> None:
        """Counts a pair (side to its sample) that became part of a row; scores: the chosen's, the rejected's."""
        self.margins.append(scores[0] - scores[1])
        for side in SIDES:
            self.lengths[side].append(pair[side]["tokens"])

    def summary(self) -> dict[str, Any]:
        """Numbers for the card; means are None of nothing."""

        def of(function, values):
            return function(values) if values else None

        apart = [chosen - rejected for chosen, rejected in zip(*(self.lengths[side] for side in SIDES))]
        return {
            "samples": self.samples, "cut_off": self.cut_off, "no_answer": self.no_answer,
            "no_verdict": self.no_verdict, "scored": len(self.scores), "score_mean": of(mean, self.scores),
            "duplicates": self.duplicates, "without_thought": self.without_thought,
            "too_few": self.few, "ties": self.tie, "below_margin": self.margin, "pairs": self.pairs,
            "margin_mean": of(mean, self.margins), "margin_median": of(median, self.margins),
            "chosen_tokens": of(mean, self.lengths["chosen"]), "rejected_tokens": of(mean, self.lengths["rejected"]),
            "chosen_longer": of(mean, [d > 0 for d in apart]), "chosen_shorter": of(mean, [d < 0 for d in apart]),
        }  # fmt: skip


def choose_pairs(
    samples: Path, pairs: Path, *, prompts: int, each: int, paths: Sequence[str], weights: Mapping[str, float],
    min_margin: float, keep_one_path: bool, seed: int,
) -> dict[str, Any]:  # fmt: skip
    """Writes the pairs of `samples` (for every prompt and path `each` lines, in this order) to `pairs`; returns the counts.

    A prompt that has a pair on one of two paths only is left out unless keep_one_path: its margins and lengths are not
    counted then. Holds one prompt at a time; `pairs` is replaced when it is whole. Raises Refusal for a line that is not what was written.
    """
    counts = {path: PathCounts() for path in paths}
    written = one_path = none = 0
    with WholeFile(pairs) as out:
        for problem, (_, rows) in enumerate(groups(samples, prompts, each * len(paths))):
            found: dict[str, dict[str, Mapping[str, Any]]] = {}  # path: side: row
            scores: dict[str, float] = {}  # by the names that sides have in a pair
            for number, path in enumerate(paths):
                mine = rows[number * each : (number + 1) * each]
                marks = [score_of(row, weights) for row in mine]
                count = counts[path]
                count.see(mine, marks)
                draw = np.random.default_rng((seed, problem, number))
                pair = pick([row["completion"] for row in mine], marks, min_margin, draw)
                if isinstance(pair, str):
                    setattr(count, pair, getattr(count, pair) + 1)
                    continue
                count.pairs += 1
                found[path] = {side: mine[i] for side, i in zip(SIDES, pair)}
                scores |= {PREFIX[path] + side: marks[i] for side, i in zip(SIDES, pair)}
            none += not found
            one_path += 0 < len(found) < len(paths)
            if found and (keep_one_path or len(found) == len(paths)):
                text = json.dumps(pair_row(found, scores), ensure_ascii=False)
                out.write(text.encode("utf-8", "backslashreplace") + b"\n")
                written += 1
                for path, pair in found.items():
                    counts[path].wrote(pair, [scores[PREFIX[path] + side] for side in SIDES])
    summary = {"prompts": prompts, "rows": written, "one_path": one_path, "no_pair": none}
    return summary | {"paths": {path: count.summary() for path, count in counts.items()}, "sha256": out.sha256}


def pair_row(found: Mapping[str, Mapping[str, Mapping[str, Any]]], scores: Mapping[str, float]) -> dict[str, Any]:
    """A row as `longtrace prefer` reads it. found: path to side ("chosen", "rejected") to its sample."""
    sides = {PREFIX[path] + side: row for path, pair in found.items() for side, row in pair.items()}
    first = next(iter(sides.values()))
    others = {key: value for key, value in first.items() if key not in OWN}
    how = {key: value for key, value in first["provenance"].items() if key != "sample"}
    return (
        others
        | {"prompt": first["prompt"]}
        | {name: _side(row["completion"]) for name, row in sides.items()}
        | {
            "scores": dict(scores),
            "rewards": {name: row["rewards"] for name, row in sides.items()},
            "tokens": {name: row["tokens"] for name, row in sides.items()},
            "provenance": how | {"samples": {name: row["provenance"]["sample"] for name, row in sides.items()}},
        }
    )


def _side(text: str) -> str | list[dict[str, str]]:
    """A completion as a side: text where it is read as one answer, else the message it is."""
    return [{"role": "assistant", "content": text}] if is_dialogue(text) else text


def pairs_table(counts: Mapping[str, Any], min_margin: float) -> Table:
    """The counts as a table to print, a column a path."""
    table = Table(title="Preference pairs", title_justify="left", title_style="bold", box=None, padding=(0, 3, 0, 0))
    paths = counts["paths"]
    table.add_column("")
    for path in paths:
        table.add_column(path, justify="right")

    def line(name: str, field: str, form: str = ",", style: str | None = None) -> None:
        values = [found[field] for found in paths.values()]
        table.add_row(name, *("" if value is None else format(value, form) for value in values), style=style)

    line("completions", "samples")
    line("cut off", "cut_off", style="yellow" if any(found["cut_off"] for found in paths.values()) else None)
    line("without an answer to score", "no_answer")
    line("without a verdict", "no_verdict")
    line("scored", "scored")
    line("the same as another", "duplicates")
    if "trace" in paths:
        alone = paths["trace"]["without_thought"]
        table.add_row("scored without a thought", *(f"{alone:,}" if path == "trace" else "" for path in paths))
    line("score", "score_mean", ".3f")
    line("prompts with a pair", "pairs", style="bold")
    line("all scores equal", "ties")
    line("fewer than two to compare", "too_few")
    if min_margin:
        line(f"a margin below {min_margin:g}", "below_margin")
    line("margin, mean", "margin_mean", ".3f")
    line("margin, median", "margin_median", ".3f")
    line("tokens of the chosen", "chosen_tokens", ",.0f")
    line("tokens of the rejected", "rejected_tokens", ",.0f")
    line("the chosen is the longer", "chosen_longer", ".0%")
    line("the chosen is the shorter", "chosen_shorter", ".0%")
    return table


def outcome(counts: Mapping[str, Any], keep_one_path: bool) -> str:
    """How many prompts became rows, in a line."""
    lost = f"{counts['no_pair']:,} without a pair"
    if len(counts["paths"]) == 2:
        lost += f", {counts['one_path']:,} with one on one path only ({'kept' if keep_one_path else 'left out'})"
    return f"{counts['rows']:,} rows of {counts['prompts']:,} prompts: {lost}"

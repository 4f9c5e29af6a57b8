"""The audit of preference pairs: what was left out and why, lengths, margins, repeated and contradicting pairs.

A model that only learns which answer is longer is right in `longer_share` of the pairs: that is what it has to beat.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from longtrace.trainer.pair_shapes import PATHS, Pair
from longtrace.trainer.shapes import CLOSE

LEFT_OUT = {  # kinds of rows that are left out, as the table calls them
    "unreadable": "unreadable",
    "missing": "missing a field",
    "mismatch": "with two prompts",
    "equal": "with equal answers",
    "empty": "with an empty side",
    "thought": "with a thought on the empty path",
    "one-path": "whose template closes the thought itself",
    "no-thought": "losing a thought",
    "no-answer": "cut off or without an answer",
    "no-eos": "without an end token, or with one too many",
    "not-a-prefix": "whose prompt is not a prefix",
}


@dataclass
class SideFigures:
    """The answers of one side, or the prompts: tokens in all, and of one (with the token that ends an answer)."""

    tokens: int = 0
    length_p50: int = 0
    length_p90: int = 0
    length_max: int = 0
    thoughts: int = 0


@dataclass
class PathFigures:
    """The pairs of one path. Margins are the chosen score less the rejected one, of the `scored` pairs that have both."""

    pairs: int = 0
    chosen_longer: int = 0
    equal_length: int = 0
    repeated: int = 0
    contradicting: int = 0
    first_repeated: str = ""
    first_contradicting: str = ""
    scored: int = 0
    margin_p10: float = 0.0
    margin_p50: float = 0.0
    margin_p90: float = 0.0
    ties: int = 0
    inverted: int = 0

    @property
    def longer_share(self) -> float:
        """How often preferring the longer answer is right, a coin deciding between equal lengths."""
        return (self.chosen_longer + 0.5 * self.equal_length) / self.pairs if self.pairs else 0.5


@dataclass
class PairAudit:
    """The funnel of rows, and the figures of what is left, by path and by side."""

    specs: list[str]
    template: str
    max_tokens: int
    on_too_long: str
    paths: list[str]
    notes: list[str] = field(default_factory=list)
    rows_read: int = 0
    rows_too_long: int = 0
    longest_too_long: int = 0
    first_too_long: str = ""
    left_out: dict[str, int] = field(default_factory=dict)
    first_left_out: dict[str, str] = field(default_factory=dict)
    prompts: int = 0
    tokens_kept: int = 0
    tokens_supervised: int = 0
    length_max: int = 0
    by_path: dict[str, PathFigures] = field(default_factory=dict)
    by_side: dict[str, SideFigures] = field(default_factory=dict)

    @property
    def rows_left_out(self) -> int:
        """Rows that cannot be trained on, whatever their length."""
        return sum(self.left_out.values())

    @property
    def pairs(self) -> int:
        """Pairs kept: one a prompt and path."""
        return self.prompts * len(self.paths)

    def leave_out(self, kind: str, line: str) -> None:
        """Counts a row that is left out."""
        self.left_out[kind] = self.left_out.get(kind, 0) + 1
        self.first_left_out.setdefault(kind, line)

    def too_long(self, line: str, length: int) -> None:
        """Counts a row with a document of `length` tokens, too many."""
        self.rows_too_long += 1
        self.longest_too_long = max(self.longest_too_long, length)
        self.first_too_long = self.first_too_long or line

    def refusal(self) -> str | None:
        """Why training must not start, in one line with the flags that allow it; None when it may."""
        if self.rows_too_long and self.on_too_long == "refuse":
            return (
                f"{self.first_too_long}; {self.rows_too_long:,} of {self.rows_read:,} rows are over --max-tokens "
                f"{self.max_tokens:,} (longest {self.longest_too_long:,}); --on-too-long skip leaves them out, "
                "a larger --max-tokens keeps them"
            )
        if self.prompts == 0:
            first = next(iter(self.first_left_out.values()), self.first_too_long)
            return (
                f"{', '.join(self.specs)}: no pair left to train on: {self.rows_read:,} rows read, "
                f"{self.rows_left_out:,} left out, {self.rows_too_long:,} too long" + (f"; {first}" if first else "")
            )
        return None

    def as_dict(self) -> dict[str, Any]:
        """Everything counted, as JSON-able values; PairAudit.from_dict reads it back."""
        shares = {path: figures.longer_share for path, figures in self.by_path.items()}
        return asdict(self) | {"rows_left_out": self.rows_left_out, "pairs": self.pairs, "longer_share": shares}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> PairAudit:
        values = {key: v for key, v in values.items() if key not in ("rows_left_out", "pairs", "longer_share")}
        values["by_path"] = {path: PathFigures(**figures) for path, figures in values["by_path"].items()}
        values["by_side"] = {side: SideFigures(**figures) for side, figures in values["by_side"].items()}
        return PairAudit(**values)

    def table(self) -> Group:
        """The audit as it is printed before training."""
        funnel = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, title="Audit of pairs", title_justify="left", title_style="bold"
        )
        for name in ("", "rows", "%"):
            funnel.add_column(name, justify="right" if name else "left", no_wrap=True)

        def line(name: str, rows: int, style: str | None = None) -> None:
            funnel.add_row(name, f"{rows:,}", _percent(rows, self.rows_read), style=style)

        line("read", self.rows_read)
        for kind, count in self.left_out.items():
            line(f"{LEFT_OUT.get(kind, kind)}, left out", count, "red")
        handled = "refused" if self.on_too_long == "refuse" else "skipped"
        style = "yellow" if self.rows_too_long else None
        line(f"over {self.max_tokens:,} tokens, {handled}", self.rows_too_long, style)
        line("prompts kept", self.prompts, "bold")

        sides = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name in ("", "tokens", "p50", "p90", "longest", "with a thought"):
            sides.add_column(name, justify="right" if name else "left", no_wrap=True)
        for side, found in self.by_side.items():
            figures = (found.tokens, found.length_p50, found.length_p90, found.length_max)
            thoughts = "" if side == "prompt" else f"{found.thoughts:,}"
            sides.add_row(side, *(f"{value:,}" for value in figures), thoughts)

        lines = [(f"data: {', '.join(self.specs)}", None), (f"template: {self.template}", None)]
        lines.append((
            f"{self.pairs:,} pairs, {self.tokens_kept:,} tokens, {self.tokens_supervised:,} of them in the loss; "
            f"longest document {self.length_max:,}", None,
        ))  # fmt: skip
        for path, found in self.by_path.items():
            lines += _path_lines(path, found)
        lines += [(f"left out: {line}", "red") for line in self.first_left_out.values()]
        if self.first_too_long:
            lines.append((f"first over the limit: {self.first_too_long}", "yellow"))
        lines += [(note, None) for note in self.notes]
        return Group(funnel, sides, *(Text(line, style=style or "") for line, style in lines))


def _path_lines(path: str, found: PathFigures) -> list[tuple[str, str | None]]:
    """What the table says of a path."""
    lines = [(
        f"{path}: chosen longer in {_percent(found.chosen_longer, found.pairs)} % of {found.pairs:,} pairs, as long in "
        f"{_percent(found.equal_length, found.pairs)} %: preferring the longer is right in {100 * found.longer_share:.1f} %",
        None,
    )]  # fmt: skip
    if found.scored:
        margins = ", ".join(
            f"{name} {value:.3g}"
            for name, value in (("p10", found.margin_p10), ("p50", found.margin_p50), ("p90", found.margin_p90))
        )
        odd = f"{found.ties:,} ties, {found.inverted:,} with the rejected answer scored higher"
        style = "yellow" if found.ties or found.inverted else None
        lines.append((f"{path}: margins of {found.scored:,} scored pairs: {margins}; {odd}", style))
    if found.repeated:
        lines.append((f"{path}: {found.repeated:,} pairs stand twice: {found.first_repeated}", "yellow"))
    if found.contradicting:
        what = f"{path}: {found.contradicting:,} pairs contradict an earlier one: {found.first_contradicting}"
        lines.append((what, "yellow"))
    return lines


class PairFigures:
    """Gathers the figures of the pairs that are kept, one row after the other."""

    def __init__(self, paths: Sequence[str]):
        self.paths = {path: PathFigures() for path in paths}
        self.margins = {path: array("d") for path in paths}
        self.thoughts = {side: 0 for path in paths for side in PATHS[path]}
        self.seen: dict[bytes, int] = {}  # digest of (path, prompt, chosen, rejected) → the first row with it

    def add(self, where: str, number: int, documents: Sequence[tuple[np.ndarray, int]], pair: Pair) -> None:
        """Counts a row: its documents (ids, tokens of context) in the order of PairSet."""
        for k, (path, found) in enumerate(self.paths.items()):
            chosen, rejected = PATHS[path]
            if chosen in pair.scores and rejected in pair.scores:
                self.margins[path].append(pair.scores[chosen] - pair.scores[rejected])
            for side in PATHS[path]:
                self.thoughts[side] += CLOSE in pair.answers[side]["content"]
            (first, context), (second, _) = documents[2 * k : 2 * k + 2]
            key, swapped = (_digest(path, context, a, b) for a, b in ((first, second), (second, first)))
            if key in self.seen:
                found.repeated += 1
                found.first_repeated = (
                    found.first_repeated or f"{where} has the pair of row {self.seen[key] + 1:,} read"
                )
            if swapped in self.seen:
                found.contradicting += 1
                found.first_contradicting = (
                    found.first_contradicting or f"{where} prefers what row {self.seen[swapped] + 1:,} read rejects"
                )
            self.seen.setdefault(key, number)

    def finish(self, audit: PairAudit, lengths: np.ndarray, prompts: np.ndarray) -> None:
        """Fills in the audit, given the lengths (documents,) of all documents kept and of their contexts."""
        count = len(lengths) // (2 * len(self.paths))
        audit.prompts, audit.tokens_kept, audit.by_path = count, int(lengths.sum()), self.paths
        audit.tokens_supervised = int((lengths - prompts).sum())
        if not count:
            return
        audit.length_max = int(lengths.max())
        answers = (lengths - prompts).reshape(count, len(self.paths), 2)
        audit.by_side = {"prompt": _side(prompts.reshape(count, -1)[:, 0])}
        for k, (path, found) in enumerate(self.paths.items()):
            for side, values in zip(PATHS[path], answers[:, k].T):
                audit.by_side[side] = _side(values, self.thoughts[side])
            longer = answers[:, k, 0] - answers[:, k, 1]
            found.pairs, found.chosen_longer = count, int((longer > 0).sum())
            found.equal_length = int((longer == 0).sum())
            margins = np.frombuffer(self.margins[path]) if self.margins[path] else np.zeros(0)
            if len(margins):
                found.scored, found.ties = len(margins), int((margins == 0).sum())
                found.inverted = int((margins < 0).sum())
                found.margin_p10, found.margin_p50, found.margin_p90 = map(float, np.percentile(margins, [10, 50, 90]))


def _side(lengths: np.ndarray, thoughts: int = 0) -> SideFigures:
    p50, p90 = np.percentile(lengths, [50, 90], method="nearest")
    return SideFigures(int(lengths.sum()), int(p50), int(p90), int(lengths.max()), thoughts)


def _digest(path: str, context: int, first: np.ndarray, second: np.ndarray) -> bytes:
    """What two pairs share if they prefer the same answer to the same other one after the same prompt."""
    digest = hashlib.blake2b(f"{path} {context} {len(first)} ".encode(), digest_size=12)
    digest.update(first.astype("<u4").tobytes())
    digest.update(second[context:].astype("<u4").tobytes())
    return digest.digest()


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "–"

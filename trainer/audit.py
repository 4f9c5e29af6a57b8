"""The audit: what a template and a length limit do to every trace, counted before the first step.

Checks look at the text and tokens that would be trained, never at the row alone, so a thought that a template deletes, an
end token that is not learned and an answer that was cut off are all seen.
"""

from __future__ import annotations

import re
from dataclasses import asdict, dataclass, field
from typing import Any

import numpy as np
from rich import box
from rich.console import Group
from rich.table import Table
from rich.text import Text

from longtrace.trainer.config import Refusal
from longtrace.trainer.render import Encoded, Rendered
from longtrace.trainer.rows import Row
from longtrace.trainer.shapes import CLOSE, OPEN, Thought, split_thought

KINDS = ("no-thought", "no-answer", "no-eos", "not-a-prefix")
SKIP = "--skip-bad-rows leaves such rows out"
KEEP = "--template longtrace supplies a template that keeps it"
ENDS = "--template longtrace supplies a template that ends every turn"
PREFIX = "--template longtrace supplies a template whose prompts are prefixes"

BOXED = re.compile(r"\\f?boxed\s*(\{[^{}]*(\{[^{}]*(\{[^{}]*(\{[^{}]*\}[^{}]*)*\}[^{}]*)*\}[^{}]*)*\}|\s*[^\s{])")
STATED = re.compile(r"####\s*\S|\banswer\b\W{0,4}(?:is|:|=)", re.IGNORECASE)
LATEX_NOISE = re.compile(
    r"\\(?:left|right|displaystyle|mathrm|textbf|mathbf|text|mbox|operatorname)\b|\\[!,;: ()\[\]]|\^\{?\\circ\}?|[\s${}*]"
)


@dataclass(frozen=True)
class Finding:
    """One thing wrong with one row: kind (a name --allow takes), what, and which flags deal with it."""

    kind: str
    where: str
    reason: str
    remedy: str

    def line(self) -> str:
        return f"{self.where}: {self.kind}: {self.reason}"


@dataclass
class Check:
    """A line of the table: rows that pass, of the rows it applies to."""

    name: str
    kind: str = ""
    passed: int = 0
    applies: int = 0

    def count(self, passed: bool | None) -> None:
        """Adds a row; None where the check does not apply to it."""
        self.applies += passed is not None
        self.passed += passed is True


@dataclass
class Audit:
    """The funnel (rows and tokens), the checks, and the findings of one pass over the data."""

    specs: list[str]
    template: str
    max_tokens: int
    on_too_long: str
    allow: list[str]
    notes: list[str] = field(default_factory=list)
    rows_read: int = 0
    rows_unreadable: int = 0
    rows_left_out: int = 0
    rows_too_long: int = 0
    rows_whole: int = 0
    rows_marked_wrong: int = 0
    documents: int = 0
    tokens_read: int = 0
    tokens_too_long: int = 0
    tokens_kept: int = 0
    tokens_supervised: int = 0
    first_unreadable: str = ""
    first_left_out: str = ""
    first_too_long: str = ""
    longest_too_long: int = 0
    length_p50: int = 0
    length_p90: int = 0
    length_max: int = 0
    ends: dict[str, int] = field(default_factory=dict)
    checks: dict[str, Check] = field(
        default_factory=lambda: {
            key: Check(name, kind)
            for key, name, kind in (
                ("thought", "has a thought", ""),
                ("kept", "the thought is kept", "no-thought"),
                ("closed", f"{CLOSE} is kept and in the loss", "no-thought"),
                ("answer", "the answer is there and in the loss", "no-answer"),
                ("eos", "the end token is there and in the loss", "no-eos"),
                ("prefix", "the generation prompt is a prefix", "not-a-prefix"),
            )
        }
    )
    found: dict[str, int] = field(default_factory=dict)
    first: dict[str, Finding] = field(default_factory=dict)

    @property
    def tokens_dropped(self) -> int:
        """Tokens of readable rows that are not in the training set."""
        return self.tokens_read - self.tokens_kept

    def add(self, findings: list[Finding]) -> None:
        """Counts what is wrong with a row that stays."""
        for kind in {finding.kind for finding in findings}:
            self.found[kind] = self.found.get(kind, 0) + 1
        for finding in findings:
            self.first.setdefault(finding.kind, finding)

    def refusal(self) -> str | None:
        """Why training must not start, in one line with the flags that allow it; None when it may."""
        if self.rows_too_long and self.on_too_long == "refuse":
            return (
                f"{self.first_too_long}; {self.rows_too_long:,} of {self.rows_read:,} rows are over --max-tokens "
                f"{self.max_tokens:,} (longest {self.longest_too_long:,}); --on-too-long skip leaves them out, split cuts them, "
                "a larger --max-tokens keeps them whole"
            )
        refused = [kind for kind in KINDS if kind in self.found and kind not in self.allow]
        if refused:
            first = self.first[refused[0]]
            others = "".join(f"; also {kind} in {self.found[kind]:,}" for kind in refused[1:])
            return (
                f"{first.line()}; {self.found[refused[0]]:,} of {self.rows_read:,} rows{others}; "
                f"{first.remedy}; --allow {' '.join(refused)} trains on them as they are"
            )
        if self.documents == 0:
            return (
                f"{', '.join(self.specs)}: nothing left to train on: {self.rows_read:,} rows read, "
                f"{self.rows_unreadable:,} unreadable, {self.rows_left_out:,} refused by the audit, {self.rows_too_long:,} too long"
                + "".join(
                    f"; {line}"
                    for line in (self.first_unreadable or self.first_left_out or self.first_too_long,)
                    if line
                )
            )
        return None

    def as_dict(self) -> dict[str, Any]:
        """Everything counted, as JSON-able values; Audit.from_dict reads it back."""
        return asdict(self) | {"tokens_dropped": self.tokens_dropped}

    @staticmethod
    def from_dict(values: dict[str, Any]) -> Audit:
        values = {key: value for key, value in values.items() if key != "tokens_dropped"}
        values["checks"] = {key: Check(**check) for key, check in values["checks"].items()}
        values["first"] = {key: Finding(**finding) for key, finding in values["first"].items()}
        return Audit(**values)

    def table(self) -> Group:
        """The audit as it is printed before training."""
        funnel = Table(
            box=box.SIMPLE_HEAD, pad_edge=False, title="Audit of traces", title_justify="left", title_style="bold"
        )
        for name in ("", "rows", "%", "tokens", "%"):
            funnel.add_column(name, justify="right" if name else "left", no_wrap=True)

        def line(name: str, rows: int | None, tokens: int | None, style: str | None = None) -> None:
            cells = ["", ""] if rows is None else [f"{rows:,}", _percent(rows, self.rows_read)]
            cells += ["", ""] if tokens is None else [f"{tokens:,}", _percent(tokens, self.tokens_read)]
            funnel.add_row(name, *cells, style=style)

        handled = {"refuse": "refused", "skip": "skipped", "split": "split"}[self.on_too_long]
        line("read", self.rows_read, self.tokens_read)
        if self.rows_unreadable:
            line("unreadable, left out", self.rows_unreadable, None, "red")
        line(
            f"over {self.max_tokens:,} tokens, {handled}",
            self.rows_too_long,
            self.tokens_too_long,
            _warn(self.rows_too_long),
        )
        if self.rows_left_out:
            line("failing a check, left out", self.rows_left_out, None, "red")
        line("whole traces kept", self.rows_whole, None, "bold")
        if self.documents > self.rows_whole:
            line(f"  and {self.documents - self.rows_whole:,} pieces of split ones", None, None)
        line("tokens kept", None, self.tokens_kept)
        line("tokens dropped", None, self.tokens_dropped, _warn(self.tokens_dropped))
        line("tokens in the loss", None, self.tokens_supervised)

        checks = Table(box=box.SIMPLE_HEAD, pad_edge=False)
        for name, justify in (("check", "left"), ("rows", "right"), ("of", "right"), ("", "left")):
            checks.add_column(name, justify=justify, no_wrap=True)
        for check in self.checks.values():
            failed = check.kind and check.passed < check.applies
            mark, style = ("ok" if check.kind else "", None)
            if failed:
                mark, style = (f"{check.kind}, allowed", "yellow") if check.kind in self.allow else (check.kind, "red")
            checks.add_row(check.name, f"{check.passed:,}", f"{check.applies:,}", mark, style=style)
        if self.rows_marked_wrong:
            checks.add_row("marked wrong (correct: false), trained on", f"{self.rows_marked_wrong:,}", "", "")
        ends = ", ".join(f"{token} ({count:,})" for token, count in self.ends.items())
        lines = [
            f"data: {', '.join(self.specs)}",
            f"template: {self.template}",
            f"tokens a row: p50 {self.length_p50:,}, p90 {self.length_p90:,}, longest {self.length_max:,}",
            f"turns end in: {ends}" if ends else "",
            f"first unreadable: {self.first_unreadable}" if self.first_unreadable else "",
            f"first over the limit: {self.first_too_long}" if self.first_too_long else "",
            f"first left out: {self.first_left_out}" if self.first_left_out else "",
            *(f"for example {finding.line()}" for finding in self.first.values()),
            *self.notes,
        ]
        return Group(funnel, checks, *(Text(line) for line in lines if line))


def check_row(
    row: Row, rendered: Rendered, encoded: Encoded, template: str
) -> tuple[list[Finding], dict[str, bool | None]]:
    """Findings of one row, and for each check of the table whether it passed (None: does not apply)."""
    findings: list[Finding] = []

    def find(kind: str, reason: str, remedy: str) -> None:
        findings.append(Finding(kind, row.where, reason, remedy))

    targets = rendered.targets
    assistants = [message for message in row.messages if message["role"] == "assistant"]
    taken = [split_thought(message["content"]) for message in assistants]
    # a turn that is no prefix of the whole is not trained; its thought is looked for in the text, where it may be gone
    texts = targets if len(targets) == len(taken) else [rendered.text] * len(taken)
    thoughts = [(part, text) for part, text in zip(taken, texts) if part.thought is not None]
    lost = next((part for part, text in thoughts if part.thought.strip().removeprefix(OPEN).strip() not in text), None)
    unclosed = next((part for part, _ in thoughts if not part.closed), None)
    close_kept = all(CLOSE in text for part, text in thoughts if part.closed)
    if lost:
        find("no-thought", f"the template ({template}) drops the thought ({len(lost.thought):,} characters)", KEEP)
    elif unclosed:
        find("no-thought", f"a thought is opened and never closed: no {CLOSE} follows", SKIP)
    elif not close_kept:
        find("no-thought", f"the template ({template}) drops {CLOSE}", KEEP)

    missing = _missing_answer(row, assistants[-1], taken[-1])
    dropped = taken[-1].final not in texts[-1]
    if missing:
        find("no-answer", missing, SKIP)
    elif dropped:
        find("no-answer", f"the template ({template}) drops the text after {CLOSE}", KEEP)

    ended = bool(encoded.ends) and all(end is not None for end in encoded.ends)
    if not ended:
        find(
            "no-eos",
            f"the template ({template}) puts no end token after an assistant turn: stopping is not learned",
            ENDS,
        )
    elif encoded.ends_early:
        find(
            "no-eos", "the row's text has the end token inside an assistant turn: stopping would be learned there", SKIP
        )
    if rendered.broken:
        find("not-a-prefix", rendered.broken, PREFIX)
    elif not encoded.prompt_is_prefix:
        find("not-a-prefix", "tokens merge across the end of an earlier generation prompt", SKIP)

    return findings, {
        "thought": bool(thoughts),
        "kept": lost is None if thoughts else None,
        "closed": (not unclosed and close_kept and not lost) if thoughts else None,
        "answer": not missing and not dropped,
        "eos": ended and not encoded.ends_early,
        "prefix": not rendered.broken and encoded.prompt_is_prefix,
    }


def _missing_answer(row: Row, last: dict[str, Any], taken: Thought) -> str:
    """Why a row counts as one without an answer, or ''."""
    if not row.finished:
        return "the row says that its text was cut off (finished: false)"
    if last.get("tool_calls"):
        return ""
    if not taken.closed:
        return "the thought never ends, so no answer follows"
    final = taken.final
    if not final:
        return f"nothing follows {CLOSE}" if CLOSE in last["content"] else "the assistant's text is empty"
    if row.answer is None or BOXED.search(final) or STATED.search(final) or _mentions(final, row.answer):
        return ""
    return f"neither \\boxed{{}} nor the row's answer {row.answer[:40]!r} stands in the text after {CLOSE}"


def _mentions(text: str, answer: str) -> bool:
    """Whether a text states an answer, LaTeX spelling aside. Numbers must stand alone (5 is not in 15)."""
    answer = answer.strip()
    if re.fullmatch(r"[\w.,+-]+", answer):
        number = re.escape(answer.replace(",", ""))
        return re.search(rf"(?<![\w.]){number}(?!\w|\.\d)", text.replace(",", ""), re.IGNORECASE) is not None
    return _plain(answer) in _plain(text)


def _plain(text: str) -> str:
    return LATEX_NOISE.sub("", re.sub(r"\\[dt]frac", r"\\frac", text)).casefold()


def length_figures(audit: Audit, lengths: list[int]) -> None:
    """Fills in the percentiles of the rendered lengths."""
    if lengths:
        p50, p90 = np.percentile(lengths, [50, 90], method="nearest")
        audit.length_p50, audit.length_p90, audit.length_max = int(p50), int(p90), max(lengths)


def check_kinds(allow) -> list[str]:
    """The findings to allow; Refusal for a name that is none."""
    unknown = [kind for kind in allow if kind not in KINDS]
    if unknown:
        raise Refusal(f"--allow {unknown[0]}: accepted: {', '.join(KINDS)}")
    return list(allow)


def _percent(part: int, whole: int) -> str:
    return f"{100 * part / whole:.1f}" if whole else "–"


def _warn(count: int) -> str | None:
    return "yellow" if count else None

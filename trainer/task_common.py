"""What the generated tasks share: the common options, the measure of length, the split, and verdicts on lines."""

from __future__ import annotations

import hashlib
import math
import random
import re
from dataclasses import dataclass

TEST_SHARE = 32 / 256
"""Share of a task's problems that belong to the test split."""

_PIECE = re.compile(r"[^\S\n]?[A-Za-z]+|\d| ?[^\sA-Za-z\d]+\n*|\s+")


@dataclass(frozen=True, kw_only=True)
class Options:
    """Options of every task."""

    rows: int = 1000
    seed: int = 0
    split: str = "train"
    style: str = "concise"
    target: tuple[int, int] | None = None

    def draw_target(self, rng: random.Random) -> int | None:
        """One row's length: log-uniform within the range, so that short and long traces are equally common."""
        if not self.target:
            return None
        low, high = self.target
        return round(math.exp(rng.uniform(math.log(low), math.log(high))))


def approx_tokens(text: str) -> int:
    """Tokens of `text`, counted without a tokenizer: a word with its space, one digit, a run of signs, or white space.

    These are the pieces of Qwen's pre-tokenizer, so lengths mean the same whichever model is trained; docs/tasks.md
    compares them with real tokenizers.
    """
    return sum(1 for _ in _PIECE.finditer(text))


def whole_trace(thought: list[str] | None, answer: str) -> str:
    """The assistant's text: the lines of the thought (None: no thought) and the answer."""
    end = f"The answer is \\boxed{{{answer}}}."
    return end if thought is None else "\n".join(["<think>", *thought, "</think>", "", end])


def near(thought: list[str], answer: str, target: int) -> bool:
    """Whether the trace is within 10 % of the length asked for."""
    return abs(approx_tokens(whole_trace(thought, answer)) - target) <= 0.1 * target


def split_of(problem: str) -> str:
    """`train` or `test`: decided by a hash of the problem's text, so no problem can be in both."""
    return "test" if hashlib.sha256(problem.encode()).digest()[0] < 256 * TEST_SHARE else "train"


@dataclass(frozen=True)
class Verdict:
    """What the checker says of one line of a trace.

    `label`: 1 the line states something true and does the right thing, -1 it is wrong, 0 it claims nothing (step
    labels of a process reward model). `ok`: the line belongs in a sound trace; a wrong line does when the next one
    repairs it.
    """

    line: str
    ok: bool
    label: int
    reason: str


def good(line: str, reason: str = "true") -> Verdict:
    return Verdict(line, True, 1, reason)


def bad(line: str, reason: str) -> Verdict:
    return Verdict(line, False, -1, reason)

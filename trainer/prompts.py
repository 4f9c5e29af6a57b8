"""Prompts: rows as the chat template asks them, one at a time, and what was written to them as rewards read it.

Rollouts of `longtrace grpo` and `longtrace sample` begin here.
"""

from __future__ import annotations

import hashlib
import json
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass, field, replace
from itertools import chain, islice

import numpy as np

from . import traces
from .config import Refusal, parse_columns
from .evaluate import prompt_of
from .rewards import Completion as Scored
from .rewards import kind_of
from .rollout import Completion
from .rows import Row
from .shapes import CLOSE, OPEN


@dataclass(frozen=True)
class Prompt:
    """A problem as the model is asked it."""

    tokens: list[int]
    row: Row
    thinking: bool | None  # True: the template has opened the thought; False: it stands closed in the prompt
    empty: list[int] = field(default_factory=list)  # the same, going on with an empty thought

    def text_of(self, completion: str) -> str:
        return "<think>\n" + completion if self.thinking else completion

    def without_thought(self) -> Prompt:
        """The prompt that goes on with an empty thought."""
        return replace(self, tokens=self.empty, thinking=False)


def prompts_of(
    specs: Sequence[str],
    tokenizer,
    *,
    template: str,
    columns: Sequence[str] = (),
    limit: int = 0,
    longest: int,
    room: str,
    checkable: bool,
    empty: bool = False,
    skip_bad_rows: bool = False,
    bad_rows: list[str] | None = None,
) -> Iterator[Prompt]:
    """The prompts of the sources, of the first `limit` rows (0 = all), in order; nothing is held.

    checkable: only of rows whose answers can be checked. empty: with the tokens of `empty_thought` besides. longest: in
    tokens; `room` names the options it comes from. Raises Refusal at the first row that cannot be used, or with
    skip_bad_rows leaves it out and appends a line to `bad_rows`.
    """
    bad = [] if bad_rows is None else bad_rows
    rows = chain.from_iterable(
        traces.read_rows(spec, columns=parse_columns(list(columns)), skip_bad_rows=skip_bad_rows, bad_rows=bad)
        for spec in specs
    )
    jinja = traces.chat_template(tokenizer, template)
    for row in islice(rows, limit or None):
        text = tokenizer.apply_chat_template(
            prompt_of(row), chat_template=jinja, tokenize=False, add_generation_prompt=True
        )
        tokens = tokenizer(text, add_special_tokens=False)["input_ids"]
        closed = tokenizer(empty_thought(text), add_special_tokens=False)["input_ids"] if empty else []
        length = max(len(tokens), len(closed))
        if checkable and kind_of(row) is None:
            bad.append(f"{row.where}: nothing to check with; accepted: rows with an answer or tests")
        elif length > longest:
            bad.append(f"{row.where}: a prompt of {length:,} tokens; accepted: up to {longest:,} ({room})")
        else:
            yield Prompt(tokens, row, text.rstrip().endswith("<think>") or None, closed)
            continue
        if not skip_bad_rows:
            raise Refusal(bad[-1])


def empty_thought(prompt: str) -> str:
    """A generation prompt, as text, that goes on with an empty thought: what is written next is an answer without one
    (BVPO's empty trace, NoThinking). Source: arXiv:2510.05095; Ma et al. 2025, arXiv:2504.09858."""
    bare = prompt.rstrip()
    if bare.endswith(CLOSE):  # the template leaves the thought empty itself
        return prompt
    opened = bare.endswith(OPEN)  # by a template that writes it itself
    return (prompt if not opened else bare.removesuffix(OPEN)) + f"{OPEN}\n\n{CLOSE}\n\n"


def fingerprint(prompts: Iterable[Prompt]) -> str:
    """SHA-256 (hex) of what is asked and what it is checked with: equal sets of prompts in equal order agree."""
    digest = hashlib.sha256()
    for prompt in prompts:
        digest.update(np.asarray([len(prompt.tokens), *prompt.tokens, *prompt.empty], dtype="<i8").tobytes())
        digest.update(json.dumps([prompt.row.answer, prompt.row.raw.get("tests")], default=str).encode())
    return digest.hexdigest()


def as_scored(tokenizer, asked: Sequence[Prompt], done: Sequence[Completion]) -> list[Scored]:
    """Completions as text, with what rewards read besides."""
    return [
        Scored(tokenizer.decode(c.tokens, skip_special_tokens=True), p.row, c.finished, p.thinking, len(c.tokens))
        for p, c in zip(asked, done)
    ]

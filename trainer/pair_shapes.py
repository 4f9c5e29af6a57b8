"""Pair shapes: what people store preferences in, turned into a prompt and, for every path, an answer preferred to another.

A prompt stands in a field of its own, or is what both sides begin with; a side is a text, a message, a list of messages
that ends in the answer, or a whole "\\n\\nHuman: … \\n\\nAssistant: …" dialogue (HH).
"""

from __future__ import annotations

import math
import re
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

from longtrace.trainer.config import Refusal
from longtrace.trainer.shapes import (
    CLOSE,
    OPENED,
    assistant_text,
    checked_text,
    message_list,
    shown,
    split_thought,
    to_messages,
    to_tools,
    with_system,
)

PATHS = {"trace": ("chosen", "rejected"), "empty": ("empty_chosen", "empty_rejected")}
PROMPTS = ("prompt", "problem", "conversations")
SIDE = "text, a message, or a list of messages that ends in an assistant's"
DIALOGUE = re.compile(r"\n\n(Human|Assistant):")


class BadPair(Refusal):
    """A row that can be read and not be trained on; `kind` is what the audit counts it as."""

    def __init__(self, kind: str, line: str):
        super().__init__(line)
        self.kind = kind


@dataclass
class Pair:
    """A row: `prompt` (messages), for every side (chosen, rejected, empty_chosen, empty_rejected) of the paths asked for
    the assistant's message that answers it, its white space at both ends gone, and the score of the sides that have one."""

    prompt: list[dict[str, Any]]
    answers: dict[str, dict[str, Any]]
    scores: dict[str, float]
    tools: list[dict] | None


def to_pair(raw: dict[str, Any], paths: Sequence[str]) -> Pair:
    """The pair of a row of any accepted shape; Refusal (field, found, accepted) for everything else.

    Fields of a path that is not asked for are not looked at, but where they hold the prompt.
    """
    row = {key: value for key, value in raw.items() if value is not None}
    for path in paths:
        for side in PATHS[path]:
            if side not in row:
                found = ", ".join(map(str, raw)) or "none"
                accepted = f"{' and '.join(PATHS[path])} for the {path} path; --columns old=new renames fields"
                raise BadPair("missing", f"{side}: found fields {found}; accepted: {accepted}")
    stated = _stated_prompt(row)
    sides = {side: _conversation(row[side], side) for path in paths for side in PATHS[path]}
    # of a prompt that is only implied, the answers of the empty path say nothing
    implied = sides if "chosen" in sides or "chosen" not in row else {"": _conversation(row["chosen"], "chosen")}
    default = stated or next((_before(messages, row) for messages in implied.values() if len(messages) > 1), None)
    if default is None:
        raise BadPair(
            "missing",
            f"{PROMPTS[0]}: found fields {', '.join(map(str, raw))}; accepted: {', '.join(PROMPTS)}, or sides that begin "
            "with the prompt; --columns old=new renames fields",
        )
    prompts = {side: _prompt(_before(messages, row), stated, side) or default for side, messages in sides.items()}
    (first, prompt), *others = prompts.items()
    for side, other in others:
        if other != prompt:
            raise BadPair("mismatch", f"{side}: {_difference(other, prompt)}; accepted: the prompt of {first}")
    if not any(message["content"].strip() for message in prompt):
        raise BadPair("empty", f"{_prompt_field(row)}: found no text; accepted: a prompt")
    if prompt[-1]["role"] not in ("user", "tool"):
        field = _prompt_field(row) if stated else first
        raise Refusal(
            f"{field}: found a prompt that ends in a message of role {prompt[-1]['role']}; accepted: one that ends in a user's "
            "or a tool's"
        )
    answers = {side: _answer(messages[-1], side) for side, messages in sides.items()}
    for path in paths:
        chosen, rejected = PATHS[path]
        if answers[chosen] == answers[rejected]:
            raise BadPair("equal", f"{rejected}: found the text of {chosen}; accepted: two different answers")
    return Pair(prompt, answers, _scores(row, sides), to_tools(raw))


def _stated_prompt(row: dict[str, Any]) -> list[dict[str, Any]] | None:
    """The messages of the row's prompt field, or None where it has none."""
    field = _prompt_field(row)
    if field not in row:
        return None
    if not is_dialogue(row[field]):
        return to_messages({key: row[key] for key in (field, "system") if key in row})
    messages = _dialogue(checked_text(row[field], field), field)
    if messages[-1] == {"role": "assistant", "content": ""}:  # where the answer goes
        messages.pop()
    return with_system(messages, row)


def _prompt_field(row: dict[str, Any]) -> str:
    return next((field for field in PROMPTS if field in row), PROMPTS[0])


def is_dialogue(value: Any) -> bool:
    """True for a text that is read as an HH dialogue, not as one message."""
    return isinstance(value, str) and value.startswith("\n\nHuman:")


def _before(messages: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """What stands before the answer that ends a side, the row's `system` text included; [] where nothing does."""
    return with_system(messages[:-1], row) if len(messages) > 1 else []


def _conversation(value: Any, side: str) -> list[dict[str, Any]]:
    """A side as messages, the last of them the assistant's; the ones before, if any, are its prompt."""
    if isinstance(value, str):
        text = checked_text(value, side)
        if is_dialogue(text) and "\n\nAssistant:" in text:
            messages = _dialogue(text, side)
        else:
            messages = [_assistant(text, side)]
    elif isinstance(value, dict):
        messages = message_list([value], side)
    elif isinstance(value, list) and value:
        messages = message_list(value, side)
    else:
        raise Refusal(f"{side}: found {shown(value)}; accepted: {SIDE}")
    if messages[-1]["role"] != "assistant":
        raise Refusal(f"{side}: found a last message of role {messages[-1]['role']}; accepted: {SIDE}")
    return messages


def _dialogue(text: str, field: str) -> list[dict[str, Any]]:
    """The turns of an HH dialogue."""
    _, *parts = DIALOGUE.split(text)
    turns = zip(parts[::2], (content.strip() for content in parts[1::2]))
    return [
        _assistant(content, field) if role == "Assistant" else {"role": "user", "content": content}
        for role, content in turns
    ]


def _assistant(text: str, field: str) -> dict[str, Any]:
    """An assistant's message, its thought in the one form thoughts are trained in."""
    try:
        return {"role": "assistant", "content": assistant_text(text)}
    except Refusal as refusal:
        raise Refusal(f"{field}.{refusal}") from None


def _prompt(own: list[dict], stated: list[dict] | None, side: str) -> list[dict[str, Any]]:
    """What stands before a side's answer (nothing: []), which must begin with the stated prompt if there is one."""
    if not own or stated is None:
        return own
    heads = [part[:1] if part[0]["role"] == "system" else [] for part in (own, stated)]
    if not all(heads):  # a system text that one of them leaves out
        own, stated = ([*(heads[0] or heads[1]), *part[len(head) :]] for part, head in zip((own, stated), heads))
    begins = len(own) >= len(stated) and all(
        {**a, "content": a["content"].strip()} == {**b, "content": b["content"].strip()} for a, b in zip(own, stated)
    )
    if not begins:
        raise BadPair("mismatch", f"{side}: {_difference(own, stated)}; accepted: messages that begin with the prompt")
    return own


def _difference(messages: list[dict], prompt: list[dict]) -> str:
    """What a list of messages has where it first differs from the prompt it should have."""
    for i, (a, b) in enumerate(zip(messages, prompt)):
        if a["role"] != b["role"]:
            return f"found message {i + 1} of role {a['role']}, not {b['role']}"
        if a != b:
            start = next((k for k, (x, y) in enumerate(zip(a["content"], b["content"])) if x != y), None)
            start = min(len(a["content"]), len(b["content"])) if start is None else start
            at = max(0, start - 10)
            return f"found {a['content'][at : at + 40]!r} in message {i + 1}, not {b['content'][at : at + 40]!r}"
    return f"found {len(messages)} messages before the answer, not {len(prompt)}"


def _answer(message: dict[str, Any], side: str) -> dict[str, Any]:
    """The message of an answer without white space around it; BadPair where it holds no text, or a thought it must not."""
    text = message["content"].strip()
    if not text and not message.get("tool_calls"):
        raise BadPair("empty", f"{side}: found {shown(message['content'])}; accepted: an answer")
    if side in PATHS["empty"]:
        if message.get("tool_calls"):
            raise Refusal(f"{side}: found a tool call; accepted: text on the empty path")
        part = split_thought(text)
        if part.thought is not None or not part.closed or CLOSE in part.final or OPENED.search(part.final):
            raise BadPair("thought", f"{side}: found a thought ({shown(text)}); accepted: an answer without one")
        if not part.final:
            raise BadPair("empty", f"{side}: found nothing after {CLOSE}; accepted: an answer")
        text = part.final
    return {**message, "content": text}


def _scores(row: dict[str, Any], sides) -> dict[str, float]:
    """What the row says each side is worth: `scores` (an object by side; others are none of ours), or score_chosen and
    score_rejected."""
    scores = row.get("scores")
    scores = scores if isinstance(scores, dict) else {}
    named = {side: (f"scores.{side}", scores.get(side)) for side in sides}
    for side in sides:
        if named[side][1] is None and f"score_{side}" in row:
            named[side] = (f"score_{side}", row[f"score_{side}"])
    for field, value in named.values():
        number = isinstance(value, (int, float)) and not isinstance(value, bool) and math.isfinite(value)
        if value is not None and not number:
            raise Refusal(f"{field}: found {shown(value)}; accepted: a number")
    return {side: float(value) for side, (_, value) in named.items() if value is not None}

"""Row shapes: what people store a trace in, turned into messages whose thought stands in <think> tags.

Every assistant text becomes "<think>\\n{thought}\\n</think>\\n\\n{answer}" (or the plain answer where there is no thought),
whatever field, channel or tag the thought came in.
"""

from __future__ import annotations

import json
import re
from typing import Any, NamedTuple

from longtrace.trainer.config import Refusal

OPEN, CLOSE = "<think>", "</think>"
REASONING_FIELDS = ("reasoning_content", "reasoning", "thinking")
ROLES = {
    **dict.fromkeys(("system", "developer"), "system"),
    **dict.fromkeys(("user", "human"), "user"),
    **dict.fromkeys(("assistant", "gpt", "chatgpt", "bot", "model", "function_call"), "assistant"),
    **dict.fromkeys(("tool", "function", "observation", "ipython", "function_response"), "tool"),
}
SHAPES = (
    "messages (role/content), conversations (from/value), prompt/completion, problem/trace/answer, "
    "problem/reasoning_content/answer, or text in Harmony channels; --columns old=new renames fields"
)
KEPT_KEYS = ("tool_calls", "tool_call_id", "name")

# gpt-oss: <|start|>role<|channel|>name<|message|>text<|end|>
HARMONY = re.compile(
    r"(?:<\|start\|>(?P<role>[^<]*))?(?:<\|channel\|>(?P<channel>[^<]*))?(?:<\|constrain\|>[^<]*)?"
    r"<\|message\|>(?P<text>.*?)(?=<\|end\|>|<\|return\|>|<\|call\|>|<\|start\|>|<\|channel\|>|\Z)",
    re.DOTALL,
)
# OpenThoughts, Bespoke-Stratos and Sky-T1 mark the thought in words
LONG_TAGS = (
    ("<|begin_of_thought|>", OPEN),
    ("<|end_of_thought|>", CLOSE),
    ("<|begin_of_solution|>", ""),
    ("<|end_of_solution|>", ""),
)
OPENED = re.compile(rf"^\s*{OPEN}", re.MULTILINE)


class Thought(NamedTuple):
    """An assistant text taken apart. `thought` is None where none was opened; `closed` is False where one never ends."""

    thought: str | None
    final: str
    closed: bool


def split_thought(content: str) -> Thought:
    """Takes an assistant text apart at the first </think>, where reasoning parsers of inference servers do."""
    head, close, final = content.partition(CLOSE)
    if not close:
        return Thought(content, "", False) if OPENED.search(content) else Thought(None, content.strip(), True)
    bare = head.lstrip()
    thought = (bare.removeprefix(OPEN) if bare.startswith(OPEN) else head).strip("\n")
    return Thought(thought if thought.strip() else None, final.strip(), True)


def join_thought(thought: str, final: str) -> str:
    """The form every thought is trained in; a generation prompt that ends in "<think>\\n" is a prefix of it."""
    return f"{OPEN}\n{thought.strip(chr(10))}\n{CLOSE}\n\n{final.strip()}"


def to_messages(raw: dict[str, Any]) -> list[dict[str, Any]]:
    """The messages of a row of any accepted shape; Refusal (field, found, accepted) for everything else."""
    row = {key: value for key, value in raw.items() if value is not None}
    if "messages" in row:
        messages = _message_list(row["messages"], "messages")
    elif "conversations" in row:
        messages = _message_list(row["conversations"], "conversations")
    elif isinstance(row.get("text"), str) and "<|channel|>" in row["text"] and "<|start|>" in row["text"]:
        messages = _harmony_conversation(row["text"])
    elif "prompt" in row or "problem" in row:
        messages = _prompt_and_answer(row)
    else:
        raise Refusal(f"fields: found {', '.join(map(str, raw)) or 'none'}; accepted: {SHAPES}")
    return _merge(with_system(messages, row))


def with_system(messages: list[dict[str, Any]], row: dict[str, Any]) -> list[dict[str, Any]]:
    """Messages after the row's `system` text, unless that is empty or they begin with a system message of their own."""
    system = checked_text(row.get("system") or "", "system")
    if not system.strip() or messages[0]["role"] == "system":
        return messages
    return [{"role": "system", "content": system}, *messages]


def message_list(value: Any, field: str) -> list[dict[str, Any]]:
    """A list of messages (role/content or from/value) in the form that `to_messages` gives; Refusal names the `field`."""
    return _merge(_message_list(value, field))


def to_tools(raw: dict[str, Any]) -> list[dict] | None:
    """The tool descriptions of a row (`tools`: a list of objects, or that list as JSON text), or None."""
    tools = raw.get("tools")
    if isinstance(tools, str) and tools.strip():
        try:
            tools = json.loads(tools)
        except ValueError:
            raise Refusal(f"tools: found {shown(tools)}; accepted: a list of objects, or such a list as JSON") from None
    if not tools:
        return None
    if not isinstance(tools, list) or not all(isinstance(tool, dict) for tool in tools):
        raise Refusal(f"tools: found {shown(tools)}; accepted: a list of objects, or such a list as JSON")
    return tools


def to_answer(raw: dict[str, Any]) -> str | None:
    """The row's reference answer (`answer`: text or a number), or None."""
    answer = raw.get("answer")
    if answer is None or answer != answer:  # tables write a missing text as NaN
        return None
    if isinstance(answer, bool) or not isinstance(answer, (str, int, float)):
        raise Refusal(f"answer: found {shown(answer)}; accepted: text or a number")
    return checked_text(str(answer), "answer")


def _prompt_and_answer(row: dict[str, Any]) -> list[dict[str, Any]]:
    """prompt/completion and problem/trace rows; the completion may be missing (prompts for evaluation and rollouts)."""
    name, target = ("prompt", "completion") if "prompt" in row else ("problem", "trace")
    prompt = row[name]
    messages = (
        _message_list(prompt, name)
        if isinstance(prompt, list)
        else [{"role": "user", "content": checked_text(prompt, name, "text or a list of messages")}]
    )
    target = next((field for field in (target, "trace", "completion") if field in row), None)
    reasoning = next((field for field in REASONING_FIELDS if field in row), None)
    if target == "completion" and isinstance(row[target], list):
        return messages + _message_list(row[target], target)
    if target is None and reasoning is not None:
        target = next((field for field in ("content", "answer") if field in row), None)
    if target is None and reasoning is None:
        return messages
    accepted = "text" if target == "trace" else "text or a list of messages"
    content = "" if target is None else checked_text(row[target], target, accepted)
    if reasoning is not None and CLOSE not in content:
        content = join_thought(checked_text(row[reasoning], reasoning), content)
    return [*messages, {"role": "assistant", "content": assistant_text(content)}]


def _message_list(value: Any, field: str) -> list[dict[str, Any]]:
    if not isinstance(value, list) or not value:
        raise Refusal(f"{field}: found {shown(value)}; accepted: a list of messages, at least one")
    return [_message(message, f"{field}[{i}]") for i, message in enumerate(value)]


def _message(message: Any, field: str) -> dict[str, Any]:
    if not isinstance(message, dict):
        raise Refusal(f"{field}: found {shown(message)}; accepted: an object with role and content, or from and value")
    message = {key: value for key, value in message.items() if value is not None}
    role_key = "role" if "role" in message else "from"
    text_key = "content" if "content" in message or "value" not in message else "value"
    role = message.get(role_key)
    if not isinstance(role, str) or role not in ROLES:
        found = shown(role) if role_key in message else f"fields {', '.join(message)}"
        raise Refusal(f"{field}.{role_key}: found {found}; accepted: {', '.join(ROLES)}")
    reasoning = next((key for key in REASONING_FIELDS if key in message), None)
    if text_key in message:
        content = checked_text(message[text_key], f"{field}.{text_key}", "text or a list of text parts")
    elif reasoning or "tool_calls" in message:
        content = ""
    else:
        raise Refusal(f"{field}.{text_key}: found fields {', '.join(message)}; accepted: text or a list of text parts")
    if role == "function_call":
        content = f"<tool_call>\n{content}\n</tool_call>"
    out = {"role": ROLES[role], "content": content}
    if out["role"] == "assistant":
        if reasoning and CLOSE not in content:
            thought = checked_text(message[reasoning], f"{field}.{reasoning}")
            content = join_thought(thought, content) if thought.strip() else content
        out["content"] = assistant_text(content)
    if "channel" in message:
        out["channel"] = checked_text(message["channel"], f"{field}.channel")
    out |= {key: message[key] for key in KEPT_KEYS if message.get(key)}
    if "tool_calls" in out:
        out["tool_calls"] = _tool_calls(out["tool_calls"], f"{field}.tool_calls")
    return out


def _tool_calls(calls: Any, field: str) -> list[dict]:
    """Tool calls with their arguments as objects: templates write them with `tojson`, which would quote JSON text twice."""
    if not isinstance(calls, list) or not all(isinstance(call, dict) for call in calls):
        raise Refusal(f"{field}: found {shown(calls)}; accepted: a list of objects")
    out = []
    for call in calls:
        function = dict(call.get("function") or call)
        if isinstance(function.get("arguments"), str):
            try:
                function["arguments"] = json.loads(function["arguments"])
            except ValueError:
                raise Refusal(
                    f"{field}.arguments: found {shown(function['arguments'])}; accepted: an object, or one as JSON"
                ) from None
        out.append(
            {**call, "type": call.get("type", "function"), "function": function} if "function" in call else function
        )
    return out


def assistant_text(content: str) -> str:
    """An assistant text in the one form thoughts are trained in."""
    if "<|channel|>" in content and "<|message|>" in content:
        content = _harmony_text(list(HARMONY.finditer(content)))
    for tag, ours in LONG_TAGS:
        content = content.replace(tag, ours)
    if CLOSE not in content:
        return content
    head, _, final = content.partition(CLOSE)
    bare = head.lstrip()
    if bare.startswith(OPEN):
        return join_thought(bare.removeprefix(OPEN), final)
    # generation prompts that end in <think> leave stored completions without the opening tag
    return content if OPEN in head else join_thought(head, final)


def _harmony_text(segments: list[re.Match]) -> str:
    """One assistant turn from its Harmony channels: analysis is the thought, the other channels are what users see."""
    thought, final = [], []
    for segment in segments:
        channel = (segment["channel"] or "final").strip()
        if "to=" in channel or "to=" in (segment["role"] or ""):
            raise Refusal(f"channel: found a tool call ({shown(channel)}); accepted: analysis, commentary, final")
        (thought if channel == "analysis" else final).append(segment["text"].strip())
    if not thought:
        return "\n\n".join(final)
    if not final:
        return f"{OPEN}\n" + "\n\n".join(thought)  # cut off in thought: the audit must see it open
    return join_thought("\n\n".join(thought), "\n\n".join(final))


def _harmony_conversation(text: str) -> list[dict[str, Any]]:
    """A whole conversation in Harmony text, from <|start|>system to <|return|>."""
    messages: list[dict[str, Any]] = []
    turn: list[re.Match] = []
    for segment in HARMONY.finditer(text):
        role = (segment["role"] or "assistant").split()[0] if (segment["role"] or "").strip() else "assistant"
        if role == "assistant":
            turn.append(segment)
            continue
        if turn:
            messages.append({"role": "assistant", "content": _harmony_text(turn)})
            turn = []
        messages.append({"role": ROLES.get(role, "tool"), "content": segment["text"]})
    if turn:
        messages.append({"role": "assistant", "content": _harmony_text(turn)})
    if not messages:
        raise Refusal("text: found no <|message|>; accepted: Harmony text")
    return messages


def _merge(messages: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """Joins the channels of one assistant turn, and the system and developer texts that open a conversation."""
    out: list[dict[str, Any]] = []
    for message in messages:
        channel = message.pop("channel", None)
        last = out[-1] if out else None
        if last and last["role"] == message["role"] == "system":
            last["content"] += "\n\n" + message["content"]
            continue
        if channel == "analysis":
            message["content"] = f"{OPEN}\n{message['content']}"
        elif channel and last and last["role"] == "assistant" and split_thought(last["content"]).closed is False:
            last["content"] = join_thought(last["content"].removeprefix(f"{OPEN}\n"), message["content"])
            continue
        out.append(message)
    return out


def checked_text(value: Any, field: str, accepted: str = "text") -> str:
    """A text, or text parts as one; Refusal (field, found, accepted) for anything else."""
    if isinstance(value, list) and value and all(isinstance(p, dict) and p.get("type") == "text" for p in value):
        value = "".join(checked_text(part.get("text"), f"{field}.text") for part in value)
    if not isinstance(value, str):
        raise Refusal(f"{field}: found {shown(value)}; accepted: {accepted}")
    if not value.isascii():
        try:
            value.encode()
        except UnicodeEncodeError as error:
            raise Refusal(
                f"{field}: found half a surrogate pair ({value[error.start]!r} at {error.start:,}); accepted: Unicode text"
            ) from None
    return value


def shown(value: Any) -> str:
    """A value as an error line shows it: type and the start of its JSON."""
    if isinstance(value, str):
        return repr(value[:40] + "…" if len(value) > 40 else value)
    if value is None:
        return "nothing"
    text = repr(value)
    return f"{type(value).__name__} {text[:40] + '…' if len(text) > 40 else text}"

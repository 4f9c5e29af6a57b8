"""Rendering: a row through a chat template into token ids and a loss mask that says exactly what is learned.

A row is rendered once whole, and once up to each assistant turn: the text between the generation prompt and the end of the
turn is the target. Each of these pieces is tokenised on its own, so the ids of the generation prompt, which are what the
model is given at inference, are the first ids of the training row.
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import jinja2
import jinja2.ext
import numpy as np

from longtrace.trainer.config import Refusal

TEMPLATES = Path(__file__).parent / "templates"
MARKERS = {  # the template of ours that fits a vocabulary: all of its markers are single tokens there
    "deepseek": ("<｜User｜>", "<｜Assistant｜>", "<｜end▁of▁sentence｜>"),
    "chatml": ("<|im_start|>", "<|im_end|>"),
    "llama3": ("<|start_header_id|>", "<|end_header_id|>", "<|eot_id|>"),
    "gemma": ("<start_of_turn>", "<end_of_turn>"),
}


@dataclass(frozen=True)
class Template:
    """A chat template: its jinja text, what to call it in a line of output, and whether the tokenizer had none itself."""

    text: str
    name: str
    ours: bool = False


@dataclass
class Rendered:
    """A row as text: `turns` are the target spans (start, end) in characters; `broken` says why a turn is no prefix."""

    text: str
    turns: list[tuple[int, int]]
    broken: str = ""

    @property
    def targets(self) -> list[str]:
        return [self.text[start:end] for start, end in self.turns]

    def pieces(self) -> list[tuple[str, bool]]:
        """(text, is a target) in order; joined they are the whole text."""
        out, at = [], 0
        for start, end in self.turns:
            out += [(self.text[at:start], False), (self.text[start:end], True)]
            at = end
        out.append((self.text[at:], False))
        return [(text, target) for text, target in out if text]


@dataclass
class Encoded:
    """A row as tokens: ids (T,) uint32, loss_mask (T,) bool, the token each assistant turn ends in (None: it has none),
    whether the last generation prompt's ids are its first ids, and whether an end token also stands inside a turn."""

    ids: np.ndarray
    loss_mask: np.ndarray
    ends: list[int | None] = field(default_factory=list)
    prompt_is_prefix: bool = True
    ends_early: bool = False


def resolve_template(tokenizer, template: str) -> Template:
    """`template`: auto (the tokenizer's own, ours where it has none), model, longtrace, or a .jinja file. Refusal otherwise."""
    own = getattr(tokenizer, "chat_template", None)
    if template in ("auto", "model") and own:
        return Template(tokenizer.get_chat_template(), "the model's own")
    if template == "model":
        raise Refusal(
            "--template model: the tokenizer has no chat template; accepted: auto, longtrace or a .jinja file"
        )
    if template in ("auto", "longtrace"):
        name = next((n for n, m in MARKERS.items() if all(_is_token(tokenizer, t) for t in m)), "plain")
        return Template((TEMPLATES / f"{name}.jinja").read_text(encoding="utf-8"), f"longtrace ({name})", ours=True)
    path = Path(template)
    if path.suffix != ".jinja":
        raise Refusal(f"--template {template}: accepted: auto, model, longtrace or a .jinja file")
    try:
        text = path.read_text(encoding="utf-8")
        jinja2.Environment(extensions=[_Generation, "jinja2.ext.loopcontrols"]).parse(text)
    except (OSError, UnicodeDecodeError) as error:
        raise Refusal(f"--template {template}: cannot be read ({error}); accepted: a jinja file in UTF-8") from None
    except jinja2.TemplateSyntaxError as error:
        raise Refusal(f"{template}:{error.lineno}: {error.message}; accepted: a jinja chat template") from None
    return Template(text, path.name)


def chat_template(tokenizer, template: str) -> str:
    """The jinja text that `template` stands for with this tokenizer: training and generation use it, the model saves it."""
    return resolve_template(tokenizer, template).text


def render(tokenizer, template: str, messages: list[dict[str, Any]], tools: list[dict] | None = None) -> Rendered:
    """Renders a row and finds its assistant turns. `template` is jinja text; Refusal where it rejects the row."""

    def text_of(part: list[dict[str, Any]], prompt: bool = False) -> str:
        return apply_template(tokenizer, template, part, tools, prompt=prompt)

    text = text_of(messages)
    turns: list[tuple[int, int]] = []
    broken = ""
    for i, message in enumerate(messages):
        if message["role"] != "assistant":
            continue
        prompt = text_of(messages[:i], prompt=True) if i else ""
        upto = text if i == len(messages) - 1 else text_of(messages[: i + 1])
        if not text.startswith(upto):
            upto = upto.removesuffix(tokenizer.eos_token or "")  # Phi-3 closes the whole conversation with one more
        if not text.startswith(upto):
            broken = broken or f"messages[{i}] renders differently when more turns follow"
            continue
        start, difference = turn_start(prompt, upto)
        broken = broken or (f"messages[{i}]: {difference}" if difference else "")
        if turns:
            start = max(start, turns[-1][1])
        turns.append((min(start, len(upto)), len(upto)))
    return Rendered(text, turns, broken)


def apply_template(
    tokenizer, template: str, messages: list[dict[str, Any]], tools: list[dict] | None = None, *, prompt: bool = False
) -> str:
    """Messages as text, with `prompt` going on with the generation prompt; Refusal where the template rejects them."""
    try:
        return tokenizer.apply_chat_template(
            messages, tools=tools, chat_template=template, tokenize=False, add_generation_prompt=prompt
        )
    except (jinja2.TemplateError, TypeError, KeyError, ValueError, AttributeError, IndexError) as error:
        reason = str(error).strip("'\"").partition("\n")[0] or type(error).__name__
        raise Refusal(f"the chat template cannot render this row: {reason}") from None


def turn_start(prompt: str, text: str) -> tuple[int, str]:
    """Where the turn that the generation prompt opens starts in the training text, and how the two differ before ('' = not)."""
    if text.startswith(prompt):
        return len(prompt), ""
    start = _common(prompt, text)
    return start, (
        f"the generation prompt goes on with {prompt[start : start + 24]!r} "
        f"where the training text has {text[start : start + 24]!r}"
    )


class Encoder:
    """Tokenises rendered rows with a tokenizer, many at once."""

    def __init__(self, tokenizer):
        self.tokenizer = tokenizer
        self.end_ids = {i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
        if tokenizer.eos_token_id is not None:
            self.end_ids.add(tokenizer.eos_token_id)
        # SentencePiece vocabularies put a space before any text that stands alone: behind a line break they do not
        newline, joined, letter = self._batch(["\n", "\na", "a"])
        self.anchor = newline if joined != newline + letter and joined[: len(newline)] == newline else None

    def encode(self, rows: list[Rendered]) -> list[Encoded]:
        """Token ids and loss masks of the rows."""
        pieces = [row.pieces() for row in rows]
        # several turns: the last generation prompt is tokenised whole as well, to be compared
        whole = [row.text[: row.turns[-1][0]] if len(row.turns) > 1 else "" for row in rows]
        texts = [
            text if k == 0 or self.anchor is None else "\n" + text for row in pieces for k, (text, _) in enumerate(row)
        ]
        flat = iter(self._batch(texts))
        wholes = iter(self._batch([text for text in whole if text]))
        return [self._join(row, flat, next(wholes) if text else None) for row, text in zip(pieces, whole)]

    def _join(self, pieces: list[tuple[str, bool]], flat, whole: list[int] | None) -> Encoded:
        ids, mask, ends = [], [], []
        length = last_prompt = 0
        ends_early = False
        for k, (text, target) in enumerate(pieces):
            piece = next(flat)
            if k and self.anchor is not None:
                keeps = piece[: len(self.anchor)] == self.anchor
                piece = piece[len(self.anchor) :] if keeps else self._batch([text])[0]
            piece_mask = np.full(len(piece), target)
            if target:
                last_prompt = length
                end = self._end(piece)
                ends.append(None if end is None else piece[end])
                if end is not None:
                    ends_early |= piece[end] in piece[:end]
                    piece_mask[end + 1 :] = False  # the line break after <|im_end|> is never generated
            ids.append(np.asarray(piece, np.uint32))
            mask.append(piece_mask)
            length += len(piece)
        ids, mask = np.concatenate(ids), np.concatenate(mask)
        mask[:1] = False  # nothing stands before the first token that could predict it
        is_prefix = whole is None or np.array_equal(ids[:last_prompt], np.asarray(whole, np.uint32))
        return Encoded(ids, mask, ends, is_prefix, ends_early)

    def _end(self, piece: list[int]) -> int | None:
        """Position of the special token that ends a turn: the last one that is not white space."""
        for position in range(len(piece) - 1, max(-1, len(piece) - 5), -1):
            if piece[position] in self.end_ids:
                return position
            if self.tokenizer.decode([piece[position]]).strip():
                return None
        return None

    def _batch(self, texts: list[str]) -> list[list[int]]:
        if not texts:
            return []
        return self.tokenizer(texts, add_special_tokens=False, return_attention_mask=False, verbose=False)["input_ids"]


class _Generation(jinja2.ext.Extension):
    """Accepts {% generation %} blocks when a template file is checked; transformers brings its own when it renders."""

    tags = frozenset({"generation"})

    def parse(self, parser):
        next(parser.stream)
        return parser.parse_statements(("name:endgeneration",), drop_needle=True)


def _is_token(tokenizer, text: str) -> bool:
    found = tokenizer.convert_tokens_to_ids(text)
    return found is not None and found != tokenizer.unk_token_id


def _common(a: str, b: str) -> int:
    """How many characters two texts share at their start."""
    return next((i for i, (x, y) in enumerate(zip(a, b)) if x != y), min(len(a), len(b)))

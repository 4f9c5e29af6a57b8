"""Preferences: rows of pairs, rendered, tokenised, checked and kept flat in memory (4 bytes a token).

Both documents of a pair begin with the same ids, those of the generation prompt as the model is given it at inference; what
follows, the answer and the token that ends it, is the target.
"""

from __future__ import annotations

import hashlib
from array import array
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from longtrace.trainer.audit import SKIP, check_row
from longtrace.trainer.config import Refusal
from longtrace.trainer.pair_audit import PairAudit, PairFigures
from longtrace.trainer.pair_shapes import PATHS, BadPair, Pair, to_pair
from longtrace.trainer.prompts import empty_thought
from longtrace.trainer.render import Encoded, Encoder, Rendered, apply_template, resolve_template, turn_start
from longtrace.trainer.rows import Row, raw_rows
from longtrace.trainer.traces import batches, progress_bar

__all__ = ["BadPair", "PairAudit", "PairSet", "load_pairs"]

STAND_IN = "an answer"  # renders what a template writes behind one


@dataclass
class PairSet:
    """Tokenised pairs, one document after the other.

    tokens (sum of lengths,) uint32; offsets (documents + 1,) int64; prompts (documents,) int64, how many of a document's
    first tokens are context and not targets (1 or more); paths: ("trace",), ("empty",) or ("trace", "empty"): prompt i owns
    documents [2 i len(paths), 2 (i + 1) len(paths)), for each path chosen then rejected; source (n,) int64, the number of
    the row in reading order; audit: what happened on the way. len() is n, the number of prompts.
    """

    tokens: np.ndarray
    offsets: np.ndarray
    prompts: np.ndarray
    paths: tuple[str, ...]
    source: np.ndarray
    audit: PairAudit

    def __len__(self) -> int:
        return len(self.source)

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, (documents,) int64."""
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of the paths and all arrays: equal sets train alike."""
        digest = hashlib.sha256(",".join(self.paths).encode())
        for values, kind in ((self.tokens, "<u4"), *((v, "<i8") for v in (self.offsets, self.prompts, self.source))):
            digest.update(np.int64(len(values)).astype("<i8").tobytes())
            digest.update(np.ascontiguousarray(values).astype(kind, copy=False).data)
        return digest.hexdigest()


def load_pairs(
    specs: Sequence[str],
    tokenizer,
    *,
    paths: Sequence[str],
    template: str = "auto",
    max_tokens: int,
    on_too_long: str = "refuse",
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
    progress: bool = True,
) -> PairSet:
    """Reads, renders, tokenises and audits the preference pairs of `specs`, in order.

    paths: trace (chosen, rejected), empty (empty_chosen, empty_rejected: answers that follow an empty thought) or both, in
    this order. template: auto, model, longtrace or a .jinja file (see render.resolve_template). on_too_long: refuse | skip,
    for rows with a document of more than max_tokens tokens. skip_bad_rows: rows that cannot be trained on are left out and
    counted. Raises Refusal, one line that names the row, the field, what was found and what is accepted.
    """
    chosen = resolve_template(tokenizer, template)
    paths = tuple(paths)
    if paths not in (("trace",), ("empty",), ("trace", "empty")):
        raise Refusal(f"paths: found {', '.join(paths) or 'none'}; accepted: trace; empty; trace, empty")
    if max_tokens < 2:
        raise Refusal(f"--max-tokens {max_tokens}: accepted: 2 or more")
    if on_too_long not in ("refuse", "skip"):
        raise Refusal(f"--on-too-long {on_too_long}: accepted: refuse, skip")
    if not specs:
        raise Refusal("--data: no source given; accepted: one or more")
    audit = PairAudit(list(specs), chosen.name, max_tokens, on_too_long, list(paths))
    if chosen.ours and template == "auto":
        audit.notes.append(f"The tokenizer has no chat template: {chosen.name} is used.")
    sides = [side for path in paths for side in PATHS[path]]
    encoder = Encoder(tokenizer)
    documents, figures = _Documents(), PairFigures(paths)

    def leave_out(where: str, refusal: Refusal) -> None:
        """Counts a row that cannot be trained on, or stops at it."""
        if not skip_bad_rows:
            hint = "" if SKIP in str(refusal) else f"; {SKIP}"
            raise Refusal(f"{where}: {refusal}{hint}") from None
        audit.leave_out(getattr(refusal, "kind", "unreadable"), f"{where}: {refusal}")

    def rendered() -> Iterator[_Drawn]:
        """Rows that can be read and rendered."""
        for spec in specs:
            for where, raw in raw_rows(spec, columns=columns):
                audit.rows_read += 1
                try:
                    if isinstance(raw, Refusal):
                        raise raw
                    pair = to_pair(raw, paths)
                    texts = _render(tokenizer, chosen.text, pair, paths)
                except Refusal as refusal:
                    leave_out(where, refusal)
                else:
                    yield _Drawn(audit.rows_read - 1, where, raw, pair, texts)

    def take(row: _Drawn, encoded: Sequence[Encoded]) -> None:
        """Checks a row and keeps its documents, or none of them."""
        ids = [_document(document) for document in encoded]
        length, longest = max((len(tokens), side) for (tokens, _), side in zip(ids, sides))
        if length > max_tokens:
            audit.too_long(f"{row.where}: {longest}: {length:,} tokens", length)
            return
        try:
            for side, text, document in zip(sides, row.texts, encoded):
                _check(side, row, text, document, chosen.name)
            _check_apart(sides, ids)
        except Refusal as refusal:
            leave_out(row.where, refusal)
            return
        documents.append(ids, row.number)
        figures.add(row.where, row.number, ids, row.pair)

    with progress_bar("Reading pairs", specs, progress) as step:
        for batch in batches(rendered(), lambda row: sum(len(text.text) for text in row.texts)):
            encoded = iter(encoder.encode([text for row in batch for text in row.texts]))
            for row in batch:
                take(row, [next(encoded) for _ in row.texts])
            step(audit.rows_read, len(documents.tokens))

    pairs = documents.finish(paths, audit)
    figures.finish(audit, pairs.lengths, pairs.prompts)
    refusal = audit.refusal()
    if refusal:
        raise Refusal(refusal)
    return pairs


@dataclass
class _Drawn:
    """A row, and its documents as text in the order of PairSet."""

    number: int
    where: str
    raw: dict
    pair: Pair
    texts: list[Rendered]


def _render(tokenizer, template: str, pair: Pair, paths: Sequence[str]) -> list[Rendered]:
    """The chosen and the rejected document of each path, with the answer and what ends it as their only turn."""
    prompt = apply_template(tokenizer, template, pair.prompt, pair.tools, prompt=True)
    if len(paths) > 1 and empty_thought(prompt) == prompt:
        raise BadPair(
            "one-path",
            "the template closes the thought itself, so both paths begin alike; accepted: --alpha 0 or 1 for one path, or a "
            "--template that leaves the thought open",
        )
    render = {"trace": _traces, "empty": _at_once}
    return [document for path in paths for document in render[path](tokenizer, template, pair, prompt)]


def _traces(tokenizer, template: str, pair: Pair, prompt: str) -> list[Rendered]:
    documents = []
    for side in PATHS["trace"]:
        text = apply_template(tokenizer, template, [*pair.prompt, pair.answers[side]], pair.tools)
        start, broken = turn_start(prompt, text)
        documents.append(Rendered(text, [(start, len(text))], broken))
    return documents


def _at_once(tokenizer, template: str, pair: Pair, prompt: str) -> list[Rendered]:
    context = empty_thought(prompt)
    text = apply_template(tokenizer, template, [*pair.prompt, {"role": "assistant", "content": STAND_IN}], pair.tools)
    behind, _ = turn_start(prompt, text)  # the prompt itself may speak of an answer
    _, found, end = text[behind:].rpartition(STAND_IN)
    if not found:
        raise BadPair("no-answer", "the template drops an assistant's text; --template longtrace keeps it")
    texts = [context + pair.answers[side]["content"] + end for side in PATHS["empty"]]
    return [Rendered(text, [(len(context), len(text))]) for text in texts]


def _check_apart(sides: Sequence[str], documents: Sequence[tuple[np.ndarray, int]]) -> None:
    """BadPair where the template makes one of the two answers of a path."""
    for i in range(0, len(sides), 2):
        if np.array_equal(documents[i][0], documents[i + 1][0]):
            raise BadPair("equal", f"{sides[i + 1]}: found the tokens of {sides[i]}; accepted: two different answers")


def _check(side: str, row: _Drawn, text: Rendered, encoded: Encoded, template: str) -> None:
    """BadPair where the document would teach something else than the row's answer and its end."""
    findings, _ = check_row(Row([row.pair.answers[side]], None, row.where, row.raw), text, encoded, template)
    if findings:
        raise BadPair(findings[0].kind, f"{side}: {findings[0].kind}: {findings[0].reason}; {findings[0].remedy}")


def _document(encoded: Encoded) -> tuple[np.ndarray, int]:
    """(ids up to the one that ends the answer, how many of them are context)."""
    targets = np.flatnonzero(encoded.loss_mask)
    return (encoded.ids[: targets[-1] + 1], int(targets[0])) if len(targets) else (encoded.ids, len(encoded.ids))


class _Documents:
    """Grows the flat arrays in place."""

    def __init__(self):
        self.tokens, self.offsets, self.prompts, self.source = array("I"), array("q", [0]), array("q"), array("q")

    def append(self, documents: Sequence[tuple[np.ndarray, int]], number: int) -> None:
        for ids, prompt in documents:
            self.tokens.frombytes(ids.astype(np.uint32, copy=False).tobytes())
            self.offsets.append(len(self.tokens))
            self.prompts.append(prompt)
        self.source.append(number)

    def finish(self, paths: tuple[str, ...], audit: PairAudit) -> PairSet:
        """The arrays as a PairSet, without a copy."""
        return PairSet(
            tokens=np.frombuffer(self.tokens, np.uint32),
            offsets=np.frombuffer(self.offsets, np.int64),
            prompts=np.frombuffer(self.prompts, np.int64),
            paths=paths,
            source=np.frombuffer(self.source, np.int64),
            audit=audit,
        )

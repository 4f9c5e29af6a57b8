"""Traces: rows of any source, rendered, tokenised, audited and kept flat in memory (5 bytes a token)."""

from __future__ import annotations

import hashlib
import json
import os
from array import array
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import TypeVar

import numpy as np
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeElapsedColumn

from longtrace.trainer.audit import Audit, Finding, check_kinds, check_row, length_figures
from longtrace.trainer.config import Refusal
from longtrace.trainer.render import Encoded, Encoder, Rendered, chat_template, render, resolve_template
from longtrace.trainer.rows import Row, count_rows, read_rows

__all__ = ["Audit", "Row", "TraceSet", "audit_traces", "chat_template", "load_traces", "read_rows"]

BATCH_ROWS, BATCH_CHARACTERS = 256, 2_000_000
T = TypeVar("T")


@dataclass
class TraceSet:
    """Tokenised documents of a split, one after the other.

    tokens (sum of lengths,) uint32; loss_mask (sum of lengths,) bool, True where the token is a target (predicted from the
    one before it), never at the first token of a document; offsets (n + 1,) int64; source (n,) int64, the number of the row
    in reading order (pieces of a split row share it); audit: what happened on the way.
    """

    tokens: np.ndarray
    loss_mask: np.ndarray
    offsets: np.ndarray
    source: np.ndarray
    audit: Audit

    @property
    def lengths(self) -> np.ndarray:
        """Tokens of each document, (n,) int64."""
        return np.diff(self.offsets)

    @property
    def fingerprint(self) -> str:
        """SHA-256 (hex) of tokens, loss mask and offsets: equal sets train alike."""
        digest = hashlib.sha256()
        for values, kind in ((self.tokens, "<u4"), (self.loss_mask, "u1"), (self.offsets, "<i8")):
            digest.update(np.ascontiguousarray(values).astype(kind, copy=False).data)
        return digest.hexdigest()

    def save(self, path: str | Path) -> None:
        """Writes one safetensors file (beside, then renamed)."""
        from safetensors.numpy import save_file

        path = Path(path)
        beside = path.with_name(path.name + ".part")
        arrays = {
            name: np.ascontiguousarray(getattr(self, name)) for name in ("tokens", "loss_mask", "offsets", "source")
        }
        save_file(arrays, beside, metadata={"audit": json.dumps(self.audit.as_dict())})
        os.replace(beside, path)

    @staticmethod
    def load(path: str | Path) -> TraceSet:
        """Reads what `save` wrote; Refusal for anything else."""
        from safetensors import SafetensorError, safe_open

        try:
            with safe_open(path, "numpy") as file:
                arrays = {name: file.get_tensor(name) for name in ("tokens", "loss_mask", "offsets", "source")}
                return TraceSet(**arrays, audit=Audit.from_dict(json.loads(file.metadata()["audit"])))
        except (OSError, SafetensorError, KeyError, TypeError, ValueError) as error:
            raise Refusal(
                f"{path}: not a saved trace set ({error}); accepted: a file written by TraceSet.save"
            ) from None


def load_traces(
    specs: Sequence[str],
    tokenizer,
    *,
    template: str = "auto",
    max_tokens: int,
    on_too_long: str = "refuse",
    columns: Mapping[str, str] | None = None,
    allow: Sequence[str] = (),
    skip_bad_rows: bool = False,
    progress: bool = True,
) -> TraceSet:
    """Reads, renders, tokenises and audits the rows of `specs`, in order, for training.

    template: auto, model, longtrace or a .jinja file (see render.resolve_template). on_too_long: refuse | skip | split, for
    rows of more than max_tokens tokens. allow: findings (audit.KINDS) that do not stop the run. skip_bad_rows: rows that
    cannot be read, or that have a finding not in `allow`, are left out and counted. Raises Refusal, one line that names the
    row, the reason and the flag, when something would be lost in silence.
    """
    traces = audit_traces(
        specs,
        tokenizer,
        template=template,
        max_tokens=max_tokens,
        on_too_long=on_too_long,
        columns=columns,
        allow=allow,
        skip_unreadable=skip_bad_rows,
        skip_findings=skip_bad_rows,
        stop_early=True,
        progress=progress,
    )
    refusal = traces.audit.refusal()
    if refusal:
        raise Refusal(refusal)
    return traces


def audit_traces(
    specs: Sequence[str],
    tokenizer,
    *,
    template: str = "auto",
    max_tokens: int,
    on_too_long: str = "refuse",
    columns: Mapping[str, str] | None = None,
    allow: Sequence[str] = (),
    skip_unreadable: bool = True,
    skip_findings: bool = False,
    stop_early: bool = False,
    progress: bool = True,
    look: Callable[[Row, Rendered, Encoded], None] | None = None,
) -> TraceSet:
    """What load_traces does, without refusing over a finding: `audit.refusal()` of the result says whether training would.

    skip_unreadable and skip_findings leave out rows that cannot be read or that have a finding. stop_early refuses as soon
    as a template is seen to delete every thought, instead of after the last row. `look` is called with every rendered row.
    """
    chosen = resolve_template(tokenizer, template)
    if max_tokens < 2:
        raise Refusal(f"--max-tokens {max_tokens}: accepted: 2 or more")
    if on_too_long not in ("refuse", "skip", "split"):
        raise Refusal(f"--on-too-long {on_too_long}: accepted: refuse, skip, split")
    if not specs:
        raise Refusal("--data: no source given; accepted: one or more")
    audit = Audit(list(specs), chosen.name, max_tokens, on_too_long, check_kinds(allow))
    if chosen.ours and template == "auto":
        audit.notes.append(f"The tokenizer has no chat template: {chosen.name} is used.")
    documents = _Documents()
    encoder = Encoder(tokenizer)
    lengths: list[int] = []
    unreadable: list[str] = []

    def numbered() -> Iterator[tuple[int, Row, Rendered]]:
        """Rows that can be read and rendered, with their number in reading order."""
        number = 0
        for spec in specs:
            before, rows, unrendered = len(unreadable), 0, 0
            for row in read_rows(spec, columns=columns, skip_bad_rows=skip_unreadable, bad_rows=unreadable):
                rows += 1
                try:
                    if not any(message["role"] == "assistant" for message in row.messages):
                        raise Refusal(
                            f"found no assistant text in fields {', '.join(map(str, row.raw))}; accepted: rows with an answer to "
                            "learn (a trace, a completion, or an assistant message); --columns old=new renames fields"
                        )
                    rendered = render(tokenizer, chosen.text, row.messages, row.tools)
                except Refusal as refusal:
                    if not skip_unreadable:
                        raise Refusal(f"{row.where}: {refusal}") from None
                    unreadable.append(f"{row.where}: {refusal}")
                    unrendered += 1
                    continue
                yield number + rows + len(unreadable) - before - unrendered - 1, row, rendered
            number += rows + len(unreadable) - before - unrendered

    def take(
        number: int, row: Row, rendered: Rendered, encoded: Encoded, findings: list[Finding], passed: dict
    ) -> None:
        """Counts a row and keeps it, its pieces, or nothing of it."""
        length = len(encoded.ids)
        lengths.append(length)
        audit.tokens_read += length
        if length > max_tokens:
            audit.rows_too_long += 1
            audit.tokens_too_long += length
            audit.longest_too_long = max(audit.longest_too_long, length)
            audit.first_too_long = audit.first_too_long or f"{row.where}: {length:,} tokens"
            if on_too_long == "skip":
                return  # a row that is not trained has nothing to check
        refused = [finding for finding in findings if finding.kind not in audit.allow]
        for key, ok in passed.items():
            audit.checks[key].count(ok)
        if refused and skip_findings:
            audit.rows_left_out += 1
            audit.first_left_out = audit.first_left_out or refused[0].line()
            return
        audit.add(findings)
        if length > max_tokens and on_too_long == "refuse":
            return
        for end in encoded.ends:
            name = tokenizer.convert_ids_to_tokens(end) if end is not None else "nothing"
            audit.ends[name] = audit.ends.get(name, 0) + 1
        audit.rows_marked_wrong += row.marked_wrong
        audit.rows_whole += length <= max_tokens
        pieces = -(-length // max_tokens)
        for k in range(pieces):
            cut = slice(k * length // pieces, (k + 1) * length // pieces)
            documents.append(encoded.ids[cut], encoded.loss_mask[cut], number)

    with progress_bar("Reading traces", specs, progress) as step:
        for batch in batches(numbered(), lambda item: len(item[2].text)):
            encoded = encoder.encode([rendered for _, _, rendered in batch])
            checked = [check_row(row, r, e, chosen.name) for (_, row, r), e in zip(batch, encoded)]
            if stop_early and not lengths and "no-thought" not in audit.allow:
                _refuse_hungry_template([(row, *c) for (_, row, _), c in zip(batch, checked)])
            for (number, row, rendered), tokens, (findings, passed) in zip(batch, encoded, checked):
                take(number, row, rendered, tokens, findings, passed)
                if look is not None:
                    look(row, rendered, tokens)
            step(len(lengths) + len(unreadable), audit.tokens_read)

    audit.rows_unreadable = len(unreadable)
    audit.first_unreadable = unreadable[0] if unreadable else ""
    audit.rows_read = len(lengths) + len(unreadable)
    length_figures(audit, lengths)
    traces = documents.finish(audit)
    audit.documents = len(traces.source)
    audit.tokens_kept = len(traces.tokens)
    audit.tokens_supervised = int(traces.loss_mask.sum())
    return traces


class _Documents:
    """Grows the flat arrays in place, so that 5 bytes a token are held and not 10."""

    def __init__(self):
        self.tokens, self.mask, self.offsets, self.source = array("I"), bytearray(), array("q", [0]), array("q")

    def append(self, ids: np.ndarray, loss_mask: np.ndarray, number: int) -> None:
        self.tokens.frombytes(ids.astype(np.uint32, copy=False).tobytes())
        self.mask += b"\0" + loss_mask[1:].astype(np.uint8).tobytes()  # a first token is never a target
        self.offsets.append(len(self.tokens))
        self.source.append(number)

    def finish(self, audit: Audit) -> TraceSet:
        """The arrays as a TraceSet, without a copy."""
        return TraceSet(
            tokens=np.frombuffer(self.tokens, np.uint32),
            loss_mask=np.frombuffer(self.mask, np.bool_),
            offsets=np.frombuffer(self.offsets, np.int64),
            source=np.frombuffer(self.source, np.int64),
            audit=audit,
        )


def _refuse_hungry_template(rows: list[tuple[Row, list[Finding], dict]]) -> None:
    """A template that deletes every thought of the first rows will delete them all: say so now."""
    with_thought = [(findings, passed) for _, findings, passed in rows if passed["kept"] is not None]
    if with_thought and not any(passed["kept"] for _, passed in with_thought):
        finding = next(f for f in with_thought[0][0] if f.kind == "no-thought")
        raise Refusal(
            f"{finding.line()}, as it does in all of the first {len(with_thought):,} rows with one; {finding.remedy}; "
            "--allow no-thought trains on what is left"
        )


def batches(rows: Iterable[T], characters_of: Callable[[T], int]) -> Iterator[list[T]]:
    """Groups rows so that the tokenizer's threads have work and memory stays small."""
    batch, characters = [], 0
    for item in rows:
        batch.append(item)
        characters += characters_of(item)
        if len(batch) == BATCH_ROWS or characters > BATCH_CHARACTERS:
            yield batch
            batch, characters = [], 0
    if batch:
        yield batch


@contextmanager
def progress_bar(title: str, specs: Sequence[str], show: bool) -> Iterator[Callable[[int, int], None]]:
    """A progress bar over rows; yields the function that moves it."""
    counts = [count_rows(spec) for spec in specs] if show else []
    total = None if None in counts else sum(counts)
    columns = (
        TextColumn("{task.description}"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows · {task.fields[tokens]:,} tokens"),
        TimeElapsedColumn(),
    )
    with Progress(*columns, console=Console(stderr=True), transient=True, disable=not show) as bar:
        task = bar.add_task(title, total=total, tokens=0)
        yield lambda rows, tokens: bar.update(task, completed=rows, tokens=tokens)

"""`longtrace prepare`: the audit of traces on its own, before any model is loaded.

longtrace prepare --audit-only --data traces.jsonl --model DIR --max-tokens 16384 --picture mask.png
"""

from __future__ import annotations

from dataclasses import dataclass, field
from pathlib import Path
from typing import Literal

from rich.console import Console
from rich.markup import escape

from longtrace.trainer.audit import Audit
from longtrace.trainer.config import Refusal, parse_columns
from longtrace.trainer.render import Encoded, Rendered
from longtrace.trainer.rows import Row
from longtrace.trainer.traces import audit_traces


@dataclass(kw_only=True)
class PrepareConfig:
    """Audits traces for a model and a length: what would be lost, what would be learned. Trains nothing."""

    data: list[str]
    """Sources: file.jsonl, file.parquet, hub/name, generated:countdown,n=4,target=15000, reasoning_gym:chain_sum."""
    model: str = ""
    """Hugging Face folder or hub name whose tokenizer is used; empty = bytes, nothing downloaded."""
    audit_only: bool = False
    """Report and exit with 0; without it, exit with 2 where training on this data would refuse."""
    template: str = "auto"
    """auto = the model's own, ours where it has none; model = only the model's own; longtrace = ours; or a .jinja file."""
    max_tokens: int = 16_384
    """Longest document, in tokens."""
    on_too_long: Literal["refuse", "skip", "split"] = "refuse"
    """What would happen to a longer document."""
    columns: list[str] = field(default_factory=list)
    """Renames fields of the rows: old=new."""
    allow: list[Literal["no-thought", "no-answer", "no-eos", "not-a-prefix"]] = field(default_factory=list)
    """Audit findings that do not stop the run."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read or that the audit refuses."""
    picture: Path | None = None
    """Draws the loss mask of one row (.png, .svg, .pdf)."""


def prepare(config: PrepareConfig) -> Audit:
    """Prints the audit's table and draws the picture. Raises Refusal where the data cannot be read, and without
    `audit_only` also where training would refuse."""
    from longtrace.trainer.picture import draw_loss_mask

    console = Console()
    tokenizer = _tokenizer(config.model)
    example: list[tuple[Row, Encoded]] = []

    def look(row: Row, rendered: Rendered, encoded: Encoded) -> None:
        """Keeps the first row, and the first with a thought instead of it."""
        if not example or ("</think>" in rendered.text and "</think>" not in tokenizer.decode(example[0][1].ids)):
            example[:] = [(row, encoded)]

    audit = audit_traces(
        config.data,
        tokenizer,
        template=config.template,
        max_tokens=config.max_tokens,
        on_too_long=config.on_too_long,
        columns=parse_columns(config.columns),
        allow=config.allow,
        skip_unreadable=config.audit_only or config.skip_bad_rows,
        skip_findings=config.skip_bad_rows,
        look=look if config.picture else None,
    ).audit
    if not config.model:
        audit.notes.append("No --model: lengths are in bytes (about 3 to a token of a trained vocabulary).")
    console.print(audit.table())
    if config.picture and example:
        row, encoded = example[0]
        draw_loss_mask(encoded, tokenizer, row.where, config.picture)
        console.print(f"loss mask of {escape(row.where)}: {escape(str(config.picture))}")
    refusal = audit.refusal()
    if refusal and not config.audit_only:
        raise Refusal(refusal)
    console.print(f"Training would refuse: {escape(refusal)}" if refusal else "Training would accept this data.")
    return audit


def byte_tokenizer():
    """A tokenizer that needs no download: the 256 bytes, ChatML's turn marks and an end of text."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    alphabet = sorted(pre_tokenizers.ByteLevel.alphabet())
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(alphabet)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    marks = ["<|endoftext|>", "<|im_start|>", "<|im_end|>"]
    tokenizer.add_special_tokens([AddedToken(mark, special=True, normalized=False) for mark in marks])
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>", pad_token="<|endoftext|>")


def _tokenizer(model: str):
    if not model:
        return byte_tokenizer()
    from longtrace.trainer.model import load_tokenizer

    return load_tokenizer(model)

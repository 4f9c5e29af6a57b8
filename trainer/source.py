"""From tokenised documents to packed micro-batches: no padding, no truncation, and a cursor that resumes exactly."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import torch

from longtrace import kernels as K

from .config import Refusal
from .traces import TraceSet

IGNORE = -100


@dataclass
class PackedBatch:
    """One packed row of T tokens; documents never see each other."""

    input_ids: torch.Tensor  # (T,) int64
    position_ids: torch.Tensor  # (T,) int64, restarts at 0 in every document
    cu_seqlens: torch.Tensor  # (documents + 1,) int32
    max_seqlen: int
    labels: torch.Tensor  # (T,) int64: the next token where it is a target, else -100
    documents: list[int]  # row numbers in reading order, for messages

    def __post_init__(self):
        lengths = {len(self.input_ids), len(self.position_ids), len(self.labels), int(self.cu_seqlens[-1])}
        assert len(lengths) == 1, f"arrays of a packed batch differ in length: {lengths}"

    def to(self, device: torch.device) -> PackedBatch:
        moved = [t.to(device, non_blocking=True) for t in (self.input_ids, self.position_ids, self.cu_seqlens)]
        return PackedBatch(*moved, self.max_seqlen, self.labels.to(device, non_blocking=True), self.documents)

    @property
    def tokens(self) -> int:
        return len(self.input_ids)


def collate(traces: TraceSet, documents: list[int]) -> PackedBatch:
    """Puts documents (indices into `traces`) one after another into a packed row."""
    spans = [(int(traces.offsets[d]), int(traces.offsets[d + 1])) for d in documents]
    lengths = np.array([b - a for a, b in spans], dtype=np.int32)
    ids = np.concatenate([traces.tokens[a:b] for a, b in spans]).astype(np.int64)
    mask = np.concatenate([traces.loss_mask[a:b] for a, b in spans])
    # the first token of a document is never a target, so the shift cannot cross from one into the next
    labels = np.full(len(ids), IGNORE, dtype=np.int64)
    labels[:-1][mask[1:]] = ids[1:][mask[1:]]
    cu_seqlens = np.concatenate([[0], np.cumsum(lengths)]).astype(np.int32)
    positions = np.concatenate([np.arange(n) for n in lengths])
    return PackedBatch(
        torch.from_numpy(ids),
        torch.from_numpy(positions),
        torch.from_numpy(cu_seqlens),
        int(lengths.max()),
        torch.from_numpy(labels),
        [int(traces.source[d]) for d in documents],
    )


class TraceSource:
    """Endless steps of packed rows over a set of documents.

    Each epoch packs a fresh seeded permutation (best-fit decreasing) and shuffles the rows, so batches are not sorted
    by length. `next()` gives the micro-batches of one optimizer step.
    """

    def __init__(self, traces: TraceSet, documents: np.ndarray, tokens_per_row: int, rows_per_step: int, seed: int):
        if len(documents) == 0:
            raise Refusal("no documents to train on: every row was left out")
        longest = int(traces.lengths[documents].max())
        if longest > tokens_per_row:
            raise Refusal(f"a document of {longest:,} tokens does not fit --tokens-per-row {tokens_per_row:,}")
        self.traces, self.documents, self.seed = traces, documents, seed
        self.tokens_per_row, self.rows_per_step = tokens_per_row, rows_per_step
        self.epoch, self.cursor, self.rows_left = 0, 0, None
        self._pack()

    def _pack(self):
        order = np.random.default_rng((self.seed, self.epoch))
        documents = order.permutation(self.documents)
        rows = K.pack(self.traces.lengths[documents].tolist(), self.tokens_per_row)
        order.shuffle(rows)
        self.rows = [documents[row].tolist() for row in rows]

    @property
    def rows_per_epoch(self) -> int:
        return len(self.rows)

    @property
    def fill(self) -> float:
        """Share of the row slots of an epoch that hold a token."""
        return int(self.traces.lengths[self.documents].sum()) / (len(self.rows) * self.tokens_per_row)

    def steps_for(self, epochs: float) -> int:
        """Optimizer steps of so many epochs; the last one may hold fewer rows, so that no row is seen more often."""
        self.rows_left = max(1, round(self.rows_per_epoch * epochs))
        return -(-self.rows_left // self.rows_per_step)

    def next(self) -> list[PackedBatch]:
        count = self.rows_per_step if self.rows_left is None else min(self.rows_per_step, self.rows_left)
        batches = []
        for _ in range(count):
            if self.cursor == len(self.rows):
                self.epoch, self.cursor = self.epoch + 1, 0
                self._pack()
            batches.append(collate(self.traces, self.rows[self.cursor]))
            self.cursor += 1
        if self.rows_left is not None:
            self.rows_left -= count
        return batches

    def all_rows(self) -> list[PackedBatch]:
        """Every packed row of the current epoch, for evaluation."""
        return [collate(self.traces, row) for row in self.rows]

    @property
    def progress(self) -> float:
        """Epochs seen so far."""
        return self.epoch + self.cursor / len(self.rows)

    def state_dict(self) -> dict:
        return {
            "epoch": self.epoch,
            "cursor": self.cursor,
            "rows_left": self.rows_left,
            "data": self.traces.fingerprint,
        }

    def load_state_dict(self, state: dict):
        if state["data"] != self.traces.fingerprint:
            raise Refusal(
                "the data changed since the checkpoint was saved (tokens differ); resume with the same --data, --template, "
                "--max-tokens and tokenizer, or start a new run with another --out"
            )
        self.epoch, self.cursor, self.rows_left = state["epoch"], state["cursor"], state["rows_left"]
        self._pack()

"""How many rows of the vocabulary GEMM run at a time: a byte budget for the fp32 logits, never a function of T."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

# One GEMM call works on a fixed number of rows, so that a row's result cannot depend on how many rows travel with it:
# BLAS libraries choose their summation order by shape. 256 rows cost nothing against larger blocks (docs/kernels.md).
BLOCK_ROWS = 256
DEFAULT_BUDGET_MB = {"cpu": 256.0, "cuda": 1024.0}


@dataclass(frozen=True)
class Chunks:
    """`rows` logits rows live at a time (a multiple of `block`), each GEMM call takes `block` rows."""

    rows: int
    block: int

    def count(self, total: int) -> int:
        """Chunks needed for `total` rows."""
        return -(-total // self.rows)


def budget_bytes(budget_mb: float | None, device: str = "cpu") -> float:
    """The logits budget in bytes: the argument, else LONGTRACE_HEAD_BUDGET_MB, else the device's default."""
    if budget_mb is None:
        text = os.environ.get("LONGTRACE_HEAD_BUDGET_MB")
        try:
            budget_mb = float(text) if text else DEFAULT_BUDGET_MB.get(device, 256.0)
        except ValueError:
            raise ValueError(f"LONGTRACE_HEAD_BUDGET_MB: found {text!r}; accepted: a number of megabytes") from None
    if not budget_mb > 0:
        raise ValueError(f"budget_mb must be > 0, got {budget_mb}")
    return budget_mb * 2**20


def plan_chunks(
    T: int, H: int, V: int, dtype: torch.dtype, budget_mb: float | None = None, device: str = "cpu"
) -> Chunks:
    """Rows per chunk and per GEMM call for `T` rows of width `H` against a vocabulary of `V`.

    Args: dtype of the inputs (fp64 inputs have fp64 logits, all others fp32); budget_mb bounds the logits buffer
    (default: LONGTRACE_HEAD_BUDGET_MB, else 256 on CPU and 1024 on CUDA). At least 16 rows are always taken.
    The block size depends on V, dtype and budget but not on T; a short last block is padded with zero rows.
    """
    itemsize = 8 if dtype == torch.float64 else 4
    fit = int(budget_bytes(budget_mb, device) // (max(V, 1) * itemsize))
    if fit < BLOCK_ROWS:
        block = max(16, 1 << (max(fit, 1).bit_length() - 1))
        return Chunks(block, block)
    if device == "cuda":  # cuBLAS wants tall tiles: one call a chunk, still of fixed size
        rows = min(fit // BLOCK_ROWS * BLOCK_ROWS, 4096)
        return Chunks(rows, rows)
    rows = min(fit // BLOCK_ROWS, max(1, -(-T // BLOCK_ROWS))) * BLOCK_ROWS
    return Chunks(min(rows, 4096), BLOCK_ROWS)

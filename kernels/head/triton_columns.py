"""Triton kernels of the compressed head over kept probabilities p (R, V): column maxima, and a gather of columns.

What: the passes that decide which columns are kept, and copy them. Replaces: a scaled copy of p and a PyTorch reduction,
and index_select. Why faster: p is read once, in its own dtype, and only where it is needed.
No atomics, so results repeat bitwise; no size is a constexpr, so a new V or R never recompiles. Tested in the
interpreter, compiled ahead of time; not timed on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtrace.kernels.head.triton_rows import aligned, launch, per_row, unit_rows

BLOCKS: dict[str, dict[str, Any]] = {
    "column_max": {"ROWS": 32, "COLS": 128, "num_warps": 4, "enable_fp_fusion": False},
    "compact": {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": False},
}


@triton.jit(do_not_specialize=["R", "V", "stride"])
def column_max_kernel(
    p, scale, out, R, V, stride,
    HAS_SCALE: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """What: the largest p[r, v] scale[r] of each column. Replaces: a scaled copy and amax(0).
    Why faster: one read of p in its own dtype, nothing written but the result.
    """
    if ALIGNED:
        V, stride = V // 16 * 16, stride // 16 * 16
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    top = tl.full((ROWS, COLS), float("-inf"), tl.float32)
    for start in range(0, R, ROWS):
        rows = start + tl.arange(0, ROWS)
        keep = (rows < R)[:, None] & (cols < V)[None, :]
        x = tl.load(p + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=keep, other=float("-inf"))
        x = x.to(tl.float32)
        if HAS_SCALE:
            x = tl.where(keep, x * tl.load(scale + rows, mask=rows < R, other=1.0)[:, None], float("-inf"))
        top = tl.where(x > top, x, top)  # false for NaN: a NaN row decides nothing
    tl.store(out + cols, tl.max(top, 0), mask=cols < V)


@triton.jit(do_not_specialize=["F", "stride", "out_stride"])
def compact_kernel(p, columns, out, F, stride, out_stride, BLOCK: tl.constexpr):
    """What: the kept columns of one row, side by side. Replaces: index_select(1).
    Why: 64-bit offsets throughout; sorted columns make neighbouring lanes read neighbouring values.
    """
    blocks = tl.cdiv(F, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    at = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    column = tl.load(columns + at, mask=at < F, other=0)
    tl.store(out + row * out_stride + at, tl.load(p + row * stride + column, mask=at < F, other=0.0), mask=at < F)


def column_max(p: Tensor, scale: Tensor | None) -> Tensor:
    """(V,) fp32: max over the rows of p[r, v] scale[r]; NaN is passed over, no rows at all give 0.

    p (R, V) fp32, bf16 or fp16, any row stride; scale (R,) or None for 1.
    """
    p = unit_rows("p", p)
    (R, V), config = p.shape, BLOCKS["column_max"]
    scale = per_row("scale", scale, R)
    out = p.new_zeros(V, dtype=torch.float32)
    grid = (triton.cdiv(V, config["COLS"]) if R else 0,)
    launch(column_max_kernel, grid, p, scale, out, R, V, p.stride(0), scale is not None, aligned(V, p), **config)
    return out


def compact(p: Tensor, columns: Tensor) -> Tensor:
    """(R, F) in p's dtype: p[:, columns]; p (R, V), any row stride; columns (F,) int64 in [0, V), not checked."""
    p = unit_rows("p", p)
    columns = per_row("columns", columns, columns.numel(), torch.int64)
    R, F, config = p.shape[0], columns.numel(), BLOCKS["compact"]
    out = p.new_empty(R, F)
    grid = (R * triton.cdiv(F, config["BLOCK"]),)
    launch(compact_kernel, grid, p, columns, out, F, p.stride(0), out.stride(0), **config)
    return out

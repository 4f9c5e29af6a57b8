"""Triton kernels of the compressed head over kept probabilities p (R, V): column maxima, gather, tail sums, masses.

What: the passes that decide which columns are kept, copy them, and sum what is dropped. Replaces: masked and scaled
copies of p followed by a PyTorch reduction. Why faster: p is read once, in its own dtype, and only where it is needed.
No atomics and sums in a fixed order, so results repeat bitwise; no size is a constexpr, so a new V, R or k never
recompiles. Tested in the interpreter, compiled ahead of time; not timed on a GPU.
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
    "column_sum": {"ROWS": 32, "COLS": 128, "num_warps": 4, "enable_fp_fusion": False},
    "compact": {"BLOCK": 1024, "num_warps": 4, "enable_fp_fusion": False},
    "tail_sums": {"ROWS": 16, "COLS": 256, "num_warps": 4, "enable_fp_fusion": False},
    "row_mass": {"BLOCK": 2048, "num_warps": 4, "enable_fp_fusion": False},
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


@triton.jit(do_not_specialize=["R", "V", "stride"])
def column_sum_kernel(
    p, out, R, V, stride, ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr
):  # fmt: skip
    """What: the sum of each column, in fp32. Replaces: sum(0) with its split reduction.
    Why: one program owns a column and adds its rows in one order, whatever R is.
    """
    if ALIGNED:
        V, stride = V // 16 * 16, stride // 16 * 16
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    total = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, R, ROWS):
        rows = start + tl.arange(0, ROWS)
        keep = (rows < R)[:, None] & (cols < V)[None, :]
        x = tl.load(p + rows.to(tl.int64)[:, None] * stride + cols[None, :], mask=keep, other=0.0)
        total += x.to(tl.float32)
    tl.store(out + cols, tl.sum(total, 0), mask=cols < V)


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


@triton.jit(do_not_specialize=["V", "stride"])
def tail_sums_kernel(
    p, order, first, weight, dropped, out, V, stride,
    ALIGNED: tl.constexpr, ROWS: tl.constexpr, COLS: tl.constexpr,
):  # fmt: skip
    """What: weighted sums over the rows of one cluster, dropped columns only. Replaces: index_add of a masked copy.
    Why faster: p is read once, only where columns are dropped; a cluster's rows are added in ascending order.
    """
    if ALIGNED:
        V, stride = V // 16 * 16, stride // 16 * 16
    cols = tl.program_id(0) * COLS + tl.arange(0, COLS)
    j = tl.program_id(1)
    lost = tl.load(dropped + cols, mask=cols < V, other=0) != 0
    total = tl.zeros((ROWS, COLS), tl.float32)
    end = tl.load(first + j + 1)
    for start in range(tl.load(first + j), end, ROWS):
        at = start + tl.arange(0, ROWS)
        rows = tl.load(order + at, mask=at < end, other=0)
        w = tl.load(weight + rows, mask=at < end, other=0.0)
        keep = (at < end)[:, None] & lost[None, :]
        x = tl.load(p + rows[:, None] * stride + cols[None, :], mask=keep, other=0.0).to(tl.float32)
        total += tl.where(keep, x * w[:, None], 0.0)
    tl.store(out + j.to(tl.int64) * V + cols, tl.sum(total, 0), mask=cols < V)


@triton.jit(do_not_specialize=["V", "stride"])
def row_mass_kernel(p, dropped, out, V, stride, ALIGNED: tl.constexpr, BLOCK: tl.constexpr):
    """What: the sum of one row over the dropped columns. Replaces: a masked copy and sum(1).
    Why faster: one read, only where columns are dropped; lane sums in a fixed order.
    """
    if ALIGNED:
        V, stride = V // 16 * 16, stride // 16 * 16
    row = tl.program_id(0).to(tl.int64)
    total = tl.zeros((BLOCK,), tl.float32)
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        lost = tl.load(dropped + cols, mask=cols < V, other=0) != 0
        total += tl.load(p + row * stride + cols, mask=lost, other=0.0).to(tl.float32)
    tl.store(out + row, tl.sum(total, 0))


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


def column_sum(p: Tensor) -> Tensor:
    """(V,) fp32: sum over the rows of p (R, V) fp32, bf16 or fp16, in one order; any row stride."""
    p = unit_rows("p", p)
    (R, V), config = p.shape, BLOCKS["column_sum"]
    out = p.new_zeros(V, dtype=torch.float32)
    launch(column_sum_kernel, (triton.cdiv(V, config["COLS"]),), p, out, R, V, p.stride(0), aligned(V, p), **config)
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


def tail_sums(p: Tensor, cluster: Tensor, weight: Tensor, dropped: Tensor, k: int) -> Tensor:
    """(k, V) fp32: sum over the rows r of cluster j of weight[r] p[r, v] where `dropped`, 0 elsewhere.

    p (R, V), any row stride; cluster (R,) integers in [0, k) (a row outside counts nowhere); weight (R,); dropped (V,).
    """
    p = unit_rows("p", p)
    (R, V), config = p.shape, BLOCKS["tail_sums"]
    members, order = per_row("cluster", cluster, R, torch.int64).sort(stable=True)
    first = torch.searchsorted(members, torch.arange(k + 1, device=p.device))
    dropped = per_row("dropped", dropped, V, torch.bool)
    out = p.new_empty(k, V, dtype=torch.float32)
    launch(
        tail_sums_kernel, (triton.cdiv(V, config["COLS"]), k), p, order, first, per_row("weight", weight, R),
        dropped.view(torch.uint8), out, V, p.stride(0), aligned(V, p), **config,
    )  # fmt: skip
    return out


def row_mass(p: Tensor, dropped: Tensor) -> Tensor:
    """(R,) fp32: sum of each row of p (R, V), any row stride, over the columns that are `dropped` (V,) bool."""
    p = unit_rows("p", p)
    R, V = p.shape
    dropped = per_row("dropped", dropped, V, torch.bool).view(torch.uint8)
    out = p.new_empty(R, dtype=torch.float32)
    launch(row_mass_kernel, (R,), p, dropped, out, V, p.stride(0), aligned(V, p), **BLOCKS["row_mass"])
    return out

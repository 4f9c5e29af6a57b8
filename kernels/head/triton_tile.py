"""The head without logits: Triton kernels that keep every tile of h . w in registers and store only what is owned.

What: row statistics (2THV FLOPs), dh (4THV) and dW (4THV) by recomputing tiles: 10THV in all, where the chunked head
takes 6 or 8. Replaces: the chunk of fp32 logits, for when its memory is what is missing: beyond the results there are
16 bytes a row and split of `SPAN` columns. No atomics: a program owns rows of its output and walks the other side in
order, adding into fp32 rows that stay in cache, so results repeat bitwise and a row does not depend on T.
Expected to be slower than GEMMs wherever a chunk of logits fits. Tested in the interpreter, compiled ahead of time; not
timed on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtrace.kernels.head.epilogue import RowStats
from longtrace.kernels.head.spec import Transform
from longtrace.kernels.head.triton_rows import (
    FLOOR,
    INTERPRETED,
    aligned,
    derivative,
    final_logit,
    launch,
    near_rows,
    per_row,
    rounded,
    scalars,
    unit_rows,
)

SPAN = 8192  # vocabulary columns of one program of `tile_stats`; a multiple of every BLOCK_V
COMMON = {"num_stages": 3, "enable_fp_fusion": False}  # without fp fusion every kernel sees the same bits of a logit
# Shipped block sizes, by operand (fp32: ieee dots run without tensor cores) and by whether H and the strides are
# multiples of 16 (if not, narrow loads cost registers). Chosen so that nothing spills with Triton 3.9, on sm_80 to
# sm_120 and gfx942.
BLOCKS: dict[str, dict[str, dict[str, Any]]] = {
    "narrow": {
        "stats": {"BLOCK_T": 128, "BLOCK_V": 64, "BLOCK_H": 64, "num_warps": 8, **COMMON},
        "dh": {"BLOCK_T": 64, "BLOCK_V": 128, "BLOCK_H": 64, "BLOCK_O": 64, "num_warps": 8, **COMMON},
        "dw": {"BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_H": 64, "BLOCK_O": 32, "num_warps": 8, **COMMON},
    },
    "ragged": {
        "stats": {"BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_H": 32, "num_warps": 8, **COMMON},
        "dh": {"BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_H": 32, "BLOCK_O": 32, "num_warps": 8, **COMMON},
        "dw": {"BLOCK_T": 64, "BLOCK_V": 64, "BLOCK_H": 32, "BLOCK_O": 32, "num_warps": 8, **COMMON},
    },
    "fp32": {
        "stats": {"BLOCK_T": 32, "BLOCK_V": 32, "BLOCK_H": 32, "num_warps": 4, **COMMON, "num_stages": 2},
        "dh": {"BLOCK_T": 32, "BLOCK_V": 32, "BLOCK_H": 16, "BLOCK_O": 32, "num_warps": 4, **COMMON, "num_stages": 2},
        "dw": {"BLOCK_T": 16, "BLOCK_V": 32, "BLOCK_H": 16, "BLOCK_O": 16, "num_warps": 4, **COMMON, "num_stages": 2},
    },
    "fp32 ragged": {
        "stats": {"BLOCK_T": 32, "BLOCK_V": 32, "BLOCK_H": 16, "num_warps": 8, **COMMON, "num_stages": 2},
        "dh": {"BLOCK_T": 32, "BLOCK_V": 16, "BLOCK_H": 16, "BLOCK_O": 32, "num_warps": 8, **COMMON, "num_stages": 2},
        "dw": {"BLOCK_T": 16, "BLOCK_V": 32, "BLOCK_H": 16, "BLOCK_O": 16, "num_warps": 4, **COMMON, "num_stages": 2},
    },
}
COMBINE: dict[str, Any] = {"BLOCK": 128, "num_warps": 4, "enable_fp_fusion": False}


@triton.jit
def dot(x, y):
    """x y in fp32; the interpreter would multiply the bit patterns of bf16, so it gets them widened, which is exact."""
    if INTERPRETED:
        x, y = x.to(tl.float32), y.to(tl.float32)
    return tl.dot(x, y, input_precision="ieee")


@triton.jit
def product(
    x, y, x_rows, y_rows, H, x_stride, y_stride,
    ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """(ROWS, COLS) fp32 tile x y^T; x and y point at their first row, of x_rows and y_rows that exist.

    Rows lie nearer than NEAR, so that offsets within a tile fit 32 bits; where a tile begins is counted in 64.
    """
    i, j = tl.arange(0, ROWS), tl.arange(0, COLS)
    acc = tl.zeros((ROWS, COLS), tl.float32)
    for start in range(0, H, BLOCK_H):
        k = start + tl.arange(0, BLOCK_H)
        left = tl.load(x + i[:, None] * x_stride + k[None, :], mask=(i < x_rows)[:, None] & (k < H)[None, :], other=0.0)
        right = tl.load(
            y + j[None, :] * y_stride + k[:, None], mask=(j < y_rows)[None, :] & (k < H)[:, None], other=0.0
        )
        acc += dot(left, right)
    return acc


@triton.jit
def add_product(
    d, y, out, rows, y_rows, H, y_stride, ROWS: tl.constexpr, COLS: tl.constexpr, BLOCK_O: tl.constexpr
):  # fmt: skip
    """out (rows, H) fp32 += d (ROWS, COLS) y (COLS, H), a block of H at a time; out is owned by this program."""
    i, j = tl.arange(0, ROWS), tl.arange(0, COLS)
    for start in range(0, H, BLOCK_O):
        k = start + tl.arange(0, BLOCK_O)
        right = tl.load(
            y + j[:, None] * y_stride + k[None, :], mask=(j < y_rows)[:, None] & (k < H)[None, :], other=0.0
        )
        at = out + i[:, None] * H + k[None, :]
        mask = (i < rows)[:, None] & (k < H)[None, :]
        tl.store(at, tl.load(at, mask=mask, other=0.0) + dot(d, right), mask=mask)
    tl.debug_barrier()  # the next tile reads these sums, perhaps in other threads


@triton.jit(do_not_specialize=["T", "V", "H", "span", "h_stride", "w_stride"])
def stats_kernel(
    h, w, bias, target, parts, T, V, H, span, h_stride, w_stride, scale, bias_scale, inv_cap, out_scale,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """What: softmax statistics of a tile of tokens over one span of the vocabulary. Replaces: the GEMM and a pass.
    Why: no logits are stored; spans give short batches enough programs, and are fixed so that T changes no bit.
    """
    if ALIGNED:
        H, h_stride, w_stride = H // 16 * 16, h_stride // 16 * 16, w_stride // 16 * 16
    t0 = tl.program_id(0) * BLOCK_T
    rows = t0 + tl.arange(0, BLOCK_T)
    y = tl.load(target + rows, mask=rows < T, other=-1)
    m = tl.full((BLOCK_T,), FLOOR, tl.float32)
    s = tl.zeros((BLOCK_T,), tl.float32)
    u = tl.zeros((BLOCK_T,), tl.float32)
    zy = tl.zeros((BLOCK_T,), tl.float32)
    h += tl.cast(t0, tl.int64) * h_stride
    begin = tl.program_id(1) * span
    for v0 in range(begin, tl.minimum(begin + span, V), BLOCK_V):
        cols = v0 + tl.arange(0, BLOCK_V)
        raw = product(
            h, w + tl.cast(v0, tl.int64) * w_stride, T - t0, V - v0, H, h_stride, w_stride, BLOCK_T, BLOCK_V, BLOCK_H
        )  # fmt: skip
        c = 0.0
        if HAS_BIAS:
            c = tl.load(bias + cols, mask=cols < V, other=0.0)[None, :]
        z, _ = final_logit(raw, c, scale, bias_scale, inv_cap, out_scale, HAS_BIAS, HAS_CAP)
        zy += tl.sum(tl.where(cols[None, :] == y[:, None], z, 0.0), 1)
        z = tl.where((cols >= V)[None, :] | (z < FLOOR), FLOOR, z)
        top = tl.maximum(m, tl.max(z, 1))
        gap = m - top
        shifted = z - top[:, None]
        q = tl.exp(shifted)
        fade = tl.exp(gap)
        if HAS_ENTROPY:
            u = (u + s * gap) * fade + tl.sum(shifted * q, 1)
        s = s * fade + tl.sum(q, 1)
        m = top
    at = parts + tl.program_id(1).to(tl.int64) * 4 * T + rows
    tl.store(at, m, mask=rows < T)
    tl.store(at + T, s, mask=rows < T)
    tl.store(at + 2 * T, zy, mask=rows < T)
    if HAS_ENTROPY:
        tl.store(at + 3 * T, u, mask=rows < T)


@triton.jit(do_not_specialize=["T", "spans"])
def combine_kernel(
    parts, maximum, log_sum, log_prob, entropy, T, spans, HAS_ENTROPY: tl.constexpr, BLOCK: tl.constexpr
):  # fmt: skip
    """What: the spans of `stats_kernel` merged. Replaces: reductions over (spans, T).
    Why: one launch, and one order of the sums for every T.
    """
    rows = tl.program_id(0) * BLOCK + tl.arange(0, BLOCK)
    m = tl.full((BLOCK,), FLOOR, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)
    u = tl.zeros((BLOCK,), tl.float32)
    zy = tl.zeros((BLOCK,), tl.float32)
    for i in range(0, spans):
        at = parts + tl.cast(i, tl.int64) * 4 * T + rows
        part = tl.load(at, mask=rows < T, other=0.0)
        top = tl.maximum(m, part)
        old, new = m - top, part - top
        fade, grow = tl.exp(old), tl.exp(new)
        part_s = tl.load(at + T, mask=rows < T, other=1.0)
        zy += tl.load(at + 2 * T, mask=rows < T, other=0.0)
        if HAS_ENTROPY:
            u = (u + s * old) * fade + (tl.load(at + 3 * T, mask=rows < T, other=0.0) + part_s * new) * grow
        s = s * fade + part_s * grow
        m = top
    log_total = tl.log(s)
    m = tl.where(m == FLOOR, float("-inf"), m)
    tl.store(maximum + rows, m, mask=rows < T)
    tl.store(log_sum + rows, log_total, mask=rows < T)
    tl.store(log_prob + rows, (zy - m) - log_total, mask=rows < T)
    if HAS_ENTROPY:
        tl.store(entropy + rows, log_total - u / s, mask=rows < T)


@triton.jit(do_not_specialize=["T", "V", "H", "h_stride", "w_stride"])
def dh_kernel(
    h, w, bias, target, maximum, log_sum, entropy, a, b, e, out,
    T, V, H, h_stride, w_stride, scale, bias_scale, inv_cap, out_scale, slope,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_E: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """What: dh of a tile of tokens, the vocabulary walked in order. Replaces: dlogits in memory and the GEMM on them.
    Why: dlogits live in registers; any H, as the sums of a tile's rows are kept in memory, not in registers.
    """
    if ALIGNED:
        H, h_stride, w_stride = H // 16 * 16, h_stride // 16 * 16, w_stride // 16 * 16
    t0 = tl.program_id(0) * BLOCK_T
    rows = t0 + tl.arange(0, BLOCK_T)
    live = rows < T
    y = tl.load(target + rows, mask=live, other=-1)[:, None]
    m, ls = tl.load(maximum + rows, mask=live, other=0.0), tl.load(log_sum + rows, mask=live, other=0.0)
    ar, br = tl.load(a + rows, mask=live, other=0.0), tl.load(b + rows, mask=live, other=0.0)
    er, ent = ar, ar
    if HAS_E:
        er, ent = tl.load(e + rows, mask=live, other=0.0), tl.load(entropy + rows, mask=live, other=0.0)
    h += tl.cast(t0, tl.int64) * h_stride
    out += tl.cast(t0, tl.int64) * H
    for v0 in range(0, V, BLOCK_V):
        cols = v0 + tl.arange(0, BLOCK_V)
        tile = w + tl.cast(v0, tl.int64) * w_stride
        raw = product(h, tile, T - t0, V - v0, H, h_stride, w_stride, BLOCK_T, BLOCK_V, BLOCK_H)
        c = 0.0
        if HAS_BIAS:
            c = tl.load(bias + cols, mask=cols < V, other=0.0)[None, :]
        z, t = final_logit(raw, c, scale, bias_scale, inv_cap, out_scale, HAS_BIAS, HAS_CAP)
        d = derivative(
            z, t, cols[None, :] == y, m[:, None], ls[:, None], ar[:, None], br[:, None], er[:, None], ent[:, None], 0.0,
            HAS_E, False, HAS_CAP,
        )  # fmt: skip
        d = tl.where(live[:, None] & (cols < V)[None, :], d * slope, 0.0)
        add_product(rounded(d, w.dtype.element_ty), tile, out, T - t0, V - v0, H, w_stride, BLOCK_T, BLOCK_V, BLOCK_O)


@triton.jit(do_not_specialize=["T", "V", "H", "h_stride", "w_stride"])
def dw_kernel(
    h, w, bias, target, maximum, log_sum, entropy, a, b, e, out, d_bias,
    T, V, H, h_stride, w_stride, scale, bias_scale, inv_cap, out_scale, slope, bias_slope,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_E: tl.constexpr, HAS_D_BIAS: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr, BLOCK_O: tl.constexpr,
):  # fmt: skip
    """What: dW (and d bias) of a tile of the vocabulary, the tokens walked in order. Replaces: the GEMM of each chunk.
    Why: dlogits never reach memory; dW is summed in fp32 by its only owner.
    """
    if ALIGNED:
        H, h_stride, w_stride = H // 16 * 16, h_stride // 16 * 16, w_stride // 16 * 16
    v0 = tl.program_id(0) * BLOCK_V
    cols = v0 + tl.arange(0, BLOCK_V)
    c = 0.0
    if HAS_BIAS:
        c = tl.load(bias + cols, mask=cols < V, other=0.0)[None, :]
    w += tl.cast(v0, tl.int64) * w_stride
    out += tl.cast(v0, tl.int64) * H
    db = tl.zeros((BLOCK_V,), tl.float32)
    for t0 in range(0, T, BLOCK_T):
        rows = t0 + tl.arange(0, BLOCK_T)
        live = rows < T
        y = tl.load(target + rows, mask=live, other=-1)[:, None]
        m, ls = tl.load(maximum + rows, mask=live, other=0.0), tl.load(log_sum + rows, mask=live, other=0.0)
        ar, br = tl.load(a + rows, mask=live, other=0.0), tl.load(b + rows, mask=live, other=0.0)
        er, ent = ar, ar
        if HAS_E:
            er, ent = tl.load(e + rows, mask=live, other=0.0), tl.load(entropy + rows, mask=live, other=0.0)
        tile = h + tl.cast(t0, tl.int64) * h_stride
        raw = product(tile, w, T - t0, V - v0, H, h_stride, w_stride, BLOCK_T, BLOCK_V, BLOCK_H)
        z, t = final_logit(raw, c, scale, bias_scale, inv_cap, out_scale, HAS_BIAS, HAS_CAP)
        d = derivative(
            z, t, cols[None, :] == y, m[:, None], ls[:, None], ar[:, None], br[:, None], er[:, None], ent[:, None], 0.0,
            HAS_E, False, HAS_CAP,
        )  # fmt: skip
        d = tl.where(live[:, None] & (cols < V)[None, :], d, 0.0)
        if HAS_D_BIAS:
            db += tl.sum(d, 0)
        d = tl.trans(rounded(d * slope, h.dtype.element_ty))
        add_product(d, tile, out, V - v0, T - t0, H, h_stride, BLOCK_V, BLOCK_T, BLOCK_O)
    if HAS_D_BIAS:
        tl.store(d_bias + cols, db * bias_slope, mask=cols < V)


def _operands(h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor) -> tuple:
    h, weight = near_rows(unit_rows("h", h)), near_rows(unit_rows("weight", weight))
    if h.shape[1] != weight.shape[1] or h.dtype != weight.dtype:
        raise ValueError(f"h {tuple(h.shape)} {h.dtype} and weight {tuple(weight.shape)} {weight.dtype} do not fit")
    T, V = h.shape[0], weight.shape[0]
    return h, weight, per_row("bias", bias, V), per_row("target", target, T, torch.int64)


def _blocks(kernel: str, h: Tensor, weight: Tensor) -> tuple[bool, dict[str, Any]]:
    """(ALIGNED, block sizes) for operands as they lie."""
    wide = aligned(h.shape[1], h, weight)
    narrow = h.dtype != torch.float32
    return wide, BLOCKS[("narrow" if narrow else "fp32") if wide else ("ragged" if narrow else "fp32 ragged")][kernel]


def tile_stats(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, transform: Transform, entropy: bool
) -> RowStats:  # fmt: skip
    """Statistics of the final logits of each row of h: 2THV FLOPs, no logits in memory.

    h (T, H) and weight (V, H) of one dtype, fp32, bf16 or fp16, any row strides; bias (V,); target (T,) in [0, V).
    Returns fp32 (T,) tensors. ValueError for shapes and dtypes that do not fit.
    """
    h, weight, bias, target = _operands(h, weight, bias, target)
    (T, H), V = h.shape, weight.shape[0]
    wide, config = _blocks("stats", h, weight)
    spans = triton.cdiv(V, SPAN)
    parts = h.new_empty(spans, 4, T, dtype=torch.float32)
    launch(
        stats_kernel, (triton.cdiv(T, config["BLOCK_T"]), spans), h, weight, bias, target, parts, T, V, H, SPAN,
        h.stride(0), weight.stride(0), *scalars(transform), bias is not None, transform.softcap is not None, entropy,
        wide, **config,
    )  # fmt: skip
    new = [h.new_empty(T, dtype=torch.float32) for _ in range(4 if entropy else 3)]
    config, ent = COMBINE, new[3] if entropy else None
    launch(combine_kernel, (triton.cdiv(T, config["BLOCK"]),), parts, *new[:3], ent, T, spans, entropy, **config)
    return RowStats(*new[:3], ent)


def _gradient(h, weight, bias, target, transform: Transform, stats: RowStats, a, b, e) -> tuple[tuple, tuple, tuple]:
    """What dh and dW share: pointers, numbers and flags, in the order both kernels take them."""
    h, weight, bias, target = _operands(h, weight, bias, target)
    if e is not None and stats.entropy is None:
        raise ValueError("e needs stats with an entropy: call tile_stats(..., entropy=True)")
    (T, H), V = h.shape, weight.shape[0]
    pointers = (
        h, weight, bias, target, per_row("stats.maximum", stats.maximum, T), per_row("stats.log_sum", stats.log_sum, T),
        None if e is None else per_row("stats.entropy", stats.entropy, T),
        per_row("a", a, T), per_row("b", b, T), per_row("e", e, T),
    )  # fmt: skip
    slope = transform.logit_scale / transform.temperature
    numbers = (T, V, H, h.stride(0), weight.stride(0), *scalars(transform), slope)
    return pointers, numbers, (bias is not None, transform.softcap is not None, e is not None)


def tile_dh(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, transform: Transform, stats: RowStats,
    a: Tensor, b: Tensor, e: Tensor | None,
) -> Tensor:  # fmt: skip
    """(T, H) fp32: [a p - b 1[v=y] - e p (log p + entropy)] (1 - tanh^2) logit_scale/temperature W, 4THV FLOPs.

    Arguments as of `tile_stats`; `stats` what it returned; a, b, e (T,). The bracket is rounded to the operands' dtype.
    """
    pointers, numbers, flags = _gradient(h, weight, bias, target, transform, stats, a, b, e)
    x, w = pointers[:2]
    wide, config = _blocks("dh", x, w)
    out = x.new_zeros(x.shape, dtype=torch.float32)
    grid = (triton.cdiv(x.shape[0], config["BLOCK_T"]),)
    launch(dh_kernel, grid, *pointers, out, *numbers, *flags, wide, **config)
    return out


def tile_dw(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, transform: Transform, stats: RowStats,
    a: Tensor, b: Tensor, e: Tensor | None, d_bias: Tensor | None = None,
) -> Tensor:  # fmt: skip
    """(V, H) fp32: the same bracket, transposed, times h: 4THV FLOPs. Arguments as of `tile_dh`.

    d_bias (V,) fp32, when given, is overwritten with the gradient of the bias. A NaN row reaches every row of dW.
    """
    pointers, numbers, flags = _gradient(h, weight, bias, target, transform, stats, a, b, e)
    x, w = pointers[:2]
    if d_bias is not None and (d_bias.shape != w.shape[:1] or d_bias.dtype != torch.float32 or d_bias.stride(0) != 1):
        raise ValueError(f"d_bias is {tuple(d_bias.shape)} {d_bias.dtype}; expected contiguous ({w.shape[0]},) fp32")
    wide, config = _blocks("dw", x, w)
    out = x.new_zeros(w.shape, dtype=torch.float32)
    launch(
        dw_kernel, (triton.cdiv(w.shape[0], config["BLOCK_V"]),), *pointers, out, d_bias, *numbers,
        1.0 / transform.temperature, *flags, d_bias is not None, wide, **config,
    )  # fmt: skip
    return out

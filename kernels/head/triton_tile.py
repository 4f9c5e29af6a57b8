"""The head's first product with the softmax in its epilogue, for bf16: g = exp(z - r) leaves a tile, logits never do.

What: z = transform(h . w) of a tile of tokens by a block of the vocabulary stays in registers; bf16 g, or the gradient
where the statistics are known, is all that is written, and sums per token and block. p = g / sum, so that the factor
goes onto the operands of the gradient products. Replaces: fp32 logits in memory, and the passes of `triton_rows.py`
over them. Why faster: a logit costs 2 bytes written and 2 read by each gradient product where it cost 18.
r is the logit of the token's target: what lies above it is at most the token's loss, and bf16 has fp32's range. Where a
logit exceeds r by `FAR`, the chunk is done again with that token's maximum for r.
No atomics and sums in a fixed order, so results repeat bitwise and a row depends neither on its neighbours nor on T; no
size or hyper-parameter is a constexpr. Tested in the interpreter, compiled ahead of time; not timed on a GPU.
"""

from __future__ import annotations

from typing import Any, NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtrace.kernels.head.epilogue import RowStats
from longtrace.kernels.head.spec import Transform
from longtrace.kernels.head.triton_rows import (
    FLOOR,
    INTERPRETED,
    NEAR,
    derivative,
    final_logit,
    launch,
    near_rows,
    per_row,
    rounded,
    scalars,
    unit_rows,
)

FAR = 60.0  # exp of more would leave too little room below fp32's largest number
NO_FUSION = {"enable_fp_fusion": False}  # every kernel sees the same bits of a logit
# Shipped sizes: "aligned" where H and strides are multiples of 16, "ragged" elsewhere (narrow loads cost registers).
BLOCKS: dict[str, dict[str, Any]] = {
    "aligned": {"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_H": 64, "num_warps": 8, "num_stages": 3, **NO_FUSION},
    "ragged": {"BLOCK_T": 128, "BLOCK_V": 128, "BLOCK_H": 32, "num_warps": 8, "num_stages": 3, **NO_FUSION},
}
TARGET: dict[str, Any] = {"ROWS": 8, "BLOCK_H": 128, "num_warps": 4, **NO_FUSION}
SUMS: dict[str, Any] = {"ROWS": 16, "BLOCKS": 64, "num_warps": 4, **NO_FUSION}


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
        if INTERPRETED:  # the interpreter would multiply the bit patterns of bf16; widening is exact
            left, right = left.to(tl.float32), right.to(tl.float32)
        acc += tl.dot(left, right, input_precision="ieee")
    return acc


@triton.jit
def logit_tile(
    h, w, bias, t0, v0, T, V, H, h_stride, w_stride, scale, bias_scale, inv_cap, out_scale,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """(z, tanh) of the tokens from t0 and the vocabulary from v0, as `final_logit` has them."""
    raw = product(
        h + tl.cast(t0, tl.int64) * h_stride, w + tl.cast(v0, tl.int64) * w_stride, T - t0, V - v0, H,
        h_stride, w_stride, BLOCK_T, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    c = 0.0
    if HAS_BIAS:
        cols = v0 + tl.arange(0, BLOCK_V)
        c = tl.load(bias + cols, mask=cols < V, other=0.0)[None, :]
    return final_logit(raw, c, scale, bias_scale, inv_cap, out_scale, HAS_BIAS, HAS_CAP)


@triton.jit
def store_tile(out, t0, v0, T, V, out_stride, value, BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr):
    """out (T, V) at (t0, v0) <- value, rounded; offsets as in `product`: 64 bits for all rows would spill on sm_100."""
    i, cols = tl.arange(0, BLOCK_T), v0 + tl.arange(0, BLOCK_V)
    at = out + tl.cast(t0, tl.int64) * out_stride + i[:, None] * out_stride + cols[None, :]
    tl.store(at, value, mask=(i < T - t0)[:, None] & (cols < V)[None, :])


@triton.jit(do_not_specialize=["T", "H", "h_stride", "w_stride"])
def target_kernel(
    h, w, bias, target, out, T, H, h_stride, w_stride, scale, bias_scale, inv_cap, out_scale,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, ALIGNED: tl.constexpr, ROWS: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """What: the final logit of each token's target. Replaces: a gather from whole logits.
    Why: known before the first tile, it is the reference of every exponential of its row.
    """
    if ALIGNED:
        H, h_stride, w_stride = H // 16 * 16, h_stride // 16 * 16, w_stride // 16 * 16
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < T
    y = tl.load(target + rows, mask=live, other=0)
    acc = tl.zeros((ROWS, BLOCK_H), tl.float32)
    for start in range(0, H, BLOCK_H):
        k = start + tl.arange(0, BLOCK_H)
        keep = live[:, None] & (k < H)[None, :]
        left = tl.load(h + rows.to(tl.int64)[:, None] * h_stride + k[None, :], mask=keep, other=0.0)
        right = tl.load(w + y[:, None] * w_stride + k[None, :], mask=keep, other=0.0)
        acc += left.to(tl.float32) * right.to(tl.float32)
    raw = tl.sum(acc, 1)
    c = 0.0
    if HAS_BIAS:
        c = tl.load(bias + y, mask=live, other=0.0)
    z, _ = final_logit(raw, c, scale, bias_scale, inv_cap, out_scale, HAS_BIAS, HAS_CAP)
    tl.store(out + rows, z, mask=live)


@triton.jit(do_not_specialize=["T", "V", "H", "h_stride", "w_stride", "out_stride"])
def exp_kernel(
    h, w, bias, target, reference, total, peak, dot, mass, out,
    T, V, H, h_stride, w_stride, out_stride, scale, bias_scale, inv_cap, out_scale,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_DOT: tl.constexpr, HAS_MASS: tl.constexpr,
    HAS_OUT: tl.constexpr, ALIGNED: tl.constexpr, ALIGNED_V: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """What: g = exp(z - reference) (1 - tanh^2) of a tile, 0 at the targets, and its sums. Replaces: a GEMM and two passes.
    Why faster: the logits stay in registers. Programs of one block of the vocabulary follow each other: W is read once.
    """
    out_stride = out_stride // 16 * 16  # tells the compiler that rows start aligned
    if ALIGNED:
        H, h_stride, w_stride = H // 16 * 16, h_stride // 16 * 16, w_stride // 16 * 16
    if ALIGNED_V:
        V = V // 16 * 16
    tiles = tl.cdiv(T, BLOCK_T)
    t0, block = tl.program_id(0) % tiles * BLOCK_T, tl.program_id(0) // tiles
    v0 = block * BLOCK_V
    z, t = logit_tile(
        h, w, bias, t0, v0, T, V, H, h_stride, w_stride, scale, bias_scale, inv_cap, out_scale, HAS_BIAS, HAS_CAP,
        BLOCK_T, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    rows, cols = t0 + tl.arange(0, BLOCK_T), v0 + tl.arange(0, BLOCK_V)
    live = rows < T
    y = tl.load(target + rows, mask=live, other=-1)
    x = z - tl.load(reference + rows, mask=live, other=0.0)[:, None]
    x = tl.where((cols >= V)[None, :] | (cols[None, :] == y[:, None]) | (x < FLOOR), FLOOR, x)
    top = tl.max(x, 1)
    q = tl.exp(x)
    at = tl.cast(block, tl.int64) * T + rows
    tl.store(total + at, tl.sum(q, 1), mask=live)
    tl.store(peak + at, top, mask=live)
    if HAS_DOT:  # from the block's own maximum: all terms <= 0, nothing cancels
        tl.store(dot + at, tl.sum((x - top[:, None]) * q, 1), mask=live)
    if HAS_OUT:
        if HAS_CAP:
            q *= 1.0 - t * t
        g = rounded(q, out.dtype.element_ty)
        store_tile(out, t0, v0, T, V, out_stride, g, BLOCK_T, BLOCK_V)
        if HAS_MASS:
            tl.store(mass + at, tl.sum(g.to(tl.float32), 1), mask=live)


@triton.jit(do_not_specialize=["T", "blocks"])
def sums_kernel(
    total, peak, dot, mass, total_out, peak_out, dot_out, mass_out, T, blocks,
    HAS_DOT: tl.constexpr, HAS_MASS: tl.constexpr, ROWS: tl.constexpr, BLOCKS: tl.constexpr,
):  # fmt: skip
    """What: the sums of `exp_kernel` over the blocks of the vocabulary. Replaces: reductions over (blocks, T).
    Why: one launch, and one order of the sums for every T.
    """
    rows = tl.program_id(0) * ROWS + tl.arange(0, ROWS)
    live = rows < T
    s = tl.zeros((BLOCKS, ROWS), tl.float32)
    m = tl.zeros((BLOCKS, ROWS), tl.float32)
    top = tl.full((BLOCKS, ROWS), FLOOR, tl.float32)
    for start in range(0, blocks, BLOCKS):
        i = start + tl.arange(0, BLOCKS)
        at, keep = i.to(tl.int64)[:, None] * T + rows[None, :], (i < blocks)[:, None] & live[None, :]
        s += tl.load(total + at, mask=keep, other=0.0)
        top = tl.maximum(top, tl.load(peak + at, mask=keep, other=FLOOR))
        if HAS_MASS:
            m += tl.load(mass + at, mask=keep, other=0.0)
    most = tl.max(top, 0)
    tl.store(total_out + rows, tl.sum(s, 0), mask=live)
    tl.store(peak_out + rows, most, mask=live)
    if HAS_MASS:
        tl.store(mass_out + rows, tl.sum(m, 0), mask=live)
    if HAS_DOT:  # each block's from the row's maximum instead of its own
        u = tl.zeros((BLOCKS, ROWS), tl.float32)
        for start in range(0, blocks, BLOCKS):
            i = start + tl.arange(0, BLOCKS)
            at, keep = i.to(tl.int64)[:, None] * T + rows[None, :], (i < blocks)[:, None] & live[None, :]
            lower = tl.load(peak + at, mask=keep, other=FLOOR) - most[None, :]
            u += tl.load(dot + at, mask=keep, other=0.0) + lower * tl.load(total + at, mask=keep, other=0.0)
        tl.store(dot_out + rows, tl.sum(u, 0), mask=live)


@triton.jit(do_not_specialize=["T", "V", "H", "h_stride", "w_stride", "out_stride"])
def gradient_kernel(
    h, w, bias, target, maximum, log_sum, entropy, a, e, out,
    T, V, H, h_stride, w_stride, out_stride, scale, bias_scale, inv_cap, out_scale,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_E: tl.constexpr, ALIGNED: tl.constexpr, ALIGNED_V: tl.constexpr,
    BLOCK_T: tl.constexpr, BLOCK_V: tl.constexpr, BLOCK_H: tl.constexpr,
):  # fmt: skip
    """What: d loss / d z of a tile from known statistics, 0 at the targets. Replaces: logits again and a pass over them.
    Why faster: the logits stay in registers; order of programs as in `exp_kernel`.
    """
    out_stride = out_stride // 16 * 16  # tells the compiler that rows start aligned
    if ALIGNED:
        H, h_stride, w_stride = H // 16 * 16, h_stride // 16 * 16, w_stride // 16 * 16
    if ALIGNED_V:
        V = V // 16 * 16
    tiles = tl.cdiv(T, BLOCK_T)
    t0, v0 = tl.program_id(0) % tiles * BLOCK_T, tl.program_id(0) // tiles * BLOCK_V
    z, t = logit_tile(
        h, w, bias, t0, v0, T, V, H, h_stride, w_stride, scale, bias_scale, inv_cap, out_scale, HAS_BIAS, HAS_CAP,
        BLOCK_T, BLOCK_V, BLOCK_H,
    )  # fmt: skip
    rows, cols = t0 + tl.arange(0, BLOCK_T), v0 + tl.arange(0, BLOCK_V)
    live = rows < T
    y = tl.load(target + rows, mask=live, other=-1)
    m, ls = tl.load(maximum + rows, mask=live, other=0.0), tl.load(log_sum + rows, mask=live, other=0.0)
    ar = tl.load(a + rows, mask=live, other=0.0)
    er, ent = ar, ar
    if HAS_E:
        er, ent = tl.load(e + rows, mask=live, other=0.0), tl.load(entropy + rows, mask=live, other=0.0)
    d = derivative(
        z, t, cols[None, :] == y[:, None], m[:, None], ls[:, None], ar[:, None], er[:, None], ent[:, None], HAS_E, HAS_CAP
    )  # fmt: skip
    store_tile(out, t0, v0, T, V, out_stride, rounded(d, out.dtype.element_ty), BLOCK_T, BLOCK_V)


class Softmax(NamedTuple):
    """What `softmax_tiles` finds of each token: p = g scale; fp32 (T,)."""

    stats: RowStats
    scale: Tensor  # of g
    mass: Tensor | None  # sum of p (1 - tanh^2) as rounded, the target's left out
    target: Tensor  # the final logit of the target


def _operands(h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, out: Tensor | None) -> tuple:
    h, weight = near_rows(unit_rows("h", h)), near_rows(unit_rows("weight", weight))
    if h.shape[1] != weight.shape[1] or h.dtype != torch.bfloat16 or weight.dtype != torch.bfloat16:
        raise ValueError(
            f"h {tuple(h.shape)} {h.dtype} and weight {tuple(weight.shape)} {weight.dtype} do not fit; accepted: "
            "(T, H) and (V, H), bf16"
        )
    T, V = h.shape[0], weight.shape[0]
    if out is not None:
        fits = out.shape == (T, V) and out.dtype == torch.bfloat16
        if not fits or (V > 1 and out.stride(1) != 1) or out.stride(0) % 16 or out.stride(0) >= NEAR:
            raise ValueError(
                f"out is {tuple(out.shape)} {out.dtype}, strides {out.stride()}; expected ({T}, {V}) bf16, columns "
                f"adjacent and rows a multiple of 16, less than {NEAR:,}, apart"
            )
    return h, weight, per_row("bias", bias, V), per_row("target", target, T, torch.int64)


def _sizes(h: Tensor, weight: Tensor, out: Tensor | None) -> tuple[tuple, tuple[bool, bool], dict[str, Any]]:
    """(T, V, H and strides; whether rows of the operands, and of the result, start and end aligned; the block sizes)."""
    numbers = (h.shape[0], *weight.shape, h.stride(0), weight.stride(0), 0 if out is None else out.stride(0))
    wide = all(n % 16 == 0 for n in numbers[2:])
    return numbers, (wide, wide and numbers[1] % 16 == 0), BLOCKS["aligned" if wide else "ragged"]


def softmax_tiles(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, transform: Transform, entropy: bool, mass: bool,
    out: Tensor | None,
) -> Softmax:  # fmt: skip
    """Statistics of each row of final logits, 2THV FLOPs; out (T, V) bf16, when given, <- g, 0 at the targets.

    h (T, H) and weight (V, H) bf16, any row strides; bias (V,); target (T,) in [0, V); rows of `out` lie a multiple of
    16 elements apart, and less than NEAR; `mass` needs `out`. A row that holds a NaN reads NaN and touches no other.
    ValueError for shapes, strides and dtypes that do not fit.
    """
    h, weight, bias, target = _operands(h, weight, bias, target, out)
    numbers, wide, config = _sizes(h, weight, out)
    T, V = numbers[:2]
    flags = (bias is not None, transform.softcap is not None)
    z = h.new_empty(T, dtype=torch.float32)
    launch(
        target_kernel, (triton.cdiv(T, TARGET["ROWS"]),), h, weight, bias, target, z, T, *numbers[2:5],
        *scalars(transform), *flags, wide[0], **TARGET,
    )  # fmt: skip
    blocks = triton.cdiv(V, config["BLOCK_V"])
    kinds = (True, True, entropy, mass)
    parts = [h.new_empty(blocks, T, dtype=torch.float32) if kind else None for kind in kinds]
    sums = [h.new_empty(T, dtype=torch.float32) if kind else None for kind in kinds]

    def run(reference: Tensor) -> None:
        launch(
            exp_kernel, (triton.cdiv(T, config["BLOCK_T"]) * blocks,), h, weight, bias, target, reference, *parts, out,
            *numbers, *scalars(transform), *flags, entropy, mass, out is not None, *wide, **config,
        )  # fmt: skip
        launch(sums_kernel, (triton.cdiv(T, SUMS["ROWS"]),), *parts, *sums, T, blocks, entropy, mass, **SUMS)

    reference = torch.where(z.isneginf(), 0.0, z)
    run(reference)
    peak = sums[1]
    far = (peak > FAR) | (z.isneginf() & (peak < -FAR) & (peak > FLOOR.value))
    if far.any():  # a token with a loss above 60 nats: what it costs does not count
        reference = torch.where(far, reference + peak, reference)
        run(reference)
    return _statistics(reference, z, *sums)


def _statistics(r: Tensor, z: Tensor, rest: Tensor, peak: Tensor, dot: Tensor | None, mass: Tensor | None) -> Softmax:
    """From the sums over all but the target, of exponentials from reference r, and the target's own logit z."""
    x = z - r
    own, top = x.exp(), torch.maximum(x, peak)
    total = rest + own
    maximum = torch.where(top <= FLOOR.value, -torch.inf, r + top)
    log_sum = total.log() - (maximum - r)  # of exponentials from the maximum, as it is rounded
    log_prob = torch.where(rest < own, -torch.log1p(rest / own), (x - (maximum - r)) - log_sum)
    entropy = None
    if dot is not None:
        from_top = dot + (peak - top) * rest + torch.where(own > 0, (x - top) * own, 0.0)
        entropy = (total.log() - top) - from_top / total
    return Softmax(
        RowStats(maximum, log_sum, log_prob, entropy), 1 / total, None if mass is None else mass / total, z
    )  # fmt: skip


def gradient_tiles(
    h: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, transform: Transform, stats: RowStats,
    a: Tensor, e: Tensor | None, out: Tensor,
) -> Tensor:  # fmt: skip
    """out (T, V) bf16 <- [a p - e p (log p + entropy)] (1 - tanh^2), 0 at the targets; 2THV FLOPs. Returns `out`.

    Arguments as of `softmax_tiles`; `stats` what it returned; a, e (T,).
    """
    h, weight, bias, target = _operands(h, weight, bias, target, out)
    if e is not None and stats.entropy is None:
        raise ValueError("e needs stats with an entropy: call softmax_tiles(..., entropy=True)")
    numbers, wide, config = _sizes(h, weight, out)
    T, V = numbers[:2]
    launch(
        gradient_kernel, (triton.cdiv(T, config["BLOCK_T"]) * triton.cdiv(V, config["BLOCK_V"]),), h, weight, bias, target,
        per_row("stats.maximum", stats.maximum, T), per_row("stats.log_sum", stats.log_sum, T),
        None if e is None else per_row("stats.entropy", stats.entropy, T), per_row("a", a, T), per_row("e", e, T), out,
        *numbers, *scalars(transform), bias is not None, transform.softcap is not None, e is not None, *wide, **config,
    )  # fmt: skip
    return out

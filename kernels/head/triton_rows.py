"""Row-wise Triton kernels over a chunk of raw logits (R, V) = h . w, as a GEMM with fp32 results leaves them.

What: softmax statistics, and logits turned into their gradient, each in one read of the chunk: the head of fp32 and fp16
(bf16 has `triton_tile.py`; fp16 could not hold its exponentials). Replaces: the PyTorch passes of `epilogue.py`, which
read and write the chunk several times.
Why faster: the logit transform, the softmax and the rounding to the GEMM's operand dtype happen in registers.
No atomics and sums in a fixed order, so results repeat bitwise; no size or hyper-parameter is a constexpr, so a new
V, R or temperature never recompiles. Tested in the interpreter, compiled ahead of time; not timed on a GPU.
"""

from __future__ import annotations

from typing import Any

import torch
import triton
import triton.language as tl
from torch import Tensor

from longtrace.kernels.head.epilogue import RowStats
from longtrace.kernels.head.spec import Transform

FLOATS = (torch.float32, torch.bfloat16, torch.float16)
NEAR = 2**24  # elements from row to row: within a block of up to 128 rows, offsets of rows nearer than this fit 32 bits
# Shipped block sizes. Without fp fusion a logit has the same bits in every kernel that recomputes it.
BLOCKS: dict[str, dict[str, Any]] = {
    "stats": {"BLOCK": 2048, "num_warps": 4, "enable_fp_fusion": False},
    "dlogits": {"BLOCK": 2048, "num_warps": 4, "enable_fp_fusion": False},
}
INTERPRETED = tl.constexpr(triton.knobs.runtime.interpret)
FLOOR = tl.constexpr(-1e30)  # stands for -inf in running maxima: differences stay finite, exp of them is 0


@triton.jit
def tanh(x):
    """Within 2 units in the last place: a polynomial (Cephes tanhf) near 0, where 1 - 2 / (e^2x + 1) cancels."""
    size = tl.abs(x)
    square = x * x
    poly = (((-5.70498872745e-3 * square + 2.06390887954e-2) * square - 5.37397155531e-2) * square) + 1.33314422036e-1
    near = (poly * square - 3.33332819422e-1) * square * x + x
    far = 1.0 - 2.0 / (tl.exp(2.0 * size) + 1.0)
    return tl.where(size < 0.625, near, tl.where(x < 0, -far, far))


@triton.jit
def rounded(x, dtype: tl.constexpr):
    """x (fp32) in `dtype`, to nearest even; the interpreter would cut bf16 off, so its bits are rounded first."""
    if INTERPRETED and dtype == tl.bfloat16:
        bits = x.to(tl.int32, bitcast=True)
        x = ((bits + 0x7FFF + ((bits >> 16) & 1)) & -65536).to(tl.float32, bitcast=True)
    return x.to(dtype)


@triton.jit
def final_logit(raw, bias, scale, bias_scale, inv_cap, out_scale, HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr):
    """(z, tanh): the logit the softmax sees, and the tanh of its cap (z itself without one); see `scalars`."""
    z = raw * scale
    if HAS_BIAS:
        z += bias * bias_scale
    t = z
    if HAS_CAP:
        t = tanh(z * inv_cap)
        z = t * out_scale
    return z, t


@triton.jit
def derivative(z, t, hit, m, log_sum, a, e, entropy, HAS_E: tl.constexpr, HAS_CAP: tl.constexpr):
    """[a p - e p (log p + entropy)] (1 - tanh^2), p = exp((z - m) - log_sum); 0 where `hit`, at the target."""
    log_p = (z - m) - log_sum
    p = tl.exp(log_p)
    d = a * p
    if HAS_E:
        d -= e * tl.where(p == 0.0, 0.0, p * (log_p + entropy))
    if HAS_CAP:
        d *= 1.0 - t * t
    return tl.where(hit, 0.0, d)


@triton.jit(do_not_specialize=["V", "stride"])
def stats_kernel(
    logits, target, bias, maximum, log_sum, log_prob, entropy,
    V, stride, scale, bias_scale, inv_cap, out_scale,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_ENTROPY: tl.constexpr, ALIGNED: tl.constexpr,
    BLOCK: tl.constexpr,
):  # fmt: skip
    """What: max, log-sum, log-prob and entropy of one row. Replaces: amax, sub, exp, sum, gather, entr.
    Why faster: one read; each lane keeps its own running maximum, so no barrier and one exp per logit.
    """
    row = tl.program_id(0).to(tl.int64)
    if ALIGNED:
        V, stride = V // 16 * 16, stride // 16 * 16  # tells the compiler that rows start and end aligned
    logits += row * stride
    m = tl.full((BLOCK,), FLOOR, tl.float32)
    s = tl.zeros((BLOCK,), tl.float32)  # sum of exp(z - m)
    u = tl.zeros((BLOCK,), tl.float32)  # sum of (z - m) exp(z - m): all terms <= 0, nothing cancels
    for start in range(0, V, BLOCK):
        cols = start + tl.arange(0, BLOCK)
        raw = tl.load(logits + cols, mask=cols < V, other=0.0).to(tl.float32)
        c = raw
        if HAS_BIAS:
            c = tl.load(bias + cols, mask=cols < V, other=0.0).to(tl.float32)
        z, _ = final_logit(raw, c, scale, bias_scale, inv_cap, out_scale, HAS_BIAS, HAS_CAP)
        z = tl.where((cols >= V) | (z < FLOOR), FLOOR, z)
        gap = tl.abs(z - m)
        q = tl.exp(-gap)
        higher = z > m
        if HAS_ENTROPY:
            u = tl.where(higher, (u - s * gap) * q, u - gap * q)
        s = tl.where(higher, s * q + 1.0, s + q)
        m = tl.where(higher, z, m)
    top = tl.max(m, 0)
    gap = m - top
    q = tl.exp(gap)
    total = tl.sum(s * q, 0)
    log_total = tl.log(total)
    if HAS_ENTROPY:
        tl.store(entropy + row, log_total - tl.sum((u + s * gap) * q, 0) / total)
    y = tl.load(target + row)
    raw = tl.load(logits + y).to(tl.float32)
    c = raw
    if HAS_BIAS:
        c = tl.load(bias + y).to(tl.float32)
    z, _ = final_logit(raw, c, scale, bias_scale, inv_cap, out_scale, HAS_BIAS, HAS_CAP)
    top = tl.where(top == FLOOR, float("-inf"), top)
    tl.store(maximum + row, top)
    tl.store(log_sum + row, log_total)
    tl.store(log_prob + row, (z - top) - log_total)


@triton.jit(do_not_specialize=["V", "stride", "out_stride"])
def dlogits_kernel(
    logits, target, bias, maximum, log_sum, entropy, a, e, out,
    V, stride, out_stride, scale, bias_scale, inv_cap, out_scale,
    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_E: tl.constexpr, ALIGNED: tl.constexpr, BLOCK: tl.constexpr,
):  # fmt: skip
    """What: a block of one row of d loss / d z, 0 at the target. Replaces: sub, exp, mul, tanh', scatter and cast.
    Why faster: one read of the logits and one write, in the operand dtype of the gradient GEMMs.
    """
    blocks = tl.cdiv(V, BLOCK)
    row = (tl.program_id(0) // blocks).to(tl.int64)
    cols = tl.program_id(0) % blocks * BLOCK + tl.arange(0, BLOCK)
    if ALIGNED:
        V, stride, out_stride = V // 16 * 16, stride // 16 * 16, out_stride // 16 * 16
    keep = cols < V
    raw = tl.load(logits + row * stride + cols, mask=keep, other=0.0).to(tl.float32)
    c = raw
    if HAS_BIAS:
        c = tl.load(bias + cols, mask=keep, other=0.0).to(tl.float32)
    z, t = final_logit(raw, c, scale, bias_scale, inv_cap, out_scale, HAS_BIAS, HAS_CAP)
    er, ent = 0.0, 0.0
    if HAS_E:
        er, ent = tl.load(e + row), tl.load(entropy + row)
    hit = cols == tl.load(target + row)
    m, total, ar = tl.load(maximum + row), tl.load(log_sum + row), tl.load(a + row)
    d = derivative(z, t, hit, m, total, ar, er, ent, HAS_E, HAS_CAP)
    tl.store(out + row * out_stride + cols, rounded(d, out.dtype.element_ty), mask=keep)


def scalars(transform: Transform) -> tuple[float, float, float, float]:
    """(scale, bias_scale, inv_cap, out_scale): z = raw scale + bias bias_scale, then tanh(z inv_cap) out_scale.

    Floats always: Triton compiles anew for an integer.
    """
    if transform.softcap is None:
        return transform.logit_scale / transform.temperature, 1.0 / transform.temperature, 0.0, 0.0
    return float(transform.logit_scale), 1.0, 1.0 / transform.softcap, transform.softcap / transform.temperature


def launch(kernel, grid: tuple[int, ...], *args, **config) -> None:
    """Run `kernel` on the device of its first argument; an empty grid is no launch."""
    if all(grid):
        with torch.cuda.device_of(args[0]):
            kernel[grid](*args, **config)


def unit_rows(name: str, x: Tensor) -> Tensor:
    """`x` (rows, columns) with adjacent columns (copied if it has to be); ValueError for what the kernels do not take.

    Row strides are free: a slice of a wider buffer is read where it lies.
    """
    if x.ndim != 2 or x.dtype not in FLOATS:
        raise ValueError(f"{name} is {x.ndim}-d {x.dtype}; accepted: 2-d fp32, bf16 or fp16")
    return x if x.stride(1) == 1 or x.shape[1] <= 1 else x.contiguous()


def near_rows(x: Tensor) -> Tensor:
    """`x`, or a dense copy if its rows lie NEAR elements apart or more, for kernels that count in 32 bits within a block."""
    return x if x.stride(0) < NEAR else x.contiguous()


def per_row(name: str, x: Tensor | None, n: int, dtype: torch.dtype = torch.float32) -> Tensor | None:
    """`x` (n,) in `dtype`, contiguous; ValueError for another shape."""
    if x is None:
        return None
    if x.shape != (n,):
        raise ValueError(f"{name} has shape {tuple(x.shape)}, expected ({n},)")
    return x.to(dtype).contiguous()


def aligned(columns: int, *tensors: Tensor) -> bool:
    """Whether rows of `columns` values start and end at multiples of 16 elements: loads can then be wide."""
    return columns % 16 == 0 and all(x.stride(0) % 16 == 0 for x in tensors)


def softmax_stats(
    logits: Tensor, target: Tensor, bias: Tensor | None, transform: Transform, entropy: bool
) -> RowStats:  # fmt: skip
    """Statistics of the final logits of each row, from raw h . w.

    logits (R, V) fp32 (bf16 and fp16 are widened), any row stride; target (R,) class indices in [0, V); bias (V,).
    Returns fp32 (R,) tensors. A row that holds a NaN reads NaN and touches no other. ValueError for shapes and dtypes.
    """
    logits = unit_rows("logits", logits)
    R, V = logits.shape
    target, bias = per_row("target", target, R, torch.int64), per_row("bias", bias, V)
    new = [logits.new_empty(R, dtype=torch.float32) for _ in range(4 if entropy else 3)]
    flags = (bias is not None, transform.softcap is not None, entropy, aligned(V, logits))
    launch(
        stats_kernel, (R,), logits, target, bias, *new[:3], new[3] if entropy else None,
        V, logits.stride(0), *scalars(transform), *flags, **BLOCKS["stats"],
    )  # fmt: skip
    return RowStats(*new[:3], new[3] if entropy else None)


def dlogits(
    logits: Tensor, target: Tensor, bias: Tensor | None, transform: Transform, stats: RowStats,
    a: Tensor, e: Tensor | None, out: Tensor,
) -> Tensor:  # fmt: skip
    """out (R, V) <- [a p - e p (log p + entropy)] (1 - tanh^2 of the cap), 0 at the targets, rounded to its dtype.

    Arguments as of `softmax_stats`; `stats` what it returned; a, e (R,). `out` is fp32, bf16 or fp16 with adjacent
    columns and may be `logits` itself. Returns `out`; ValueError for wrong shapes.
    """
    x = unit_rows("logits", logits)
    if unit_rows("out", out) is not out or out.shape != x.shape:
        raise ValueError(f"out {tuple(out.shape)} must be {tuple(x.shape)} with adjacent columns")
    if e is not None and stats.entropy is None:
        raise ValueError("e needs stats with an entropy: call softmax_stats(..., entropy=True)")
    R, V = x.shape
    rows = (
        per_row("target", target, R, torch.int64), per_row("bias", bias, V),
        per_row("stats.maximum", stats.maximum, R), per_row("stats.log_sum", stats.log_sum, R),
        None if e is None else per_row("stats.entropy", stats.entropy, R), per_row("a", a, R), per_row("e", e, R),
    )  # fmt: skip
    flags = (bias is not None, transform.softcap is not None, e is not None, aligned(V, x, out))
    config = BLOCKS["dlogits"]
    launch(
        dlogits_kernel, (R * triton.cdiv(V, config["BLOCK"]),), x, *rows, out, V, x.stride(0), out.stride(0),
        *scalars(transform), *flags, **config,
    )  # fmt: skip
    return out

"""`varlen_attention` by the Triton kernels: their shipped sizes, and the autograd function around them.

Not timed on a GPU. The arithmetic is tested on the CPU under Triton's interpreter, and shipped sizes are compiled ahead of
time: the tests hold them to no spilled registers and the shared memory of their part.
"""

from __future__ import annotations

import math
from functools import lru_cache
from typing import Any

import torch
import torch.nn.functional as F
import triton
from torch import Tensor

from longtrace.kernels.attention.triton_backward import delta_kernel, dk_dv_kernel, dq_kernel
from longtrace.kernels.attention.triton_forward import forward_kernel
from longtrace.kernels.head.triton_rows import FLOATS, NEAR, launch
from longtrace.kernels.once import refuse_double_backward

WIDEST = 256  # head dim
FAR = 2**30  # stands for an open side in sums of positions that fit 32 bits
LOG2_E = math.log2(math.e)
DELTA = {"BLOCK": 16, "num_warps": 4}


def _sizes(block_m: int, block_n: int, warps: int, stages: int) -> dict[str, int]:
    return {"BLOCK_M": block_m, "BLOCK_N": block_n, "num_warps": warps, "num_stages": stages}


# (kernel, operand, width) -> {family: sizes}; width is the padded head dim, the larger of D and Dv. "any" serves what
# has no entry of its own, within 99 KiB of shared memory; "... softcap" goes first under a softcap, whose tanh takes
# registers. Chosen so that nothing spills, with Triton 3.9 on every part and with 3.6 on sm_90 (docs/gpu.md).
SIZES: dict[tuple[str, str, int], dict[str, dict[str, int]]] = {
    ("forward", "narrow", 64): {
        "any": _sizes(128, 64, 4, 3),
        "blackwell": _sizes(128, 64, 8, 2),
        "rtx softcap": _sizes(128, 64, 8, 2),
    },
    ("forward", "narrow", 128): {"any": _sizes(128, 64, 8, 2), "hopper": _sizes(128, 64, 8, 3)},
    ("forward", "narrow", 256): {"any": _sizes(64, 32, 8, 2), "hopper": _sizes(128, 32, 8, 2)},
    ("dk_dv", "narrow", 64): {
        "any": _sizes(16, 64, 4, 2),
        "ampere": _sizes(32, 64, 4, 1),
        "blackwell": _sizes(32, 32, 4, 2),
    },
    ("dk_dv", "narrow", 128): {
        "any": _sizes(32, 32, 8, 2),
        "hopper": _sizes(16, 128, 8, 2),
        "hopper softcap": _sizes(32, 32, 8, 2),
        "amd": _sizes(32, 32, 4, 1),
    },
    ("dk_dv", "narrow", 256): {"any": _sizes(32, 32, 8, 1), "amd": _sizes(16, 32, 4, 1)},
    ("dq", "narrow", 64): {"any": _sizes(64, 64, 4, 2)},
    ("dq", "narrow", 128): {"any": _sizes(64, 32, 4, 2), "hopper": _sizes(128, 64, 8, 2)},
    ("dq", "narrow", 256): {"any": _sizes(32, 32, 4, 2)},
    ("forward", "fp32", 64): {"any": _sizes(32, 32, 4, 2)},
    ("forward", "fp32", 128): {"any": _sizes(32, 16, 8, 1)},
    ("forward", "fp32", 256): {"any": _sizes(16, 16, 8, 1), "rtx": _sizes(32, 16, 8, 1)},
    ("dk_dv", "fp32", 64): {"any": _sizes(32, 16, 8, 1)},
    ("dk_dv", "fp32", 128): {"any": _sizes(16, 16, 8, 1), "ampere": _sizes(32, 16, 8, 1)},
    ("dk_dv", "fp32", 256): {"any": _sizes(16, 16, 8, 1), "amd": _sizes(16, 16, 4, 1)},
    ("dq", "fp32", 64): {"any": _sizes(32, 32, 4, 2)},
    ("dq", "fp32", 128): {"any": _sizes(16, 16, 8, 2)},
    ("dq", "fp32", 256): {"any": _sizes(16, 16, 8, 2), "amd": _sizes(16, 16, 4, 1)},
}


def family(arch: str) -> str:
    """The row of `SIZES` for a part: "sm_90", "gfx942", ..."""
    if arch.startswith("gfx"):
        return "amd"
    return {"8": "ampere", "9": "hopper", "10": "blackwell", "12": "rtx"}.get(arch[3:-1], "any")


@lru_cache
def _arch(device: torch.device) -> str:
    if device.type != "cuda":  # the interpreter
        return "sm_80"
    if torch.version.hip is not None:
        return torch.cuda.get_device_properties(device).gcnArchName.split(":")[0]
    return "sm_{}{}".format(*torch.cuda.get_device_capability(device))


def padded(width: int) -> int:
    """The power of two that a head dim fills inside the kernels."""
    return max(16, triton.next_power_of_2(width))


def sizes(kernel: str, dtype: torch.dtype, D: int, DV: int, softcap: bool, arch: str) -> dict[str, Any]:
    """Block sizes, warps and stages of "forward", "dk_dv" or "dq" on `arch`."""
    operand = "fp32" if dtype == torch.float32 else "narrow"
    table = SIZES[kernel, operand, max(64, padded(D), padded(DV))]
    names = [family(arch), "any"]
    if softcap:
        names = [f"{name} softcap" for name in names] + names
    chosen = next(table[name] for name in names if name in table)
    return {**chosen, "BLOCK_D": padded(D), "BLOCK_DV": padded(DV)}


def factors(scale: float, softcap: float | None) -> tuple[float, float]:
    """(inner, outer): the softmax is of 2^(outer s), or with a softcap of 2^(outer tanh(inner s)), s = q k."""
    return (0.0, scale * LOG2_E) if softcap is None else (scale / softcap, softcap * LOG2_E)


def wide_rows(x: Tensor) -> Tensor:
    """`x` (tokens, heads, D) as the kernels load it: 16-byte rows of adjacent values, copied if it has to be.

    Tokens lie nearer than NEAR: `rows_of` counts from the first row of its block in 32 bits.
    """
    wide = x.stride(2) == 1 and x.stride(0) % 8 == 0 and x.stride(1) % 8 == 0 and x.data_ptr() % 16 == 0
    return x if wide and x.stride(0) < NEAR else x.clone(memory_format=torch.contiguous_format)


class Attention(torch.autograd.Function):
    """out (T, heads, Dv) of q, k, v with D and Dv multiples of 8; sides of -1 are open."""

    @staticmethod
    def forward(ctx, q, k, v, sinks, offsets_q, offsets_k, scale, left, right, softcap):
        q, k, v = wide_rows(q), wide_rows(k), wide_rows(v)
        (T, heads, D), DV = q.shape, v.shape[2]
        out = q.new_zeros(T, heads, DV)  # tokens after the last offset, should there be any, read 0
        stats = q.new_zeros(2, heads, T, dtype=torch.float32)  # a log-sum of inf: p = 0 there in the backward too
        stats[1] = float("inf")
        ctx.options = (scale, left, right, softcap)
        arguments, flags = _arguments(q, k, v, offsets_q, *ctx.options)
        config = sizes("forward", q.dtype, D, DV, softcap is not None, _arch(q.device))
        grid = (T // config["BLOCK_M"] + offsets_q.numel() - 1, heads)
        launch(
            forward_kernel, grid, q, k, v, sinks, offsets_q, offsets_k, out, stats, *arguments,
            *factors(scale, softcap), left, right, *flags, sinks is not None, _is_padded(D, DV), **config,
        )  # fmt: skip
        ctx.save_for_backward(q, k, v, sinks, offsets_q, offsets_k, out, stats)
        return out

    @staticmethod
    def backward(ctx, d_out):
        refuse_double_backward("varlen_attention")
        q, k, v, sinks, offsets_q, offsets_k, out, stats = ctx.saved_tensors
        scale, left, right, softcap = ctx.options
        (T, heads, D), DV = q.shape, v.shape[2]
        d_out = wide_rows(d_out)
        delta = torch.empty_like(stats[0])
        launch(
            delta_kernel, (triton.cdiv(T, DELTA["BLOCK"]), heads), out, d_out, delta, T, heads, DV, d_out.stride(0),
            d_out.stride(1), _is_padded(DV, DV), BLOCK_DV=padded(DV), **DELTA,
        )  # fmt: skip
        arguments, flags = _arguments(q, k, v, offsets_q, *ctx.options)
        rest = (
            *arguments, d_out.stride(0), d_out.stride(1), *factors(scale, softcap), scale, left, right, *flags,
            _is_padded(D, DV),
        )  # fmt: skip
        inputs = (q, k, v, d_out, stats, delta, offsets_q, offsets_k)
        dq = dk = dv = d_sinks = None
        documents = offsets_q.numel() - 1
        if ctx.needs_input_grad[1] or ctx.needs_input_grad[2]:
            dk, dv = k.new_zeros(k.shape), v.new_zeros(v.shape)
            config = sizes("dk_dv", q.dtype, D, DV, softcap is not None, _arch(q.device))
            grid = (k.shape[0] // config["BLOCK_N"] + documents, k.shape[1])
            launch(dk_dv_kernel, grid, *inputs, dk, dv, *rest, **config)
        if ctx.needs_input_grad[0]:
            dq = q.new_zeros(q.shape)
            config = sizes("dq", q.dtype, D, DV, softcap is not None, _arch(q.device))
            launch(dq_kernel, (T // config["BLOCK_M"] + documents, heads), *inputs, dq, *rest, **config)
        if ctx.needs_input_grad[3]:  # the sink's own probability times -delta, as its value is 0
            outer = factors(scale, softcap)[1]
            p = torch.exp2((sinks.float()[:, None] * (LOG2_E / outer) - stats[0]) * outer - stats[1])
            d_sinks = -(p * delta).sum(1).to(sinks.dtype)
        return dq, dk, dv, d_sinks, None, None, None, None, None, None


def _is_padded(D: int, DV: int) -> bool:
    return padded(D) != D or padded(DV) != DV


def _arguments(q, k, v, offsets_q, scale, left, right, softcap) -> tuple[tuple, tuple]:
    """The sizes and the feature flags that the kernels share, in their order."""
    (_, heads, D), documents = q.shape, offsets_q.numel() - 1
    strides = [x.stride(i) for x in (q, k, v) for i in (0, 1)]
    numbers = (documents, (documents - 1).bit_length(), q.shape[0], heads, heads // k.shape[1], D, v.shape[2], *strides)
    return numbers, (left >= 0, right >= 0, softcap is not None)


def varlen_attention(
    q: Tensor, k: Tensor, v: Tensor, offsets_q: Tensor, offsets_k: Tensor, causal: bool, scale: float,
    window: tuple[int, int], softcap: float | None, sinks: Tensor | None,
) -> Tensor:  # fmt: skip
    """(T, heads, Dv) from packed q (T, heads, D), k and v (Tk, kv heads, D or Dv), all fp32, bf16 or fp16, widths <= 256.

    offsets_q, offsets_k (documents + 1,) int32 on the device, never read back; window sides of -1 are open; sinks
    (heads,). Gradients for q, k, v and sinks, once differentiable, bitwise repeatable. ValueError for other dtypes and
    widths.
    """
    (_, _, D), DV = q.shape, v.shape[2]
    if q.dtype not in FLOATS or max(D, DV) > WIDEST:
        raise ValueError(f"head dims {D} and {DV} of {q.dtype}; accepted: up to {WIDEST} of fp32, bf16 or fp16")
    left, right = (min(side, FAR) if side >= 0 else -1 for side in window)
    if scale < 0:  # the kernels take maxima of unscaled scores
        q, scale = -q, -scale
    scale = max(scale, 1e-30)  # not 0: masked scores are -inf, and 0 times that is NaN
    if D % 8:  # zeros change no score
        q, k = (F.pad(x, (0, -D % 8)) for x in (q, k))
    if DV % 8:
        v = F.pad(v, (0, -DV % 8))
    sinks = None if sinks is None else sinks.contiguous()
    out = Attention.apply(
        q, k, v, sinks, offsets_q.contiguous(), offsets_k.contiguous(), scale, left, 0 if causal else right, softcap
    )
    return out[:, :, :DV] if DV % 8 else out

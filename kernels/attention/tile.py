"""`varlen_attention` on the CPU: the C++ tiles of csrc/cpu/attention.cpp, their autograd glue and paddings."""

from __future__ import annotations

import itertools
import math

import torch
import torch.nn.functional as F
from torch import Tensor

from longtrace.kernels import extension
from longtrace.kernels.once import refuse_double_backward

DTYPES = (torch.bfloat16, torch.float16, torch.float32)
WIDTH = 32  # head dims are whole panels
FAR = 2**40  # beyond any document: positions plus it do not overflow


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: list[int],
    starts_k: list[int],
    causal: bool,
    scale: float,
    window: tuple[int, int],
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """(T, heads, Dv) from packed q (T, heads, D), k and v (Tk, kv heads, D or Dv); window sides of -1 are open.

    Work is cut in blocks of queries (forward) and of keys (backward), whatever documents they belong to; the same bits
    for any number of threads. Saved for the backward: the inputs, the output and two fp32 numbers a row and head.
    """
    width, dtype = v.shape[2], q.dtype
    if dtype != torch.float16 and _decodes(q, k, v, sinks, starts_q):
        return decode(q, k, v, starts_q, starts_k, scale, window, softcap, sinks)
    native = torch.bfloat16 if extension.BF16_OPERANDS and dtype == torch.bfloat16 else torch.float32
    q, k, v = (_whole_panels(x.to(native)).contiguous() for x in (q, k, v))
    starts = [torch.tensor(x, dtype=torch.int64, device="cpu") for x in (starts_q, starts_k)]
    window = tuple(min(side, FAR) for side in window)
    sinks = None if sinks is None else sinks.float().contiguous()
    out = TileAttention.apply(q, k, v, sinks, *starts, scale, softcap or 0.0, causal, *window)
    return out[..., :width].to(dtype)


def _decodes(q: Tensor, k: Tensor, v: Tensor, sinks: Tensor | None, starts_q: list[int]) -> bool:
    """One query a document at most, and no gradient asked for: what decoding asks."""
    if torch.is_grad_enabled() and any(x is not None and x.requires_grad for x in (q, k, v, sinks)):
        return False
    return q.shape[0] > 0 and all(b - a <= 1 for a, b in itertools.pairwise(starts_q))


def decode(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: list[int],
    starts_k: list[int],
    scale: float,
    window: tuple[int, int],
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """(T, heads, Dv) where each document has one query, its last position, at most; bf16 or fp32, any head dim.

    Every key that is seen is read once; a document without a query costs nothing, so gaps in a cache are free.
    """
    starts = [torch.tensor(x, dtype=torch.int64, device="cpu") for x in (starts_q, starts_k)]
    sinks = None if sinks is None else sinks.float().contiguous()
    q, k, v = (x.contiguous() for x in (q, k, v))
    return torch.ops.longtrace.attention_decode(q, k, v, *starts, scale, softcap or 0.0, min(window[0], FAR), sinks)


def _whole_panels(x: Tensor) -> Tensor:
    short = -x.shape[2] % WIDTH
    return F.pad(x, (0, short)) if short else x  # padding by nothing would copy


class TileAttention(torch.autograd.Function):
    @staticmethod
    def forward(ctx, q, k, v, sinks, starts_q, starts_k, scale, softcap, causal, left, right):
        out, *sums = torch.ops.longtrace.attention_forward(
            q, k, v, starts_q, starts_k, scale, softcap, causal, left, right, sinks
        )
        ctx.save_for_backward(q, k, v, sinks, starts_q, starts_k, out, *sums)
        ctx.how = (scale, softcap, causal, left, right)
        return out

    @staticmethod
    def backward(ctx, grad):
        refuse_double_backward("varlen_attention")
        q, k, v, sinks, starts_q, starts_k, out, reference, log_sum = ctx.saved_tensors
        dq, dk, dv, delta = torch.ops.longtrace.attention_backward(
            grad.contiguous(), q, k, v, out, reference, log_sum, starts_q, starts_k, *ctx.how
        )
        # a sink has no value: its gradient is -p_sink * delta, summed over the queries
        dsinks = None if sinks is None else -(torch.exp2(sinks / math.log(2) - reference - log_sum) * delta).sum(0)
        return dq, dk, dv, dsinks, *[None] * 7

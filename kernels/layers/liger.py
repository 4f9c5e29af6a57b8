"""Liger's Triton kernels for CUDA, through wrappers that leave inputs and saved tensors as they were.

Liger rotates q and k in place and writes the gated activations' gradients over gate and up, past autograd's version
counters: a second backward would read gradients for activations. Copies cost one pass; wrong gradients cost a run.
"""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from longtrace.kernels.once import refuse_double_backward

FOUND = importlib.util.find_spec("liger_kernel") is not None


def rms_norm(x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, offset: float = 0.0):
    casting = "llama" if offset == 0 else "gemma"
    if residual is None:
        from liger_kernel.ops.rms_norm import LigerRMSNormFunction

        return LigerRMSNormFunction.apply(x, weight, eps, offset, casting, False)
    from liger_kernel.ops.fused_add_rms_norm import LigerFusedAddRMSNormFunction

    return LigerFusedAddRMSNormFunction.apply(x, residual, weight, eps, offset, casting, False)


class Rope(torch.autograd.Function):
    """q and k (T, heads, D), the whole of D rotated; cos and sin (T, D), whose halves are the same."""

    @staticmethod
    def forward(ctx, q, k, cos, sin):
        from liger_kernel.ops.rope import rope_forward

        ctx.save_for_backward(cos, sin)
        return _in_place(rope_forward, q, k, cos, sin)

    @staticmethod
    def backward(ctx, dq, dk):
        from liger_kernel.ops.rope import rope_backward

        refuse_double_backward("rope")
        return *_in_place(rope_backward, dq, dk, *ctx.saved_tensors), None, None


def _in_place(rotate, q: Tensor, k: Tensor, cos: Tensor, sin: Tensor) -> tuple[Tensor, Tensor]:
    q, k = (x.clone(memory_format=torch.contiguous_format)[None].transpose(1, 2) for x in (q, k))
    q, k = rotate(q, k, cos[None], sin[None])[:2]
    return q.transpose(1, 2)[0], k.transpose(1, 2)[0]


def _glu_kernels(gelu: bool):
    if gelu:
        from liger_kernel.ops.geglu import geglu_backward, geglu_forward

        return geglu_forward, geglu_backward
    from liger_kernel.ops.swiglu import swiglu_backward, swiglu_forward

    return swiglu_forward, swiglu_backward


class Glu(torch.autograd.Function):
    """act(gate) * up, act gelu (tanh) or silu; gate and up (n, I)."""

    @staticmethod
    def forward(ctx, gate, up, gelu):
        gate, up = gate.contiguous(), up.contiguous()
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return _glu_kernels(gelu)[0](gate, up)[2]

    @staticmethod
    def backward(ctx, dy):
        refuse_double_backward("swiglu or geglu")
        gate, up = ctx.saved_tensors
        return *_glu_kernels(ctx.gelu)[1](gate.clone(), up.clone(), dy.contiguous()), None

"""The C++ layer ops (csrc/layer_ops.cpp) as autograd functions on matrices of rows; differentiable once.

Kept for the backward: the normalised input and 1 / rms of each row; gate and up; cos and sin. Nothing else.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtrace.kernels import extension
from longtrace.kernels.once import refuse_double_backward


def dense(x: Tensor) -> Tensor:
    """x itself if its last dimension is dense in memory, else a copy."""
    return x if x.shape[-1] <= 1 or x.stride(-1) == 1 else x.contiguous()


class RMSNorm(torch.autograd.Function):
    """y, or (y, x + residual); x and residual (n, H)."""

    @staticmethod
    def forward(ctx, x, residual, weight, eps, offset):
        y, total, scale = torch.ops.longtrace.rms_norm(x, residual, weight, eps, offset)
        ctx.save_for_backward(x if residual is None else total, scale, weight)
        ctx.offset = offset
        ctx.set_materialize_grads(False)
        return y if residual is None else (y, total)

    @staticmethod
    def backward(ctx, dy, dtotal=None):
        refuse_double_backward("rms_norm")
        x, scale, weight = ctx.saved_tensors
        if dy is None:
            return dtotal, dtotal, None, None, None
        dx, dweight = torch.ops.longtrace.rms_norm_backward(
            dense(dy), None if dtotal is None else dense(dtotal), x, scale, weight, ctx.offset, ctx.needs_input_grad[2]
        )
        dweight = dweight.to(weight.dtype) if ctx.needs_input_grad[2] else None
        return dx, dx if ctx.needs_input_grad[1] else None, dweight, None, None


class Rope(torch.autograd.Function):
    """(q, k) rotated; q and k (T, heads, D), cos and sin (T, rotary_dim) or half as wide."""

    @staticmethod
    def forward(ctx, q, k, cos, sin, rotary_dim):
        ctx.save_for_backward(cos, sin)
        ctx.rotary_dim = rotary_dim
        return torch.ops.longtrace.rope(q, k, cos, sin, rotary_dim, False)

    @staticmethod
    def backward(ctx, dq, dk):
        refuse_double_backward("rope")
        cos, sin = ctx.saved_tensors
        dq, dk = torch.ops.longtrace.rope(dense(dq), dense(dk), cos, sin, ctx.rotary_dim, True)
        return dq, dk, None, None, None


class Glu(torch.autograd.Function):
    """act(gate) * up, act gelu (tanh) or silu; gate and up (n, I)."""

    @staticmethod
    def forward(ctx, gate, up, gelu):
        ctx.save_for_backward(gate, up)
        ctx.gelu = gelu
        return torch.ops.longtrace.glu(gate, up, gelu)

    @staticmethod
    def backward(ctx, dy):
        refuse_double_backward("swiglu or geglu")
        gate, up = ctx.saved_tensors
        return *torch.ops.longtrace.glu_backward(dense(dy), gate, up, ctx.gelu), None


if extension.LOADED:

    @torch.library.register_fake("longtrace::rms_norm")
    def _(x, residual, weight, eps, offset):
        rows = (0 if residual is None else x.shape[0], x.shape[1])
        return x.new_empty(x.shape), x.new_empty(rows), x.new_empty(x.shape[0], dtype=torch.float32)

    @torch.library.register_fake("longtrace::rms_norm_backward")
    def _(dy, dsum, x, scale, weight, offset, needs_dweight):
        return x.new_empty(x.shape), x.new_empty(x.shape[1] if needs_dweight else 0, dtype=torch.float32)

    @torch.library.register_fake("longtrace::rope")
    def _(q, k, cos, sin, rotary_dim, backward):
        return q.new_empty(q.shape), k.new_empty(k.shape)

    @torch.library.register_fake("longtrace::glu")
    def _(gate, up, gelu):
        return gate.new_empty(gate.shape)

    @torch.library.register_fake("longtrace::glu_backward")
    def _(dy, gate, up, gelu):
        return gate.new_empty(gate.shape), gate.new_empty(gate.shape)

"""The layer ops in plain PyTorch, rounding where transformers' own modules round; fp64 stays fp64."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, offset: float = 0.0
) -> Tensor | tuple[Tensor, Tensor]:
    """x / sqrt(mean(x^2) + eps) * (offset + weight) over the last dimension; with a residual also x + residual."""
    if residual is not None:
        x = x + residual
    wide = x.to(torch.float64 if x.dtype == torch.float64 else torch.float32)
    normed = wide * torch.rsqrt(wide.square().mean(-1, keepdim=True) + eps)
    if offset == 0:  # Llama: rounded before the weight
        y = weight * normed.to(x.dtype)
    else:  # Gemma: after it
        y = (normed * (offset + weight.to(wide.dtype))).to(x.dtype)
    return y if residual is None else (y, x)


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, rotary_dim: int) -> tuple[Tensor, Tensor]:
    """x cos + rotate_half(x) sin on the first `rotary_dim` entries of each head; tables of half the width are doubled."""
    if cos.shape[-1] != rotary_dim:
        cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
    cos, sin = cos.unsqueeze(-2), sin.unsqueeze(-2)

    def rotate(x: Tensor) -> Tensor:
        turned, kept = x[..., :rotary_dim], x[..., rotary_dim:]
        first, second = turned.chunk(2, -1)
        turned = turned * cos + torch.cat((-second, first), -1) * sin
        return torch.cat((turned, kept), -1) if kept.shape[-1] else turned

    return rotate(q), rotate(k)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up"""
    return F.silu(gate) * up


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up, gelu by its tanh formula"""
    return F.gelu(gate, approximate="tanh") * up

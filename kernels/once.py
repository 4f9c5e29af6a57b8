"""Ops that are differentiable once."""

from __future__ import annotations

import torch


def refuse_double_backward(op: str) -> None:
    """Raise RuntimeError under create_graph=True; torch's once_differentiable would let a gradient penalty pass as a constant."""
    if torch.is_grad_enabled() and not torch.compiler.is_compiling():
        raise RuntimeError(f"{op} is differentiable once: create_graph=True is not supported")

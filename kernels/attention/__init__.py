"""Attention over packed documents."""

from longtrace.kernels.attention.dispatch import varlen_attention
from longtrace.kernels.attention.transformers import register_attention

__all__ = ["register_attention", "varlen_attention"]

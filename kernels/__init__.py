"""Fused kernels for training on long traces; the public names of `longtrace.kernels`."""

if __name__ == "kernels":  # transformers imports PyPI's `kernels`; from the clone's root it must never find this folder
    raise ImportError("this folder is longtrace.kernels, not the PyPI package `kernels`")

from importlib.metadata import version

from longtrace.kernels.attention import register_attention, varlen_attention
from longtrace.kernels.explain import explain
from longtrace.kernels.head import (
    LogProbs,
    linear_cross_entropy,
    linear_log_prob,
    linear_weighted_nll,
    plan_chunks,
)
from longtrace.kernels.packing import pack

__version__ = version("longtrace")
__all__ = [
    "LogProbs",
    "explain",
    "linear_cross_entropy",
    "linear_log_prob",
    "linear_weighted_nll",
    "pack",
    "plan_chunks",
    "register_attention",
    "varlen_attention",
]

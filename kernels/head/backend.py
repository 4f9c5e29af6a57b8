"""Chooses who runs the row-wise passes of the head, and remembers why: C++ on CPU fp32 logits, else PyTorch."""

from __future__ import annotations

import torch
from torch import Tensor

from longtrace.kernels import extension
from longtrace.kernels.head import epilogue
from longtrace.kernels.head.epilogue import RowStats

BLAS = "fp32 and fp64 by BLAS (bitwise at a fixed number of threads)"


def _cpp(logits: Tensor) -> bool:
    return extension.LOADED and logits.device.type == "cpu" and logits.dtype == torch.float32


def softmax_stats(logits: Tensor, target: Tensor, entropy: bool) -> RowStats:
    """As `epilogue.softmax_stats`."""
    if not _cpp(logits):
        return epilogue.softmax_stats(logits, target, entropy)
    maximum, log_sum, log_prob, ent = torch.ops.longtrace.softmax_stats(logits, target, entropy)
    return RowStats(maximum, log_sum, log_prob, ent if entropy else None)


def dlogits_(logits: Tensor, target: Tensor, stats: RowStats, a: Tensor, b: Tensor, e: Tensor | None) -> None:
    """As `epilogue.dlogits_`."""
    if not _cpp(logits):
        epilogue.dlogits_(logits, target, stats, a, b, e)
        return
    entropy = None if e is None else stats.entropy
    torch.ops.longtrace.dlogits_(logits, target, stats.maximum, stats.log_sum, a, b, entropy, e)


def gemm_backend(device: str) -> tuple[str, str]:
    """(backend, why) of the head's matrix products."""
    if device == "cuda":
        return "cuBLAS", "bf16 operands, fp32 accumulation and results; fp32 and fp64 in their own precision"
    if torch.backends.mkldnn.is_available():
        return "torch.mm", f"bf16 by oneDNN's bf16 dot products with fp32 results; fp16 as fp32; {BLAS}"
    return "torch.mm", f"bf16 and fp16 as fp32: this torch has no oneDNN; {BLAS}"


def softmax_backend(device: str) -> tuple[str, str]:
    """(backend, why) of the head's row-wise passes."""
    if device == "cpu" and extension.LOADED:
        return "C++", f"longtrace.kernels._C, {torch.ops.longtrace.cpu_capability()}; fp64 in PyTorch"
    return "PyTorch", extension.WHY if device == "cpu" else "the C++ passes are for CPU"

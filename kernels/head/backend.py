"""Chooses who runs the row-wise passes of the head, and remembers why."""

from __future__ import annotations

from torch import Tensor

from longtrace.kernels.head import epilogue
from longtrace.kernels.head.epilogue import RowStats


def softmax_stats(logits: Tensor, target: Tensor, entropy: bool) -> RowStats:
    """As `epilogue.softmax_stats`."""
    return epilogue.softmax_stats(logits, target, entropy)


def dlogits_(logits: Tensor, target: Tensor, stats: RowStats, a: Tensor, b: Tensor, e: Tensor | None) -> None:
    """As `epilogue.dlogits_`."""
    epilogue.dlogits_(logits, target, stats, a, b, e)


def gemm_backend(device: str) -> tuple[str, str]:
    """(backend, why) of the head's matrix products."""
    if device == "cuda":
        return "cuBLAS", "bf16 operands, fp32 accumulation and results; fp32 and fp64 in their own precision"
    return "torch.mm", "bf16 by oneDNN's bf16 dot products with fp32 results; fp16 in fp32; fp32 and fp64 by BLAS"


def softmax_backend(device: str) -> tuple[str, str]:
    """(backend, why) of the head's row-wise passes."""
    return "PyTorch", "plain tensor operations"

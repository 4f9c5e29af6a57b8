"""The engine of one head call, and its chunks."""

from __future__ import annotations

from torch import Tensor

from longtrace.kernels.head.backend import choose
from longtrace.kernels.head.engine import TorchEngine
from longtrace.kernels.head.plan import Chunks, plan_chunks
from longtrace.kernels.head.spec import Transform
from longtrace.kernels.head.tile import TileEngine


def engine(
    rows: int,
    weight: Tensor,
    bias: Tensor | None,
    transform: Transform,
    budget_mb: float | None,
    elementwise: bool = False,
) -> tuple[TorchEngine | TileEngine, Chunks]:
    """The engine for one call over `rows` rows and its chunks; `elementwise`: label smoothing under a softcap."""
    V, H = weight.shape
    backend = choose(weight.device.type, weight.dtype, elementwise=elementwise).backend
    chunks = plan_chunks(rows, H, V, weight.dtype, budget_mb, weight.device.type, backend == "cpu")
    if backend == "cpu":
        return TileEngine(weight, bias, transform), chunks
    if backend == "triton":
        from longtrace.kernels.head.cuda import TritonEngine

        return TritonEngine(weight, bias, transform, chunks.block), chunks
    return TorchEngine(weight, bias, transform, chunks.block), chunks

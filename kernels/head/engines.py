"""The engine of one head call, and its chunks."""

from __future__ import annotations

from torch import Tensor

from longtrace.kernels.head.backend import CPU_TILES, TRITON_PASSES, TRITON_TILES, choose
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
    (V, H), device = weight.shape, weight.device.type
    name = choose(device, weight.dtype, elementwise=elementwise).name
    chunks = plan_chunks(rows, H, V, weight.dtype, budget_mb, device, name)
    return _engine_type(name)(weight, bias, transform, chunks.block), chunks


def _engine_type(name: str) -> type[TorchEngine] | type[TileEngine]:
    if name in (TRITON_TILES, TRITON_PASSES):
        from longtrace.kernels.head.cuda import TritonRows, TritonTiles

        return TritonTiles if name == TRITON_TILES else TritonRows
    return TileEngine if name == CPU_TILES else TorchEngine

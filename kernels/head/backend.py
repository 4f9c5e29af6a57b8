"""Chooses the engine of a head call: C++ tiles on the CPU, Triton on CUDA, else PyTorch; and says why."""

from __future__ import annotations

import torch
from torch import Tensor

from longtrace.kernels import extension
from longtrace.kernels.head import tile
from longtrace.kernels.head.engine import TorchEngine
from longtrace.kernels.head.plan import TRITON, Chunks, has_tiles, plan_chunks
from longtrace.kernels.head.spec import Transform


def engine(
    rows: int,
    weight: Tensor,
    bias: Tensor | None,
    transform: Transform,
    budget_mb: float | None,
    elementwise: bool = False,
) -> tuple[TorchEngine | tile.TileEngine, Chunks]:
    """The engine for one call over `rows` rows and its chunks; `elementwise` asks for what no tile kernel offers."""
    device = weight.device.type
    tiles = not elementwise and has_tiles(device, weight.dtype)
    chunks = plan_chunks(rows, weight.shape[1], weight.shape[0], weight.dtype, budget_mb, device, tiles)
    return _engine_type(weight, tiles)(weight, bias, transform, chunks.block), chunks


def _engine_type(weight: Tensor, tiles: bool) -> type[TorchEngine] | type[tile.TileEngine]:
    """fp64 stays with PyTorch, and on CUDA everything where Triton is missing."""
    if weight.is_cuda and weight.dtype != torch.float64 and TRITON:
        from longtrace.kernels.head.cuda import TritonRows, TritonTiles

        return TritonTiles if tiles else TritonRows
    return tile.TileEngine if tiles else TorchEngine


def describe(device: str) -> tuple[str, str]:
    """(backend, why) of the head ops."""
    if device == "cuda":
        if TRITON:
            why = "bf16 logits never leave their tile, fp16 and fp32 ones do; fp32 sums; not timed on a GPU by this project"
            return "Triton + cuBLAS", why
        return "cuBLAS + PyTorch", "triton is not installed; fp32 logits and sums; not timed on a GPU by this project"
    if extension.LOADED:
        return (
            "C++ tiles",
            f"{torch.ops.longtrace.cpu_capability()}, same bits for any number of threads; fp64 in PyTorch",
        )
    return "PyTorch", f"bf16 by oneDNN with fp32 results, fp16 as fp32; {extension.WHY}"

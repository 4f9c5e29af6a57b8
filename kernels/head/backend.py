"""Chooses the engine of a head call: C++ tiles on the CPU, Triton passes on CUDA, else PyTorch; and says why."""

from __future__ import annotations

import importlib.util

import torch
from torch import Tensor

from longtrace.kernels import extension
from longtrace.kernels.head import tile
from longtrace.kernels.head.engine import TorchEngine
from longtrace.kernels.head.plan import Chunks, plan_chunks
from longtrace.kernels.head.spec import Transform


def engine(
    rows: int,
    weight: Tensor,
    bias: Tensor | None,
    transform: Transform,
    budget_mb: float | None,
    elementwise: bool = False,
) -> tuple[TorchEngine | tile.TileEngine, Chunks]:
    """The engine for one call over `rows` rows and its chunks; `elementwise` asks for what only PyTorch offers."""
    tiles = tile.serves(weight) and not elementwise
    chunks = plan_chunks(rows, weight.shape[1], weight.shape[0], weight.dtype, budget_mb, weight.device.type, tiles)
    if tiles:
        return tile.TileEngine(weight, bias, transform), chunks
    return _torch_engine(weight)(weight, bias, transform, chunks.block), chunks


def _torch_engine(weight: Tensor) -> type[TorchEngine]:
    """PyTorch passes, or Triton's on CUDA where triton is installed; fp64 stays with PyTorch."""
    if weight.is_cuda and weight.dtype != torch.float64 and importlib.util.find_spec("triton") is not None:
        from longtrace.kernels.head.cuda import TritonEngine

        return TritonEngine
    return TorchEngine


def describe(device: str) -> tuple[str, str]:
    """(backend, why) of the head ops."""
    if device == "cuda":
        passes = "Triton" if importlib.util.find_spec("triton") is not None else "PyTorch"
        return f"cuBLAS + {passes}", "16-bit operands, fp32 logits and sums; not timed on a GPU by this project"
    if extension.LOADED:
        return (
            "C++ tiles",
            f"{torch.ops.longtrace.cpu_capability()}, same bits for any number of threads; fp64 in PyTorch",
        )
    return "PyTorch", f"bf16 by oneDNN with fp32 results, fp16 as fp32; {extension.WHY}"

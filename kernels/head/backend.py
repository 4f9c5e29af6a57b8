"""Which engine serves a head call: C++ tiles on the CPU, Triton and cuBLAS on CUDA, else PyTorch; and why."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from longtrace.kernels import backend, extension
from longtrace.kernels.backend import Candidate, Choice

CPU_TILES, TRITON_TILES, TRITON_PASSES, PYTORCH = "C++ tiles", "Triton tiles", "Triton passes", "PyTorch"


def choose(device: str, dtype: torch.dtype, *, elementwise: bool = False) -> Choice:
    """The engine for weights of `dtype` on `device`; `elementwise`: label smoothing under a softcap."""
    return backend.choose("head", _candidates, device, dtype, elementwise)


def _candidates(device: str, dtype: torch.dtype, elementwise: bool) -> Iterator[Candidate]:
    if device == "cpu":
        lacks = "" if extension.LOADED else extension.WHY
        if dtype == torch.float64:
            lacks = "the tiles take bf16, fp16 and fp32"
        elif elementwise:
            lacks = lacks or "the tiles have no label smoothing under a softcap"
        why = "" if lacks else f"{torch.ops.longtrace.cpu_capability()}, same bits for any number of threads"
        yield Candidate("cpu", CPU_TILES, lacks or f"{why}; fp64 in PyTorch", not lacks)
    if device == "cuda":
        yield from _triton(device, dtype, elementwise)
    on_cpu = "bf16 by oneDNN with fp32 results, fp16 as fp32"
    yield Candidate("reference", PYTORCH, on_cpu if device == "cpu" else "16-bit operands, fp32 logits and sums")
    if device != "cuda":
        yield from _triton(device, dtype, elementwise)


def _triton(device: str, dtype: torch.dtype, elementwise: bool) -> Iterator[Candidate]:
    lacks = "the passes take bf16, fp16 and fp32" if dtype == torch.float64 else backend.triton_lacks(device)
    untimed = "not timed on a GPU by this project"
    if not lacks:
        no_tiles = "" if dtype == torch.bfloat16 else "the tiles take bf16"
        no_tiles = no_tiles or ("the tiles have no label smoothing under a softcap" if elementwise else "")
        why = f"bf16 logits never leave their tile, gradients by cuBLAS, sums in fp32; {untimed}"
        yield Candidate("triton", TRITON_TILES, no_tiles or why, not no_tiles)
    yield Candidate("triton", TRITON_PASSES, lacks or f"fp32 logits by cuBLAS, sums in fp32; {untimed}", not lacks)

"""Which engine serves a head call: C++ tiles on the CPU, cuBLAS with Triton passes on CUDA, else PyTorch; and why."""

from __future__ import annotations

from collections.abc import Iterator

import torch

from longtrace.kernels import backend, extension
from longtrace.kernels.backend import Candidate, Choice


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
        yield Candidate("cpu", "C++ tiles", lacks or f"{why}; fp64 in PyTorch", not lacks)
    if device == "cuda":
        yield _passes(device, dtype)
    on_cpu = "bf16 by oneDNN with fp32 results, fp16 as fp32"
    yield Candidate("reference", "PyTorch", on_cpu if device == "cpu" else "16-bit operands, fp32 logits and sums")
    if device != "cuda":
        yield _passes(device, dtype)


def _passes(device: str, dtype: torch.dtype) -> Candidate:
    lacks = "the passes take bf16, fp16 and fp32" if dtype == torch.float64 else backend.triton_lacks(device)
    why = "16-bit operands, fp32 logits and sums; not timed on a GPU by this project"
    return Candidate("triton", "cuBLAS + Triton" if device == "cuda" else "Triton", lacks or why, not lacks)

"""The CUDA C++ kernels (csrc/cuda) on torch tensors: ctypes, data pointers and the current stream, nothing else.

setup.py builds the library where nvcc is. The tests run its sources on the host; it has not been run on a GPU yet.
"""

from __future__ import annotations

import ctypes
import os
from collections.abc import Iterable, Sequence
from pathlib import Path

import torch
from torch import Tensor

LIBRARY = Path(__file__).with_name("_cuda.abi3.so")
POINTER, INT, INT64, FLOAT = ctypes.c_void_p, ctypes.c_int, ctypes.c_int64, ctypes.c_float
SIGNATURES = {  # csrc/cuda/longtrace_cuda.h
    "longtrace_group_advantages": [POINTER, POINTER, INT64, INT, INT, INT, POINTER, POINTER, POINTER, POINTER],
    "longtrace_blend_chunk": [],
    "longtrace_blend_gradients": [POINTER, INT64, INT64, FLOAT, FLOAT, POINTER, POINTER, POINTER],
    "longtrace_pack_rows": [POINTER, POINTER, INT64, INT64, INT64, INT64, INT64, POINTER, POINTER],
    "longtrace_unpack_rows": [POINTER, POINTER, INT64, INT64, INT64, INT64, INT64, POINTER, POINTER],
}


def declare(library: ctypes.CDLL) -> ctypes.CDLL:
    """The library with the argument types of its functions; AttributeError if one is not there."""
    for name, types in SIGNATURES.items():
        function = getattr(library, name)
        function.argtypes, function.restype = types, INT if types else INT64
    return library


def _load(library: Path) -> tuple[ctypes.CDLL | None, str]:
    """The library, or None, and why."""
    if os.environ.get("LONGTRACE_EXTENSION") == "0":
        return None, "LONGTRACE_EXTENSION=0"
    if not library.exists():
        return None, "longtrace.kernels._cuda was not built (no nvcc at build time: docs/install.md)"
    try:
        return declare(ctypes.CDLL(str(library))), "longtrace.kernels._cuda; run on the host in tests, not on a GPU yet"
    except (OSError, AttributeError) as error:
        return None, f"longtrace.kernels._cuda does not load: {(str(error).splitlines() or [type(error).__name__])[0]}"


_library, WHY = _load(LIBRARY)
LOADED = _library is not None


def _launch(name: str, device: torch.device, *arguments: Tensor | int | float) -> None:
    with torch.cuda.device(device):
        values = (x.data_ptr() if isinstance(x, Tensor) else x for x in arguments)
        error = getattr(_library, name)(*values, torch.cuda.current_stream().cuda_stream)
    if error:
        raise RuntimeError(f"{name}: CUDA error {error}")


def group_advantages(
    rewards: Tensor, offsets: Tensor, by_std: bool, leave_one_out: bool, sample: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(values, degenerate, counts); rewards (N,) fp32 and contiguous, offsets (G + 1,) int64, checked by the caller."""
    groups, offsets = len(offsets) - 1, offsets.to(rewards.device, non_blocking=True)
    values, degenerate = torch.empty_like(rewards), rewards.new_empty(groups, dtype=torch.bool)
    counts = rewards.new_zeros(4, dtype=torch.int64)
    how = (by_std, leave_one_out, sample)
    _launch("longtrace_group_advantages", rewards.device, rewards, offsets, groups, *how, values, degenerate, counts)
    return values, degenerate, counts


def blend_table(pairs: Iterable[tuple[int, int, int, bool, bool]], chunk: int) -> tuple[Tensor, int]:
    """LongtracePair rows (count, 6) int64 of (trace address, empty address, n, trace is bf16, empty is bf16); chunks in all."""
    rows, chunks = [], 0
    for trace, empty, n, *bf16 in pairs:
        rows.append([trace, empty, n, chunks, *bf16])
        chunks += -(-n // chunk)
    return torch.tensor(rows, dtype=torch.int64), chunks


def blend_gradients_(trace_grads: Sequence[Tensor], empty_grads: Sequence[Tensor], alpha: float) -> Tensor:
    """As reference.blend_gradients_ of bf16 and fp32 tensors, contiguous, at least one pair, checked by the caller."""
    device, bf16 = trace_grads[0].device, torch.bfloat16
    pairs = (
        (t.data_ptr(), e.data_ptr(), t.numel(), t.dtype == bf16, e.dtype == bf16)
        for t, e in zip(trace_grads, empty_grads)
    )
    table, chunks = blend_table(pairs, _library.longtrace_blend_chunk())
    table = table.to(device, non_blocking=True)
    partial = torch.empty(chunks, 4, dtype=torch.float64, device=device)
    sums = torch.empty(4, dtype=torch.float64, device=device)
    _launch("longtrace_blend_gradients", device, table, len(table), chunks, alpha, 1 - alpha, partial, sums)
    return sums


def pack_rows(padded: Tensor, offsets: Tensor, rows: int) -> Tensor:
    """(rows, ...) of padded (documents, width, ...), whose rows are dense; offsets (documents + 1,) int64, checked."""
    row = padded[:1, :1].numel() * padded.element_size()
    packed = padded.new_empty(rows, *padded.shape[2:])
    strides = [s * padded.element_size() for s in padded.stride()[:2]]
    offsets = offsets.to(padded.device, non_blocking=True)
    _launch("longtrace_pack_rows", padded.device, padded, offsets, len(padded), rows, *strides, row, packed)
    return packed


def unpack_rows(packed: Tensor, offsets: Tensor, width: int) -> Tensor:
    """(documents, width, ...) of packed (T, ...), contiguous; zeros after each document's end."""
    row = packed[:1].numel() * packed.element_size()
    documents, offsets = len(offsets) - 1, offsets.to(packed.device, non_blocking=True)
    padded = packed.new_empty(documents, width, *packed.shape[1:])
    _launch("longtrace_unpack_rows", packed.device, packed, offsets, documents, width, width * row, row, row, padded)
    return padded

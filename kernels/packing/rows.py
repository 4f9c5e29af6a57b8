"""Rows of a padded batch into a packed one and back: each the other's gradient. CUDA C++ on CUDA, else PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence

import torch
from torch import Tensor

from longtrace.kernels import backend, cuda
from longtrace.kernels.backend import Candidate, Choice
from longtrace.kernels.offsets import checked_offsets


def choose(device: str) -> Choice:
    """What moves rows on `device`."""
    return backend.choose("pack_rows", _candidates, device)


def _candidates(device: str) -> Iterator[Candidate]:
    if device == "cuda":
        yield Candidate("cuda", "CUDA", cuda.WHY, cuda.LOADED)
    yield Candidate("reference", "PyTorch", "indexing by a mask")


def pack_rows(padded: Tensor, cu_seqlens: Tensor | Sequence[int]) -> Tensor:
    """The first rows of each document, one document after another: (documents, width, ...) to (T, ...).

    Document d keeps cu_seqlens[d + 1] - cu_seqlens[d] rows; cu_seqlens (documents + 1,) runs from 0 to T and is checked on
    the host. Differentiable: padding gets zeros. Raises ValueError naming what does not fit. Any dtype.
    """
    offsets = torch.as_tensor(cu_seqlens)
    offsets = checked_offsets("cu_seqlens", offsets, int(offsets[-1]) if offsets.numel() else 0, "rows")
    if padded.ndim < 2 or len(padded) != len(offsets) - 1:
        raise ValueError(f"padded must be ({len(offsets) - 1}, width, ...), got {tuple(padded.shape)}")
    _check_lengths(offsets, padded.shape[1])
    return _Pack.apply(padded, offsets)


def unpack_rows(packed: Tensor, cu_seqlens: Tensor | Sequence[int], width: int) -> Tensor:
    """The inverse of `pack_rows`: (T, ...) to (documents, width, ...), zeros after each document's end."""
    offsets = checked_offsets("cu_seqlens", cu_seqlens, len(packed), "rows")
    _check_lengths(offsets, width)
    return _Unpack.apply(packed, offsets, width)


def _check_lengths(offsets: Tensor, width: int) -> None:
    lengths = offsets.diff()
    if (long := (lengths > width).nonzero()).numel():
        at = int(long[0])
        raise ValueError(f"document {at} has {lengths[at]} rows, more than the width {width}")


def _there(offsets: Tensor, width: int) -> Tensor:
    """(documents, width): which slots hold a row."""
    return torch.arange(width) < offsets.diff()[:, None]


def _pack(padded: Tensor, offsets: Tensor) -> Tensor:
    if choose(padded.device.type).backend == "cuda":
        dense = padded if padded[:1, :1].is_contiguous() else padded.contiguous()
        return cuda.pack_rows(dense, offsets, int(offsets[-1]))
    return padded[_there(offsets, padded.shape[1]).to(padded.device)]


def _unpack(packed: Tensor, offsets: Tensor, width: int) -> Tensor:
    if choose(packed.device.type).backend == "cuda":
        return cuda.unpack_rows(packed.contiguous(), offsets, width)
    padded = packed.new_zeros(len(offsets) - 1, width, *packed.shape[1:])
    padded[_there(offsets, width).to(packed.device)] = packed
    return padded


class _Pack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, padded, offsets):
        ctx.offsets, ctx.width = offsets, padded.shape[1]
        return _pack(padded, offsets)

    @staticmethod
    def backward(ctx, grad):
        return _unpack(grad, ctx.offsets, ctx.width), None


class _Unpack(torch.autograd.Function):
    @staticmethod
    def forward(ctx, packed, offsets, width):
        ctx.offsets = offsets
        return _unpack(packed, offsets, width)

    @staticmethod
    def backward(ctx, grad):
        return _pack(grad, ctx.offsets), None, None

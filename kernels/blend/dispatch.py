"""`blend_gradients`: two paths' gradients into one, and their norms and dot, in one pass over memory."""

from __future__ import annotations

import math
from collections.abc import Iterable, Iterator, Sequence
from typing import NamedTuple

import torch
from torch import Tensor

from longtrace.kernels import backend, cuda, extension
from longtrace.kernels.backend import Candidate, Choice
from longtrace.kernels.blend import reference

FUSED = (torch.bfloat16, torch.float32)


class GradientStats(NamedTuple):
    """Of the gradients as they were before the blend; 0-dim, on their device."""

    trace_sq: Tensor  # |g_t|^2, float64
    empty_sq: Tensor  # |g_e|^2, float64
    dot: Tensor  # <g_t, g_e>, float64
    finite: Tensor  # bool: neither holds a NaN or an infinity


def choose(device: str, dtypes: Iterable[torch.dtype]) -> Choice:
    """What serves gradients of `dtypes` on `device`."""
    return backend.choose("blend_gradients", _candidates, device, frozenset(dtypes))


def _candidates(device: str, dtypes: frozenset[torch.dtype]) -> Iterator[Candidate]:
    lacks = "" if dtypes.issubset(FUSED) else "the kernels take bf16 and fp32, mixed or not"
    if device == "cpu":
        why = "one pass, sums in blocks of 16,384" if extension.LOADED else extension.WHY
        yield Candidate("cpu", "C++", lacks or why, extension.LOADED and not lacks)
    if device == "cuda":
        yield Candidate("cuda", "CUDA", lacks or cuda.WHY, cuda.LOADED and not lacks)
    yield Candidate("reference", "PyTorch", "")


@torch.no_grad()
def blend_gradients(trace_grads: Sequence[Tensor], empty_grads: Sequence[Tensor], alpha: float) -> GradientStats:
    """trace_grads = alpha * trace_grads + (1 - alpha) * empty_grads, in place, and the statistics of both as they were.

    Args: two lists of equally many contiguous floating tensors of the same shapes, all on one device; dtypes may differ from
    tensor to tensor and between the lists. alpha: any finite number; 1 leaves trace_grads as they are.
    Returns: `GradientStats(trace_sq, empty_sq, dot, finite)`; nothing waits for the device. Arithmetic in fp32 (fp64 for
    fp64), each element rounded once; bf16 and fp32 are summed in fp32 within fixed blocks and in fp64 over them, in a fixed
    order: same bits on every run and for any number of threads. Squares past 3e38 are infinite though `finite` is True.
    A NaN or infinity spreads as the formula says, and `finite` is False.
    Raises: ValueError naming the first tensor that does not fit, before anything is written.
    Source: BVPO, arXiv:2510.05095.
    """
    trace_grads, empty_grads, alpha = list(trace_grads), list(empty_grads), float(alpha)
    if not math.isfinite(alpha):
        raise ValueError(f"alpha must be finite, got {alpha}")
    if len(trace_grads) != len(empty_grads):
        raise ValueError(
            f"trace_grads and empty_grads must be equally many, got {len(trace_grads)} and {len(empty_grads)}"
        )
    if not _fits(trace_grads, empty_grads):
        _refuse(trace_grads, empty_grads)
    if not trace_grads:
        return GradientStats(*torch.zeros(3, dtype=torch.float64).unbind(), torch.tensor(True))
    serves = choose(trace_grads[0].device.type, (x.dtype for x in (*trace_grads, *empty_grads))).backend
    if serves == "cpu":
        sums = torch.ops.longtrace.blend_gradients_(trace_grads, empty_grads, alpha)
    else:
        sums = (cuda if serves == "cuda" else reference).blend_gradients_(trace_grads, empty_grads, alpha)
    return GradientStats(*sums[:3].unbind(), sums[3] == 0)


def _fits(trace_grads: list[Tensor], empty_grads: list[Tensor]) -> bool:
    """Whether no pair is refused: in few calls, which cost as much as blending some thousand elements."""
    device = getattr(next(iter(trace_grads), None), "device", None)
    return all(
        isinstance(t, Tensor)
        and isinstance(e, Tensor)
        and t.shape == e.shape
        and t.device == e.device == device
        and t.is_contiguous()
        and e.is_contiguous()
        and t.is_floating_point()
        and e.is_floating_point()
        for t, e in zip(trace_grads, empty_grads)
    )


def _refuse(trace_grads: list[Tensor], empty_grads: list[Tensor]) -> None:
    """Raises ValueError that names the first tensor that does not fit."""
    for i, pair in enumerate(zip(trace_grads, empty_grads)):
        for name, x in zip(("trace_grads", "empty_grads"), pair):
            if not isinstance(x, Tensor) or not x.is_floating_point():
                raise ValueError(f"{name}[{i}] must be a floating tensor, got {getattr(x, 'dtype', type(x).__name__)}")
            if x.shape != pair[0].shape:
                raise ValueError(f"{name}[{i}] is {tuple(x.shape)}, but trace_grads[{i}] is {tuple(pair[0].shape)}")
            if x.device != trace_grads[0].device:
                raise ValueError(f"{name}[{i}] is on {x.device}, but trace_grads[0] is on {trace_grads[0].device}")
            if not x.is_contiguous():
                raise ValueError(f"{name}[{i}] must be contiguous, got strides {x.stride()} for {tuple(x.shape)}")


if extension.LOADED:

    @torch.library.register_fake("longtrace::blend_gradients_")
    def _(trace_grads, empty_grads, alpha):
        return trace_grads[0].new_empty(4, dtype=torch.float64)

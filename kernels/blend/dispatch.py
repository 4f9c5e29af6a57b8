"""`blend_gradients`: two paths' gradients into one, and their norms and dot, in one pass over memory."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Sequence
from operator import add, le
from typing import NamedTuple

import torch
from torch import Tensor
from torch.autograd.graph import increment_version

from longtrace.kernels import backend, cuda, extension
from longtrace.kernels.backend import Candidate, Choice
from longtrace.kernels.blend import reference

FUSED = (torch.bfloat16, torch.float32)
TAKEN = frozenset((*FUSED, torch.float16, torch.float64))
LARGEST = torch.finfo(torch.float32).max


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

    Args: two lists of equally many contiguous tensors of the same shapes, all on one device, in bf16, fp16, fp32 or fp64; dtypes
    may differ from tensor to tensor and between the lists. No trace gradient may share memory with another entry, but
    trace_grads[i] and empty_grads[i] may be the same memory. alpha: any finite fp32 number; at 1 (at 0) the trace (the empty)
    gradients' values come out, but a -0.0 may turn into 0.0, and there is NaN where the other gradient is not finite.
    Returns: `GradientStats(trace_sq, empty_sq, dot, finite)`; nothing waits for the device. Arithmetic in fp32 (fp64 for
    fp64), each element rounded once; bf16 and fp32 are summed in fp32 within fixed blocks and in fp64 over them, in a fixed
    order: on one instruction set the same bits on every run and for any number of threads. Where squares pass 3e38, norms are
    infinite and `dot` is infinite or NaN though `finite` is True. A NaN or infinity spreads as the formula says, and `finite`
    is False. Autograd counts the write: backward through a trace gradient that it saved before raises.
    Raises: ValueError naming the first tensor that does not fit, before anything is written.
    Source: BVPO, arXiv:2510.05095.
    """
    trace_grads, empty_grads, alpha = list(trace_grads), list(empty_grads), float(alpha)
    if not abs(alpha) <= LARGEST:
        raise ValueError(f"alpha must be a finite fp32 number, got {alpha}")
    if len(trace_grads) != len(empty_grads):
        raise ValueError(
            f"trace_grads and empty_grads must be equally many, got {len(trace_grads)} and {len(empty_grads)}"
        )
    if not _fits(trace_grads, empty_grads) or not _apart(trace_grads + empty_grads):
        _refuse(trace_grads, empty_grads)
        _refuse_overlap(trace_grads, empty_grads)
    if not trace_grads:
        return GradientStats(*torch.zeros(3, dtype=torch.float64).unbind(), torch.tensor(True))
    serves = choose(trace_grads[0].device.type, (x.dtype for x in (*trace_grads, *empty_grads))).backend
    if serves == "reference":
        sums = reference.blend_gradients_(trace_grads, empty_grads, alpha)
    else:
        op = torch.ops.longtrace.blend_gradients_ if serves == "cpu" else cuda.blend_gradients_
        sums = op(trace_grads, empty_grads, alpha)
        if not torch.compiler.is_compiling():  # the kernels write through pointers, of which autograd does not hear
            increment_version([x for x in trace_grads if not x.is_inference()])
    return GradientStats(*sums[:3].unbind(), sums[3] == 0)


def _fits(trace_grads: list[Tensor], empty_grads: list[Tensor]) -> bool:
    """Whether no pair is refused: in few calls, which cost as much as blending some thousand elements."""
    device = getattr(next(iter(trace_grads), None), "device", None)
    return all(
        isinstance(t, Tensor)
        and isinstance(e, Tensor)
        and t.shape == e.shape
        and t.device == e.device == device
        and t.dtype in TAKEN
        and e.dtype in TAKEN
        and t.is_contiguous()
        and e.is_contiguous()
        for t, e in zip(trace_grads, empty_grads)
    )


def _apart(tensors: list[Tensor]) -> bool:
    """Whether all are what their memory holds, and no two share any."""
    if torch.compiler.is_compiling():  # there is no memory yet
        return True
    starts = list(map(Tensor.data_ptr, tensors))  # 0 where there are no elements
    ends = sorted(map(add, starts, [x.nbytes for x in tensors]))
    starts.sort()
    return all(map(le, ends, starts[1:])) and not any(map(Tensor.is_neg, tensors))


def _refuse(trace_grads: list[Tensor], empty_grads: list[Tensor]) -> None:
    """Raises ValueError that names the first tensor that does not fit."""
    for i, pair in enumerate(zip(trace_grads, empty_grads)):
        for name, x in zip(("trace_grads", "empty_grads"), pair):
            if not isinstance(x, Tensor) or x.dtype not in TAKEN:
                got = getattr(x, "dtype", type(x).__name__)
                raise ValueError(f"{name}[{i}] must be a tensor in bf16, fp16, fp32 or fp64, got {got}")
            if x.shape != pair[0].shape:
                raise ValueError(f"{name}[{i}] is {tuple(x.shape)}, but trace_grads[{i}] is {tuple(pair[0].shape)}")
            if x.device != trace_grads[0].device:
                raise ValueError(f"{name}[{i}] is on {x.device}, but trace_grads[0] is on {trace_grads[0].device}")
            if not x.is_contiguous():
                raise ValueError(f"{name}[{i}] must be contiguous, got strides {x.stride()} for {tuple(x.shape)}")
            if x.is_neg():
                raise ValueError(f"{name}[{i}] is a negated view: pass its resolve_neg()")


def _refuse_overlap(trace_grads: list[Tensor], empty_grads: list[Tensor]) -> None:
    """Raises ValueError that names two entries of which one is written where the other lies; sorted, so in one look at each."""
    spans = []  # (first byte, end, written, which); a tensor without elements lies at 0
    for i, (t, e) in enumerate(zip(trace_grads, empty_grads)):
        start, other = t.data_ptr(), e.data_ptr()
        spans.append((start, start + t.nbytes, True, i))
        if other != start or e.nbytes != t.nbytes:
            spans.append((other, other + e.nbytes, False, i))
    spans.sort()
    last = last_written = (0, 0, True, 0)  # those that reach furthest so far
    for span in spans:
        before = last if span[2] else last_written
        if span[0] < before[1]:
            one, two = (f"{'trace' if written else 'empty'}_grads[{i}]" for *_, written, i in (before, span))
            raise ValueError(f"{one} and {two} share memory, which is written")
        if span[1] > last[1]:
            last = span
        if span[2]:
            last_written = span


if extension.LOADED:

    @torch.library.register_fake("longtrace::blend_gradients_")
    def _(trace_grads, empty_grads, alpha):
        return trace_grads[0].new_empty(4, dtype=torch.float64)

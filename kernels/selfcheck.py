"""`self_check()`: every op against its float64 reference on this machine, in seconds; `longtrace doctor` prints it."""

from __future__ import annotations

import random
from contextlib import suppress
from functools import partial

import torch

from longtrace.kernels.advantages import dispatch as advantages
from longtrace.kernels.advantages import reference as advantages_reference
from longtrace.kernels.attention import dispatch as attention
from longtrace.kernels.attention import reference as attention_reference
from longtrace.kernels.backend import BackendRefused
from longtrace.kernels.blend import dispatch as blend
from longtrace.kernels.blend import reference as blend_reference
from longtrace.kernels.head import backend as head_backend
from longtrace.kernels.head import dispatch as head
from longtrace.kernels.head import reference as head_reference
from longtrace.kernels.packing import dispatch as packing
from longtrace.kernels.packing.reference import best_fit_decreasing

Row = tuple[str, str, float, bool]


def self_check() -> list[Row]:
    """(op, backend, max_error, ok) for every op, on the device a training run would take here.

    What LONGTRACE_BACKEND's backend cannot serve is left out; `explain()` says why.

    max_error is the largest absolute difference from the float64 reference over values and gradients (for `pack`, the
    number of bins that differ); ok means that the norm of the difference is within 8 units of the dtype's precision.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    generator = torch.Generator().manual_seed(0)

    def draw(*shape: int, scale: float = 1.0) -> torch.Tensor:
        return scale * torch.randn(*shape, generator=generator, dtype=torch.float64)

    checks = [_pack]
    input, weight, coefficient = draw(70, 48), draw(515, 48, scale=0.3), draw(70)
    target = torch.randint(0, 515, (70,), generator=generator)
    target[::7] = -100
    for dtype in (torch.float32, torch.bfloat16):
        checks.append(partial(_head, device, dtype, input, weight, target, coefficient))
    q, k, v = draw(90, 4, 32), draw(90, 2, 32), draw(90, 2, 32)
    for dtype in (torch.float32, torch.bfloat16):
        for name, options in (("", {}), (" window", {"window": (11, 0)}), (" softcap", {"softcap": 3.0})):
            checks.append(partial(_attention, device, dtype, name, options, q, k, v))
    checks.append(partial(_advantages, device, draw(100)))
    for dtype in (torch.float32, torch.bfloat16):
        checks.append(partial(_blend, device, dtype, draw(70_001), draw(70_001)))
    results: list[Row] = []
    for check in checks:
        with suppress(BackendRefused):
            results += check()
    return results


def _pack() -> list[Row]:
    lengths = random.Random(0).choices(range(4097), k=2000)
    ours, expected = packing.pack(lengths, 4096), best_fit_decreasing(lengths, 4096)
    different = sum(a != b for a, b in zip(ours, expected)) + abs(len(ours) - len(expected))
    return [("pack", packing.BACKEND, float(different), different == 0)]


def _leaves(device: str, dtype: torch.dtype, *tensors: torch.Tensor) -> tuple[list, list]:
    """The same rounded values as tensors of `dtype` and as float64, both taking gradients."""
    ours = [t.to(device, dtype).requires_grad_() for t in tensors]
    return ours, [t.detach().double().requires_grad_() for t in ours]


def _compare(ours, exact, dtype: torch.dtype) -> tuple[float, bool]:
    worst, ok = 0.0, True
    for a, b in zip(ours, exact):
        error = a.double() - b
        worst = max(worst, error.abs().max().item())
        ok &= bool(error.norm() <= 8 * torch.finfo(dtype).eps * b.norm())
    return worst, ok


def _head(device, dtype, input, weight, target, coefficient) -> list[Row]:
    ours, exact = _leaves(device, dtype, input, weight)
    target, c = target.to(device), coefficient.to(device)
    name = f"{head_backend.choose(device, dtype).name} {str(dtype).removeprefix('torch.')}"
    log_p, entropy, _ = head_reference.log_prob(*exact, target)
    rows = []

    loss, got = head.linear_weighted_nll(*ours, target, c.float())
    truth = -(log_p * c.float().double()).sum()
    values = (got.log_prob, *torch.autograd.grad(loss, ours))
    rows.append(("linear_weighted_nll", values, (log_p, *torch.autograd.grad(truth, exact, retain_graph=True))))

    got = head.linear_log_prob(*ours, target, entropy=True)
    values = (got.log_prob, got.entropy, *torch.autograd.grad((got.log_prob + got.entropy).sum(), ours))
    truth = torch.autograd.grad((log_p + entropy).sum(), exact)
    rows.append(("linear_log_prob", values, (log_p, entropy, *truth)))

    got = head.linear_cross_entropy(*ours, target, label_smoothing=0.1)
    truth = head_reference.cross_entropy(*exact, target, label_smoothing=0.1)
    rows.append(
        ("linear_cross_entropy", (got, *torch.autograd.grad(got, ours)), (truth, *torch.autograd.grad(truth, exact)))
    )
    return [(op, name, *_compare(values, truth, dtype)) for op, values, truth in rows]


def _attention(device, dtype, name, options, q, k, v) -> list[Row]:
    ours, exact = _leaves(device, dtype, q, k, v)
    cu = torch.tensor([0, 30, 31, 90], dtype=torch.int32, device=device)
    got = attention.varlen_attention(*ours, cu, 59, **options)
    truth = attention_reference.varlen_attention(*exact, cu, **options)
    backend = attention.choose(device, dtype, "softcap" in options, window="window" in options, widths=(32, 32)).name
    values = (got, *torch.autograd.grad(got.float().square().sum(), ours))
    expected = (truth, *torch.autograd.grad(truth.square().sum(), exact))
    served = f"{backend} {str(dtype).removeprefix('torch.')}"
    return [(f"varlen_attention{name}", served, *_compare(values, expected, dtype))]


def _advantages(device, rewards) -> list[Row]:
    rewards, offsets = rewards.float().to(device), torch.tensor([0, 7, 7, 40, 41, 100])
    got = advantages.group_advantages(rewards, offsets)
    truth, degenerate, _ = advantages_reference.group_advantages(
        rewards.cpu(), offsets, by_std=True, leave_one_out=False, sample=True
    )
    error, ok = _compare([got.values.cpu()], [truth], torch.float32)
    backend = advantages.choose(device, torch.float32).name
    return [("group_advantages", backend, error, ok and torch.equal(got.degenerate.cpu(), degenerate))]


def _blend(device, dtype, trace, empty) -> list[Row]:
    trace, empty = trace.to(device, dtype), empty.to(device, dtype)
    exact = trace.double()
    sums = blend_reference.blend_gradients_([exact], [empty.double()], 0.3)[:3]
    stats = blend.blend_gradients([trace], [empty], 0.3)
    error, ok = _compare([trace], [exact], dtype)
    backend = blend.choose(device, (dtype,)).name
    ok &= _compare([torch.stack(stats[:3])], [sums], torch.float32)[1] and bool(stats.finite)
    return [("blend_gradients", f"{backend} {str(dtype).removeprefix('torch.')}", error, ok)]

"""`group_advantages`: rewards of ragged groups into advantages: C++ on the CPU, CUDA C++ on CUDA, else PyTorch."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from typing import Literal, NamedTuple

import torch
from torch import Tensor

from longtrace.kernels import backend, cuda, extension
from longtrace.kernels.advantages import reference
from longtrace.kernels.backend import Candidate, Choice
from longtrace.kernels.offsets import checked_offsets


class GroupCounts(NamedTuple):
    """How many groups of each kind, 0-dim int64; the four add up to the number of groups."""

    all_right: Tensor  # all scored rewards are equal and above 0
    all_wrong: Tensor  # all scored rewards are equal and at most 0
    mixed: Tensor  # rewards differ: the groups that carry a gradient
    unscored: Tensor  # no reward is a finite number


class Advantages(NamedTuple):
    values: Tensor  # (N,) fp32, fp64 for fp64 rewards
    degenerate: Tensor  # (G,) bool: all of the group's advantages are 0
    counts: GroupCounts


def choose(device: str, dtype: torch.dtype) -> Choice:
    """What serves rewards of `dtype` (fp32 or fp64) on `device`."""
    return backend.choose("group_advantages", _candidates, device, dtype)


def _candidates(device: str, dtype: torch.dtype) -> Iterator[Candidate]:
    if device == "cpu":
        yield Candidate("cpu", "C++", "sums in float64" if extension.LOADED else extension.WHY, extension.LOADED)
    if device == "cuda":
        fits = dtype != torch.float64
        yield Candidate("cuda", "CUDA", cuda.WHY if fits else "the kernel takes fp32", cuda.LOADED and fits)
    yield Candidate("reference", "PyTorch", "sums in float64")


def group_advantages(
    rewards: Tensor,
    group_offsets: Tensor | Sequence[int],
    *,
    scale: Literal["group_std", "none"] = "group_std",
    baseline: Literal["mean", "leave_one_out"] = "mean",
    std: Literal["sample", "population"] = "sample",
) -> Advantages:
    """Advantages of rewards relative to their group: (r - baseline) / (std + 1e-4).

    Args: rewards (N,), any real dtype, the groups one after another; group_offsets (G + 1,) integers from 0 to N, group g
    being rewards[group_offsets[g] : group_offsets[g + 1]], of any size (keep them off the GPU: they are checked on the
    host). scale "none" leaves the division out (Dr. GRPO); baseline "leave_one_out" takes the mean of the group's other
    rewards (RLOO); std: "sample" divides by n - 1, as TRL and verl do, "population" by n.
    Returns: `Advantages(values, degenerate, counts)` on the rewards' device. A group whose rewards are all equal
    (max == min), or with fewer than two, is degenerate: its advantages are exactly 0. Rewards that are NaN or infinite
    (unscored) leave the statistics and get 0. No gradient flows into the rewards. Same bits on every run.
    Raises: ValueError naming the offset that decreases or does not cover the rewards, or the option that is unknown.
    Source: Shao et al. 2024 (GRPO), arXiv:2402.03300, section 4.1; Liu et al. 2025 (Dr. GRPO), arXiv:2503.20783; Ahmadian
    et al. 2024 (RLOO), arXiv:2402.14740. The 1e-4 is TRL's.
    """
    how = {
        "by_std": _option("scale", scale, "none", "group_std"),
        "leave_one_out": _option("baseline", baseline, "mean", "leave_one_out"),
        "sample": _option("std", std, "population", "sample"),
    }
    if rewards.ndim != 1 or rewards.is_complex():
        raise ValueError(f"rewards must be a real vector, got {rewards.dtype} {tuple(rewards.shape)}")
    offsets = checked_offsets("group_offsets", group_offsets, len(rewards), "rewards")
    device, dtype = rewards.device, torch.float64 if rewards.dtype == torch.float64 else torch.float32
    serves = choose(device.type, dtype).backend
    rewards = rewards.detach()
    if serves == "reference":
        at = device if device.type == "cuda" else "cpu"  # some devices have no float64
        found = reference.group_advantages(rewards.to(at), offsets.to(at), **how)
        values, degenerate, counts = (x.to(device) for x in (found[0].to(dtype), *found[1:]))
    else:
        op = torch.ops.longtrace.group_advantages if serves == "cpu" else cuda.group_advantages
        values, degenerate, counts = op(rewards.to(dtype).contiguous(), offsets, *how.values())
    return Advantages(values, degenerate, GroupCounts(*counts.unbind()))


def _option(name: str, found: str, off: str, on: str) -> bool:
    if found not in (off, on):
        raise ValueError(f"{name} must be {on!r} or {off!r}, got {found!r}")
    return found == on


if extension.LOADED:

    @torch.library.register_fake("longtrace::group_advantages")
    def _(rewards, offsets, by_std, leave_one_out, sample):
        return (
            torch.empty_like(rewards),
            rewards.new_empty(len(offsets) - 1, dtype=torch.bool),
            rewards.new_empty(4, dtype=torch.int64),
        )

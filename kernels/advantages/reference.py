"""Group advantages in plain PyTorch and float64: the truth for the kernels, and what serves devices without one."""

from __future__ import annotations

import torch
from torch import Tensor

EPS = 1e-4  # added to the standard deviation, as TRL does: rewards that differ by a rounding error alone stay near 0


def group_advantages(
    rewards: Tensor, offsets: Tensor, *, by_std: bool, leave_one_out: bool, sample: bool
) -> tuple[Tensor, Tensor, Tensor]:
    """(values (N,) float64, degenerate (G,), counts (4,) int64) of rewards (N,) in the groups of offsets (G + 1,)."""
    r, scored = rewards.double(), rewards.isfinite()
    group = torch.repeat_interleave(offsets.diff())

    def reduce(x: Tensor, how: str, start: float) -> Tensor:
        return torch.segment_reduce(x, how, offsets=offsets, initial=start)

    n = reduce(scored.double(), "sum", 0)
    total = reduce(r.where(scored, 0.0), "sum", 0)
    centred = (r - (total / n)[group]).where(scored, 0.0)
    top = reduce(r.where(scored, -torch.inf), "max", -torch.inf)
    mixed = top > reduce(r.where(scored, torch.inf), "min", torch.inf)
    values = r - ((total[group] - r) / (n - 1)[group]) if leave_one_out else centred
    if by_std:
        deviation = (reduce(centred.square(), "sum", 0) / (n - 1 if sample else n)).sqrt()
        values = values / (deviation + EPS)[group]
    alike = ~mixed & (n > 0)
    counts = torch.stack([(alike & (top > 0)).sum(), (alike & (top <= 0)).sum(), mixed.sum(), (n == 0).sum()])
    return values.where(scored & mixed[group], 0.0), ~mixed, counts

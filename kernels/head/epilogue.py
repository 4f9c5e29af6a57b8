"""The row-wise passes over a chunk of final logits: softmax statistics, and logits turned into their gradient in place.

p is taken as exp((z - max) - log_sum), never exp(z - lse): a common offset of 1e4 would cost lse all but three decimals.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

SLICE_BYTES = 4 * 2**20  # temporaries of the PyTorch passes stay in cache


class RowStats(NamedTuple):
    """Per row of a chunk, in the logits' dtype: lse = maximum + log_sum."""

    maximum: Tensor
    log_sum: Tensor
    log_prob: Tensor
    entropy: Tensor | None


def _slices(logits: Tensor) -> range:
    step = max(1, SLICE_BYTES // max(1, logits.shape[1] * logits.element_size()))
    return range(0, logits.shape[0], step)


def softmax_stats(logits: Tensor, target: Tensor, entropy: bool) -> RowStats:
    """Statistics of each row of `logits` (rows, V) at `target` (rows,) int64; `logits` is only read."""
    maximum = logits.amax(1)
    log_sum = torch.empty_like(maximum)
    log_prob = torch.empty_like(maximum)
    ent = torch.empty_like(maximum) if entropy else None
    slices = _slices(logits)
    for i in slices:
        rows = slice(i, i + slices.step)
        shifted = logits[rows] - maximum[rows, None]
        log_prob[rows] = shifted.gather(1, target[rows, None]).squeeze(1)
        torch.log(shifted.exp_().sum(1), out=log_sum[rows])
        if ent is not None:
            ent[rows] = torch.special.entr(shifted.mul_(log_sum[rows, None].neg().exp_())).sum(1)
    return RowStats(maximum, log_sum, log_prob.sub_(log_sum), ent)


def gradient_(logits: Tensor, stats: RowStats, a: Tensor, e: Tensor | None) -> None:
    """logits <- p (a - e (log p + entropy)), in place; a, e are per row."""
    slices = _slices(logits)
    for i in slices:
        rows = slice(i, i + slices.step)
        p = logits[rows].sub_(stats.maximum[rows, None]).sub_(stats.log_sum[rows, None]).exp_()
        if e is None:
            p.mul_(a[rows, None])
        else:
            bend = torch.special.entr(p).sub_(p * stats.entropy[rows, None]).mul_(e[rows, None])
            p.mul_(a[rows, None]).add_(bend)

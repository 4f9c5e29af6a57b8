"""Objectives: functions of the hidden states of supervised rows, each normalised by a count summed over the whole step.

An objective is `(hidden, head, batch) -> (loss_sum, metrics)`, where `hidden` (N, H) are the hidden states at the
positions whose label is a target, plus `count(batch)`, the share of the step's normaliser that the batch holds. The loop
sums the counts over all micro-batches before the first backward, so batch x accumulation never changes the result.
"""

from __future__ import annotations

from typing import Protocol

import torch

from longtrace import kernels as K

from .model import Head
from .source import IGNORE, PackedBatch


class Objective(Protocol):
    def count(self, batch: PackedBatch) -> float:
        """The batch's share of the normaliser (tokens, sequences or pairs)."""

    def __call__(self, hidden: torch.Tensor, head: Head, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, float]]:
        """The summed loss (scalar, differentiable) and metrics as sums over the batch's count."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...


class SFT:
    """Negative log-likelihood of the target tokens, averaged over all target tokens of the step."""

    def __init__(self, budget_mb: int = 0, grad: str = "exact"):
        self.budget_mb, self.grad = budget_mb or None, grad

    def count(self, batch: PackedBatch) -> float:
        return int((batch.labels != IGNORE).sum())

    def __call__(self, hidden: torch.Tensor, head: Head, batch: PackedBatch) -> tuple[torch.Tensor, dict[str, float]]:
        target = batch.labels[batch.labels != IGNORE]
        coefficient = torch.ones(len(target), device=hidden.device, dtype=torch.float32)
        loss, rows = K.linear_weighted_nll(
            hidden,
            head.weight,
            target,
            coefficient,
            linear_bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            grad=self.grad,
            budget_mb=self.budget_mb,
        )
        told = ("columns_kept", "estimated_dh_error", "estimated_dw_row_error")  # of compressed gradients
        stats = {f"head_{name}": rows.stats[name] * len(target) for name in told if name in rows.stats}
        return loss, stats if loss.requires_grad else {}

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

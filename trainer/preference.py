"""Preference objectives on packed pairs: DPO and SimPO, on traces, on empty traces, or on both (BVPO).

A loss is a function of the summed log-probs of a pair's two completions; the vocabulary work is the head op's. BVPO weighs
the losses of two paths: alpha where the model thought, 1 - alpha where its thought was empty.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F

from longtrace import kernels as K

from .model import Head
from .paths import Paths
from .source import IGNORE, PairBatch

PreferenceLoss = Literal["dpo", "simpo"]
PATHS = ("trace", "empty")

DEFAULTS: dict[str, tuple[float, float]] = {"dpo": (0.1, 0.0), "simpo": (2.0, 1.0)}
"""The published (beta, gamma) of each loss: Rafailov et al. 2023 and Meng et al. 2024 (gamma / beta = 0.5)."""


def preference_loss(
    loss: PreferenceLoss,
    chosen: torch.Tensor,
    rejected: torch.Tensor,
    *,
    beta: float,
    gamma: float = 0.0,
    label_smoothing: float = 0.0,
    reference: tuple[torch.Tensor, torch.Tensor] | None = None,
    lengths: tuple[torch.Tensor, torch.Tensor] | None = None,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor]:
    """Losses (P,) and the implicit rewards (P,) of the chosen and of the rejected completions.

    chosen, rejected: (P,) summed log-probs of the completions under the policy. dpo takes the reference's (`reference`):
    reward = beta (log pi - log pi_ref). simpo takes `lengths` in tokens: reward = beta log pi / length. With the margin
    m = reward of chosen - reward of rejected - gamma the loss is -(1 - s) log sigmoid(m) - s log sigmoid(-m), s =
    `label_smoothing`. Sources: Rafailov et al. 2023 (DPO), arXiv:2305.18290, eq. 7; Mitchell 2023 (label smoothing); Meng et
    al. 2024 (SimPO), arXiv:2405.14734, eq. 6; the loss of one path of BVPO, arXiv:2510.05095.
    """
    if loss == "dpo":
        rewards = beta * (chosen - reference[0]), beta * (rejected - reference[1])
    else:
        rewards = beta * chosen / lengths[0], beta * rejected / lengths[1]
    margin = rewards[0] - rewards[1] - gamma
    losses = -(1 - label_smoothing) * F.logsigmoid(margin)
    if label_smoothing:
        losses = losses - label_smoothing * F.logsigmoid(-margin)
    return losses, *rewards


@dataclass
class Preference:
    """DPO or SimPO over packed pairs, each weighted by its path's share (`PairBatch.weight`).

    The step's normaliser is its number of prompts, so a step's loss is alpha mean(trace) + (1 - alpha) mean(empty).
    """

    loss: PreferenceLoss = "dpo"
    beta: float = 0.1
    gamma: float = 0.0
    label_smoothing: float = 0.0
    budget_mb: int = 0
    grad: str = "exact"
    suffixes: tuple[str, str] = ("", "")
    """What a metric's name ends in, by path; empty where there is only one."""
    paths: Paths | None = None
    """Set where the paths' gradients are kept apart, or alpha is estimated."""

    def count(self, batch: PairBatch) -> float:
        return batch.count

    def __call__(self, hidden: torch.Tensor, head: Head, batch: PairBatch):
        sums = sequence_log_probs(hidden, head, batch, budget_mb=self.budget_mb, grad=self.grad)
        chosen, rejected = sums[0::2], sums[1::2]
        lengths = torch.tensor(batch.sizes, dtype=sums.dtype, device=sums.device)
        reference = None if batch.reference is None else (batch.reference[0::2], batch.reference[1::2])
        losses, good, bad = preference_loss(
            self.loss, chosen, rejected,
            beta=self.beta, gamma=self.gamma, label_smoothing=self.label_smoothing,
            reference=reference, lengths=(lengths[0::2], lengths[1::2]),
        )  # fmt: skip
        told = {
            "loss": losses,
            "accuracy": ((good > bad).double() + (good >= bad).double()) / 2,  # a tie is half right
            "margin": good - bad,
            "reward_chosen": good,
            "reward_rejected": bad,
            "log_prob_chosen": chosen / lengths[0::2],
            "log_prob_rejected": rejected / lengths[1::2],
        }
        metrics = {}
        for number, suffix in enumerate(self.suffixes):
            here = batch.path == number
            if n := int(here.sum()):
                for name, values in told.items():
                    if name + suffix != "loss":  # the step's own
                        metrics[name + suffix] = float(values.detach()[here].sum()), n
        return (losses * batch.weight).sum(), metrics

    def state_dict(self) -> dict:
        return self.paths.state_dict() if self.paths else {}

    def load_state_dict(self, state: dict) -> None:
        if self.paths and state:  # none of a run whose alpha was a number
            self.paths.load_state_dict(state)


def sequence_log_probs(
    hidden: torch.Tensor, head: Head, batch: PairBatch, *, budget_mb: int = 0, grad: str = "exact"
) -> torch.Tensor:
    """(2P,) float64: the summed log-probs of a row's completions, chosen and rejected in turn; differentiable.

    hidden: (N, H) at the completions' positions. Sums of thousands of fp32 terms are taken in float64, one completion at
    a time, so that they do not depend on what shares the row.
    """
    rows = K.linear_log_prob(
        hidden,
        head.weight,
        batch.labels[batch.labels != IGNORE],
        linear_bias=head.bias,
        logit_scale=head.logit_scale,
        softcap=head.softcap,
        grad=grad,
        budget_mb=budget_mb or None,
    )
    return torch.stack([part.sum() for part in rows.log_prob.double().split(batch.sizes)])

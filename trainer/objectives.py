"""Objectives: functions of the hidden states of supervised rows, each normalised by a count summed over the whole step.

An objective is `(hidden, head, batch) -> (loss_sum, metrics)`, where `hidden` (N, H) are the hidden states at the
positions whose label is a target, plus `count(batch)`, the share of the step's normaliser that the batch holds. The loop
sums the counts over all micro-batches before the first backward, so batch x accumulation never changes the result.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal, Protocol

import torch

from longtrace import kernels as K

from .model import Head
from .source import IGNORE, PackedBatch, RolloutBatch

Sums = dict[str, tuple[float, int]]
"""Metrics as (sum, of how many): tokens, or pairs. The step's is the sum of the sums over that of the numbers."""


class Objective(Protocol):
    def count(self, batch: PackedBatch) -> float:
        """The batch's share of the normaliser (tokens, sequences or pairs)."""

    def __call__(self, hidden: torch.Tensor, head: Head, batch: PackedBatch) -> tuple[torch.Tensor, Sums]:
        """The summed loss (scalar, differentiable) and what there is to say of the batch."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...

    # `paths` (paths.Paths), if there is one: backwards and the step's gradients go through it


class SFT:
    """Negative log-likelihood of the target tokens, averaged over all target tokens of the step."""

    def __init__(self, budget_mb: int = 0, grad: str = "exact"):
        self.budget_mb, self.grad = budget_mb or None, grad

    def count(self, batch: PackedBatch) -> float:
        return int((batch.labels != IGNORE).sum())

    def __call__(self, hidden: torch.Tensor, head: Head, batch: PackedBatch) -> tuple[torch.Tensor, Sums]:
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
        n = len(target)
        stats = {f"head_{name}": (rows.stats[name] * n, n) for name in told if name in rows.stats}
        return loss, stats if loss.requires_grad else {}

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass


# ---- policy gradients -------------------------------------------------------------------------------------------------

PolicyLoss = Literal["grpo", "dr_grpo", "dapo", "gspo", "cispo"]
Divergence = Literal["k1", "k2", "k3", "weighted_k3"]


CLIPS: dict[str, tuple[float, float]] = {
    "grpo": (0.2, 0.2),
    "dr_grpo": (0.2, 0.2),
    "dapo": (0.2, 0.28),
    "gspo": (3e-4, 4e-4),
    "cispo": (1.0, 4.0),
}
"""The published (clip_low, clip_high) of each loss; cispo bounds the ratio from above alone. Sources: see `policy_loss`;
cispo's upper bound, which its paper does not give, is that of ScaleRL (Khatri et al. 2025), arXiv:2510.13786."""


def token_weights(loss: PolicyLoss, lengths: list[int], longest: int) -> tuple[list[float], float]:
    """(weight of a token of each completion, the completions' share of the normaliser).

    grpo, gspo: the mean over completions of their means over tokens. dapo, cispo: the mean over tokens. dr_grpo: the sum
    over tokens by completions x `longest` (--max-new-tokens), so that no completion gains by its length.
    """
    if loss in ("grpo", "gspo"):
        return [1 / max(n, 1) for n in lengths], float(len(lengths))
    if loss == "dr_grpo":
        return [1 / longest] * len(lengths), float(len(lengths))
    return [1.0] * len(lengths), float(sum(lengths))


def policy_loss(
    loss: PolicyLoss,
    log_prob: torch.Tensor,
    old_log_prob: torch.Tensor,
    advantage: torch.Tensor,
    sequence: torch.Tensor,
    *,
    clip_low: float,
    clip_high: float,
    clip_ratio: float = 0.0,
) -> tuple[torch.Tensor, torch.Tensor, torch.Tensor, torch.Tensor]:
    """Per-token losses (N,), log-ratios (N,), and where a bound on the ratio acted from above and below (N,) bool each.

    With w = exp(log_prob - old_log_prob) and A the advantage: grpo, dr_grpo and dapo take -min(w A, clip(w) A), clip to
    [1 - clip_low, 1 + clip_high]; gspo the same with w = exp of the completion's mean log-ratio; cispo
    -min(w, 1 + clip_high) A log_prob with the weight detached. clip_ratio > 1 + clip_high bounds w where A < 0 (two-sided clip; 0 = off).
    Log-ratios are held to +-20, so that no single token makes the step infinite.
    Sources: Shao et al. 2024 (GRPO), arXiv:2402.03300; Liu et al. 2025 (Dr. GRPO), 2503.20783; Yu et al. 2025 (DAPO),
    2503.14476; Zheng et al. 2025 (GSPO), 2507.18071; MiniMax 2025 (CISPO), 2506.13585; INTELLECT-2 (two-sided), 2505.07291.
    """
    log_ratio = (log_prob - old_log_prob).clamp(-20, 20)
    if loss == "gspo":
        completions = int(sequence.max()) + 1 if len(sequence) else 0
        sums = log_ratio.new_zeros(completions).index_add(0, sequence, log_ratio)
        log_ratio = (sums / torch.bincount(sequence, minlength=completions).clamp(min=1))[sequence]
    ratio = log_ratio.exp()
    above, up, down = ratio.detach() > 1 + clip_high, advantage > 0, advantage < 0
    if loss == "cispo":
        held = ratio.detach().clamp(max=1 + clip_high)
        return -held * advantage * log_prob, log_ratio, above & (up | down), torch.zeros_like(above)
    far = ratio.detach() > (clip_ratio or math.inf)
    below = ratio.detach() < 1 - clip_low
    clipped = ratio.clamp(1 - clip_low, 1 + clip_high) * advantage
    if clip_ratio:
        ratio = torch.where(advantage < 0, ratio.clamp(max=clip_ratio), ratio)
    return -torch.minimum(ratio * advantage, clipped), log_ratio, (up & above) | (down & far), down & below


def divergence(kind: Divergence, log_prob: torch.Tensor, ref_log_prob: torch.Tensor, log_ratio: torch.Tensor):
    """Per-token estimates (N,) of KL(policy || reference) from samples, with d = log reference - log policy.

    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1. As losses on the policy's own samples k2 has the gradient of that KL, k3
    that of KL(reference || policy), k1 none in expectation; weighted_k3 is k3 times the policy's ratio, which makes
    value and gradient those of KL(policy || reference). Sources: Schulman, "Approximating KL divergence" (2020);
    DeepSeek-V3.2 (weighted), arXiv:2512.02556.
    """
    d = (ref_log_prob - log_prob).clamp(-20, 20)
    if kind == "k1":
        return -d
    if kind == "k2":
        return d.square() / 2
    k3 = d.exp() - d - 1
    return k3 * log_ratio.exp() if kind == "weighted_k3" else k3


@dataclass
class PolicyGradient:
    """GRPO and its variants over rollouts: `RolloutBatch` brings advantages, token weights and older log-probs.

    When the weights are those that wrote the rollout and nothing but the advantage enters, every ratio is 1 and the
    coefficients are known before the forward: 6 T H V FLOPs of head instead of 8.
    """

    loss: PolicyLoss = "grpo"
    clip_low: float | None = None  # None: the loss's own, see CLIPS
    clip_high: float | None = None
    clip_ratio: float = 0.0  # two-sided clip (0 = off)
    beta: float = 0.0  # weight of the divergence from the reference
    divergence: Divergence = "k3"
    entropy_bonus: float = 0.0
    importance_cap: float = 0.0  # truncated importance sampling of the rollout's own log-probs (0 = off)
    temperature: float = 1.0
    budget_mb: int = 0
    grad: str = "exact"

    def __post_init__(self):
        low, high = CLIPS[self.loss]
        self.clip_low = low if self.clip_low is None else self.clip_low
        self.clip_high = high if self.clip_high is None else self.clip_high

    def count(self, batch: RolloutBatch) -> float:
        return batch.count

    def __call__(self, hidden: torch.Tensor, head: Head, batch: RolloutBatch) -> tuple[torch.Tensor, Sums]:
        target = batch.labels[batch.labels != IGNORE]
        options = dict(
            linear_bias=head.bias,
            logit_scale=head.logit_scale,
            softcap=head.softcap,
            temperature=self.temperature,
            entropy=True,
            grad=self.grad,
            budget_mb=self.budget_mb or None,
        )
        on_policy = batch.old_log_prob is None
        if on_policy and not (self.beta or self.entropy_bonus or self.importance_cap):
            coefficient = batch.advantage * batch.weight
            loss, rows = K.linear_weighted_nll(hidden, head.weight, target, coefficient, **options)
            surrogate = self._at_ratio_one(rows.log_prob, batch)
            return loss + (surrogate - loss.detach()), {"entropy": (float(rows.entropy.sum()), len(target))}
        rows = K.linear_log_prob(hidden, head.weight, target, **options)
        log_prob = rows.log_prob
        old = log_prob.detach() if on_policy else batch.old_log_prob
        value, log_ratio, above, below = policy_loss(
            self.loss, log_prob, old, batch.advantage, batch.sequence,
            clip_low=self.clip_low, clip_high=self.clip_high, clip_ratio=self.clip_ratio,
        )  # fmt: skip
        metrics = {
            "entropy": rows.entropy.sum(),
            "clip_high": above.sum(),
            "clip_low": below.sum(),
            "ratio": log_ratio.detach().exp().sum(),
        }
        if self.importance_cap:
            mismatch = (old - batch.rollout_log_prob).clamp(-20, 20).exp()
            value = value * mismatch.clamp(max=self.importance_cap)
            metrics["mismatch"] = mismatch.sum()
            metrics["mismatch_kl"] = (mismatch - 1 - mismatch.log()).sum()  # k3 estimate of KL(engine || trainer)
        if self.beta:
            kl = divergence(self.divergence, log_prob, batch.ref_log_prob, log_ratio)
            value = value + self.beta * kl
            metrics["kl"] = kl.detach().sum()
        if self.entropy_bonus:
            value = value - self.entropy_bonus * rows.entropy
        return (value * batch.weight).sum(), {name: (float(x.detach()), len(target)) for name, x in metrics.items()}

    def _at_ratio_one(self, log_prob: torch.Tensor, batch: RolloutBatch) -> torch.Tensor:
        """The loss's value where every ratio is 1."""
        value = -batch.advantage * (log_prob if self.loss == "cispo" else 1.0)
        return (value * batch.weight).sum(dtype=log_prob.dtype)

    def state_dict(self) -> dict:
        return {}

    def load_state_dict(self, state: dict) -> None:
        pass

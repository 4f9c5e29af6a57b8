"""The head formula in plain PyTorch on whole logits, in the dtype it is given: what every fast path is tested against.

log p = log_softmax(softcap(logit_scale * h.w + bias) / temperature), softcap(s) = cap * tanh(s / cap).
"""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def final_logits(
    input: Tensor,
    linear_weight: Tensor,
    linear_bias: Tensor | None = None,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
) -> Tensor:
    """(..., V) logits as the softmax sees them."""
    logits = logit_scale * (input @ linear_weight.T)
    if linear_bias is not None:
        logits = logits + linear_bias
    if softcap is not None:
        logits = softcap * torch.tanh(logits / softcap)
    return logits / temperature


def log_prob(
    input: Tensor, linear_weight: Tensor, target: Tensor, *, ignore_index: int = -100, **transform
) -> tuple[Tensor, Tensor, Tensor]:
    """(log_prob, entropy, lse), each shaped like `target`; 0 where target is `ignore_index`."""
    logits = final_logits(input, linear_weight, **transform)
    valid = target != ignore_index
    log_p = F.log_softmax(logits, -1)
    picked = log_p.gather(-1, target.where(valid, 0)[..., None]).squeeze(-1)
    p = log_p.exp()
    entropy = -torch.where(p > 0, p * log_p, 0.0).sum(-1)
    zero = torch.zeros((), dtype=logits.dtype, device=logits.device)
    return tuple(torch.where(valid, x, zero) for x in (picked, entropy, torch.logsumexp(logits, -1)))


def cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    z_loss: float = 0.0,
    **transform,
) -> Tensor:
    """`linear_cross_entropy` by way of torch's own cross_entropy; z_loss * lse^2 is added to each valid token."""
    logits = final_logits(input, linear_weight, **transform).reshape(-1, linear_weight.shape[0])
    flat = target.reshape(-1)
    valid = flat != ignore_index
    losses = F.cross_entropy(
        logits, flat, weight=weight, reduction="none", ignore_index=ignore_index, label_smoothing=label_smoothing
    )
    losses = torch.where(valid, losses + z_loss * torch.logsumexp(logits, -1).square(), torch.zeros_like(losses))
    if reduction == "none":
        return losses.view(target.shape)
    if reduction == "sum":
        return losses.sum()
    counts = valid.to(logits.dtype)
    if weight is not None:
        counts = counts * weight[flat.where(valid, 0)]
    return losses.sum() / counts.sum().clamp(min=1e-300 if logits.dtype == torch.float64 else 1e-38)

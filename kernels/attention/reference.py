"""Packed attention in plain PyTorch with whole masks, in the dtype it is given: what every fast path is tested against."""

from __future__ import annotations

import torch
from torch import Tensor


def visible(q_len: int, k_len: int, causal: bool, window: tuple[int, int] | None, device=None) -> Tensor:
    """(q_len, k_len) bool: which keys each query sees; the last query is aligned with the last key (flash-attn)."""
    distance = torch.arange(k_len, device=device)[None, :] - (
        torch.arange(q_len, device=device)[:, None] + k_len - q_len
    )
    left, right = (-1, -1) if window is None else window
    seen = torch.ones(q_len, k_len, dtype=torch.bool, device=device)
    if causal:
        seen &= distance <= 0
    if right >= 0:
        seen &= distance <= right
    if left >= 0:
        seen &= distance >= -left
    return seen


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    cu_seqlens: Tensor,
    *,
    cu_seqlens_k: Tensor | None = None,
    causal: bool = True,
    scale: float | None = None,
    window: tuple[int, int] | None = None,
    softcap: float | None = None,
    sinks: Tensor | None = None,
) -> Tensor:
    """As `longtrace.kernels.varlen_attention`, document by document with whole score matrices."""
    scale = q.shape[-1] ** -0.5 if scale is None else scale
    starts_q, starts_k = cu_seqlens.tolist(), (cu_seqlens if cu_seqlens_k is None else cu_seqlens_k).tolist()
    group = q.shape[1] // k.shape[1]
    outputs = []
    for i in range(len(starts_q) - 1):
        qi = q[starts_q[i] : starts_q[i + 1]].transpose(0, 1)
        ki = k[starts_k[i] : starts_k[i + 1]].transpose(0, 1).repeat_interleave(group, 0)
        vi = v[starts_k[i] : starts_k[i + 1]].transpose(0, 1).repeat_interleave(group, 0)
        scores = scale * (qi @ ki.transpose(1, 2))
        if softcap is not None:
            scores = softcap * torch.tanh(scores / softcap)
        seen = visible(qi.shape[1], ki.shape[1], causal, window, q.device)
        scores = scores.masked_fill(~seen, float("-inf"))
        if sinks is not None:
            scores = torch.cat([scores, sinks[:, None, None].expand(-1, scores.shape[1], 1)], -1)
        p = torch.softmax(scores, -1)[..., : ki.shape[1]]
        p = torch.where(seen.any(-1)[:, None], p, torch.zeros_like(p))  # a query that sees no key reads 0
        outputs.append((p @ vi).transpose(0, 1))
    return torch.cat(outputs) if outputs else q.new_zeros(0, q.shape[1], v.shape[2])

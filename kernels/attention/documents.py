"""Packed attention one document at a time over torch's SDPA; memory linear in the length of a document.

Plain causal or full documents go to SDPA's own flash kernel. Windows and unequal query/key lengths go in blocks of
queries, each with just the keys it can see. Softcap and sinks, which SDPA has not, are plain maths on such blocks,
recomputed in the backward.
"""

from __future__ import annotations

import itertools

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.utils.checkpoint import checkpoint

BLOCK = 256  # query rows


def varlen_attention(
    q: Tensor,
    k: Tensor,
    v: Tensor,
    starts_q: list[int],
    starts_k: list[int],
    causal: bool,
    scale: float,
    window: tuple[int, int],
    softcap: float | None,
    sinks: Tensor | None,
) -> Tensor:
    """(T, heads, Dv) from packed q (T, heads, D), k and v (Tk, kv heads, D); window sides of -1 are open."""
    sizes_q = [b - a for a, b in itertools.pairwise(starts_q)]
    sizes_k = [b - a for a, b in itertools.pairwise(starts_k)]
    outputs = []
    # split, not slices: the backward of split is one concatenation, of n slices n buffers of the whole length
    for qi, ki, vi in zip(q.split(sizes_q), k.split(sizes_k), v.split(sizes_k)):
        if not qi.shape[0]:
            continue
        qi, ki, vi = (x.transpose(0, 1).unsqueeze(0) for x in (qi, ki, vi))
        outputs.append(_document(qi, ki, vi, causal, scale, window, softcap, sinks).squeeze(0).transpose(0, 1))
    return torch.cat(outputs) if outputs else q.new_zeros(0, q.shape[1], v.shape[2])


def _document(q, k, v, causal, scale, window, softcap, sinks) -> Tensor:
    """One document: q (1, heads, Lq, D), k (1, kv heads, Lk, D), v (1, kv heads, Lk, Dv)."""
    q_len, k_len = q.shape[2], k.shape[2]
    left, right = window
    if causal:
        right = 0
    if left >= k_len - 1:  # the window reaches further back than the document
        left = -1
    if right >= q_len - 1 and not causal:
        right = -1
    if softcap is None and sinks is None and left < 0 and k_len:
        grouped = q.shape[1] != k.shape[1]
        if right < 0 or q_len == 1:
            return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped)
        if causal and q_len == k_len:
            return F.scaled_dot_product_attention(q, k, v, scale=scale, enable_gqa=grouped, is_causal=True)
    shift = k_len - q_len  # query i stands at key i + shift
    blind = q_len if not k_len else min(q_len, max(0, -shift - right)) if right >= 0 else 0
    outputs = [q.new_zeros(1, q.shape[1], blind, v.shape[3])] if blind else []
    for i in range(blind, q_len, BLOCK):
        j = min(i + BLOCK, q_len)
        low = max(0, i + shift - left) if left >= 0 else 0
        high = min(k_len, j + shift + right) if right >= 0 else k_len
        block = (q[:, :, i:j], k[:, :, low:high], v[:, :, low:high])
        # rows i..j of the document against keys low..high, as a bottom-right aligned problem of their own
        seen = _block_mask(i + shift - low, j - i, high - low, left, right, q.device)
        if softcap is None and sinks is None:
            grouped = q.shape[1] != k.shape[1]
            outputs.append(F.scaled_dot_product_attention(*block, attn_mask=seen, scale=scale, enable_gqa=grouped))
        elif torch.is_grad_enabled():
            outputs.append(checkpoint(_plain, *block, seen, scale, softcap, sinks, use_reentrant=False))
        else:
            outputs.append(_plain(*block, seen, scale, softcap, sinks))
    return torch.cat(outputs, 2)


def _block_mask(first: int, rows: int, keys: int, left: int, right: int, device) -> Tensor:
    """(rows, keys) bool for queries standing at keys first, first + 1, ...; sides of -1 are open."""
    distance = torch.arange(keys, device=device)[None, :] - torch.arange(first, first + rows, device=device)[:, None]
    seen = torch.ones(rows, keys, dtype=torch.bool, device=device)
    if right >= 0:
        seen &= distance <= right
    if left >= 0:
        seen &= distance >= -left
    return seen


def _plain(q: Tensor, k: Tensor, v: Tensor, seen: Tensor, scale: float, softcap: float | None, sinks: Tensor | None):
    """Scores in fp32 (fp64 for fp64), the softmax over keys and, if there is one, the head's sink."""
    wide = torch.float64 if q.dtype == torch.float64 else torch.float32
    heads, kv_heads = q.shape[1], k.shape[1]
    grouped = q.to(wide).unflatten(1, (kv_heads, heads // kv_heads))
    scores = scale * (grouped @ k.to(wide).unsqueeze(2).transpose(3, 4))
    if softcap is not None:
        scores = softcap * torch.tanh(scores / softcap)
    scores = scores.masked_fill(~seen, float("-inf"))
    if sinks is not None:
        sink = sinks.to(wide).view(1, kv_heads, heads // kv_heads, 1, 1).expand(*scores.shape[:-1], 1)
        p = torch.softmax(torch.cat([scores, sink], -1), -1)[..., :-1]
    else:
        p = torch.softmax(scores, -1)
    return (p @ v.to(wide).unsqueeze(2)).flatten(1, 2).to(q.dtype)

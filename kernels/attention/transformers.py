"""`attn_implementation="longtrace"`: `varlen_attention` for every decoder model of transformers, unpatched."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor

from longtrace.kernels.attention.dispatch import varlen_attention

NAME = "longtrace"


def register_attention() -> str:
    """Register "longtrace" with transformers' attention and mask registries and return that name; repeatable.

    Models then take `attn_implementation="longtrace"`. They expect packed rows: pass `position_ids` that restart at
    each document, and best `cu_seq_lens_q` and `max_length_q` too (as transformers' flattening collator makes them).
    Raises ImportError without transformers.
    """
    from transformers import AttentionInterface
    from transformers.masking_utils import AttentionMaskInterface

    AttentionInterface.register(NAME, attention_forward)
    AttentionMaskInterface.register(NAME, no_mask)
    return NAME


# The mask functions of transformers.masking_utils that packed attention expresses without a mask.
SERVED = {
    "causal_mask_function",
    "bidirectional_mask_function",
    "sliding_window_overlay",
    "packed_sequence_mask_function",
    "remap_positions_for_packed_sequence",
    "and_masks",
}


def _parts(mask_function: Callable) -> set[str]:
    """The names of the functions a composed mask function was made by: "and_masks", "sliding_window_overlay", ..."""
    found, todo = set(), [mask_function]
    while todo:
        function = todo.pop()
        found.add(getattr(function, "__qualname__", type(function).__name__).split(".")[0])
        for cell in getattr(function, "__closure__", None) or ():
            inside = cell.cell_contents
            todo += [f for f in (inside if isinstance(inside, (tuple, list)) else [inside]) if callable(f)]
    return found


def no_mask(
    batch_size, q_length, kv_length, mask_function, q_offset=0, kv_offset=0, attention_mask=None, **kwargs
) -> None:
    """The mask of packed attention: none. Raises ValueError for what needs one: padding, static caches, overlays."""
    if attention_mask is not None and not bool(attention_mask.all()):
        raise ValueError(
            f'attn_implementation="{NAME}" takes packed rows without padding, and this attention_mask has zeros; '
            'pack the documents into one row, or use attn_implementation="sdpa" for padded batches'
        )
    if int(q_offset) + q_length != int(kv_offset) + kv_length:
        raise ValueError(
            f'attn_implementation="{NAME}" takes dynamic caches: {kv_length} keys for queries up to '
            f'{int(q_offset) + q_length}; use attn_implementation="sdpa" with a static cache'
        )
    if foreign := _parts(mask_function) - SERVED:
        raise ValueError(
            f'attn_implementation="{NAME}" takes causal, full and causal sliding-window attention; this model also asks '
            f'for {", ".join(sorted(foreign))}: use attn_implementation="sdpa"'
        )
    return None


def _restarts(position_ids: Tensor) -> tuple[Tensor, int]:
    """(cu_seqlens, longest) of a row whose positions restart at each document: a new one wherever they do not grow by 1."""
    flat = position_ids.reshape(-1)
    first = torch.ones(1, dtype=torch.bool, device=flat.device)
    starts = torch.cat([first, flat[1:] != flat[:-1] + 1]).nonzero().squeeze(1)
    offsets = torch.cat([starts, starts.new_tensor([flat.numel()])])
    return offsets.to(torch.int32), int(offsets.diff().max())


def attention_forward(
    module: torch.nn.Module,
    query: Tensor,
    key: Tensor,
    value: Tensor,
    attention_mask: Tensor | None,
    dropout: float = 0.0,
    scaling: float | None = None,
    sliding_window: int | None = None,
    softcap: float | None = None,
    is_causal: bool | None = None,
    s_aux: Tensor | None = None,
    cu_seq_lens_q: Tensor | None = None,
    cu_seq_lens_k: Tensor | None = None,
    max_length_q: int | None = None,
    max_length_k: int | None = None,
    position_ids: Tensor | None = None,
    **kwargs,
) -> tuple[Tensor, None]:
    """transformers' attention signature: query (B, heads, L, D), key and value (B, kv heads, Lk, D) -> (B, L, heads, D).

    Documents come from `cu_seq_lens_q`, else from `position_ids` that restart, else each batch row is one. With a cache
    (Lk != L) the last query is aligned with the last key. `sliding_window` w shows a query its own key and w - 1 before.
    """
    if attention_mask is not None:
        raise ValueError(f'attn_implementation="{NAME}" takes no attention mask; use attn_implementation="sdpa"')
    if dropout:
        raise ValueError(f'attn_implementation="{NAME}" has no attention dropout; set attention_dropout to 0')
    if kwargs.get("cache") is not None:
        raise ValueError(f'attn_implementation="{NAME}" has no paged cache; use attn_implementation="sdpa"')
    batch, heads, q_len, _ = query.shape
    k_len = key.shape[2]
    q, k, v = (x.transpose(1, 2).reshape(-1, x.shape[1], x.shape[3]) for x in (query, key, value))
    if cu_seq_lens_q is not None:
        cu, longest = cu_seq_lens_q, max_length_q
        cu_k, longest_k = (None, None) if q_len == k_len else (cu_seq_lens_k, max_length_k)
    elif q_len == k_len and position_ids is not None and position_ids.ndim == 2:
        cu, longest = _restarts(position_ids.expand(batch, -1))
        cu_k = longest_k = None
    else:
        rows = torch.arange(batch + 1, device=query.device, dtype=torch.int32)
        cu, longest, cu_k, longest_k = rows * q_len, q_len, rows * k_len, k_len
    causal = is_causal if is_causal is not None else getattr(module, "is_causal", True)
    if sliding_window is not None and not causal:
        raise ValueError(f'attn_implementation="{NAME}" has causal windows only; use attn_implementation="sdpa"')
    window = None if sliding_window is None else (sliding_window - 1, 0)
    out = varlen_attention(
        q, k, v, cu, longest, cu_seqlens_k=cu_k, max_seqlen_k=longest_k,
        causal=causal, scale=scaling, window=window, softcap=softcap, sinks=s_aux,
    )  # fmt: skip
    return out.view(batch, q_len, heads, out.shape[2]), None

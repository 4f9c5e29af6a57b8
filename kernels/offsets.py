"""Offsets of ragged groups or documents in a flat array, checked once for every op that takes them."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor


def checked_offsets(name: str, offsets: Tensor | Sequence[int], count: int, things: str) -> Tensor:
    """`offsets` as int64 on the host, non-decreasing from 0 to `count`; ValueError names the entry that is not."""
    offsets = torch.as_tensor(offsets)
    if offsets.ndim != 1 or not len(offsets) or offsets.dtype.is_floating_point or offsets.dtype == torch.bool:
        raise ValueError(f"{name} must be a vector of at least one integer, got {offsets.dtype} {tuple(offsets.shape)}")
    offsets = offsets.to("cpu", torch.int64).contiguous()
    if offsets[0] != 0:
        raise ValueError(f"{name}[0] is {offsets[0]}; it must be 0")
    if (down := (offsets.diff() < 0).nonzero()).numel():
        at = int(down[0])
        raise ValueError(f"{name}[{at + 1}] is {offsets[at + 1]}, below {name}[{at}] = {offsets[at]}")
    if offsets[-1] != count:
        raise ValueError(f"{name}[{len(offsets) - 1}] is {offsets[-1]}; it must be {count}, the number of {things}")
    return offsets

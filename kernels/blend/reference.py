"""The gradient blend in plain PyTorch: the truth on float64 tensors, and what serves devices and dtypes without a kernel."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

CHUNK = 1 << 22  # elements at a time: what is wider than the gradients stays small


def blend_gradients_(trace_grads: Sequence[Tensor], empty_grads: Sequence[Tensor], alpha: float) -> Tensor:
    """trace = alpha trace + (1 - alpha) empty, in place; (4,): |trace|^2, |empty|^2, their dot, how many were not finite.

    fp64 tensors in fp64, others in fp32 and rounded once; the sums of chunks are added in fp64.
    """
    parts = []
    for trace, empty in zip(trace_grads, empty_grads, strict=True):
        wide = torch.promote_types(torch.promote_types(trace.dtype, empty.dtype), torch.float32)
        for t, e in zip(trace.view(-1).split(CHUNK), empty.view(-1).split(CHUNK), strict=True):
            a, b = t.to(wide), e.to(wide)
            bad = a.numel() + b.numel() - a.isfinite().sum() - b.isfinite().sum()
            # sum() adds pairwise, dot() one by one
            parts.append(torch.stack([(a * a).sum(), (b * b).sum(), (a * b).sum(), bad.to(wide)]))
            t.copy_(alpha * a + (1 - alpha) * b)
    device = parts[0].device if parts[0].device.type in ("cpu", "cuda") else torch.device("cpu")  # some lack float64
    return torch.stack([p.to(device).double() for p in parts]).sum(0)

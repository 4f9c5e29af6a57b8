"""`explain()`: which backend serves each op on this machine, and why."""

from __future__ import annotations

import torch

from longtrace.kernels.advantages import dispatch as advantages
from longtrace.kernels.attention.dispatch import choose
from longtrace.kernels.blend import dispatch as blend
from longtrace.kernels.head import backend as head
from longtrace.kernels.layers import dispatch as layers
from longtrace.kernels.packing import dispatch as packing


def rows() -> list[tuple[str, str, str]]:
    """(op, backend, why) for every op, for the device a training run would take here."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    attention = choose(device, torch.bfloat16)
    return [
        ("pack", packing.BACKEND, packing.WHY),
        ("head", *head.describe(device)),
        ("varlen_attention", *attention),
        ("group_advantages", *advantages.choose(device, torch.float32)),
        ("blend_gradients", *blend.choose(device, {torch.bfloat16, torch.float32})),
        ("layers", *layers.choose(device, torch.bfloat16)),
    ]


def explain() -> str:
    """A table of (op, backend, why), one line an op."""
    table = rows()
    widths = [max(len(row[i]) for row in table) for i in range(2)]
    return "\n".join(f"{op:<{widths[0]}}  {name:<{widths[1]}}  {why}" for op, name, why in table)

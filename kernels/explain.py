"""`explain()`: which backend serves each op on this machine, and why."""

from __future__ import annotations

from collections.abc import Callable

import torch

from longtrace.kernels import backend
from longtrace.kernels.advantages import dispatch as advantages
from longtrace.kernels.attention import dispatch as attention
from longtrace.kernels.backend import BackendRefused, Choice
from longtrace.kernels.blend import dispatch as blend
from longtrace.kernels.head import backend as head
from longtrace.kernels.layers import dispatch as layers
from longtrace.kernels.packing import dispatch as packing
from longtrace.kernels.packing import rows as packed_rows

BF16, FP32 = torch.bfloat16, torch.float32
USUAL: dict[str, Callable[[str], Choice]] = {  # what a training run asks for
    "pack_rows": packed_rows.choose,
    "head": lambda device: head.choose(device, BF16),
    "varlen_attention": lambda device: attention.choose(device, BF16),
    "group_advantages": lambda device: advantages.choose(device, FP32),
    "blend_gradients": lambda device: blend.choose(device, (BF16, FP32)),
    "layers": lambda device: layers.choose(device, BF16),
}


def rows() -> list[tuple[str, str, str]]:
    """(op, backend, why) for every op, for the device a training run would take here; then what else was chosen so far.

    `pack` works on a list of lengths: LONGTRACE_BACKEND leaves it alone.
    """
    device = "cuda" if torch.cuda.is_available() else "cpu"
    backend.forced()  # an unknown word is refused once, not op by op
    made = list(backend.made())
    table = [("pack", packing.BACKEND, packing.WHY)]
    for op, choose in USUAL.items():
        try:
            table.append((op, *choose(device)[1:]))
        except BackendRefused as refused:
            table.append((op, "refused", str(refused)))
    for op, case, choice in made:
        if (op, *choice[1:]) not in table:
            table.append((f"{op}: {case}", *choice[1:]))
    return table


def explain() -> str:
    """A table of (op, backend, why), one line an op. ValueError where LONGTRACE_BACKEND names no backend."""
    table = rows()
    widths = [max(len(row[i]) for row in table) for i in range(2)]
    return "\n".join(f"{op:<{widths[0]}}  {name:<{widths[1]}}  {why}" for op, name, why in table)

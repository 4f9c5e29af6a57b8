"""Loads `longtrace.kernels._C`, the torch ops in C++, and registers their fakes; without it everything is PyTorch.

`_C` is a plain shared library (LibTorch's stable ABI, no Python in it): torch loads it, import does not.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.abi3.so")


def _load(library: Path) -> tuple[bool, str]:
    """Whether the ops are registered now, and why not."""
    if os.environ.get("LONGTRACE_EXTENSION") == "0":
        return False, "LONGTRACE_EXTENSION=0"
    if not library.exists():
        return False, "longtrace.kernels._C was not built (no compiler, or no torch at build time: docs/install.md)"
    try:
        torch.ops.load_library(library)
        torch.ops.longtrace.softmax_stats  # noqa: B018  (raises AttributeError if the library is not ours)
    except (OSError, AttributeError, RuntimeError) as error:
        return False, f"longtrace.kernels._C does not load: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return True, f"longtrace.kernels._C ({library})"


LOADED, WHY = _load(LIBRARY)

if LOADED:

    @torch.library.register_fake("longtrace::softmax_stats")
    def _(logits, target, entropy):
        rows = logits.shape[0]
        return tuple(logits.new_empty(n) for n in (rows, rows, rows, rows if entropy else 0))

    @torch.library.register_fake("longtrace::dlogits_")
    def _(logits, target, maximum, log_sum, a, b, entropy, e):
        return None

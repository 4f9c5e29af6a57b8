"""Loads `longtrace.kernels._C`, the torch ops in C++, and registers their fakes; without it everything is PyTorch.

`_C` is a plain shared library (LibTorch's stable ABI, no Python in it): torch loads it, import does not.
"""

from __future__ import annotations

from importlib.util import find_spec

import torch


def _load() -> tuple[bool, str]:
    spec = find_spec("longtrace.kernels._C")
    if spec is None or not spec.origin:
        return False, "longtrace.kernels._C was not built (no compiler, or no torch at build time: docs/install.md)"
    try:
        torch.ops.load_library(spec.origin)
        torch.ops.longtrace.softmax_stats  # noqa: B018  (raises AttributeError if the library is not ours)
    except (OSError, AttributeError, RuntimeError) as error:
        return False, f"longtrace.kernels._C does not load: {str(error).splitlines()[0]}"
    return True, f"longtrace.kernels._C ({spec.origin})"


LOADED, WHY = _load()

if LOADED:

    @torch.library.register_fake("longtrace::softmax_stats")
    def _(logits, target, entropy):
        rows = logits.shape[0]
        return tuple(logits.new_empty(n) for n in (rows, rows, rows, rows if entropy else 0))

    @torch.library.register_fake("longtrace::dlogits_")
    def _(logits, target, maximum, log_sum, a, b, entropy, e):
        return None

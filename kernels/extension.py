"""Loads `longtrace.kernels._C`, the torch ops in C++, and registers their fakes; without it everything is PyTorch.

`_C` is a plain shared library (LibTorch's stable ABI, no Python in it): torch loads it, import does not.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch

LIBRARY = Path(__file__).with_name("_C.abi3.so")
OPS = (
    "ask_huge_pages_", "head_buffer", "head_forward", "head_gradient_", "head_dh", "head_dh_sample", "head_dw_", "head_column_max",
    "attention_forward", "attention_backward",
    "rms_norm", "rms_norm_backward", "rope", "glu", "glu_backward",  # their fakes: layers/native.py
    "group_advantages", "blend_gradients_", "pack_weight", "packed_linear",  # each beside its dispatch
)  # fmt: skip
CAPABILITIES = ("baseline", "avx2", "avx512", "avx512_bf16", "amx")

if os.environ.get("LONGTRACE_CPU_CAPABILITY", "baseline") not in CAPABILITIES:
    raise ValueError(
        f"LONGTRACE_CPU_CAPABILITY: found {os.environ['LONGTRACE_CPU_CAPABILITY']!r}; accepted: {', '.join(CAPABILITIES)}"
    )


def _load(library: Path) -> tuple[bool, str]:
    """Whether the ops are registered now, and why not."""
    if os.environ.get("LONGTRACE_EXTENSION") == "0":
        return False, "LONGTRACE_EXTENSION=0"
    if not library.exists():
        return False, "longtrace.kernels._C was not built (no compiler, or no torch at build time: docs/install.md)"
    try:
        torch.ops.load_library(library)
        for op in OPS:
            getattr(torch.ops.longtrace, op)  # raises AttributeError if the library is not ours, or older
    except (OSError, AttributeError, RuntimeError) as error:
        return False, f"longtrace.kernels._C does not load: {(str(error).splitlines() or [type(error).__name__])[0]}"
    return True, f"longtrace.kernels._C ({library})"


LOADED, WHY = _load(LIBRARY)
BF16_OPERANDS = LOADED and torch.ops.longtrace.cpu_capability() in ("avx512_bf16", "amx")

if LOADED:

    @torch.library.register_fake("longtrace::head_buffer")
    def _(weight, n):
        dtype = torch.bfloat16 if BF16_OPERANDS and weight.dtype == torch.bfloat16 else torch.float32
        panels = (n + 31) // 32
        return weight.new_empty(
            weight.shape[0], (panels | 1) * 32, dtype=dtype
        )  # an odd number: see row_stride in csrc

    @torch.library.register_fake("longtrace::ask_huge_pages_")
    def _(x):
        return None

    @torch.library.register_fake("longtrace::head_forward")
    def _(h, weight, bias, target, logit_scale, softcap, temperature, entropy, mass, g):
        n = h.shape[0]
        return tuple(
            h.new_empty(size, dtype=torch.float32) for size in (n, n, n, n if entropy else 0, n if mass else 0, n, n)
        )

    @torch.library.register_fake("longtrace::head_gradient_")
    def _(g, h, weight, bias, target, logit_scale, softcap, temperature, maximum, log_sum, a, e, entropy):
        return None

    @torch.library.register_fake("longtrace::head_dh_sample")
    def _(g, right, n, scale, step):
        return g.new_empty(n, right.shape[1], dtype=torch.float32)

    @torch.library.register_fake("longtrace::head_dh")
    def _(g, right, rows, n, scale):
        return g.new_empty(n, right.shape[1], dtype=torch.float32)

    @torch.library.register_fake("longtrace::head_dw_")
    def _(out, g, right, scale, rows, add):
        return None

    @torch.library.register_fake("longtrace::head_column_max")
    def _(g, scale):
        return g.new_empty(g.shape[0], dtype=torch.float32)

    @torch.library.register_fake("longtrace::attention_forward")
    def _(q, k, v, starts_q, starts_k, scale, softcap, causal, left, right, sinks):
        rows = q.new_empty(q.shape[:2], dtype=torch.float32)
        return q.new_empty(*q.shape[:2], v.shape[2]), rows, torch.empty_like(rows)

    @torch.library.register_fake("longtrace::attention_backward")
    def _(grad, q, k, v, out, reference, log_sum, starts_q, starts_k, scale, softcap, causal, left, right):
        return tuple(torch.empty_like(x) for x in (q, k, v, log_sum))


def on_huge_pages(fresh: torch.Tensor) -> torch.Tensor:
    """`fresh`, just allocated and not yet written: on the CPU its pages become large ones, which spares a fault every 4 KB."""
    if LOADED and fresh.device.type == "cpu":
        torch.ops.longtrace.ask_huge_pages_(fresh)
    return fresh

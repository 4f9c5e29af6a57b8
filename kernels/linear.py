"""A linear layer whose weight is packed once and used many times: what decoding asks, a few rows through every weight a step.

On the CPU: bf16 where the processor multiplies it, and fp32. A row's result has the same bits however many rows come with
it and on any number of threads, which torch's products do not promise.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn

from longtrace.kernels import backend, extension

PANEL = 32  # weight rows side by side


def packs(*weights: Tensor) -> bool:
    """Whether weights (N_i, K), of one dtype, can be packed here."""
    if not extension.LOADED or backend.forced() not in (None, "cpu") or len({w.dtype for w in weights}) != 1:
        return False
    native = torch.bfloat16 if extension.BF16_OPERANDS else torch.float32
    return weights[0].dtype in (native, torch.float32) and all(
        w.device.type == "cpu" and w.ndim == 2 and w.stride(1) == 1 and type(w) in (Tensor, nn.Parameter)
        for w in weights
    )


class PackedLinear:
    """x W^T + b of weights (N_i, K) one below the other, as they are now, and their biases (N_i,), None for none.

    Holds sum N_i x K elements. Raises RuntimeError for weights that do not pack.
    """

    def __init__(self, weights: list[Tensor], biases: list[Tensor | None] | None = None):
        weights = [w.detach() for w in weights]
        self.columns = sum(len(w) for w in weights)
        self.packed = torch.ops.longtrace.pack_weight(torch.cat(weights) if len(weights) > 1 else weights[0])
        some = [b is not None for b in biases or ()]
        parts = [w.new_zeros(len(w)) if b is None else b.detach() for w, b in zip(weights, biases or ())]
        self.bias = torch.cat(parts).float() if any(some) else None

    def __call__(self, x: Tensor, fp32: bool = False) -> Tensor:
        """(n, N) of x (n, K) in the weights' dtype; sums in fp32, rounded once to x's dtype, or kept in fp32."""
        return torch.ops.longtrace.packed_linear(x, self.packed, self.columns, self.bias, fp32)


if extension.LOADED:

    @torch.library.register_fake("longtrace::pack_weight")
    def _(weight):
        step = 32 if weight.dtype == torch.bfloat16 else 1
        return weight.new_empty(-(-weight.shape[0] // PANEL), -(-weight.shape[1] // step) * step, PANEL)

    @torch.library.register_fake("longtrace::packed_linear")
    def _(x, packed, columns, bias, fp32):
        return x.new_empty(x.shape[0], columns, dtype=torch.float32 if fp32 else x.dtype)

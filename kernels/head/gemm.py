"""The three GEMMs of a head, with fp32 accumulation and fp32 results for bf16 and fp16 operands, in fixed-size blocks.

CUDA: `torch.mm(..., out_dtype=float32)`. CPU bf16: operands held in fp32 and multiplied with oneDNN allowed to use bf16
dot products; exact for values that are bf16 already, and two to four times faster than fp32. fp32 and fp64: as they are.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import torch
from torch import Tensor

from longtrace.kernels.head.spec import compute_dtype


@contextmanager
def bf16_dot_products(enabled: bool) -> Iterator[None]:
    """Let oneDNN multiply fp32 tensors by bf16 dot products inside the block; the setting is restored on any exit."""
    if not enabled:
        yield
        return
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    matmul.fp32_precision = "bf16"
    try:
        yield
    finally:
        matmul.fp32_precision = before


class HeadGemm:
    """logits = h W^T, dh = dz W, dW += dz^T h for one weight (V, H) of bf16, fp16, fp32 or fp64."""

    def __init__(self, weight: Tensor, block: int):
        self.dtype = weight.dtype
        self.accumulate = compute_dtype(weight.dtype)
        self.block = block
        self.narrow = weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)
        on_cpu = weight.device.type == "cpu"
        self.fast = on_cpu and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
        self.weight = weight if self.narrow else weight.to(self.accumulate)

    def rows(self, input: Tensor, index: Tensor, padded: int) -> Tensor:
        """`input[index]` in the operand dtype, followed by zero rows up to `padded`."""
        out = input.new_zeros(padded, input.shape[1], dtype=self.weight.dtype)
        out[: index.numel()] = input.index_select(0, index)
        return out

    def logits(self, h: Tensor, out: Tensor) -> None:
        """out (rows, V) = h (rows, H) W^T; rows is a multiple of the block."""
        with bf16_dot_products(self.fast):
            for i in range(0, h.shape[0], self.block):
                self._mm(h[i : i + self.block], self.weight.t(), out[i : i + self.block])

    def dh(self, dz: Tensor, out: Tensor) -> None:
        """out (rows, H) = dz (rows, V) W; on CUDA dz is rounded to the operand dtype first, as autograd does."""
        dz = dz.to(self.weight.dtype)
        with bf16_dot_products(self.fast):
            for i in range(0, dz.shape[0], self.block):
                self._mm(dz[i : i + self.block], self.weight, out[i : i + self.block])

    def dw_(self, accumulator: Tensor, dz: Tensor, h: Tensor, first: bool) -> None:
        """accumulator (V, H) += dz^T h in fp32 (fp64 for fp64); the first product overwrites what was there."""
        beta = 0.0 if first else 1.0
        if self.narrow:
            dz = dz.to(h.dtype)
            torch.addmm(accumulator, dz.t(), h, beta=beta, out_dtype=self.accumulate, out=accumulator)
            return
        with bf16_dot_products(self.fast):
            accumulator.addmm_(dz.t(), h, beta=beta)

    def _mm(self, a: Tensor, b: Tensor, out: Tensor) -> None:
        if self.narrow:
            torch.mm(a, b, out_dtype=self.accumulate, out=out)
        else:
            torch.mm(a, b, out=out)

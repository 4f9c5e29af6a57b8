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
        self.accumulate = compute_dtype(weight.dtype)
        self.block = block
        self.narrow = weight.is_cuda and weight.dtype in (torch.bfloat16, torch.float16)
        on_cpu = weight.device.type == "cpu"
        self.fast = on_cpu and weight.dtype == torch.bfloat16 and torch.backends.mkldnn.is_available()
        self.weight = weight if self.narrow else weight.to(self.accumulate)

    def logits(self, h: Tensor) -> Tensor:
        """(n, V) = h (n, H) W^T, accumulated and returned in fp32 (fp64 for fp64)."""
        return self._blocks(h, self.weight.t())

    def dh(self, dz: Tensor, columns: Tensor | None = None) -> Tensor:
        """(n, H) = dz (n, V) W, or W's rows `columns`; on CUDA dz is rounded to the operand dtype, as autograd does."""
        return self._blocks(dz, self.weight if columns is None else self.weight.index_select(0, columns))

    def dw_(self, accumulator: Tensor, dz: Tensor, h: Tensor, add: bool) -> None:
        """accumulator (V, H) = or += dz (V, n) h (n, H)."""
        beta = 1.0 if add else 0.0
        dz, h = dz.to(self.weight.dtype), h.to(self.weight.dtype)
        if self.narrow:
            torch.addmm(accumulator, dz, h, beta=beta, out_dtype=self.accumulate, out=accumulator)
            return
        with bf16_dot_products(self.fast):
            accumulator.addmm_(dz, h, beta=beta)

    def product(self, a: Tensor, b: Tensor) -> Tensor:
        """a @ b of operands rounded to the operand dtype, accumulated and returned in fp32 (fp64 for fp64)."""
        a, b = a.to(self.weight.dtype), b.to(self.weight.dtype)
        if self.narrow:
            return torch.mm(a, b, out_dtype=self.accumulate)
        with bf16_dot_products(self.fast):
            return a @ b

    def _blocks(self, rows: Tensor, right: Tensor) -> Tensor:
        """rows @ right, `block` rows a call, the last ones filled up with zero rows."""
        n, block = rows.shape[0], self.block
        padded = -(-n // block) * block
        out = rows.new_empty(padded, right.shape[1], dtype=self.accumulate)
        with bf16_dot_products(self.fast):
            for i in range(0, n, block):
                part = rows[i : i + block].to(self.weight.dtype)
                if part.shape[0] < block:
                    part = torch.cat((part, part.new_zeros(block - part.shape[0], part.shape[1])))
                if self.narrow:
                    torch.mm(part, right, out_dtype=self.accumulate, out=out[i : i + block])
                else:
                    torch.mm(part, right, out=out[i : i + block])
        return out[:n]

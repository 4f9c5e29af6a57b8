"""The CPU engine: the tile kernels of csrc/cpu through torch.ops.longtrace, for bf16, fp16 and fp32 inputs.

Logits live in one 128 x 32 tile per thread; only exp(z - reference) of a chunk reaches memory, in the operand dtype (bf16
for bf16 inputs, else fp32), and only when a gradient is wanted. Results do not depend on the number of threads.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtrace.kernels import extension
from longtrace.kernels.head.engine import Forward, Matrix
from longtrace.kernels.head.epilogue import RowStats
from longtrace.kernels.head.spec import Transform


class TileEngine:
    """As `TorchEngine`; `Matrix.g` is (V, n padded to whole panels), its last columns 0."""

    dtype = torch.float32

    def __init__(self, weight: Tensor, bias: Tensor | None, transform: Transform, block: int):
        self.weight = weight if weight.stride(1) == 1 else weight.contiguous()
        self.transform, self.block = transform, block  # a panel of csrc
        self.bias = None if bias is None else bias.float().contiguous()
        self.memory: Tensor | None = None
        self.scalars = (transform.logit_scale, transform.softcap or 0.0, transform.temperature)

    def _buffer(self, n: int) -> Tensor:
        """g for n rows: one block of memory, used again by every chunk of the call."""
        if self.memory is None:
            self.memory = torch.ops.longtrace.head_buffer(self.weight, n)
            return self.memory
        rows, width = self.weight.shape[0], self._width(n)
        if rows * width > self.memory.numel():
            self.memory = None
            return self._buffer(n)
        return self.memory.view(-1)[: rows * width].view(rows, width)

    def _width(self, n: int) -> int:
        """n in an odd number of panels: row_stride in csrc."""
        return (-(-n // self.block) | 1) * self.block

    def forward(self, h: Tensor, target: Tensor, entropy: bool, keep: bool, mass: bool = False) -> Forward:
        g = self._buffer(h.shape[0]) if keep else None
        maximum, log_sum, log_prob, ent, sums, slope, scale = torch.ops.longtrace.head_forward(
            h, self.weight, self.bias, target, *self.scalars, entropy, mass, g
        )
        stats = RowStats(maximum, log_sum, log_prob, ent if entropy else None)
        return Forward(stats, Matrix(g, scale) if keep else None, sums if mass else None, slope)

    def gradient(self, h: Tensor, target: Tensor, stats: RowStats, a: Tensor, e: Tensor | None) -> Matrix:
        zero, g = torch.zeros_like(a), self._buffer(h.shape[0])
        torch.ops.longtrace.head_gradient_(
            g, h, self.weight, self.bias, target, *self.scalars, stats.maximum, stats.log_sum, a,
            zero if e is None else e, zero if e is None else stats.entropy,
        )  # fmt: skip
        return Matrix(g, torch.ones_like(a))

    def scaled(self, matrix: Matrix, factor: Tensor) -> Matrix:
        return Matrix(matrix.g, matrix.scale * factor)

    def pack(self, values: Tensor | list[Tensor], scale: Tensor) -> Matrix:
        values = values if isinstance(values, list) else [values]
        dtype = self.weight.dtype if extension.BF16_OPERANDS and self.weight.dtype == torch.bfloat16 else torch.float32
        rows, k = values[0].shape[0], sum(x.shape[1] for x in values)
        g = values[0].new_empty(rows, self._width(k), dtype=dtype)
        g[:, k:] = 0
        for part, x in zip(g[:, :k].split([x.shape[1] for x in values], 1), values):
            part.copy_(x)
        return Matrix(g, scale)

    def column_max(self, matrix: Matrix) -> Tensor:
        return torch.ops.longtrace.head_column_max(matrix.g, matrix.scale)

    def take(self, matrix: Matrix, columns: Tensor) -> Matrix:
        return Matrix(matrix.g.index_select(0, columns), matrix.scale)

    def project(self, matrix: Matrix, right: Tensor) -> Tensor:
        out = right.new_empty(matrix.g.shape[0], right.shape[1], dtype=self.dtype)
        torch.ops.longtrace.head_dw_(out, matrix.g, right.contiguous(), matrix.scale, None, False)
        return out

    def rows(self, matrix: Matrix, right: Tensor) -> Tensor:
        return torch.ops.longtrace.head_dh(matrix.g, right.contiguous(), None, matrix.scale.shape[0], matrix.scale)

    def sample_rows(self, matrix: Matrix, right: Tensor, step: int) -> Tensor:
        scale = matrix.scale
        return torch.ops.longtrace.head_dh_sample(matrix.g, right.contiguous(), scale.shape[0], scale, step)

    def dh(self, matrix: Matrix, columns: Tensor | None) -> Tensor:
        return torch.ops.longtrace.head_dh(matrix.g, self.weight, columns, matrix.scale.shape[0], matrix.scale)

    def profiles_dh(self, matrix: Matrix) -> Tensor:
        return self.dh(matrix, None)

    def dw_(self, accumulator: Tensor, matrix: Matrix, h: Tensor, columns: Tensor | None, add: bool = True) -> None:
        torch.ops.longtrace.head_dw_(accumulator, matrix.g, h, matrix.scale, columns, add)

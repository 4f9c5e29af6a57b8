"""The CUDA engines: library products for the gradients, Triton for the logits of bf16 and for all passes between.

Not timed on a GPU. Their arithmetic is tested on the CPU under Triton's interpreter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtrace.kernels.head import triton_columns as columns_of
from longtrace.kernels.head import triton_rows as rows_of
from longtrace.kernels.head import triton_tile as tiles_of
from longtrace.kernels.head.engine import Forward, Matrix, TorchEngine
from longtrace.kernels.head.epilogue import RowStats
from longtrace.kernels.head.spec import Transform


class TritonRows(TorchEngine):
    """For fp32 and fp16: fp32 logits from the library, one read for the statistics, one read and write for p.

    `Matrix.g` is the transpose of (n, V) in the operand dtype; row factors stay in `scale`, as in tile.py.
    """

    def forward(self, h: Tensor, target: Tensor, entropy: bool, keep: bool, mass: bool = False) -> Forward:
        raw = self.gemm.logits(h)
        stats = rows_of.softmax_stats(raw, target, self.bias, self.transform, entropy)
        slope = self.transform.slope(stats.log_prob + stats.maximum + stats.log_sum)
        if not keep:
            return Forward(stats, None, None, slope)
        matrix = self._dlogits(raw, target, stats, torch.ones_like(stats.maximum), None)
        sums = self.rows(matrix, raw.new_ones(raw.shape[1], 1)).squeeze(1) if mass else None
        return Forward(stats, matrix, sums, slope)

    def gradient(
        self, h: Tensor, target: Tensor, stats: RowStats, a: Tensor, e: Tensor | None, spread: Tensor | None = None
    ) -> Matrix:
        if spread is not None:  # label smoothing under a softcap
            return super().gradient(h, target, stats, a, e, spread)
        return self._dlogits(self.gemm.logits(h), target, stats, a, e)

    def scaled(self, matrix: Matrix, factor: Tensor) -> Matrix:
        return Matrix(matrix.g, factor if matrix.scale is None else matrix.scale * factor)

    def column_max(self, matrix: Matrix) -> Tensor:
        return columns_of.column_max(matrix.g.t(), matrix.scale)

    def take(self, matrix: Matrix, columns: Tensor) -> Matrix:
        return Matrix(columns_of.compact(matrix.g.t(), columns).t(), matrix.scale)

    def dw_(self, accumulator: Tensor, matrix: Matrix, h: Tensor, columns: Tensor | None, add: bool = True) -> None:
        if matrix.scale is not None:  # onto h (n, H), which is narrow, and not onto g
            if h.dtype == torch.float16 and columns is None:  # 1/T would be subnormal: the largest factor goes outside
                top = matrix.scale.abs().amax().clamp(min=torch.finfo(torch.float32).tiny)
                product = self.gemm.product(matrix.g, h * (matrix.scale / top)[:, None]) * top
                accumulator.add_(product) if add else accumulator.copy_(product)
                return
            h = torch.mul(h, matrix.scale[:, None], out=torch.empty_like(h))  # in fp32, rounded once
        super().dw_(accumulator, Matrix(matrix.g, None), h, columns, add)

    def _dlogits(self, raw: Tensor, target: Tensor, stats: RowStats, a: Tensor, e: Tensor | None) -> Matrix:
        """p (a - e (log p + entropy)) times the softcap's slope, 0 at the targets."""
        out = raw if self.gemm.weight.dtype == raw.dtype else torch.empty_like(raw, dtype=self.gemm.weight.dtype)
        return Matrix(rows_of.dlogits(raw, target, self.bias, self.transform, stats, a, e, out).t(), None)


class TritonTiles(TritonRows):
    """For bf16: exp(z - reference), or the gradient, leaves the tile of the first product; 6 bytes a logit in all.

    `Matrix.g` is the transpose of (n in whole blocks, V), blocks as the library's products take them; rows past n are 0.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, transform: Transform, block: int):
        super().__init__(rows_of.near_rows(rows_of.unit_rows("weight", weight)), bias, transform, block)
        self.memory: Tensor | None = None

    def _buffer(self, n: int) -> Tensor:
        """(n in whole blocks, V), the rows past n 0: one block of memory, used again by every chunk of the call."""
        V, rows = self.weight.shape[0], -(-n // self.gemm.block) * self.gemm.block
        if self.memory is None or len(self.memory) < rows:
            self.memory = None
            self.memory = self.weight.new_empty(rows, -(-V // 16) * 16)  # rows as the tiles and the library like them
        if n < rows:
            self.memory[n:rows].zero_()
        return self.memory[:rows, :V]

    def forward(self, h: Tensor, target: Tensor, entropy: bool, keep: bool, mass: bool = False) -> Forward:
        n, g = h.shape[0], self._buffer(h.shape[0]) if keep else None
        found = tiles_of.softmax_tiles(
            h, self.weight, self.bias, target, self.transform, entropy, mass and keep, g[:n] if keep else None
        )
        slope = self.transform.slope(found.target)
        return Forward(found.stats, Matrix(g.t(), found.scale) if keep else None, found.mass, slope)

    def gradient(self, h: Tensor, target: Tensor, stats: RowStats, a: Tensor, e: Tensor | None) -> Matrix:
        n, g = h.shape[0], self._buffer(h.shape[0])
        tiles_of.gradient_tiles(h, self.weight, self.bias, target, self.transform, stats, a, e, g[:n])
        return Matrix(g.t(), torch.ones_like(a))

    def column_max(self, matrix: Matrix) -> Tensor:
        return super().column_max(_narrowed(matrix))

    def take(self, matrix: Matrix, columns: Tensor) -> Matrix:
        return super().take(_narrowed(matrix), columns)

    def project(self, matrix: Matrix, right: Tensor) -> Tensor:
        return super().project(_narrowed(matrix), right)

    def rows(self, matrix: Matrix, right: Tensor) -> Tensor:
        return super().rows(_narrowed(matrix), right)

    def dw_(self, accumulator: Tensor, matrix: Matrix, h: Tensor, columns: Tensor | None, add: bool = True) -> None:
        super().dw_(accumulator, _narrowed(matrix), h, columns, add)

    def dh(self, matrix: Matrix, columns: Tensor | None) -> Tensor:
        return self.gemm.dh(matrix.g.t(), columns)[: len(matrix.scale)].mul_(matrix.scale[:, None])


def _narrowed(matrix: Matrix) -> Matrix:
    """Without the rows of the buffer that no token fills."""
    return Matrix(matrix.g[:, : len(matrix.scale)], matrix.scale)

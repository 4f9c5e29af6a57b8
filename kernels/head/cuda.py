"""The CUDA engine: cuBLAS chunks with fp32 logits, and Triton for everything between the products.

Not timed on a GPU. Its arithmetic is tested on the CPU under Triton's interpreter.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtrace.kernels.head import triton_columns as columns_of
from longtrace.kernels.head import triton_rows as rows_of
from longtrace.kernels.head.engine import Forward, Matrix, TorchEngine
from longtrace.kernels.head.epilogue import RowStats


class TritonEngine(TorchEngine):
    """As `TorchEngine`; one read of a chunk's logits for the statistics, one read and write for the probabilities.

    `Matrix.g` is the transpose of (n, V) in the operand dtype; row factors stay in `scale`, as in tile.py.
    """

    def forward(self, h: Tensor, target: Tensor, entropy: bool, keep: bool, mass: bool = False) -> Forward:
        raw = self.gemm.logits(h)
        stats = rows_of.softmax_stats(raw, target, self.bias, self.transform, entropy)
        slope = self._slope(stats)
        if not keep:
            return Forward(stats, None, None, slope)
        one, zero = torch.ones_like(stats.maximum), torch.zeros_like(stats.maximum)
        matrix = self._dlogits(raw, target, stats, one, zero, None)
        if not mass:
            return Forward(stats, matrix, None, slope)
        every = torch.ones(raw.shape[1], dtype=torch.bool, device=raw.device)
        return Forward(stats, matrix, columns_of.row_mass(matrix.g.t(), every) * matrix.scale, slope)

    def gradient(
        self, h: Tensor, target: Tensor, stats: RowStats, a: Tensor, e: Tensor | None, spread: Tensor | None = None
    ) -> Matrix:
        if spread is not None:  # label smoothing under a softcap
            return super().gradient(h, target, stats, a, e, spread)
        return self._dlogits(self.gemm.logits(h), target, stats, a, torch.zeros_like(a), e)

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
            h = (h * matrix.scale[:, None]).to(h.dtype)
        super().dw_(accumulator, Matrix(matrix.g, None), h, columns, add)

    def _dlogits(self, raw: Tensor, target: Tensor, stats: RowStats, a: Tensor, b: Tensor, e: Tensor | None) -> Matrix:
        """p (a - e (log p + entropy)) times the softcap's slope, 0 at the targets; the kernel's gain is taken back."""
        out = raw if self.gemm.weight.dtype == raw.dtype else torch.empty_like(raw, dtype=self.gemm.weight.dtype)
        rows_of.dlogits(raw, target, self.bias, self.transform, stats, a, b, e, None, None, out)
        out.scatter_(1, target[:, None], 0.0)
        return Matrix(out.t(), torch.full_like(a, 1.0 / self.transform.gain))

    def _slope(self, stats: RowStats) -> Tensor | None:
        return self.transform.slope(stats.log_prob + stats.maximum + stats.log_sum)

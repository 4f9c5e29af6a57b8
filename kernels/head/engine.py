"""What a head does to one chunk of rows, as a small protocol; the PyTorch engine serves every device and dtype.

A chunk's probabilities travel as `Matrix(g, scale)`: g is (V, n) (any strides; tile.py pads its columns), and
p[v, i] = g[v, i] * scale[i]. The scale is known only after the whole row has been seen, so it is never multiplied in
without need. The algorithms (chunked.py, compressed.py) are written against this and never see an instruction set.
"""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

from longtrace.kernels.head import epilogue
from longtrace.kernels.head.epilogue import RowStats
from longtrace.kernels.head.gemm import HeadGemm
from longtrace.kernels.head.spec import Transform, compute_dtype


class Matrix(NamedTuple):
    """value[v, i] = g[v, i] * scale[i]; scale None means 1."""

    g: Tensor  # (V or number of kept columns, n)
    scale: Tensor | None  # (n,) in the compute dtype


class Forward(NamedTuple):
    """One chunk after its logits were seen: row statistics, and the probabilities if they were kept.

    With a softcap, `matrix` holds p * (1 - tanh^2), the derivative of the cap included. The entries of the targets are 0.
    """

    stats: RowStats  # maximum, log_sum, log_prob, entropy (None unless asked for); lse = maximum + log_sum
    matrix: Matrix | None
    mass: Tensor | None  # (n,) sum_v of `matrix`, all V columns (targets excluded)
    slope: Tensor | None  # (n,) 1 - tanh^2 at the target; None or 1 without a softcap


def put_targets(matrix: Matrix, rows: Tensor, value: Tensor) -> None:
    """matrix[rows[i], i] = value[i], in place; one entry a column, so nothing is summed and nothing races."""
    if matrix.scale is not None:
        value = torch.where(value == 0, value, value / matrix.scale)  # 0 / 0: a class weight of 0
    matrix.g[rows, torch.arange(rows.shape[0], device=rows.device)] = value.to(matrix.g.dtype)


class TorchEngine:
    """Chunks by torch.mm and PyTorch row passes, on any device."""

    def __init__(self, weight: Tensor, bias: Tensor | None, transform: Transform, block: int):
        self.weight, self.transform = weight, transform
        self.dtype = compute_dtype(weight.dtype)
        self.gemm = HeadGemm(weight, block)
        self.bias = None if bias is None else bias.to(self.dtype)

    def _logits(self, h: Tensor) -> Tensor:
        """Final logits (n, V) in the compute dtype."""
        return self.transform.apply_(self.gemm.logits(h), self.bias)

    def forward(self, h: Tensor, target: Tensor, entropy: bool, keep: bool, mass: bool = False) -> Forward:
        """Statistics of rows h (n, H) at target (n,) int64; `keep` also keeps the probabilities, `mass` their sum."""
        logits = self._logits(h)
        stats = epilogue.softmax_stats(logits, target, entropy)
        if not keep:
            return Forward(stats, None, None, self.transform.slope(logits.gather(1, target[:, None]).squeeze(1)))
        slope = self.transform.slope(logits)
        p = logits.sub_(stats.maximum[:, None]).sub_(stats.log_sum[:, None]).exp_()
        if slope is not None:
            p.mul_(slope)
            slope = slope.gather(1, target[:, None]).squeeze(1)
        p.scatter_(1, target[:, None], 0.0)
        return Forward(stats, Matrix(p.t(), None), p.sum(1) if mass else None, slope)

    def gradient(
        self,
        h: Tensor,
        target: Tensor,
        stats: RowStats,
        a: Tensor,
        e: Tensor | None,
        spread: Tensor | None = None,
    ) -> Matrix:
        """[p (a - e (log p + entropy)) - spread] * (1 - tanh^2), 0 at the targets, from recomputed logits.

        a, e: (n,); spread: (n, V) or (n, 1), the label smoothing under a softcap, where it is no rank-one term.
        """
        logits = self._logits(h)
        slope = self.transform.slope(logits)
        epilogue.gradient_(logits, stats, a, e)
        if spread is not None:
            logits.sub_(spread)
        if slope is not None:
            logits.mul_(slope)
        logits.scatter_(1, target[:, None], 0.0)
        return Matrix(logits.t(), None)

    def smooth_sum(self, h: Tensor, stats: RowStats, class_weight: Tensor | None) -> Tensor:
        """(n,) sum_v class_weight_v log p_v from recomputed logits."""
        shifted = self._logits(h).sub_(stats.maximum[:, None]).sub_(stats.log_sum[:, None])
        return shifted.sum(1) if class_weight is None else shifted @ class_weight

    def scaled(self, matrix: Matrix, factor: Tensor) -> Matrix:
        """value * factor (n,), in the dtype the GEMMs take; rounded once."""
        g = matrix.g * (factor if matrix.scale is None else factor * matrix.scale)
        return Matrix(g.to(self.gemm.weight.dtype), None)

    def pack(self, values: Tensor | list[Tensor], scale: Tensor) -> Matrix:
        """A matrix of this engine from values (V or number of columns, k), several side by side, and scale (k,)."""
        values = torch.cat(values, 1) if isinstance(values, list) else values
        return Matrix(values.to(self.weight.dtype), scale)

    def column_max(self, matrix: Matrix) -> Tensor:
        """(V,) largest value of each column over the rows, in the compute dtype."""
        g = matrix.g if matrix.scale is None else matrix.g * matrix.scale
        return g.amax(1).to(self.dtype)

    def take(self, matrix: Matrix, columns: Tensor) -> Matrix:
        """The kept columns (F,) int64, as a compact copy."""
        return Matrix(matrix.g.index_select(0, columns).contiguous(), matrix.scale)

    def project(self, matrix: Matrix, right: Tensor) -> Tensor:
        """(V, N) = value @ right (n, N), accumulated and returned in the compute dtype."""
        scaled = right if matrix.scale is None else right * matrix.scale[:, None]
        return self.gemm.product(matrix.g, scaled)

    def rows(self, matrix: Matrix, right: Tensor) -> Tensor:
        """(n, N) = value^T @ right (V, N), accumulated and returned in the compute dtype."""
        out = self.gemm.product(matrix.g.t(), right)
        return out if matrix.scale is None else out * matrix.scale[:, None]

    def sample_rows(self, matrix: Matrix, right: Tensor, step: int) -> Tensor:
        """`rows` of every `step`th block of 32 rows; the others may hold anything."""
        return self.rows(matrix, right)

    def dh(self, matrix: Matrix, columns: Tensor | None) -> Tensor:
        """(n, H) = value^T @ weight (of `columns`, when given), in the compute dtype."""
        out = self.gemm.dh(matrix.g.t(), columns)
        return out if matrix.scale is None else out * matrix.scale[:, None]

    def profiles_dh(self, matrix: Matrix) -> Tensor:
        """(k, H) = value^T @ weight of k profiles, as many as there are: no row of a caller depends on their number."""
        out = self.gemm.product(matrix.g.t(), self.gemm.weight)
        return out if matrix.scale is None else out * matrix.scale[:, None]

    def dw_(self, accumulator: Tensor, matrix: Matrix, h: Tensor, columns: Tensor | None, add: bool = True) -> None:
        """accumulator (V, H) (its rows `columns`, when given) += value @ h (n, H), or = without `add`."""
        g = matrix.g if matrix.scale is None else matrix.g * matrix.scale
        if columns is None:
            self.gemm.dw_(accumulator, g, h, add)
        else:
            product = accumulator.new_empty(columns.shape[0], h.shape[1])
            self.gemm.dw_(product, g, h, False)
            accumulator[columns] = (
                accumulator[columns] + product if add else product
            )  # columns are distinct: no atomics

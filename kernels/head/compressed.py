"""The head with compressed gradients over chunks of rows: log-probs exact, gradients with an estimated error.

`WeightedLoss` and `TokenValues` have the interfaces of their exact namesakes. What a chunk's gradient becomes is in
tail.py; here are the chunk loop, the return to exact gradients, and what is kept for a backward.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import replace
from functools import cached_property, partial
from typing import NamedTuple

import torch
from torch import Tensor

from longtrace.kernels.head import chunked
from longtrace.kernels.head.chunked import (
    Chunk,
    Loss,
    Walk,
    elementwise_gradient,
    rounded,
    smooth_values,
    total_weight,
)
from longtrace.kernels.head.engine import Forward, Matrix, TorchEngine, put_targets
from longtrace.kernels.head.epilogue import RowStats
from longtrace.kernels.head.plan import budget_bytes
from longtrace.kernels.head.tail import (
    CHUNK_ROWS,
    ROW_ERROR_RATIO,
    Coefficients,
    Compression,
    Part,
    Rows,
    Sketch,
    cluster_states,
    cluster_sums,
    compress,
    dh_error,
    effective,
    fill,
    strain,
    tail_terms,
    target_values,
)
from longtrace.kernels.once import refuse_double_backward

TOGETHER = 256  # profiles whose share of dH and dW is added in one product


class Tail(NamedTuple):
    """What the tail of a chunk still owes to dH and dW."""

    matrix: Matrix  # (V, k or 2k) profiles
    weight: Tensor  # (n, 1 or 2) of the profiles in each row
    cluster: Tensor  # (n,)
    rank: int  # k
    index: Tensor  # (n,) rows of the input
    sums: Tensor  # (k or 2k, H) of weight times h over each cluster
    kept: Matrix | None  # d loss / d z of the kept columns, where dW is asked for
    columns: Tensor  # (F,) which they are
    h: Tensor  # (n, H)


class Report:
    """Means and maxima over the chunks whose gradients were taken, or will be: what LogProbs.stats tells of them."""

    def __init__(self, V: int):
        self.V, self.chunks, self.rows = V, 0, 0
        self.kept = self.mass = self.saved = 0.0
        self.rank = self.exact = self.recomputed = 0
        self.dh = self.dw = 0.0

    def add(self, n: int, part: Part | None) -> None:
        """Count a chunk of n rows; part None: exact."""
        self.chunks += 1
        self.rows += n
        if part is None:
            self.exact += 1
            self.kept += 1.0
            return
        self.kept += part.columns.numel() / self.V
        self.mass += float(part.mass.sum())
        self.rank = max(self.rank, part.rank)
        self.dh, self.dw = max(self.dh, part.dh_error), max(self.dw, part.dw_error)

    def stats(self) -> dict[str, float]:
        """columns_kept: mean fraction of V. dropped_mass: mean per row. Errors and rank: the largest of any chunk."""
        return {
            "columns_kept": self.kept / max(1, self.chunks), "dropped_mass": self.mass / max(1, self.rows),
            "rank": self.rank, "estimated_dh_error": self.dh, "estimated_dw_row_error": self.dw,
            "exact_chunks": self.exact, "recomputed_chunks": self.recomputed, "saved_mb": self.saved / 2**20,
        }  # fmt: skip


class CompressedWalk(Walk):
    """A walk in chunks of at most 1,024 rows that adds compressed gradients, or exact ones where these do not serve."""

    def __init__(self, *args, options: Compression):
        super().__init__(*args)
        self.options, self.report, self.tails = options, Report(self.V), []
        if self.chunks.rows > CHUNK_ROWS:  # the union of a longer chunk's columns would be most of V
            self.chunks = replace(self.chunks, rows=CHUNK_ROWS, block=min(self.chunks.block, CHUNK_ROWS))
            if isinstance(self.engine, TorchEngine):
                self.engine = type(self.engine)(self.weight, self.bias, self.loss.transform, self.chunks.block)

    weighs = True

    def stats(self) -> dict[str, float]:
        return super().stats() | self.report.stats()

    @cached_property
    def sketch(self) -> Sketch:
        return Sketch(self.weight, self.dtype)

    @property
    def wants(self) -> tuple[bool, bool]:
        """Whether dH, and whether dW is asked for."""
        return self.d_input is not None, self.d_weight is not None

    def rows(self, chunk: Chunk, forward: Forward) -> Rows:
        return Rows(chunk.h, chunk.target, forward.stats, forward.slope)

    def add_known(self, chunk: Chunk, forward: Forward, c: Coefficients, s: Tensor | None) -> None:
        """Compress a chunk whose coefficients are known and add its share; s (n,) times w_v is taken off d/dz."""
        rows = self.rows(chunk, forward)
        bent = c.e is not None and self.loss.transform.softcap is not None  # p is not to be had from p (1 - tanh^2)
        if self.loss.elementwise or bent:
            part = None
        else:
            part = compress(self.engine, self.sketch, forward, rows, c, self.options, *self.wants)
        if part is not None:
            self.add_part(chunk, rows, part, c, s)
            return
        self.report.add(len(chunk.index), None)
        if c.e is None:
            super().add_known(chunk, forward, c, s)
        elif self.loss.elementwise and s is not None:
            self.add(chunk, elementwise_gradient(self, chunk, forward.slope, forward.stats, c.a, c.b, c.e, s))
        else:
            matrix = self.engine.gradient(chunk.h, chunk.target, forward.stats, c.a, c.e)
            put_targets(matrix, chunk.target, target_values(rows, c))
            self.add(chunk, matrix, s)

    def add_part(self, chunk: Chunk, rows: Rows, part: Part, c: Coefficients, s: Tensor | None) -> None:
        """Add a compressed chunk's share to the accumulators; consumes `part.kept`."""
        engine, transform = self.engine, self.loss.transform
        self.report.add(len(chunk.index), part)
        kept = fill(part.kept, part.position, rows, c)
        tail, t = tail_terms(engine, part, rows, c)
        if self.d_bias is not None:
            ones = rows.h.new_full((len(rows.target), 1), 1.0 / transform.temperature, dtype=self.dtype)
            self.d_bias[part.columns] += engine.project(kept, ones).squeeze(1)
            self.d_bias += engine.project(tail, cluster_sums(part, t, ones).to(self.dtype)).squeeze(1)
        dh = engine.dh(_times(kept, transform.gain), part.columns) if self.d_input is not None else None
        if s is not None:
            self.smoothing.take_(dh, chunk.h, s)
        if dh is not None:
            self.d_input[chunk.index] = dh
        self.tails.append(
            Tail(
                tail, t, part.cluster, part.rank, chunk.index, cluster_states(engine, part, t, chunk.h),
                None if self.d_weight is None else _times(kept, transform.gain), part.columns, chunk.h,
            )
        )  # fmt: skip
        held = sum(0 if x.kept is None else x.kept.g.numel() for x in self.tails)
        if sum(len(x.sums) for x in self.tails) >= TOGETHER or 2 * held > self.V * self.chunks.rows:
            self.add_tails()

    def add_tails(self) -> None:
        """Add the tails of several chunks at once: W and dW go through memory once for all of them.

        The kept columns of dW wait for the tails, which write every row: dW need not be zeroed first.
        """
        if not self.tails:
            return
        gain, tails, self.tails = self.loss.transform.gain, self.tails, []
        profiles = [x.matrix.g[:, : len(x.sums)] for x in tails]
        joined = self.engine.pack(profiles, torch.cat([x.matrix.scale for x in tails]))
        if self.d_input is not None:
            profiles = self.engine.profiles_dh(_times(joined, gain))
            for x, profile in zip(tails, profiles.split([len(x.sums) for x in tails])):
                for j, weight in enumerate(x.weight.unbind(1)):
                    self.d_input[x.index] += weight[:, None] * profile[x.cluster + j * x.rank]
        if self.d_weight is not None:
            sums = torch.cat([x.sums for x in tails])
            top = sums.abs().amax(1, keepdim=True).clamp(min=torch.finfo(self.dtype).tiny)
            by_row = gain * top.squeeze(1)  # fp16 would lose small sums: they are of order 1
            self.engine.dw_(self.d_weight, _times(joined, by_row), (sums / top).to(self.weight.dtype), None, self.added)
            self.added = True
            for x in tails:
                self.engine.dw_(self.d_weight, x.kept, x.h, x.columns)

    def finish(self) -> None:
        self.add_tails()
        super().finish()

    def meets(self, part: Part, rows: Rows, c: Coefficients) -> bool:
        """Whether a kept chunk meets the bounds with the coefficients that came from upstream; sets its errors."""
        if c.e is not None and self.loss.transform.softcap is not None:
            return False
        need_dh, need_dw = self.wants
        part.dh_error = dh_error(self.engine, self.sketch, part, rows, c) if need_dh else 0.0
        part.dw_error = part.predicted(effective(part, rows, c)) * strain(part, rows, c) if need_dw else 0.0
        bound = self.options.bound
        return part.dh_error <= bound and part.dw_error <= bound * ROW_ERROR_RATIO


def _times(matrix: Matrix, factor: Tensor | float) -> Matrix:
    return Matrix(matrix.g, matrix.scale * factor)


class WeightedLoss(chunked.WeightedLoss):
    """As `chunked.WeightedLoss`, with compressed gradients."""

    @staticmethod
    def forward(ctx, *args):
        *args, options = args
        return chunked.WeightedLoss.forward(ctx, *args, partial(CompressedWalk, options=options))


class TokenValues(torch.autograd.Function):
    """(log_prob, entropy, lse, smooth) of each row, differentiable; smooth is sum_v class_weight_v log p_v.

    The forward keeps each chunk's `Part`, compressed as for equal coefficients, as long as the byte budget lasts. The
    backward recomputes the rows of chunks that were not kept, and of those whose actual coefficients (of both signs,
    few, or very uneven) no longer meet the bounds; all these are compressed together, with coefficients known.
    """

    @staticmethod
    def forward(
        ctx, input, weight, bias, target, class_weight, weight_grad, loss: Loss, options: Compression, grad: bool = True
    ):
        need_dh, need_dw, _ = needs = tuple(grad and need for need in _needs(ctx, weight_grad))
        with torch.autocast(input.device.type, enabled=False):
            walk = CompressedWalk(input, weight, bias, target, loss, target != loss.ignore_index, options=options)
            walk.class_weight = class_weight
            maximum, log_sum, log_prob = walk.new_rows(), walk.new_rows(), walk.new_rows()
            entropy = walk.new_rows() if loss.entropy else None
            smooth = walk.new_rows() if loss.smooth else None
            saved, ctx.meta = [], []
            left = budget_bytes(loss.budget_mb, input.device.type) if any(needs) and not loss.elementwise else 0
            for chunk in walk:
                forward = walk.engine.forward(chunk.h, chunk.target, loss.entropy, left > 0, mass=left > 0)
                stats, index = forward.stats, chunk.index
                maximum[index], log_sum[index], log_prob[index] = stats.maximum, stats.log_sum, stats.log_prob
                if entropy is not None:
                    entropy[index] = stats.entropy
                if smooth is not None:
                    smooth[index] = smooth_values(walk, chunk, stats)
                if left <= 0:
                    continue
                rows = walk.rows(chunk, forward)
                part = compress(walk.engine, walk.sketch, forward, rows, None, options, need_dh, need_dw)
                if part is None:  # exact gradients need all of V: better recomputed than kept
                    continue
                tensors, meta = part.saved(input.dtype)
                tensors += [index, torch.ones_like(stats.log_prob) if forward.slope is None else forward.slope]
                size = sum(x.numel() * x.element_size() for x in tensors)
                left -= size  # the first chunk that does not fit ends the keeping
                if left >= 0:
                    walk.report.add(len(index), part)
                    walk.report.saved += size
                    saved += tensors
                    ctx.meta.append(meta)
        stats = walk.stats()
        ctx.save_for_backward(input, weight, bias, target, class_weight, maximum, log_sum, log_prob, entropy, *saved)
        ctx.loss, ctx.options, ctx.weight_grad, ctx.stats = loss, options, weight_grad, stats
        ctx.set_materialize_grads(False)
        return log_prob.clone(), entropy, maximum + log_sum, smooth, stats

    @staticmethod
    def backward(ctx, g_log_prob, g_entropy, g_lse, g_smooth, _):
        refuse_double_backward("the vocabulary head")
        input, weight, bias, target, class_weight, maximum, log_sum, log_prob, entropy, *saved = ctx.saved_tensors
        upstream = [g for g in (g_log_prob, g_entropy, g_lse, g_smooth) if g is not None]
        if not upstream:
            return (None,) * 9
        with torch.autocast(input.device.type, enabled=False):
            live = torch.zeros_like(target, dtype=torch.bool)
            for g in upstream:
                live |= g != 0
            live &= target != ctx.loss.ignore_index
            walk = CompressedWalk(input, weight, bias, target, ctx.loss, live, options=ctx.options)
            walk.need(*_needs(ctx, ctx.weight_grad), ctx.weight_grad)
            walk.class_weight = class_weight
            # d log_prob/dz = 1[y] - p, d lse/dz = p, d smooth/dz = weight - (sum weight) p
            b = walk.new_rows() if g_log_prob is None else -g_log_prob
            a = b if g_lse is None else b + g_lse
            if g_smooth is not None:
                a = a - g_smooth * total_weight(walk)
            every, s = Coefficients(a, b, g_entropy), None if g_smooth is None else -g_smooth

            for tensors, index, slope, meta in _chunks(saved, ctx.meta):
                here = live[index].nonzero().squeeze(1)
                if not here.numel():
                    continue
                part, c = Part.restore(walk.engine, tensors, meta), every.at(index)
                stats = RowStats(
                    maximum[index], log_sum[index], log_prob[index], None if entropy is None else entropy[index]
                )
                rows = Rows(input[index], target[index], stats, slope)
                if walk.meets(part, rows, c):
                    index, rows = index[here], rows.at(here)
                    chunk = Chunk(index, rows.target, rows.h)
                    walk.add_part(chunk, rows, part.at(walk.engine, here), c.at(here), None if s is None else s[index])
                    live[index] = False

            walk.kept = live.nonzero().squeeze(1)
            for chunk in walk:
                keep = not ctx.loss.elementwise
                forward = walk.engine.forward(chunk.h, chunk.target, ctx.loss.entropy, keep, mass=keep)
                walk.add_known(chunk, forward, every.at(chunk.index), None if s is None else s[chunk.index])
                walk.report.recomputed += 1
            walk.finish()
        ctx.stats.update(walk.report.stats() | {"saved_mb": ctx.stats["saved_mb"]})
        grads = (walk.d_input, None if ctx.weight_grad is not None else walk.d_weight, walk.d_bias)
        return (*(None if g is None else rounded(g, input.dtype) for g in grads), *(None,) * 6)


def _needs(ctx, weight_grad: Tensor | None) -> tuple[bool, bool, bool]:
    """Whether input, weight and bias want a gradient."""
    d_input, d_weight, d_bias = ctx.needs_input_grad[:3]
    return d_input, d_weight or weight_grad is not None, d_bias


def _chunks(saved: list[Tensor], metas: list[dict]) -> Iterator[tuple[list[Tensor], Tensor, Tensor, dict]]:
    """What `TokenValues.forward` kept: the tensors of each `Part`, its rows and their slopes."""
    width = len(saved) // max(1, len(metas))
    for i, meta in enumerate(metas):
        *tensors, index, slope = saved[i * width : (i + 1) * width]
        yield tensors, index, slope, meta

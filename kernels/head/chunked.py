"""The exact head over chunks of rows: gradients in the forward (6THV) or by one recompute in the backward (8THV).

`WeightedLoss` serves losses whose per-token coefficient is known up front; `TokenValues` hands out differentiable
per-token values. Both share `_Pass`, which owns the chunk loop; the maths of a chunk is in `epilogue.py`.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass

import torch
from torch import Tensor

from longtrace.kernels.head import backend
from longtrace.kernels.head.epilogue import RowStats
from longtrace.kernels.head.gemm import HeadGemm
from longtrace.kernels.head.plan import plan_chunks
from longtrace.kernels.head.spec import Transform, compute_dtype


@dataclass(frozen=True)
class Loss:
    """The options of a call that are not tensors of the graph."""

    transform: Transform
    ignore_index: int
    label_smoothing: float
    z_loss: float
    entropy: bool
    smooth: bool  # also return sum_v weight_v log p_v
    budget_mb: float | None


@dataclass
class _Chunk:
    """One chunk of kept rows: `index` into the T rows, padded operands and logits, unpadded row statistics."""

    index: Tensor
    target: Tensor
    h: Tensor
    logits: Tensor

    def live(self) -> Tensor:
        return self.logits[: self.index.numel()]


class _Pass:
    """Walks the kept rows of one call in chunks; owns the logits buffer and the gradient accumulators."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, loss: Loss, keep: Tensor):
        self.input, self.bias, self.target, self.loss = input, bias, target, loss
        T, H = input.shape
        V = weight.shape[0]
        self.dtype = compute_dtype(input.dtype)
        self.kept = keep.nonzero().squeeze(1)
        self.chunks = plan_chunks(self.kept.numel(), H, V, input.dtype, loss.budget_mb, input.device.type)
        self.gemm = HeadGemm(weight, self.chunks.block) if self.kept.numel() else None
        self.wide_bias = None if bias is None else bias.to(self.dtype)
        self.V, self.H, self.T = V, H, T
        self.d_input = self.d_weight = self.d_bias = None
        self.added = False

    def stats(self) -> dict[str, int]:
        rows = self.kept.numel()
        return {"rows": rows, "total": self.T, "chunks": self.chunks.count(rows), "chunk_rows": self.chunks.rows}

    def new_rows(self) -> Tensor:
        return self.input.new_zeros(self.T, dtype=self.dtype)

    def need(self, d_input: bool, d_weight: bool, d_bias: bool) -> None:
        """Allocate the accumulators asked for, in the accumulation dtype."""
        if d_input:
            self.d_input = self.input.new_zeros(self.T, self.H, dtype=self.dtype)
        if d_weight:
            new = self.input.new_empty if self.kept.numel() else self.input.new_zeros  # the first chunk overwrites
            self.d_weight = new(self.V, self.H, dtype=self.dtype)
        if d_bias:
            self.d_bias = self.input.new_zeros(self.V, dtype=self.dtype)

    def __iter__(self) -> Iterator[_Chunk]:
        if not self.kept.numel():
            return
        block = self.chunks.block
        most = min(self.chunks.rows, -(-self.kept.numel() // block) * block)
        buffer = self.input.new_empty(most, self.V, dtype=self.dtype)
        for index in self.kept.split(self.chunks.rows):
            padded = -(-index.numel() // block) * block
            h = self.gemm.rows(self.input, index, padded)
            logits = buffer[:padded]
            self.gemm.logits(h, logits)
            self.loss.transform.apply_(logits[: index.numel()], self.wide_bias)
            yield _Chunk(index, self.target[index], h, logits)

    def backward(self, chunk: _Chunk, stats: RowStats, a: Tensor, b: Tensor, e: Tensor | None, s: Tensor | None):
        """Add one chunk's share to the accumulators.

        d/dz = a p - b 1[target] - e p (log p + entropy) - s, with s (rows, 1) or (rows, V); consumes `chunk.logits`.
        """
        transform, live = self.loss.transform, chunk.live()
        tanh = transform.keep_tanh(live)
        backend.dlogits_(live, chunk.target, stats, a, b, e)
        if s is not None:
            live.sub_(s)
        transform.derivative_(live, tanh)
        if self.d_bias is not None:
            self.d_bias += live.sum(0)
        if transform.logit_scale != 1.0:
            live.mul_(transform.logit_scale)
        chunk.logits[chunk.index.numel() :] = 0  # padded rows carry no gradient
        if self.d_input is not None:
            dh = chunk.h.new_empty(chunk.h.shape, dtype=self.dtype)
            self.gemm.dh(chunk.logits, dh)
            self.d_input[chunk.index] = dh[: chunk.index.numel()]
        if self.d_weight is not None:
            self.gemm.dw_(self.d_weight, chunk.logits, chunk.h, first=not self.added)
            self.added = True


def _smooth_sum(logits: Tensor, stats: RowStats, class_weight: Tensor | None) -> Tensor:
    """sum_v weight_v log p_v of each row."""
    shifted = logits - stats.maximum[:, None]
    if class_weight is None:
        return shifted.sum(1) - stats.log_sum * logits.shape[1]
    return shifted @ class_weight - stats.log_sum * class_weight.sum()


class WeightedLoss(torch.autograd.Function):
    """sum_i c_i loss_i, gradients taken in the forward chunk; also log_prob, entropy, lse of each row, detached.

    loss_i = (1 - eps) w_y nll_i - eps/V sum_v w_v log p_iv + z_loss lse_i^2, eps the label smoothing, w the class weight.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, target, coefficient, class_weight, loss: Loss, grad: bool):
        needs = [grad and ctx.needs_input_grad[i] for i in range(3)]
        with torch.autocast(input.device.type, enabled=False):
            keep = (target != loss.ignore_index) & (coefficient != 0)
            walk = _Pass(input, weight, bias, target, loss, keep)
            walk.need(*needs)
            log_prob, lse = walk.new_rows(), walk.new_rows()
            entropy = walk.new_rows() if loss.entropy else None
            total = input.new_zeros((), dtype=torch.float64 if input.device.type != "mps" else torch.float32)
            eps, V = loss.label_smoothing, walk.V
            all_weight = float(V) if class_weight is None else class_weight.sum()
            for chunk in walk:
                stats = backend.softmax_stats(chunk.live(), chunk.target, loss.entropy)
                c = coefficient[chunk.index].to(walk.dtype)
                w = torch.ones_like(c) if class_weight is None else class_weight[chunk.target]
                row_lse = stats.maximum + stats.log_sum
                log_prob[chunk.index], lse[chunk.index] = stats.log_prob, row_lse
                if entropy is not None:
                    entropy[chunk.index] = stats.entropy
                value = -(1 - eps) * w * stats.log_prob
                if eps:
                    value = value - eps / V * _smooth_sum(chunk.live(), stats, class_weight)
                if loss.z_loss:
                    value = value + loss.z_loss * row_lse.square()
                total += (c.to(total.dtype) * value.to(total.dtype)).sum()
                if any(needs):
                    b = c * (1 - eps) * w
                    a = b if not eps else b + c * (eps / V) * all_weight
                    a = a if not loss.z_loss else a + c * 2 * loss.z_loss * row_lse
                    s = None if not eps else _smooth_rows(c * (eps / V), class_weight)
                    walk.backward(chunk, stats, a, b, None, s)
        ctx.save_for_backward(walk.d_input, walk.d_weight, walk.d_bias)
        ctx.dtype = input.dtype
        ctx.set_materialize_grads(False)
        outputs = (total.to(walk.dtype), log_prob, entropy, lse)
        ctx.mark_non_differentiable(*(o for o in outputs[1:] if o is not None))
        return (*outputs, walk.stats())

    @staticmethod
    def backward(ctx, upstream, *_):
        _refuse_double_backward()
        grads = []
        for saved in ctx.saved_tensors:  # scaled out of place (the graph may be used again) and rounded once
            if saved is None or upstream is None:
                grads.append(None)
            else:
                grads.append(_scaled(saved, upstream, ctx.dtype))
        return (*grads, None, None, None, None, None)


def _refuse_double_backward() -> None:
    """Raise under create_graph=True; torch's once_differentiable would let a gradient penalty pass as a constant."""
    if torch.is_grad_enabled():
        raise RuntimeError("longtrace head ops are differentiable once: create_graph=True is not supported")


def _scaled(saved: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """saved * upstream in `dtype`, multiplied in saved's own dtype and rounded once; slices keep temporaries small."""
    if saved.dtype == dtype:
        return saved * upstream
    out = torch.empty_like(saved, dtype=dtype)
    step = max(1, 2**20 // max(1, saved[:1].numel()))
    for i in range(0, saved.shape[0], step):
        out[i : i + step] = saved[i : i + step] * upstream
    return out


def _smooth_rows(per_row: Tensor, class_weight: Tensor | None) -> Tensor:
    return per_row[:, None] if class_weight is None else per_row[:, None] * class_weight


class TokenValues(torch.autograd.Function):
    """(log_prob, entropy, lse, smooth) of each row, differentiable; logits are recomputed in the backward.

    smooth is sum_v class_weight_v log p_v. Rows whose upstream gradients are all zero leave before the backward GEMMs.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, target, class_weight, loss: Loss):
        with torch.autocast(input.device.type, enabled=False):
            walk = _Pass(input, weight, bias, target, loss, target != loss.ignore_index)
            maximum, log_sum, log_prob = walk.new_rows(), walk.new_rows(), walk.new_rows()
            entropy = walk.new_rows() if loss.entropy else None
            smooth = walk.new_rows() if loss.smooth else None
            for chunk in walk:
                stats = backend.softmax_stats(chunk.live(), chunk.target, loss.entropy)
                maximum[chunk.index], log_sum[chunk.index] = stats.maximum, stats.log_sum
                log_prob[chunk.index] = stats.log_prob
                if entropy is not None:
                    entropy[chunk.index] = stats.entropy
                if smooth is not None:
                    smooth[chunk.index] = _smooth_sum(chunk.live(), stats, class_weight)
        ctx.save_for_backward(input, weight, bias, target, class_weight, maximum, log_sum, entropy)
        ctx.loss = loss
        ctx.set_materialize_grads(False)
        return log_prob, entropy, maximum + log_sum, smooth, walk.stats()

    @staticmethod
    def backward(ctx, g_log_prob, g_entropy, g_lse, g_smooth, _):
        _refuse_double_backward()
        input, weight, bias, target, class_weight, maximum, log_sum, entropy = ctx.saved_tensors
        loss = ctx.loss
        upstream = [g for g in (g_log_prob, g_entropy, g_lse, g_smooth) if g is not None]
        if not upstream:
            return (None,) * 6
        with torch.autocast(input.device.type, enabled=False):
            keep = torch.zeros_like(target, dtype=torch.bool)
            for g in upstream:
                keep |= g != 0
            walk = _Pass(input, weight, bias, target, loss, keep & (target != loss.ignore_index))
            walk.need(*ctx.needs_input_grad[:3])
            V = walk.V
            all_weight = float(V) if class_weight is None else class_weight.sum()
            zero = walk.new_rows()
            # d log_prob/dz = 1[y] - p, d lse/dz = p, d smooth/dz = weight - (sum weight) p
            b = zero if g_log_prob is None else -g_log_prob
            a = b if g_lse is None else b + g_lse
            a = a if g_smooth is None else a - g_smooth * all_weight
            for chunk in walk:
                i = chunk.index
                stats = RowStats(maximum[i], log_sum[i], zero[i], None if entropy is None else entropy[i])
                e = None if g_entropy is None else g_entropy[i]
                s = None if g_smooth is None else _smooth_rows(-g_smooth[i], class_weight)
                walk.backward(chunk, stats, a[i], b[i], e, s)
        grads = (walk.d_input, walk.d_weight, walk.d_bias)
        return (*(None if g is None else g.to(input.dtype) for g in grads), None, None, None)

"""The exact head over chunks of rows: gradients in the forward (6THV) or by one recompute in the backward (8THV).

`WeightedLoss` serves losses whose per-token coefficient is known up front; `TokenValues` hands out differentiable
per-token values. Both share `Walk`, which owns the chunk loop; what happens inside a chunk is an engine's business.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from longtrace.kernels.extension import on_huge_pages
from longtrace.kernels.head.engine import Forward, Matrix, put_targets
from longtrace.kernels.head.engines import engine
from longtrace.kernels.head.epilogue import RowStats
from longtrace.kernels.head.spec import Transform, compute_dtype
from longtrace.kernels.head.tail import Coefficients, Rows, fill
from longtrace.kernels.once import refuse_double_backward


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

    @property
    def elementwise(self) -> bool:
        """Label smoothing under a softcap touches every logit by itself; all else reduces to rows."""
        return self.smooth and self.transform.softcap is not None


@dataclass
class Chunk:
    """One chunk of kept rows: `index` into the T rows, its targets and hidden states."""

    index: Tensor
    target: Tensor
    h: Tensor


class Smoothing:
    """sum_v w_v log p_v and its gradient by way of one H-vector: sum_v w_v z_v = gain h . (sum_v w_v W_v) + b . w.

    Without a softcap only. Sums run in fp64: they are small, and a common offset of the logits cancels in them.
    """

    def __init__(self, weight: Tensor, bias: Tensor | None, class_weight: Tensor | None, transform: Transform):
        V, self.gain, self.temperature = weight.shape[0], transform.gain, transform.temperature
        self.class_weight = class_weight
        self.total = float(V) if class_weight is None else class_weight.double().sum().item()
        self.vector = weight.new_zeros(weight.shape[1], dtype=torch.float64)
        for i in range(0, V, 4096):
            part = weight[i : i + 4096].double()
            self.vector += part.sum(0) if class_weight is None else class_weight[i : i + 4096].double() @ part
        self.offset = 0.0
        if bias is not None:
            self.offset = float((bias.double() if class_weight is None else bias.double() * class_weight).sum())
        self.pull = torch.zeros_like(self.vector)  # sum_i s_i h_i, what dW owes
        self.mass = 0.0

    def values(self, h: Tensor, stats: RowStats) -> Tensor:
        """(n,) sum_v w_v log p_v."""
        z = self.gain * (h.double() @ self.vector) + self.offset / self.temperature
        lse = stats.maximum.double() + stats.log_sum
        return (z - self.total * lse).to(stats.maximum.dtype)

    def take_(self, dh: Tensor | None, h: Tensor, s: Tensor) -> None:
        """Subtract s_i w_v from every d/dz: dh (n, H) now, dW's and the bias's share in `finish_`."""
        if dh is not None:
            dh.sub_((self.gain * s.double())[:, None] * self.vector)
        self.pull += s.double() @ h.double()
        self.mass += s.double().sum().item()

    def finish_(self, d_weight: Tensor | None, d_bias: Tensor | None) -> None:
        w = 1.0 if self.class_weight is None else self.class_weight
        if d_weight is not None:
            ones = d_weight.new_ones(d_weight.shape[0])
            d_weight.addr_(ones * w, self.pull.to(d_weight.dtype), alpha=-self.gain)
        if d_bias is not None:
            d_bias.sub_(w * (self.mass / self.temperature))


class Walk:
    """Goes over the kept rows of one call in chunks; owns the engine and the gradient accumulators."""

    def __init__(self, input: Tensor, weight: Tensor, bias: Tensor | None, target: Tensor, loss: Loss, keep: Tensor):
        self.input, self.target, self.loss = input, target, loss
        self.weight, self.bias = weight, bias
        self.T, self.H = input.shape
        self.V = weight.shape[0]
        self.dtype = compute_dtype(input.dtype)
        self.kept = keep.nonzero().squeeze(1)
        self.engine, self.chunks = engine(
            self.kept.numel(), weight, bias, loss.transform, loss.budget_mb, loss.elementwise
        )
        self.d_input = self.d_weight = self.d_bias = None
        self.added = False

    def stats(self) -> dict[str, int]:
        rows = self.kept.numel()
        return {"rows": rows, "total": self.T, "chunks": self.chunks.count(rows), "chunk_rows": self.chunks.rows}

    def new_rows(self, fill: float = 0.0) -> Tensor:
        return self.input.new_full((self.T,), fill, dtype=self.dtype)

    def need(self, d_input: bool, d_weight: bool, d_bias: bool, weight_grad: Tensor | None = None) -> None:
        """Allocate the accumulators asked for, in the accumulation dtype; dW goes to `weight_grad` when given."""
        if d_input:
            self.d_input = self.input.new_zeros(self.T, self.H, dtype=self.dtype)
        if d_weight and weight_grad is not None:
            self.d_weight, self.added = weight_grad, True
        elif d_weight:
            self.d_weight = on_huge_pages(self.input.new_empty(self.V, self.H, dtype=self.dtype))
            if not self.kept.numel():  # else the first chunk overwrites
                self.d_weight.zero_()
        if d_bias:
            self.d_bias = self.input.new_zeros(self.V, dtype=self.dtype)

    def __iter__(self) -> Iterator[Chunk]:
        for index in self.kept.split(self.chunks.rows) if self.kept.numel() else ():
            yield Chunk(index, self.target[index], self.input.index_select(0, index))

    @cached_property
    def smoothing(self) -> Smoothing:
        return Smoothing(self.weight, self.bias, self.class_weight, self.loss.transform)

    class_weight: Tensor | None = None
    weighs = False  # whether `add_known` reads the sums of the probabilities

    def add_known(self, chunk: Chunk, forward: Forward, c: Coefficients, s: Tensor | None) -> None:
        """Add the share of a chunk whose coefficients are known; s (n,) times w_v is taken off d/dz."""
        if self.loss.elementwise:
            self.add(chunk, elementwise_gradient(self, chunk, forward.slope, forward.stats, c.a, c.b, c.e, s))
        else:
            rows = Rows(chunk.h, chunk.target, forward.stats, forward.slope)
            self.add(chunk, fill(forward.matrix, chunk.target, rows, c), s)

    def add(self, chunk: Chunk, matrix: Matrix, s: Tensor | None = None) -> None:
        """Add one chunk's share to the accumulators: `matrix` is d/d(final logit), `s` (n,) times w_v is taken off it."""
        transform, engine = self.loss.transform, self.engine
        if self.d_bias is not None:  # before the gain: db is d/d(logit_scale h.w + b)
            ones = chunk.h.new_full((chunk.h.shape[0], 1), 1.0 / transform.temperature, dtype=self.dtype)
            self.d_bias += engine.project(matrix, ones).squeeze(1)
        n = chunk.h.shape[0]
        matrix = engine.scaled(matrix, chunk.h.new_full((n,), transform.gain, dtype=self.dtype))
        dh = engine.dh(matrix, None) if self.d_input is not None else None
        if s is not None:
            self.smoothing.take_(dh, chunk.h, s)
        if dh is not None:
            self.d_input[chunk.index] = dh
        if self.d_weight is not None:
            engine.dw_(self.d_weight, matrix, chunk.h, None, add=self.added)
            self.added = True

    def finish(self) -> None:
        """What is owed to dW and db once, after the last chunk."""
        if "smoothing" in self.__dict__:
            self.smoothing.finish_(self.d_weight, self.d_bias)


def target_value(a: Tensor, b: Tensor, log_prob: Tensor) -> Tensor:
    """a p - b at the target, without cancellation when p is close to 1 and a to b."""
    return a * torch.expm1(log_prob) + (a - b)


class WeightedLoss(torch.autograd.Function):
    """sum_i c_i loss_i, gradients taken in the forward chunk; also log_prob, entropy, lse of each row, detached.

    loss_i = (1 - eps) w_y nll_i - eps/V sum_v w_v log p_iv + z_loss lse_i^2, eps the label smoothing, w the class weight.
    """

    @staticmethod
    def forward(
        ctx, input, weight, bias, target, coefficient, class_weight, weight_grad, loss: Loss, grad: bool, walk_of=Walk
    ):
        needs = [grad and ctx.needs_input_grad[i] for i in range(3)]
        needs[1] |= grad and weight_grad is not None
        with torch.autocast(input.device.type, enabled=False):
            walk = walk_of(input, weight, bias, target, loss, (target != loss.ignore_index) & (coefficient != 0))
            walk.need(*needs)
            walk.class_weight = class_weight
            log_prob, lse = walk.new_rows(), walk.new_rows()
            entropy = walk.new_rows() if loss.entropy else None
            total = input.new_zeros((), dtype=torch.float64 if input.device.type != "mps" else torch.float32)
            eps, V = loss.label_smoothing, walk.V
            keep = any(needs) and not loss.elementwise
            for chunk in walk:
                out = walk.engine.forward(chunk.h, chunk.target, loss.entropy, keep, mass=keep and walk.weighs)
                stats = out.stats
                c = coefficient[chunk.index].to(walk.dtype)
                w = torch.ones_like(c) if class_weight is None else class_weight[chunk.target]
                row_lse = stats.maximum + stats.log_sum
                log_prob[chunk.index], lse[chunk.index] = stats.log_prob, row_lse
                if entropy is not None:
                    entropy[chunk.index] = stats.entropy
                b = c * (1 - eps) * w
                a, s, value = b, None, -(1 - eps) * w * stats.log_prob
                if eps:
                    s = c * (eps / V)
                    a, value = a + s * total_weight(walk), value - eps / V * smooth_values(walk, chunk, stats)
                if loss.z_loss:
                    a, value = a + c * 2 * loss.z_loss * row_lse, value + loss.z_loss * row_lse.square()
                total += (c.to(total.dtype) * value.to(total.dtype)).sum()
                if any(needs):
                    walk.add_known(chunk, out, Coefficients(a, b), s)
            walk.finish()
        ctx.save_for_backward(walk.d_input, walk.d_weight, walk.d_bias)
        ctx.dtype, ctx.weight_grad = input.dtype, weight_grad
        ctx.set_materialize_grads(False)
        outputs = (total.to(walk.dtype), log_prob, entropy, lse)
        ctx.mark_non_differentiable(*(o for o in outputs[1:] if o is not None))
        return (*outputs, walk.stats())

    @staticmethod
    def backward(ctx, upstream, *_):
        refuse_double_backward("the vocabulary head")
        grads = []
        for i, saved in enumerate(ctx.saved_tensors):
            if saved is None or upstream is None:
                grads.append(None)
            elif i == 1 and ctx.weight_grad is not None:
                ctx.weight_grad.add_(saved * upstream)
                grads.append(None)
            else:  # scaled out of place (the graph may be used again) and rounded once
                grads.append(_scaled(saved, upstream, ctx.dtype))
        return (*grads, *(None,) * 7)


def _scaled(saved: Tensor, upstream: Tensor, dtype: torch.dtype) -> Tensor:
    """saved * upstream in `dtype`, multiplied in saved's own dtype and rounded once; slices keep a CPU's temporaries small."""
    if saved.dtype == dtype:
        return saved * upstream
    out = on_huge_pages(torch.empty_like(saved, dtype=dtype))
    step = max(1, saved.shape[0] if saved.is_cuda else 2**19 // max(1, saved[:1].numel()))
    for i in range(0, saved.shape[0], step):
        torch.mul(saved[i : i + step], upstream, out=out[i : i + step])
    return out


def rounded(x: Tensor, dtype: torch.dtype) -> Tensor:
    """x in `dtype`."""
    return x if x.dtype == dtype else on_huge_pages(torch.empty_like(x, dtype=dtype)).copy_(x)


def total_weight(walk: Walk) -> float:
    """sum_v w_v, in fp64: fp32 sums of a whole vocabulary differ by the number of threads."""
    return float(walk.V) if walk.class_weight is None else walk.class_weight.double().sum().item()


def smooth_values(walk: Walk, chunk: Chunk, stats: RowStats) -> Tensor:
    """(n,) sum_v w_v log p_v."""
    if walk.loss.elementwise:
        return walk.engine.smooth_sum(chunk.h, stats, walk.class_weight)
    return walk.smoothing.values(chunk.h, stats)


def elementwise_gradient(walk, chunk, slope, stats, a, b, e, s) -> Matrix:
    """d/d(final logit) where label smoothing meets a softcap: logits again, every entry by itself."""
    spread = s[:, None] if walk.class_weight is None else s[:, None] * walk.class_weight
    matrix = walk.engine.gradient(chunk.h, chunk.target, stats, a, e, spread)
    tau = target_value(a, b, stats.log_prob) - (s if walk.class_weight is None else s * walk.class_weight[chunk.target])
    put_targets(matrix, chunk.target, (tau - bend(e, stats)) * slope)
    return matrix


def bend(e: Tensor | None, stats: RowStats) -> Tensor | float:
    """e p (log p + entropy) at the target."""
    return 0.0 if e is None else e * stats.log_prob.exp() * (stats.log_prob.clamp(min=-1e30) + stats.entropy)


class TokenValues(torch.autograd.Function):
    """(log_prob, entropy, lse, smooth) of each row, differentiable; logits are recomputed in the backward.

    smooth is sum_v class_weight_v log p_v. Rows whose upstream gradients are all zero leave before the backward GEMMs.
    """

    @staticmethod
    def forward(ctx, input, weight, bias, target, class_weight, weight_grad, loss: Loss):
        with torch.autocast(input.device.type, enabled=False):
            walk = Walk(input, weight, bias, target, loss, target != loss.ignore_index)
            walk.class_weight = class_weight
            maximum, log_sum, log_prob = walk.new_rows(), walk.new_rows(), walk.new_rows()
            slope = walk.new_rows(1.0)
            entropy = walk.new_rows() if loss.entropy else None
            smooth = walk.new_rows() if loss.smooth else None
            for chunk in walk:
                out = walk.engine.forward(chunk.h, chunk.target, loss.entropy, False)
                stats = out.stats
                maximum[chunk.index], log_sum[chunk.index] = stats.maximum, stats.log_sum
                log_prob[chunk.index] = stats.log_prob
                if out.slope is not None:
                    slope[chunk.index] = out.slope
                if entropy is not None:
                    entropy[chunk.index] = stats.entropy
                if smooth is not None:
                    smooth[chunk.index] = smooth_values(walk, chunk, stats)
        ctx.save_for_backward(input, weight, bias, target, class_weight, maximum, log_sum, log_prob, slope, entropy)
        ctx.loss, ctx.weight_grad = loss, weight_grad
        ctx.set_materialize_grads(False)
        return log_prob.clone(), entropy, maximum + log_sum, smooth, walk.stats()

    @staticmethod
    def backward(ctx, g_log_prob, g_entropy, g_lse, g_smooth, _):
        refuse_double_backward("the vocabulary head")
        input, weight, bias, target, class_weight, maximum, log_sum, log_prob, slope, entropy = ctx.saved_tensors
        loss = ctx.loss
        upstream = [g for g in (g_log_prob, g_entropy, g_lse, g_smooth) if g is not None]
        if not upstream:
            return (None,) * 7
        needs = list(ctx.needs_input_grad[:3])
        needs[1] |= ctx.weight_grad is not None
        with torch.autocast(input.device.type, enabled=False):
            keep = torch.zeros_like(target, dtype=torch.bool)
            for g in upstream:
                keep |= g != 0
            walk = Walk(input, weight, bias, target, loss, keep & (target != loss.ignore_index))
            walk.need(*needs, ctx.weight_grad)
            walk.class_weight = class_weight
            all_weight = total_weight(walk)
            # d log_prob/dz = 1[y] - p, d lse/dz = p, d smooth/dz = weight - (sum weight) p
            b = walk.new_rows() if g_log_prob is None else -g_log_prob
            a = b if g_lse is None else b + g_lse
            a = a if g_smooth is None else a - g_smooth * all_weight
            for chunk in walk:
                i = chunk.index
                stats = RowStats(maximum[i], log_sum[i], log_prob[i], None if entropy is None else entropy[i])
                e = None if g_entropy is None else g_entropy[i]
                s = None if g_smooth is None else -g_smooth[i]
                if loss.elementwise and s is not None:
                    walk.add(chunk, elementwise_gradient(walk, chunk, slope[i], stats, a[i], b[i], e, s))
                    continue
                matrix = walk.engine.gradient(chunk.h, chunk.target, stats, a[i], e)
                tau = target_value(a[i], b[i], stats.log_prob) - bend(e, stats)
                put_targets(matrix, chunk.target, tau * slope[i])
                walk.add(chunk, matrix, s)
            walk.finish()
        grads = [walk.d_input, None if ctx.weight_grad is not None else walk.d_weight, walk.d_bias]
        return (*(None if g is None else rounded(g, input.dtype) for g in grads), None, None, None, None)

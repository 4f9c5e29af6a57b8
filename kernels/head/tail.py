"""One chunk of softmax gradients, compressed: the columns that matter kept, the rest replaced by a rank-k tail.

Rows i, columns v, value p[v, i] (with a softcap: p (1 - tanh^2)), targets apart. A column is kept when some row has
p > eps in it, or has it as target. Over the dropped ones row i is replaced by its cluster's profile,
    p[v, i] ~ m_i q[v, j(i)],   m_i = sum_dropped p[v, i],   q_j = sum_{i in j} |c_i| p_i / sum_{i in j} |c_i| m_i,
so that, for the loss sum_i c_i nll_i,
    dH_i += c_i m_i (q_j . W)   and   dW[v] += sum_j q[v, j] (sum_{i in j} c_i m_i h_i).
What this costs in accuracy is measured on the chunk itself by random projections of the difference (`Part.dh_error`,
`Part.dw_error`), and `compress` lowers eps, raises k or returns the exact gradient when it is too much.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import NamedTuple

import torch
from torch import Tensor

from longtrace.kernels.head.clusters import membership, runs_or_signs, spherical_kmeans
from longtrace.kernels.head.engine import Forward, Matrix, TorchEngine, put_targets
from longtrace.kernels.head.epilogue import RowStats

CHUNK_ROWS = 1024  # `Compression.rank` is the number of clusters of a chunk of this many rows
DH_ERROR = 1e-2  # default `target_error`: what bf16 logits cost an eager head
ROW_ERROR_RATIO = 15.0  # a dropped vocabulary row may be this much worse than dH: 0.15 by default
ROW_SKETCH = 15  # projections of dH; with the column that sums the dropped mass the product is 16 wide
BLOCK = 64  # neighbouring rows that are taken to share a part of their coefficient (`Part.predicted`)
SAMPLE = 4096  # dropped rows of dW that a median is taken over
ROW_BLOCK, SAMPLE_STEP = 32, 4  # dH is sampled in every fourth block of 32 rows
SLICE = 2**20  # elements of the temporaries of an element-wise pass


@dataclass(frozen=True)
class Compression:
    """How a compressed gradient trades accuracy for time.

    eps: a column is kept in a chunk where some row's probability exceeds it. rank: clusters per 1,024 rows.
    target_error: bound on the estimated relative error of dH in each chunk (Frobenius; default 1e-2, that of an eager
        bf16 head). The median relative error of the dropped rows of dW may be 15 times as large (0.15 by default):
        these rows are small. A chunk that cannot keep either bound gets its exact gradient.
    """

    eps: float = 2**-12
    rank: int = 64
    target_error: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.eps < 1:
            raise ValueError(f"eps = {self.eps}; accepted: 0 <= eps < 1")
        if self.rank < 1:
            raise ValueError(f"rank = {self.rank}; accepted: rank >= 1")
        if self.target_error is not None and not self.target_error > 0:
            raise ValueError(f"target_error = {self.target_error}; accepted: > 0, or None")

    @property
    def bound(self) -> float:
        return DH_ERROR if self.target_error is None else self.target_error


class Coefficients(NamedTuple):
    """d loss / d z_v = a p_v - b 1[v = target] - e p_v (log p_v + entropy), per row (n,)."""

    a: Tensor
    b: Tensor
    e: Tensor | None = None

    def at(self, rows: Tensor) -> Coefficients:
        return Coefficients(self.a[rows], self.b[rows], None if self.e is None else self.e[rows])


class Rows(NamedTuple):
    """What is known of a chunk's rows (n,) beside their probabilities."""

    h: Tensor  # (n, H)
    target: Tensor
    stats: RowStats
    slope: Tensor | None  # of the softcap at the target

    def at(self, rows: Tensor) -> Rows:
        stats = RowStats(*(None if x is None else x[rows] for x in self.stats))
        return Rows(self.h[rows], self.target[rows], stats, None if self.slope is None else self.slope[rows])


class Sketch:
    """The random projections of one call; a fixed seed makes every run the same.

    right (H, 48) of random signs projects rows of dW; omega (V, 16) = (W @ signs, 1) projects rows of dH.
    """

    def __init__(self, weight: Tensor, dtype: torch.dtype):
        generator = torch.Generator().manual_seed(20250305)
        self.dtype = dtype
        self.signs = lambda *shape: (
            torch.randint(0, 2, shape, generator=generator).mul_(2).sub_(1).to(weight.device, weight.dtype)
        )
        self.right = self.signs(weight.shape[1], 48)
        self.row_signs = self.signs(CHUNK_ROWS, 1)
        ones = weight.new_ones(weight.shape[0], 1)
        self.omega = torch.cat([weight @ self.signs(weight.shape[1], ROW_SKETCH), ones], 1).to(dtype)


@dataclass
class Part:
    """A chunk's compressed probabilities."""

    kept: Matrix  # (F, n), 0 at the targets
    columns: Tensor  # (F,) which vocabulary rows
    position: Tensor  # (n,) where each row's target is in `kept`
    eps: float
    dropped: int = 1  # how many columns the tail stands for, at least 1
    rank: int = 0  # k
    tail: Matrix | None = None  # (V, k) profiles q_j, 0 at kept columns
    cluster: Tensor | None = None  # (n,)
    mass: Tensor | None = None  # (n,) m_i
    sample: Tensor | None = None  # (n',) the rows that `deviation` and `size` are of
    deviation: Tensor | None = None  # (n', 15) projections of sum_dropped (p[v, i] - m_i q_j(i)) W[v]
    size: Tensor | None = None  # (n', 15) projections of sum_kept p[v, i] W[v], targets apart
    mean_tail: Tensor | None = None  # (k, 15) projections of q_j . W
    spread: tuple[float, float, float] = (0.0, 0.0, 0.0)  # error of dropped rows of dW; see `row_errors`
    dh_error: float = 0.0  # estimated relative error of dH
    dw_error: float = 0.0  # estimated median relative error of the dropped rows of dW

    def saved(self, narrow: torch.dtype) -> tuple[list[Tensor], dict]:
        """All of this for `restore`: tensors, matrices as `narrow` where they were wider, and the rest."""
        values = {f.name: getattr(self, f.name) for f in fields(self)}
        tensors = {name: x for name, x in values.items() if isinstance(x, Tensor)}
        for name in ("kept", "tail"):
            g, tensors[name + ".scale"] = values[name]
            g = g[:, : self.rank].contiguous() if name == "tail" else g  # without the engine's padding
            # never to fp16: g is not normalised, and may exceed its range
            tensors[name] = g.to(narrow) if narrow == torch.bfloat16 else g
        rest = {name: x for name, x in values.items() if name not in tensors}
        return list(tensors.values()), {"names": list(tensors), "rest": rest}

    @classmethod
    def restore(cls, engine: TorchEngine, tensors: Sequence[Tensor], meta: dict) -> Part:
        values = dict(zip(meta["names"], tensors))
        values["kept"] = Matrix(values["kept"], values.pop("kept.scale"))
        values["tail"] = engine.pack(values["tail"], values.pop("tail.scale"))
        return cls(**meta["rest"], **values)

    def at(self, engine: TorchEngine, rows: Tensor) -> Part:
        """A copy of some of the rows, as the engine wants it; it has no sample, and so no estimates to make."""
        per_row = {x: getattr(self, x)[rows] for x in ("position", "cluster", "mass")}
        if len(rows) == len(self.position):  # all of them: no gathering
            kept = Matrix(self.kept.g.to(self.tail.g.dtype, copy=True), self.kept.scale)
        else:
            kept = engine.pack(self.kept.g.index_select(1, rows), self.kept.scale[rows])
        return replace(self, kept=kept, sample=None, deviation=None, size=None, **per_row)

    def predicted(self, coefficient: Tensor) -> float:
        """Median relative error of the dropped rows of dW once row i weighs `coefficient` (n,), all rows of the chunk.

        With c = mean + (what BLOCK neighbours share) + rest, the three parts meet independent errors: that of equal
        coefficients, of random signs per block and of random signs per row, all three relative to equal ones.
        """
        c, m = coefficient.double(), self.mass.double()
        if self.spread == (0.0, 0.0, 0.0):  # nothing is dropped
            return 0.0
        mean = (c * m).sum() / m.sum()
        block = torch.arange(len(c), device=c.device) // BLOCK
        sums = torch.zeros(2, int(block[-1]) + 1, dtype=c.dtype, device=c.device)
        sums.index_add_(1, block, torch.stack([c * m, m]))
        shared = (sums[0] / sums[1].clamp(min=1e-300))[block]
        within = ((c - shared).square() * m.square()).sum() / m.square().sum()
        between = ((shared - mean).square() * m.square()).sum() / m.square().sum()
        equal, by_block, by_row = self.spread
        ratio = by_block**2 * between + by_row**2 * within
        return math.sqrt(equal**2 + float(ratio / mean.square())) if mean != 0 else math.inf


def target_values(rows: Rows, c: Coefficients) -> Tensor:
    """(n,) d loss / d z at the targets, without cancellation where p(target) is nearly 1 and a nearly b."""
    log_prob, value = rows.stats.log_prob, c.a * torch.expm1(rows.stats.log_prob) + (c.a - c.b)
    if c.e is not None:
        value = value - c.e * torch.where(log_prob > -1e30, log_prob.exp() * (log_prob + rows.stats.entropy), 0.0)
    return value if rows.slope is None else value * rows.slope


def fill(kept: Matrix, position: Tensor, rows: Rows, c: Coefficients) -> Matrix:
    """Kept probabilities turned into d loss / d z, in place; `position` (n,) is where the targets are.

    Without an entropy gradient a row's coefficient is one factor, and goes into the scale.
    """
    g, n = kept.g, len(position)
    ones = torch.ones_like(c.a)
    scale = ones if kept.scale is None else kept.scale
    if c.e is None:
        scale = scale * c.a
        gone = scale == 0
        if gone.any():  # only the target is left of such a row
            g[:, :n].masked_fill_(gone, 0)
            scale = torch.where(gone, 1.0, scale)
        out = Matrix(g, scale)
        put_targets(out, position, target_values(rows, c))
        return out
    first, entropy = -rows.stats.log_sum, rows.stats.entropy  # of the likeliest column, log p is known exactly
    largest, top = g[:, :n].max(0)
    near = ((largest.to(scale.dtype) * scale).log() - first).abs() <= torch.finfo(g.dtype).eps  # else it is the target
    step = max(1, SLICE // max(1, n))
    for i in range(0, g.shape[0], step):
        p = g[i : i + step, :n].to(scale.dtype) * scale
        log_p = p.log()
        here = (near & (top >= i) & (top < i + step)).nonzero().squeeze(1)  # log p of p ~ 1 is lost in its rounding
        log_p[top[here] - i, here], p[top[here] - i, here] = first[here], first[here].exp()
        bend = torch.where(p > 0, p * (log_p + entropy), 0.0)
        g[i : i + step, :n] = p.mul_(c.a).sub_(bend.mul_(c.e)).to(g.dtype)
    out = Matrix(g, ones)
    put_targets(out, position, target_values(rows, c))
    return out


def tail_terms(engine: TorchEngine, part: Part, rows: Rows, c: Coefficients) -> tuple[Matrix, Tensor]:
    """Profiles (V, k or 2k) and what each weighs in row i, (n, 1 or 2): d loss / d z of the dropped columns.

    With an entropy gradient p (log p + H) ~ m q (log m + H) + m q log q: the second profile of a cluster is q log q.
    """
    m = part.mass
    t = (c.a * m)[:, None]
    if c.e is None:
        return part.tail, t
    log_m = m.clamp(min=torch.finfo(m.dtype).tiny).log()
    t = torch.stack([t[:, 0] - c.e * m * (log_m + rows.stats.entropy), -c.e * m], 1)
    g, scale = part.tail.g[:, : part.rank].to(m.dtype), part.tail.scale
    second = torch.where(g > 0, g * (g * scale).clamp(min=torch.finfo(m.dtype).tiny).log(), 0.0)
    top = second.abs().amax(0).clamp(min=torch.finfo(m.dtype).tiny)
    return engine.pack([g, second / top], torch.cat([scale, scale * top])), t


def cluster_sums(part: Part, t: Tensor, x: Tensor) -> Tensor:
    """(k or 2k, N) sums of t[i] x[i] (n, N) over each cluster, in float64: the order of threads stays invisible."""
    one = membership(part.cluster, part.rank, torch.float64)
    return torch.cat([(one * column) @ x.double() for column in t.double().unbind(1)])


def cluster_states(engine: TorchEngine, part: Part, t: Tensor, h: Tensor) -> Tensor:
    """`cluster_sums` of the hidden states h (n, H), wide enough to be worth the engine's own product."""
    one = membership(part.cluster, part.rank, t.dtype)
    top = t.abs().amax(0).clamp(min=torch.finfo(t.dtype).tiny)  # fp16 operands lose small ones
    return torch.cat([engine.project(engine.pack(one, x / s), h) * s for x, s in zip(t.unbind(1), top)])


def effective(part: Part, rows: Rows, c: Coefficients) -> Tensor:
    """(n,) the factor of p in the dropped columns: a, and with an entropy gradient a - e (log p + H) at a mean p."""
    if c.e is None:
        return c.a
    log_p = (part.mass / part.dropped).clamp(min=torch.finfo(c.a.dtype).tiny).log()
    return c.a - c.e * (log_p + rows.stats.entropy)


def strain(part: Part, rows: Rows, c: Coefficients) -> float:
    """How much larger the error of dW's rows is with an entropy gradient than with `effective` as coefficients.

    d(p log p) is (log p + 1) dp, hence the half; and where the two terms cancel their errors do not.
    """
    if c.e is None:
        return 1.0
    bend = effective(part, rows, c) - c.a
    whole = (part.mass * (c.a + bend)).sum(dtype=torch.float64).abs().clamp(min=1e-300)
    return float((part.mass * (c.a.abs() + 1.5 * bend.abs())).sum(dtype=torch.float64) / whole)


def dh_error(engine: TorchEngine, sketch: Sketch, part: Part, rows: Rows, c: Coefficients) -> float:
    """Estimated relative Frobenius error of dH over the chunk: the mean square over the projections and two errors."""
    sample = part.sample
    factor = effective(part, rows, c)[sample, None]
    if c.e is None:
        own = target_values(rows, c)[sample, None] * sketch.omega[rows.target[sample], :-1]
        kept = c.a[sample, None] * part.size + own
    else:
        copy = part.at(engine, torch.arange(len(part.position), device=part.position.device))
        filled = fill(copy.kept, part.position, rows, c)
        kept = engine.rows(filled, sketch.omega[part.columns, :-1])[sample]
    whole = kept + factor * part.mass[sample, None] * part.mean_tail[part.cluster[sample]]
    whole = whole.double().square().sum(0).mean()
    wrong = (part.deviation * factor).double().square().sum(0)
    upper = wrong.mean() + 2 * wrong.std() / len(wrong) ** 0.5
    return _with_rounding(1.15**2 * float(upper / whole.clamp(min=1e-300)), rows.h.dtype)


def _with_rounding(square: float, dtype: torch.dtype) -> float:
    """sqrt(square + rounding^2): those of the probabilities, of the targets' entries and of the result, 0.21 eps each."""
    return math.sqrt(square + (0.45 * torch.finfo(dtype).eps) ** 2)


def row_errors(wrong: Tensor, norm: Tensor) -> float:
    """Median over vocabulary rows of |wrong| / norm from the projections of wrong (rows, s), and two standard errors.

    The projections in four groups tell how far chance reaches; the tenth on top is for what all groups share.
    """
    ratio = wrong.square() / norm.square()[:, None]
    groups = torch.stack([x.mean(1).median().sqrt() for x in ratio.tensor_split(4, 1)])
    return 1.1 * float(ratio.mean(1).median().sqrt()) + float(groups.std())


class _Candidates:
    """The compressions of one chunk for several eps and k, sharing the passes over its (V, n) probabilities."""

    def __init__(
        self, engine: TorchEngine, sketch: Sketch, matrix: Matrix, mass: Tensor, rows: Rows, c: Coefficients | None
    ):
        self.engine, self.sketch, self.matrix, self.rows, self.c = engine, sketch, matrix, rows, c
        self.V, self.n = matrix.g.shape[0], len(rows.target)
        self.largest, self.mass = engine.column_max(matrix), mass
        self.all: Tensor | None = None
        self.sample = torch.arange(self.n, device=rows.target.device)
        if self.n >= 8 * ROW_BLOCK * SAMPLE_STEP:
            self.sample = (self.sample // ROW_BLOCK % SAMPLE_STEP == 0).nonzero().squeeze(1)
        self.step = 1 if len(self.sample) == self.n else SAMPLE_STEP
        self.group = rows.target.new_zeros(self.n)
        self.weight = torch.ones_like(mass)
        self.rank = 0

    def columns(self, eps: float) -> tuple[Tensor, Tensor]:
        """(mask (V,), F distinct columns)"""
        mask = self.largest > eps
        mask[self.rows.target] = True
        return mask, mask.nonzero().squeeze(1)

    def part(self, eps: float, k: int, need_dh: bool, need_dw: bool) -> Part:
        mask, columns = self.columns(eps)
        position = (mask.cumsum(0) - 1)[self.rows.target]
        kept = self.engine.take(self.matrix, columns)
        kept = Matrix(kept.g, self.weight.new_ones(self.n) if kept.scale is None else kept.scale)
        part = Part(kept, columns, position, eps, max(1, self.V - columns.numel()))
        inside = self.engine.rows(part.kept, self.sketch.omega.index_select(0, columns))
        part.mass = (self.mass - inside[:, -1]).clamp(min=0)
        c = self.c or Coefficients(self.weight, self.weight)
        if self.rank != k:
            self._cluster(part, k)
        q = self.sums.index_fill_(0, columns, 0.0)  # in place: a smaller eps keeps more columns, never fewer
        total = membership(self.cluster, q.shape[1], torch.float64) @ (self.weight * part.mass).double()
        top = q.amax(0).clamp(min=torch.finfo(q.dtype).tiny)
        scale = torch.where(total > 0, top / total, 0.0).to(q.dtype)
        part.tail = self.engine.pack(q / top, scale)  # at most 1: no dtype loses the small ones
        part.rank, part.cluster = len(scale), self.cluster
        if need_dh:
            if self.all is None:
                self.all = self.engine.sample_rows(self.matrix, self.sketch.omega[:, :-1].contiguous(), self.step)
            part.mean_tail = self.engine.rows(part.tail, self.sketch.omega[:, :-1].contiguous())
            s = part.sample = self.sample
            part.size = inside[s, :-1]
            part.deviation = self.all[s] - part.size - part.mass[s, None] * part.mean_tail[self.cluster[s]]
            part.dh_error = dh_error(self.engine, self.sketch, part, self.rows, c)
        if need_dw and columns.numel() < self.V:
            part.spread = self._spread(part, ~mask, c)
            part.dw_error = _with_rounding((part.spread[0] * strain(part, self.rows, c)) ** 2, self.rows.h.dtype)
        return part

    def _cluster(self, part: Part, k: int) -> None:
        """The clusters of the rows and their column sums (V, k), which hold for every eps."""
        self.rank = k
        if self.c is not None:
            factor = effective(part, self.rows, self.c)
            self.weight, self.group = factor.abs(), runs_or_signs(factor, max(2, k // 16))
        weight = self.weight * part.mass
        self.cluster = spherical_kmeans(self.rows.h, weight, self.group, k, self.engine)
        clusters = int(self.cluster.max()) + 1
        self.sums = self.engine.project(
            self.matrix, (membership(self.cluster, clusters, weight.dtype) * self.weight).t()
        )

    def _spread(self, part: Part, dropped: Tensor, c: Coefficients) -> tuple[float, float, float]:
        """Errors of a sample of the dropped rows of dW; with c unknown also under random signs by block and by row."""
        factor = effective(part, self.rows, c)
        some = dropped.nonzero().squeeze(1)
        some = some[:: max(1, len(some) // SAMPLE)]
        wide = 16 if self.c is not None else 48
        psi = (self.rows.h @ self.sketch.right[:, :wide].to(self.rows.h.dtype)).to(factor) * factor[:, None]
        if self.c is None:
            psi[:, -16:] *= self.sketch.row_signs[: self.n].to(psi)
            psi[:, -32:-16] *= (
                self.sketch.row_signs[: -(-self.n // BLOCK)].repeat_interleave(BLOCK, 0)[: self.n].to(psi)
            )
        psi = psi.to(self.rows.h.dtype).to(psi)
        true = self.engine.project(self.engine.take(self.matrix, some), psi)
        alive = (true.abs().amax(1) > 0).nonzero().squeeze(1)
        if not len(alive):
            return 0.0, 0.0, 0.0
        live, true = some[alive], true[alive]
        q = part.tail.g[:, : part.rank].index_select(0, live).to(true) * part.tail.scale
        tail = q @ cluster_sums(part, part.mass[:, None], psi).to(q)
        wrong = true - tail
        # |true|^2: that of the approximation is known, and only the rest is left to the projections
        sums = cluster_states(self.engine, part, (factor * part.mass)[:, None], self.rows.h)
        known = ((q @ (sums @ sums.t()).to(q)) * q).sum(1)
        s = slice(None) if self.c is not None else slice(0, -32)
        least = torch.finfo(q.dtype).tiny ** 0.5
        norm = (
            (known + (true[:, s].square() - tail[:, s].square()).mean(1)).clamp(min=known / 16).sqrt().clamp(min=least)
        )
        first = row_errors(wrong[:, s], norm)
        if self.c is not None:
            return first, 0.0, 0.0
        return first, row_errors(wrong[:, -32:-16], norm), row_errors(wrong[:, -16:], norm)


def compress(
    engine: TorchEngine,
    sketch: Sketch,
    forward: Forward,
    rows: Rows,
    c: Coefficients | None,
    options: Compression,
    need_dh: bool,
    need_dw: bool,
) -> Part | None:
    """The first compression whose estimated errors keep the bounds; None asks for the exact gradient.

    c None: not known yet; the estimates are then for equal coefficients. A second or third try lowers eps for dH and
    raises k for the rows of dW, when the error suggests that this is enough and the work stays below that of the exact
    gradient: 4 F/V + 4 k/n + 2 (k + s)/H against 4, in units of n H V multiply-adds.
    """
    if not torch.isfinite(forward.stats.log_prob + forward.stats.log_sum).all():  # a cluster would spread the NaN
        return None
    tries = _Candidates(engine, sketch, forward.matrix, forward.mass, rows, c)
    n, bound = tries.n, options.bound
    eps, k = options.eps, min(n, max(1, round(options.rank * n / CHUNK_ROWS)))
    for attempt in range(3):
        kept = tries.columns(eps)[1].numel() / tries.V
        cost = 4 * kept + 4 * k / n + (2 * (k + 32) / rows.h.shape[1] if attempt else 0)
        if cost > 3.2:
            return None
        part = tries.part(eps, k, need_dh, need_dw)
        rough, coarse = part.dh_error / bound, part.dw_error / (bound * ROW_ERROR_RATIO)
        if rough <= 1 and coarse <= 1:
            return part
        if not (rough <= 4 and coarse <= 2):  # out of reach
            return None
        if rough > 1:
            eps /= 8
        if coarse > 1:  # the error falls about as 1 / sqrt(k)
            k = min(n, k * 2 ** math.ceil(2 * math.log2(1.1 * coarse)))
    return None

"""`optimal_alpha`: how much of the trace path's gradient minimises the error of the blend, and how sure that is.

From sums of the two paths' gradients over groups of examples (or from sketches of these sums): unbiased variances, covariance
and mean norms by a weighted analysis of variance, their errors by a jackknife over the groups, and a running mean over steps.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import NamedTuple

import torch
from torch import Tensor

ROUNDING = 1e-12  # of the terms of a difference: what is smaller is no difference


class PathStatistics(NamedTuple):
    """What the gradients of the two paths look like over examples, estimated; float64 on the CPU."""

    values: Tensor  # (6,): trace_variance, empty_variance, cross_variance, trace_norm_sq, empty_norm_sq, mean_dot
    covariance: Tensor  # (6, 6): of the errors of these estimates

    @property
    def trace_variance(self) -> float:
        """S_t, the trace of the covariance of one example's trace-path gradient."""
        return float(self.values[0])

    @property
    def empty_variance(self) -> float:
        """S_e, the same of the empty path."""
        return float(self.values[1])

    @property
    def cross_variance(self) -> float:
        """S_te, the trace of the covariance between the two paths' gradients of one example."""
        return float(self.values[2])

    @property
    def trace_norm_sq(self) -> float:
        """|E g_t|^2."""
        return float(self.values[3])

    @property
    def empty_norm_sq(self) -> float:
        """|E g_e|^2."""
        return float(self.values[4])

    @property
    def mean_dot(self) -> float:
        """<E g_t, E g_e>."""
        return float(self.values[5])


class OptimalAlpha(NamedTuple):
    alpha: float  # in [0, 1]
    unclipped: float
    error: float  # standard error of `unclipped`, first order; infinite where the paths do not differ
    distance_sq: float  # D^2 = |E g_t - E g_e|^2, unbiased: may be below 0
    distance_error: float  # its standard error
    clipped: bool  # D^2 came out below 0, and alpha took it as 0


@torch.no_grad()
def path_statistics(trace: Tensor, empty: Tensor, counts: Sequence[int] | Tensor) -> PathStatistics:
    """Unbiased statistics of the two paths' per-example gradients from sums over groups of examples.

    Args: trace, empty (k, m): row i is the SUM of the gradients (or a linear sketch of it) of counts[i] examples, the same
    examples in both, independent from one to the next; counts (k,): positive. k >= 3; sizes may differ.
    Returns: `PathStatistics`, of one example; `covariance` by the jackknife that leaves out one group at a time, each weighed
    by its share in an estimate: one of k in a variance, its examples in a mean. It errs on the safe side. Of Gaussian
    gradients in k equal groups it has, in expectation, (k - 1) / (k - 2) times the variance of S, and of norms and D^2 from
    1 (far above their noise) to 2 (k - 1) / (k - 2) times (lost in it): 4 for 3 groups, 2.3 for 8. Of a D^2 that is lost
    where one group holds nearly all examples it has more: 3 times for counts (50, 1, 1, 1, 1, 1, 1, 1), 24 for (1, 1, 100).
    Raises: ValueError for shapes that do not fit, fewer than 3 groups, counts below 1, or values that are not finite.
    Source: one-way analysis of variance, sum_i |G_i - n_i g|^2 / n_i = (k - 1) S in expectation. BVPO's plug-in estimate
    (arXiv:2510.05095) has no S_te, though both paths share their examples: D^2 then drowns in the noise that they share.
    Jackknife: Busing, Meijer, van der Leeden 1999, delete-m_j for unequal groups, h = 1 / share.
    """
    trace, empty = (torch.as_tensor(x).detach().to("cpu", torch.float64) for x in (trace, empty))
    n = torch.as_tensor(counts).detach().to("cpu", torch.float64)
    if trace.ndim != 2 or trace.shape != empty.shape:
        raise ValueError(f"trace and empty must be (groups, m) both, got {tuple(trace.shape)} and {tuple(empty.shape)}")
    if n.shape != trace.shape[:1]:
        raise ValueError(f"counts must be ({len(trace)},), one a group, got {tuple(n.shape)}")
    if len(n) < 3:
        raise ValueError(f"at least 3 groups are needed for variances and their errors, got {len(n)}")
    if not (n >= 1).all():
        raise ValueError(f"counts must be at least 1, got {float(n.min()):g}")
    for name, x in (("trace", trace), ("empty", empty)):
        if not x.isfinite().all():
            raise ValueError(f"{name} holds a NaN or an infinity")
    total, k = n.sum(), len(n)
    means = [x.sum(0) / total for x in (trace, empty)]
    away = [x - n[:, None] * mean for x, mean in zip((trace, empty), means)]  # sum to 0: what follows cancels nothing
    pairs = ((0, 0), (1, 1), (0, 1))
    products = torch.stack([(away[i] * away[j]).sum(1) for i, j in pairs])  # (3, k)
    norms = torch.stack([means[i] @ means[j] for i, j in pairs])  # (3,)

    def debiased(within: Tensor, norms: Tensor, groups: int, examples: Tensor) -> Tensor:
        variances = within / (groups - 1)
        return torch.cat((variances, norms - variances / examples))

    values = debiased((products / n).sum(1), norms, k, total)
    # The others' mean is g - away_j / rest; their sum of squares is short of what j added, and of what the mean moved.
    rest = total - n  # (k,)
    towards = torch.stack([away[i] @ means[j] + away[j] @ means[i] for i, j in pairs])
    without = debiased(
        (products / n).sum(1, keepdim=True) - products / n - products / rest,
        norms[:, None] - towards / rest + products / rest**2,
        k - 1,
        rest,
    )  # (6, k)
    share = torch.cat((torch.full((3, k), 1 / k, dtype=torch.float64), (n / total).expand(3, k)))
    pseudo = without + (values[:, None] - without) / share
    spread = (pseudo - (share * pseudo).sum(1, keepdim=True)) * (share / (1 - share) / k).sqrt()
    return PathStatistics(values, spread @ spread.T)


def optimal_alpha(stats: PathStatistics, batch_size: float) -> OptimalAlpha:
    """The alpha that minimises E |alpha g_t + (1 - alpha) g_e - E g_t|^2 for means of g_t, g_e over a batch.

    alpha = ((S_e - S_te) / B + D^2) / ((S_t + S_e - 2 S_te) / B + D^2), clipped to [0, 1]: the trace path is taken for
    unbiased, D^2 for the empty path's squared bias. A D^2 estimated below 0 counts as 0; 0 / 0 gives 0.5.
    batch_size B: examples (pairs) in an optimizer step. Variances shrink with it, biases do not. For steps of size eta on
    an L-smooth loss, B / (eta L) in its place minimises the bound of biased SGD.
    Returns: `OptimalAlpha`, its errors from `stats.covariance` to first order (the delta method). Of statistics from sketches
    they leave out the sketch's own error, which one map keeps for a whole run (`CountSketch`): no averaging lessens it.
    Raises: ValueError for a batch size that is not positive.
    Source: BVPO, arXiv:2510.05095, theorem 2, at batch level.
    """
    _check_batch(batch_size)
    values = stats.values.tolist()
    trace, empty, cross = (value / batch_size for value in values[:3])
    distance = values[3] + values[4] - 2 * values[5]
    towards_distance = torch.tensor([0, 0, 0, 1, 1, -2], dtype=torch.float64)
    distance_error = _error(stats.covariance, towards_distance)
    bias = max(distance, 0.0)
    above, below = empty - cross + bias, trace + empty - 2 * cross + bias
    rounding = ROUNDING * (abs(trace) + abs(empty) + 2 * abs(cross) + sum(map(abs, values[3:])))
    if below <= rounding:
        return OptimalAlpha(0.5, 0.5, math.inf, distance, distance_error, distance < 0)
    alpha = above / below
    # As if D^2 were not clipped: what is not known of it is not known of alpha.
    slope = torch.tensor([-alpha, 1 - alpha, 2 * alpha - 1, 0, 0, 0], dtype=torch.float64) / batch_size
    slope = (slope + (1 - alpha) * towards_distance) / below
    return OptimalAlpha(
        min(max(alpha, 0.0), 1.0), alpha, _error(stats.covariance, slope), distance, distance_error, distance < 0
    )


def gradient_variance(stats: PathStatistics, batch_size: float, alpha: float) -> float:
    """The trace of the covariance of alpha g_t + (1 - alpha) g_e, means over a batch: 1 and 0 give the paths' own.

    Raises: ValueError for a batch size that is not positive.
    """
    _check_batch(batch_size)
    trace, empty, cross = stats.values[:3].tolist()
    return (alpha**2 * trace + (1 - alpha) ** 2 * empty + 2 * alpha * (1 - alpha) * cross) / batch_size


class RunningStatistics:
    """An exponential moving average of `PathStatistics` over steps: entry by entry, not of alpha, which is a ratio.

    Each step counts `decay` times the next one; weights add up to 1 from the first step on. Steps are taken as independent:
    covariance = sum_s w_s^2 covariance_s. Raises: ValueError for a decay outside [0, 1].
    """

    def __init__(self, decay: float = 0.9):
        if not 0 <= decay <= 1:
            raise ValueError(f"decay must be in [0, 1], got {decay}")
        self.decay, self.steps = float(decay), 0
        self._weight = 0.0
        self._values = torch.zeros(6, dtype=torch.float64)
        self._covariance = torch.zeros(6, 6, dtype=torch.float64)

    def update(self, stats: PathStatistics) -> None:
        """Takes in one step's statistics."""
        self.steps += 1
        self._weight = self.decay * self._weight + 1
        self._values = self.decay * self._values + stats.values
        self._covariance = self.decay**2 * self._covariance + stats.covariance

    def value(self) -> PathStatistics:
        """The weighted mean so far. Raises ValueError before the first update."""
        if not self.steps:
            raise ValueError("no statistics yet: update() comes first")
        return PathStatistics(self._values / self._weight, self._covariance / self._weight**2)

    def state_dict(self) -> dict:
        """Numbers and lists, which JSON keeps exactly; the decay is the caller's."""
        return {
            "steps": self.steps,
            "weight": self._weight,
            "values": self._values.tolist(),
            "covariance": self._covariance.tolist(),
        }

    def load_state_dict(self, state: dict) -> None:
        """Goes on from what `state_dict` gave, bit for bit."""
        self.steps, self._weight = int(state["steps"]), float(state["weight"])
        self._values = torch.tensor(state["values"], dtype=torch.float64)
        self._covariance = torch.tensor(state["covariance"], dtype=torch.float64)


def _check_batch(batch_size: float) -> None:
    if not batch_size > 0:
        raise ValueError(f"batch_size must be positive, got {batch_size}")


def _error(covariance: Tensor, slope: Tensor) -> float:
    """The standard error of a quantity that changes by `slope` with the six entries."""
    return math.sqrt(max(float(slope @ covariance @ slope), 0.0))

"""The best blend of two paths: unbiased statistics, honest errors, the least MSE; running means; the count sketch."""

from __future__ import annotations

import json
import math

import pytest
import torch

from longtrace import kernels as K

M = 24  # size of a gradient
SHARED, TRACE, EMPTY = 3.0, 1.0, 0.5  # standard deviations of the noise both paths have, and of each path's own
COUNTS = {"equal": [4] * 12, "unequal": [1, 2, 9, 3, 4, 1, 6, 2, 5, 3, 8, 4], "ones": [1] * 48}


def means(distance: float = 0.45) -> tuple[torch.Tensor, torch.Tensor]:
    """E g_t and E g_e, `distance` apart."""
    trace = torch.arange(M, dtype=torch.float64) / M
    away = torch.sin(torch.arange(M, dtype=torch.float64) + 1)
    return trace, trace + away * (distance / away.norm())


def exact(distance: float = 0.45) -> torch.Tensor:
    """The six quantities of `draw`'s gradients."""
    trace, empty = means(distance)
    variances = [M * (SHARED**2 + TRACE**2), M * (SHARED**2 + EMPTY**2), M * SHARED**2]
    return torch.tensor([*variances, trace @ trace, empty @ empty, trace @ empty], dtype=torch.float64)


def draw(counts, distance: float = 0.45, scale: float = 1.0) -> tuple[torch.Tensor, torch.Tensor]:
    """Sums over groups of Gaussian gradients of the two paths that share most of their noise; (k, M) each."""
    n = torch.tensor(counts, dtype=torch.float64)[:, None]
    trace, empty = (scale * mean for mean in means(distance))
    shared, own, other = torch.randn(3, len(counts), M, dtype=torch.float64) * n.sqrt()
    return n * trace + SHARED * shared + TRACE * own, n * empty + SHARED * shared + EMPTY * other


def known(*values: float, covariance=None) -> K.PathStatistics:
    zero = torch.zeros(6, 6, dtype=torch.float64)
    return K.PathStatistics(torch.tensor(values, dtype=torch.float64), zero if covariance is None else covariance)


def mse(stats: K.PathStatistics, batch: float, alpha):
    """Of the blend of two batch means about E g_t, written out."""
    distance = stats.trace_norm_sq + stats.empty_norm_sq - 2 * stats.mean_dot
    noise = (
        alpha**2 * stats.trace_variance
        + (1 - alpha) ** 2 * stats.empty_variance
        + 2 * alpha * (1 - alpha) * stats.cross_variance
    )
    return noise / batch + (1 - alpha) ** 2 * distance


@pytest.mark.parametrize("sizes", COUNTS)
def test_unbiased_with_honest_errors(seed, sizes):
    """Paths that share nearly all their noise: S_te left out, D^2 would come out far below 0 and be clipped."""
    found = [K.path_statistics(*draw(COUNTS[sizes]), COUNTS[sizes]) for _ in range(1500)]
    values = torch.stack([s.values for s in found])
    truth, spread = exact(), values.std(0)
    assert ((values.mean(0) - truth).abs() < 4.5 * spread / len(found) ** 0.5).all()
    errors = torch.stack([s.covariance.diagonal() for s in found])
    ratio = errors.mean(0) / spread**2  # at most 2 where a mean is lost in its noise, at least 1 (Efron and Stein)
    assert ((ratio[:3] > 0.85) & (ratio[:3] < 1.25)).all() and ((ratio[3:] > 0.85) & (ratio[3:] < 2.1)).all(), ratio
    covered = ((values - truth).abs() < 1.96 * errors.sqrt()).double().mean(0)
    assert ((covered > 0.87) & (covered < 0.99)).all(), covered

    best = [K.optimal_alpha(s, 8) for s in found]
    distance = torch.tensor([b.distance_sq for b in best], dtype=torch.float64)
    assert abs(distance.mean() - 0.45**2) < 4.5 * distance.std() / len(found) ** 0.5
    examples, per_value = sum(COUNTS[sizes]), TRACE**2 + EMPTY**2  # variance of the difference
    first, second = 4 * 0.45**2 * per_value / examples, 2 * M * per_value**2 / examples**2
    ratio = sum(b.distance_error**2 for b in best) / len(best) / float(distance.var())
    expected = (first + 2 * second) / (first + second)  # the jackknife counts the second order twice
    assert ratio > 0.85 * expected and ratio < (1.4 if sizes == "unequal" else 1.15) * expected, (ratio, expected)
    without_shared = distance - 2 * values[:, 2] / sum(COUNTS[sizes])
    assert (without_shared < 0).all(), "the shared noise matters here"
    assert all(b.clipped == (b.distance_sq < 0) for b in best)


def test_the_error_of_alpha_is_that_of_its_draws(seed):
    counts = [2] * 64
    best = [K.optimal_alpha(K.path_statistics(*draw(counts, 3.0), counts), 4) for _ in range(800)]
    alpha = torch.tensor([b.unclipped for b in best])
    truth = K.optimal_alpha(known(*exact(3.0)), 4)
    assert truth.error == 0 and not truth.clipped
    errors = torch.tensor([b.error for b in best])
    assert 0.85 < float(errors.square().mean() / alpha.var()) < 1.3
    assert 0.9 < float(((alpha - truth.alpha).abs() < 1.96 * errors).double().mean()) < 0.98


@pytest.mark.parametrize("counts, lost", (((1, 1, 1), 4), ((8,) * 8, 2.33), ((50, *[1] * 7), 3), ((1, 1, 100), 24)))
def test_errors_of_few_groups_and_of_one_that_has_nearly_all(seed, counts, lost):
    """Estimated over true variance: `lost` for a D^2 of 0; for S of Gaussian gradients (k - 1) / (k - 2), or less."""
    of_variances = (len(counts) - 1) / (len(counts) - 2)
    for scale in (1.0, 20.0):
        found = [K.path_statistics(*draw(counts, 0, scale), counts) for _ in range(1500)]
        values, errors = torch.stack([s.values for s in found]), torch.stack([s.covariance for s in found])
        ratio = errors.diagonal(dim1=1, dim2=2).mean(0) / values.var(0)
        distance = torch.tensor([0, 0, 0, 1, 1, -2.0], dtype=torch.float64)
        ratio_of_distance = (distance @ errors @ distance).mean() / (values @ distance).var()
        assert ((ratio[:3] > max(1, 0.7 * of_variances)) & (ratio[:3] < 1.15 * of_variances)).all(), ratio
        assert 0.8 * lost < ratio_of_distance < 1.25 * lost, ratio_of_distance
        most = 1.15 if scale > 1 else 1.15 * lost  # means far above their noise, or not
        assert ((ratio[3:] > 0.85) & (ratio[3:] < most)).all(), ratio


def test_the_jackknife_is_leaving_out_one_group(seed):
    """As Busing, Meijer and van der Leeden write it, h = N / n for means, k for variances: there every group is one of k."""
    counts = torch.tensor(COUNTS["unequal"])
    trace, empty = draw(counts.tolist())
    keep, k = ~torch.eye(len(counts), dtype=torch.bool), len(counts)
    all_of_them = K.path_statistics(trace, empty, counts)
    h = torch.stack([torch.full((k,), k).double()] * 3 + [counts.sum() / counts.double()] * 3, 1)  # (k, 6)
    others = torch.stack([K.path_statistics(trace[i], empty[i], counts[i]).values for i in keep])
    jackknifed = k * all_of_them.values - ((1 - 1 / h) * others).sum(0)
    pseudo = h * all_of_them.values - (h - 1) * others
    away = (pseudo - jackknifed) / (h - 1).sqrt()
    torch.testing.assert_close(all_of_them.covariance, away.T @ away / k, rtol=1e-9, atol=1e-9)


def test_the_order_of_groups_is_nothing_and_regrouping_moves_no_mean(seed):
    ones = draw(COUNTS["ones"])
    order = torch.randperm(48)
    one, other = K.path_statistics(*ones, [1] * 48), K.path_statistics(*(x[order] for x in ones), [1] * 48)
    for a, b in zip(one, other):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-9)
    counts = torch.tensor(COUNTS["unequal"])
    groups = torch.repeat_interleave(torch.arange(12), counts)[torch.randperm(48)]
    sums = [torch.zeros(12, M, dtype=torch.float64).index_add_(0, groups, x) for x in ones]
    regrouped = K.path_statistics(*sums, counts)
    raw = [s.values[3:] + s.values[:3] / 48 for s in (one, regrouped)]  # before the noise of the mean is taken off
    torch.testing.assert_close(*raw, rtol=1e-10, atol=1e-10)
    assert not torch.equal(one.values, regrouped.values)


def test_a_large_common_offset_costs_no_digits(seed):
    counts = COUNTS["unequal"]
    trace, empty = draw(counts)
    offset = 1e6 * torch.tensor(counts, dtype=torch.float64)[:, None]
    small, large = K.path_statistics(trace, empty, counts), K.path_statistics(trace + offset, empty + offset, counts)
    torch.testing.assert_close(large.values[:3], small.values[:3], rtol=1e-7, atol=0)


@pytest.mark.parametrize("batch", (1, 8, 128, 0.5))
def test_closed_form_is_the_minimum_of_the_mse(seed, batch):
    grid = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    for _ in range(50):
        a, b = torch.randn(2, 5, 3, dtype=torch.float64) * torch.rand(2, 1, 1) * 3
        cov = torch.stack([(a * a).sum(), (b * b).sum(), (a * b).sum()])
        one, two = torch.randn(2, 4, dtype=torch.float64)
        stats = known(*cov, one @ one, two @ two, one @ two)
        found, least = K.optimal_alpha(stats, batch), grid[mse(stats, batch, grid).argmin()]
        assert found.alpha == pytest.approx(float(least), abs=1e-4)
        assert mse(stats, batch, found.alpha) <= min(mse(stats, batch, 0.0), mse(stats, batch, 1.0)) + 1e-12
        for alpha in (0.0, 0.3, 1.0):
            distance = stats.trace_norm_sq + stats.empty_norm_sq - 2 * stats.mean_dot
            variance = mse(stats, batch, alpha) - (1 - alpha) ** 2 * distance
            assert K.gradient_variance(stats, batch, alpha) == pytest.approx(float(variance), rel=1e-9, abs=1e-12)


def test_special_cases():
    # one example's data given, the empty path has no noise: shrinkage D^2 / (S_t / B + D^2)
    assert K.optimal_alpha(known(2, 0, 0, 1, 4, 1), 4).alpha == pytest.approx(3 / (0.5 + 3))
    assert K.optimal_alpha(known(2, 1, 0, 1, 1, 1), 4).alpha == pytest.approx(1 / 3), "no bias: by the variances alone"
    assert K.optimal_alpha(known(2, 1, 0, 1, 4, 1), 1e12).alpha == pytest.approx(1), "no noise in a huge batch"
    assert K.optimal_alpha(known(2, 5, 3, 1, 1, 1), 1).alpha == 1
    assert K.optimal_alpha(known(2, 5, 3, 1, 1, 1), 1).unclipped == pytest.approx(2), "clipped to [0, 1]"
    assert K.optimal_alpha(known(5, 2, 3, 1, 1, 1), 1).alpha == 0
    assert K.optimal_alpha(known(4, 0, 0, 0, 0, 0), 1).alpha == 0, "an empty path that errs nowhere"
    below = K.optimal_alpha(known(4, 2, 1, 1, 1, 1.5), 1)
    assert below.clipped and below.distance_sq == -1 and below.alpha == pytest.approx(1 / 4)
    for same in (known(0, 0, 0, 0, 0, 0), known(3, 3, 3, 2, 2, 2), known(3, 3, 3 * (1 - 1e-16), 2, 2, 2)):
        assert K.optimal_alpha(same, 8)[:4] == (0.5, 0.5, math.inf, 0.0)


@pytest.mark.parametrize("sizes", COUNTS)
def test_equal_paths_and_paths_of_zeros(seed, sizes):
    counts = COUNTS[sizes]
    trace, _ = draw(counts)
    zero = torch.zeros_like(trace)
    same = K.optimal_alpha(K.path_statistics(trace, trace.clone(), counts), 8)
    assert same.alpha == 0.5 and same.error == math.inf and same.distance_sq == 0 and not same.clipped
    assert K.optimal_alpha(K.path_statistics(zero, zero, counts), 8).alpha == 0.5
    assert K.optimal_alpha(K.path_statistics(zero, trace, counts), 8).alpha == 1, "g_t without noise is right"
    stats = K.path_statistics(trace, zero, counts)
    assert stats[0][1:3].eq(0).all() and stats[0][4:].eq(0).all() and not stats.covariance[1].any()
    shrunk = K.optimal_alpha(stats, 8)
    distance = max(stats.trace_norm_sq, 0)
    assert shrunk.alpha == pytest.approx(distance / (stats.trace_variance / 8 + distance))


def test_what_does_not_fit_is_named():
    x = torch.ones(4, 3)
    cases = [
        ((x, torch.ones(4, 2), [1] * 4), r"\(groups, m\) both, got \(4, 3\) and \(4, 2\)"),
        ((x[0], x[0], [1] * 3), r"got \(3,\) and \(3,\)"),
        ((x, x, [1] * 3), r"counts must be \(4,\), one a group, got \(3,\)"),
        ((x[:2], x[:2], [1, 1]), "at least 3 groups are needed .*, got 2"),
        ((x, x, [1, 0, 2, 1]), "counts must be at least 1, got 0"),
        ((x, torch.full((4, 3), math.nan), [1] * 4), "empty holds a NaN or an infinity"),
    ]
    for given, message in cases:
        with pytest.raises(ValueError, match=message):
            K.path_statistics(*given)
    for call in (K.optimal_alpha, lambda s, b: K.gradient_variance(s, b, 0.5)):
        for batch in (0, -1, math.nan):
            with pytest.raises(ValueError, match="batch_size must be positive"):
                call(known(1, 1, 0, 1, 1, 1), batch)


def test_running_statistics(seed):
    running, seen = K.RunningStatistics(0.8), []
    with pytest.raises(ValueError, match="no statistics yet"):
        running.value()
    for step in range(1, 6):
        seen.append(K.path_statistics(*draw(COUNTS["equal"]), COUNTS["equal"]))
        running.update(seen[-1])
        w = 0.8 ** torch.arange(step - 1, -1, -1, dtype=torch.float64)
        w = w / w.sum()
        values = (w[:, None] * torch.stack([s.values for s in seen])).sum(0)
        covariance = (w[:, None, None] ** 2 * torch.stack([s.covariance for s in seen])).sum(0)
        torch.testing.assert_close(running.value().values, values, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(running.value().covariance, covariance, rtol=1e-12, atol=1e-12)
        assert running.steps == step
    again = K.RunningStatistics(0.8)
    again.load_state_dict(json.loads(json.dumps(running.state_dict())))
    for one in (running, again):
        one.update(seen[0])
    assert all(torch.equal(a, b) for a, b in zip(running.value(), again.value())) and again.steps == 6
    last = K.RunningStatistics(0)
    for stats in seen:
        last.update(stats)
    assert torch.equal(last.value().values, seen[-1].values)
    with pytest.raises(ValueError, match=r"decay must be in \[0, 1\], got 1.5"):
        K.RunningStatistics(1.5)


def test_the_running_error_is_that_of_the_mean(seed):
    values, errors = [], []
    for _ in range(400):
        running = K.RunningStatistics(0.7)
        for _ in range(8):
            running.update(K.path_statistics(*draw(COUNTS["equal"]), COUNTS["equal"]))
        values.append(running.value().values)
        errors.append(running.value().covariance.diagonal())
    ratio = torch.stack(errors).mean(0) / torch.stack(values).var(0)
    assert (ratio > 0.75).all() and (ratio[:3] < 1.3).all() and (ratio[3:] < 2.3).all(), ratio


# ----------------------------------------------------------------------------------------------------------------------
# The sketch

SHAPES = [(40, 16), (16,), (), (0,), (1000,), (7, 9), (64,), (65,)]


def flat(tensors) -> torch.Tensor:
    return torch.cat([x.double().flatten() for x in tensors])


def structured(kind: str) -> list[torch.Tensor]:
    """Gradients of the kinds that break a bad sketch."""
    row = torch.randn(16)
    table = {
        "random": torch.randn(128, 16),
        "repeated rows": row.expand(128, 16),  # rank 1; a block of 64 holds whole rows, so blocks are equal
        "constant": torch.ones(128, 16),
        "alternating": torch.ones(128, 16) * torch.tensor([1.0, -1.0]).repeat(8),
        "two rows": torch.zeros(128, 16).index_copy(0, torch.tensor([3, 7]), torch.randn(2, 16)),
        "every fourth row": torch.zeros(128, 16).index_copy(0, torch.arange(0, 128, 4), row.expand(32, 16)),
        "rank 1": torch.randn(128, 1) * row,
    }
    return [table[kind].clone(), torch.randn(5), torch.full((30,), 0.1)]


KINDS = ("random", "repeated rows", "constant", "alternating", "two rows", "every fourth row", "rank 1")


@pytest.mark.parametrize("kind", KINDS)
def test_the_sketch_is_unbiased_and_its_error_small(seed, kind):
    width, x, y = 64, structured(kind), structured(kind)
    y[0] = y[0] + 0.5 * torch.randn(128, 16)
    shapes = [t.shape for t in x]
    fx, fy = flat(x), flat(y)
    squares, dots = [], []
    for number in range(600):
        sketch = K.CountSketch(shapes, width, seed=seed * 10_000 + number)
        sx, sy = sketch(x), sketch(y)
        squares.append(float(sx @ sx / (fx @ fx)))
        dots.append(float(sx @ sy / (fx.norm() * fy.norm())))
    squares, dots = torch.tensor(squares), torch.tensor(dots)
    cosine = float(fx @ fy / (fx.norm() * fy.norm()))
    # heavy tails where equal blocks meet with equal shifts: one in `width` pairs
    assert abs(squares.mean() - 1) < 5 * squares.std() / len(squares) ** 0.5 + 1e-6
    assert abs(dots.mean() - cosine) < 5 * dots.std() / len(dots) ** 0.5 + 1e-6
    assert squares.std() < 1.25 * (4 / width) ** 0.5, "at most doubled variance"
    assert dots.std() < 1.25 * (2 * (1 + cosine**2) / width) ** 0.5
    if kind == "random":
        assert squares.std() == pytest.approx((2 / width) ** 0.5, rel=0.15)


def test_the_sketch_is_linear_and_the_same_for_a_seed(seed):
    x, y = ([torch.randn(s, dtype=torch.float64) for s in SHAPES] for _ in range(2))
    sketch, again = K.CountSketch(SHAPES, 32, seed=3), K.CountSketch([math.prod(s) for s in SHAPES], 32, seed=3)
    assert torch.equal(sketch(x), again(x)) and not torch.equal(sketch(x), K.CountSketch(SHAPES, 32, seed=4)(x))
    assert sketch(x).shape == (32,) and sketch(x).dtype == torch.float64
    both = sketch([2 * a - 3 * b for a, b in zip(x, y)])
    torch.testing.assert_close(both, 2 * sketch(x) - 3 * sketch(y), rtol=1e-12, atol=1e-12)


def test_the_sketch_is_its_formula(seed):
    """Every value lands once, whole: against a dense matrix made of unit vectors, with blocks longer than a tensor too."""
    for width in (1, 7, 64, 4096):
        sketch = K.CountSketch(SHAPES, width, seed=seed)
        total = sum(math.prod(s) for s in SHAPES)

        def unflatten(vector):
            return [part.reshape(s) for part, s in zip(vector.split([math.prod(s) for s in SHAPES]), SHAPES)]

        columns = range(0, total, 37)
        unit = torch.eye(total, dtype=torch.float64)[list(columns)]
        matrix = torch.stack([sketch(unflatten(row)) for row in unit])
        assert (matrix.abs().sum(1) == 1).all() and matrix.abs().amax(1).eq(1).all(), "one number, 1 or -1"
        x = torch.zeros(total, dtype=torch.float64)
        x[list(columns)] = torch.randn(len(unit), dtype=torch.float64)
        torch.testing.assert_close(sketch(unflatten(x)), matrix.T @ x[list(columns)], rtol=1e-12, atol=1e-12)


def test_shorter_than_the_width_keeps_its_norm(seed):
    x = [torch.randn(50)]
    sx = K.CountSketch([50], 4096, seed=seed)(x)
    assert float(sx @ sx) == pytest.approx(float(x[0].double() @ x[0].double()), rel=1e-6)


def test_sketch_dtypes_and_layouts(seed):
    x = [torch.randn(300, 70), torch.randn(70, 300).T, torch.randn(5000)]
    sketch = K.CountSketch([t.shape for t in x], 4096, seed=1)
    wide = sketch([t.double() for t in x])
    torch.testing.assert_close(sketch(x), wide, rtol=1e-5, atol=1e-5)
    half = [t.bfloat16() for t in x]
    torch.testing.assert_close(sketch(half), sketch([t.double() for t in half]), rtol=1e-5, atol=1e-5)
    x[1][3, 4] = math.nan
    assert sketch(x).isnan().sum() == 1
    assert torch.equal(K.CountSketch([], 8)([]), torch.zeros(8, dtype=torch.float64))


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_bits_of_a_sketch_do_not_depend_on_the_threads(seed, dtype):
    x = [torch.randn(300_000).to(dtype), torch.randn(500, 400).to(dtype).T]
    sketch = K.CountSketch([t.shape for t in x], 2**17, seed=1)  # torch gives a thread 32,768 values at least
    before, found = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 4):
            torch.set_num_threads(threads)
            found.append(sketch(x))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(found[0], other) for other in found)


def test_sketches_refuse_what_does_not_fit():
    with pytest.raises(ValueError, match="width must be at least 1, got 0"):
        K.CountSketch([3], 0)
    sketch = K.CountSketch([(2, 3), 4], 8)
    with pytest.raises(ValueError, match="expected 2 tensors, got 1"):
        sketch([torch.ones(2, 3)])
    with pytest.raises(ValueError, match=r"tensor 1 was announced with 4 values, got \(5,\)"):
        sketch([torch.ones(2, 3), torch.ones(5)])
    with pytest.raises(ValueError, match="tensor 1 is on meta, but tensor 0 is on cpu"):
        sketch([torch.ones(2, 3), torch.ones(4, device="meta")])


def test_alpha_from_sketches_is_alpha_from_gradients(seed):
    """The whole way: sums of two paths' gradients, sketched, against the same unsketched."""
    counts, shapes = [4] * 24, [(60, 20), (300,), (20, 60)]
    total = sum(math.prod(s) for s in shapes)
    sketch = K.CountSketch(shapes, 2048, seed=seed)
    trace_mean, bias = torch.randn(2, total, dtype=torch.float64) / total**0.5
    paths = [[], []]
    for n in counts:
        shared, own, other = torch.randn(3, total, dtype=torch.float64) * (n / total) ** 0.5
        paths[0].append(n * trace_mean + shared + 1.5 * own)
        paths[1].append(n * (trace_mean + bias) + shared + 0.5 * other)
    full = [torch.stack(path) for path in paths]
    sizes = [math.prod(s) for s in shapes]
    short = [
        torch.stack([sketch([p.reshape(s) for p, s in zip(g.split(sizes), shapes)]) for g in path]) for path in paths
    ]
    for batch in (1, 8, 128):
        one, other = (K.optimal_alpha(K.path_statistics(*path, counts), batch) for path in (full, short))
        assert other.alpha == pytest.approx(one.alpha, abs=0.06)

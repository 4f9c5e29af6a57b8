"""Cases of the Triton head kernels that run in the interpreter; `test_head_triton.py` starts this file as a process:
`python triton_head_interpreted.py GROUP`, see triton_cases.py.
"""

from __future__ import annotations

import torch
from triton_cases import FAR, case, far_rows, note_error, run_group

from longtrace.kernels.head.epilogue import RowStats
from longtrace.kernels.head.spec import Transform

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
PLAIN, CAPPED, SHARP = Transform(), Transform(0.7, 5.0, 1.3), Transform(temperature=0.5)


def draws(seed=0):
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


def check_no_worse(name, ours, exact, theirs, dtype=torch.float32, terms=1):
    """|ours - exact| <= |theirs - exact| in the Frobenius norm, up to the chance scatter of roundings.

    `name` is what made it, "tile dh", and may say more after a colon.
    `terms` is the length of the sums whose order differs: each adds its own rounding, so the scatter grows by its root.
    """
    if not exact.numel():
        assert ours.shape == exact.shape, name
        return
    unit = torch.finfo(dtype).eps / 2
    chance = unit * exact.norm().item() * min(1.0, 32 / exact.numel() ** 0.5) * terms**0.5
    error, allowed = (ours.double() - exact).norm().item(), (theirs.double() - exact).norm().item()
    note_error(name.split(":")[0], dtype, error, exact.norm().item(), allowed)
    assert error <= allowed + chance + 1e-6, f"{name}: {error} > {allowed} + {chance}"


def check_equal(kernel, ours, exact):
    """For kernels that only pick or compare: bit for bit."""
    note_error(kernel, exact.dtype, (ours.double() - exact.double()).norm().item(), exact.double().norm().item())
    assert torch.equal(ours, exact), kernel


ROWS, TILE = "rows stats", "tile stats, tile combine"  # the kernels behind row statistics


def check_stats(ours: RowStats, exact: RowStats, theirs: RowStats, kernels=ROWS):
    for name in ("log_prob", "entropy"):
        if getattr(ours, name) is not None:
            check_no_worse(f"{kernels}: {name}", *(getattr(x, name) for x in (ours, exact, theirs)))
    lse = [x.maximum + x.log_sum for x in (ours, exact, theirs)]
    check_no_worse(f"{kernels}: lse", *lse)


def same_bits(a, b):
    pairs = zip(a, b) if isinstance(a, tuple) else [(a, b)]
    return all(torch.equal(x.contiguous().view(torch.uint8), y.contiguous().view(torch.uint8)) for x, y in pairs)


def final(raw, bias, transform):
    z = transform.logit_scale * raw + (0.0 if bias is None else bias.to(raw.dtype))
    z = z if transform.softcap is None else transform.softcap * torch.tanh(z / transform.softcap)
    return z / transform.temperature


def twin_stats(logits, target, bias, transform, dtype) -> RowStats:
    z = final(logits.to(dtype), bias, transform)
    maximum = z.amax(1) if z.numel() else z.new_zeros(z.shape[0])
    shifted = z - maximum[:, None]
    log_sum = shifted.exp().sum(1).log()
    log_prob = shifted.gather(1, target[:, None]).squeeze(1) - log_sum
    return RowStats(maximum, log_sum, log_prob, torch.special.entr((shifted - log_sum[:, None]).exp()).sum(1))


def twin_dlogits(logits, target, bias, transform, a, b, e, s, class_weight, dtype):
    """(d/d(h . w), d/d bias) by the formula, in plain PyTorch in `dtype`."""
    a, b, e, s, class_weight, bias = (None if x is None else x.to(dtype) for x in (a, b, e, s, class_weight, bias))
    stats = twin_stats(logits, target, bias, transform, dtype)
    z = final(logits.to(dtype), bias, transform)
    p = (z - stats.maximum[:, None] - stats.log_sum[:, None]).exp()
    d = a[:, None] * p
    if e is not None:
        d += e[:, None] * (torch.special.entr(p) - p * stats.entropy[:, None])
    d.scatter_add_(1, target[:, None], -b[:, None])
    if s is not None:
        d -= s[:, None] * (1.0 if class_weight is None else class_weight)
    if transform.softcap is not None:
        d *= 1 - (z * transform.temperature / transform.softcap) ** 2
    d /= transform.temperature
    return d * transform.logit_scale, d.sum(0)


def make_rows(R, V, dtype=torch.float32, seed=0):
    draw = draws(seed)
    logits, bias = (3 * draw(R, V)).to(dtype), draw(V).to(dtype)
    target = torch.randint(0, V, (R,), generator=torch.Generator().manual_seed(seed))
    a, b, e, s = draw(4, R).float()
    return logits, bias, target, a, b, e, s, draw(V).abs().float()


SHAPES = ((1, 1), (2, 2500))


@case("rows", *((d, t, s) for d in DTYPES for t in (PLAIN, CAPPED) for s in SHAPES), (torch.float32, SHARP, (2, 123)))
def stats_no_worse_than_torch(dtype, transform, shape):
    from longtrace.kernels.head import triton_rows

    logits, bias, target, *_ = make_rows(*shape, dtype)
    for offsets in (bias, None):
        exact, theirs = (twin_stats(logits, target, offsets, transform, d) for d in (torch.float64, torch.float32))
        check_stats(triton_rows.softmax_stats(logits, target, offsets, transform, True), exact, theirs)
        short = triton_rows.softmax_stats(logits, target, offsets, transform, False)
        assert short.entropy is None
        check_stats(short, exact, theirs)


@case("rows", *((d, t, s) for d in DTYPES for t in (PLAIN, CAPPED) for s in SHAPES))
def dlogits_no_worse_than_torch(dtype, transform, shape):
    from longtrace.kernels.head import triton_rows

    logits, bias, target, a, b, e, s, w = make_rows(*shape)
    options = (bias, a, b, e, s, w), (None, a, b, None, s, None), (bias, a, a, None, None, None)
    for offsets, *rows in options if dtype == torch.float32 else options[:1]:
        exact, theirs = (
            twin_dlogits(logits, target, offsets, transform, *rows, d) for d in (torch.float64, torch.float32)
        )
        stats = triton_rows.softmax_stats(logits, target, offsets, transform, True)
        out = triton_rows.dlogits(logits, target, offsets, transform, stats, *rows, torch.empty(shape, dtype=dtype))
        check_no_worse("rows dlogits", out, exact[0], theirs[0].to(dtype), dtype)
        if offsets is not None:
            got = triton_rows.bias_gradient(logits, target, offsets, transform, stats, *rows)
            check_no_worse("rows bias_gradient", got, exact[1], theirs[1])
        if dtype == torch.float32:  # in place
            assert same_bits(triton_rows.dlogits(logits.clone(), target, offsets, transform, stats, *rows, out), out)
            whole = logits.clone()
            assert same_bits(triton_rows.dlogits(whole, target, offsets, transform, stats, *rows, whole), out)


@case("rows", (PLAIN,), (CAPPED,))
def dlogits_are_the_derivative(transform):
    from longtrace.kernels.head import triton_rows

    logits, bias, target, a, b, e, s, w = make_rows(4, 200, seed=3)
    raw, offsets = logits.double().requires_grad_(), bias.double().requires_grad_()
    z = final(raw, offsets, transform)
    log_p = z.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    picked = z.gather(1, target[:, None]).squeeze(1)
    value = (a * z.logsumexp(1) - b * picked + e * entropy - s * (z @ w.double())).sum()
    exact = torch.autograd.grad(value, (raw, offsets))
    stats = triton_rows.softmax_stats(logits, target, bias, transform, True)
    out = triton_rows.dlogits(logits, target, bias, transform, stats, a, b, e, s, w, torch.empty_like(logits))
    torch.testing.assert_close(out.double(), exact[0], atol=3e-6, rtol=3e-6)
    got = triton_rows.bias_gradient(logits, target, bias, transform, stats, a, b, e, s, w)
    torch.testing.assert_close(got.double(), exact[1], atol=3e-6, rtol=3e-6)


@case("rows", (151936,))
def wide_vocabulary(V):
    from longtrace.kernels.head import triton_rows

    logits, bias, target, a, b, e, *_ = make_rows(2, V)
    exact, theirs = (twin_stats(logits, target, bias, CAPPED, d) for d in (torch.float64, torch.float32))
    ours = triton_rows.softmax_stats(logits, target, bias, CAPPED, True)
    check_stats(ours, exact, theirs)
    rows = (a, b, e, None, None)
    exact, theirs = (twin_dlogits(logits, target, bias, CAPPED, *rows, d)[0] for d in (torch.float64, torch.float32))
    out = triton_rows.dlogits(logits, target, bias, CAPPED, ours, *rows, torch.empty(2, V, dtype=torch.bfloat16))
    check_no_worse("rows dlogits", out, exact, theirs.bfloat16(), torch.bfloat16)


@case("rows", (1e4,), (-1e4,))
def an_offset_changes_nothing(offset):
    from longtrace.kernels.head import triton_rows

    logits, bias, target, a, *_ = make_rows(3, 3000)
    shifted = ((logits * 8).round() / 8 + offset).float()  # eighths: exact at 1e4
    ours = triton_rows.softmax_stats(shifted, target, None, PLAIN, True)
    plain = triton_rows.softmax_stats(shifted - offset, target, None, PLAIN, True)
    assert same_bits(ours[1:], plain[1:])
    rows = (a, a, a, None, None)
    out = triton_rows.dlogits(shifted, target, None, PLAIN, ours, *rows, torch.empty_like(shifted))
    exact, theirs = (twin_dlogits(shifted, target, None, PLAIN, *rows, d)[0] for d in (torch.float64, torch.float32))
    check_no_worse("rows dlogits", out, exact, theirs)
    by_bias = triton_rows.softmax_stats(logits, target, bias + offset, PLAIN, True)
    check_stats(by_bias, *(twin_stats(logits, target, bias + offset, PLAIN, d) for d in (torch.float64, torch.float32)))


@case("rows")
def identical_logits():
    from longtrace.kernels.head import triton_rows

    logits = torch.full((2, 5000), 7.25)
    ours = triton_rows.softmax_stats(logits, torch.tensor([0, 4999]), None, PLAIN, True)
    log_v = torch.tensor([5000.0]).log().expand(2)
    torch.testing.assert_close(ours.entropy, log_v, rtol=3e-7, atol=0)
    torch.testing.assert_close(ours.log_prob, -log_v, rtol=3e-7, atol=0)


@case("rows", (PLAIN,), (CAPPED,))
def minus_infinity_in_the_bias(transform):
    from longtrace.kernels.head import triton_rows

    logits, bias, target, a, b, e, *_ = make_rows(3, 300)
    bias[::2] = float("-inf")
    target |= 1
    exact, theirs = (twin_stats(logits, target, bias, transform, d) for d in (torch.float64, torch.float32))
    stats = triton_rows.softmax_stats(logits, target, bias, transform, True)
    check_stats(stats, exact, theirs)
    rows = (a, b, e, None, None)
    exact, theirs = (twin_dlogits(logits, target, bias, transform, *rows, d)[0] for d in (torch.float64, torch.float32))
    out = triton_rows.dlogits(logits, target, bias, transform, stats, *rows, torch.empty_like(logits))
    check_no_worse("rows dlogits", out, exact, theirs)
    assert not out[:, ::2].any()
    hidden = triton_rows.softmax_stats(logits, target - 1, bias, PLAIN, True)
    assert (hidden.log_prob == float("-inf")).all() and hidden.entropy.isfinite().all()


@case("rows")
def a_nan_row_stays_alone():
    from longtrace.kernels.head import triton_rows

    logits, bias, target, a, b, e, *_ = make_rows(4, 2500)
    broken = logits.clone()
    broken[2, 2400] = float("nan")
    clean, ours = (triton_rows.softmax_stats(x, target, bias, CAPPED, True) for x in (logits, broken))
    others = torch.tensor([0, 1, 3])
    assert same_bits(tuple(x[others] for x in ours), tuple(x[others] for x in clean))
    assert ours.log_prob[2].isnan() and ours.entropy[2].isnan() and (ours.maximum + ours.log_sum)[2].isnan()
    out = [
        triton_rows.dlogits(x, target, bias, CAPPED, y, a, b, e, None, None, torch.empty_like(x))
        for x, y in ((logits, clean), (broken, ours))
    ]
    assert same_bits(out[0][others], out[1][others]) and out[1][2].isnan().all()


@case("rows")
def strides_repeats_and_empty_batches():
    from longtrace.kernels.head import triton_rows

    logits, bias, target, a, b, *_ = make_rows(5, 333)
    stats = triton_rows.softmax_stats(logits, target, bias, CAPPED, True)
    out = triton_rows.dlogits(logits, target, bias, CAPPED, stats, a, b, None, None, None, torch.empty_like(logits))
    wide = torch.zeros(5, 400)
    wide[:, 7:340] = logits
    for x in (logits, wide[:, 7:340], logits.t().contiguous().t()):
        assert same_bits(triton_rows.softmax_stats(x, target, bias, CAPPED, True), stats)
        into = torch.full((5, 350), 9.0)
        got = triton_rows.dlogits(x, target, bias, CAPPED, stats, a, b, None, None, None, into[:, :333])
        assert same_bits(got, out) and (into[:, 333:] == 9).all()
    short = triton_rows.softmax_stats(logits[1:3], target[1:3].int(), bias, CAPPED, True)  # a row does not depend on R
    assert same_bits(short, tuple(x[1:3] for x in stats))
    none = triton_rows.softmax_stats(logits[:0], target[:0], bias, PLAIN, True)
    assert all(x.shape == (0,) for x in none)
    empty = (logits[:0], target[:0], bias, PLAIN, none, a[:0], a[:0], None, None, None)
    assert triton_rows.dlogits(*empty, torch.empty(0, 333)).shape == (0, 333)
    assert not triton_rows.bias_gradient(*empty).any()


@case("rows")
def offsets_past_32_bits():
    """Rows that lie 1.15e9 elements apart, read and written, give the bits of rows side by side."""
    from longtrace.kernels.head import triton_rows

    logits, bias, target, a, b, e, *_ = make_rows(3, 48, torch.bfloat16)
    far, out = far_rows(logits, FAR // 2), far_rows(torch.zeros_like(logits), FAR // 2)
    results = []
    for x, into in ((logits, torch.empty_like(logits)), (far, out)):
        stats = triton_rows.softmax_stats(x, target, bias, CAPPED, True)
        rows = (x, target, bias, CAPPED, stats, a, b, e, None, None)
        results.append((*stats, triton_rows.bias_gradient(*rows), triton_rows.dlogits(*rows, into)))
    assert same_bits(*results)


@case("rows")
def refusals():
    from longtrace.kernels.head import triton_rows

    logits, bias, target, a, *_ = make_rows(2, 5)
    stats = triton_rows.softmax_stats(logits, target, bias, PLAIN, False)
    for call in (
        lambda: triton_rows.softmax_stats(logits.double(), target, bias, PLAIN, False),
        lambda: triton_rows.softmax_stats(logits, target[:1], bias, PLAIN, False),
        lambda: triton_rows.softmax_stats(logits, target, bias[:3], PLAIN, False),
        lambda: triton_rows.dlogits(logits, target, bias, PLAIN, stats, a, a, a, None, None, logits),
        lambda: triton_rows.dlogits(logits, target, bias, PLAIN, stats, a, a, None, None, None, logits[:1]),
    ):
        try:
            call()
        except ValueError:
            continue
        raise AssertionError("accepted")


@case("columns", *((d, s) for d in DTYPES for s in ((1, 1), (40, 123))), (torch.bfloat16, (2, 129920)))
def column_passes(dtype, shape):
    from longtrace.kernels.head import triton_columns

    R, V = shape
    for sizes in triton_columns.BLOCKS.values() if V > 1000 else ():
        sizes.update({"COLS": 16384, "ROWS": 4} if "COLS" in sizes else {"BLOCK": 16384})  # time goes by programs here
    p = draws()(R, V).abs().to(dtype)
    scale, weight = draws(1)(2, R).float()
    dropped = draws(2)(V) > 0
    k = 5
    cluster = torch.randint(0, k - 1, (R,), generator=torch.Generator().manual_seed(4))  # the last cluster is empty
    wide = torch.zeros(R, V + 9, dtype=dtype)
    wide[:, 3 : V + 3] = p
    columns = (~dropped).nonzero().squeeze(1)
    for x in (p, wide[:, 3 : V + 3]) if V < 1000 else (wide[:, 3 : V + 3],):
        check_equal("columns column_max", triton_columns.column_max(x, scale), (p.float() * scale[:, None]).amax(0))
        check_equal("columns column_max", triton_columns.column_max(x, None), p.float().amax(0))
        check_no_worse("columns column_sum", triton_columns.column_sum(x), p.double().sum(0), p.float().sum(0))
        check_equal("columns compact", triton_columns.compact(x, columns), p[:, columns])
        masked = p * dropped
        check_no_worse(
            "columns row_mass", triton_columns.row_mass(x, dropped), masked.double().sum(1), masked.float().sum(1)
        )
        tails = triton_columns.tail_sums(x, cluster, weight, dropped, k)
        exact, theirs = (
            torch.zeros(k, V, dtype=d).index_add(0, cluster, masked.to(d) * weight.to(d)[:, None])
            for d in (torch.float64, torch.float32)
        )
        check_no_worse("columns tail_sums", tails, exact, theirs)
        assert not tails[:, ~dropped].any() and not tails[k - 1].any()
        assert same_bits(tails, triton_columns.tail_sums(x, cluster.int(), weight, dropped, k))


@case("columns")
def offsets_past_32_bits_in_columns():
    from longtrace.kernels.head import triton_columns

    p, dropped = draws()(3, 50).abs().bfloat16(), draws(2)(50) > 0
    cluster, weight = torch.tensor([0, 1, 0]), draws(1)(3).float()
    columns = (~dropped).nonzero().squeeze(1)
    near, far = (
        (
            triton_columns.column_max(x, weight), triton_columns.column_sum(x), triton_columns.compact(x, columns),
            triton_columns.tail_sums(x, cluster, weight, dropped, 2), triton_columns.row_mass(x, dropped),
        )
        for x in (p, far_rows(p, FAR // 2))
    )  # fmt: skip
    assert same_bits(near, far)


@case("columns")
def nan_and_empty():
    from longtrace.kernels.head import triton_columns

    p = draws()(4, 50).abs().float()
    broken = p.clone()
    broken[1] = float("nan")
    others = torch.tensor([0, 2, 3])
    assert torch.equal(triton_columns.column_max(broken, None), p[others].amax(0))
    every = torch.ones(50, dtype=torch.bool)
    mass = triton_columns.row_mass(broken, every)
    assert mass[1].isnan() and same_bits(mass[others], triton_columns.row_mass(p, every)[others])
    cluster = torch.tensor([0, 1, 0, 2])
    tails = triton_columns.tail_sums(broken, cluster, torch.ones(4), every, 3)
    assert tails[1].isnan().all() and tails[[0, 2]].isfinite().all()
    assert not triton_columns.tail_sums(broken, cluster, torch.ones(4), ~every, 3).any()
    assert not triton_columns.column_max(p[:0], None).any() and not triton_columns.column_sum(p[:0]).any()
    assert triton_columns.compact(p, torch.empty(0, dtype=torch.int64)).shape == (4, 0)
    assert not triton_columns.tail_sums(p[:0], cluster[:0], torch.ones(0), every, 2).any()
    assert triton_columns.row_mass(p[:0], every).shape == (0,)


def make_tile(T, H, V, dtype, seed=0):
    draw = draws(seed)
    h, weight, bias = draw(T, H).to(dtype), (draw(V, H) * 2 / max(1, H) ** 0.5).to(dtype), draw(V).to(dtype)
    target = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(seed))
    return h, weight, bias, target, *draw(3, T).float()


def exact_tile(h, weight, bias, target, transform, a, b, e, dtype):
    """(log_prob, entropy, lse), (dh, dw, d_bias): autograd, products in h's dtype and the rest in `dtype` or above."""
    leaves = [x.detach().requires_grad_() for x in (h, weight, bias)]
    z = final((leaves[0] @ leaves[1].T).to(dtype), leaves[2], transform)
    log_p = z.log_softmax(1)
    entropy = -(log_p.exp() * log_p).sum(1)
    lse, picked = z.logsumexp(1), z.gather(1, target[:, None]).squeeze(1)
    value = (a * lse - b * picked + (0 if e is None else e * entropy)).sum()
    log_prob = log_p.gather(1, target[:, None]).squeeze(1)
    return (log_prob.detach(), entropy.detach(), lse.detach()), torch.autograd.grad(value, leaves)


TILES = ((0, 8, 5), (1, 7, 1), (2, 65, 123), (70, 32, 40), (30, 144, 20))


@case("tile", *((d, t, s) for d in DTYPES for t in (PLAIN, CAPPED) for s in TILES))
def tile_no_worse_than_torch(dtype, transform, shape):
    from longtrace.kernels.head import triton_tile

    h, weight, bias, target, a, b, e = make_tile(*shape, dtype)
    operands = (h, weight, bias, target, transform)
    stats = triton_tile.tile_stats(*operands, True)
    ours = (stats.log_prob, stats.entropy, stats.maximum + stats.log_sum)
    d_bias = torch.empty(shape[2])
    gradients = (
        triton_tile.tile_dh(*operands, stats, a, b, e), triton_tile.tile_dw(*operands, stats, a, b, e, d_bias), d_bias
    )  # fmt: skip
    assert all(g.dtype == torch.float32 for g in (*ours, *gradients))
    double = [x.double() for x in (h, weight, bias)]
    exact = exact_tile(*double, *operands[3:], a.double(), b.double(), e.double(), torch.float64)
    theirs = exact_tile(*operands, a, b, e, torch.float32)
    for name, *values in zip(("log_prob", "entropy", "lse"), ours, exact[0], theirs[0]):
        check_no_worse(f"{TILE}: {name}", *values)
    for name, *values in zip(("tile dh", "tile dw", "tile dw: d_bias"), gradients, exact[1], theirs[1]):
        check_no_worse(name, *values, dtype, terms=shape[1] if dtype == torch.float32 else 1)
    short = triton_tile.tile_stats(*operands, False)
    assert short.entropy is None and same_bits(short[:3], stats[:3])
    assert same_bits(triton_tile.tile_dh(*operands, stats, a, b, e), gradients[0])


@case("tile", *((d,) for d in DTYPES))
def without_bias_and_entropy(dtype):
    from longtrace.kernels.head import triton_tile

    h, weight, bias, target, a, *_ = make_tile(9, 48, 77, dtype)
    stats = triton_tile.tile_stats(h, weight, None, target, SHARP, False)
    with_zero = triton_tile.tile_stats(h, weight, torch.zeros_like(bias), target, SHARP, True)
    assert same_bits(stats[:3], with_zero[:3])
    none, zero = ((h, weight, x, target, SHARP) for x in (None, torch.zeros_like(bias)))
    e = torch.zeros(9)
    assert torch.equal(triton_tile.tile_dh(*none, stats, a, a, None), triton_tile.tile_dh(*zero, with_zero, a, a, e))
    assert torch.equal(triton_tile.tile_dw(*none, stats, a, a, None), triton_tile.tile_dw(*zero, with_zero, a, a, e))


@case("tile", *((d,) for d in DTYPES))
def rows_are_independent(dtype):
    from longtrace.kernels.head import triton_tile

    h, weight, bias, target, a, b, e = make_tile(70, 24, 50, dtype)
    stats = triton_tile.tile_stats(h, weight, bias, target, CAPPED, True)
    dh = triton_tile.tile_dh(h, weight, bias, target, CAPPED, stats, a, b, e)
    one = slice(66, 67)
    alone = triton_tile.tile_stats(h[one], weight, bias, target[one], CAPPED, True)
    assert same_bits(alone, tuple(x[one] for x in stats))
    assert same_bits(
        triton_tile.tile_dh(h[one], weight, bias, target[one], CAPPED, alone, a[one], b[one], e[one]), dh[one]
    )
    broken = h.clone()
    broken[3, 5] = float("nan")
    ours = triton_tile.tile_stats(broken, weight, bias, target, CAPPED, True)
    keep = torch.arange(70) != 3
    assert same_bits(tuple(x[keep] for x in ours), tuple(x[keep] for x in stats))
    assert ours.log_prob[3].isnan() and ours.entropy[3].isnan()
    got = triton_tile.tile_dh(broken, weight, bias, target, CAPPED, ours, a, b, e)
    assert same_bits(got[keep], dh[keep]) and got[3].isnan().all()


@case("tile", (torch.float32,), (torch.bfloat16,))
def strided_operands(dtype):
    from longtrace.kernels.head import triton_tile

    h, weight, bias, target, a, b, e = make_tile(6, 33, 50, dtype)
    stats = triton_tile.tile_stats(h, weight, bias, target, CAPPED, True)
    wide_h, wide_w = torch.zeros(12, 40, dtype=dtype), torch.zeros(50, 64, dtype=dtype)
    wide_h[::2, 2:35], wide_w[:, 5:38] = h, weight
    strided = (wide_h[::2, 2:35], wide_w[:, 5:38], bias, target, CAPPED)
    assert same_bits(triton_tile.tile_stats(*strided, True), stats)
    for gradient in (triton_tile.tile_dh, triton_tile.tile_dw):
        whole = gradient(h, weight, bias, target, CAPPED, stats, a, b, e)
        assert same_bits(gradient(*strided, stats, a, b, e), whole)
        turned = (h.t().contiguous().t(), weight.t().contiguous().t(), bias, target, CAPPED)
        assert same_bits(gradient(*turned, stats, a, b, e), whole)


@case("tile")
def offsets_past_32_bits_in_tiles():
    """Tokens and rows of the vocabulary 9e6 elements apart: the first of a later tile is past 2^31, none within one is."""
    from longtrace.kernels.head import triton_tile

    h, weight, bias, target, a, b, e = make_tile(257, 16, 257, torch.bfloat16)
    results = []
    for x, w in ((h, weight), (far_rows(h, FAR // 4096 * 16), far_rows(weight, FAR // 4096 * 16))):
        operands = (x, w, bias, target, CAPPED)
        stats = triton_tile.tile_stats(*operands, True)
        gradients = (gradient(*operands, stats, a, b, e) for gradient in (triton_tile.tile_dh, triton_tile.tile_dw))
        results.append((*stats, *gradients))
    assert same_bits(*results)


@case("tile")
def rows_of_one_tile_past_32_bits():
    """Such operands are copied; the kernels alone would wrap within a tile."""
    from longtrace.kernels.head import triton_tile

    h, weight, bias, target, a, b, e = make_tile(20, 16, 20, torch.bfloat16)
    results = []
    for x, w in ((h, weight), (far_rows(h, FAR // 15), weight), (h, far_rows(weight, FAR // 15))):
        operands = (x, w, bias, target, PLAIN)
        stats = triton_tile.tile_stats(*operands, True)
        gradients = (gradient(*operands, stats, a, b, e) for gradient in (triton_tile.tile_dh, triton_tile.tile_dw))
        results.append((*stats, *gradients))
    assert same_bits(*results[:2]) and same_bits(*results[1:])


@case("tile", (1e4,), (float("-inf"),))
def hard_biases(offset):
    from longtrace.kernels.head import triton_tile

    h, weight, bias, target, a, b, _ = make_tile(5, 24, 90, torch.float32)
    if offset > 0:
        bias += offset
    else:
        bias[::2] = offset
        target |= 1
    operands = (h, weight, bias, target, PLAIN)
    stats = triton_tile.tile_stats(*operands, True)
    raws = h.double() @ weight.double().T, h @ weight.T
    check_stats(stats, *(twin_stats(x, target, bias, PLAIN, x.dtype) for x in raws), TILE)
    e = torch.ones(5)
    gradients = triton_tile.tile_dh(*operands, stats, a, b, e), triton_tile.tile_dw(*operands, stats, a, b, e)
    exact, theirs = (twin_dlogits(x, target, bias, PLAIN, a, b, e, None, None, x.dtype)[0] for x in raws)
    exact, theirs = ((d @ weight.to(d.dtype), d.T @ h.to(d.dtype)) for d in (exact, theirs))
    check_no_worse("tile dh", gradients[0], exact[0], theirs[0])
    check_no_worse("tile dw", gradients[1], exact[1], theirs[1])


@case("tile", (torch.bfloat16,))
def wide_vocabulary_in_spans(dtype):
    from longtrace.kernels.head import triton_tile

    for sizes in triton_tile.BLOCKS.values():
        sizes["stats"]["BLOCK_V"] = 4096  # the interpreter pays by the tile
    h, weight, bias, target, *_ = make_tile(2, 16, 129920, dtype)
    ours = triton_tile.tile_stats(h, weight, bias, target, CAPPED, True)
    raw = h.double() @ weight.double().T
    theirs = twin_stats((h @ weight.T).float(), target, bias, CAPPED, torch.float32)
    check_stats(ours, twin_stats(raw, target, bias, CAPPED, torch.float64), theirs, TILE)


def smallest():
    from longtrace.kernels.head import triton_rows

    triton_rows.softmax_stats(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), None, PLAIN, False)


if __name__ == "__main__":
    run_group(smallest, over="ignore")  # exp(2 x) in tanh is meant to overflow to inf

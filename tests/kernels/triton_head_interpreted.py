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


ROWS, TILE = "rows stats", "tile target, tile exp, tile sums"  # the kernels behind row statistics


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


def twin_dlogits(logits, target, bias, transform, a, e, dtype):
    """d loss / d z, 0 at the targets, by the formula, in plain PyTorch in `dtype`."""
    a, e, bias = (None if x is None else x.to(dtype) for x in (a, e, bias))
    stats = twin_stats(logits, target, bias, transform, dtype)
    z = final(logits.to(dtype), bias, transform)
    p = (z - stats.maximum[:, None] - stats.log_sum[:, None]).exp()
    d = a[:, None] * p
    if e is not None:
        d += e[:, None] * (torch.special.entr(p) - p * stats.entropy[:, None])
    if transform.softcap is not None:
        d *= 1 - (z * transform.temperature / transform.softcap) ** 2
    return d.scatter_(1, target[:, None], 0.0)


def make_rows(R, V, dtype=torch.float32, seed=0):
    draw = draws(seed)
    logits, bias = (3 * draw(R, V)).to(dtype), draw(V).to(dtype)
    target = torch.randint(0, V, (R,), generator=torch.Generator().manual_seed(seed))
    return logits, bias, target, *draw(2, R).float()


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

    logits, bias, target, a, e = make_rows(*shape)
    for offsets, *rows in ((bias, a, e), (None, a, None))[: 2 if dtype == torch.float32 else 1]:
        exact, theirs = (
            twin_dlogits(logits, target, offsets, transform, *rows, d) for d in (torch.float64, torch.float32)
        )
        stats = triton_rows.softmax_stats(logits, target, offsets, transform, True)
        out = triton_rows.dlogits(logits, target, offsets, transform, stats, *rows, torch.empty(shape, dtype=dtype))
        check_no_worse("rows dlogits", out, exact, theirs.to(dtype), dtype)
        if dtype == torch.float32:  # in place
            assert same_bits(triton_rows.dlogits(logits.clone(), target, offsets, transform, stats, *rows, out), out)
            whole = logits.clone()
            assert same_bits(triton_rows.dlogits(whole, target, offsets, transform, stats, *rows, whole), out)


def derivative_of_the_loss(logits, bias, target, transform, a, e):
    """autograd's d/dz of sum a lse + e entropy, 0 at the targets, in float64."""
    z = final(logits.double(), bias.double(), transform).requires_grad_()
    log_p = z.log_softmax(1)
    value = (a * z.logsumexp(1) - e * (log_p.exp() * log_p).sum(1)).sum()
    d = torch.autograd.grad(value, z)[0]
    if transform.softcap is not None:
        d = d * (1 - (z * transform.temperature / transform.softcap) ** 2)
    return d.detach().scatter(1, target[:, None], 0.0)


@case("rows", (PLAIN,), (CAPPED,))
def dlogits_are_the_derivative(transform):
    from longtrace.kernels.head import triton_rows

    logits, bias, target, a, e = make_rows(4, 200, seed=3)
    stats = triton_rows.softmax_stats(logits, target, bias, transform, True)
    out = triton_rows.dlogits(logits, target, bias, transform, stats, a, e, torch.empty_like(logits))
    exact = derivative_of_the_loss(logits, bias, target, transform, a, e)
    torch.testing.assert_close(out.double(), exact, atol=3e-6, rtol=3e-6)


@case("rows", (151936,))
def wide_vocabulary(V):
    from longtrace.kernels.head import triton_rows

    logits, bias, target, a, e = make_rows(2, V)
    exact, theirs = (twin_stats(logits, target, bias, CAPPED, d) for d in (torch.float64, torch.float32))
    ours = triton_rows.softmax_stats(logits, target, bias, CAPPED, True)
    check_stats(ours, exact, theirs)
    rows = (a, e)
    exact, theirs = (twin_dlogits(logits, target, bias, CAPPED, *rows, d) for d in (torch.float64, torch.float32))
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
    rows = (a, a)
    out = triton_rows.dlogits(shifted, target, None, PLAIN, ours, *rows, torch.empty_like(shifted))
    exact, theirs = (twin_dlogits(shifted, target, None, PLAIN, *rows, d) for d in (torch.float64, torch.float32))
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

    logits, bias, target, a, e = make_rows(3, 300)
    bias[::2] = float("-inf")
    target |= 1
    exact, theirs = (twin_stats(logits, target, bias, transform, d) for d in (torch.float64, torch.float32))
    stats = triton_rows.softmax_stats(logits, target, bias, transform, True)
    check_stats(stats, exact, theirs)
    rows = (a, e)
    exact, theirs = (twin_dlogits(logits, target, bias, transform, *rows, d) for d in (torch.float64, torch.float32))
    out = triton_rows.dlogits(logits, target, bias, transform, stats, *rows, torch.empty_like(logits))
    check_no_worse("rows dlogits", out, exact, theirs)
    assert not out[:, ::2].any()
    hidden = triton_rows.softmax_stats(logits, target - 1, bias, PLAIN, True)
    assert (hidden.log_prob == float("-inf")).all() and hidden.entropy.isfinite().all()


@case("rows")
def a_nan_row_stays_alone():
    from longtrace.kernels.head import triton_rows

    logits, bias, target, a, e = make_rows(4, 2500)
    broken = logits.clone()
    broken[2, 2400] = float("nan")
    clean, ours = (triton_rows.softmax_stats(x, target, bias, CAPPED, True) for x in (logits, broken))
    others = torch.tensor([0, 1, 3])
    assert same_bits(tuple(x[others] for x in ours), tuple(x[others] for x in clean))
    assert ours.log_prob[2].isnan() and ours.entropy[2].isnan() and (ours.maximum + ours.log_sum)[2].isnan()
    out = [
        triton_rows.dlogits(x, target, bias, CAPPED, y, a, e, torch.empty_like(x))
        for x, y in ((logits, clean), (broken, ours))
    ]
    assert same_bits(out[0][others], out[1][others])
    assert out[1][2].isnan().sum() == 2499  # all but the target's


@case("rows")
def strides_repeats_and_empty_batches():
    from longtrace.kernels.head import triton_rows

    logits, bias, target, a, _ = make_rows(5, 333)
    stats = triton_rows.softmax_stats(logits, target, bias, CAPPED, True)
    out = triton_rows.dlogits(logits, target, bias, CAPPED, stats, a, None, torch.empty_like(logits))
    wide = torch.zeros(5, 400)
    wide[:, 7:340] = logits
    for x in (logits, wide[:, 7:340], logits.t().contiguous().t()):
        assert same_bits(triton_rows.softmax_stats(x, target, bias, CAPPED, True), stats)
        into = torch.full((5, 350), 9.0)
        got = triton_rows.dlogits(x, target, bias, CAPPED, stats, a, None, into[:, :333])
        assert same_bits(got, out) and (into[:, 333:] == 9).all()
    short = triton_rows.softmax_stats(logits[1:3], target[1:3].int(), bias, CAPPED, True)  # a row does not depend on R
    assert same_bits(short, tuple(x[1:3] for x in stats))
    none = triton_rows.softmax_stats(logits[:0], target[:0], bias, PLAIN, True)
    assert all(x.shape == (0,) for x in none)
    empty = (logits[:0], target[:0], bias, PLAIN, none, a[:0], None)
    assert triton_rows.dlogits(*empty, torch.empty(0, 333)).shape == (0, 333)


@case("rows")
def offsets_past_32_bits():
    """Rows that lie 1.15e9 elements apart, read and written, give the bits of rows side by side."""
    from longtrace.kernels.head import triton_rows

    logits, bias, target, a, e = make_rows(3, 48, torch.bfloat16)
    far, out = far_rows(logits, FAR // 2), far_rows(torch.zeros_like(logits), FAR // 2)
    results = []
    for x, into in ((logits, torch.empty_like(logits)), (far, out)):
        stats = triton_rows.softmax_stats(x, target, bias, CAPPED, True)
        results.append((*stats, triton_rows.dlogits(x, target, bias, CAPPED, stats, a, e, into)))
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
        lambda: triton_rows.dlogits(logits, target, bias, PLAIN, stats, a, a, logits),
        lambda: triton_rows.dlogits(logits, target, bias, PLAIN, stats, a, None, logits[:1]),
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
    scale = draws(1)(R).float()
    wide = torch.zeros(R, V + 9, dtype=dtype)
    wide[:, 3 : V + 3] = p
    columns = (draws(2)(V) > 0).nonzero().squeeze(1)
    for x in (p, wide[:, 3 : V + 3]) if V < 1000 else (wide[:, 3 : V + 3],):
        check_equal("columns column_max", triton_columns.column_max(x, scale), (p.float() * scale[:, None]).amax(0))
        check_equal("columns column_max", triton_columns.column_max(x, None), p.float().amax(0))
        check_equal("columns compact", triton_columns.compact(x, columns), p[:, columns])


@case("columns")
def offsets_past_32_bits_in_columns():
    from longtrace.kernels.head import triton_columns

    p, columns = draws()(3, 50).abs().bfloat16(), (draws(2)(50) > 0).nonzero().squeeze(1)
    near, far = (
        (triton_columns.column_max(x, torch.ones(3)), triton_columns.compact(x, columns))
        for x in (p, far_rows(p, FAR // 2))
    )
    assert same_bits(near, far)


@case("columns")
def nan_and_empty():
    from longtrace.kernels.head import triton_columns

    p = draws()(4, 50).abs().float()
    broken = p.clone()
    broken[1] = float("nan")
    assert torch.equal(triton_columns.column_max(broken, None), p[[0, 2, 3]].amax(0))
    assert not triton_columns.column_max(p[:0], None).any()
    assert triton_columns.compact(p, torch.empty(0, dtype=torch.int64)).shape == (4, 0)


def make_tile(T, H, V, seed=0):
    """(h, weight, bias, target, a, e), the operands bf16."""
    draw = draws(seed)
    h, weight = draw(T, H).bfloat16(), (draw(V, H) * 2 / max(1, H) ** 0.5).bfloat16()
    target = torch.randint(0, V, (T,), generator=torch.Generator().manual_seed(seed))
    return h, weight, draw(V).bfloat16(), target, *draw(2, T).float()


def rows_of(T, V, value=9.0):
    """(T, V) bf16 as the kernels want it: rows a multiple of 16 elements apart."""
    return torch.full((T, -(-V // 16) * 16), value).bfloat16()[:, :V]


def check_tiles(h, weight, bias, target, transform, a, e):
    """Everything `softmax_tiles` and `gradient_tiles` give, against float64 and against torch in fp32; what they gave."""
    from longtrace.kernels.head import triton_tile

    operands = (h, weight, bias, target, transform)
    g, d = (rows_of(h.shape[0], weight.shape[0]) for _ in range(2))
    found = triton_tile.softmax_tiles(*operands, True, True, g)
    raws = [h.to(dtype) @ weight.to(dtype).T for dtype in (torch.float64, torch.float32)]
    exact, theirs = (twin_stats(x, target, bias, transform, x.dtype) for x in raws)
    check_stats(found.stats, exact, theirs, TILE)
    one = torch.ones_like(a)
    for name, ours, *rows in (
        ("tile exp", g.float() * found.scale[:, None], one, None),
        ("tile gradient", triton_tile.gradient_tiles(*operands, found.stats, a, e, d), a, e),
    ):
        exact, theirs = (twin_dlogits(x, target, bias, transform, *rows, x.dtype) for x in raws)
        check_no_worse(name, ours, exact, theirs.bfloat16(), torch.bfloat16)
        assert not ours.gather(1, target[:, None]).any(), name
    mass = g.double().sum(1) * found.scale.double()
    torch.testing.assert_close(found.mass.double(), mass, rtol=1e-5, atol=1e-30)
    short = triton_tile.softmax_tiles(*operands, False, False, None)  # what is not asked for changes no bit
    assert short.stats.entropy is None and short.mass is None
    assert same_bits((*short.stats[:3], short.scale, short.target), (*found.stats[:3], found.scale, found.target))
    return found, g, d


TILES = ((0, 8, 5), (1, 7, 1), (2, 65, 123), (130, 32, 140), (30, 144, 300))


@case("tile", *((t, s) for t in (PLAIN, CAPPED) for s in TILES), (SHARP, (9, 48, 77)))
def tiles_no_worse_than_torch(transform, shape):
    h, weight, bias, target, a, e = make_tile(*shape)
    check_tiles(h, weight, bias, target, transform, a, e)
    check_tiles(h, weight, None, target, transform, a, None)


@case("tile", (1e4,), (-1e4,))
def an_offset_changes_nothing_in_tiles(offset):
    from longtrace.kernels.head import triton_tile

    h, weight = (((8 * x).round() / 8).bfloat16() for x in make_tile(5, 24, 300)[:2])
    bias = (4 * draws(1)(300)).round().float() / 4
    target, a = make_tile(5, 24, 300)[3:5]  # sums of eighths times eighths are exact at 1e4
    results = []
    for shifted in (bias, bias + offset):
        g, d = rows_of(5, 300), rows_of(5, 300)
        found = triton_tile.softmax_tiles(h, weight, shifted, target, PLAIN, True, True, g)
        triton_tile.gradient_tiles(h, weight, shifted, target, PLAIN, found.stats, a, a, d)
        results.append((g, *found.stats[1:], found.scale, found.mass, d))
    assert same_bits(*results)


@case("tile", (100.0,), (1000.0,), (5000.0,))
def one_huge_logit(size):
    """Past what exp holds from the target's logit: the row is done again from its maximum; others keep their bits."""
    from longtrace.kernels.head import triton_tile

    h, weight, bias, target, a, e = make_tile(20, 24, 300)
    target = target.clamp(min=1)
    h[3], weight[0] = 0, 0
    h[3, 0], weight[0, 0] = 1, size  # token 3 alone meets column 0
    h[torch.arange(20) != 3, 0] = 0
    found, g, _ = check_tiles(h, weight, bias, target, PLAIN, a, e)
    assert g.isfinite().all() and found.stats.log_prob[3] < -0.9 * size
    keep = torch.arange(20) != 3
    without = triton_tile.softmax_tiles(h[keep], weight, bias, target[keep], PLAIN, True, False, None)
    assert same_bits(without.stats, tuple(x[keep] for x in found.stats))


@case("tile", (PLAIN, 0.0), (CAPPED, 0.0), (PLAIN, -1e4))
def minus_infinity_in_the_bias_of_tiles(transform, offset):
    from longtrace.kernels.head import triton_tile

    h, weight, bias, target, a, e = make_tile(6, 24, 300)
    bias = bias.float() + offset
    bias[::2], target = float("-inf"), target | 1
    _, g, d = check_tiles(h, weight, bias, target, transform, a, e)
    if transform.softcap is None:  # a cap lifts -inf to -cap
        assert not g[:, ::2].any() and not d[:, ::2].any()
        hidden = triton_tile.softmax_tiles(h, weight, bias, target - 1, transform, True, True, g)  # far below 0 or near
        raws = h.double() @ weight.double().T, h.float() @ weight.float().T
        exact, theirs = (twin_stats(x, target - 1, bias, transform, x.dtype) for x in raws)
        assert (hidden.stats.log_prob == float("-inf")).all()
        check_stats(*(x._replace(log_prob=x.maximum) for x in (hidden.stats, exact, theirs)), TILE)
        torch.testing.assert_close(hidden.mass, torch.ones(6), rtol=2**-8, atol=0)


@case("tile")
def identical_logits_in_tiles():
    from longtrace.kernels.head import triton_tile

    h, weight = torch.ones(2, 16).bfloat16(), torch.ones(5000, 16).bfloat16()
    ours = triton_tile.softmax_tiles(h, weight, None, torch.tensor([0, 4999]), PLAIN, True, False, None).stats
    log_v = torch.tensor([5000.0]).log().expand(2)
    torch.testing.assert_close(ours.entropy, log_v, rtol=3e-7, atol=0)
    torch.testing.assert_close(ours.log_prob, -log_v, rtol=3e-7, atol=0)


@case("tile")
def a_certain_target_keeps_its_digits():
    """log p = -sum of the others / own, where an eager head rounds p to 1."""
    from longtrace.kernels.head import triton_tile

    h, weight = torch.ones(1, 16).bfloat16(), torch.zeros(40, 16).bfloat16()
    weight[7] = 1.5  # 24 above the rest
    ours = triton_tile.softmax_tiles(h, weight, None, torch.tensor([7]), PLAIN, False, False, None).stats
    exact = -torch.log1p(39 * torch.tensor(-24.0, dtype=torch.float64).exp())
    torch.testing.assert_close(ours.log_prob[0].double(), exact, rtol=1e-6, atol=0)


def all_of_tiles(h, weight, bias, target, a, e, out=None, into=None):
    """Every result, as a tuple of tensors."""
    from longtrace.kernels.head import triton_tile

    g, d = (rows_of(h.shape[0], weight.shape[0]) if x is None else x for x in (out, into))
    found = triton_tile.softmax_tiles(h, weight, bias, target, CAPPED, True, True, g)
    triton_tile.gradient_tiles(h, weight, bias, target, CAPPED, found.stats, a, e, d)
    return (*found.stats, found.scale, found.mass, found.target, g, d)


@case("tile")
def rows_are_independent():
    h, weight, bias, target, a, e = make_tile(140, 24, 150)
    whole = all_of_tiles(h, weight, bias, target, a, e)
    assert same_bits(all_of_tiles(h, weight, bias, target, a, e), whole)
    one = slice(136, 137)
    assert same_bits(all_of_tiles(h[one], weight, bias, target[one], a[one], e[one]), tuple(x[one] for x in whole))
    broken = h.clone()
    broken[3, 5] = float("nan")
    ours, keep = all_of_tiles(broken, weight, bias, target, a, e), torch.arange(140) != 3
    assert same_bits(tuple(x[keep] for x in ours), tuple(x[keep] for x in whole))
    assert all(x[3].isnan().any() for x in ours)


@case("tile")
def strided_operands():
    h, weight, bias, target, a, e = make_tile(6, 33, 50)
    whole = all_of_tiles(h, weight, bias, target, a, e)
    wide_h, wide_w = torch.zeros(12, 40).bfloat16(), torch.zeros(50, 64).bfloat16()
    wide_h[::2, 2:35], wide_w[:, 5:38] = h, weight
    g, d = (rows_of(6, 64) for _ in range(2))
    strided = (wide_h[::2, 2:35], wide_w[:, 5:38], bias, target, a, e)
    assert same_bits(all_of_tiles(*strided, g[:, :50], d[:, :50]), whole)
    assert (g[:, 50:] == 9).all() and (d[:, 50:] == 9).all()
    turned = (h.t().contiguous().t(), weight.t().contiguous().t(), bias, target, a, e)
    assert same_bits(all_of_tiles(*turned), whole)


@case("tile")
def offsets_past_32_bits_in_tiles():
    """Rows 9e6 elements apart: the first of a later tile is past 2^31, none within one is."""
    h, weight, bias, target, a, e = make_tile(257, 16, 257)
    step = FAR // 4096 * 16
    whole = all_of_tiles(h, weight, bias, target, a, e)
    g, d = (far_rows(torch.zeros(257, 257).bfloat16(), step) for _ in range(2))
    assert same_bits(all_of_tiles(far_rows(h, step), far_rows(weight, step), bias, target, a, e, g, d), whole)


@case("tile")
def rows_of_one_tile_past_32_bits():
    """Such operands are copied; the kernels alone would wrap within a tile."""
    h, weight, bias, target, a, e = make_tile(20, 16, 20)
    step = FAR // 15 // 16 * 16
    whole = all_of_tiles(h, weight, bias, target, a, e)
    for x, w in ((far_rows(h, step), weight), (h, far_rows(weight, step))):
        assert same_bits(all_of_tiles(x, w, bias, target, a, e), whole)


@case("tile")
def wide_vocabulary_in_blocks():
    from longtrace.kernels.head import triton_tile

    for sizes in triton_tile.BLOCKS.values():
        sizes["BLOCK_V"] = 1024  # the interpreter pays by the tile; more blocks than one step of the sums takes
    h, weight, bias, target, a, e = make_tile(2, 16, 129920)
    check_tiles(h, weight, bias, target, CAPPED, a, e)


@case("tile")
def refusals_of_tiles():
    from longtrace.kernels.head import triton_tile

    h, weight, bias, target, a, e = make_tile(2, 8, 5)
    out = rows_of(2, 5)
    stats = triton_tile.softmax_tiles(h, weight, bias, target, PLAIN, False, False, None).stats
    for call in (
        lambda: triton_tile.softmax_tiles(h.float(), weight.float(), None, target, PLAIN, False, False, None),
        lambda: triton_tile.softmax_tiles(h[:, :7], weight, None, target, PLAIN, False, False, None),
        lambda: triton_tile.softmax_tiles(h, weight, bias[:3], target, PLAIN, False, False, None),
        lambda: triton_tile.softmax_tiles(h, weight, bias, target[:1], PLAIN, False, False, None),
        lambda: triton_tile.softmax_tiles(h, weight, bias, target, PLAIN, False, False, out[:1]),
        lambda: triton_tile.softmax_tiles(h, weight, bias, target, PLAIN, False, False, out.float()),
        lambda: triton_tile.softmax_tiles(h, weight, bias, target, PLAIN, False, False, out.contiguous()),
        lambda: triton_tile.softmax_tiles(h, weight, bias, target, PLAIN, False, False, far_rows(out, 2**24)),
        lambda: triton_tile.gradient_tiles(h, weight, bias, target, PLAIN, stats, a, e, out),
    ):
        try:
            call()
        except ValueError:
            continue
        raise AssertionError("accepted")


def smallest():
    from longtrace.kernels.head import triton_rows

    triton_rows.softmax_stats(torch.zeros(1, 1), torch.zeros(1, dtype=torch.int64), None, PLAIN, False)


if __name__ == "__main__":
    run_group(smallest, over="ignore")  # exp(2 x) in tanh is meant to overflow to inf

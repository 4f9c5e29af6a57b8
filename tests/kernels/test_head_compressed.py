"""Compressed gradients of the head: formulas against exact ones, estimates against true errors, and the way back."""

from __future__ import annotations

import pytest
import torch

from longtrace import kernels as K
from longtrace.kernels.head import backend, chunked, compressed, tail
from longtrace.kernels.head.chunked import Loss
from longtrace.kernels.head.compressed import Compression
from longtrace.kernels.head.spec import Transform

V, H = 3000, 128
DEFAULT = Compression()
OPEN = Compression(target_error=1e6)  # never falls back


def peaked(T, dtype=torch.float64, seed=0, topics=8, noise=0.15, vocabulary=V, width=H):
    """Hidden states around a few directions that share a mean, and targets drawn from the peaked softmax they give."""
    print("seed", seed)
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    weight = draw(vocabulary, width) / width**0.5
    direction = draw(topics, width) + 0.7 * draw(1, width)
    h = torch.nn.functional.normalize(direction, dim=1)[torch.arange(T) * topics // max(T, 1)]
    h = 4.5 * width**0.5 * (h + noise * draw(T, width) / width**0.5)
    target = (
        torch.multinomial((h @ weight.t()).softmax(1), 1, generator=generator).squeeze(1)
        if T
        else torch.zeros(0).long()
    )
    return h.to(dtype).requires_grad_(), weight.to(dtype).requires_grad_(), target


def loss_of(budget_mb=64.0, smoothing=0.0, z_loss=0.0, entropy=False, **transform):
    return Loss(Transform(**transform), -100, smoothing, z_loss, entropy, smoothing > 0, budget_mb)


def weighted(module, leaves, target, c, loss, class_weight=None, *options):
    input, weight, bias = leaves
    out = module.WeightedLoss.apply(input, weight, bias, target, c, class_weight, None, loss, True, *options)
    return torch.autograd.grad(out[0], [x for x in leaves if x is not None]), out


def tokens(module, leaves, target, upstream, loss, class_weight=None, *options):
    """Gradients of sum_k upstream[k] . value[k] over (log_prob, entropy, lse, smooth)."""
    input, weight, bias = leaves
    out = module.TokenValues.apply(input, weight, bias, target, class_weight, None, loss, *options)
    total = sum((u * v).sum() for u, v in zip(upstream, out) if u is not None)
    return torch.autograd.grad(total, [x for x in leaves if x is not None]), out


def relative(ours, exact) -> float:
    return float((ours.double() - exact.double()).norm() / exact.double().norm().clamp(min=1e-300))


def truth(leaves, target, c, **kwargs):
    """(dH, dW) of sum c nll in float64."""
    doubles = [None if x is None else x.detach().double().requires_grad_() for x in leaves]
    return weighted(chunked, doubles, target, c.double(), loss_of(**kwargs))[0]


@pytest.fixture
def parts(monkeypatch):
    """Every outcome of `compress`, in order."""
    seen, inner = [], compressed.compress
    monkeypatch.setattr(compressed, "compress", lambda *args: seen.append(inner(*args)) or seen[-1])
    return seen


@pytest.fixture(params=("all columns", "a cluster per row"))
def lossless(request, monkeypatch):
    """Compression forced to where it loses nothing: all columns kept, or rank n. Returns how many chunks it served."""
    count = []

    def forced(engine, sketch, forward, rows, c, options, need_dh, need_dw):
        count.append(len(rows.target))
        eps, k = (0.0, 4) if request.param == "all columns" else (0.02, len(rows.target))
        return tail._Candidates(engine, sketch, forward.matrix, forward.mass, rows, c).part(eps, k, need_dh, need_dw)

    monkeypatch.setattr(compressed, "compress", forced)
    return count


TRANSFORMS = ({}, {"logit_scale": 0.7, "temperature": 1.3}, {"softcap": 6.0, "temperature": 0.8})


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("smoothing", (0.0, 0.1))
def test_nothing_lost_is_the_exact_weighted_loss(lossless, transform, smoothing):
    input, weight, target = peaked(70)
    bias = torch.linspace(-1, 1, V, dtype=torch.float64).requires_grad_()
    class_weight = torch.linspace(0.5, 1.5, V, dtype=torch.float64)
    target[3::7] = -100
    c = torch.linspace(-1, 1, 70, dtype=torch.float64)
    c[5::9] = 0
    args = ((input, weight, bias), target, c, loss_of(smoothing=smoothing, z_loss=0.01, entropy=True, **transform))
    exact, values = weighted(chunked, *args, class_weight)
    ours, ours_values = weighted(compressed, *args, class_weight, OPEN)
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    for a, b in zip(ours_values[:4], values[:4]):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)
    assert sum(lossless) == (0 if smoothing and "softcap" in transform else int(((c != 0) & (target != -100)).sum()))
    assert values[4].items() <= ours_values[4].items()


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize(
    "which", ((1, 0, 0, 0), (0, 1, 0, 0), (0, 0, 1, 0), (1, 0.3, 0.1, 0), (1, 0, 0, 0.01)), ids=str
)
def test_nothing_lost_is_the_exact_token_values(lossless, transform, which):
    input, weight, target = peaked(40)
    bias = torch.linspace(-1, 1, V, dtype=torch.float64).requires_grad_()
    target[1::9] = -100
    entropy = which[1] != 0
    loss = loss_of(smoothing=0.1 if which[3] else 0.0, entropy=entropy, **transform)
    upstream = [x * torch.linspace(0.5, 1, 40, dtype=torch.float64) if x else None for x in which]
    args = ((input, weight, bias), target, upstream, loss)
    exact, values = tokens(chunked, *args)
    ours, ours_values = tokens(compressed, *args, None, OPEN)
    for a, b in zip(ours, exact):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)
    for a, b in zip(ours_values[:4], values[:4]):
        if b is not None:
            torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-11)


@pytest.mark.parametrize("tiles", (False, True))
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("transform", ({}, {"softcap": 30.0, "logit_scale": 1.1, "temperature": 0.8}), ids=str)
def test_errors_stay_within_the_reported_ones(dtype, transform, tiles, parts, monkeypatch):
    if not tiles:
        monkeypatch.setattr(backend, "has_tiles", lambda device, dtype: False)
    input, weight, target = peaked(512, dtype)
    leaves, c = (input, weight, None), torch.ones(512)
    dh, dw = truth(leaves, target, c, **transform)
    for ours, stats in _both(leaves, target, c, loss_of(**transform)):
        assert stats["exact_chunks"] == 0 < stats["columns_kept"] < 0.75
        assert relative(ours[0], dh) <= stats["estimated_dh_error"] < 1e-2
        dropped = torch.ones(V, dtype=torch.bool)
        for part in parts:
            dropped[part.columns] = False
        errors = (ours[1].double() - dw).norm(dim=1) / dw.norm(dim=1)
        assert errors[dropped].median() <= stats["estimated_dw_row_error"] < 0.15
        assert errors[dropped].median() > 1e-3, "nothing was dropped: the test shows nothing"


def _both(leaves, target, c, loss, options=DEFAULT):
    """(gradients, stats) of both ops."""
    grads, out = weighted(compressed, leaves, target, c, loss, None, options)
    yield grads, out[4]
    grads, out = tokens(compressed, leaves, target, (-c,), loss, None, options)
    yield grads, out[4]


def test_an_entropy_gradient_stays_within_the_reported_error(parts):
    input, weight, target = peaked(512, torch.bfloat16)
    leaves = (input, weight, None)
    doubles = (input.detach().double().requires_grad_(), weight.detach().double().requires_grad_(), None)
    for a, e in ((0.0, 1.0), (1.0, 0.1), (1.0, -0.1)):
        upstream = (torch.full((512,), a), torch.full((512,), e))
        exact, _ = tokens(chunked, doubles, target, upstream, loss_of(entropy=True))
        ours, out = tokens(compressed, leaves, target, upstream, loss_of(entropy=True), None, Compression())
        print(a, e, relative(ours[0], exact[0]), out[4])
        assert relative(ours[0], exact[0]) <= max(out[4]["estimated_dh_error"], 5e-3) <= 1e-2
        kept = torch.cat([part.columns for part in parts if part is not None]).unique()
        dropped = torch.ones(V, dtype=torch.bool).index_fill_(0, kept, False)
        if not out[4]["exact_chunks"]:
            errors = (ours[1].double() - exact[1]).norm(dim=1) / exact[1].norm(dim=1)
            assert errors[dropped].median() <= out[4]["estimated_dw_row_error"]


@pytest.mark.parametrize("kind", ("random sign", "flat"))
def test_falls_back_where_the_tail_is_not_low_rank(kind):
    input, weight, target = peaked(512, torch.bfloat16, noise=0.3)
    c = torch.ones(512)
    if kind == "flat":
        input = (0.2 * input.detach()).requires_grad_()
    else:
        c = torch.randn(512, generator=torch.Generator().manual_seed(1))
    dh, dw = truth((input, weight, None), target, c)
    for ours, stats in _both((input, weight, None), target, c, loss_of()):
        assert stats["exact_chunks"] == 1
        assert relative(ours[0], dh) < 4e-3 and relative(ours[1], dw) < 4e-3


def test_estimates_cover_the_true_errors(parts):
    covered, total = [0, 0], 0
    for seed in range(14):
        generator = torch.Generator().manual_seed(100 + seed)
        noise = 0.05 + 0.4 * float(torch.rand((), generator=generator))
        input, weight, target = peaked(128 + 24 * seed, torch.float32, seed, topics=4 + seed % 5, noise=noise)
        for kind in ("ones", "random", "halves", "flat"):
            T = len(target)
            c = torch.randn(T, generator=generator) if kind == "random" else torch.ones(T)
            c[T // 2 :] *= -0.5 if kind == "halves" else 1.0
            h = (input.detach() * (0.2 if kind == "flat" else 1.0)).requires_grad_()
            leaves = (h, weight, None)
            dh, dw = truth(leaves, target, c)
            parts.clear()
            ours, _ = weighted(compressed, leaves, target, c, loss_of(), None, OPEN)
            if parts[0] is None:
                continue
            dropped = torch.ones(V, dtype=torch.bool).index_fill_(0, parts[0].columns, False)
            rows = ((ours[1].double() - dw).norm(dim=1) / dw.norm(dim=1))[dropped].median()
            covered[0] += relative(ours[0], dh) <= parts[0].dh_error
            covered[1] += rows <= parts[0].dw_error
            total += 1
    print("covered", covered, "of", total)
    assert total >= 40 and min(covered) >= 0.95 * total


@pytest.mark.parametrize("budget", (1.0, 64.0))
def test_a_recomputed_chunk_gives_what_a_kept_one_does(budget):
    input, weight, target = peaked(512, torch.bfloat16)
    leaves, c = (input, weight, None), torch.ones(512)
    dh, dw = truth(leaves, target, c)
    ours, out = tokens(compressed, leaves, target, (-c,), loss_of(budget), None, Compression(rank=256))
    stats = out[4]
    print(stats)
    assert stats["saved_mb"] <= budget
    assert (stats["recomputed_chunks"] > 0) == (budget == 1.0)
    assert relative(ours[0], dh) < 1e-2 and relative(ours[1], dw) < 1e-2


def test_uneven_and_sparse_upstreams_are_noticed():
    input, weight, target = peaked(512, torch.bfloat16, noise=0.3)
    generator = torch.Generator().manual_seed(5)
    sparse = (torch.rand(512, generator=generator) < 0.02).float()
    signs = torch.ones(512)
    signs[256:] = -1
    for name, c in (("uneven", 0.2 + torch.rand(512, generator=generator)), ("sparse", sparse), ("signs", signs)):
        dh, dw = truth((input, weight, None), target, c)
        ours, out = tokens(compressed, (input, weight, None), target, (-c,), loss_of(), None, Compression(rank=128))
        print(name, out[4])
        assert (out[4]["recomputed_chunks"] > 0) == (name != "uneven")
        assert relative(ours[0], dh) < 1e-2 and relative(ours[1], dw) < 2e-2
        assert ours[0][c == 0].eq(0).all()


def test_repeats_to_the_bit_and_leaves_what_it_saved_alone():
    input, weight, target = peaked(300, torch.bfloat16)
    for threads in (
        (1, 2) if backend.has_tiles("cpu", input.dtype) else (1,)
    ):  # BLAS adds in another order with other threads
        torch.set_num_threads(threads)
        try:
            first = [x[0] for x in _both((input, weight, None), target, torch.ones(300), loss_of())]
            out = compressed.TokenValues.apply(input, weight, None, target, None, None, loss_of(), Compression())
        finally:
            torch.set_num_threads(1)
        again = [x[0] for x in _both((input, weight, None), target, torch.ones(300), loss_of())]
        assert all(torch.equal(a, b) for x, y in zip(first, again) for a, b in zip(x, y)), f"{threads} threads"
        two = [torch.autograd.grad(out[0].sum(), (input, weight), retain_graph=True) for _ in range(2)]
        assert all(torch.equal(a, b) for a, b in zip(*two))
        assert all(torch.equal(-a, b) for a, b in zip(two[0], first[1]))
        total = compressed.WeightedLoss.apply(
            input, weight, None, target, torch.ones(300), None, None, loss_of(), True, Compression()
        )[0]
        one, half = (torch.autograd.grad(x * total, (input, weight), retain_graph=True) for x in (1.0, 0.5))
        assert all(torch.equal(0.5 * a, b) for a, b in zip(one, half))


def test_a_frozen_head_has_no_dw_and_needs_no_rows_of_it():
    input, weight, target = peaked(512, torch.bfloat16, noise=0.3)
    frozen = weight.detach()
    c = torch.ones(512)
    c[::2] = -1
    dh, _ = truth((input, weight, None), target, c)
    out = compressed.WeightedLoss.apply(input, frozen, None, target, c, None, None, loss_of(), True, Compression())
    (grad,) = torch.autograd.grad(out[0], (input,))
    assert out[4]["exact_chunks"] == 0 and out[4]["estimated_dw_row_error"] == 0
    assert relative(grad, dh) <= out[4]["estimated_dh_error"]
    out = compressed.TokenValues.apply(input, frozen, None, target, None, None, loss_of(), Compression())
    (grad,) = torch.autograd.grad((-c * out[0]).sum(), (input,))
    assert out[4]["recomputed_chunks"] == 0 and relative(grad, dh) <= out[4]["estimated_dh_error"]


def test_dw_is_added_to_a_buffer_of_the_caller():
    input, weight, target = peaked(300, torch.bfloat16)
    c = torch.ones(300)
    for ours, _ in _both((input, weight, None), target, c, loss_of()):
        exact = ours[1].float()
    for op in ("WeightedLoss", "TokenValues"):
        buffer = torch.ones(V, H)
        last = (c,) if op == "WeightedLoss" else ()
        flags = (True,) if op == "WeightedLoss" else ()
        out = getattr(compressed, op).apply(
            input, weight.detach(), None, target, *last, None, buffer, loss_of(), *flags, Compression()
        )
        (out[0] if last else -out[0]).sum().backward()
        assert relative(buffer - 1, exact) < 3e-3


@pytest.mark.parametrize("T", (0, 1, 2))
@pytest.mark.parametrize("ignored", (False, True))
def test_small_and_empty(T, ignored):
    input, weight, target = peaked(T, torch.float32)
    if ignored:
        target = torch.full_like(target, -100)
    c = torch.ones(T)
    dh, dw = truth((input, weight, None), target, c)
    for ours, stats in _both((input, weight, None), target, c, loss_of()):
        assert stats["rows"] == (0 if ignored else T)
        torch.testing.assert_close(ours[0].double(), dh, rtol=1e-2, atol=1e-5)
        assert ours[1].isfinite().all()
        assert ours[1].shape == dw.shape and (not ignored or ours[1].eq(0).all())


def test_double_backward_raises():
    input, weight, target = peaked(20, torch.float32)
    out = compressed.WeightedLoss.apply(
        input, weight, None, target, torch.ones(20), None, None, loss_of(), True, Compression()
    )
    values = compressed.TokenValues.apply(input, weight, None, target, None, None, loss_of(), Compression())
    for total in (out[0], values[0].sum()):
        with pytest.raises(RuntimeError, match="once"):
            torch.autograd.grad(total, input, create_graph=True)


def test_a_nan_row_reaches_no_other_row_of_dh():
    input, weight, target = peaked(300, torch.float32)
    broken = input.detach().clone()
    broken[7] = torch.nan
    out = compressed.WeightedLoss.apply(
        broken.requires_grad_(), weight, None, target, torch.ones(300), None, None, loss_of(), True, Compression()
    )
    (grad,) = torch.autograd.grad(out[0], (broken,))
    others = torch.arange(300) != 7
    assert grad[others].isfinite().all() and out[1][others].isfinite().all() and grad[7].isnan().any()


def test_no_gradient_no_work():
    input, weight, target = peaked(50, torch.bfloat16)
    out = compressed.WeightedLoss.apply(
        input, weight, None, target, torch.ones(50), None, None, loss_of(), False, Compression()
    )
    assert out[4]["columns_kept"] == out[4]["saved_mb"] == 0
    with torch.no_grad():
        values = compressed.TokenValues.apply(input, weight, None, target, None, None, loss_of(), Compression())
    assert values[4]["saved_mb"] == 0 and torch.equal(values[0], out[1])
    input, weight, target = peaked(600, torch.bfloat16)  # enough rows that a forward with gradients keeps something
    options = {"grad": "compressed", "target_error": 0.5}
    assert K.linear_log_prob(input, weight, target, **options).stats["saved_mb"] > 0
    with torch.no_grad():
        assert K.linear_log_prob(input, weight, target, **options).stats["saved_mb"] == 0


@pytest.mark.parametrize("bad", ({"eps": -1.0}, {"eps": 1.0}, {"rank": 0}, {"target_error": 0.0}), ids=str)
def test_options_out_of_range(bad):
    with pytest.raises(ValueError, match=next(iter(bad))):
        Compression(**bad)

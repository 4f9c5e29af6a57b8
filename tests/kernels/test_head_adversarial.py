"""Sizes, values and layouts that break heads elsewhere: every one against float64, on every engine there is here."""

from __future__ import annotations

import pytest
import torch

from longtrace import kernels as K
from longtrace.kernels import extension
from longtrace.kernels.head import backend, reference

ENGINES = ("tiles", "PyTorch")
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


@pytest.fixture(params=ENGINES)
def engine(request, monkeypatch):
    """Each test runs on the C++ tiles and on PyTorch alone."""
    if request.param == "PyTorch":
        monkeypatch.setattr(backend, "has_tiles", lambda device, dtype: False)
    elif not extension.LOADED:
        pytest.skip(extension.WHY)
    return request.param


def case(T, H, V, dtype, seed, spread=1.0):
    generator = torch.Generator().manual_seed(seed)
    input = torch.randn(T, H, generator=generator).to(dtype).requires_grad_()
    weight = (torch.randn(V, H, generator=generator) * spread / H**0.5).to(dtype).requires_grad_()
    target = torch.randint(0, V, (T,), generator=generator)
    return input, weight, target, torch.randn(T, generator=generator)


def check(input, weight, target, c, **options):
    """Values, and the gradients of both ops, against float64 and no worse than torch in the inputs' dtype."""
    exact_leaves = [t.detach().double().requires_grad_() for t in (input, weight)]
    bias = options.pop("linear_bias", None)
    log_p, entropy, lse = reference.log_prob(
        *exact_leaves, target, **options, **({} if bias is None else {"linear_bias": bias.double()})
    )
    truth = torch.autograd.grad(-(log_p * c.double()).sum(), exact_leaves)
    if bias is not None:
        options["linear_bias"] = bias.to(input.dtype)
    loss, rows = K.linear_weighted_nll(input, weight, target, c, entropy=True, **options)
    values = K.linear_log_prob(input, weight, target, entropy=True, **options)
    size = lse.abs().max().item() if lse.numel() else 0.0
    atol = 1e-5 + 4e-7 * size  # fp32 holds a logit of 1e4 to 1e-3
    live = (c != 0) & (target != -100)
    for got in (rows, values):
        torch.testing.assert_close(got.log_prob[live].double(), log_p[live].detach(), rtol=1e-5, atol=atol)
        torch.testing.assert_close(got.entropy[live].double(), entropy[live].detach(), rtol=1e-5, atol=2 * atol)
    # Rounding is relative to what is summed: |d loss / d logit| times |weight| or |input|.
    x, w = (t.detach().abs() for t in exact_leaves)
    final = reference.final_logits(*exact_leaves, **options | ({} if bias is None else {"linear_bias": bias.double()}))
    dz = final.detach().softmax(-1)
    dz[torch.arange(len(target)), target.where(target != -100, 0)] -= 1
    dz = dz.abs() * (c * live).double().abs()[:, None] / options.get("temperature", 1.0)
    unit = 2 * torch.finfo(input.dtype).eps + 4 * atol
    for value in (loss, -(values.log_prob * c).sum()):
        for ours, exact, summed in zip(torch.autograd.grad(value, (input, weight)), truth, (dz @ w, dz.T @ x)):
            assert ours.isfinite().all()
            assert ((ours.double() - exact).abs() <= unit * summed + 1e-7).all()


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("V", (1, 2, 31, 123, 128, 129))
@pytest.mark.parametrize("T", (0, 1, 2, 33))
def test_small_and_odd_sizes(engine, T, V, dtype, seed):
    for H in (1, 7, 16, 33):
        check(*case(T, H, V, dtype, seed))


@pytest.mark.parametrize("V", (129_920, 151_936))
def test_large_vocabularies(engine, V, seed):
    check(*case(3, 40, V, torch.bfloat16, seed, spread=3.0))


def test_one_more_row_than_a_long_trace(engine, seed):
    check(*case(15_361, 8, 37, torch.bfloat16, seed))


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("offset", (1e4, -1e4))
def test_an_offset_of_all_logits(engine, offset, dtype, seed):
    input, weight, target, c = case(40, 16, 300, dtype, seed)
    check(input, weight, target, c, linear_bias=torch.full((300,), offset))


def test_identical_logits(engine, seed):
    input, weight, target, c = case(20, 16, 700, torch.float32, seed)
    rows = K.linear_log_prob(input, torch.zeros_like(weight), target, entropy=True)
    expected = torch.tensor(700.0).log()
    torch.testing.assert_close(rows.log_prob, -expected.expand(20), rtol=1e-6, atol=0)
    torch.testing.assert_close(rows.entropy, expected.expand(20), rtol=1e-6, atol=0)
    check(input, weight[:1].detach().repeat(700, 1).requires_grad_(), target, c)


def test_temperature_of_a_hundredth(engine, seed):
    input, weight, target, c = case(40, 16, 300, torch.float32, seed)
    check(input, weight, target, c, temperature=0.01)


def test_one_impossible_class(engine, seed):
    input, weight, target, c = case(40, 16, 300, torch.float32, seed)
    bias = torch.zeros(300)
    bias[17] = float("-inf")
    target = target.where(target != 17, 18)
    rows = K.linear_log_prob(input, weight, target, linear_bias=bias, entropy=True)
    keep = torch.arange(300) != 17
    small = reference.log_prob(input.double(), weight[keep].double(), target - (target > 17).long())
    torch.testing.assert_close(rows.log_prob.double(), small[0].detach(), rtol=1e-5, atol=1e-5)
    loss, _ = K.linear_weighted_nll(input, weight, target, c, linear_bias=bias)
    d_input, d_weight = torch.autograd.grad(loss, (input, weight))
    assert d_input.isfinite().all() and d_weight.isfinite().all() and d_weight[17].eq(0).all()


def test_every_logit_far_above_its_neighbours(engine, seed):
    """A row whose largest logit is 500 above the target and above all that was seen before it."""
    input, weight, target, c = case(8, 16, 900, torch.float32, seed)
    bias = torch.zeros(900)
    bias[850] = 500.0
    target[:4] = 3
    check(input, weight, target, c, linear_bias=bias)


def test_masked_middles_and_ragged_micro_batches(engine, seed):
    input, weight, target, c = case(157, 24, 400, torch.float32, seed)
    target[40:90] = -100
    c[100:120] = 0
    check(input, weight, target, c)
    whole = torch.autograd.grad(K.linear_weighted_nll(input, weight, target, c)[0], (input, weight))
    total = 0
    for rows in (slice(0, 1), slice(1, 65), slice(65, 65), slice(65, 157)):
        total = total + K.linear_weighted_nll(input[rows], weight, target[rows], c[rows])[0]
    for a, b in zip(whole, torch.autograd.grad(total, (input, weight))):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-6)


def test_strided_weights_and_inputs(engine, seed):
    input, weight, target, c = case(30, 16, 200, torch.bfloat16, seed)
    expected, _ = K.linear_weighted_nll(input, weight, target, c)
    wide = torch.zeros(200, 24, dtype=torch.bfloat16)
    wide[:, 3:19] = weight.detach()
    for layout in (weight.detach().t().contiguous().t(), wide[:, 3:19], weight.detach().repeat_interleave(2, 0)[::2]):
        assert torch.equal(K.linear_weighted_nll(input.detach().t().contiguous().t(), layout, target, c)[0], expected)


def test_a_nan_row_stays_alone_in_bf16(engine, seed):
    input, weight, target, _ = case(70, 32, 500, torch.bfloat16, seed)
    clean, rows = K.linear_weighted_nll(input, weight, target, torch.ones(70))
    (clean_grad,) = torch.autograd.grad(clean, input)
    poisoned = input.detach().clone()
    poisoned[33] = float("nan")
    poisoned.requires_grad_()
    loss, bad = K.linear_weighted_nll(poisoned, weight, target, torch.ones(70))
    (grad,) = torch.autograd.grad(loss, poisoned)
    others = torch.arange(70) != 33
    assert bad.log_prob[33].isnan() and grad[33].isnan().all()
    assert torch.equal(bad.log_prob[others], rows.log_prob[others])
    assert torch.equal(grad[others], clean_grad[others])


def test_int32_targets_and_their_range(engine, seed):
    input, weight, target, c = case(9, 8, 20, torch.bfloat16, seed)
    narrow = K.linear_weighted_nll(input, weight, target.int(), c)[0]
    assert torch.equal(narrow, K.linear_weighted_nll(input, weight, target, c)[0])
    target[5] = -1
    with pytest.raises(ValueError, match=r"target\[5\] = -1; accepted: 0 <= target < 20 or ignore_index = -100"):
        K.linear_log_prob(input, weight, target)
    with pytest.raises(ValueError, match="float64"):
        K.linear_log_prob(input, weight.double(), target)


def test_coefficients_of_vanishing_size(engine, seed):
    """An importance weight of e^-96 is subnormal in fp32: its row may lose its gradient, never turn into NaN."""
    input, weight, target, _ = case(8, 16, 2000, torch.float32, seed, spread=20.0)
    c = torch.tensor([1e-42, 1.0, -1e-40, 0.0, 1e-45, 2.0, 1e-30, -1.0])
    loss, _ = K.linear_weighted_nll(input, weight, target, c)
    assert all(g.isfinite().all() for g in torch.autograd.grad(loss, (input, weight)))


def test_a_class_weight_of_zero(engine, seed):
    input, weight, target, _ = case(20, 16, 50, torch.float32, seed)
    class_weight = torch.rand(50)
    class_weight[target[:5]] = 0
    for options in ({}, {"label_smoothing": 0.1}, {"z_loss": 0.1}):
        ours = K.linear_cross_entropy(input, weight, target, weight=class_weight, **options)
        exact_leaves = [t.detach().double().requires_grad_() for t in (input, weight)]
        exact = reference.cross_entropy(*exact_leaves, target, weight=class_weight.double(), **options)
        for a, b in zip(torch.autograd.grad(ours, (input, weight)), torch.autograd.grad(exact, exact_leaves)):
            torch.testing.assert_close(a.double(), b, rtol=1e-4, atol=1e-6)


def test_weight_grad_must_fit(seed):
    input, weight, target, c = case(9, 8, 20, torch.float64, seed)
    with pytest.raises(
        ValueError, match=r"weight_grad is torch.float32 .* accepted: contiguous torch.float64 \(20, 8\)"
    ):
        K.linear_log_prob(input, weight, target, weight_grad=torch.zeros(20, 8))
    with pytest.raises(ValueError, match="contiguous"):
        K.linear_log_prob(input, weight, target, weight_grad=torch.zeros(8, 20, dtype=torch.float64).t())
    buffer = torch.zeros(20, 8, dtype=torch.float64)
    (K.linear_log_prob(input, weight, target, weight_grad=buffer).log_prob * c).sum().backward()
    log_p = reference.log_prob(input, weight, target)[0]
    torch.testing.assert_close(buffer, torch.autograd.grad((log_p * c).sum(), weight)[0], rtol=1e-9, atol=1e-12)

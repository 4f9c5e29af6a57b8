"""The head ops against the float64 reference: values, gradients, options, edges, numerics and isolation of rows."""

from __future__ import annotations

import importlib.util

import pytest
import torch
import torch.nn.functional as F

from longtrace import kernels as K
from longtrace.kernels import extension
from longtrace.kernels.head import epilogue, gemm, reference
from longtrace.kernels.head.backend import CPU_TILES, PYTORCH
from longtrace.kernels.head.plan import plan_chunks

DTYPES = (torch.bfloat16, torch.float16, torch.float32, torch.float64)
TRANSFORMS = ({}, {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3}, {"temperature": 0.5})
SHAPES = ((0, 8, 5), (1, 7, 1), (2, 9, 123), (70, 33, 123), (300, 65, 1000))


def make(T, H, V, dtype, seed=0, bias=True, spread=0.3):
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)  # noqa: E731
    input = draw(T, H).to(dtype).requires_grad_()
    weight = (draw(V, H) * spread).to(dtype).requires_grad_()
    offsets = draw(V).to(dtype).requires_grad_() if bias else None
    target = torch.randint(0, V, (T,), generator=generator)
    target[1::5] = -100
    coefficient = draw(T).to(torch.float32)
    coefficient[2::3] = 0
    return input, weight, offsets, target, coefficient


def double(*tensors):
    return [None if t is None else t.detach().double().requires_grad_() for t in tensors]


def worst(ours, exact) -> float:
    return max(((a.double() - b).abs().max().item() for a, b in zip(ours, exact) if b.numel()), default=0.0)


def no_worse(ours, exact, theirs, dtype) -> bool:
    """|ours - exact| <= |theirs - exact| in the Frobenius norm, up to chance.

    Both errors are sums of independent roundings; for n values their norms scatter by about 1/sqrt(n) of the rounding
    unit times the norm of what is rounded.
    """
    unit = torch.finfo(dtype).eps / 2
    chance = unit * exact.norm().item() * min(1.0, 32 / max(1, exact.numel()) ** 0.5)
    error, allowed = (ours.double() - exact).norm().item(), (theirs.double() - exact).norm().item()
    return error <= allowed + chance + (1e-12 if dtype == torch.float64 else 1e-6)


def eager_log_prob(input, weight, bias, target, **transform):
    """torch in the inputs' own dtype, with the usual upcast of the logits."""
    logits = reference.final_logits(input, weight, bias, **transform)
    log_p = F.log_softmax(logits.to(torch.float64 if input.dtype == torch.float64 else torch.float32), -1)
    valid = target != -100
    picked = log_p.gather(-1, target.where(valid, 0)[:, None]).squeeze(1) * valid
    return picked, torch.special.entr(log_p.exp()).sum(-1) * valid


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_torch_in_the_same_dtype(dtype, shape, transform):
    input, weight, bias, target, c = make(*shape, dtype)
    atol = 1e-12 if dtype == torch.float64 else 2e-6
    leaves = (input, weight, bias)
    exact_leaves = double(*leaves)
    log_p, entropy, lse = reference.log_prob(
        exact_leaves[0], exact_leaves[1], target, linear_bias=exact_leaves[2], **transform
    )
    exact = -(log_p * c.double()).sum()
    exact_grads = torch.autograd.grad(0.3 * exact, exact_leaves, retain_graph=True)
    eager, eager_entropy = eager_log_prob(*leaves, target, **transform)
    eager_loss = -(eager * c).sum()
    eager_grads = torch.autograd.grad(0.3 * eager_loss, leaves, retain_graph=True)

    loss, rows = K.linear_weighted_nll(input, weight, target, c, linear_bias=bias, entropy=True, **transform)
    grads = torch.autograd.grad(0.3 * loss, leaves)
    assert all(g.dtype == dtype for g in grads)
    assert loss.dtype == rows.log_prob.dtype == (torch.float64 if dtype == torch.float64 else torch.float32)
    live = (c != 0) & (target != -100)
    size = max(1.0, abs(exact.item()))
    assert abs(loss.item() - exact.item()) <= abs(eager_loss.item() - exact.item()) + atol * size
    for ours, truth, theirs in zip(grads, exact_grads, eager_grads):
        assert no_worse(ours, truth, theirs, dtype)
    assert worst([rows.log_prob[live]], [log_p[live]]) <= worst([eager[live]], [log_p[live]]) + atol
    assert worst([rows.entropy[live]], [entropy[live]]) <= worst([eager_entropy[live]], [entropy[live]]) + atol
    assert rows.log_prob[~live].eq(0).all()
    assert not rows.log_prob.requires_grad

    ours = K.linear_log_prob(input, weight, target, linear_bias=bias, entropy=True, **transform)
    assert worst(ours[:3], (log_p, entropy, lse)) <= worst((eager, eager_entropy), (log_p, entropy)) + 5 * atol
    e, f = torch.linspace(-1, 1, shape[0]), torch.linspace(1, 2, shape[0])
    truth = torch.autograd.grad((log_p * e + entropy * f).sum(), exact_leaves)
    theirs = torch.autograd.grad((eager * e + eager_entropy * f).sum(), leaves)
    grads = torch.autograd.grad((ours.log_prob * e + ours.entropy * f).sum(), leaves)
    for a, b, t in zip(grads, truth, theirs):
        assert no_worse(a, b, t, dtype)


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
@pytest.mark.parametrize("smoothing", (0.0, 0.2))
@pytest.mark.parametrize("weighted", (False, True))
def test_cross_entropy_is_torch_s(reduction, smoothing, weighted):
    input, weight, bias, target, _ = make(40, 16, 31, torch.float64)
    class_weight = torch.rand(31, dtype=torch.float64) if weighted else None
    kwargs = {"weight": class_weight, "reduction": reduction, "label_smoothing": smoothing}
    ours = K.linear_cross_entropy(input, weight, target, linear_bias=bias, **kwargs)
    theirs = F.cross_entropy(F.linear(input, weight, bias), target, **kwargs)
    torch.testing.assert_close(ours, theirs, rtol=1e-12, atol=1e-12)
    up = torch.linspace(0.5, 1.5, 40, dtype=torch.float64) if reduction == "none" else torch.tensor(0.7)
    for a, b in zip(*(torch.autograd.grad((x * up).sum(), (input, weight, bias)) for x in (ours, theirs))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("reduction", ("none", "mean", "sum"))
def test_z_loss_against_the_reference(reduction):
    input, weight, bias, target, _ = make(23, 11, 17, torch.float64)
    kwargs = {
        "reduction": reduction, "z_loss": 0.3, "label_smoothing": 0.1, "weight": torch.rand(17, dtype=torch.float64),
        "linear_bias": bias, "softcap": 3.0, "temperature": 0.8,
    }  # fmt: skip
    ours, exact = (f(input, weight, target, **kwargs) for f in (K.linear_cross_entropy, reference.cross_entropy))
    torch.testing.assert_close(ours, exact, rtol=1e-12, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), (input, weight, bias)) for x in (ours, exact))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


def test_gradcheck():
    input, weight, bias, target, c = make(5, 4, 6, torch.float64)
    assert torch.autograd.gradcheck(
        lambda x, w, b: K.linear_weighted_nll(x, w, target, c, linear_bias=b, softcap=2.0)[0], (input, weight, bias)
    )
    assert torch.autograd.gradcheck(
        lambda x, w, b: K.linear_log_prob(x, w, target, linear_bias=b, softcap=2.0, entropy=True)[:3],
        (input, weight, bias),
    )


def test_double_backward_raises_rather_than_passing_a_constant():
    input, weight, _, target, c = make(5, 4, 6, torch.float64)
    values = (
        K.linear_weighted_nll(input, weight, target, c)[0],
        K.linear_log_prob(input, weight, target).log_prob.sum(),
    )
    for value in values:
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(value, input, create_graph=True)


def test_backward_twice_and_upstream_scale():
    input, weight, _, target, c = make(9, 4, 6, torch.float32, bias=False)
    loss, _ = K.linear_weighted_nll(input, weight, target, c)
    first = torch.autograd.grad(loss, (input, weight), retain_graph=True)
    again = torch.autograd.grad(loss * 2.0, (input, weight))
    for a, b in zip(first, again):
        assert torch.equal(2 * a, b)


def test_frozen_weight_gets_no_buffer_and_no_grad_runs_forward_only():
    input, weight, _, target, c = make(9, 4, 6, torch.float32, bias=False)
    loss, _ = K.linear_weighted_nll(input, weight.detach(), target, c)
    assert [t is not None for t in loss.grad_fn.saved_tensors] == [True, False, False]
    with torch.no_grad():
        value, _ = K.linear_weighted_nll(input, weight, target, c)
    assert value.grad_fn is None
    assert torch.equal(value, loss.detach())


@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_all_ignored_is_zero_not_nan(dtype):
    input, weight, _, target, c = make(6, 4, 6, dtype, bias=False)
    target[:] = -100
    for value in (
        K.linear_cross_entropy(input, weight, target),
        K.linear_cross_entropy(input, weight, target, reduction="none").sum(),
        K.linear_weighted_nll(input, weight, target, c)[0],
    ):
        assert value.item() == 0
        for grad in torch.autograd.grad(value, (input, weight)):
            assert grad.eq(0).all()


@pytest.mark.parametrize("offset", (1e4, -1e4))
def test_a_common_offset_changes_nothing(offset):
    input, weight, _, target, _ = make(50, 16, 700, torch.float32, bias=False)
    bias = torch.full((700,), offset)
    ours = K.linear_log_prob(input, weight, target, linear_bias=bias, entropy=True)
    exact = reference.log_prob(input.double(), weight.double(), target, linear_bias=bias.double())
    eager = eager_log_prob(input, weight, bias, target)
    assert worst(ours[:2], exact[:2]) <= worst(eager, exact[:2]) + 2e-6


def test_minus_infinity_bias_removes_classes():
    input, weight, _, target, _ = make(30, 8, 40, torch.float32, bias=False)
    bias = torch.zeros(40)
    bias[10:30] = float("-inf")
    target = torch.where((target >= 10) & (target < 30), target % 10, target)
    ours = K.linear_log_prob(input, weight, target, linear_bias=bias, entropy=True)
    exact_leaves = double(input, weight)
    exact = reference.log_prob(*exact_leaves, target, linear_bias=bias.double())
    assert worst(ours[:3], exact) < 1e-5
    grads = torch.autograd.grad((ours.log_prob + ours.entropy).sum(), (input, weight))
    keep = torch.ones(40, dtype=torch.bool)
    keep[10:30] = False
    small = reference.log_prob(exact_leaves[0], exact_leaves[1][keep], torch.where(target >= 30, target - 20, target))
    truth = torch.autograd.grad((small[0] + small[1]).sum(), exact_leaves)
    assert worst(grads, truth) < 1e-5


def test_a_nan_row_stays_alone():
    input, weight, _, target, _ = make(40, 8, 300, torch.float32, bias=False)
    target[:] = 3
    c = torch.ones(40)
    clean, clean_rows = K.linear_weighted_nll(input, weight, target, c, entropy=True)
    (clean_grad,) = torch.autograd.grad(clean, input)
    poisoned = input.detach().clone()
    poisoned[7] = float("nan")
    poisoned.requires_grad_()
    loss, rows = K.linear_weighted_nll(poisoned, weight, target, c, entropy=True)
    (grad,) = torch.autograd.grad(loss, poisoned)
    others = torch.arange(40) != 7
    assert rows.log_prob[7].isnan() and grad[7].isnan().all() and loss.isnan()
    for a, b in ((rows.log_prob, clean_rows.log_prob), (rows.entropy, clean_rows.entropy), (grad, clean_grad)):
        assert torch.equal(a[others], b[others])


def test_non_contiguous_and_higher_rank_inputs():
    input, weight, _, target, c = make(12, 6, 20, torch.float32, bias=False)
    expected = K.linear_weighted_nll(input, weight, target, c)
    wide = torch.zeros(20, 12)
    wide[:, ::2] = weight.detach()
    transposed = input.detach().t().contiguous().t()
    loss, rows = K.linear_weighted_nll(transposed.view(3, 4, 6), wide[:, ::2], target.view(3, 4), c.view(3, 4))
    torch.testing.assert_close(loss, expected[0].detach())
    assert rows.log_prob.shape == (3, 4)
    torch.testing.assert_close(rows.log_prob.flatten(), expected[1].log_prob)


def test_tied_weight_collects_both_gradients():
    table = torch.randn(30, 8, dtype=torch.float64, requires_grad=True)
    ids = torch.arange(12)
    target = (ids + 1) % 30
    ours = K.linear_cross_entropy(F.embedding(ids, table).tanh(), table, target)
    theirs = F.cross_entropy(F.embedding(ids, table).tanh() @ table.T, target)
    torch.testing.assert_close(*(torch.autograd.grad(x, table)[0] for x in (ours, theirs)), rtol=1e-12, atol=1e-14)


@pytest.mark.parametrize("budget", (0.01, 0.2, 64))
def test_budget_changes_nothing_but_rounding(budget):
    input, weight, bias, target, c = make(700, 24, 333, torch.float64)
    one = K.linear_weighted_nll(input, weight, target, c, linear_bias=bias, budget_mb=budget)
    two = K.linear_weighted_nll(input, weight, target, c, linear_bias=bias)
    torch.testing.assert_close(one[0], two[0], rtol=1e-13, atol=1e-13)
    for a, b in zip(*(torch.autograd.grad(x[0], (input, weight, bias)) for x in (one, two))):
        torch.testing.assert_close(a, b, rtol=1e-11, atol=1e-13)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32, torch.float64), ids=str)
@pytest.mark.parametrize("shape", ((64, 2048), (65, 123), (896, 4096)), ids=str)
def test_a_row_does_not_depend_on_its_neighbours_bitwise(dtype, shape):
    H, V = shape
    input, weight, _, target, _ = make(64, H, V, dtype, bias=False, spread=0.05)
    target[:] = 1
    c = torch.ones(64)
    budget = 1.5  # several chunks
    loss, packed = K.linear_weighted_nll(input, weight, target, c, entropy=True, budget_mb=budget)
    (packed_grad,) = torch.autograd.grad(loss, input)
    for rows in ([0], [63], [5, 40], list(range(20, 50))):
        part = input.detach()[rows].requires_grad_()
        loss, alone = K.linear_weighted_nll(part, weight, target[rows], c[rows], entropy=True, budget_mb=budget)
        (grad,) = torch.autograd.grad(loss, part)
        assert torch.equal(alone.log_prob, packed.log_prob[rows])
        assert torch.equal(alone.entropy, packed.entropy[rows])
        assert torch.equal(grad, packed_grad[rows])


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_bitwise_repeatable_and_for_any_number_of_threads(dtype):
    input, weight, _, target, c = make(300, 64, 3000, dtype, bias=False, spread=0.05)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 1, 2):
            torch.set_num_threads(threads)
            loss, rows = K.linear_weighted_nll(input, weight, target, c, budget_mb=1.5)
            saved = [t for t in loss.grad_fn.saved_tensors if t is not None]  # fp32, before any rounding to bf16
            values = K.linear_log_prob(input, weight, target, entropy=True, budget_mb=1.5)
            later = torch.autograd.grad((values.log_prob * c + values.entropy).sum(), (weight, input))
            results.append((loss.detach(), rows.log_prob, *saved, *later))
    finally:
        torch.set_num_threads(before)
    assert all(torch.equal(a, b) for a, b in zip(results[0], results[1]))
    if extension.LOADED:
        assert all(torch.equal(a, b) for a, b in zip(results[0], results[2]))


def test_rows_without_weight_leave_before_the_gemm():
    input, weight, _, target, c = make(60, 8, 30, torch.float32, bias=False)
    live = (c != 0) & (target != -100)
    loss, rows = K.linear_weighted_nll(input, weight, target, c)
    assert rows.stats["rows"] == int(live.sum()) and rows.stats["total"] == 60
    dense = input.detach()[live].requires_grad_()
    again, _ = K.linear_weighted_nll(dense, weight, target[live], c[live])
    assert torch.equal(loss.detach(), again.detach())
    (grad,) = torch.autograd.grad(loss, input)
    assert grad[~live].eq(0).all()
    assert torch.equal(grad[live], torch.autograd.grad(again, dense)[0])


def test_bad_input_is_named():
    input, weight, bias, target, c = make(6, 4, 9, torch.float32)
    bad = target.clone()
    bad[4] = 9
    cases = [
        (dict(target=bad), r"target\[4\] = 9; accepted: 0 <= target < 9"),
        (dict(linear_weight=weight.bfloat16()), "bfloat16"),
        (dict(linear_weight=weight[:, :3]), "do not fit"),
        (dict(target=target[:5]), "target has shape"),
        (dict(coefficient=c[:5]), "coefficient has shape"),
        (dict(coefficient=c.clone().requires_grad_()), "requires grad"),
        (dict(linear_bias=bias[:3]), "linear_bias has shape"),
        (dict(temperature=0.0), "temperature"),
        (dict(softcap=-1.0), "softcap"),
        (dict(grad="fast"), "accepted: 'exact', 'compressed'"),
        (dict(eps=2.0), "eps"),
        (dict(rank=0), "rank"),
        (dict(target_error=-1.0), "target_error"),
        (dict(budget_mb=0), "budget_mb"),
    ]
    for change, message in cases:
        kwargs = dict(input=input, linear_weight=weight, target=target, coefficient=c) | change
        with pytest.raises(ValueError, match=message):
            K.linear_weighted_nll(**kwargs)
    with pytest.raises(ValueError, match="reduction"):
        K.linear_cross_entropy(input, weight, target, reduction="avg")


def test_autocast_casts_as_linear_does():
    input, weight, _, target, c = make(20, 8, 30, torch.float32, bias=False)
    plain, _ = K.linear_weighted_nll(input.bfloat16(), weight.bfloat16(), target, c)
    with torch.autocast("cpu", torch.bfloat16):
        cast, _ = K.linear_weighted_nll(input, weight, target, c)
    assert torch.equal(plain, cast)
    assert [g.dtype for g in torch.autograd.grad(cast, (input, weight))] == [torch.float32] * 2


def test_bf16_logits_are_exact_sums_and_the_setting_never_leaks(monkeypatch, force):
    matmul = torch.backends.mkldnn.matmul
    before = matmul.fp32_precision
    input, weight, _, target, _ = make(64, 96, 500, torch.bfloat16, bias=False)
    log_p = K.linear_log_prob(input, weight, target).log_prob
    exact = reference.log_prob(input.double(), weight.double(), target)[0]
    assert worst([log_p], [exact]) < 5e-6  # bf16 logits would be off by 1e-2
    assert matmul.fp32_precision == before

    def explode(*args, **kwargs):
        assert matmul.fp32_precision == "bf16"
        raise KeyboardInterrupt

    force("reference")
    log_p = K.linear_log_prob(input, weight, target).log_prob
    assert worst([log_p], [exact]) < 5e-6
    monkeypatch.setattr(gemm.torch, "mm", explode)
    with pytest.raises(KeyboardInterrupt):
        K.linear_log_prob(input, weight, target)
    assert matmul.fp32_precision == before


def test_fp32_stays_fp32():
    input, weight, _, target, _ = make(64, 96, 500, torch.float32, bias=False)
    log_p = K.linear_log_prob(input, weight, target).log_prob
    assert worst([log_p], [reference.log_prob(input.double(), weight.double(), target)[0]]) < 5e-6


def test_plan_follows_the_budget_and_not_the_rows(monkeypatch):
    plan = lambda *args, **kwargs: plan_chunks(*args, engine=PYTORCH, **kwargs)  # noqa: E731
    assert plan(10**6, 576, 49152, torch.bfloat16, 512).rows == 1024  # longer chunks would not pay
    assert plan(10**6, 576, 49152, torch.float64, 256).rows == 512
    on_cuda = [plan_chunks(10**6, 576, 49152, x, 256, device="cuda").rows for x in (torch.float32, torch.float16)]
    if importlib.util.find_spec("triton"):
        assert on_cuda == [1024, 768]  # 4 bytes a logit, and 4 with 2 of its gradient
        found = plan_chunks(15_360, 1536, 151_936, torch.bfloat16, device="cuda")
        assert (found.rows, found.block) == (5120, 2560) and found.buffer_bytes == 2 * 5120 * 151_936
    else:
        assert on_cuda == [512, 256]
    assert {plan(T, 576, 49152, torch.bfloat16, 256).block for T in (1, 300, 10**5)} == {256}
    assert plan(10, 576, 151_936, torch.bfloat16, 16).rows == 16
    tiles = plan_chunks(10**6, 576, 151_936, torch.float32, 64, engine=CPU_TILES)
    assert (tiles.rows, tiles.block) == (96, 32) and tiles.buffer_bytes <= 64 * 2**20
    assert str(tiles) == "96 rows a chunk, 56 MB of probabilities, dW traffic about 37.5% of the GEMMs"
    assert plan_chunks(0, 8, 0, torch.float32).rows >= 1
    monkeypatch.setenv("LONGTRACE_HEAD_BUDGET_MB", "64")
    assert plan(10**6, 576, 49152, torch.bfloat16).rows == 256
    monkeypatch.setenv("LONGTRACE_HEAD_BUDGET_MB", "lots")
    with pytest.raises(ValueError, match="LONGTRACE_HEAD_BUDGET_MB: found 'lots'"):
        plan_chunks(1, 1, 1, torch.float32)


def test_plain_pytorch_passes_match_too():
    logits = torch.randn(9, 203, dtype=torch.float64, generator=torch.Generator().manual_seed(3))
    logits[2, 5] = float("-inf")
    logits.requires_grad_()
    target = torch.arange(9)
    a, e = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(4))
    log_p = torch.log_softmax(logits, 1)
    entropy = torch.special.entr(log_p.exp()).sum(1)
    stats = epilogue.softmax_stats(logits.detach(), target, True)
    torch.testing.assert_close(stats.log_prob, log_p.gather(1, target[:, None]).squeeze(1).detach())
    torch.testing.assert_close(stats.entropy, entropy.detach())
    out = logits.detach().clone()
    epilogue.gradient_(out, stats, a, e)
    truth = a[:, None] * log_p.exp() + e[:, None] * (torch.special.entr(log_p.exp()) - log_p.exp() * entropy[:, None])
    torch.testing.assert_close(out, truth.detach())


@pytest.mark.parametrize("transform", TRANSFORMS, ids=str)
@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
def test_both_engines_agree(dtype, transform, force):
    if not extension.LOADED:
        pytest.skip(extension.WHY)
    input, weight, bias, target, c = make(70, 33, 700, dtype)
    options = dict(linear_bias=bias, label_smoothing=0.1, z_loss=1e-3, weight=torch.rand(700), **transform)
    results = []
    for backend in (None, "reference"):
        force(backend)
        loss = K.linear_cross_entropy(input, weight, target, **options)
        rows = K.linear_log_prob(input, weight, target, linear_bias=bias, entropy=True, **transform)
        later = (rows.log_prob * c + rows.entropy).sum()
        grads = [*torch.autograd.grad(loss, (input, weight, bias)), *torch.autograd.grad(later, (input, weight, bias))]
        results.append([loss, rows.log_prob, rows.entropy, rows.lse, *grads])
    for a, b in zip(*results):
        assert (a - b).double().norm() <= 3 * torch.finfo(a.dtype).eps * b.double().norm() + 2e-5 * b.numel() ** 0.5 * (
            a.dtype == torch.float32 and dtype == torch.bfloat16
        ) + 1e-5


def test_weight_grad_collects_in_fp32_across_micro_batches():
    input, weight, _, target, c = make(60, 16, 90, torch.bfloat16, bias=False)
    whole = torch.zeros(90, 16)
    K.linear_weighted_nll(input, weight, target, c, weight_grad=whole)[0].backward()
    assert weight.grad is None
    parts = torch.zeros(90, 16)
    for rows in (slice(0, 7), slice(7, 41), slice(41, 60)):
        (0.5 * K.linear_weighted_nll(input[rows], weight, target[rows], c[rows], weight_grad=parts)[0]).backward()
        values = K.linear_log_prob(input[rows], weight, target[rows], weight_grad=parts).log_prob
        (-0.5 * (values * c[rows]).sum()).backward()
    exact_leaves = double(input, weight)
    log_p = reference.log_prob(*exact_leaves, target)[0]
    (exact,) = torch.autograd.grad(-(log_p * c.double()).sum(), exact_leaves[1:])
    (eager,) = torch.autograd.grad(-(eager_log_prob(input, weight, None, target)[0] * c).sum(), weight)
    for ours in (whole, parts):
        assert (ours - exact).norm() <= (eager.double() - exact).norm()
    assert (whole.bfloat16() - whole).norm() > 0  # it is not a rounded sum
    with pytest.raises(ValueError, match="weight_grad"):
        K.linear_weighted_nll(input, weight, target, c, weight_grad=whole[:, :4])


def test_a_confident_target_keeps_its_gradient():
    """p - 1 of a target with p = 1 - 1e-7 survives bf16, where p itself rounds to 1."""
    weight = torch.zeros(40, 8, dtype=torch.bfloat16)
    weight[3, 0], weight[5, 1] = 1, 1
    input = torch.zeros(1, 8, dtype=torch.bfloat16)
    input[0, 0] = 20.0
    input.requires_grad_()
    loss, rows = K.linear_weighted_nll(input, weight, torch.tensor([3]), torch.ones(1))
    (grad,) = torch.autograd.grad(loss, input)
    exact = reference.log_prob(input.double(), weight.double(), torch.tensor([3]))[0]
    assert abs(rows.log_prob.item() / exact.item() - 1) < 1e-5
    (truth,) = torch.autograd.grad(-exact.sum(), input)
    torch.testing.assert_close(grad, truth.to(grad.dtype), rtol=1e-2, atol=0)


def test_finite_differences():
    """Entropy, softcap, z_loss and smoothing gradients against central differences in float64."""
    input, weight, bias, target, _ = make(6, 5, 9, torch.float64)
    options = dict(softcap=3.0, logit_scale=0.8, temperature=1.2)
    losses = (
        lambda x, w, b: K.linear_log_prob(x, w, target, linear_bias=b, entropy=True, **options).entropy.square().sum(),
        lambda x, w, b: K.linear_cross_entropy(x, w, target, linear_bias=b, z_loss=0.2, **options),
        lambda x, w, b: K.linear_cross_entropy(x, w, target, linear_bias=b, label_smoothing=0.3, **options),
        lambda x, w, b: K.linear_cross_entropy(x, w, target, linear_bias=b, label_smoothing=0.3, z_loss=0.1),
        lambda x, w, b: K.linear_cross_entropy(
            x, w, target, linear_bias=b, label_smoothing=0.3, reduction="none"
        ).sum(),
    )
    leaves = (input, weight, bias)
    for loss in losses:
        grads = torch.autograd.grad(loss(*leaves), leaves)
        for k, leaf in enumerate(leaves):
            for flat in range(0, leaf.numel(), 7):
                step = torch.zeros_like(leaf).view(-1)
                step[flat] = 1e-5
                moved = [[x + s * step.view_as(x) if i == k else x for i, x in enumerate(leaves)] for s in (1, -1)]
                slope = (loss(*moved[0]) - loss(*moved[1])) / 2e-5
                assert abs(slope - grads[k].view(-1)[flat]) <= 1e-8 + 1e-7 * abs(slope)

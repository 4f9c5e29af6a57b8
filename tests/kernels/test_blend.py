"""The gradient blend: values and statistics against float64, in place, in one pass; layouts, mixed dtypes, refusals."""

from __future__ import annotations

import itertools
import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from longtrace import kernels as K
from longtrace.kernels import extension
from longtrace.kernels.blend import dispatch, reference

SHAPES = (
    (),
    (0,),
    (1,),
    (7,),
    (3, 5),
    (16, 2),
    (63,),
    (64,),
    (65,),
    (4, 0, 3),
    (129, 127),
    (16384,),
    (16385,),
    (3, 20001),
)
DTYPES = (torch.float32, torch.bfloat16)
PAIRS = list(itertools.product(DTYPES, DTYPES))
LENGTHS = range(1, 132)  # whole vectors of every instruction set, and all that may be left over
built = pytest.mark.skipif(not extension.LOADED, reason=extension.WHY)


@pytest.fixture(params=["here", "reference"])
def backend(request, force):
    if request.param == "reference":
        force("reference")
    return request.param


def draw(dtypes=DTYPES):
    """Pairs of every shape, each list's dtypes in turn, so that all combinations come up."""
    trace = [torch.randn(s).to(dtypes[i % len(dtypes)]) for i, s in enumerate(SHAPES)]
    empty = [torch.randn(s).to(dtypes[i // 2 % len(dtypes)]) for i, s in enumerate(SHAPES)]
    return trace, empty


def exactly(trace, empty, alpha):
    """(blend, sums) in float64."""
    wide = [t.to(torch.float64, copy=True) for t in trace]
    return wide, reference.blend_gradients_(wide, [e.double() for e in empty], alpha)


@pytest.mark.parametrize("alpha", (0.5, 0.3, 1.0, 0.0, -0.25, 1.5))
@pytest.mark.parametrize("dtypes", (DTYPES, (torch.float32,), (torch.bfloat16,)), ids=str)
def test_values_and_statistics_against_float64(seed, backend, dtypes, alpha):
    trace, empty = draw(dtypes)
    before, kept = [t.clone() for t in trace], [e.clone() for e in empty]
    exact, sums = exactly(trace, empty, alpha)
    stats = K.blend_gradients(trace, empty, alpha)
    for ours, truth, t, e in zip(trace, exact, before, kept):
        size = abs(alpha) * t.double().abs() + abs(1 - alpha) * e.double().abs()
        own = 2**-8 * truth.abs() if t.dtype == torch.bfloat16 else 0.0
        assert ((ours - truth).abs() <= 1.01 * own + 2**-22 * size).all()
    assert all(torch.equal(a, b) for a, b in zip(empty, kept))
    sizes = torch.stack(
        [
            exactly([x.abs() for x in a], [x.abs() for x in b], 0)[1][2]
            for a, b in ((before, before), (kept, kept), (before, kept))
        ]
    )
    assert ((torch.stack(stats[:3]) - sums[:3]).abs() <= 1e-6 * sizes).all()
    assert all(s.dtype == torch.float64 and s.ndim == 0 for s in stats[:3])
    assert stats.finite.dtype == torch.bool and stats.finite


@pytest.mark.parametrize("alpha", (0.3, 0.9, -0.25))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_no_worse_than_two_products_and_a_sum_in_fp32(seed, backend, dtype, alpha):
    trace, empty = [torch.randn(70_000).to(dtype)], [torch.randn(70_000).to(dtype)]
    exact, sums = exactly(trace, empty, alpha)
    a, b = alpha * trace[0].double().abs(), (1 - alpha) * empty[0].double().abs()
    # each product is rounded, and its coefficient was (2^-24 each), then the sum; a fused multiply-add spares one
    bound = 2**-24 * (2 * (a.abs() + b.abs()) + exact[0].abs()) * 1.0001
    bound += 2**-8 * exact[0].abs() * 1.0001 + 2**-8 * bound if dtype == torch.bfloat16 else 0.0
    plain = (alpha * trace[0].float() + (1 - alpha) * empty[0].float()).to(dtype)  # in three ops: nothing is fused
    dot = (trace[0] * empty[0]).sum()
    stats = K.blend_gradients(trace, empty, alpha)
    assert ((trace[0] - exact[0]).abs() <= bound).all()
    assert (trace[0] - exact[0]).norm() <= (plain - exact[0]).norm() * (1 + 1e-3)
    assert abs(stats.dot - sums[2]) <= abs(dot - sums[2]) + 1e-6 * sums[0]


def test_the_ends_are_exact(seed, backend):
    trace, empty = draw()
    before = [t.clone() for t in trace]
    K.blend_gradients(trace, empty, 1.0)
    assert all(torch.equal(a, b) for a, b in zip(trace, before))
    K.blend_gradients(trace, empty, 0.0)
    assert all(torch.equal(a, b.to(a.dtype)) for a, b in zip(trace, empty))


@pytest.mark.parametrize("alpha", (1.0, 0.0))
def test_the_other_end_shows_in_zeros_and_where_it_is_not_finite(backend, alpha):
    kept, other = torch.tensor([-0.0, 1.0, 2.0]), torch.tensor([1.0, torch.inf, torch.nan])
    trace, empty = (kept, other) if alpha else (other, kept)
    assert not K.blend_gradients([trace], [empty], alpha).finite
    assert trace[0] == 0 and trace[1:].isnan().all()


def test_equals_the_gradient_of_the_weighted_loss(seed):
    model = torch.nn.Sequential(torch.nn.Linear(9, 20), torch.nn.Tanh(), torch.nn.Linear(20, 3))
    paths = [(torch.randn(12, 9), torch.randint(0, 3, (12,))) for _ in range(2)]
    losses = [F.cross_entropy(model(x), y) for x, y in paths]
    together = torch.autograd.grad(0.3 * losses[0] + 0.7 * losses[1], list(model.parameters()), retain_graph=True)
    trace, empty = (list(torch.autograd.grad(loss, list(model.parameters()))) for loss in losses)
    K.blend_gradients(trace, empty, 0.3)
    for a, b in zip(trace, together):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7)


@pytest.mark.parametrize("value", (torch.nan, torch.inf, -torch.inf))
@pytest.mark.parametrize("which", (0, 1))
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_what_is_not_finite_is_reported(seed, backend, which, dtype, value):
    lists = [torch.randn(5).to(dtype), torch.randn(40_000).to(dtype)], [torch.randn(5), torch.randn(40_000)]
    lists[which][1][33_333] = value
    exact, _ = exactly(*lists, 0.5)
    stats = K.blend_gradients(*lists, 0.5)
    assert not stats.finite
    assert all(torch.equal(a.isfinite(), b.isfinite()) for a, b in zip(lists[0], exact))


def test_squares_may_overflow_while_the_gradients_are_finite(backend):
    stats = K.blend_gradients([torch.full((100,), 1e30)], [torch.ones(100)], 0.5)
    assert stats.finite and stats.trace_sq.isinf() and stats.empty_sq == 100
    signs = torch.tensor([1.0, -1.0]).repeat(50)
    stats = K.blend_gradients([torch.full((100,), 1e30)], [1e30 * signs], 0.5)
    assert stats.finite and stats.dot.isnan()


def patterns(dtype):
    """65,536 values: every bf16 there is, or fp32 of any kind whose halves are exact, NaNs of full mantissas first."""
    if dtype == torch.bfloat16:
        return (torch.randperm(2**16) - 2**15).short().view(dtype)
    bits = torch.randint(-(2**31), 2**31, (2**16,)).int() & -4
    bits[:4] = torch.tensor([2**31 - 1, -1, 0x7F800001, 0x7FFF8000])
    return bits.view(dtype)


@pytest.mark.parametrize("trace_dtype, empty_dtype", PAIRS, ids=str)
def test_lanes_round_any_value_once(seed, backend, trace_dtype, empty_dtype):
    trace, empty = patterns(trace_dtype), patterns(empty_dtype)
    expected = (0.5 * trace.float() + 0.5 * empty.float()).to(trace_dtype)  # halves are exact, subnormal or not
    assert not K.blend_gradients([trace], [empty], 0.5).finite
    assert torch.equal(trace.isnan(), expected.isnan())
    bits = torch.int32 if trace_dtype == torch.float32 else torch.int16
    numbers = ~expected.isnan()
    assert torch.equal(trace.view(bits)[numbers], expected.view(bits)[numbers])  # and the signs of zeros


@pytest.mark.parametrize("trace_dtype, empty_dtype", PAIRS, ids=str)
def test_lanes_of_any_length(seed, backend, trace_dtype, empty_dtype):
    for n in LENGTHS:
        trace, empty = torch.randn(n + 70).to(trace_dtype), torch.randn(n + 70).to(empty_dtype)
        (exact,), sums = exactly([trace[:n]], [empty[:n]], 0.5)
        expected = torch.cat((exact.to(trace_dtype), trace[n:]))  # what lies behind stays
        stats = K.blend_gradients([trace[:n]], [empty[:n]], 0.5)
        torch.testing.assert_close(trace, expected, rtol=torch.finfo(trace_dtype).eps, atol=1e-7)
        assert torch.equal(trace[n:], expected[n:]) and stats.finite
        assert ((torch.stack(stats[:3]) - sums[:3]).abs() <= 1e-6 * sums[:2].max()).all()


@pytest.mark.parametrize("trace_dtype, empty_dtype", PAIRS, ids=str)
def test_lanes_see_what_is_not_finite_at_any_place(backend, trace_dtype, empty_dtype):
    n = LENGTHS[-1]
    for place, which, value in itertools.product(range(n), (0, 1), (torch.nan, torch.inf, -torch.inf)):
        lists = [torch.ones(n, dtype=trace_dtype)], [torch.ones(n, dtype=empty_dtype)]
        lists[which][0][place] = value
        stats = K.blend_gradients(*lists, 0.0 if place % 2 else 0.5)  # 0 * inf is NaN
        assert not stats.finite
        assert (~lists[0][0].isfinite()).nonzero().flatten().tolist() == [place]


@pytest.mark.parametrize("trace_dtype, empty_dtype", PAIRS, ids=str)
def test_lanes_take_large_values_as_finite(backend, trace_dtype, empty_dtype):
    n = LENGTHS[-1]
    for place, sign in itertools.product(range(n), (1, -1)):
        trace, empty = torch.ones(n, dtype=trace_dtype), torch.ones(n, dtype=empty_dtype)
        trace[place], empty[place] = 3e38, sign * 3e38
        stats = K.blend_gradients([trace], [empty], 0.5)
        assert stats.finite and [float(x) for x in stats[:3]] == [torch.inf, torch.inf, sign * torch.inf]


@built
@pytest.mark.parametrize("alpha", (0.9, 0.1))
def test_lanes_round_the_smaller_product_alone(seed, alpha):
    if torch.ops.longtrace.cpu_capability() == "baseline":
        pytest.skip("which product is rounded, if one is not, is the compiler's choice")
    trace, empty = torch.randn(70_000), torch.randn(70_000)
    large, small = (trace, empty) if alpha > 0.5 else (empty, trace)
    of_large, of_small = torch.tensor([max(alpha, 1 - alpha), min(alpha, 1 - alpha)])
    expected = (of_large.double() * large.double() + (of_small * small).double()).float()
    K.blend_gradients([trace], [empty], alpha)
    assert (trace != expected).sum() <= 1  # float64 may round a tie into being


@pytest.mark.slow
@built
@pytest.mark.parametrize("capability", ("baseline", "avx2", "avx512"))
def test_narrower_instruction_sets(capability):
    pick = ["--import-mode=importlib", "-p", "no:cacheprovider", "-k", "(lanes or float64) and not reference"]
    done = subprocess.run(
        [sys.executable, "-m", "pytest", *pick, __file__],
        capture_output=True,
        text=True,
        env=os.environ | {"LONGTRACE_CPU_CAPABILITY": capability},
    )
    assert done.returncode == 0, done.stdout[-4000:]  # 5 where nothing was picked


@pytest.mark.parametrize("dtype", (torch.float16, torch.float64), ids=str)
def test_other_dtypes(seed, dtype):
    trace, empty = draw((dtype, torch.float32))
    assert dispatch.choose("cpu", {dtype, torch.float32}).backend == "reference"
    exact, sums = exactly(trace, empty, 0.4)
    stats = K.blend_gradients(trace, empty, 0.4)
    for ours, truth in zip(trace, exact):
        rtol = torch.finfo(ours.dtype).eps
        torch.testing.assert_close(ours.double(), truth, rtol=rtol, atol=rtol)
    torch.testing.assert_close(torch.stack(stats[:3]), sums[:3], rtol=1e-5, atol=1e-5)


def test_empty_lists_and_empty_tensors(backend):
    for lists in (([], []), ([torch.empty(0)], [torch.empty(0, dtype=torch.bfloat16)])):
        stats = K.blend_gradients(*lists, 0.5)
        assert [float(x) for x in stats] == [0, 0, 0, 1]


def test_what_does_not_fit_is_named_before_anything_is_written(seed, backend):
    one, two = torch.ones(4, 6), torch.ones(4, 6)
    negated = torch.tensor([1 + 2j]).conj().imag
    kinds = "a tensor in bf16, fp16, fp32 or fp64"
    cases = [
        ([one], [two, two], 0.5, "equally many, got 1 and 2"),
        ([one, one], [two, torch.ones(6, 4)], 0.5, r"empty_grads\[1\] is \(6, 4\), but trace_grads\[1\] is \(4, 6\)"),
        ([one, torch.ones(6, 4).T], [two, two], 0.5, r"trace_grads\[1\] must be contiguous, got strides \(1, 4\)"),
        (
            [one],
            [torch.ones(4, 6, dtype=torch.int64)],
            0.5,
            rf"empty_grads\[0\] must be {kinds}, got torch.int64",
        ),
        ([one, None], [two, two], 0.5, rf"trace_grads\[1\] must be {kinds}, got NoneType"),
        ([one.to(torch.float8_e4m3fn)], [two], 0.5, rf"trace_grads\[0\] must be {kinds}, got torch.float8_e4m3fn"),
        ([one, one[0, :1]], [two, negated], 0.5, r"empty_grads\[1\] is a negated view: pass its resolve_neg"),
        ([one], [torch.ones(4, 6, device="meta")], 0.5, r"empty_grads\[0\] is on meta, but trace_grads\[0\] is on cpu"),
        ([one], [two], float("nan"), "alpha must be a finite fp32 number, got nan"),
        ([one], [two], -float("inf"), "alpha must be a finite fp32 number, got -inf"),
        ([one], [two], 1e300, r"alpha must be a finite fp32 number, got 1e\+300"),
    ]
    for trace, empty, alpha, message in cases:
        with pytest.raises(ValueError, match=message):
            K.blend_gradients(trace, empty, alpha)
        assert one.eq(1).all()


def test_shared_memory_is_named_before_anything_is_written(backend):
    memory, other = torch.arange(12.0), torch.ones(12)
    a, b, c = memory[:4], memory[4:8], memory[8:]
    cases = [
        ([a, a], [other[:4], other[4:8]], "trace", 0, "trace", 1),
        ([b, memory[2:6]], [other[:4], other[4:8]], "trace", 1, "trace", 0),
        ([memory, c], [other, other[:4]], "trace", 0, "trace", 1),
        ([memory[1:]], [memory[:-1]], "empty", 0, "trace", 0),
        ([memory[:-1]], [memory[1:]], "trace", 0, "empty", 0),
        ([a], [a.view(torch.bfloat16)[:4]], "empty", 0, "trace", 0),
        ([a, b], [b, a], "empty", 1, "trace", 0),
        ([a, b, c], [other[:4], other[4:8], memory[3:7]], "trace", 0, "empty", 2),
        ([a, b], [memory[:1].new_empty(4), memory[7:11]], "trace", 1, "empty", 1),
    ]
    for trace, empty, one, i, two, j in cases:
        with pytest.raises(ValueError, match=rf"^{one}_grads\[{i}\] and {two}_grads\[{j}\] share memory"):
            K.blend_gradients(trace, empty, 0.5)
        assert torch.equal(memory, torch.arange(12.0))


def test_memory_may_be_shared_where_nothing_is_written_early(seed, backend):
    memory, other = torch.randn(12), torch.randn(12)
    parts, exact = list(memory.split(4)), memory.clone()
    K.blend_gradients(parts, parts, 0.3)  # each its own
    torch.testing.assert_close(memory, exact)
    K.blend_gradients([*parts, memory[5:5]], [other[:4]] * 3 + [memory[5:5]], 0.5)
    torch.testing.assert_close(memory, 0.5 * exact + 0.5 * other[:4].repeat(3))


def test_autograd_hears_of_the_write(backend):
    gradient, other = torch.ones(4), torch.randn(4, requires_grad=True)
    product = (gradient * other).sum()
    K.blend_gradients([gradient], [torch.zeros(4)], 0.5)
    with pytest.raises(RuntimeError, match="modified by an inplace operation"):
        product.backward()
    with torch.inference_mode():  # where nothing is saved and nothing counted
        gradient = torch.ones(4)
        K.blend_gradients([gradient], [torch.zeros(4)], 0.5)
    assert gradient.eq(0.5).all()


@built
def test_compiles_whole(seed):
    trace, empty = [torch.randn(5), torch.randn(7)], [torch.randn(5), torch.randn(7)]
    exact, sums = exactly(trace, empty, 0.5)
    dot = torch.compile(lambda t, e: K.blend_gradients(t, e, 0.5).dot, fullgraph=True, backend="eager")(trace, empty)
    torch.testing.assert_close(dot, sums[2])
    torch.testing.assert_close(trace, [x.float() for x in exact])


@built
@pytest.mark.parametrize("dtypes", (DTYPES, (torch.bfloat16,)), ids=str)
def test_bits_do_not_depend_on_the_threads(seed, dtypes):
    trace, empty = draw(dtypes)
    before, results = torch.get_num_threads(), []
    try:
        for threads in (1, 2, 3, 5):
            torch.set_num_threads(threads)
            copies = [t.clone() for t in trace]
            results.append((*K.blend_gradients(copies, empty, 0.3), *copies))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@built
def test_unaligned_views_give_the_same_bits(seed):
    for dtype in DTYPES:
        trace, empty = torch.randn(2, 5000).to(dtype)
        views = [torch.cat((x.new_zeros(1), x))[1:] for x in (trace, empty)]
        expected, got = K.blend_gradients([trace], [empty], 0.3), K.blend_gradients([views[0]], [views[1]], 0.3)
        assert torch.equal(trace, views[0]) and all(torch.equal(a, b) for a, b in zip(expected, got))


@built
def test_schema_and_fake(seed):
    op = torch.ops.longtrace.blend_gradients_
    lists = [torch.randn(5), torch.randn(3, 4).bfloat16()], [torch.randn(5), torch.randn(3, 4)]
    torch.library.opcheck(op.default, (*lists, 0.3))
    for bad in (([], []), ([torch.ones(2).half()], [torch.ones(2)]), ([torch.ones(3)], [torch.ones(2)])):
        with pytest.raises(RuntimeError):
            op(*bad, 0.5)

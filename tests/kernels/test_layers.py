"""The layer ops against float64, beside transformers' own modules: values, gradients, layouts, edges, repeatability."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F
from transformers.models.gemma.modeling_gemma import GemmaRMSNorm
from transformers.models.llama.modeling_llama import LlamaRMSNorm, apply_rotary_pos_emb

from longtrace import kernels as K
from longtrace.kernels import extension
from longtrace.kernels.layers import dispatch, native, reference

EPS = 1e-5
FUSED = (torch.bfloat16, torch.float32)
SHAPES = ((0, 16), (64, 1), (1, 576), (70, 33), (300, 100), (2, 9, 48), (3, 2, 0, 8))
built = pytest.mark.skipif(not extension.LOADED, reason=extension.WHY)


@pytest.fixture
def draw():
    """Fresh draws; the seed is printed, and LONGTRACE_TEST_SEED repeats a run."""
    seed = int(os.environ.get("LONGTRACE_TEST_SEED", int.from_bytes(os.urandom(4), "little")))
    print(f"LONGTRACE_TEST_SEED={seed}")
    generator = torch.Generator().manual_seed(seed)
    return lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64)


DRAWS = 16  # whose errors are taken together: of one draw of few numbers, either side's rounding may happen to be none


def check_no_worse(name, found, dtype):
    """|ours - exact| <= |theirs - exact| in the Frobenius norm, up to the chance scatter of roundings (1 / sqrt(n)).

    `found`: (ours, exact, theirs, size) of every draw; size is the norm of what is rounded where that is larger than the
    result: terms that cancel.
    """
    for ours, exact, theirs, _ in found:
        assert ours.shape == exact.shape == theirs.shape and ours.dtype == theirs.dtype == dtype, name
    norm = lambda values: sum(float(v) ** 2 for v in values) ** 0.5  # noqa: E731
    n = sum(exact.numel() for _, exact, _, _ in found)
    if not n:
        return
    chance = torch.finfo(dtype).eps / 2 * norm(max(e.norm(), s) for _, e, _, s in found) * min(1.0, 32 / n**0.5)
    error, allowed = (
        norm((a.double() - e).norm() for a, e, _, _ in found),
        norm((t.double() - e).norm() for _, e, t, _ in found),
    )
    assert error <= allowed + chance + 1e-30, f"{name}: {error} > {allowed} + {chance}"


def run(function, inputs, ups):
    """(outputs, gradients of all inputs), the upstream gradients in the outputs' dtype."""
    out = function(*inputs)
    out = out if isinstance(out, tuple) else (out,)
    return out, torch.autograd.grad(out, inputs, [u.to(o.dtype) for u, o in zip(ups, out)])


def compare(ours, exact, theirs, make, dtype):
    """Values and gradients of three functions on the same rounded values: ours, the truth in float64, theirs.

    make() -> (inputs, upstream gradients, sizes): the sizes, by index, of gradients whose terms cancel.
    """
    found = {}
    for _ in range(DRAWS):
        inputs, ups, sizes = make()
        inputs, ups = [i.to(dtype) for i in inputs], [u.to(dtype) for u in ups]
        leaves = lambda wide: [(i.double() if wide else i.clone()).requires_grad_() for i in inputs]  # noqa: E731, B023
        results = [run(f, leaves(f is exact), ups) for f in (ours, exact, theirs)]
        for part, kind in enumerate(("value", "gradient")):
            for i, values in enumerate(zip(*(r[part] for r in results), strict=True)):
                found.setdefault(f"{kind} {i}", []).append((*values, sizes.get(i, 0.0) if part else 0.0))
    for name, values in found.items():
        check_no_worse(name, values, dtype)


def own_norm(offset):
    """transformers' module as a function of (x, weight)."""
    cls = GemmaRMSNorm if offset else LlamaRMSNorm

    def norm(x, weight):
        module = cls(x.shape[-1], eps=EPS)
        del module.weight
        module.weight = weight
        return module(x)

    return norm


@pytest.mark.parametrize("offset", (0.0, 1.0))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_rms_norm_is_no_worse_than_transformers(draw, dtype, shape, offset):
    def make():
        x, w, up = 3 * draw(*shape), draw(shape[-1]), draw(*shape)
        # dx is a difference, with H = 1 of two terms that are all but equal; dweight is a sum of either sign
        term = up * (offset + w) * torch.rsqrt(x.square().mean(-1, keepdim=True) + EPS)
        return [x, w], [up], {0: term.norm(), 1: (term * x).norm()}

    compare(
        lambda x, w: K.rms_norm(x, w, EPS, offset=offset),
        lambda x, w: reference.rms_norm(x, w, EPS, offset=offset),
        own_norm(offset),
        make,
        dtype,
    )


@pytest.mark.parametrize("offset", (0.0, 1.0))
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_residual_and_norm_in_one(draw, dtype, shape, offset):
    def theirs(x, residual, w):
        total = residual + x
        return own_norm(offset)(total, w), total

    def make():
        x, r, w, up, up_total = draw(*shape), 2 * draw(*shape), draw(shape[-1]), draw(*shape), draw(*shape)
        term = up * (offset + w) * torch.rsqrt((x + r).square().mean(-1, keepdim=True) + EPS)
        return [x, r, w], [up, up_total], {0: term.norm(), 1: term.norm(), 2: (term * (x + r)).norm()}

    compare(
        lambda x, r, w: K.rms_norm(x, w, EPS, residual=r, offset=offset),
        lambda x, r, w: reference.rms_norm(x, w, EPS, residual=r, offset=offset),
        theirs,
        make,
        dtype,
    )


@pytest.mark.parametrize("tables", ("full", "half", "partial", "partial half"))
@pytest.mark.parametrize("T, D", ((0, 8), (1, 2), (37, 64), (50, 40)))
@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_rope_is_no_worse_than_transformers(draw, dtype, T, D, tables):
    R = max(2, D * 3 // 4 // 2 * 2) if "partial" in tables else D
    angle = 10 * draw(T, R // 2)
    cos, sin = (torch.cat((t, t), -1).to(dtype) for t in (angle.cos(), angle.sin()))
    width = R // 2 if "half" in tables else R

    def theirs(q, k):
        first = apply_rotary_pos_emb(*(x[..., :R].transpose(0, 1)[None] for x in (q, k)), cos[None], sin[None])
        return tuple(torch.cat((a[0].transpose(0, 1), x[..., R:]), -1) for a, x in zip(first, (q, k)))

    compare(
        lambda q, k: K.rope(q, k, cos[:, :width], sin[:, :width], rotary_dim=R),
        lambda q, k: reference.rope(q, k, cos.double(), sin.double(), R),
        theirs,
        lambda: ([draw(T, 5, D), draw(T, 1, D)], [draw(T, 5, D), draw(T, 1, D)], {}),
        dtype,
    )


@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_rope_with_other_angles_in_the_second_half(draw, dtype):
    """Some long-context tables are not two equal halves; the backward is the transpose of the forward all the same."""
    cos, sin = draw(20, 32).to(dtype), draw(20, 32).to(dtype)
    compare(
        lambda q, k: K.rope(q, k, cos, sin),
        lambda q, k: reference.rope(q, k, cos.double(), sin.double(), 32),
        lambda q, k: reference.rope(q, k, cos, sin, 32),
        lambda: ([draw(20, 3, 48), draw(20, 2, 48)], [draw(20, 3, 48), draw(20, 2, 48)], {}),
        dtype,
    )


ACTS = {
    "swiglu": (K.swiglu, F.silu),
    "geglu": (K.geglu, lambda g: F.gelu(g, approximate="tanh")),
}


@pytest.mark.parametrize("name", ACTS)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_gated_activations_are_no_worse_than_torch(draw, dtype, shape, name):
    ours, act = ACTS[name]
    theirs = lambda gate, up: act(gate) * up  # noqa: E731
    exact = getattr(reference, name)
    compare(ours, exact, theirs, lambda: ([3 * draw(*shape), draw(*shape)], [draw(*shape)], {}), dtype)


@pytest.mark.parametrize("name", ACTS)
def test_gates_at_the_ends_of_the_range(name):
    ours, _ = ACTS[name]
    limit = torch.finfo(torch.float32).max
    gate = torch.tensor(
        [0.0, -0.0, 1e-30, 20.0, -20.0, 87.0, -87.0, 89.0, -89.0, 1e4, -1e4, 1e20, -1e20, limit, -limit]
    )
    a, b = gate.clone().requires_grad_(), gate.double().requires_grad_()
    value, exact = ours(a, torch.ones_like(a)), getattr(reference, name)(b, torch.ones_like(b))
    slope, exact_slope = torch.autograd.grad(value.sum(), a)[0], torch.autograd.grad(exact.sum(), b)[0]
    # gelu's own formula overflows in float64 too: its limits are known
    exact_slope = torch.where(gate.abs() >= 1e20, (gate > 0).double(), exact_slope)
    torch.testing.assert_close(value.double(), exact, rtol=4e-6, atol=1e-36)
    torch.testing.assert_close(slope.double(), exact_slope, rtol=4e-6, atol=1e-35)


@pytest.mark.parametrize("dtype", (torch.float16, torch.float64), ids=str)
def test_other_dtypes_are_the_reference(draw, dtype):
    x, r, w = draw(7, 20).to(dtype), draw(7, 20).to(dtype), draw(20).to(dtype)
    q, k, cos, sin = (draw(7, *s).to(dtype) for s in ((2, 8), (1, 8), (8,), (8,)))
    assert dispatch.choose("cpu", dtype).backend == "reference"
    for ours, expected in (
        (K.rms_norm(x, w, EPS, residual=r, offset=1.0), reference.rms_norm(x, w, EPS, residual=r, offset=1.0)),
        (K.rope(q, k, cos, sin), reference.rope(q, k, cos, sin, 8)),
        ((K.swiglu(x, r), K.geglu(x, r)), (reference.swiglu(x, r), reference.geglu(x, r))),
    ):
        for a, b in zip(ours, expected, strict=True):
            assert a.dtype == dtype and torch.equal(a, b)


def test_an_fp32_weight_promotes_as_in_transformers(draw):
    x, w = draw(4, 8).bfloat16(), draw(8).float()
    for offset, dtype in ((0.0, torch.float32), (1.0, torch.bfloat16)):
        y = K.rms_norm(x, w, EPS, offset=offset)
        assert y.dtype == dtype and torch.equal(y, own_norm(offset)(x, w))


def all_ops(draw, dtype, rows=64):
    """(name, function, inputs) of every op, for what holds of all of them; inputs' first dimension is the row."""
    x, r, w = draw(rows, 48), draw(rows, 48), draw(48)
    q, k, cos, sin = draw(rows, 3, 16), draw(rows, 1, 16), draw(rows, 16).to(dtype), draw(rows, 16).to(dtype)
    return [
        ("rms_norm", lambda x, w: (K.rms_norm(x, w, EPS),), (x.to(dtype), w.to(dtype))),
        ("residual", lambda x, r, w: K.rms_norm(x, w, EPS, residual=r, offset=1.0), [t.to(dtype) for t in (x, r, w)]),
        ("rope", lambda q, k: K.rope(q, k, cos, sin), (q.to(dtype), k.to(dtype))),
        ("swiglu", lambda g, u: (K.swiglu(g, u),), (x.to(dtype), r.to(dtype))),
        ("geglu", lambda g, u: (K.geglu(g, u),), (x.to(dtype), r.to(dtype))),
    ]


def same(a, b):
    return a.shape == b.shape and torch.equal(a.nan_to_num(7.0), b.nan_to_num(7.0))


@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_a_nan_row_stays_alone(draw, dtype):
    for name, function, inputs in all_ops(draw, dtype):
        poisoned = [i.clone() for i in inputs]
        poisoned[0][5] = float("nan")
        ups = [torch.ones_like(o) for o in function(*inputs)]
        clean, dirty = (run(function, [i.requires_grad_() for i in x], ups) for x in (inputs, poisoned))
        others = torch.arange(64) != 5
        for a, b in zip((*clean[0], *clean[1]), (*dirty[0], *dirty[1]), strict=True):
            if len(a) == 64:  # the weight's gradient takes the NaN, as it must
                assert same(a[others], b[others]), name
        assert dirty[0][0][5].isnan().all(), name


@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_rows_do_not_depend_on_their_neighbours(draw, dtype):
    for name, function, inputs in all_ops(draw, dtype):
        if name == "rope":
            continue  # its tables are cut along: below
        whole = function(*inputs)
        alone = function(*(i[9:10] if len(i) == 64 else i for i in inputs))
        assert all(torch.equal(a[9:10], b) for a, b in zip(whole, alone, strict=True)), name
    q, cos = draw(64, 3, 16).to(dtype), draw(64, 16).to(dtype)
    whole, alone = K.rope(q, q, cos, cos)[0], K.rope(q[9:10], q[9:10], cos[9:10], cos[9:10])[0]
    assert torch.equal(whole[9:10], alone)


@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_zero_rows_are_finite(draw, dtype):
    for name, function, inputs in all_ops(draw, dtype):
        inputs = [torch.zeros_like(i).requires_grad_() if len(i) == 64 else i.requires_grad_() for i in inputs]
        out, grads = run(function, inputs, [torch.ones_like(o) for o in function(*inputs)])
        assert all(not o.any() for o in out), name
        assert all(g.isfinite().all() for g in grads), name


@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_strided_inputs_give_the_same_bits(draw, dtype):
    for name, function, inputs in all_ops(draw, dtype):
        ups = [torch.ones_like(o) for o in function(*inputs)]
        expected = run(function, [i.requires_grad_() for i in inputs], ups)
        wide = [torch.cat((i, i), -1)[..., i.shape[-1] :] if i.ndim > 1 else i for i in inputs]  # row stride 2 H
        turned = [i.mT.contiguous().mT if i.ndim > 1 else i.repeat_interleave(2)[::2] for i in inputs]  # columns apart
        for layout in (wide, turned):
            strided_ups = [u.mT.contiguous().mT for u in ups]
            got = run(function, [i.detach().requires_grad_() for i in layout], strided_ups)
            for a, b in zip((*expected[0], *expected[1]), (*got[0], *got[1]), strict=True):
                assert torch.equal(a, b), name


@built
def test_transposed_heads_are_normed_where_they_lie(draw):
    """Gemma3 norms (B, heads, T, D) views of (B, T, heads, D): no copy, and the result lies as the input did."""
    x = draw(2, 6, 3, 16).float().transpose(1, 2)
    y = K.rms_norm(x, torch.ones(16), EPS)
    assert y.shape == x.shape and y.stride() == x.stride()
    assert torch.equal(y, K.rms_norm(x.contiguous(), torch.ones(16), EPS))


@built
def test_bits_do_not_depend_on_the_threads(draw):
    x, r, w = (draw(5000, 40).bfloat16().requires_grad_(), draw(5000, 40).bfloat16(), draw(40).bfloat16())
    up, before, results = draw(5000, 40).bfloat16(), torch.get_num_threads(), []
    weight = w.requires_grad_()
    try:
        for threads in (1, 2, 3, 5, 2):
            torch.set_num_threads(threads)
            y, total = K.rms_norm(x, weight, EPS, residual=r)
            gate = K.swiglu(x, r)
            results.append((y, total, gate, *torch.autograd.grad((y * up).sum() + (gate * up).sum(), (x, weight))))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(a, b) for a, b in zip(results[0], other, strict=True))


@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_a_second_backward_finds_what_the_first_did(draw, dtype):
    """Nothing saved, and no input, is written over."""
    for name, function, inputs in all_ops(draw, dtype):
        before = [i.clone() for i in inputs]
        inputs = [i.requires_grad_() for i in inputs]
        out = function(*inputs)
        ups = [torch.ones_like(o) for o in out]
        first = torch.autograd.grad(out, inputs, ups, retain_graph=True)
        second = torch.autograd.grad(out, inputs, ups)
        assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True)), name
        assert all(torch.equal(a, b) for a, b in zip(before, inputs, strict=True)), name
        assert all((u == 1).all() for u in ups), name


@built
def test_what_is_kept_for_the_backward(draw):
    kept: list[torch.Tensor] = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: kept.append(t) or t, lambda t: t):
        for name, function, inputs in all_ops(draw, torch.bfloat16):
            kept.clear()
            out = function(*(i.requires_grad_() for i in inputs))
            sizes = [(tuple(t.shape), t.dtype) for t in kept]
            row, scale, weight = ((64, 48), torch.bfloat16), ((64,), torch.float32), ((48,), torch.bfloat16)
            table = ((64, 16), torch.bfloat16)
            expected = {"rms_norm": [row, scale, weight], "residual": [row, scale, weight], "rope": [table, table]}
            assert sizes == expected.get(name, [row, row]), name
            owners = {t.data_ptr() for t in (*inputs, *out)} | {t.data_ptr() for t in kept if t.ndim == 1}
            if name != "rope":
                assert all(t.data_ptr() in owners for t in kept), f"{name} keeps a copy"


@built
def test_only_what_is_asked_for_is_computed(draw):
    x, w = draw(10, 16).float().requires_grad_(), draw(16).float()  # a frozen norm, as under LoRA
    y, total = K.rms_norm(x, w, EPS, residual=torch.ones(10, 16))
    assert torch.autograd.grad(total.sum(), x, retain_graph=True)[0].eq(1).all()  # the sum alone: no norm in it
    assert torch.autograd.grad(y.sum(), x)[0].shape == x.shape and w.grad is None


@built
def test_double_backward_raises(draw):
    for name, function, inputs in all_ops(draw, torch.float32):
        inputs = [i.requires_grad_() for i in inputs]
        with pytest.raises(RuntimeError, match="differentiable once"):
            torch.autograd.grad(function(*inputs)[0].sum(), inputs[0], create_graph=True)
        assert name


def test_what_does_not_fit_is_refused():
    x, q, cos = torch.ones(4, 8), torch.ones(4, 2, 8), torch.ones(4, 8)
    for call, words in (
        (lambda: K.rms_norm(x, torch.ones(7), EPS), r"weight must be \(8,\)"),
        (lambda: K.rms_norm(x, torch.ones(8), EPS, residual=torch.ones(8)), r"residual must be \(4, 8\)"),
        (lambda: K.swiglu(x, torch.ones(4, 7)), "one shape"),
        (lambda: K.rope(q, torch.ones(3, 2, 8), cos, cos), "q and k must be"),
        (lambda: K.rope(q, q, cos[:3], cos[:3]), r"cos and sin must be \(4, 8\)"),
        (lambda: K.rope(q, q, cos, cos[:, :4]), "cos and sin must be"),
        (lambda: K.rope(q, q, cos[:, :3], cos[:, :3]), "rotary_dim must be even"),
        (lambda: K.rope(q, q, cos, cos, rotary_dim=6), "cos as wide or half"),
    ):
        with pytest.raises(ValueError, match=words) as error:
            call()
        assert "\n" not in str(error.value)


def test_learned_positions_take_gradients(draw):
    q, cos = draw(4, 2, 8).float(), draw(4, 8).float().requires_grad_()
    (grad,) = torch.autograd.grad(K.rope(q, q, cos, torch.zeros(4, 8))[0].sum(), cos)
    torch.testing.assert_close(grad, q.sum(1))


def test_forced_to_the_reference_it_is_pytorch(draw, monkeypatch, force):
    force("reference")
    monkeypatch.setattr(native.RMSNorm, "apply", None)
    x, w = draw(4, 8).float(), draw(8).float()
    assert torch.equal(K.rms_norm(x, w, EPS), reference.rms_norm(x, w, EPS))


@built
def test_fakes_agree_with_the_ops(draw):
    x, w, q, cos = draw(6, 20).bfloat16(), draw(20).bfloat16(), draw(6, 2, 8).float(), draw(6, 4).float()
    ops, scale = torch.ops.longtrace, torch.ones(6)
    for op, args in (
        (ops.rms_norm, (x, None, w, EPS, 0.0)),
        (ops.rms_norm, (x, x, w, EPS, 1.0)),
        (ops.rms_norm_backward, (x, x, x, scale, w, 0.0, True)),
        (ops.rms_norm_backward, (x, None, x, scale, w, 0.0, False)),
        (ops.rope, (q, q[:, :1], cos, cos, 8, True)),
        (ops.glu, (x, x, True)),
        (ops.glu_backward, (x, x, x, False)),
    ):
        torch.library.opcheck(op.default, args, test_utils=("test_schema", "test_faketensor"))


@built
@pytest.mark.parametrize("dtype", FUSED, ids=str)
def test_torch_compile_gives_the_same_bits(draw, dtype):
    for name, function, inputs in all_ops(draw, dtype):
        inputs = [i.requires_grad_() for i in inputs]
        ups = [torch.ones_like(o) for o in function(*inputs)]
        expected = run(function, inputs, ups)
        got = run(torch.compile(function, backend="aot_eager", fullgraph=True), inputs, ups)
        for a, b in zip((*expected[0], *expected[1]), (*got[0], *got[1]), strict=True):
            assert torch.equal(a, b), name


SCRIPT = """
import torch
from longtrace import kernels as K
from longtrace.kernels.layers import reference as R
torch.manual_seed({seed})
for dtype in (torch.bfloat16, torch.float32):
    draw = lambda *shape: torch.randn(*shape).to(dtype).requires_grad_()
    x, r, w, q, k = draw(70, 83), draw(70, 83), draw(83), draw(70, 3, 44), draw(70, 1, 44)
    cos, sin = torch.randn(70, 36).to(dtype), torch.randn(70, 36).to(dtype)
    for f, g, inputs in (
        (lambda x, r, w: K.rms_norm(x, w, 1e-5, residual=r), lambda x, r, w: R.rms_norm(x, w, 1e-5, residual=r), (x, r, w)),
        (lambda x, w: (K.rms_norm(x, w, 1e-5, offset=1.0),), lambda x, w: (R.rms_norm(x, w, 1e-5, offset=1.0),), (x, w)),
        (lambda q, k: K.rope(q, k, cos, sin), lambda q, k: R.rope(q, k, cos.to(q), sin.to(q), 36), (q, k)),
        (lambda a, b: (K.swiglu(a, b), K.geglu(a, b)), lambda a, b: (R.swiglu(a, b), R.geglu(a, b)), (x, r)),
    ):
        found = []
        for h, leaves in ((f, inputs), (g, [i.detach().double().requires_grad_() for i in inputs]), (g, inputs)):
            out = h(*leaves)
            found.append((*out, *torch.autograd.grad([o.double().square().sum() for o in out], leaves)))
        for ours, exact, eager in zip(*found):
            chance = torch.finfo(dtype).eps / 2 * exact.norm() * min(1.0, 32 / exact.numel() ** 0.5)
            # what comes down here is already rounded: the value enters its own gradient
            assert (ours - exact).norm() <= (eager - exact).norm() + 2 * chance, (dtype, ours.shape)
print("served by", K.explain().splitlines()[-1])
"""


@built
@pytest.mark.parametrize("capability", ("baseline", "avx2", "avx512"))
def test_narrower_instruction_sets(capability):
    seed = int.from_bytes(os.urandom(3), "little")
    print(f"seed {seed}")
    done = subprocess.run(
        [sys.executable, "-c", SCRIPT.format(seed=seed)],
        capture_output=True,
        text=True,
        env=os.environ | {"LONGTRACE_CPU_CAPABILITY": capability},
    )
    assert done.returncode == 0, done.stderr[-2000:]
    assert "C++" in done.stdout

"""The C++ ops: against PyTorch, under torch.compile, with any number of threads, at every instruction set, and absent."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from longtrace import kernels as K
from longtrace.kernels import extension
from longtrace.kernels.selfcheck import self_check

needs_cpp = pytest.mark.skipif(not extension.LOADED, reason=extension.WHY)
SHAPES = ((0, 4, 4), (1, 1, 1), (3, 5, 15), (33, 31, 129), (64, 32, 128), (5, 33, 4097), (70, 64, 1000))
DTYPES = (torch.bfloat16, torch.float16, torch.float32)


def draw(n, H, V, dtype=torch.float32, seed=0):
    """Rows, weight and bias of a head whose logits have a spread of about 4, with targets."""
    generator = torch.Generator().manual_seed(seed)
    h, weight = (torch.randn(*shape, generator=generator) for shape in ((n, H), (V, H)))
    bias = torch.randn(V, generator=generator)
    target = torch.randint(0, V, (n,), generator=generator)
    return h.to(dtype), (weight * 4 / H**0.5).to(dtype), bias, target


def forward(h, weight, bias, target, transform=(1.0, 0.0, 1.0), entropy=True, keep=True):
    g = torch.ops.longtrace.head_buffer(weight, len(h)) if keep else None
    return *torch.ops.longtrace.head_forward(h, weight, bias, target, *transform, entropy, keep, g), g


def run(code, **environment):
    """Run `code` in a fresh interpreter outside the clone and return its output."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=os.path.dirname(sys.executable), capture_output=True, text=True,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_cpp
@pytest.mark.parametrize("transform", ((1.0, 0.0, 1.0), (0.7, 5.0, 1.3)), ids=str)
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_tile_ops_against_float64(shape, dtype, transform):
    h, weight, bias, target = draw(*shape, dtype)
    n, H, V = shape
    logit_scale, softcap, temperature = transform
    z = logit_scale * h.double() @ weight.double().T + bias
    slope = torch.ones_like(z)
    if softcap:
        slope = 1 - (z / softcap).tanh() ** 2
        z = softcap * (z / softcap).tanh()
    log_p = torch.log_softmax(z / temperature, 1)
    entropy = torch.special.entr(log_p.exp()).sum(1)
    at = target[:, None]

    maximum, log_sum, log_prob, ent, mass, at_target, scale, g = forward(h, weight, bias, target, transform)
    torch.testing.assert_close(log_prob.double(), log_p.gather(1, at).squeeze(1), rtol=2e-6, atol=4e-6)
    torch.testing.assert_close(ent.double(), entropy, rtol=2e-6, atol=8e-6)
    lse = torch.logsumexp(z / temperature, 1)
    torch.testing.assert_close(maximum.double() + log_sum, lse, rtol=1e-6, atol=4e-6)
    torch.testing.assert_close(at_target.double(), slope.gather(1, at).squeeze(1), rtol=1e-5, atol=1e-6)
    p = (log_p.exp() * slope).scatter(1, at, 0.0)
    unit = torch.finfo(g.dtype).eps
    ours = (g[:, :n] * scale.double()).T
    torch.testing.assert_close(mass.double(), ours.sum(1), rtol=1e-5, atol=1e-7)
    assert (ours - p).abs().le(unit * p + 2e-5 * p + 1e-9).all()
    assert g[:, n:].narrow(1, 0, -n % 32).eq(0).all()  # padding never reaches a sum
    if n:
        torch.testing.assert_close(
            torch.ops.longtrace.head_column_max(g, scale).double(), ours.amax(0), rtol=1e-6, atol=0
        )

    generator = torch.Generator().manual_seed(1)
    a, e = torch.randn(2, n, generator=generator)
    d = torch.ops.longtrace.head_buffer(weight, n)
    torch.ops.longtrace.head_gradient_(d, h, weight, bias, target, *transform, maximum, log_sum, a, e, ent)
    truth = log_p.exp() * (a[:, None] - e[:, None] * (log_p + entropy[:, None])) * slope
    truth = truth.scatter(1, at, 0.0)
    assert (d[:, :n].double().T - truth).norm() <= (unit + 1e-5) * truth.norm() + 1e-9

    kept = torch.randperm(V, generator=generator)[: max(1, V // 3)]
    small = g.index_select(0, kept)
    for rows, part in ((None, g), (kept, small)):
        chosen = weight if rows is None else weight[rows]
        value = (part[:, :n] * scale.double()).T  # what the op was given, so only its own rounding counts
        dh = torch.ops.longtrace.head_dh(part, weight, rows, n, scale)
        exact = value @ chosen.double()
        assert (dh - exact).norm() <= 2e-6 * (value.abs() @ chosen.double().abs()).norm() + 1e-12
        out = torch.ones(V, H)
        torch.ops.longtrace.head_dw_(out, part, h, scale, rows, True)
        grown = torch.ones(V, H, dtype=torch.float64)
        grown[slice(None) if rows is None else rows] += value.T @ h.double()
        assert (out - grown).norm() <= (unit + 2e-6) * (value.abs().T @ h.double().abs()).norm() + 1e-6 * V


@needs_cpp
def test_far_targets_infinite_and_not_a_number_logits():
    h, weight, bias, target = draw(6, 16, 300)
    h[1, 5] = float("nan")
    bias[7] = float("-inf")
    target[2] = 7  # an impossible target
    bias[200] = 5e3  # far above every target and the first block
    target[3] = 200
    *_, log_prob, ent, _, _, scale, g = forward(h, weight, bias, target)
    exact = torch.log_softmax(h.double() @ weight.double().T + bias, 1)
    assert log_prob[1].isnan() and ent[1].isnan() and log_prob[2] == float("-inf")
    rest = torch.tensor([0, 3, 4, 5])
    picked = exact.gather(1, target[:, None]).squeeze(1)
    torch.testing.assert_close(log_prob[rest].double(), picked[rest], rtol=1e-6, atol=2e-6)
    assert g[:, rest].isfinite().all() and scale[rest].isfinite().all()


@needs_cpp
def test_fakes_and_schemas():
    ops = torch.ops.longtrace
    for shape in ((3, 8, 40), (1, 1, 1), (40, 33, 200)):
        for dtype in (torch.float32, torch.bfloat16):
            h, weight, bias, target = draw(*shape, dtype)
            for entropy in (False, True):
                args = (
                    h,
                    weight,
                    bias,
                    target,
                    1.0,
                    0.0,
                    1.0,
                    entropy,
                    True,
                    ops.head_buffer(weight, shape[0]).zero_(),
                )
                torch.library.opcheck(ops.head_forward.default, args)
            maximum, log_sum, _, ent, _, _, scale, g = forward(h, weight, bias, target)
            coefficients = (maximum, log_sum, ent, ent, ent)
            head = (h, weight, None, target, 1.0, 0.0, 1.0)
            torch.library.opcheck(ops.head_gradient_.default, (g.clone(), *head, *coefficients))
            torch.library.opcheck(ops.head_dh_sample.default, (g, weight[:, :32].contiguous(), shape[0], scale, 2))
            torch.library.opcheck(ops.head_dh.default, (g, weight, None, shape[0], scale))
            torch.library.opcheck(ops.head_dw_.default, (torch.zeros(shape[2], shape[1]), g, h, scale, None, True))
            torch.library.opcheck(ops.head_column_max.default, (g, scale))


@needs_cpp
def test_compile_sees_opaque_ops():
    def gradient(h, weight, bias, target):
        g = torch.ops.longtrace.head_buffer(weight, h.shape[0])
        *_, scale = torch.ops.longtrace.head_forward(h * 2, weight, bias, target, 1.0, 0.0, 1.0, False, False, g)
        return torch.ops.longtrace.head_dh(g, weight, None, h.shape[0], scale)

    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((3, 8, 40), (36, 16, 100), (2, 4, 17)):
        args = draw(*shape)
        assert torch.equal(compiled(*args), gradient(*args))


@needs_cpp
def test_bad_tensors_are_refused():
    h, weight, bias, target = draw(3, 8, 40)
    with pytest.raises(RuntimeError, match=r"target 40 is not in \[0, 40\)"):
        forward(h, weight, bias, target + 40 - target[0])
    with pytest.raises(RuntimeError, match="fp32, bf16 or fp16"):
        forward(h.double(), weight.double(), bias, target)
    with pytest.raises(RuntimeError, match="bias must be"):
        forward(h, weight, bias[:3], target)
    with pytest.raises(RuntimeError, match="agree in width and dtype"):
        forward(h, weight[:, :4], bias, target)
    *_, scale, g = forward(h, weight, bias, target)
    with pytest.raises(RuntimeError, match="does not fit"):
        torch.ops.longtrace.head_dh(g[:20], weight, None, 3, scale)
    with pytest.raises(RuntimeError, match=r"rows 40 is not in"):
        torch.ops.longtrace.head_dw_(torch.zeros(40, 8), g[:1], h, scale, torch.tensor([40]), True)


@needs_cpp
@pytest.mark.parametrize("dtype", DTYPES, ids=str)
def test_bitwise_for_any_number_of_threads(dtype):
    h, weight, bias, target = draw(77, 40, 9000, dtype)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            *rows, scale, g = forward(h, weight, bias, target)
            dh = torch.ops.longtrace.head_dh(g, weight, None, 77, scale)
            dw = torch.zeros(9000, 40)
            torch.ops.longtrace.head_dw_(dw, g, h, scale, None, True)
            results.append((*rows, scale, g[:, :77], dh, dw))
    finally:
        torch.set_num_threads(before)
    for other in results[1:]:
        assert all(torch.equal(x, y) for x, y in zip(results[0], other))


CHECK = """
import torch
from longtrace import kernels as K
from longtrace.kernels.selfcheck import self_check
print(K.explain())
bad = [row for row in self_check() if not row[3]]
print("bad", bad)
"""


@pytest.mark.slow
@needs_cpp
@pytest.mark.parametrize("capability", ("baseline", "avx2", "avx512", "avx512_bf16"))
def test_narrower_instruction_sets(capability):
    names = ["baseline", "avx2", "avx512", "avx512_bf16", "amx"]
    here = torch.ops.longtrace.cpu_capability()
    if names.index(capability) > names.index(here):
        pytest.skip(f"this processor has no {capability}")
    out = run(CHECK, LONGTRACE_CPU_CAPABILITY=capability)
    assert f"C++ tiles  {capability}," in out and "bad []" in out, out


def test_without_the_extensions_everything_runs_in_pytorch():
    code = """
import sys, torch
def load_library(path):
    raise OSError("cannot open shared object file")
torch.ops.load_library = load_library
sys.modules["longtrace.kernels._pack"] = None
"""
    out = run(code + CHECK)
    assert "bad []" in out, out
    lines = {line.split("  ")[0]: line for line in out.splitlines()}
    assert "Python" in lines["pack"] and "PyTorch" in lines["head"]
    if extension.LIBRARY.exists():
        assert "_C does not load: cannot open" in lines["head"]


def test_a_misspelt_capability_is_named():
    done = subprocess.run(
        [sys.executable, "-c", "import longtrace.kernels"], cwd=os.path.dirname(sys.executable), capture_output=True,
        text=True, env=os.environ | {"LONGTRACE_CPU_CAPABILITY": "AVX2"},
    )  # fmt: skip
    assert done.returncode and "LONGTRACE_CPU_CAPABILITY: found 'AVX2'; accepted: baseline, avx2" in done.stderr


def test_a_missing_or_broken_library_is_one_line(tmp_path):
    loaded, why = extension._load(tmp_path / "_C.abi3.so")
    assert not loaded and "was not built" in why
    (tmp_path / "_C.abi3.so").write_bytes(b"not a library")
    loaded, why = extension._load(tmp_path / "_C.abi3.so")
    assert not loaded and "does not load" in why and len(why.splitlines()) == 1


def test_self_check_passes_here():
    rows = self_check()
    ops = {row[0] for row in rows}
    assert {"pack", "linear_weighted_nll", "linear_log_prob", "linear_cross_entropy", "varlen_attention"} <= ops
    assert all(row[3] for row in rows), [row for row in rows if not row[3]]


def test_explain_names_every_op_with_a_reason():
    lines = K.explain().splitlines()
    ops = ["pack", "pack_rows", "head", "varlen_attention", "group_advantages", "blend_gradients", "layers"]
    assert [line.split("  ")[0] for line in lines[: len(ops)]] == ops  # then what other tests chose
    assert all(len(line.split()) >= 3 for line in lines)

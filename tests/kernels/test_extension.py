"""The C++ ops: against PyTorch, under torch.compile, with any number of threads, at every instruction set, and absent."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch

from longtrace import kernels as K
from longtrace.kernels import extension
from longtrace.kernels.head import backend, epilogue
from longtrace.kernels.selfcheck import self_check

needs_cpp = pytest.mark.skipif(not extension.LOADED, reason=extension.WHY)
SHAPES = ((0, 4), (1, 1), (3, 15), (3, 16), (2, 17), (5, 63), (5, 64), (5, 65), (4, 4095), (4, 4097), (3, 9000))


def draw(rows, V, seed=0):
    generator = torch.Generator().manual_seed(seed)
    logits = 4 * torch.randn(rows, V, generator=generator)
    return logits, torch.randint(0, V, (rows,), generator=generator), *torch.randn(3, rows, generator=generator)


def run(code, **environment):
    """Run `code` in a fresh interpreter outside the clone and return its output."""
    done = subprocess.run(
        [sys.executable, "-c", code], cwd=os.path.dirname(sys.executable), capture_output=True, text=True,
        env=os.environ | environment,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@needs_cpp
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_softmax_passes_against_float64(shape):
    logits, target, a, b, e = draw(*shape)
    if shape[1] > 20:
        logits[:, 7] = float("-inf")
        target = target.where(target != 7, 8)
    exact = epilogue.softmax_stats(logits.double(), target, True)
    stats = backend.softmax_stats(logits, target, True)
    for ours, truth, tolerance in zip(stats, exact, (0, 5e-7, 2e-6, 2e-6)):
        torch.testing.assert_close(ours.double(), truth, rtol=1e-6, atol=tolerance)
    out, truth = logits.clone(), logits.double()
    backend.dlogits_(out, target, stats, a, b, e)
    epilogue.dlogits_(truth, target, exact, a.double(), b.double(), e.double())
    torch.testing.assert_close(out.double(), truth, rtol=2e-5, atol=1e-6)
    out = logits.clone()
    backend.dlogits_(out, target, stats, a, b, None)
    truth = logits.double()
    epilogue.dlogits_(truth, target, exact, a.double(), b.double(), None)
    torch.testing.assert_close(out.double(), truth, rtol=2e-5, atol=1e-6)


@needs_cpp
def test_not_a_number_and_large_values():
    logits, target, *_ = draw(6, 300)
    logits[1, 5], logits[2] = float("nan"), 1e4
    logits[3] += 1e4
    logits[4] = -3e38
    stats = backend.softmax_stats(logits, target, True)
    exact = epilogue.softmax_stats(logits.double(), target, True)
    assert stats.log_prob[1].isnan() and stats.entropy[1].isnan()
    rest = torch.tensor([0, 2, 3, 4, 5])
    torch.testing.assert_close(stats.log_prob[rest].double(), exact.log_prob[rest], rtol=1e-6, atol=2e-6)
    torch.testing.assert_close(stats.entropy[rest].double(), exact.entropy[rest], rtol=1e-6, atol=2e-6)


@needs_cpp
def test_fakes_and_schemas():
    for shape in ((3, 40), (1, 1), (5, 1000)):
        logits, target, a, b, e = draw(*shape)
        for entropy in (False, True):
            torch.library.opcheck(torch.ops.longtrace.softmax_stats.default, (logits, target, entropy))
        stats = backend.softmax_stats(logits, target, True)
        for ent, weight in ((None, None), (stats.entropy, e)):
            args = (logits, target, stats.maximum, stats.log_sum, a, b, ent, weight)
            torch.library.opcheck(torch.ops.longtrace.dlogits_.default, args)


@needs_cpp
def test_compile_sees_opaque_ops():
    def gradient(logits, target, a, b):
        maximum, log_sum, log_prob, _ = torch.ops.longtrace.softmax_stats(logits * 2, target, False)
        out = logits * 2
        torch.ops.longtrace.dlogits_(out, target, maximum, log_sum, a, b, None, None)
        return log_prob, out

    compiled = torch.compile(gradient, backend="aot_eager", fullgraph=True, dynamic=True)
    for shape in ((3, 40), (6, 100), (2, 17)):
        logits, target, a, b, _ = draw(*shape)
        for ours, expected in zip(compiled(logits, target, a, b), gradient(logits, target, a, b)):
            assert torch.equal(ours, expected)


@needs_cpp
def test_bad_tensors_are_refused():
    logits, target, a, b, _ = draw(3, 40)
    stats = backend.softmax_stats(logits, target, True)
    with pytest.raises(RuntimeError, match=r"target 40 is not in \[0, 40\)"):
        torch.ops.longtrace.softmax_stats(logits, target + 40 - target[0], False)
    with pytest.raises(RuntimeError, match="fp32"):
        torch.ops.longtrace.softmax_stats(logits.double(), target, False)
    with pytest.raises(RuntimeError, match="a must be"):
        torch.ops.longtrace.dlogits_(logits, target, stats.maximum, stats.log_sum, a[:2], b, None, None)


@needs_cpp
def test_bitwise_for_any_number_of_threads():
    logits, target, a, b, e = draw(37, 5000)
    before = torch.get_num_threads()
    results = []
    try:
        for threads in (1, 2, 5):
            torch.set_num_threads(threads)
            stats, out = backend.softmax_stats(logits, target, True), logits.clone()
            backend.dlogits_(out, target, stats, a, b, e)
            results.append((*stats, out))
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
@pytest.mark.parametrize("capability", ("baseline", "avx2"))
def test_narrower_instruction_sets(capability):
    if capability not in ("baseline", torch.ops.longtrace.cpu_capability()) and "avx" not in (
        torch.ops.longtrace.cpu_capability()
    ):
        pytest.skip(f"this processor has no {capability}")
    out = run(CHECK, LONGTRACE_CPU_CAPABILITY=capability)
    assert f"_C, {capability}" in out and "bad []" in out, out


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
    assert "Python" in lines["pack"] and "PyTorch" in lines["head softmax"]
    if extension.LIBRARY.exists():
        assert "_C does not load: cannot open" in lines["head softmax"]


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
    assert [line.split("  ")[0] for line in lines] == ["pack", "head GEMM", "head softmax", "varlen_attention"]
    assert all(len(line.split()) >= 3 for line in lines)

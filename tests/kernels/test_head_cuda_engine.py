"""The CUDA engines' arithmetic on the CPU: their Triton kernels under the interpreter, whole ops against float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="pip install triton (Linux)")

SETUP = """
import torch
from longtrace import kernels as K
from longtrace.kernels.head import engines, reference
from longtrace.kernels.head.backend import choose
from longtrace.kernels.head.plan import Chunks

assert choose("cpu", torch.bfloat16).name == "Triton tiles" and choose("cpu", torch.float16).name == "Triton passes"
engines.plan_chunks = lambda *_: Chunks(rows_of_a_chunk, rows_of_a_chunk // 2, 0, 0, 0.0)
rows_of_a_chunk = 16  # several chunks, the last of them short
torch.manual_seed(SEED)

def make(T, H, V, dtype, size=0.5):
    input, weight = torch.randn(T, H).to(dtype).requires_grad_(), (torch.randn(V, H) * size).to(dtype).requires_grad_()
    return input, weight, torch.randn(V).to(dtype).requires_grad_(), torch.randint(0, V, (T,)), torch.randn(T)

def close(ours, truth, leaves, exact_leaves, dtype, what, keep=True):
    for a, b in zip(torch.autograd.grad(ours, leaves), torch.autograd.grad(truth, exact_leaves, retain_graph=keep)):
        assert (a.double() - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm() + 1e-5, what

def doubled(leaves):
    return [t.detach().double().requires_grad_() for t in leaves]
"""

OPS = """
for dtype in (torch.bfloat16, torch.float16, torch.float32):
    for options in ({}, {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3}):
        rows_of_a_chunk = 16
        *leaves, target, c = make(37, 24, 301, dtype)
        input, weight, bias = leaves
        target[::9] = -100
        exact_leaves = doubled(leaves)
        log_p, entropy, lse = reference.log_prob(
            exact_leaves[0], exact_leaves[1], target, linear_bias=exact_leaves[2], **options
        )
        loss, rows = K.linear_weighted_nll(input, weight, target, c, linear_bias=bias, **options)
        assert rows.stats["chunks"] > 1
        values = K.linear_log_prob(input, weight, target, linear_bias=bias, entropy=True, **options)
        for got, want in ((values.log_prob, log_p), (values.entropy, entropy), (values.lse, lse)):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        for ours, truth in (
            (loss, -(log_p * c.double()).sum()),
            ((values.log_prob * c).sum() + values.entropy.sum(), (log_p * c.double()).sum() + entropy.sum()),
        ):
            close(ours, truth, leaves, exact_leaves, dtype, (dtype, options))
        more = dict(label_smoothing=0.1, z_loss=1e-3, weight=torch.rand(301), **options)
        for reduction in ("mean", "none"):
            ours = K.linear_cross_entropy(
                input, weight, target, linear_bias=bias, reduction=reduction, **more
            ).sum()
            truth = reference.cross_entropy(
                exact_leaves[0], exact_leaves[1], target, linear_bias=exact_leaves[2], reduction=reduction,
                **more | {"weight": more["weight"].double()},
            ).sum()
            torch.testing.assert_close(ours.double(), truth, rtol=1e-5, atol=1e-5)
            close(ours, truth, leaves, exact_leaves, dtype, (dtype, options, reduction))
        if dtype != torch.float32:
            rows_of_a_chunk = 64
            for c in (torch.ones(37), torch.randn(37)):
                loss, rows = K.linear_weighted_nll(
                    input, weight, target, c, linear_bias=bias, grad="compressed", eps=1e-3, target_error=0.5, **options
                )
                truth = torch.autograd.grad(-(log_p * c.double()).sum(), exact_leaves, retain_graph=True)
                for a, b in zip(torch.autograd.grad(loss, leaves), truth):
                    assert (a.double() - b).norm() <= 0.1 * b.norm(), (rows.stats, options)
print("all hold")
"""

HARD = """
def both(leaves, target, c, dtype=torch.bfloat16):
    exact_leaves = doubled(leaves)
    bias = dict(linear_bias=leaves[2]) if len(leaves) > 2 else {}
    log_p, entropy, _ = reference.log_prob(
        *exact_leaves[:2], target, **({"linear_bias": exact_leaves[2]} if bias else {})
    )
    loss, rows = K.linear_weighted_nll(*leaves[:2], target, c, entropy=True, **bias)
    torch.testing.assert_close(rows.log_prob.double(), log_p, rtol=1e-5, atol=1e-5)
    torch.testing.assert_close(rows.entropy.double(), entropy, rtol=1e-5, atol=2e-5)
    close(loss, -(log_p * c.double()).sum(), leaves, exact_leaves, dtype, (target.shape, len(leaves)))
    return rows

for shape in ((1, 24, 301), (3, 7, 1), (2, 16, 2), (17, 33, 257), (70, 16, 130)):
    *leaves, target, c = make(*shape, torch.bfloat16)
    both(leaves, target, c)
    both(leaves[:2], target, c)

*leaves, target, c = make(20, 24, 301, torch.bfloat16)
nothing = torch.full((20,), -100)
loss, rows = K.linear_weighted_nll(*leaves[:2], nothing, c, linear_bias=leaves[2])  # all masked
grads = torch.autograd.grad(loss, leaves)
assert loss == 0 and not any(x.any() for x in grads) and rows.stats["rows"] == 0
assert K.linear_cross_entropy(*leaves[:2], nothing) == 0

with torch.no_grad():  # one huge logit, far above every target: done again from the true maximum
    leaves[1][5] = 300 * leaves[0][3] / leaves[0][3].norm()
    leaves[2][5] = 0
both(leaves, target.clamp(min=6), c)
both(leaves, torch.full_like(target, 5), c)

*leaves, target, c = make(20, 24, 301, torch.bfloat16)
with torch.no_grad():
    leaves[2][::2] = float("-inf")
exact_leaves = doubled(leaves[:2])
truth = reference.log_prob(*exact_leaves, target | 1, linear_bias=leaves[2].double())[0]
loss, _ = K.linear_weighted_nll(*leaves[:2], target | 1, c, linear_bias=leaves[2].detach())
close(loss, -(truth * c.double()).sum(), leaves[:2], exact_leaves, torch.bfloat16, "-inf in the bias")

*leaves, target, c = make(40, 24, 301, torch.bfloat16)  # a row does not depend on its neighbours; runs repeat
def run(keep):
    h = leaves[0].detach()[keep].requires_grad_()
    loss, rows = K.linear_weighted_nll(h, leaves[1], target[keep], c[keep])
    return rows.log_prob, torch.autograd.grad(loss, h)[0]
whole, again = run(slice(None)), run(slice(None))
some = torch.tensor([0, 7, 15, 16, 31])
for a, b, part in zip(whole, again, run(some)):
    assert torch.equal(a, b) and torch.equal(a[some], part)
print("all hold")
"""


@pytest.mark.parametrize("code", [OPS, HARD], ids=["ops", "hard inputs"])
def test_whole_ops_under_the_interpreter(code, seed):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", SETUP.replace("SEED", str(seed)) + code],
        cwd=os.path.dirname(sys.executable), capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "LONGTRACE_BACKEND": "triton"},
    )  # fmt: skip
    assert done.returncode == 0 and "all hold" in done.stdout, done.stderr[-3000:]

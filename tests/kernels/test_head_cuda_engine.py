"""The CUDA engine's arithmetic on the CPU: its Triton kernels under the interpreter, whole ops against float64."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest

pytest.importorskip("triton", reason="pip install triton (Linux)")

CODE = """
import torch
from longtrace import kernels as K
from longtrace.kernels.head import reference

torch.manual_seed(SEED)
for dtype in (torch.bfloat16, torch.float32):
    for options in ({}, {"softcap": 5.0, "logit_scale": 0.7, "temperature": 1.3}):
        input = torch.randn(37, 24).to(dtype).requires_grad_()
        weight = (torch.randn(301, 24) * 0.5).to(dtype).requires_grad_()
        bias = torch.randn(301).to(dtype).requires_grad_()
        target, c = torch.randint(0, 301, (37,)), torch.randn(37)
        target[::9] = -100
        leaves = (input, weight, bias)
        exact_leaves = [t.detach().double().requires_grad_() for t in leaves]
        log_p, entropy, lse = reference.log_prob(
            exact_leaves[0], exact_leaves[1], target, linear_bias=exact_leaves[2], **options
        )
        loss, rows = K.linear_weighted_nll(input, weight, target, c, linear_bias=bias, **options)
        values = K.linear_log_prob(input, weight, target, linear_bias=bias, entropy=True, **options)
        for got, want in ((values.log_prob, log_p), (values.entropy, entropy), (values.lse, lse)):
            torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-5)
        for ours, truth in (
            (loss, -(log_p * c.double()).sum()),
            ((values.log_prob * c).sum() + values.entropy.sum(), (log_p * c.double()).sum() + entropy.sum()),
        ):
            grads = torch.autograd.grad(ours, leaves)
            for a, b in zip(grads, torch.autograd.grad(truth, exact_leaves, retain_graph=True)):
                assert (a.double() - b).norm() <= 4 * torch.finfo(dtype).eps * b.norm() + 1e-5, (dtype, options)
        if dtype == torch.bfloat16:
            for c in (torch.ones(37), torch.randn(37)):
                loss, rows = K.linear_weighted_nll(
                    input, weight, target, c, linear_bias=bias, grad="compressed", eps=1e-3, target_error=0.5, **options
                )
                truth = torch.autograd.grad(-(log_p * c.double()).sum(), exact_leaves, retain_graph=True)
                for a, b in zip(torch.autograd.grad(loss, leaves), truth):
                    assert (a.double() - b).norm() <= 0.1 * b.norm(), (rows.stats, options)
print("all hold")
"""


def test_whole_ops_under_the_interpreter(seed):
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", CODE.replace("SEED", str(seed))],
        cwd=os.path.dirname(sys.executable), capture_output=True, text=True,
        env=os.environ | {"TRITON_INTERPRET": "1", "LONGTRACE_BACKEND": "triton"},
    )  # fmt: skip
    assert done.returncode == 0 and "all hold" in done.stdout, done.stderr[-3000:]

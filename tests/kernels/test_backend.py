"""LONGTRACE_BACKEND: forces every op, refuses in one line what it cannot serve; choices are made once and their reasons kept."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode

from longtrace import kernels as K
from longtrace.kernels import backend, extension
from longtrace.kernels.advantages import dispatch as advantages
from longtrace.kernels.attention import dispatch as attention
from longtrace.kernels.backend import BackendRefused, Candidate
from longtrace.kernels.blend import dispatch as blend
from longtrace.kernels.head import backend as head
from longtrace.kernels.layers import dispatch as layers
from longtrace.kernels.packing import pack_rows, rows, unpack_rows
from longtrace.kernels.selfcheck import self_check

built = pytest.mark.skipif(not extension.LOADED, reason=extension.WHY)
F32, F64, BF16 = torch.float32, torch.float64, torch.bfloat16


class Seen(TorchDispatchMode):
    """The names of our C++ ops that ran; two of them compute nothing."""

    def __init__(self):
        super().__init__()
        self.ops: set[str] = set()

    def __torch_dispatch__(self, func, types, args=(), kwargs=None):
        name = str(func).split(".")[1]
        if func.namespace == "longtrace" and name not in ("ask_huge_pages_", "cpu_capability"):
            self.ops.add(name)
        return func(*args, **(kwargs or {}))


def run_head(dtype):
    h, w = torch.randn(9, 8).to(dtype).requires_grad_(), torch.randn(30, 8).to(dtype).requires_grad_()
    K.linear_weighted_nll(h, w, torch.arange(9), torch.ones(9))[0].backward()
    K.linear_log_prob(h, w, torch.arange(9)).log_prob.sum().backward()
    K.linear_cross_entropy(h, w, torch.arange(9)).backward()


def run_attention(dtype):
    q = torch.randn(9, 2, 8).to(dtype).requires_grad_()
    K.varlen_attention(q, q, q, torch.tensor([0, 4, 9]), 5).sum().backward()


def run_layers(dtype):
    x, w, q, cos = (torch.randn(*s).to(dtype) for s in ((9, 8), (8,), (9, 2, 8), (9, 8)))
    K.rms_norm(x, w, 1e-5)
    K.rope(q, q, cos, cos)
    K.swiglu(x, x)
    K.geglu(x, x)


def run_advantages(dtype):
    K.group_advantages(torch.rand(9).to(dtype), [0, 4, 9])


def run_blend(dtype):
    K.blend_gradients([torch.randn(9).to(dtype)], [torch.randn(9).to(dtype)], 0.5)


def run_rows(dtype):
    unpack_rows(pack_rows(torch.zeros(2, 3, dtype=dtype), [0, 1, 3]), [0, 1, 3], 3)


OPS = {
    "head": run_head,
    "varlen_attention": run_attention,
    "layers": run_layers,
    "group_advantages": run_advantages,
    "blend_gradients": run_blend,
    "pack_rows": run_rows,
}


@pytest.mark.parametrize("dtype", (F32, F64), ids=str)
@pytest.mark.parametrize("op", OPS)
def test_the_reference_serves_everything_and_runs_no_kernel_of_ours(op, dtype, force, seed):
    force("reference")
    with Seen() as seen:
        OPS[op](dtype)
    assert not seen.ops


@built
@pytest.mark.parametrize("op", [op for op in OPS if op != "pack_rows"])
def test_the_cpu_backend_runs_our_ops(op, force, seed):
    force("cpu")
    with Seen() as seen:
        OPS[op](F32)
    assert seen.ops


@built
@pytest.mark.parametrize(
    "op, dtype, why",
    (
        ("head", F64, "the tiles take bf16, fp16 and fp32"),
        ("varlen_attention", F64, "the tiles take bf16, fp16 and fp32, this is torch.float64"),
        ("layers", F64, "the kernels take bf16 and fp32"),
        ("blend_gradients", torch.float16, "the kernels take bf16 and fp32, mixed or not"),
        ("pack_rows", F32, "it has no such kernel for cpu"),
    ),
)
def test_what_the_cpu_backend_cannot_serve_is_refused_in_one_line(op, dtype, why, force):
    force("cpu")
    with pytest.raises(BackendRefused) as refused:
        OPS[op](dtype)
    message = str(refused.value)
    assert message.startswith(f"LONGTRACE_BACKEND=cpu cannot serve {op} (") and why in message and "\n" not in message


@pytest.mark.parametrize("name", ("triton", "cuda"))
@pytest.mark.parametrize("op", OPS)
def test_gpu_backends_are_refused_on_cpu_tensors(op, name, force):
    force(name)
    with pytest.raises(BackendRefused, match=rf"LONGTRACE_BACKEND={name} cannot serve {op} \(.*on cpu\): \S"):
        OPS[op](F32)


def test_options_that_a_backend_lacks_are_refused(force, seed):
    force("cpu" if extension.LOADED else "triton")
    h, w, x = torch.randn(4, 8), torch.randn(30, 8), torch.randn(4, 8)
    with pytest.raises(BackendRefused, match="head"):
        K.linear_cross_entropy(h, w, torch.arange(4), label_smoothing=0.1, softcap=5.0)
    with pytest.raises(BackendRefused, match="layers"):
        K.rms_norm(x.bfloat16(), torch.ones(8), 1e-5)
    with pytest.raises(BackendRefused, match="layers"):
        K.rope(x[:, None], x[:, None], x.clone().requires_grad_(), x)


def test_an_unknown_word_is_refused_with_what_is_accepted(force):
    force("gpu")
    expected = "LONGTRACE_BACKEND: found 'gpu'; accepted: reference, cpu, triton, cuda"
    for call in (*(lambda run=run: run(F32) for run in OPS.values()), K.explain):
        with pytest.raises(ValueError) as refused:
            call()
        assert str(refused.value) == expected


def test_every_op_is_forced_on_a_gpu_too(force, monkeypatch):
    here = lambda: (print, "here")  # noqa: E731
    for name in ("_flash_attn_4", "_flash_attn_3", "_flash_attn", "_torch_varlen", "_triton"):
        monkeypatch.setattr(attention, name, here)
    monkeypatch.setattr(backend, "triton_lacks", lambda device: "")
    monkeypatch.setattr(backend, "_choices", {})
    monkeypatch.setattr(layers.liger, "FOUND", True)
    for module in (advantages, blend, rows):
        monkeypatch.setattr(module.cuda, "LOADED", True)
    choices = {
        "head": lambda: head.choose("cuda", BF16),
        "varlen_attention": lambda: attention.choose("cuda", BF16),
        "layers": lambda: layers.choose("cuda", BF16),
        "group_advantages": lambda: advantages.choose("cuda", F32),
        "blend_gradients": lambda: blend.choose("cuda", {BF16, F32}),
        "pack_rows": lambda: rows.choose("cuda"),
    }
    has = {"triton": {"head", "varlen_attention", "layers"}, "reference": set(OPS)}
    has["cuda"] = {"varlen_attention", "group_advantages", "blend_gradients", "pack_rows"}
    for name, ops in has.items():
        force(name)
        for op, choose in choices.items():
            if op in ops:
                assert choose().backend == name and choose().why.startswith("forced by LONGTRACE_BACKEND")
            else:
                with pytest.raises(BackendRefused, match=f"LONGTRACE_BACKEND={name} cannot serve {op}"):
                    choose()
    force("cuda")
    assert attention.choose("cuda", BF16, softcap=True).name == "flash_attn_3"  # the first of that kind that serves
    with pytest.raises(BackendRefused, match="not used with attention sinks"):
        attention.choose("cuda", BF16, sinks=True)
    force(None)
    assert (
        attention.choose("cuda", BF16).name == "flash_attn_4"
        and layers.choose("cuda", BF16, partial=True).name == "PyTorch"
    )


def test_the_heads_engine_follows_dtype_and_options_on_a_gpu(force, monkeypatch):
    monkeypatch.setattr(backend, "_choices", {})
    monkeypatch.setattr(backend, "triton_lacks", lambda device: "")
    assert head.choose("cuda", BF16).name == head.TRITON_TILES
    for dtype, smoothed, lacks in (
        (BF16, True, "the tiles have no label smoothing under a softcap"),
        (torch.float16, False, "the tiles take bf16"),
        (F32, False, "the tiles take bf16"),
    ):
        _, name, why = head.choose("cuda", dtype, elementwise=smoothed)
        assert name == head.TRITON_PASSES and why.endswith(f"; {lacks}")
    assert head.choose("cuda", F64).name == head.PYTORCH
    monkeypatch.setattr(backend, "_choices", {})
    monkeypatch.setattr(backend, "triton_lacks", lambda device: "triton is not installed")
    choice = head.choose("cuda", BF16)
    assert choice.name == head.PYTORCH and choice.why.count("triton is not installed") == 1


def test_a_choice_is_made_once_and_its_reasons_are_kept(force, monkeypatch):
    monkeypatch.setattr(backend, "_choices", {})
    asked = []

    def candidates(device, dtype, wide):
        asked.append((device, dtype, wide))
        yield Candidate("cuda", "fast", "fast takes narrow rows", not wide)
        yield Candidate("cpu", "good", "sums in order")
        yield Candidate("reference", "PyTorch", "")

    def choose(device, dtype, wide=False):
        return backend.choose("op", candidates, device, dtype, wide)

    assert choose("cpu", F32) == ("cuda", "fast", "fast takes narrow rows") == choose("cpu", F32)
    assert choose("cpu", F32, wide=True) == ("cpu", "good", "sums in order; fast takes narrow rows")
    assert choose("cpu", BF16) == choose("cuda", F32) == choose("cpu", F32) and len(asked) == 4
    force("reference")
    for _ in range(2):
        assert choose("cpu", F32) == ("reference", "PyTorch", "forced by LONGTRACE_BACKEND") and len(asked) == 5
    force("cuda")
    with pytest.raises(BackendRefused, match=r"op \(float32, wide, on cpu\): fast takes narrow rows"):
        choose("cpu", F32, wide=True)
    with pytest.raises(BackendRefused, match="it has no such kernel for cpu"):
        force("triton")
        choose("cpu", F32)
    force(None)
    cases = [case for _, case, _ in backend.made()]
    assert cases == ["float32, on cpu", "float32, wide, on cpu", "bfloat16, on cpu", "float32, on cuda"]


def test_shapes_alone_are_not_forced(force):
    x = torch.empty(4, 8, device="meta", dtype=BF16)
    for name in ("cuda", "triton", "reference"):
        force(name)
        assert K.rms_norm(x, x[0], 1e-5).shape == x.shape


def test_the_plan_follows(force):
    shape = (10_000, 576, 49_152, BF16)
    force("reference")
    assert K.plan_chunks(*shape) == K.plan_chunks(*shape, engine=head.PYTORCH)
    if extension.LOADED:
        force("cpu")
        assert K.plan_chunks(*shape) == K.plan_chunks(*shape, engine=head.CPU_TILES)


def test_explain_says_what_was_forced_and_what_is_refused(force, monkeypatch):
    if torch.cuda.is_available():
        monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    force("reference")
    lines = {line.split()[0]: line for line in K.explain().splitlines()}
    assert all("forced by LONGTRACE_BACKEND" in lines[op] for op in OPS)
    force("cuda")
    lines = {line.split()[0]: line for line in K.explain().splitlines()}
    assert all("refused" in lines[op] and f"LONGTRACE_BACKEND=cuda cannot serve {op}" in lines[op] for op in OPS)
    force(None)
    assert "forced" not in K.explain()


def test_explain_keeps_the_reasons_of_what_was_chosen_besides(seed):
    run_attention(F64)
    assert any(
        line.startswith("varlen_attention: float64") and "documents" in line for line in K.explain().splitlines()
    )


def test_the_self_check_holds_under_the_reference_and_leaves_out_what_is_refused(force, monkeypatch):
    monkeypatch.setattr(torch.cuda, "is_available", lambda: False)
    force("reference")
    found = self_check()
    assert all(good for *_, good in found) and not any("C++" in name for op, name, _, _ in found if op != "pack")
    assert {op.split()[0] for op, *_ in found} >= {"linear_weighted_nll", "varlen_attention", "blend_gradients"}
    force("cuda")
    assert [op for op, *_ in self_check()] == ["pack"]


INTERPRETED = """
import torch
from longtrace import kernels as K
q, k = torch.randn(9, 2, 8), torch.randn(9, 1, 8)
out = K.varlen_attention(q, k, k, torch.tensor([0, 9]), 9)
exact = torch.nn.functional.scaled_dot_product_attention(
    *(x.double().transpose(0, 1) for x in (q, k, k)), is_causal=True, enable_gqa=True
)
print(float((out - exact.transpose(0, 1)).abs().max()))
print(K.explain())
"""


def test_the_environment_variable_itself_with_triton_in_its_interpreter():
    pytest.importorskip("triton", reason="pip install 'longtrace[gpu]'")
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", INTERPRETED], cwd=os.path.dirname(sys.executable), capture_output=True,
        text=True, env=os.environ | {"LONGTRACE_BACKEND": "triton", "TRITON_INTERPRET": "1", "CUDA_VISIBLE_DEVICES": ""},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    error, *lines = done.stdout.splitlines()
    assert float(error) < 1e-6
    table = {line.split()[0]: line for line in lines}
    for op in ("head", "varlen_attention"):
        assert "forced by LONGTRACE_BACKEND" in table[op]
    for op in ("layers", "group_advantages", "blend_gradients", "pack_rows"):
        assert f"LONGTRACE_BACKEND=triton cannot serve {op}" in table[op]

"""Packed attention against the float64 reference, and against each document alone."""

from __future__ import annotations

import pytest
import torch

from longtrace import kernels as K
from longtrace.kernels import extension
from longtrace.kernels.attention import reference
from longtrace.kernels.attention.dispatch import choose

LENGTHS = ([7], [1, 1, 1], [5, 0, 12, 3], [300, 40])
OPTIONS = {
    "causal": {},
    "full": {"causal": False},
    "scale": {"scale": 0.3},
    "window": {"window": (4, 0)},
    "window of one key": {"window": (0, 0)},
    "window both sides": {"window": (3, 2), "causal": False},
    "right window": {"window": (-1, 2), "causal": False},
    "wide window": {"window": (1000, 1000)},
    "softcap": {"softcap": 2.0},
    "softcap and window": {"softcap": 2.0, "window": (9, 0)},
    "sinks": {"sinks": True},
    "sinks and window": {"sinks": True, "window": (9, 0)},
}


def make(lengths, lengths_k=None, heads=4, kv_heads=2, D=8, Dv=8, dtype=torch.float64, seed=0):
    generator = torch.Generator().manual_seed(seed)
    lengths_k = lengths if lengths_k is None else lengths_k
    draw = lambda *shape: torch.randn(*shape, generator=generator, dtype=torch.float64).to(dtype).requires_grad_()  # noqa: E731
    offsets = [torch.tensor([0, *lens]).cumsum(0).to(torch.int32) for lens in (lengths, lengths_k)]
    q, k, v = draw(sum(lengths), heads, D), draw(sum(lengths_k), kv_heads, D), draw(sum(lengths_k), kv_heads, Dv)
    return q, k, v, *offsets, draw(heads)


def both(q, k, v, cu, cu_k, sinks, lengths, options):
    options = dict(options)
    inputs = [q, k, v]
    if options.pop("sinks", False):
        options["sinks"] = sinks
        inputs.append(sinks)
    ours = K.varlen_attention(q, k, v, cu, max(lengths, default=0), cu_seqlens_k=cu_k, max_seqlen_k=0, **options)
    exact = reference.varlen_attention(q, k, v, cu, cu_seqlens_k=cu_k, **options)
    return ours, exact, inputs


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_values_and_gradients(lengths, options):
    q, k, v, cu, cu_k, sinks = make(lengths)
    ours, exact, inputs = both(q, k, v, cu, cu_k, sinks, lengths, options)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)
    up = torch.linspace(-1, 1, ours.numel(), dtype=torch.float64).view_as(ours)
    for a, b in zip(*(torch.autograd.grad((x * up).sum(), inputs) for x in (ours, exact))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("lengths_k", ([9, 3, 5, 1], [2, 3, 0, 7], [40, 1, 300, 0]), ids=str)
def test_queries_and_keys_of_different_lengths(lengths_k, options):
    lengths = [4, 3, 6, 1]
    q, k, v, cu, cu_k, sinks = make(lengths, lengths_k)
    ours, exact, inputs = both(q, k, v, cu, cu_k, sinks, lengths, options)
    torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)
    for a, b in zip(*(torch.autograd.grad(x.square().sum(), inputs) for x in (ours, exact))):
        torch.testing.assert_close(a, b, rtol=1e-9, atol=1e-11)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_no_worse_than_torch_in_the_same_dtype(options, dtype):
    lengths = [60, 5, 200]
    q, k, v, cu, cu_k, sinks = make(lengths, D=16, Dv=16, dtype=dtype)
    ours, theirs, _ = both(q, k, v, cu, cu_k, sinks, lengths, options)
    wide = [x.detach().double() for x in (q, k, v)]
    _, exact, _ = both(*wide, cu, cu_k, sinks.detach().double(), lengths, options)
    assert ours.dtype == dtype
    assert (ours - exact).norm() <= (theirs - exact).norm() + 1e-6 * exact.norm()


def test_multi_query_and_different_value_width():
    lengths = [11, 30]
    q, k, v, cu, cu_k, sinks = make(lengths, heads=6, kv_heads=1, D=8, Dv=5)
    for options in OPTIONS.values():
        ours, exact, _ = both(q, k, v, cu, cu_k, sinks, lengths, options)
        torch.testing.assert_close(ours, exact, rtol=1e-10, atol=1e-12)


def test_documents_do_not_see_each_other():
    q, k, v, cu, *_ = make([20, 13])
    packed = K.varlen_attention(q, k, v, cu, 20)
    changed = v.detach().clone()
    changed[:20] = float("nan")
    again = K.varlen_attention(q, k, changed, cu, 20)
    assert torch.equal(packed[20:], again[20:]) and again[:20].isnan().any()


def test_no_tokens_at_all():
    q, k, v, cu, *_ = make([0, 0])
    assert K.varlen_attention(q, k, v, cu, 0).shape == (0, 4, 8)


def test_window_and_softcap_memory_is_linear():
    """Nothing kept for the backward is as large as the scores of the longest document."""
    n = 4096
    q, k, v, cu, *_ = make([n], heads=1, kv_heads=1, D=4, Dv=4, dtype=torch.float32)
    for options in ({"window": (63, 0)}, {"softcap": 5.0}):
        largest = 0

        def see(tensor):
            nonlocal largest
            largest = max(largest, tensor.numel())
            return tensor

        with torch.autograd.graph.saved_tensors_hooks(see, lambda t: t):
            K.varlen_attention(q, k, v, cu, n, **options)
        assert largest <= 512 * n, (options, largest)


def test_bad_input_is_named():
    q, k, v, cu, *_ = make([5, 3])
    good = dict(q=q, k=k, v=v, cu_seqlens=cu, max_seqlen=5)
    cases = [
        (dict(cu_seqlens=torch.tensor([1, 8])), "must run from 0 to 8"),
        (dict(cu_seqlens=torch.tensor([0, 7])), "must run from 0 to 8"),
        (dict(cu_seqlens=torch.tensor([0, 6, 4, 8])), "must not decrease"),
        (dict(cu_seqlens=torch.tensor([0.0, 8.0])), "int32 or int64"),
        (dict(cu_seqlens=torch.tensor([], dtype=torch.int32)), "int32 or int64"),
        (dict(cu_seqlens_k=torch.tensor([0, 8])), "2 documents of queries, 1 of keys"),
        (dict(q=q[:, :3]), "no multiple"),
        (dict(k=k.float()), "accepted: one dtype"),
        (dict(k=k[:, :, :4]), "do not fit"),
        (dict(q=q[None]), r"must be \(tokens, heads, D\)"),
        (dict(sinks=torch.zeros(3)), "sinks has shape"),
        (dict(softcap=0.0), "softcap"),
    ]
    for change, message in cases:
        with pytest.raises(ValueError, match=message):
            K.varlen_attention(**(good | change))


def test_the_choice_of_a_backend_has_a_reason():
    assert choose("cpu", torch.bfloat16).name == ("tiles" if extension.LOADED else "documents")
    assert choose("cpu", torch.float64).name == "documents"
    assert "fp32" in choose("cuda", torch.float32).why or "float32" in choose("cuda", torch.float32).why
    assert "sinks" in choose("cuda", torch.bfloat16, sinks=True).why
    _, name, why = choose("cuda", torch.bfloat16)
    assert name in ("flash_attn_4", "flash_attn_3", "flash_attn", "torch_varlen", "triton", "documents") and why


def test_the_triton_kernels_serve_what_libraries_lack(monkeypatch):
    from longtrace.kernels import backend
    from longtrace.kernels.attention import dispatch

    monkeypatch.setattr(backend, "triton_lacks", lambda device: "")
    here = lambda: (print, "here")  # noqa: E731
    away = lambda: (None, "away")  # noqa: E731

    def pick(four, three, two, torchs, ours, *args, **options):
        for name, function in zip(
            ("_flash_attn_4", "_flash_attn_3", "_flash_attn", "_torch_varlen", "_triton"),
            (four, three, two, torchs, ours),
        ):
            monkeypatch.setattr(dispatch, name, function)
        monkeypatch.setattr(backend, "_choices", {})  # what was chosen before the change
        choice = choose("cuda", *args, **options)
        assert choice.why
        return choice.name

    bf16 = torch.bfloat16
    assert pick(here, here, here, here, here, bf16) == "flash_attn_4"
    assert pick(here, here, here, here, here, bf16, window=True) == "flash_attn_3"
    assert pick(here, away, here, here, here, bf16, softcap=True) == "flash_attn"
    assert pick(here, away, here, here, here, bf16, widths=(256, 256)) == "flash_attn"
    assert pick(away, away, away, here, here, bf16) == "torch_varlen"
    assert pick(away, away, away, here, here, bf16, softcap=True) == "triton"
    assert pick(away, away, away, away, here, bf16) == "triton"
    for options in ({"sinks": True}, {"widths": (64, 32)}, {"widths": (20, 20)}):
        assert pick(here, here, here, here, here, bf16, **options) == "triton"
        assert pick(here, here, here, here, away, bf16, **options) == "documents"
    assert pick(here, here, here, here, here, torch.float32) == "triton"
    assert pick(here, here, here, here, here, torch.float64) == "documents"
    assert pick(away, away, away, here, away, bf16, softcap=True) == "documents"

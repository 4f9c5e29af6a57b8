"""The C++ attention tiles: errors by the project's rule, bits that depend on nothing but the document, odd shapes."""

from __future__ import annotations

import os
import subprocess
import sys

import pytest
import torch
import torch.nn.functional as F

from longtrace import kernels as K
from longtrace.kernels import extension
from longtrace.kernels.attention import reference

pytestmark = pytest.mark.skipif(not extension.LOADED, reason="longtrace.kernels._C is not built")

SHAPES = {  # query lengths, key lengths, heads, kv heads, D, Dv
    "grouped": ([50, 0, 1, 700, 33], None, 9, 3, 64, 64),
    "multi-query, wide values": ([300], None, 8, 1, 96, 128),
    "256 wide": ([257], None, 2, 2, 256, 256),
    "odd widths": ([70, 90], None, 4, 2, 80, 20),
    "cached keys": ([1, 7, 300], [900, 7, 640], 6, 2, 128, 64),
    "more queries than keys": ([300, 40], [120, 0], 3, 1, 64, 64),
}
OPTIONS = {
    "causal": {},
    "full": {"causal": False},
    "window": {"window": (37, 0)},
    "window both sides": {"window": (290, 20), "causal": False},
    "softcap and sinks": {"softcap": 4.0, "sinks": True},
    "sinks and window": {"window": (5, 0), "sinks": True, "scale": 0.2},
}


def make(shape, dtype, seed=0, spread=1.0):
    lengths, lengths_k, heads, kv_heads, D, Dv = shape
    generator = torch.Generator().manual_seed(seed)
    draw = lambda *s: torch.randn(*s, generator=generator, dtype=torch.float64)  # noqa: E731
    lengths_k = lengths_k or lengths
    q, k, v = (
        spread * draw(sum(lengths), heads, D),
        draw(sum(lengths_k), kv_heads, D),
        draw(sum(lengths_k), kv_heads, Dv),
    )
    offsets = [torch.tensor([0, *x]).cumsum(0).int() for x in (lengths, lengths_k)]
    return [x.to(dtype) for x in (q, k, v, draw(heads), draw(sum(lengths), heads, Dv))], offsets


def run(function, tensors, offsets, options, dtype=None, **more):
    """The output and the gradients of q, k, v and, where they take part, of the sinks."""
    q, k, v, sinks, grad = (x.detach().to(dtype or x.dtype) for x in tensors)
    options = dict(options)
    leaves = [q, k, v]
    if options.pop("sinks", False):
        leaves.append(sinks)
        options["sinks"] = sinks
    for x in leaves:
        x.requires_grad_()
    out = function(q, k, v, offsets[0], **more, cu_seqlens_k=offsets[1], **options)
    return [out, *torch.autograd.grad(out, leaves, grad)]


def ours(tensors, offsets, options):
    return run(K.varlen_attention, tensors, offsets, options, max_seqlen=0, max_seqlen_k=0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float16, torch.float32), ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
@pytest.mark.parametrize("shape", SHAPES.values(), ids=SHAPES)
def test_errors_are_no_larger_than_torchs(shape, options, dtype, seed):
    tensors, offsets = make(shape, dtype, seed)
    exact = run(reference.varlen_attention, tensors, offsets, options, torch.float64)
    plain = run(reference.varlen_attention, tensors, offsets, options)
    # the tiles store log-sums, not probabilities, and take delta from the output: flash attention's backward, whose fp32
    # errors reach twice those of whole matrices (torch's own: 1.6 times on the same draws)
    atol = 8 * torch.finfo(torch.float32).eps
    for name, a, b, c in zip(("out", "dq", "dk", "dv", "dsinks"), ours(tensors, offsets, options), plain, exact):
        assert a.dtype == dtype and a.shape == c.shape
        if name == "dsinks":  # a few numbers, summed from delta, that is from the output as rounded
            atol = max(atol, torch.finfo(dtype).eps)
        assert (a - c).norm() <= (b - c).norm() + atol * c.norm(), (name, (a - c).norm() / c.norm())


@pytest.mark.parametrize("spread", (30.0, 3000.0))
def test_scores_far_apart(spread, seed):
    """Later blocks hold scores far above the first block's reference: 2^60 and more."""
    shape = ([900], None, 3, 1, 64, 64)
    for dtype in (torch.float32, torch.bfloat16):
        tensors, offsets = make(shape, dtype, seed, spread)
        exact = run(reference.varlen_attention, tensors, offsets, {}, torch.float64)
        plain = run(reference.varlen_attention, tensors, offsets, {})
        for a, b, c in zip(ours(tensors, offsets, {}), plain, exact):
            assert a.isfinite().all()
            assert (a - c).norm() <= (b - c).norm() + 1e-5 * c.norm()


def test_offsets_of_the_scores_change_nothing(seed):
    """Keys that share a large part add 1e4 to every score of a query."""
    tensors, offsets = make(([600], None, 2, 1, 32, 32), torch.float32, seed)
    q, k, v, *_ = tensors
    q = torch.cat([q, torch.full_like(q[..., :1], 100.0)], -1)
    plain, moved = (torch.cat([k, torch.full_like(k[..., :1], x)], -1) for x in (0.0, 100.0))
    a, b = (K.varlen_attention(q, x, v, offsets[0], 600, scale=1.0) for x in (plain, moved))
    # a score near 1e4 holds its fraction to 1e-3
    torch.testing.assert_close(a, b, atol=5e-3, rtol=0)


@pytest.mark.parametrize("dtype", (torch.bfloat16, torch.float32), ids=str)
@pytest.mark.parametrize("options", OPTIONS.values(), ids=OPTIONS)
def test_threads_and_neighbours_change_no_bit(options, dtype, seed):
    lengths = [40, 700, 1, 0, 300]
    tensors, offsets = make((lengths, None, 6, 2, 64, 64), dtype, seed)
    packed = ours(tensors, offsets, options)
    before = torch.get_num_threads()
    try:
        for threads in (2, 3, 2):
            torch.set_num_threads(threads)
            assert all(torch.equal(a, b) for a, b in zip(packed, ours(tensors, offsets, options)))
    finally:
        torch.set_num_threads(before)
    start = 0
    for n in lengths:
        q, k, v, sinks, grad = tensors
        part = slice(start, start + n)
        alone = ours([q[part], k[part], v[part], sinks, grad[part]], [torch.tensor([0, n])] * 2, options)
        assert all(torch.equal(a, b[part]) for a, b in zip(alone[:4], packed[:4]))
        start += n


def test_strided_inputs_and_gradients(seed):
    tensors, offsets = make(([130, 20], None, 4, 2, 64, 64), torch.bfloat16, seed)
    strided = [x.transpose(0, 1).contiguous().transpose(0, 1) if x.ndim == 3 else x for x in tensors]
    assert not strided[0].is_contiguous()
    for a, b in zip(ours(tensors, offsets, {}), ours(strided, offsets, {})):
        assert torch.equal(a, b)


def test_against_sdpa_on_a_long_document(seed):
    tensors, offsets = make(([3000], None, 2, 1, 64, 64), torch.bfloat16, seed)
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in tensors[:3])
    wide = F.scaled_dot_product_attention(q.double(), k.double(), v.double(), is_causal=True, enable_gqa=True)
    theirs = F.scaled_dot_product_attention(q, k, v, is_causal=True, enable_gqa=True)
    wide, theirs = wide[0].transpose(0, 1), theirs[0].transpose(0, 1)
    error = (ours(tensors, offsets, {})[0] - wide).norm()
    assert error <= (theirs - wide).norm() + 1e-4 * wide.norm()


def test_a_nan_stays_in_its_document_and_behind_its_query(seed):
    tensors, offsets = make(([20, 500, 40], None, 3, 1, 64, 64), torch.bfloat16, seed)
    clean = ours(tensors, offsets, {})
    tensors[0][30] = float("nan")  # one query of the second document
    dirty = ours(tensors, offsets, {})
    others = torch.arange(560) != 30
    assert torch.equal(clean[0][others], dirty[0][others]) and dirty[0][30].isnan().all()
    assert torch.equal(clean[1][others], dirty[1][others])
    outside = (torch.arange(560) < 20) | (torch.arange(560) >= 520)
    for a, b in zip(clean[2:], dirty[2:]):
        assert torch.equal(a[outside], b[outside])


def test_double_backward_is_refused(seed):
    tensors, offsets = make(([9], None, 1, 1, 32, 32), torch.float32, seed)
    q, k, v = (x.requires_grad_() for x in tensors[:3])
    with pytest.raises(RuntimeError, match="differentiable once"):
        torch.autograd.grad(K.varlen_attention(q, k, v, offsets[0], 9).sum(), q, create_graph=True)


def test_window_sides_of_any_size(seed):
    tensors, offsets = make(([40], None, 2, 1, 32, 32), torch.float32, seed)
    for window in ((2**63 - 1, 2**63 - 1), (-1, 2**63 - 1), (2**63 - 1, 0)):
        a, b = (ours(tensors, offsets, {"causal": window[1] == 0} | more) for more in ({"window": window}, {}))
        assert all(torch.equal(x, y) for x, y in zip(a, b))


FAR = """
import sys, pytest
sys.exit(pytest.main(["--import-mode=importlib", "-q", "-p", "no:cacheprovider", "-k", "far_apart or grouped", sys.argv[1]]))
"""


@pytest.mark.parametrize("capability", ("baseline", pytest.param("avx2", marks=pytest.mark.slow)))
def test_narrower_instruction_sets(capability, tmp_path):
    """The cases of this file that move the reference, in a process that uses no more than `capability`."""
    done = subprocess.run(
        [sys.executable, "-c", FAR, __file__], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"LONGTRACE_CPU_CAPABILITY": capability},
    )  # fmt: skip
    assert done.returncode == 0 and " passed" in done.stdout, done.stdout[-3000:] + done.stderr[-1000:]


@pytest.mark.parametrize("width", (0, 257, 512))
def test_unsupported_head_dim_names_what_is(width):
    q = torch.zeros(4, 2, width)
    with pytest.raises(ValueError, match=f"head_dim {width}.*accepted: 1 to 256"):
        K.varlen_attention(q, q, q, torch.tensor([0, 4]), 4)


def test_what_is_saved_is_linear(seed):
    """Inputs, output and two numbers a row and head: nothing of the size of the scores."""
    tensors, offsets = make(([2000], None, 2, 1, 32, 32), torch.float32, seed)
    q, k, v = (x.requires_grad_() for x in tensors[:3])
    saved = []
    with torch.autograd.graph.saved_tensors_hooks(lambda t: saved.append(t.numel()) or t, lambda t: t):
        K.varlen_attention(q, k, v, offsets[0], 2000)
    assert sum(saved) <= 2 * q.numel() + 2 * k.numel() + 2 * 2 * 2000 + 8


def test_fakes_agree_with_the_ops(seed):
    tensors, offsets = make(([40, 9], None, 4, 2, 32, 64), torch.float32, seed)
    q, k, v, _, grad = tensors
    starts = [x.long() for x in offsets]
    args = (q, k, v, *starts, 0.1, 0.0, True, -1, -1)
    torch.library.opcheck(torch.ops.longtrace.attention_forward.default, (*args, None), test_utils="test_faketensor")
    outputs = torch.ops.longtrace.attention_forward(*args, None)
    back = (grad, q, k, v, *outputs, *starts, 0.1, 0.0, True, -1, -1)
    torch.library.opcheck(torch.ops.longtrace.attention_backward.default, back, test_utils="test_faketensor")


@pytest.mark.slow
def test_a_document_of_64k_tokens(seed):
    """Few heads, so that float64 rows of the last queries are affordable."""
    n = 65_536
    tensors, offsets = make(([n], None, 1, 1, 64, 64), torch.bfloat16, seed)
    q, k, v, *_ = tensors
    out, dq, dk, dv = ours(tensors, offsets, {})
    assert all(x.isfinite().all() for x in (out, dq, dk, dv))
    rows = torch.tensor([0, 1, 31, 32, 255, 256, 30_000, n - 1])
    for row in rows.tolist():
        scores = (k[: row + 1, 0].double() @ q[row, 0].double()) * 64**-0.5
        exact = torch.softmax(scores, 0) @ v[: row + 1, 0].double()
        assert (out[row, 0] - exact).norm() <= 5e-3 * exact.norm()

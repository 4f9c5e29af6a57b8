"""Decoding: one query a document, over caches with gaps, against the float64 reference."""

import pytest
import torch

from longtrace.kernels import extension, varlen_attention
from longtrace.kernels.attention import reference, tile

pytestmark = pytest.mark.skipif(not extension.LOADED, reason=extension.WHY)


def caches(lengths, gaps, seed, heads=6, kv_heads=2, D=64, Dv=64, dtype=torch.bfloat16, scale=1.0):
    """q, k, v and offsets of a row in which documents with one query alternate with gaps that have none."""
    torch.manual_seed(seed)
    keys, queries = [0], [0]
    for gap, length in zip(gaps, lengths):
        keys += [keys[-1] + gap, keys[-1] + gap + length]
        queries += [queries[-1], queries[-1] + 1]
    q = torch.randn(len(lengths), heads, D) * scale
    k, v = torch.randn(keys[-1], kv_heads, D) * scale, torch.randn(keys[-1], kv_heads, Dv)
    return *(x.to(dtype) for x in (q, k, v)), torch.tensor(queries), torch.tensor(keys)


CASES = {
    "plain": {},
    "multi-query": {"heads": 8, "kv_heads": 1},
    "wide group": {"heads": 20, "kv_heads": 2},
    "no groups": {"heads": 3, "kv_heads": 3},
    "odd widths": {"D": 24, "Dv": 40},
    "narrow": {"D": 3, "Dv": 1},
    "widest": {"D": 256, "Dv": 256},
    "sharp": {"scale": 6.0},
}
HOW = {
    "none": {},
    "window": {"window": (7, 0)},
    "softcap": {"softcap": 5.0},
    "sinks": {"sinks": True},
    "all": {"window": (100, 0), "softcap": 20.0, "sinks": True, "scale": 0.3},
}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("how", HOW)
@pytest.mark.parametrize("case", CASES)
def test_values_are_the_references(case, how, dtype, seed):
    lengths, gaps = (1, 63, 64, 65, 0, 300, 129, 2), (0, 5, 0, 1, 70, 0, 64, 3)
    q, k, v, queries, keys = caches(lengths, gaps, seed, dtype=dtype, **CASES[case])
    options = dict(HOW[how])
    if options.get("sinks"):
        options["sinks"] = 2 * torch.randn(q.shape[1])
    got = varlen_attention(q, k, v, queries, 1, cu_seqlens_k=keys, max_seqlen_k=400, **options)
    sinks = options.pop("sinks", None)

    def plain(dtype):
        return reference.varlen_attention(
            *(x.to(dtype) for x in (q, k, v)), queries, cu_seqlens_k=keys,
            sinks=None if sinks is None else sinks.to(dtype), **options,
        )  # fmt: skip

    exact, same_dtype = plain(torch.float64), plain(dtype)
    options["sinks"] = sinks
    assert got.dtype == dtype and got.shape == exact.shape
    error, allowed = ((x.double() - exact).abs().max() for x in (got, same_dtype))
    assert error <= allowed + (2.0**-9 if dtype == torch.bfloat16 else 2.0**-21) * v.abs().max()
    empty = [i for i, n in enumerate(lengths) if n == 0]
    if sinks is None:
        assert torch.count_nonzero(got[empty]) == 0
    torch.set_num_threads(3)
    try:
        again = varlen_attention(q, k, v, queries, 1, cu_seqlens_k=keys, max_seqlen_k=400, **options)
    finally:
        torch.set_num_threads(1)  # as tests/conftest.py has it
    assert torch.equal(got, again)


def test_the_neighbours_of_a_slot_do_not_matter(seed):
    """Gaps may hold anything, NaN too."""
    q, k, v, queries, keys = caches((40, 70), (30, 30), seed)
    got = varlen_attention(q, k, v, queries, 1, cu_seqlens_k=keys, max_seqlen_k=100)
    for x in (k, v):
        x[:30] = float("nan")
        x[70:100] = float("inf")
    assert torch.equal(got, varlen_attention(q, k, v, queries, 1, cu_seqlens_k=keys, max_seqlen_k=100))


def test_far_apart_scores_stay_finite(seed):
    q, k, v, queries, keys = caches((200,), (0,), seed, dtype=torch.float32)
    k[100] = 1e4 * q[0, 0]
    k[5] = -1e4 * q[0, 0]
    got = varlen_attention(q, k, v, queries, 1, cu_seqlens_k=keys, max_seqlen_k=200)
    assert got.isfinite().all()
    torch.testing.assert_close(got[0, 0], v[100, 0])


def test_gradients_take_the_tiles(seed):
    q, k, v, queries, keys = caches((9, 40), (2, 0), seed, dtype=torch.float32)
    served = tile._decodes(q, k, v, None, queries.tolist())
    assert served and not tile._decodes(q.requires_grad_(), k, v, None, queries.tolist())
    with_gradient = varlen_attention(q, k, v, queries, 1, cu_seqlens_k=keys, max_seqlen_k=40)
    with_gradient.sum().backward()
    assert q.grad.isfinite().all()
    with torch.no_grad():
        torch.testing.assert_close(
            with_gradient, varlen_attention(q, k, v, queries, 1, cu_seqlens_k=keys, max_seqlen_k=40)
        )

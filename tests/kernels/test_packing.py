"""Packing: nothing lost, C++ and Python alike, fill and speed on real trace lengths."""

from __future__ import annotations

import json

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from longtrace import kernels as K
from longtrace.kernels.packing import dispatch
from longtrace.kernels.packing.reference import best_fit_decreasing


def check(bins, lengths, capacity):
    assert sorted(row for b in bins for row in b) == list(range(len(lengths)))
    assert all(b for b in bins)
    assert max((sum(lengths[row] for row in b) for b in bins), default=0) <= capacity


def naive(lengths, capacity):
    """Best fit by looking at every bin; the newest of equally full ones wins."""
    bins, rooms, reached = [], [], []
    for clock, row in enumerate(sorted(range(len(lengths)), key=lambda i: -lengths[i])):
        fits = [(rooms[b], -reached[b], b) for b in range(len(bins)) if rooms[b] >= lengths[row] and rooms[b] > 0]
        if fits:
            b = min(fits)[2]
        else:
            b = len(bins)
            bins.append([]), rooms.append(capacity), reached.append(0)
        bins[b].append(row)
        rooms[b] -= lengths[row]
        reached[b] = clock
    return bins


@settings(max_examples=150, deadline=None)
@given(st.integers(1, 300).flatmap(lambda c: st.tuples(st.lists(st.integers(0, c), max_size=60), st.just(c))))
def test_every_row_once_and_best_fit(problem):
    lengths, capacity = problem
    bins = K.pack(lengths, capacity)
    check(bins, lengths, capacity)
    assert bins == best_fit_decreasing(lengths, capacity) == naive(lengths, capacity)


@pytest.mark.parametrize("capacity", (1, 63, 64, 65, 4095, 4096, 4097, 300_000))
def test_cpp_and_python_agree_around_bitmap_borders(capacity):
    lengths = np.random.default_rng(capacity).integers(0, capacity + 1, 3000).tolist()
    bins = K.pack(lengths, capacity)
    check(bins, lengths, capacity)
    assert bins == best_fit_decreasing(lengths, capacity)


def test_arrays_and_tensors_are_taken():
    import torch

    assert K.pack(np.array([3, 5], dtype=np.uint32), 8) == K.pack(torch.tensor([3, 5]), 8) == K.pack([3, 5], 8)
    assert K.pack([], 8) == []


@pytest.mark.parametrize("lengths, message", (([3, 9], "row 1 has 9 tokens"), ([-1], "row 0 has -1 tokens")))
def test_rows_that_do_not_fit_are_named(lengths, message):
    with pytest.raises(ValueError, match=message):
        K.pack(lengths, 8)


def test_capacity_must_be_positive():
    with pytest.raises(ValueError, match="capacity"):
        K.pack([1], 0)


def fill(lengths, capacity):
    """Share of the rows' slots that a packing fills."""
    bins = K.pack(lengths, capacity)
    check(bins, lengths, capacity)
    return sum(lengths) / (len(bins) * capacity)


def draw(lengths, capacity, seed=0):
    lengths = np.asarray(lengths)
    return np.random.default_rng(seed).choice(lengths[lengths <= capacity], 242_000).tolist()


@pytest.mark.skipif(dispatch._pack is None, reason=dispatch.WHY)
def test_242_000_real_lengths_fill_rows(shared):
    """gpt-oss-120b token counts (median 29k) in rows of 128k."""
    path = shared / "data" / "tokens" / "gptoss120b_aimo3_tokens.npz"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    lengths = draw(np.load(path)["lengths"], 131_072)
    filled = fill(lengths, 131_072)
    assert filled >= 0.995, filled


@pytest.mark.skipif(dispatch._pack is None, reason=dispatch.WHY)
@pytest.mark.parametrize("capacity", (8192, 16_384))
def test_short_real_lengths_fill_rows(shared, capacity):
    """R1-Distill traces capped near 2k tokens, at 3.2 characters a token."""
    path = shared / "data" / "traces" / "r1_distill_short_1200.jsonl"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    rows = [json.loads(line) for line in path.open()]
    lengths = draw([int((len(row["problem"]) + len(row["trace"])) / 3.2) for row in rows], capacity)
    filled = fill(lengths, capacity)
    assert filled >= 0.995, filled


@pytest.mark.skipif(dispatch._pack is None, reason=dispatch.WHY)
def test_where_no_packing_can_fill_the_bins_stay_near_the_lower_bound(shared):
    """Rows of 32k for traces of median 29k: two thirds are longer than half a row, and no two of those share one."""
    path = shared / "data" / "tokens" / "gptoss120b_aimo3_tokens.npz"
    if not path.exists():
        pytest.skip(f"no {path.name}")
    lengths = draw(np.load(path)["lengths"], 32_768)
    bound = max(sum(n > 16_384 for n in lengths), -(-sum(lengths) // 32_768))
    assert len(K.pack(lengths, 32_768)) <= 1.03 * bound


@pytest.mark.skipif(dispatch._pack is None, reason=dispatch.WHY)
@pytest.mark.parametrize("capacity", (16_384, 32_768))
def test_lognormal_lengths_fill_rows(capacity):
    # median 3,000, a tail to the capacity: the shape of published reasoning traces
    lengths = np.exp(np.random.default_rng(1).normal(np.log(3000), 0.9, 242_000)).astype(int)
    lengths = lengths[lengths <= capacity].tolist()
    filled = fill(lengths, capacity)
    assert filled >= 0.995, filled


def test_lengths_must_be_whole_numbers():
    with pytest.raises(TypeError):
        K.pack([2.9], 5)

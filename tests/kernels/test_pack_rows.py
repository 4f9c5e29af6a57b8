"""Rows of padded batches into packed ones and back: exact, each the other's gradient, refusals."""

from __future__ import annotations

import itertools

import pytest
import torch

from longtrace.kernels.packing import pack_rows, unpack_rows

LENGTHS = ((3, 0, 5, 1), (4,), (0, 0), ())


@pytest.mark.parametrize("row", ((), (3,), (2, 4)), ids=str)
@pytest.mark.parametrize("lengths", LENGTHS, ids=str)
def test_rows_and_back(seed, lengths, row):
    cu, width = [0, *itertools.accumulate(lengths)], max(lengths, default=0) + 2
    padded = torch.randn(len(lengths), width, *row)
    packed = pack_rows(padded, cu)
    assert torch.equal(packed, torch.cat([padded.new_empty(0, *row), *(x[:n] for x, n in zip(padded, lengths))]))
    back = unpack_rows(packed, torch.tensor(cu, dtype=torch.int32), width)
    assert back.shape == padded.shape
    for x, y, n in zip(padded, back, lengths):
        assert torch.equal(x[:n], y[:n]) and not y[n:].any()


def test_each_is_the_others_gradient(seed):
    cu = [0, 2, 2, 5]
    padded = torch.randn(3, 4, 2, dtype=torch.float64, requires_grad=True)
    packed = torch.randn(5, 2, dtype=torch.float64, requires_grad=True)
    assert torch.autograd.gradcheck(lambda x: pack_rows(x, cu), padded)
    assert torch.autograd.gradcheck(lambda x: unpack_rows(x, cu, 4), packed)


@pytest.mark.parametrize("dtype", (torch.bool, torch.int64, torch.bfloat16), ids=str)
def test_other_dtypes_and_strides(dtype):
    padded = torch.arange(24).view(4, 3, 2).to(dtype).transpose(0, 1)  # (3, 4, 2)
    packed = pack_rows(padded, [0, 1, 1, 5])
    assert packed.dtype == dtype and torch.equal(packed, torch.cat((padded[0, :1], padded[2])))


def test_what_does_not_fit_is_named():
    with pytest.raises(ValueError, match="document 1 has 4 rows, more than the width 3"):
        pack_rows(torch.zeros(2, 3), [0, 1, 5])
    with pytest.raises(ValueError, match=r"cu_seqlens\[2\] is 1, below cu_seqlens\[1\] = 2"):
        pack_rows(torch.zeros(2, 3), [0, 2, 1])
    with pytest.raises(ValueError, match=r"padded must be \(2, width, ...\), got \(3, 3\)"):
        pack_rows(torch.zeros(3, 3), [0, 1, 2])
    with pytest.raises(ValueError, match=r"cu_seqlens\[1\] is 2; it must be 3, the number of rows"):
        unpack_rows(torch.zeros(3), [0, 2], 4)
    with pytest.raises(ValueError, match="document 0 has 3 rows, more than the width 2"):
        unpack_rows(torch.zeros(3), [0, 3], 2)

"""The guard around interpreted launches: what it takes for an element, and that it notices kernels that are wrong."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from triton_cases import FAR, check_group, far_rows
from triton_guard import Argument, GuardError, merged


def test_wrong_kernels_are_noticed():
    check_group(Path(__file__).with_name("triton_guard_interpreted.py"), "guard", 13)


@pytest.mark.parametrize(
    "view, dims",
    [
        (torch.zeros(6, 4), [(24, 1)]),
        (torch.zeros(6, 4).t(), [(24, 1)]),
        (torch.zeros(6, 4)[:, 1:3], [(6, 4), (2, 1)]),
        (torch.zeros(5, 6, 4)[:, ::2].transpose(0, 2), [(15, 8), (4, 1)]),
        (torch.zeros(3).expand(7, 3), [(3, 1)]),
        (torch.zeros(()), []),
    ],
)
def test_the_elements_of_a_view_are_all_there_is(view, dims):
    assert merged(view.shape, view.stride()) == dims
    argument = Argument(view, 1)
    size = view.element_size()
    own = {
        size * int(np.dot(index, view.stride())) for index in np.ndindex(*view.shape)
    }  # byte offsets from the view's start
    assert argument.numel == len(own)
    for offset in range(-8, max(own) + 12):
        at = np.array([argument.base + offset], dtype=np.uint64)
        if offset in own:
            assert 0 <= argument.places(at)[0] < argument.numel
        else:
            with pytest.raises(GuardError, match="out of bounds"):
                argument.places(at)


def test_addresses_translate_back_to_the_tensor():
    for number in (1, 5):
        x = torch.arange(7)[2:]
        argument = Argument(x, number)
        assert argument.base % 16 == x.data_ptr() % 16  # as aligned as it was
        assert int(np.array([argument.base + 8], dtype=np.uint64)[0] + argument.shift) == x.data_ptr() + 8


def test_far_rows_hold_their_values_in_few_pages():
    rows = torch.arange(12, dtype=torch.bfloat16).view(3, 4)
    far = far_rows(rows, FAR // 2)
    assert torch.equal(far, rows) and far.stride() == (FAR // 2, 1) and 2 * far.stride(0) > 2**31

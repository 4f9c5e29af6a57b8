"""The Triton attention kernels in the interpreter, against float64: the cases are in triton_attention_interpreted.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from triton_cases import check_group

SCRIPT = Path(__file__).with_name("triton_attention_interpreted.py")
CASES = {"options": 21, "shapes": 26, "random": 6, "more": 34, "shipped": 10}  # how many have to report
SLOW = ("more", "shipped")


@pytest.mark.parametrize("group", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in CASES])
def test_interpreted(group):
    check_group(SCRIPT, group, CASES[group])

"""The Triton head kernels in the interpreter, against float64: the cases are in triton_head_interpreted.py."""

from __future__ import annotations

from pathlib import Path

import pytest
from triton_cases import check_group

SCRIPT = Path(__file__).with_name("triton_head_interpreted.py")
CASES = {"rows": 37, "columns": 9, "tile": 27}  # how many have to report


@pytest.mark.parametrize("group", CASES)
def test_interpreted(group):
    check_group(SCRIPT, group, CASES[group])

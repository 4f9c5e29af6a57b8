"""The Triton head kernels in the interpreter, against float64: the cases are in triton_interpreted.py.

A group of cases runs in a process of its own with TRITON_INTERPRET=1, so the setting reaches no other test; a group is
one test, so that workers of a parallel run never repeat its imports.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("triton_interpreted.py")
CASES = {"rows": 36, "columns": 8, "tile": 41}  # how many have to report


@pytest.mark.parametrize("group", list(CASES))
def test_interpreted(group):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install 'longtrace[gpu]'")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), group], env=environment, capture_output=True, text=True, timeout=600
    )
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    if "" in results:
        pytest.skip(results[""])
    assert len(results) == CASES[group], f"{len(results)} cases reported"
    failed = {name: problem for name, problem in results.items() if problem}
    assert not failed, "\n".join(f"{name}\n{problem}" for name, problem in failed.items())

"""The Triton attention kernels in the interpreter, against float64: the cases are in triton_attention_interpreted.py.

A group of cases runs in a process of its own with TRITON_INTERPRET=1, so the setting reaches no other test.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

SCRIPT = Path(__file__).with_name("triton_attention_interpreted.py")
CASES = {"options": 20, "shapes": 19, "random": 6, "more": 34, "shipped": 10}  # how many have to report
SLOW = ("more", "shipped")


@pytest.mark.parametrize("group", [pytest.param(x, marks=pytest.mark.slow) if x in SLOW else x for x in CASES])
def test_interpreted(group):
    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install 'longtrace[gpu]'")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(SCRIPT), group], env=environment, capture_output=True, text=True, timeout=1800
    )
    print(done.stdout[:4000])  # the seeds
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    if "" in results:
        pytest.skip(results[""])
    assert len(results) == CASES[group], f"{len(results)} cases reported"
    failed = {name: problem for name, problem in results.items() if problem}
    assert not failed, "\n".join(f"{name}\n{problem}" for name, problem in failed.items())

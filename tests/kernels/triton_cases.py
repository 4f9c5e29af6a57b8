"""Cases that run in Triton's interpreter: how a script registers and runs them, and how a test starts the script.

Triton reads its environment when it is imported and would keep the interpreter for every later test, so a group of cases
runs in a process of its own, and no import of triton happens before a case runs.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import os
import subprocess
import sys
import traceback
from collections.abc import Callable
from pathlib import Path

import torch

CASES: dict[str, dict[str, functools.partial]] = {}


def case(group, *variants):
    """Register a function once for each tuple of arguments."""

    def register(function):
        for values in variants or [()]:
            name = " ".join([function.__name__, *(str(v).replace("torch.", "") for v in values)])
            CASES.setdefault(group, {})[name] = functools.partial(function, *values)
        return function

    return register


def run_group(group: str, smallest: Callable[[], object], **errors: str) -> None:
    """Print {case: "" or what went wrong} as the last line; {"": why} if `smallest` shows that nothing can run here.

    errors: numpy's floating point warnings that are meant.
    """
    torch.set_num_threads(1)
    import numpy
    import triton

    numpy.seterr(**errors)
    results = {}
    try:
        smallest()
    except Exception as error:
        if "0-dimensional arrays" not in str(error):
            raise
        # Triton 3.6 reads loop bounds in a way that numpy 2.4 refuses
        print(
            json.dumps(
                {"": f"the interpreter of triton {triton.__version__} does not run with numpy {numpy.__version__}"}
            )
        )
        return
    for name, function in CASES[group].items():
        try:
            function()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps(results))


def check_group(script: Path, group: str, expected: int) -> None:
    """The pytest side: every one of `expected` cases reports, and none failed. Skips where the interpreter cannot run."""
    import pytest

    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install 'longtrace[gpu]'")
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(
        [sys.executable, str(script), group], env=environment, capture_output=True, text=True, timeout=1800
    )
    print(done.stdout[:4000])  # the seeds
    assert done.returncode == 0, done.stderr[-4000:]
    results = json.loads(done.stdout.splitlines()[-1])
    if "" in results:
        pytest.skip(results[""])
    assert len(results) == expected, f"{len(results)} cases reported"
    failed = {name: problem for name, problem in results.items() if problem}
    assert not failed, "\n".join(f"{name}\n{problem}" for name, problem in failed.items())

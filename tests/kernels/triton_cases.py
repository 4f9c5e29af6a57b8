"""Cases that run in Triton's interpreter: how a script registers and runs them, and how a test starts the script.

Triton reads its environment when it is imported and would keep the interpreter for every later test, so a group of cases
runs in a process of its own, and no import of triton happens before a case runs. All run inside triton_guard.py.
"""

from __future__ import annotations

import functools
import importlib.util
import json
import math
import mmap
import os
import shutil
import subprocess
import sys
import traceback
from collections.abc import Callable, Sequence
from pathlib import Path

import torch

CASES: dict[str, dict[str, functools.partial]] = {}
ERRORS: dict[str, float] = {}
FAR = 2_300_000_000  # elements: past what 32 bits count


def case(group, *variants):
    """Register a function once for each tuple of arguments."""

    def register(function):
        for values in variants or [()]:
            name = " ".join([function.__name__, *(str(v).replace("torch.", "") for v in values)])
            CASES.setdefault(group, {})[name] = functools.partial(function, *values)
        return function

    return register


def note_error(kernels: str, dtype: torch.dtype, error: float, size: float, theirs: float = 0.0) -> None:
    """Keep the largest relative error of each of `kernels` ("tile stats, tile combine") for verify_gpu.py's table.

    error, size, theirs: Frobenius norms of ours - exact, exact, and torch's - exact. Where torch itself is a tenth off,
    the result is what cancellation left over, and its relative error says nothing about a kernel.
    """
    if size and theirs <= 0.1 * size and math.isfinite(error):
        for kernel in kernels.split(", "):
            key = f"{kernel} {'fp32' if dtype == torch.float32 else '16-bit'}"
            ERRORS[key] = max(ERRORS.get(key, 0.0), error / size)


def far_rows(rows: torch.Tensor, stride: int) -> torch.Tensor:
    """`rows` (R, C) with `stride` elements between them, in memory of which only the pages of the rows exist."""
    R, C = rows.shape
    reserve = getattr(mmap, "MAP_NORESERVE", 0x4000)
    size = ((R - 1) * stride + C) * rows.element_size()
    block = mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | reserve)
    return torch.frombuffer(block, dtype=rows.dtype).as_strided((R, C), (stride, 1)).copy_(rows)


def run_group(smallest: Callable[[], object], **errors: str) -> None:
    """Run the cases of the group argv[1], or only those named after it, and print as the last line, in JSON:

    {"results": {case: "" or what went wrong}, "errors": {kernel and precision: relative error}, "kernels": where they
    are}, or {"skip": why} if `smallest` shows that nothing can run here. errors: numpy's warnings that are meant.
    """
    group, *only = sys.argv[1:]
    torch.set_num_threads(1)
    import numpy
    import triton
    import triton_guard

    from longtrace import kernels

    numpy.seterr(**errors)
    seed = int(os.environ.get("LONGTRACE_TEST_SEED", "0"))
    print(f"order of programs: seed {seed}")
    triton_guard.install(seed)
    try:
        smallest()
    except Exception as error:
        if "0-dimensional arrays" in str(error):  # Triton 3.6 reads loop bounds in a way that numpy 2.4 refuses
            why = f"the interpreter of triton {triton.__version__} does not run with numpy {numpy.__version__}"
            print(json.dumps({"skip": why}))
            return  # anything else fails the cases too, and they report it
    results = {}
    for name in (x for x in CASES[group] if not only or x in only):
        try:
            CASES[group][name]()
            results[name] = ""
        except Exception:
            results[name] = traceback.format_exc()
    print(json.dumps({"results": results, "errors": ERRORS, "kernels": str(Path(kernels.__file__).parent)}))


def run_script(script: Path, group: str, only: Sequence[str] = (), path: Path | None = None) -> dict:
    """What `run_group` reports, and what it printed before as "log", from a process of its own; `path` goes in front of where it imports from.

    RuntimeError with its last lines if it ends without a report.
    """
    environment = os.environ | {"TRITON_INTERPRET": "1", "OMP_NUM_THREADS": "1"}
    if path:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    command = [sys.executable, str(script), group, *only]
    done = subprocess.run(command, env=environment, capture_output=True, text=True, timeout=1800)
    if done.returncode:
        raise RuntimeError(f"{script.name} {group}: exit {done.returncode}\n{done.stderr[-4000:]}")
    log, _, report = done.stdout.rstrip().rpartition("\n")
    return json.loads(report) | {"log": log[:4000]}


def planted(folder: Path, file: str = "", old: str = "", new: str = "") -> Path:
    """A copy of the kernels under `folder`/longtrace, `old` replaced by `new` in one of its files; the folder."""
    from longtrace import kernels

    copy = folder / "longtrace" / "kernels"
    shutil.copytree(Path(kernels.__file__).parent, copy, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    if file:
        text = (copy / file).read_text()
        assert text.count(old) == 1, f"{old!r} stands {text.count(old)} times in {file}"
        (copy / file).write_text(text.replace(old, new))
    return folder


def check_group(script: Path, group: str, expected: int) -> None:
    """The pytest side: every one of `expected` cases reports, and none failed. Skips where the interpreter cannot run."""
    import pytest

    if importlib.util.find_spec("triton") is None:
        pytest.skip("triton is not installed: pip install 'longtrace[gpu]'")
    report = run_script(script, group)
    print(report["log"])  # the seeds
    if "skip" in report:
        pytest.skip(report["skip"])
    results = report["results"]
    assert len(results) == expected, f"{len(results)} cases reported"
    failed = {name: problem for name, problem in results.items() if problem}
    assert not failed, "\n".join(f"{name}\n{problem}" for name, problem in failed.items())

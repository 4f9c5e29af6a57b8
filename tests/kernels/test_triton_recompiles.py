"""A new length, temperature or hyper-parameter compiles nothing: Triton's own cache keys, counted without a GPU.

Within a scenario of triton_recompiles.py the operands' dtype, widths and options are fixed; all else changes. Every kernel
must come with one key.
"""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from triton_cases import planted

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'longtrace[gpu]'", allow_module_level=True)

from longtrace import kernels

SCRIPT = Path(__file__).with_name("triton_recompiles.py")
ROWS, COLUMNS, TILE = "head/triton_rows.py", "head/triton_columns.py", "head/triton_tile.py"
FORWARD = "attention/triton_forward.py"


def counts(path: Path | None = None, start: str = "") -> dict[str, dict[str, int]]:
    """What the script found, of the kernels in `path` if given; it runs without Triton's interpreter."""
    environment = {k: v for k, v in os.environ.items() if k not in ("TRITON_INTERPRET", "LONGTRACE_BACKEND")}
    environment["OMP_NUM_THREADS"] = "1"
    if path:
        environment["PYTHONPATH"] = os.pathsep.join([str(path), *filter(None, [os.environ.get("PYTHONPATH")])])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(SCRIPT), start], env=environment, capture_output=True, text=True
    )
    assert done.returncode == 0, done.stderr[-3000:]
    report = json.loads(done.stdout.splitlines()[-1])
    assert report["kernels"] == str(path / "longtrace" / "kernels" if path else Path(kernels.__file__).parent)
    return report["counts"]


def recompiled(found: dict[str, dict[str, int]]) -> dict[str, int]:
    return {f"{scenario}: {kernel}": n for scenario, kernels in found.items() for kernel, n in kernels.items() if n > 1}


def test_one_compilation_serves_every_length_and_hyper_parameter():
    found = counts()
    assert not recompiled(found)
    assert all(found.values()), "a scenario launched nothing"
    launched = {kernel for kernels in found.values() for kernel in kernels}
    text = {path.stem: path.read_text() for path in Path(kernels.__file__).parent.rglob("triton_*.py")}
    written = {
        f"{module}.{line[4:].partition('(')[0]}"
        for module, source in text.items()
        for line in source.splitlines()
        if line.startswith("def ") and line[4:].partition("(")[0].endswith("_kernel")
    }
    assert launched == written


FAULTS = {
    "temperature as a constant": (
        ROWS,
        "V, stride, scale, bias_scale, inv_cap, out_scale,\n    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_ENTROPY",
        "V, stride, scale: tl.constexpr, bias_scale, inv_cap, out_scale,\n    HAS_BIAS: tl.constexpr, HAS_CAP: tl.constexpr, HAS_ENTROPY",
        "weighted_nll",
        "triton_rows.stats_kernel",
    ),
    "a whole number for a real one": (ROWS, "return float(transform.logit_scale)", "return transform.logit_scale", "tiles", "triton_tile.exp_kernel"),
    "tokens specialised": (TILE, '@triton.jit(do_not_specialize=["T", "blocks"])', "@triton.jit", "tiles", "triton_tile.sums_kernel"),
    "kept columns specialised": (COLUMNS, 'do_not_specialize=["F", "stride", "out_stride"]', 'do_not_specialize=["stride"]', "column_passes", "triton_columns.compact_kernel"),
    "documents specialised": (FORWARD, '    "documents", "steps", "T"', '    "T"', "packed_attention", "triton_forward.forward_kernel"),
}  # fmt: skip


FIRST = 2  # the rest is slow


@pytest.mark.parametrize(
    "fault", [pytest.param(x, marks=[pytest.mark.slow] * (i >= FIRST)) for i, x in enumerate(FAULTS)]
)
def test_a_fault_is_noticed(fault, tmp_path):
    file, old, new, scenario, kernel = FAULTS[fault]
    found = recompiled(counts(planted(tmp_path, file, old, new), scenario))
    assert any(name.endswith(kernel) for name in found), found

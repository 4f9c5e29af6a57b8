"""Faults planted in copies of the Triton kernels: each has to fail the interpreter's cases, and the copy itself to pass.

A fault is a replacement of text that stands exactly once in its file, so none goes stale in silence.
"""

from __future__ import annotations

import importlib.util
from pathlib import Path
from typing import NamedTuple

import pytest
from triton_cases import planted, run_script

from longtrace import kernels

if importlib.util.find_spec("triton") is None:
    pytest.skip("triton is not installed: pip install 'longtrace[gpu]'", allow_module_level=True)

HEAD = Path(__file__).with_name("triton_head_interpreted.py")
ATTENTION = Path(__file__).with_name("triton_attention_interpreted.py")


class Fault(NamedTuple):
    kind: str
    file: str
    old: str
    new: str
    group: str
    case: str
    """The smallest case that has to notice."""

    @property
    def script(self) -> Path:
        return HEAD if self.file.startswith("head") else ATTENTION


ROWS, COLUMNS, TILE = "head/triton_rows.py", "head/triton_columns.py", "head/triton_tile.py"
FORWARD, BACKWARD = "attention/triton_forward.py", "attention/triton_backward.py"
LAUNCHES = "attention/cuda.py"
PLAIN = "Transform(logit_scale=1.0, softcap=None, temperature=1.0)"
DERIVATIVE = ("rows", f"dlogits_are_the_derivative {PLAIN}")
PASSES = ("columns", "column_passes float32 (40, 123)")
STRIDED = ("tile", "strided_operands")
BLOCKWISE = ("tile", f"tiles_no_worse_than_torch {PLAIN} (30, 144, 300)")
CAUSAL, FULL = ("options", "option causal"), ("options", "option full")
FAR_ROWS = ("rows", "offsets_past_32_bits")
FAR_COLUMNS = ("columns", "offsets_past_32_bits_in_columns")
FAR_TILES = ("tile", "offsets_past_32_bits_in_tiles")
FAR_TOKENS = ("shapes", "offsets_past_32_bits tokens")
FAR_DOCUMENTS = ("shapes", "offsets_past_32_bits documents")
FAR_HEADS = ("shapes", "offsets_past_32_bits heads")
FAR_ROWS_OF_A_BLOCK = ("shapes", "offsets_past_32_bits tokens of one block")

FIRST = [  # one of each kind; the rest is slow
    Fault("off-by-one mask", ROWS, "tl.where((cols >= V) |", "tl.where((cols > V) |", *DERIVATIVE),
    Fault("int32 offset", ROWS, "row = tl.program_id(0).to(tl.int64)", "row = tl.program_id(0)", *FAR_ROWS),
    Fault("swapped stride", TILE, "y + j[None, :] * y_stride", "y + j[None, :] * x_stride", *STRIDED),
    Fault("missing mask on the last chunk", TILE, "mask=(i < x_rows)[:, None] & (k < H)[None, :]", "mask=(i < x_rows)[:, None]", *STRIDED),
    Fault("off-by-one mask", FORWARD, "see = (n0 + col < k_len)[None, :]", "see = (n0 + col <= k_len)[None, :]", *FULL),
    Fault("int32 offset", FORWARD, "at += tl.cast(first, tl.int64) * stride", "at += first * stride", *FAR_TOKENS),
    Fault("a race", FORWARD, "keep = (row < count - first)[:, None]", "keep = (row <= count - first)[:, None]", *CAUSAL),
    Fault("reduced precision", FORWARD, 'total, input_precision="ieee"', "total", *CAUSAL),
]  # fmt: skip
REST = [
    # rows
    Fault("missing mask on the last chunk", ROWS, "tl.load(logits + cols, mask=cols < V, other=0.0)", "tl.load(logits + cols)", *DERIVATIVE),
    Fault("missing last chunk", ROWS, "for start in range(0, V, BLOCK):", "for start in range(0, V // BLOCK * BLOCK, BLOCK):", *DERIVATIVE),
    Fault("off-by-one mask", ROWS, "keep = cols < V", "keep = cols <= V", *DERIVATIVE),
    Fault("int32 offset", ROWS, "row = (tl.program_id(0) // blocks).to(tl.int64)", "row = tl.program_id(0) // blocks", *FAR_ROWS),
    Fault("swapped stride", ROWS, "out + row * out_stride + cols", "out + row * stride + cols", "rows", "strides_repeats_and_empty_batches"),
    # columns
    Fault("swapped stride", COLUMNS, "p + rows.to(tl.int64)[:, None] * stride", "p + rows.to(tl.int64)[:, None] * V", *PASSES),
    Fault("int32 offset", COLUMNS, "p + rows.to(tl.int64)[:, None] * stride", "p + rows[:, None] * stride", *FAR_COLUMNS),
    Fault("missing mask on the last chunk", COLUMNS, "mask=keep, other=float", "mask=(rows < R)[:, None], other=float", *PASSES),
    Fault("a race", COLUMNS, "tl.store(out + row * out_stride + at", "tl.store(out + at", *PASSES),
    Fault("off-by-one mask", COLUMNS, "tl.load(scale + rows, mask=rows < R", "tl.load(scale + rows, mask=rows <= R", *PASSES),
    Fault("off-by-one mask", COLUMNS, "tl.load(columns + at, mask=at < F", "tl.load(columns + at, mask=at <= F", *PASSES),
    Fault("int32 offset", COLUMNS, "row = (tl.program_id(0) // blocks).to(tl.int64)", "row = tl.program_id(0) // blocks", *FAR_COLUMNS),
    # tiles
    Fault("off-by-one mask", TILE, "mask=(j < y_rows)[None, :]", "mask=(j <= y_rows)[None, :]", *STRIDED),
    Fault("off-by-one mask", TILE, "tl.where((cols >= V)[None, :] |", "tl.where((cols > V)[None, :] |", "tile", "an_offset_changes_nothing_in_tiles -10000.0"),
    Fault("off-by-one mask", TILE, "mask=(i < T - t0)[:, None]", "mask=(i <= T - t0)[:, None]", *STRIDED),
    Fault("the target twice", TILE, "(cols[None, :] == y[:, None]) | (x < FLOOR)", "(x < FLOOR)", *BLOCKWISE),
    Fault("int32 offset", TILE, "h + tl.cast(t0, tl.int64) * h_stride", "h + t0 * h_stride", *FAR_TILES),
    Fault("int32 offset", TILE, "w + tl.cast(v0, tl.int64) * w_stride", "w + v0 * w_stride", *FAR_TILES),
    Fault("int32 offset", TILE, "out + tl.cast(t0, tl.int64) * out_stride", "out + t0 * out_stride", *FAR_TILES),
    Fault("int32 offset", TILE, "h + rows.to(tl.int64)[:, None] * h_stride", "h + rows[:, None] * h_stride", *FAR_TILES),
    Fault("int32 offset", ROWS, "return x if x.stride(0) < NEAR else x.contiguous()", "return x", "tile", "rows_of_one_tile_past_32_bits"),
    Fault("a race", TILE, "at = tl.cast(block, tl.int64) * T + rows", "at = rows", *BLOCKWISE),
    Fault("missing mask on the last chunk", TILE, "s += tl.load(total + at, mask=keep, other=0.0)", "s += tl.load(total + at, mask=keep, other=1.0)", *BLOCKWISE),
    Fault("overflow", TILE, "far = (peak > FAR)", "far = (peak > 100 * FAR)", "tile", "one_huge_logit 1000.0"),
    Fault("reduced precision", TILE, 'left, right, input_precision="ieee"', "left, right", *STRIDED),
    # attention, forward
    Fault("off-by-one mask", FORWARD, "mask=(row < count - first)[:, None], other", "mask=(row <= count - first)[:, None], other", *CAUSAL),
    Fault("missing mask on the last chunk", FORWARD, "    if EDGE:\n        return tl.load(at, mask=(row < count - first)[:, None], other=0.0)\n", "", *FULL),
    Fault("off-by-one bound", FORWARD, "tl.minimum(last + right + 1, k_len)", "tl.minimum(last + right, k_len)", *CAUSAL),
    Fault("off-by-one mask", FORWARD, "see = ahead <= right", "see = ahead < right", *CAUSAL),
    Fault("wrong document", FORWARD, "start // BLOCK + ahead <= slot", "start // BLOCK + ahead < slot", *CAUSAL),
    Fault("swapped stride", FORWARD, "rows_of(v, v_stride, n0", "rows_of(v, k_stride, n0", "shapes", "strides"),
    Fault("int32 offset", FORWARD, "q += first.to(tl.int64) * q_stride", "q += first * q_stride", *FAR_DOCUMENTS),
    Fault("int32 offset", LAUNCHES, "x if wide and x.stride(0) < NEAR else", "x if wide else", *FAR_ROWS_OF_A_BLOCK),
    Fault("int32 offset", FORWARD, "head = tl.program_id(1).to(tl.int64)", "head = tl.program_id(1)", *FAR_HEADS),
    # attention, backward
    Fault("off-by-one mask", BACKWARD, "tl.sum(x * y, 1), mask=row < T", "tl.sum(x * y, 1), mask=row <= T", "shapes", "row_sums float32"),
    Fault("off-by-one bound", BACKWARD, "tl.minimum(last + left + 1, q_len)", "tl.minimum(last + left, q_len)", "options", "option window of two keys"),
    Fault("swapped stride", BACKWARD, "dk += first_k.to(tl.int64) * kv_heads * D", "dk += first_k.to(tl.int64) * heads * D", "shapes", "repeats_and_packs_alike {'causal': False}"),
    Fault("int32 offset", BACKWARD, "ups = d_out + first.to(tl.int64) * d_stride", "ups = d_out + first * d_stride", *FAR_DOCUMENTS),
    Fault("int32 offset", BACKWARD, "kv_head = tl.program_id(1).to(tl.int64)", "kv_head = tl.program_id(1)", *FAR_HEADS),
    Fault("one head of the group", BACKWARD, "for member in range(0, group):", "for member in range(0, 1):", "shapes", "shape_and_dtype (3, 1, 96, 96) bfloat16"),
]  # fmt: skip
FAULTS = FIRST + REST


def results(folder: Path, script: Path, group: str, cases: list[str]) -> dict[str, str]:
    report = run_script(script, group, cases, folder)
    if "skip" in report:
        pytest.skip(report["skip"])
    assert report["kernels"] == str(folder / "longtrace" / "kernels"), "the copy was not what ran"
    assert sorted(report["results"]) == sorted(cases), "a case that is not there"
    return report["results"]


def check(folder: Path, fault: Fault) -> None:
    problem = results(planted(folder, fault.file, fault.old, fault.new), fault.script, fault.group, [fault.case])[
        fault.case
    ]
    assert problem, f"{fault.case} did not notice"
    print(problem.splitlines()[-1])


def listed(faults):
    ids = [f"{Path(x.file).stem}-{x.kind}-{i}".replace(" ", "_") for i, x in enumerate(faults)]
    return pytest.mark.parametrize("fault", faults, ids=ids)


@listed(FIRST)
def test_a_fault_is_noticed(fault, tmp_path):
    check(tmp_path, fault)


@pytest.mark.slow
@listed(REST)
def test_more_faults_are_noticed(fault, tmp_path):
    check(tmp_path, fault)


def test_every_fault_can_be_planted():
    for fault in FAULTS:
        text = (Path(kernels.__file__).parent / fault.file).read_text()
        assert text.count(fault.old) == 1, f"{fault.old!r} stands {text.count(fault.old)} times in {fault.file}"
    assert {fault.file for fault in FAULTS} == {ROWS, COLUMNS, TILE, FORWARD, BACKWARD, LAUNCHES}


def check_without_a_fault(folder, faults):
    for script, group in sorted({(x.script, x.group) for x in faults}):
        cases = sorted({x.case for x in faults if (x.script, x.group) == (script, group)})
        problems = {k: v for k, v in results(folder, script, group, cases).items() if v}
        assert not problems, problems


def test_the_copy_without_a_fault_passes(tmp_path):
    """So what fails above fails by the fault."""
    check_without_a_fault(planted(tmp_path), FIRST)


@pytest.mark.slow
def test_the_copy_without_a_fault_passes_the_rest(tmp_path):
    check_without_a_fault(planted(tmp_path), REST)

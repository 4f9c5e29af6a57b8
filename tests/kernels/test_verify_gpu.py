"""What `make verify-gpu` makes of its three sources: one table, and an exit code that says whether anything failed."""

from __future__ import annotations

import xml.etree.ElementTree as xml

import pytest
import verify_gpu

ROW = {
    "kernel": "tile dh", "config": "bf16 narrow, all inputs", "arch": "sm_90", "compiler": "triton 0", "registers": 200,
    "spills": 0, "shared_bytes": 51_200, "warps": 8, "occupancy": 0.125, "limited_by": "registers",
    "instruction": "wgmma.mma_async", "problem": "", "compile_s": 1.5,
}  # fmt: skip
CUDA = ROW | {"kernel": "cuda blend", "config": "blend_kernel", "compiler": "nvcc 0", "instruction": ""}
REPORT = """<testsuites><testsuite>
<testcase name="test_blend[bf16]"><properties><property name="error blend 16-bit" value="2e-3"/></properties></testcase>
<testcase name="test_blend[fp32]"><properties><property name="error blend fp32" value="1e-7"/></properties></testcase>
<testcase name="test_pack_without_a_barrier"><failure message="x">x</failure></testcase>
<testcase name="test_pack[fp32]"/>
<testcase name="test_advantages"><skipped message="no compiler"/></testcase>
</testsuite></testsuites>"""


def test_the_host_report_is_read():
    counts, errors, lines = verify_gpu.read_host_report(xml.fromstring(REPORT), ["advantages", "blend", "pack"])
    assert counts == {"advantages": "not run", "blend": "2 passed", "pack": "1 of 2 failed"}
    assert errors == {"cuda blend 16-bit": 2e-3, "cuda blend fp32": 1e-7}
    assert lines == ["FAILS host run: test_pack_without_a_barrier", "FAILS host run: no test of advantages.cu ran"]
    assert verify_gpu.read_host_report(xml.fromstring(REPORT), ["blend"])[0] == {"blend": "2 passed"}


@pytest.mark.parametrize(
    "wrong, said",
    [
        ({}, ""),
        ({"interpret": ({"tile dh fp32": 1e-7}, ["FAILS tile, strided_operands: AssertionError"])}, "strided_operands"),
        ({"interpret": ({}, ["holds"])}, "FAILS tile dh: no interpreted case measures its error"),
        (
            {"run_on_host": ({"blend": "1 of 2 failed"}, {}, ["FAILS host run: test_blend"])},
            "FAILS host run: test_blend",
        ),
        ({"rows": [ROW | {"problem": "8 spilled", "spills": 8}, CUDA]}, "sm_90: 8 spilled"),
        (
            {"baseline": {"triton 0": {"tile dh, bf16 narrow, all inputs, sm_90": [100, 0, 51_200, 0.125, ""]}}},
            "100 → 200",
        ),
    ],
)
def test_one_table_and_an_exit_code(wrong, said, monkeypatch, capsys):
    found = {
        "interpret": ({"tile dh fp32": 1e-7, "tile dh 16-bit": 2e-3}, ["holds"]),
        "run_on_host": ({"blend": "2 passed"}, {"cuda blend fp32": 1e-7}, ["holds"]),
        "rows": [ROW, CUDA],
        "baseline": {},
    } | wrong
    monkeypatch.setattr(verify_gpu, "interpret", lambda processes: found["interpret"])
    monkeypatch.setattr(verify_gpu, "run_on_host", lambda: found["run_on_host"])
    monkeypatch.setattr(verify_gpu.compile_matrix, "check_installed", lambda: None)
    monkeypatch.setattr(verify_gpu.compile_matrix, "architectures", lambda: ["sm_90"])
    monkeypatch.setattr(verify_gpu.compile_matrix, "compile_rows", lambda *_: found["rows"])
    monkeypatch.setattr(verify_gpu.compile_matrix, "read_baseline", lambda: found["baseline"])
    tables = []
    monkeypatch.setattr(verify_gpu.harness, "print_table", lambda title, columns, rows, formats: tables.append(rows))
    lines = []
    monkeypatch.setattr(verify_gpu.console, "print", lambda line, **_: lines.append(line))
    assert verify_gpu.main() == bool(said)
    assert any(said in line for line in lines if line.startswith("FAILS")) == bool(said), lines
    ((tile, blend),) = tables
    assert tile["kernel"] == "tile dh" and tile["host"] is None and tile["arch"] == "sm_90"
    assert blend["host"] == found["run_on_host"][0]["blend"]

"""The compile matrix: regressions are named, baselines keep what they are told, records hold what the contract says."""

from __future__ import annotations

import json
import shutil

import pytest

from longtrace import bench
from longtrace.bench import compile_matrix
from longtrace.trainer.config import Refusal

pytest.importorskip("triton", reason="triton is not installed: pip install 'longtrace[gpu]'")

ROW = {
    "kernel": "tile exp", "config": "bf16 aligned, all inputs", "arch": "sm_90", "compiler": "triton 3.9.0", "registers": 200,
    "spills": 0, "shared_bytes": 50_000, "warps": 8, "occupancy": 0.125, "limited_by": "registers",
    "instruction": "wgmma.mma_async", "problem": "", "compile_s": 1.5,
}  # fmt: skip
NAME = "tile exp, bf16 aligned, all inputs, sm_90"
BEFORE = [200, 0, 50_000, 0.125, "wgmma.mma_async"]


@pytest.mark.parametrize(
    "change, said",
    [
        ({}, []),
        ({"registers": 219, "shared_bytes": 54_999}, []),
        ({"registers": 120, "shared_bytes": 1, "occupancy": 0.5}, []),
        ({"registers": 221}, ["registers 200 → 221"]),
        ({"shared_bytes": 55_001}, ["shared_bytes 50000 → 55001"]),
        ({"spills": 4}, ["spills 0 → 4"]),
        ({"occupancy": 0.0625}, ["occupancy 12% → 6%"]),
        ({"instruction": "mma.sync"}, ["instruction wgmma.mma_async → mma.sync"]),
        ({"instruction": ""}, ["instruction wgmma.mma_async → none"]),
        ({"registers": 255, "spills": 8}, ["registers 200 → 255", "spills 0 → 8"]),
    ],
)
def test_a_regression_is_named(change, said):
    row = ROW | change
    assert compile_matrix.regressions(row, BEFORE) == said
    checks = compile_matrix.check_rows([row], {"triton 3.9.0": {NAME: BEFORE}})
    failed = [check for check in checks if check.startswith("FAILS")]
    assert failed == ([f"FAILS {NAME}: {', '.join(said)}"] if said else [])


def test_what_a_dot_may_become_again_is_no_regression():
    assert not compile_matrix.regressions(ROW, [200, 0, 50_000, 0.125, ""])


def test_objects_without_a_baseline_are_told():
    checks = compile_matrix.check_rows([ROW], {"triton 3.9.0": {}})
    assert any(check.startswith(f"FAILS {NAME}: not in the baseline") for check in checks)
    checks = compile_matrix.check_rows([ROW], {"triton 3.6.0": {NAME: BEFORE}})
    assert [check.split(":")[0] for check in checks if not check.startswith("holds")] == [
        "skipped the baseline"
    ] and "triton 3.6.0" in checks[-1]


def test_a_problem_fails_whatever_the_baseline_says():
    row = {key: ROW[key] for key in ("kernel", "config", "arch", "compiler")} | {"problem": "does not compile: X"}
    assert f"FAILS {NAME}: does not compile: X" in compile_matrix.check_rows([row], {"triton 3.9.0": {NAME: BEFORE}})
    assert compile_matrix.summary([row])[0]["problems"] == 1


def test_a_baseline_keeps_other_compilers_and_other_parts(tmp_path):
    path = tmp_path / "baseline.json"
    old = {"triton 3.6.0": {NAME: BEFORE}, "triton 3.9.0": {NAME: BEFORE, "other, x, sm_80": BEFORE}}
    compile_matrix.write_baseline([ROW | {"registers": 100}], old, path)
    assert compile_matrix.read_baseline(path) == {
        "triton 3.6.0": {NAME: BEFORE},
        "triton 3.9.0": {NAME: [100, *BEFORE[1:]], "other, x, sm_80": BEFORE},
    }
    assert old["triton 3.9.0"][NAME] == BEFORE
    assert compile_matrix.read_baseline(tmp_path / "none.json") == {}


def test_the_committed_baseline_is_of_what_ships():
    """Every shipped object of some Triton, none that is gone, no spill, and a matrix instruction where a dot is.

    Another Triton's may hold fewer parts, but each whole.
    """
    from longtrace.bench import compile_cases

    shipped = {case.name: case for arch in compile_cases.ARCHITECTURES for case in compile_cases.shipped(arch)}
    baseline = {k: v for k, v in compile_matrix.read_baseline().items() if k.startswith("triton")}
    assert any(objects.keys() == shipped.keys() for objects in baseline.values())
    for objects in baseline.values():
        parts = {name.rpartition(", ")[2] for name in objects}
        assert objects.keys() == {name for name, case in shipped.items() if case.arch in parts}
        for name, values in objects.items():
            row = dict(zip(compile_matrix.MEASURES, values))
            assert row["spills"] == 0 and bool(row["instruction"]) >= shipped[name].product, name


def test_unusable_options_are_refused(monkeypatch):
    with pytest.raises(Refusal, match="--inputs: found sm_70; accepted: sm_80, sm_90"):
        bench.bench(bench.BenchConfig(name="compile_matrix", inputs=["sm_70"]))
    monkeypatch.setenv("TRITON_INTERPRET", "1")
    with pytest.raises(Refusal, match="found TRITON_INTERPRET=1"):
        bench.bench(bench.BenchConfig(name="compile_matrix"))


def test_a_run_leaves_what_the_contract_names_and_fails_on_a_regression(tmp_path, monkeypatch):
    rows = [ROW, ROW | {"arch": "sm_80", "instruction": "mma.sync", "compile_s": None}]
    monkeypatch.setattr(compile_matrix, "compile_rows", lambda *_: rows)
    monkeypatch.setattr(compile_matrix, "BASELINE", tmp_path / "baseline.json")
    config = bench.BenchConfig(name="compile_matrix", json=tmp_path / "out" / "r.json", baseline=True)
    bench.bench(config)  # keeps what read_baseline's default path does not show
    kept = json.loads((tmp_path / "baseline.json").read_text())
    assert kept["triton 3.9.0"][NAME] == BEFORE
    record = json.loads(config.json.read_text())
    assert {"name", "machine", "versions", "rows", "ratios", "checks", "compilers"} <= record.keys()
    assert record["rows"] == rows and "triton" in record["versions"]
    assert (tmp_path / "out" / "compile_matrix.png").stat().st_size > 1000
    rows[0] = ROW | {"spills": 16}
    with pytest.raises(Refusal, match=r"1 of \d+ checks failed"):
        bench.bench(bench.BenchConfig(name="compile_matrix", json=tmp_path / "again.json"))
    assert f"FAILS {NAME}: spills 0 → 16" in json.loads((tmp_path / "again.json").read_text())["checks"]


def test_what_ptxas_says_is_read():
    from longtrace.bench import compile_objects

    text = """ptxas info    : 0 bytes gmem
ptxas info    : Compiling entry function 'plain' for 'sm_90'
ptxas info    : Function properties for plain
    0 bytes stack frame, 0 bytes spill stores, 0 bytes spill loads
ptxas info    : Used 10 registers, used 0 barriers
ptxas info    : Compiling entry function 'full' for 'sm_90'
ptxas info    : Function properties for full
    24 bytes stack frame, 20 bytes spill stores, 32 bytes spill loads
ptxas info    : Used 255 registers, used 1 barriers, 24 bytes cumulative stack size, 4096 bytes smem
"""
    assert compile_objects.ptxas_usage(text) == [("full", 255, 52, 4096), ("plain", 10, 0, 0)]


@pytest.mark.skipif(not shutil.which("nvcc"), reason="nvcc is not there")
def test_cuda_sources_are_compiled(tmp_path):
    from longtrace.bench import compile_objects

    source = tmp_path / "sum.cu"
    source.write_text(
        "template <class T> __global__ void __launch_bounds__(128) add(T* x) {\n"
        "  __shared__ T all[128];\n  all[threadIdx.x] = x[threadIdx.x];\n  __syncthreads();\n"
        "  x[threadIdx.x] += all[127 - threadIdx.x];\n}\n"
        "template __global__ void add<float>(float*);\ntemplate __global__ void add<double>(double*);\n"
    )
    rows = compile_objects.nvcc_rows(source, "sm_90")
    assert [row["config"] for row in rows] == ["add<double>", "add<float>"]
    assert [row["shared_bytes"] for row in rows] == [1024, 512] and not any(row["problem"] for row in rows)
    assert all(row["kernel"] == "cuda sum" and row["warps"] == 4 and row["occupancy"] == 1 for row in rows)
    source.write_text("__global__ void broken( {")
    (row,) = compile_objects.nvcc_rows(source, "sm_90")
    assert row["problem"].startswith("does not compile")


@pytest.mark.slow
def test_quick_runs_to_the_end(tmp_path):
    bench.bench(bench.BenchConfig(name="compile_matrix", quick=True, json=tmp_path / "r.json", threads=1))
    rows = json.loads((tmp_path / "r.json").read_text())["rows"]
    assert {row["arch"] for row in rows} == {"sm_80", "sm_90", "sm_100", "sm_120", "gfx942"}
    assert all(not isinstance(value, (dict, list)) for row in rows for value in row.values())

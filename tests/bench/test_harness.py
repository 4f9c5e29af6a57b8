"""The bench harness: fresh processes, interleaving, failures that are told, records that hold what the contract says."""

from __future__ import annotations

import json
import subprocess
import sys

import pytest

from longtrace.bench import harness


def test_a_job_runs_in_a_fresh_process_with_its_threads():
    answer = harness.in_process("longtrace.bench.harness:machine", 1, threads=1)
    assert answer["threads"] == 1 and answer["cores"] >= 1


def test_a_failing_job_is_told_with_its_last_lines():
    with pytest.raises(harness.MeasurementFailed, match="exit 1") as error:
        harness.in_process("longtrace.bench.harness:no_such_function", {}, threads=1)
    assert "no_such_function" in str(error.value)


def test_a_job_that_hangs_is_stopped():
    with pytest.raises(harness.MeasurementFailed, match="no result after 0 s"):
        harness.in_process("time:sleep", 60, threads=1, timeout_s=0.01)


def test_measurements_alternate_and_a_failed_one_is_not_tried_again(monkeypatch):
    order = []

    def in_process(target, job, *, threads):
        order.append(job["name"])
        if job["name"] == "b":
            raise harness.MeasurementFailed("b: killed, most likely out of memory")
        return {"ms": len(order)}

    monkeypatch.setattr(harness, "in_process", in_process)
    targets = {name: ("module:function", {"name": name}) for name in "abc"}
    results, failed = harness.interleaved(targets, repeats=3, threads=1, report=lambda *_, **__: None)
    assert order == ["a", "b", "c", "a", "c", "a", "c"]
    assert list(results) == ["a", "c"] and failed == {"b": "b: killed, most likely out of memory"}
    assert harness.median(results["a"], "ms") == 4


def test_peak_memory_counts_what_was_touched_and_freed():
    # in a process of its own: a peak never falls, so an earlier test's would hide this one's
    command = (
        "from longtrace.bench.harness import peak_bytes; before = peak_bytes(); block = bytearray(300_000_000); del block; "
        "print(peak_bytes() - before)"
    )
    child = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert int(child.stdout.split()[-1]) > 250e6


def test_the_peak_of_a_child_is_its_own():
    # getrusage would start the child at this process's size, which the tests' own imports and this block make large
    block = bytearray(600_000_000)
    command = "from longtrace.bench.harness import peak_bytes; print(peak_bytes())"
    child = subprocess.run([sys.executable, "-c", command], capture_output=True, text=True, check=True)
    assert len(block) == 600_000_000
    assert int(child.stdout.split()[-1]) < harness.peak_bytes() - 100e6


def test_the_record_holds_what_the_contract_names(tmp_path):
    rows = [{"impl": "longtrace", "ms": 1.5, "ms_min": 1.0, "ms_max": 2.0}, {"impl": "peer", "ms": 3.0}]
    path = harness.write_record(
        "x",
        tmp_path / "a" / "r.json",
        machine=harness.machine(1),
        rows=rows,
        ratios={"ms": 0.5},
        skipped={"z": "not installed"},
    )
    record = json.loads(path.read_text())
    assert {"name", "machine", "versions", "rows", "ratios", "skipped"} <= record.keys()
    assert record["rows"] == rows and "torch" in record["versions"] and "python" in record["versions"]
    assert all(not isinstance(value, (dict, list)) for row in record["rows"] for value in row.values())


def test_the_picture_is_drawn(tmp_path):
    image = pytest.importorskip("PIL.Image", reason="Pillow is not installed")
    rows = [{"impl": "longtrace", "ms": 1.5, "ms_min": 1.0, "ms_max": 2.0}, {"impl": "peer", "ms": 3.0}]
    path = harness.bar_picture(tmp_path / "x.png", "A title", [("time, ms", rows, "ms", ".1f")] * 2, "a note")
    colours = {colour for _, colour in image.open(path).convert("RGB").getcolors(1 << 20)}
    assert {(47, 111, 222), (154, 164, 178)} <= colours, "our bar and the peer's"

"""The GPU bench without a GPU: the timing loop on fake clocks, rows that survive a stopped part, a whole dry run."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest
import torch

from longtrace import bench
from longtrace.bench import device, gpu, head_peers
from longtrace.trainer.config import Refusal


class Fake:
    """A clock that hands out prepared times and notes what was asked for."""

    def __init__(self, **times):
        self.times, self.asked = {k: list(v) for k, v in times.items()}, []

    def __call__(self, run):
        name = run()
        self.asked.append(name)
        value = self.times[name].pop(0)
        if isinstance(value, Exception):
            raise value
        return value


def named(*names):
    return {name: lambda name=name: name for name in names}


def test_implementations_take_turns_and_the_warm_up_does_not_count():
    clock = Fake(a=[100, 3, 1, 2], b=[100, 6, 4, 5])
    times = device.measure(named("a", "b"), clock, repeats=3, warmup=1)
    assert clock.asked == ["a", "b"] * 4
    assert times.ms == {"a": [3, 1, 2], "b": [6, 4, 5]}
    assert times.row("a") == {"ms": 2, "ms_min": 1, "ms_max": 3, "runs": 3}
    assert times.row("never") == {"ms": None, "ms_min": None, "ms_max": None, "runs": 0}


def test_what_fails_is_told_and_not_tried_again():
    clock = Fake(a=[1, 1, 1], b=[1, RuntimeError("out of memory\nstack"), 1])
    times = device.measure(named("a", "b"), clock, repeats=2, warmup=1)
    assert times.failed == {"b": "RuntimeError: out of memory"}
    assert clock.asked == ["a", "b", "a", "b", "a"] and times.ms == {"a": [1, 1]}


def test_no_turn_begins_after_the_deadline():
    moments = iter([0.0, 1.0, 2.0, 3.0, 4.0])
    seen = []
    times = device.measure(
        named("a"), Fake(a=range(9)), repeats=9, warmup=1, deadline=2.5, now=lambda: next(moments),
        after=lambda times: seen.append(len(times.ms.get("a", ()))),
    )  # fmt: skip
    assert times.ms == {"a": [1, 2]} and seen == [0, 1, 2]


def test_the_cache_is_emptied_before_every_timed_call(monkeypatch):
    order = []
    clock = device.Clock("cpu")
    monkeypatch.setattr(clock, "flush", lambda: order.append("flush"))
    times = device.measure({"a": lambda: order.append("a")}, clock, repeats=2, warmup=1)
    assert order == ["flush", "a"] * 3
    assert all(0 <= ms < 1e3 for ms in times.ms["a"])
    clock.device, clock.buffer = "cpu", torch.ones(4, dtype=torch.int8)
    device.Clock.flush(clock)
    assert not clock.buffer.any()  # written, so that it takes the cache


def test_a_later_line_replaces_an_earlier_one_and_a_stopped_part_keeps_its_rows(tmp_path):
    job = {"rows": str(tmp_path / "head.jsonl")}
    gpu.note(job, "ours", "one", ms=None, peak_mb=5)
    gpu.note(job, "theirs", "one", ms=3.0)
    gpu.note(job, "ours", "one", ms=1.5)
    rows = gpu.read_rows(tmp_path / "head.jsonl", "head")
    assert rows == [
        {"part": "head", "impl": "ours", "case": "one", "ms": 1.5, "peak_mb": 5},
        {"part": "head", "impl": "theirs", "case": "one", "ms": 3.0},
    ]


def test_ratios_are_to_ours_within_a_part_and_case():
    rows = [
        {"part": "attention", "impl": "longtrace", "case": "one", "ms": 2.0},
        {"part": "attention", "impl": "flash-attn", "case": "one", "ms": 3.0},
        {"part": "attention", "impl": "flash-attn", "case": "mix", "ms": 9.0},
        {"part": "head", "impl": "longtrace exact", "key": "exact", "case": "one", "ms": 4.0},
        {"part": "head", "impl": "Liger", "key": "liger", "case": "one", "ms": 6.0},
    ]
    assert gpu.ratios(rows) == {"head one: liger / exact": 1.5, "attention one: flash-attn / longtrace": 1.5}


def test_predictions_belong_to_the_part_and_the_shape():
    table = json.loads(gpu.PREDICTED.read_text())["rows"]
    case = f"{table[0]['T']:,} x {table[0]['H']:,} x {table[0]['V']:,}"
    rows = [
        {"impl": "Liger", "predicts": "Liger", "case": case},
        {"impl": "Liger", "predicts": "Liger", "case": "1 x 1 x 1"},
    ]
    found = gpu.with_predictions(rows, "NVIDIA H100 80GB HBM3")
    liger = next(r for r in table if r["impl"] == "Liger" and r["group"] == "as shipped")
    assert found[0]["predicted_ms"] == liger["H100_ms"] and "predicted_ms" not in found[1]
    assert gpu.with_predictions(rows, "NVIDIA L4") == rows == gpu.with_predictions(rows, None)
    named_there = {row["impl"] for row in table}
    from longtrace.bench import gpu_parts

    assert {name for name in gpu_parts.HEAD.values() if name} <= named_there
    assert set(gpu_parts.HEAD) <= set(head_peers.IMPLS | head_peers.GPU)


def test_the_parts_leave_room_within_the_ten_minutes():
    assert sum(part.seconds for part in gpu.PARTS.values()) <= 60 * gpu.MINUTES
    for part in gpu.PARTS.values():
        assert part.target.startswith("longtrace.bench.gpu_")


def test_a_machine_without_a_gpu_is_refused(tmp_path):
    if torch.cuda.is_available():
        pytest.skip("there is a GPU here")
    with pytest.raises(Refusal, match="--dry-run runs all of it on the CPU"):
        bench.bench(bench.BenchConfig(name="gpu", json=tmp_path / "gpu.json"))
    with pytest.raises(Refusal, match="found warp; accepted: parity, head"):
        gpu.run(tmp_path, True, ["warp"])


def test_the_bench_imports_without_the_command_line_parser(tmp_path):
    """A GPU machine may have torch, transformers and rich, but no tyro, datasets or math-verify."""
    code = (
        "import sys\nfor name in ('tyro', 'datasets', 'math_verify', 'liger_kernel', 'trl'): sys.modules[name] = None\n"
        "from longtrace.bench import gpu, gpu_grpo, gpu_parts, gpu_sft, traffic\nprint(sorted(gpu.PARTS))"
    )
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, cwd=tmp_path)
    assert done.returncode == 0 and "parity" in done.stdout, done.stderr[-2000:]


@pytest.mark.slow
def test_rollouts_and_steps_run_dry_without_the_optional_packages(tmp_path):
    """What a lent GPU machine has: torch, transformers and rich; every process of the part starts without the rest."""
    blocked = tmp_path / "blocked"
    blocked.mkdir()
    for name in ("tyro", "datasets", "math_verify", "liger_kernel", "trl", "reasoning_gym"):
        (blocked / f"{name}.py").write_text(f"raise ModuleNotFoundError('no {name} here', name='{name}')\n")
    code = "from longtrace.bench.gpu import main; main()"
    path = os.pathsep.join([str(blocked), os.environ.get("PYTHONPATH", "")])
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, "--dry-run", "--parts", "grpo", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, cwd=tmp_path, timeout=240,
        env=os.environ | {"OMP_NUM_THREADS": "1", "PYTHONPATH": path},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert not record["skipped"]
    assert {(row["impl"], row["case"]) for row in record["rows"]} == {
        ("longtrace", "rollout, 32 x 8"), ("transformers", "rollout, 32 x 8"), ("longtrace", "GRPO step, 32 x 8"),
    }  # fmt: skip
    assert all(row["ms"] > 0 and row["tokens_per_s"] > 0 for row in record["rows"])
    assert record["ratios"]["grpo rollout, 32 x 8: transformers / longtrace"] > 0


@pytest.mark.slow
def test_a_dry_run_goes_through_every_part(tmp_path):
    code = "from longtrace.bench.gpu import main; main()"
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-c", code, "--dry-run", "--out", str(tmp_path / "out")],
        capture_output=True, text=True, cwd=tmp_path, timeout=420, env=os.environ | {"OMP_NUM_THREADS": "1"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-3000:] + done.stderr[-3000:]
    record = json.loads((tmp_path / "out" / "gpu.json").read_text())
    assert record["dry_run"] and record["machine"]["gpu"] is None
    failing = [check for check in record["checks"] if not check.startswith("holds")]
    assert record["checks"] and not failing, failing
    stopped = {k: v for k, v in record["skipped"].items() if k in gpu.PARTS}
    assert not stopped, stopped
    timed = {row["part"] for row in record["rows"] if row.get("ms")}
    assert {"head", "attention", "layers", "sft", "grpo"} <= timed, record["skipped"]
    for part in timed:
        assert (tmp_path / "out" / f"{part}.png").stat().st_size > 5000
    ours = [r for r in record["rows"] if r["part"] == "head" and r.get("key") == "exact"]
    assert ours[0]["runs"] == 2 and ours[0]["dh_err"] < 1e-2
    assert any(key.startswith("head") and key.endswith("/ exact") for key in record["ratios"])
    assert "before" in record["clocks"] and "sft" in record["clocks"]

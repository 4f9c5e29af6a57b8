"""The GRPO benches run to the end at their smallest and leave whole records."""

import json

import pytest

from longtrace.bench import BenchConfig, bench

pytestmark = pytest.mark.slow


def test_rollouts_and_steps_are_measured(tmp_path):
    pytest.importorskip("trl")
    bench(BenchConfig("grpo", quick=True, json=tmp_path / "grpo.json"))
    record = json.loads((tmp_path / "grpo.json").read_text())
    rows = {row["impl"]: row for row in record["rows"]}
    assert rows.keys() == {"longtrace", "transformers", "longtrace-grpo", "trl-grpo"} and not record["skipped"]
    for name, row in rows.items():
        assert row["tokens_per_s"] > 0 and row["generate_per_s"] > 0 and row["peak_mb"] > 0
        assert bool(row["train_per_s"]) == name.endswith("grpo"), "steps are trained on, rollouts are not"
    assert (tmp_path / "grpo.png").stat().st_size > 5000


def test_curves_and_controls_are_drawn(tmp_path):
    bench(BenchConfig("experiments/grpo_curve", quick=True, json=tmp_path / "curve.json"))
    record = json.loads((tmp_path / "curve.json").read_text())
    assert [row["impl"] for row in record["rows"]] == ["grpo", "permuted", "sft"]
    assert all(curve[0][0] == 0 and curve[-1][0] == 4 for curves in record["curves"].values() for curve in curves)
    assert record["checks"] == [] and (tmp_path / "grpo_curve.png").stat().st_size > 5000


def test_degenerate_groups_are_left_out_and_gradients_are_equal(tmp_path):
    bench(BenchConfig("experiments/degenerate_groups", quick=True, repeats=1, json=tmp_path / "degenerate.json"))
    record = json.loads((tmp_path / "degenerate.json").read_text())
    tokens = {(row["degenerate"], row["impl"]): row["tokens"] for row in record["rows"]}
    for case, share in (("25% of the groups", 0.25), ("50% of the groups", 0.5), ("75% of the groups", 0.75)):
        assert tokens[case, "longtrace: left out"] / tokens[case, "kept"] == pytest.approx(1 - share, abs=0.1)
        assert record["ratios"][case] > 0
    assert [check.split(":")[0] for check in record["checks"]] == ["holds"] and record["fp32_gradients_differ"] > 0
    assert (tmp_path / "degenerate_groups.png").stat().st_size > 5000

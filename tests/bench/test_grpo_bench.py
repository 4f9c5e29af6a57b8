"""The GRPO benches run to the end at their smallest and leave whole records."""

import json

import numpy as np
import pytest

from longtrace.bench import BenchConfig, bench
from longtrace.bench.experiments import grpo_chain_sum
from longtrace.trainer.config import Refusal
from longtrace.trainer.rows import read_rows

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


def test_sums_are_answered_before_and_after(tmp_path):
    pytest.importorskip("reasoning_gym")
    path = tmp_path / "sums.json"
    bench(BenchConfig("experiments/grpo_chain_sum", quick=True, json=path, seeds=[1, 0]))
    record = json.loads(path.read_text())
    assert [row["impl"] for row in record["rows"]] == ["seed 0", "seed 1", "2 seeds"]
    for row in record["rows"][:2]:
        before, after = (np.array(list(map(int, row[key]))) / 4 for key in ("right_start", "right_end"))
        assert len(before) == len(after) == 24
        assert np.isclose((after - before).mean(), row["difference"])
        assert row["low"] <= row["difference"] <= row["high"]
        assert 0 < row["updates"] <= 4 and row["trained"] > 0 and len(record["curves"][row["impl"]]) == 4
    assert (tmp_path / "grpo_chain_sum.png").stat().st_size > 5000
    rows, curves = grpo_chain_sum._earlier(path, record["setting"])
    assert list(rows) == ["seed 0", "seed 1"] == sorted(curves), "the record keeps its seeds"
    assert grpo_chain_sum._earlier(path, "another") == ({}, {})


def test_problems_of_the_test_are_not_trained_on(tmp_path):
    pytest.importorskip("reasoning_gym")
    trained, left_out, held_out = grpo_chain_sum._problems(tmp_path, 256)
    asked = {
        name: [row.raw["problem"] for row in read_rows(str(tmp_path / f"{name}.jsonl"))] for name in ("train", "test")
    }
    assert len(asked["train"]) == trained and trained + left_out == 4000 and left_out > 0
    assert len(set(asked["test"])) == held_out == 256
    assert not set(asked["train"]) & set(asked["test"])


def test_random_weights_are_refused():
    with pytest.raises(Refusal, match="found no --model"):
        bench(BenchConfig("experiments/grpo_chain_sum"))


def test_the_interval_is_that_of_paired_problems():
    before, after = np.zeros((64, 4)), np.zeros((64, 4))
    after[:, 0], before[:32, 1], after[:32, 1] = 1, 1, 1  # every problem gains a quarter, wherever it starts
    found = grpo_chain_sum._paired(before, after)
    assert [found[key] for key in ("start", "end", "difference", "low", "high")] == [0.125, 0.375, 0.25, 0.25, 0.25]

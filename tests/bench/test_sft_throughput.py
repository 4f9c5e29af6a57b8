"""The SFT bench: refusals, identical work for both sides, ratios and the loss check; the whole of it in the slow suite."""

from __future__ import annotations

import json

import numpy as np
import pytest

from longtrace import bench
from longtrace.bench import harness, sft_throughput
from longtrace.trainer.config import Refusal


def test_unknown_names_and_options_are_refused():
    with pytest.raises(Refusal, match="found warp; accepted: sft_throughput"):
        bench.bench(bench.BenchConfig(name="warp"))
    with pytest.raises(Refusal, match="--impls: found nemo; accepted: longtrace, longtrace-checkpointing, trl"):
        bench.bench(bench.BenchConfig(name="sft_throughput", impls=["nemo"]))
    with pytest.raises(Refusal, match="--steps 2 or more"):
        bench.bench(bench.BenchConfig(name="sft_throughput", steps=1))
    with pytest.raises(Refusal, match=r"no config\.json"):
        bench.bench(bench.BenchConfig(name="sft_throughput", model="no/such/folder"))


def test_generated_rows_are_packed_documents_with_next_token_labels(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 1000}))
    config = bench.BenchConfig(name="sft_throughput", tokens=1000, document_tokens=300, steps=2)
    rows, text = sft_throughput._rows(config, tmp_path)
    assert "documents of 300" in text
    for step in range(2):
        ids, labels, lengths = (rows[f"{name}{step}"] for name in ("ids", "labels", "lengths"))
        assert lengths.tolist() == [300, 300, 300, 100] and len(ids) == len(labels) == 1000
        assert ids.min() >= 3 and ids.max() < 1000
        targets = np.flatnonzero(labels != -100)
        assert (labels[targets] == ids[targets + 1]).all()
        ends = np.cumsum(lengths) - 1
        assert not set(ends) & set(targets), "a document's last token would be asked for the next document's first"
        assert len(targets) == sum(n - 64 for n in lengths), "all but the prompt of 64 is a target"
    assert (rows["ids0"] != rows["ids1"]).any()


def test_rates_are_of_each_steps_own_tokens():
    found = [measured([1.0, 4.0], [8.0, 7.9, 7.8], 1.0) | {"tokens": [500, 1000]}]
    row = sft_throughput._row("longtrace", found, "")
    assert (row["tokens_per_s"], row["tokens_per_s_min"], row["tokens_per_s_max"]) == (375.0, 250.0, 500.0)


def measured(seconds, losses, peak):
    return {"seconds": seconds, "tokens": [1000] * len(seconds), "losses": losses, "floor_mb": 500.0, "peak_mb": peak}


def fake(monkeypatch, results, failed):
    """Results as if measured; TRL is not installed, and what is not in `results` is not asked for."""
    monkeypatch.setattr(harness, "interleaved", lambda targets, **_: (results, failed))
    monkeypatch.setattr(harness, "installed", lambda package: package != "trl")


def test_medians_ratios_losses_and_skips_are_in_the_record(tmp_path, monkeypatch):
    results = {
        "longtrace": [measured([1.0, 2.0], [8.0, 7.9], 100.0), measured([2.0, 3.0], [8.0, 7.9], 120.0)],
        "trl-autocast": [measured([4.0, 4.0], [8.01, 7.8], 220.0), measured([4.0, 8.0], [8.01, 7.8], 220.0)],
    }
    fake(monkeypatch, results, {})
    path = tmp_path / "r.json"
    bench.bench(bench.BenchConfig(name="sft_throughput", quick=True, json=path))
    record = json.loads(path.read_text())
    ours, peer = record["rows"]
    assert (ours["impl"], ours["tokens_per_s"], ours["peak_mb"], ours["final_loss"]) == ("longtrace", 500.0, 110.0, 7.9)
    assert peer["tokens_per_s"] == 250.0 and ours["timed_steps"] == 4 and ours["processes"] == 2
    assert record["ratios"]["tokens_per_s_vs_trl-autocast"] == 2.0
    assert record["ratios"]["peak_mb_vs_trl-autocast"] == 0.5
    assert record["skipped"] == {"trl": "trl is not installed"}
    assert [check.split(":")[0] for check in record["checks"]] == ["holds"]
    assert (tmp_path / "sft_throughput.png").stat().st_size > 5000


def test_a_loss_that_differs_is_said(tmp_path, monkeypatch):
    results = {"longtrace": [measured([1.0], [8.0], 1.0)], "trl-autocast": [measured([1.0], [7.9], 1.0)]}
    fake(monkeypatch, results, {})
    bench.bench(bench.BenchConfig(name="sft_throughput", quick=True, json=tmp_path / "r.json"))
    assert json.loads((tmp_path / "r.json").read_text())["checks"][0].startswith(
        "FAILS: longtrace: first loss within 0.5 %"
    )


def test_a_side_that_fails_is_recorded_and_refused(tmp_path, monkeypatch):
    fake(
        monkeypatch, {"longtrace": [measured([1.0], [8.0], 1.0)]}, {"trl-autocast": "killed, most likely out of memory"}
    )
    with pytest.raises(Refusal, match="trl-autocast did not finish"):
        bench.bench(bench.BenchConfig(name="sft_throughput", quick=True, json=tmp_path / "r.json"))
    assert "out of memory" in json.loads((tmp_path / "r.json").read_text())["skipped"]["trl-autocast"]


@pytest.mark.slow
def test_quick_measures_both_sides_on_the_same_loss(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    path = tmp_path / "r.json"
    bench.bench(bench.BenchConfig(name="sft_throughput", quick=True, json=path, threads=1))
    record = json.loads(path.read_text())
    assert [row["impl"] for row in record["rows"]] == ["longtrace", "trl"]
    assert all(row["tokens_per_s"] > 0 and row["peak_mb"] > 0 and row["timed_steps"] >= 6 for row in record["rows"])
    assert record["checks"][0].startswith("holds")

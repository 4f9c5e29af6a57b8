"""The preference bench: the same pairs for both sides, the ln 2 check, the blend's rows; the whole of it in the slow suite."""

from __future__ import annotations

import json
import math

import numpy as np
import pytest

from longtrace import bench
from longtrace.bench import blend, harness, prefer
from longtrace.trainer.config import Refusal

LN2 = math.log(2)


@pytest.mark.parametrize(
    "options, message",
    [
        ({"impls": ["nemo"]}, "--impls: found nemo; accepted: longtrace, longtrace-checkpointing, trl"),
        ({"steps": 1}, "--steps 2 or more"),
        ({"tokens": 32}, "--tokens 64 or more"),
        ({"model": "no/such/folder"}, r"no config\.json"),
    ],
)
def test_options_that_cannot_be_used(options, message):
    with pytest.raises(Refusal, match=message):
        bench.bench(bench.BenchConfig(name="prefer", **options))


def test_generated_pairs_share_their_prompts(tmp_path):
    (tmp_path / "config.json").write_text(json.dumps({"vocab_size": 1000}))
    pairs, text = prefer.pairs_of(bench.BenchConfig(name="prefer", tokens=800, steps=3), tmp_path)
    lengths = np.diff(pairs["offsets"])
    assert "200 to 800 tokens a side, 64 of them the prompt" in text
    assert len(lengths) == len(pairs["prompts"]) == 2 * prefer.PAIRS * 3
    assert lengths.min() >= 200 and lengths.max() <= 800 and len(set(lengths.tolist())) > 6
    assert (lengths.reshape(-1, 2).max(1) / lengths.reshape(-1, 2).min(1)).max() <= 1.35
    assert prefer.padding(np.array([0, 10, 40])) == 0.5
    assert pairs["tokens"].dtype == np.uint32 and len(pairs["tokens"]) == pairs["offsets"][-1]
    assert pairs["tokens"].min() >= 3 and pairs["tokens"].max() < 1000
    for chosen, rejected in pairs["offsets"][:-1].reshape(-1, 2):
        a, b = (pairs["tokens"][start : start + 200] for start in (chosen, rejected))
        assert (a[:64] == b[:64]).all() and (a[64:] != b[64:]).any()


def test_pairs_of_data_are_those_of_the_asked_lengths(tmp_path, tiny_model):
    def row(i, chosen, rejected):
        return {"prompt": "2+2?", "chosen": f"{i}" + "a" * chosen, "rejected": f"{i}" + "b" * rejected}

    rows = [row(0, 80, 90), row(1, 5, 90), row(2, 90, 300), *(row(i, 60 + i, 80) for i in range(3, 8))]
    data = tmp_path / "pairs.jsonl"
    data.write_text("".join(json.dumps(row) + "\n" for row in rows))
    config = bench.BenchConfig(name="prefer", data=[str(data)], tokens=200, steps=3)
    pairs, text = prefer.pairs_of(config, tiny_model())
    assert "pairs.jsonl, 50 to 200 tokens a side" in text
    numbers = [int(pairs["tokens"][at]) for at in (pairs["offsets"][:-1] + pairs["prompts"])[::2]]
    assert [number - numbers[0] for number in numbers] == [0, 3, 4, 5, 6, 7], "the short and the long one are left out"
    with pytest.raises(Refusal, match=r"--data: found 6 pairs of 50 to 200 tokens a side; accepted: 8 or more"):
        prefer.pairs_of(bench.BenchConfig(name="prefer", data=[str(data)], tokens=200, steps=4), tiny_model())


def measured(seconds, losses, peak):
    found = {"seconds": seconds, "tokens": [1000] * len(seconds), "losses": losses, "peak_mb": peak}
    return found | {"floor_mb": 500.0, "setup_seconds": 2.0}


def test_the_record_answers_both_questions(tmp_path, monkeypatch):
    results = {
        "longtrace": [measured([1.0, 2.0], [LN2, 0.69], 100.0)],
        "trl": [measured([4.0, 4.0], [LN2 + 2e-6, 0.69], 250.0)],
    }
    blended = {"rows": [], "ratios": {"bf16: torch foreach / longtrace": 2.0}, "checks": ["holds: of a copy's rate"]}
    asked = []
    monkeypatch.setattr(harness, "interleaved", lambda targets, **_: (results, {"trl-unmasked": "killed"}))
    monkeypatch.setattr(harness, "installed", lambda package: True)
    monkeypatch.setattr(blend, "work", lambda job: asked.append(job["inputs"]) or blended)
    path = tmp_path / "r.json"
    with pytest.raises(Refusal, match="trl-unmasked did not finish"):
        bench.bench(bench.BenchConfig(name="prefer", quick=True, json=path))
    record = json.loads(path.read_text())
    assert [row["impl"] for row in record["rows"]] == ["longtrace", "trl"] and asked == [["tensors:64x65536"]]
    assert record["ratios"]["tokens_per_s_vs_trl"] == 3.0 and record["ratios"]["peak_mb_vs_trl"] == 0.4
    assert record["ratios"]["bf16: torch foreach / longtrace"] == 2.0
    assert [check.partition(":")[0] for check in record["checks"]] == ["holds", "FAILS", "holds", "holds", "holds"]
    assert record["checks"][2:4] == [
        "holds: 3.00x the tokens per second of trl, at least 2", "holds: 0.40x the memory of trl, at most 0.5",
    ]  # fmt: skip
    assert "trl: first loss 0.6931492, ln 2 to 1e-6 (off by 2.0e-06)" in record["checks"][1]
    assert record["skipped"] == {"trl-unmasked": "killed"} and record["setup_seconds"]["trl"] == 2.0
    assert (tmp_path / "prefer.png").stat().st_size > 5000


@pytest.mark.slow
def test_every_implementation_starts_at_ln_2_and_makes_the_same_steps(tmp_path):
    pytest.importorskip("trl", reason="TRL is not installed")
    path = tmp_path / "r.json"
    bench.bench(bench.BenchConfig(name="prefer", quick=True, json=path, threads=1, impls=list(prefer.IMPLS)))
    record = json.loads(path.read_text())
    assert [row["impl"] for row in record["rows"]] == list(prefer.IMPLS) and not record["skipped"]
    assert all(row["tokens_per_s"] > 0 and row["peak_mb"] > 0 and row["timed_steps"] == 3 for row in record["rows"])
    ours = record["losses"]["longtrace"]
    assert abs(ours[0] - LN2) < 1e-6 and record["checks"][0].startswith("holds: longtrace: first loss")
    for losses in record["losses"].values():
        assert losses == pytest.approx(ours, rel=0.03), "bf16 weights round what fp32 masters keep"
    assert {row["impl"] for row in record["blend"]} >= {"longtrace", "torch foreach", "copy"}

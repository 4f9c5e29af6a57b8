"""The demo from end to end: a few steps of it for the plumbing, and the quick recipe as continuous integration runs it."""

from __future__ import annotations

import dataclasses
import json
import shlex

import pytest

from longtrace.trainer import cli, demo


def check_what_is_left(out, capsys):
    """Summary, page and models of a demo agree; the printed command gives the same rate again."""
    summary = json.loads((out / "summary.json").read_text())
    for name in ("untrained", "sft", "control", "rl"):
        low, high = summary[f"ci_{name}"]
        assert 0 <= low <= summary[f"solved_rate_{name}"] <= high <= 1
    assert summary["seconds"] > summary["train_seconds"] > 0 and summary["tokens_per_s"] > 0
    page = (out / "report.html").read_text()
    assert "Trained on traces" in page and f"{100 * summary['solved_rate_rl']:.1f} %" in page
    assert (out / "rl" / "model.safetensors").is_file() and (out / "control" / "metrics.jsonl").is_file()
    printed = " ".join(capsys.readouterr().out.split())
    assert summary["evaluate"] in printed and "trained on answers only" in printed
    arguments = shlex.split(summary["evaluate"])[1:]
    assert cli.main([*arguments, "--out", str(out / "again.json")]) == 0
    again = json.loads((out / "again.json").read_text())
    assert again["solved_rate"] == summary["solved_rate_rl"] and again["n"] == summary["held_out"]
    return summary


def test_a_few_steps_go_all_the_way_and_miss_the_bar(tmp_path, monkeypatch, capsys):
    few = dataclasses.replace(demo.QUICK, optimizer_steps=3, control_steps=2, rl_steps=1, problems=60, held_out=10)
    monkeypatch.setattr(demo, "QUICK", few)
    with pytest.raises(SystemExit) as ended:
        cli.main(["demo", "--quick", "--out", str(tmp_path / "demo")])
    assert ended.value.code == 1
    assert demo.train.console.quiet is False
    summary = check_what_is_left(tmp_path / "demo", capsys)
    assert summary["solved_rate_rl"] < few.bar_rl and summary["quick"] is True


@pytest.mark.slow
def test_the_quick_demo_meets_its_bar(tmp_path, capsys):
    assert cli.main(["demo", "--quick", "--out", str(tmp_path / "demo")]) == 0
    summary = check_what_is_left(tmp_path / "demo", capsys)
    assert summary["solved_rate_rl"] >= max(demo.QUICK.bar_rl, summary["solved_rate_sft"] - 0.2)

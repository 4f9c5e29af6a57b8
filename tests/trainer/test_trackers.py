"""Trackers: one refusal line when a package is missing, events written without a network, only finite numbers sent."""

from __future__ import annotations

import sys
import types

import pytest

from longtrace.trainer.config import Refusal
from longtrace.trainer.trackers import tracker


def test_none_does_nothing_and_writes_nothing(tmp_path):
    t = tracker("none", "run", tmp_path / "out", {})
    t.log({"loss": 1.0}, 1)
    t.finish()
    assert not (tmp_path / "out").exists()


def test_unknown_kind_is_refused_with_the_accepted_ones(tmp_path):
    with pytest.raises(Refusal, match="found mlflow; accepted: none, tensorboard, wandb, trackio"):
        tracker("mlflow", "run", tmp_path, {})


@pytest.mark.parametrize("kind", ["wandb", "trackio", "tensorboard"])
def test_missing_package_names_the_extra(kind, tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "torch.utils.tensorboard" if kind == "tensorboard" else kind, None)
    with pytest.raises(Refusal, match=rf"--tracker {kind}: .* is not installed; pip install 'longtrace\[trackers\]'"):
        tracker(kind, "run", tmp_path, {})


def test_tensorboard_events_hold_the_finite_numbers(tmp_path):
    pytest.importorskip("tensorboard", reason="tensorboard is not installed")
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    t = tracker("tensorboard", "run", tmp_path, {"lr": 1e-5, "out": tmp_path})
    for step, loss in enumerate([2.5, 2.25, float("nan")], start=1):
        t.log({"loss": loss, "lr": 1e-5, "mfu": None, "note": "x"}, step)
    t.finish()
    events = EventAccumulator(str(tmp_path / "tensorboard"))
    events.Reload()
    assert sorted(events.Tags()["scalars"]) == ["loss", "lr"]
    assert [(e.step, e.value) for e in events.Scalars("loss")] == [(1, 2.5), (2, 2.25)]


@pytest.mark.parametrize("kind", ["wandb", "trackio"])
def test_run_config_and_steps_are_handed_on(kind, tmp_path, monkeypatch):
    calls = []

    class Run:
        def log(self, metrics, step):
            calls.append(("log", metrics, step))

        def finish(self):
            calls.append(("finish",))

    def init(**options):
        calls.append(("init", options))
        return Run()

    monkeypatch.setitem(sys.modules, kind, types.SimpleNamespace(init=init))
    monkeypatch.delenv("WANDB_PROJECT", raising=False)
    t = tracker(kind, "mine", tmp_path / "out", {"lr": 1e-5, "out": tmp_path})
    t.log({"loss": 1.5, "eval_loss": float("inf")}, 7)
    t.finish()
    options = calls[0][1]
    assert (options["project"], options["name"]) == ("longtrace", "mine")
    assert options["config"] == {"lr": 1e-5, "out": str(tmp_path)}
    if kind == "wandb":
        assert options["dir"] == str(tmp_path / "out"), "wandb must write inside the run folder"
    assert calls[1:] == [("log", {"loss": 1.5}, 7), ("finish",)]

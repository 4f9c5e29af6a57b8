"""A save killed at any write, fsync, rename or removal leaves the previous checkpoint or the new one, whole."""

from __future__ import annotations

import shutil

import pytest
import torch

from longtrace.trainer import checkpoint


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


WAYS = ["", "names", slow("contents")]  # killed, or with the power: see trial_server.py


def saved(step: int, version: int = 0):
    draw = torch.Generator().manual_seed(1000 * version + step)  # as content() of trial_server.py
    tensors = {
        "model.layers.0.weight": torch.randn(16, 8, generator=draw),
        "model.norm": torch.randn(8, generator=draw).to(torch.bfloat16),
        "optimizer.exp_avg.layers.0.weight": torch.randn(16, 8, generator=draw),
        "buffer": torch.arange(step),
    }
    return tensors, {"step": step, "version": version, "loss": 1 / (step + 1)}


def assert_holds(path, step: int, version: int = 0) -> None:
    tensors, state = checkpoint.load(path)
    expected, expected_state = saved(step, version)
    assert state == expected_state
    assert tensors.keys() == expected.keys()
    for name, tensor in expected.items():
        assert tensors[name].dtype == tensor.dtype and torch.equal(tensors[name], tensor), name


@pytest.mark.parametrize("keep_last, power", [(1, ""), (1, "names"), slow(1, "contents"), slow(2, "names")])
def test_every_point_of_a_save(trials, tmp_path, keep_last, power):
    before = tmp_path / "before"
    trials.points("saves", folder=str(before), steps=[2, 4], keep_last=keep_last)
    shutil.copytree(before, tmp_path / "count")
    points = trials.points("saves", folder=str(tmp_path / "count"), steps=[6], keep_last=keep_last)
    assert len(points) > 10
    found = []
    for point in range(1, len(points) + 1):
        folder = tmp_path / f"at-{point}"
        shutil.copytree(before, folder)
        died = trials.run("saves", point=point, power=power, folder=str(folder), steps=[6], keep_last=keep_last)
        assert died["status"] == -9, (point, died["log"])
        step = int(checkpoint.latest(folder).name[-8:])
        found.append(step)
        assert_holds(checkpoint.latest(folder), step)
        for path in folder.glob("step-*"):
            assert_holds(path, int(path.name[-8:]))
        # whatever was left lying about, the next save succeeds and cleans up
        tensors, state = saved(8)
        assert_holds(checkpoint.save(folder, 8, tensors, state, keep_last=1), 8)
        assert [p.name for p in folder.iterdir()] == ["step-00000008"], point
        shutil.rmtree(folder)
    assert found == sorted(found) and set(found) == {4, 6}, found


@pytest.mark.parametrize("power", WAYS)
def test_every_point_of_a_replacement(trials, tmp_path, power):
    """The only checkpoint there is, saved once more with other content: old or new at every moment, never none."""
    before = tmp_path / "before"
    trials.points("saves", folder=str(before), steps=[4], keep_last=1)
    shutil.copytree(before, tmp_path / "count")
    points = trials.points("saves", folder=str(tmp_path / "count"), steps=[4], keep_last=1, version=1)
    found = []
    for point in range(1, len(points) + 1):
        folder = tmp_path / f"at-{point}"
        shutil.copytree(before, folder)
        died = trials.run("saves", point=point, power=power, folder=str(folder), steps=[4], keep_last=1, version=1)
        assert died["status"] == -9, (point, died["log"])
        version = checkpoint.load(checkpoint.latest(folder))[1]["version"]
        found.append(version)
        assert_holds(checkpoint.latest(folder), 4, version)
        tensors, state = saved(6)
        assert_holds(checkpoint.save(folder, 6, tensors, state, keep_last=2), 6)
        assert sorted(p.name for p in folder.iterdir()) == ["step-00000004", "step-00000006"], point
        assert_holds(folder / "step-00000004", 4, version)
        shutil.rmtree(folder)
    assert found == sorted(found) and set(found) == {0, 1}, found


@pytest.mark.parametrize("power", WAYS)
def test_every_point_of_the_first_save(trials, tmp_path, power):
    points = trials.points("saves", folder=str(tmp_path / "count"), steps=[2], keep_last=1)
    found = []
    for point in range(1, len(points) + 1):
        folder = tmp_path / f"at-{point}"
        died = trials.run("saves", point=point, power=power, folder=str(folder), steps=[2], keep_last=1)
        assert died["status"] == -9, (point, died["log"])
        path = checkpoint.latest(folder)
        found.append(path is not None)
        if path:
            assert_holds(path, 2)
    assert found == sorted(found) and not found[0] and (found[-1] or power), found


def test_a_save_into_an_older_history_killed_anywhere(trials, tmp_path):
    """Going on from step 2 when 4 and 6 exist: 4 is replaced and 6 goes, and something whole is always there."""
    before = tmp_path / "before"
    trials.points("saves", folder=str(before), steps=[2, 4, 6], keep_last=3)
    shutil.copytree(before, tmp_path / "count")
    points = trials.points("saves", folder=str(tmp_path / "count"), steps=[4], keep_last=3, version=1)
    assert sorted(p.name for p in (tmp_path / "count").iterdir()) == ["step-00000002", "step-00000004"]
    for point in range(1, len(points) + 1):
        folder = tmp_path / f"at-{point}"
        shutil.copytree(before, folder)
        died = trials.run("saves", point=point, folder=str(folder), steps=[4], keep_last=3, version=1)
        assert died["status"] == -9, (point, died["log"])
        path = checkpoint.latest(folder)
        state = checkpoint.load(path)[1]
        assert (state["step"], state["version"]) in {(6, 0), (4, 1)}, point
        assert_holds(path, state["step"], state["version"])
        shutil.rmtree(folder)


@pytest.mark.parametrize("power", ["", "contents", "names"])
def test_every_point_of_a_small_file(trials, tmp_path, power):
    points = trials.points("small_file", path=str(tmp_path / "count"), text="new")
    found = []
    for point in range(1, len(points) + 1):
        path = tmp_path / f"at-{point}" / "config.yaml"
        checkpoint.write_atomic(path, "old\n")
        died = trials.run("small_file", point=point, power=power, path=str(path), text="new é\n")
        assert died["status"] == -9, (point, died["log"])
        found.append(path.read_text("utf-8"))
        checkpoint.write_atomic(path, "newer")
        assert [p.name for p in path.parent.iterdir()] == ["config.yaml"], point
    assert set(found) <= {"old\n", "new é\n"} and found[0] == "old\n", found
    assert power or found[-1] == "new é\n"

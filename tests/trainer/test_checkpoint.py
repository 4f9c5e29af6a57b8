"""Checkpoints: exact round trips, every kind of damage refused by the file's name, metrics that resume."""

from __future__ import annotations

import json
import math
import os
import random
import shutil
from pathlib import Path

import numpy as np
import pytest
import torch

from longtrace.trainer import checkpoint
from longtrace.trainer.config import Refusal

FILES = ["manifest.json", "model.safetensors", "optimizer.safetensors", "other.safetensors", "state.json"]


def content(step: int = 20):
    tensors = {
        "model.layers.0.weight": torch.randn(6, 4),
        "model.norm": torch.randn(4).to(torch.bfloat16),
        "optimizer.exp_avg.layers.0.weight": torch.randn(6, 4),
        "optimizer.step.norm": torch.tensor(7.0),
        "cursor": torch.arange(3),
    }
    return tensors, {"source": {"epoch": 1, "cursor": 5}, "best": {"loss": math.inf}, "rng": checkpoint.rng_state()}


@pytest.fixture
def saved(tmp_path, seed):
    """A checkpoint folder of step 20, with step 10 beside it."""
    for step in (10, 20):
        path = checkpoint.save(tmp_path / "checkpoints", step, *content(), keep_last=2)
    return path


def refusal(path: Path) -> str:
    with pytest.raises(Refusal) as caught:
        checkpoint.load(path)
    message = str(caught.value)
    assert "\n" not in message
    return message


# ---- round trips ----------------------------------------------------------------------------------------------------


def test_round_trip_is_exact(tmp_path, seed):
    tensors = {
        "model.strided": torch.randn(5, 7).t(),
        "model.half": torch.randn(3).to(torch.float16),
        "optimizer.bytes": torch.arange(256, dtype=torch.uint8),
        "optimizer.scalar": torch.tensor(3.0, dtype=torch.float64),
        "model.parameter": torch.nn.Parameter(torch.randn(2, 2)),
        "model.special": torch.tensor([math.nan, math.inf, -0.0, 1e-45]),
        "empty": torch.zeros(0, 3),
        "flags": torch.tensor([True, False]),
    }
    state = {"loss": 0.1 + 0.2, "best": math.inf, "name": "é\n", "list": [1, [2.5, None]], "big": 2**70}
    path = checkpoint.save(tmp_path, 3, tensors, state, keep_last=1)
    loaded, loaded_state = checkpoint.load(path)
    assert path.name == "step-00000003"
    assert loaded_state == {"step": 3} | state
    assert loaded.keys() == tensors.keys()
    for name, tensor in tensors.items():
        assert loaded[name].dtype == tensor.dtype and loaded[name].shape == tensor.shape, name
        assert (
            loaded[name]
            .contiguous()
            .view(-1)
            .view(torch.uint8)
            .equal(tensor.detach().contiguous().view(-1).view(torch.uint8))
        ), name


def test_model_file_has_the_models_own_names(saved):
    from safetensors.torch import load_file

    assert set(load_file(saved / "model.safetensors")) == {"layers.0.weight", "norm"}


def test_two_saves_of_the_same_content_are_the_same_bytes(tmp_path, seed):
    tensors, state = content()
    one = checkpoint.save(tmp_path / "one", 5, tensors, state, keep_last=1)
    two = checkpoint.save(tmp_path / "two", 5, dict(reversed(tensors.items())), state, keep_last=1)
    for name in FILES:
        assert (one / name).read_bytes() == (two / name).read_bytes(), name


def test_nothing_is_pickled(saved):
    assert sorted(os.listdir(saved)) == sorted(FILES)
    for path in saved.iterdir():
        if path.suffix == ".json":
            json.loads(path.read_text("utf-8"))


@pytest.mark.parametrize("keep_last, kept", [(1, [8]), (2, [6, 8]), (3, [4, 6, 8]), (9, [2, 4, 6, 8])])
def test_keeps_the_last(tmp_path, keep_last, kept):
    for step in (2, 4, 6, 8):
        checkpoint.save(tmp_path, step, *content(), keep_last=keep_last)
    assert sorted(os.listdir(tmp_path)) == [f"step-{step:08d}" for step in kept]
    assert checkpoint.latest(tmp_path).name == f"step-{kept[-1]:08d}"


def test_going_on_from_an_older_step_drops_the_later_ones(tmp_path):
    for step in (2, 4, 6):
        checkpoint.save(tmp_path, step, *content(), keep_last=5)
    checkpoint.save(tmp_path, 3, *content(), keep_last=5)
    assert sorted(os.listdir(tmp_path)) == ["step-00000002", "step-00000003"]


def test_latest_is_by_number_and_reads_nothing_else(tmp_path):
    assert checkpoint.latest(tmp_path / "absent") is None
    assert checkpoint.latest(tmp_path) is None
    for name in ("step-99999999", "step-100000000", ".step-200000000.tmp-17", "step-7", "notes"):
        (tmp_path / name).mkdir()
    assert checkpoint.latest(tmp_path).name == "step-100000000"


def test_tidy_removes_leftovers_and_puts_back_what_a_dead_replacement_hid(tmp_path, seed):
    checkpoint.tidy(tmp_path / "absent")
    for step in (4, 6):
        checkpoint.save(tmp_path, step, *content(), keep_last=2)
    (tmp_path / "step-00000006").rename(tmp_path / ".step-00000006.old-17")
    (tmp_path / ".step-00000008.tmp-17").mkdir()
    (tmp_path / ".step-00000004.old-17").mkdir()
    assert checkpoint.latest(tmp_path).name == ".step-00000006.old-17"  # found even before
    checkpoint.tidy(tmp_path)
    assert sorted(os.listdir(tmp_path)) == ["step-00000004", "step-00000006"]
    checkpoint.load(checkpoint.latest(tmp_path))


def test_keeping_none_is_refused(tmp_path):
    with pytest.raises(Refusal, match="keep_last: found 0"):
        checkpoint.save(tmp_path, 1, *content(), keep_last=0)


def test_a_state_of_another_step_is_an_error(tmp_path):
    with pytest.raises(ValueError, match="step 3"):
        checkpoint.save(tmp_path, 4, {}, {"step": 3}, keep_last=1)


@pytest.mark.parametrize("function", ["_write_tensors", "_write_bytes", "_fsync", "_rename"])
def test_a_full_disk_leaves_what_was_there(saved, monkeypatch, function):
    folder, before = saved.parent, sorted(os.listdir(saved.parent))
    real, calls = getattr(checkpoint, function), []

    def fails(*arguments):
        calls.append(arguments)
        if len(calls) == 1:
            raise OSError(28, "No space left on device")
        return real(*arguments)

    monkeypatch.setattr(checkpoint, function, fails)
    with pytest.raises(OSError, match="No space"):
        checkpoint.save(folder, 30, *content(), keep_last=1)
    assert [name for name in sorted(os.listdir(folder)) if not name.startswith(".")] == before
    checkpoint.load(checkpoint.latest(folder))
    monkeypatch.undo()
    checkpoint.save(folder, 30, *content(), keep_last=1)
    assert os.listdir(folder) == ["step-00000030"]


# ---- damage ---------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name", FILES)
def test_a_missing_file_is_named(saved, name):
    (saved / name).unlink()
    message = refusal(saved)
    assert message.startswith(f"{saved / name}: missing") and "step-00000010" in message


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("left", [0, 1, -1])
def test_a_torn_file_is_named(saved, name, left):
    size = (saved / name).stat().st_size
    os.truncate(saved / name, left % size)
    assert refusal(saved).startswith(f"{saved / name}: {'broken' if name == 'manifest.json' else 'torn'}") or (
        # without its last newline the manifest is still JSON
        name == "manifest.json" and refusal(saved).startswith(f"{saved / name}: edited")
    )


@pytest.mark.parametrize("name", FILES)
def test_a_flipped_bit_is_named(saved, name, seed):
    original = (saved / name).read_bytes()
    for bit in random.Random(seed).sample(range(8 * len(original)), 64):
        data = bytearray(original)
        data[bit // 8] ^= 1 << bit % 8
        (saved / name).write_bytes(data)
        assert refusal(saved).startswith(f"{saved / name}: "), bit
    (saved / name).write_bytes(original)
    checkpoint.load(saved)


@pytest.mark.parametrize("name", ["extra.txt", ".hidden", "model-2.safetensors", "folder"])
def test_an_unexpected_file_is_named(saved, name):
    (saved / name).mkdir() if name == "folder" else (saved / name).write_text("?")
    assert refusal(saved).startswith(f"{saved / name}: unexpected")


def test_a_swapped_file_is_named(saved):
    """A file of another checkpoint, with the same size."""
    shutil.copyfile(saved.parent / "step-00000010" / "model.safetensors", saved / "model.safetensors")
    assert refusal(saved).startswith(f"{saved / 'model.safetensors'}: edited")


def test_a_folder_in_place_of_a_file_is_named(saved):
    (saved / "state.json").unlink()
    (saved / "state.json").mkdir()
    assert refusal(saved).startswith(f"{saved / 'state.json'}: ")


def test_an_edited_manifest_is_named(saved):
    """Even one that agrees with the edited file, as long as its own digest was not redone."""
    state = (saved / "state.json").read_bytes().replace(b'"epoch": 1', b'"epoch": 2')
    (saved / "state.json").write_bytes(state)
    fields = json.loads((saved / "manifest.json").read_text())
    fields["files"]["state.json"]["sha256"] = checkpoint._sha256(saved / "state.json")
    (saved / "manifest.json").write_text(json.dumps(fields, indent=1, sort_keys=True) + "\n")
    assert refusal(saved).startswith(f"{saved / 'manifest.json'}: edited")


@pytest.mark.parametrize(
    "text", ["", "[]", "null", "{}", '{"format": 1}', "not json", '{"format": 1, "files": []}', "\xff"]
)
def test_a_broken_manifest_is_named(saved, text):
    (saved / "manifest.json").write_bytes(text.encode("latin-1"))
    assert refusal(saved).startswith(f"{saved / 'manifest.json'}: ")


def test_another_format_is_named(saved):
    (saved / "manifest.json").write_bytes(checkpoint._manifest_bytes({"format": 2, "step": 20, "files": {}}))
    assert "found format 2; accepted: 1" in refusal(saved)


def test_no_folder_at_all(saved):
    message = refusal(saved.parent / "step-00000030")
    assert "no checkpoint folder there" in message and "step-00000010, step-00000020" in message


# ---- random number generators -----------------------------------------------------------------------------------------


def draws():
    return random.random(), random.gauss(0, 1), np.random.rand(), np.random.randn(), torch.rand(3).tolist()


@pytest.mark.parametrize("warm", [0, 1])
def test_generators_continue_exactly(tmp_path, seed, warm):
    for _ in range(warm):  # gauss and randn hold a spare value after an odd number of draws
        draws()
    path = checkpoint.save(tmp_path, 1, {}, {"rng": checkpoint.rng_state()}, keep_last=1)
    expected = draws()
    random.seed(99), np.random.seed(99), torch.manual_seed(99)
    checkpoint.set_rng_state(checkpoint.load(path)[1]["rng"])
    assert draws() == expected


def test_saving_draws_nothing(tmp_path, seed):
    before = checkpoint.rng_state()
    checkpoint.save(tmp_path, 1, {"model.x": torch.ones(3)}, {}, keep_last=1)
    assert checkpoint.rng_state() == before


# ---- small files and metrics --------------------------------------------------------------------------------------------


def test_write_atomic_makes_folders_and_replaces(tmp_path):
    path = tmp_path / "run" / "config.yaml"
    checkpoint.write_atomic(path, "one")
    checkpoint.write_atomic(path, b"two\xff")
    assert path.read_bytes() == b"two\xff" and os.listdir(path.parent) == ["config.yaml"]


def test_metrics_append_and_resume(tmp_path):
    path = tmp_path / "run" / "metrics.jsonl"
    log = checkpoint.MetricsLog(path, 0)
    rows = [{"step": step, "loss": 1 / step} for step in range(1, 8)]
    for row in rows:
        log.append(row)
        assert json.loads(path.read_bytes().splitlines()[-1]) == row  # on the file at once
    whole = path.read_bytes()
    path.write_bytes(whole + b'{"step": 8, "lo')  # the process died in the middle of a line
    log = checkpoint.MetricsLog(path, 4)
    assert log.rows() == rows[:4]
    for row in rows[4:]:
        log.append(row)
    log.sync()
    log.close()
    assert path.read_bytes() == whole and log.rows() == rows


def test_metrics_torn_exactly_at_the_checkpoint(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n{"step": 2}\n{"step": 3')
    assert checkpoint.MetricsLog(path, 3).rows() == [{"step": 1}, {"step": 2}]
    assert path.read_text() == '{"step": 1}\n{"step": 2}\n'


def test_metrics_start_anew(tmp_path):
    path = tmp_path / "metrics.jsonl"
    path.write_text("of an earlier run\n")
    assert checkpoint.MetricsLog(path, 0).rows() == [] and path.read_bytes() == b""
    assert checkpoint.MetricsLog(tmp_path / "absent.jsonl", 6).rows() == []


@pytest.mark.parametrize("line", ["{", "[1]", "{}", '{"step": "a"}', "\x00", ""])
def test_metrics_broken_in_the_middle_are_named(tmp_path, line):
    path = tmp_path / "metrics.jsonl"
    path.write_text('{"step": 1}\n' + line + '\n{"step": 3}\n')
    with pytest.raises(Refusal, match=r"metrics\.jsonl:2: found"):
        checkpoint.MetricsLog(path, 3)
    assert path.read_text().endswith('{"step": 3}\n')  # nothing was cut

"""A training run killed at any moment and resumed ends with the weights and the losses of one that was not."""

from __future__ import annotations

import json
import os
import random
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from longtrace.trainer import checkpoint

SEED = int(os.environ.get("LONGTRACE_TEST_SEED", "0"))
CLOCK = {"dt", "tok_per_sec", "mfu", "seconds"}
VARIANTS = {
    "full": {"dtype": "bf16", "eval_fraction": 0.1, "eval_every": 3, "tokens_per_step": 512},
    "dropout": {"dtype": "fp32", "lora_rank": 4, "lora_dropout": 0.2},
}


class Runs:
    """Runs of one variant; `whole` is the uninterrupted one."""

    def __init__(self, trials, folder: Path, model: Path, data: Path, variant: str):
        self.trials, self.folder, self.count = trials, folder, 0
        self.fields = {
            "model": str(model),
            "data": [str(data)],
            "max_tokens": 256,
            "steps": 12,
            "lr": 1e-2,
            "save_every": 2,
            "device": "cpu",
            "resume": "auto",
            **VARIANTS[variant],
        }
        trials.warm("sft", out=str(self.new()), **self.fields | {"steps": 1})
        self.whole = self.new()
        answer = self.run(self.whole)
        assert answer["status"] == 0, answer["log"]
        self.points, self.seconds = answer["points"], answer["seconds"]

    def new(self) -> Path:
        self.count += 1
        return self.folder / f"run-{self.count}"

    def run(self, out: Path, **death) -> dict:
        return self.trials.run("sft", out=str(out), **self.fields, **death)

    def finish(self, out: Path, what) -> None:
        """Resumes `out`, and compares all it leaves with the uninterrupted run."""
        answer = self.run(out)
        assert answer["status"] == 0, (what, answer["log"])
        self.assert_same(out, what)
        shutil.rmtree(out)

    def assert_same(self, out: Path, what) -> None:
        for name in ("model.safetensors", "adapter_model.safetensors"):
            assert (out / name).exists() == (self.whole / name).exists(), (what, name)
            if (out / name).exists():
                assert_equal(load_file(out / name), load_file(self.whole / name), what)
        assert names(out) == names(self.whole), what
        for saved in (self.whole / "checkpoints").iterdir():
            (tensors, state), (expected, expected_state) = map(
                checkpoint.load, (out / "checkpoints" / saved.name, saved)
            )
            assert_equal(tensors, expected, what)
            for one in (state, expected_state):  # python's and numpy's generators serve nothing here and are not seeded
                one["config"], one["rng"] = None, one["rng"]["torch"]
            assert state == expected_state, what
        assert losses(out) == losses(self.whole), what


def names(out: Path) -> set[str]:
    return {str(path.relative_to(out)) for path in out.rglob("*")}


def losses(out: Path) -> list[dict]:
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, len(rows) + 1))
    return [{key: value for key, value in row.items() if key not in CLOCK} for row in rows]


def assert_equal(tensors: dict, expected: dict, what) -> None:
    assert tensors.keys() == expected.keys(), what
    for name, tensor in expected.items():
        assert torch.equal(tensors[name], tensor), (what, name)


@pytest.fixture(scope="module")
def variant(trials, tmp_path_factory, tiny_model, chain_data):
    """variant(name) -> its Runs, made once."""
    made = {}

    def make(name: str) -> Runs:
        if name not in made:
            made[name] = Runs(trials, tmp_path_factory.mktemp(name), tiny_model("llama"), chain_data, name)
        return made[name]

    return make


def slow(*values):
    return pytest.param(*values, marks=pytest.mark.slow)


def of_one_save(points: list[str]) -> range:
    """The numbers of the points between the first touch of step 6 and that of step 8, and all of the export."""
    first = [next(i for i, point in enumerate(points, 1) if f"step-{step:08d}" in point) for step in (6, 8)]
    return range(*first)


def of_the_export(points: list[str]) -> range:
    return range(next(i for i, point in enumerate(points, 1) if ".export.tmp" in point), len(points) + 1)


@pytest.mark.parametrize("name", VARIANTS)
def test_the_run_learned(variant, name):
    """What the other tests compare is not trivially equal."""
    runs = variant(name)
    rows = losses(runs.whole)
    assert len(rows) == 12 and rows[-1]["loss"] < rows[0]["loss"] - 0.1
    assert sorted(path.name for path in (runs.whole / "checkpoints").iterdir()) == ["step-00000010", "step-00000012"]


@pytest.mark.parametrize("name, moments", [("full", 2), ("dropout", 2), slow("full", 20), slow("dropout", 20)])
def test_killed_at_random_moments(variant, name, moments):
    runs = variant(name)
    draw, killed = random.Random(f"{SEED} {name} {moments}"), 0
    for number in range(moments):
        out, moment = runs.new(), draw.uniform(0, runs.seconds)
        answer = runs.run(out, after=moment)
        killed += answer["status"] == -signal.SIGKILL
        runs.finish(out, f"killed after {moment:.3f} of {runs.seconds:.3f} s (number {number}, seed {SEED})")
    assert killed >= moments // 2, f"{killed} of {moments} runs were killed before their end"


@pytest.mark.parametrize("name, kills", [("full", 3), slow("full", 10), slow("dropout", 10)])
def test_killed_again_and_again(variant, name, kills):
    """Each resumed run is killed too, wherever it has got to."""
    runs = variant(name)
    draw, out = random.Random(f"{SEED} {name} {kills}"), runs.new()
    for _ in range(kills):
        runs.run(out, after=draw.uniform(0.2, 0.9) * runs.seconds)
    runs.finish(out, f"killed {kills} times, seed {SEED}")


@pytest.mark.parametrize("name, every", [("full", 13), slow("full", 1), slow("dropout", 1)])
@pytest.mark.parametrize("part", [of_one_save, of_the_export])
def test_killed_at_the_points_of(variant, part, name, every):
    runs = variant(name)
    numbers = list(part(runs.points))
    assert len(numbers) > 15, runs.points
    for number in numbers[SEED % every :: every]:
        out, what = runs.new(), f"point {number}: {runs.points[number - 1]}"
        answer = runs.run(out, point=number)
        assert answer["status"] == -signal.SIGKILL, (what, answer["log"])
        runs.finish(out, what)


def test_the_exported_folder_is_old_or_new_or_refuses(trials, tmp_path, tiny_model):
    """Exporting over another model, killed at every point: never a mix that loads."""
    from transformers import AutoModelForCausalLM

    old, new = tiny_model("llama"), tiny_model("llama", num_key_value_heads=4)
    weights = {name: load_file(folder / "model.safetensors") for name, folder in (("old", old), ("new", new))}
    trials.warm("export", model=str(new), out=str(tmp_path / "warm"))
    shutil.copytree(old, tmp_path / "count")
    points = trials.points("export", model=str(new), out=str(tmp_path / "count"))
    found = []
    for number in range(1, len(points) + 1):
        out = tmp_path / f"at-{number}"
        shutil.copytree(old, out)
        answer = trials.run("export", point=number, model=str(new), out=str(out))
        assert answer["status"] == -signal.SIGKILL, (points[number - 1], answer["log"])
        try:
            model = AutoModelForCausalLM.from_pretrained(out)
        except (OSError, ValueError):
            found.append("refuses")
            continue
        state = model.state_dict()
        found.append("old" if state["model.layers.0.self_attn.k_proj.weight"].shape[0] == 16 else "new")
        for name, tensor in weights[found[-1]].items():
            assert torch.equal(state[name], tensor), (number, points[number - 1], name)
    assert sorted(set(found), key=found.index) == ["old", "refuses", "new"], found
    assert found == sorted(found, key=["old", "refuses", "new"].index), found


# ---- SIGTERM ------------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("name, rows", [("full", 3), slow("full", 6), slow("dropout", 1), slow("dropout", 8)])
def test_sigterm_saves_and_leaves_with_143(variant, name, rows):
    """Whatever save_every says, the checkpoint it leaves is of the last whole step."""
    runs = variant(name)
    out = runs.new()
    answer = runs.run(out, lines=[str(out / "metrics.jsonl"), rows], signal=signal.SIGTERM)
    assert answer["status"] == 143, answer["log"]
    done = len(losses(out))
    assert rows <= done < 12
    assert checkpoint.load(checkpoint.latest(out / "checkpoints"))[1]["step"] == done
    runs.finish(out, f"terminated after step {done}")


# ---- the command line ---------------------------------------------------------------------------------------------------


def arguments(fields: dict, out: Path, **changes) -> list[str]:
    flags = ["sft", "--out", str(out)]
    for key, value in (fields | changes).items():
        flags += [f"--{key.replace('_', '-')}", *(map(str, value) if isinstance(value, list) else [str(value)])]
    return flags


@pytest.mark.parametrize("damage", ["flip", slow("delete"), slow("tear"), slow("add")])
def test_resuming_from_damage_exits_with_2_and_names_the_file(variant, damage):
    runs = variant("full")
    out = runs.new()
    shutil.copytree(runs.whole, out)
    target = checkpoint.latest(out / "checkpoints") / ("extra" if damage == "add" else "optimizer.safetensors")
    if damage == "delete":
        target.unlink()
    elif damage == "tear":
        os.truncate(target, 1000)
    elif damage == "flip":
        data = bytearray(target.read_bytes())
        data[-5] ^= 4
        target.write_bytes(data)
    else:
        target.write_text("")
    before = (out / "metrics.jsonl").read_bytes()
    answer = runs.trials.run("command", arguments=arguments(runs.fields, out))
    assert answer["status"] == 2, answer["log"]
    last = answer["log"].strip().splitlines()[-1]
    assert last.startswith(f"longtrace sft: {target}: ") and "step-00000010" in last
    assert (out / "metrics.jsonl").read_bytes() == before
    # the message's way out: the other checkpoint
    other = str(target.parent.parent / "step-00000010")
    answer = runs.trials.run("command", arguments=arguments(runs.fields, out, resume=other))
    assert answer["status"] == 0, answer["log"]
    runs.assert_same(out, damage)


@pytest.mark.slow
def test_the_command_itself_killed_and_resumed(variant):
    """Processes of their own, as users run them: terminated, resumed and killed, resumed."""
    runs = variant("full")
    script = Path(sys.executable).with_name("longtrace")
    environment = os.environ | {"OMP_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
    out, rows = runs.new(), 2
    for stop, code in ((signal.SIGTERM, 143), (signal.SIGKILL, -signal.SIGKILL)):
        process = subprocess.Popen(
            [script, *arguments(runs.fields, out)], env=environment, stdout=subprocess.PIPE, stderr=subprocess.STDOUT
        )
        while process.poll() is None and lines(out) < rows:
            time.sleep(0.001)
        process.send_signal(stop)
        log, _ = process.communicate(timeout=300)
        assert process.returncode == code, log.decode()
        rows = lines(out) + 2
    process = subprocess.run([script, *arguments(runs.fields, out)], env=environment, capture_output=True)
    assert process.returncode == 0, process.stdout.decode() + process.stderr.decode()
    assert (out / "report.html").stat().st_size > 1000
    (out / "report.html").unlink()
    runs.assert_same(out, "the command")


def lines(out: Path) -> int:
    metrics = out / "metrics.jsonl"
    return metrics.read_bytes().count(b"\n") if metrics.exists() else 0

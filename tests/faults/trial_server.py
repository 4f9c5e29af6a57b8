"""Runs trials that are meant to die: imports torch and longtrace once, then forks a child per trial.

Reads one JSON object a line on stdin and answers with one on stdout. A trial names a `job` (a function below with its
arguments) and one way to die:

    "point": k    at the k-th disk point: before each write, fsync, rename and removal, and in the middle of each write
                  and removal; 0 counts the points without dying
    "after": s    killed from outside after s seconds (null: never)
    "lines": [path, n]    killed from outside once that file has n lines
    "power": with a point, as if the power went: "contents" empties the files that were not fsynced, "names" undoes also
                  the renames, removals and new names that no fsync of their folder has covered
    "signal": n   with "after" and "lines": this signal instead of SIGKILL

The answer: {"status": exit status or minus the signal, "points": the disk points passed, "seconds", "log": stdout+stderr}.
"""

from __future__ import annotations

import contextlib
import json
import os
import random
import shutil
import signal
import sys
import tempfile
import time
import traceback
from pathlib import Path

os.environ["OMP_NUM_THREADS"] = os.environ["MKL_NUM_THREADS"] = "1"  # threads do not survive a fork
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import numpy as np
import torch

from longtrace.trainer import checkpoint


class Disk:
    """Stands before the functions of checkpoint.py that touch the disk; counts points and dies at one of them."""

    def __init__(self, point: int, power: str):
        self.point, self.power, self.passed = point, power, []
        self.names: list[list] = []  # [what was done, path, source or copy of what stood there], while not fsynced
        self.contents: set[Path] = set()  # files whose content is not fsynced
        self.attic = Path(tempfile.mkdtemp(prefix="attic-")) if power else None
        functions = ("_write_tensors", "_write_bytes", "_fsync", "_rename", "_remove")
        self.real = {name: getattr(checkpoint, name) for name in functions}
        for name in functions:
            setattr(checkpoint, name, getattr(self, name[1:]))

    def arrive(self, what: str, path: Path, halfway=None) -> None:
        self.passed.append(f"{what} {path.parent.name}/{path.name}")
        if len(self.passed) != self.point:
            return
        if halfway:
            halfway()
        if self.power:
            self.cut()
        os.kill(os.getpid(), signal.SIGKILL)

    def cut(self) -> None:
        """What a power cut may lose: contents, and names, that no fsync has covered."""
        for path in self.contents:
            if path.is_file():
                os.truncate(path, 0)
        for done, path, before in reversed(self.names if self.power == "names" else []):
            if done == "rename":
                self.real["_rename"](path, before)
            else:
                self.real["_remove"](path)
                if before:
                    (shutil.copytree if before.is_dir() else shutil.copyfile)(before, path)

    def keep(self, path: Path) -> Path | None:
        """A copy of what stands at `path`, to be put back by a power cut."""
        if not self.power or not path.exists():
            return None
        copy = self.attic / f"{len(list(self.attic.iterdir()))}"
        (shutil.copytree if path.is_dir() else shutil.copyfile)(path, copy)
        return copy

    def write(self, path: Path, call) -> None:
        self.arrive("write", path)
        before = self.keep(path)
        call()
        self.contents.add(path)
        self.names.append(["write", path, before])
        self.arrive("half of", path, lambda: os.truncate(path, path.stat().st_size // 2))

    def write_tensors(self, path, tensors) -> None:
        self.write(path, lambda: self.real["_write_tensors"](path, tensors))

    def write_bytes(self, path, data) -> None:
        self.write(path, lambda: self.real["_write_bytes"](path, data))

    def fsync(self, path) -> None:
        self.arrive("fsync", path)
        self.real["_fsync"](path)
        self.contents.discard(path)
        self.names = [name for name in self.names if name[1].parent != path]

    def rename(self, source, target) -> None:
        self.arrive("rename", source)
        self.names.append(["remove", target, self.keep(target)])
        self.real["_rename"](source, target)

        def moved(path: Path) -> Path:
            return target / path.relative_to(source) if path.is_relative_to(source) else path

        self.contents = {moved(path) for path in self.contents}
        for name in self.names:
            if source in name[1].parents:  # names inside a moved folder move along; its own name is the next line's
                name[1] = moved(name[1])
        self.names.append(["rename", target, source])

    def remove(self, path) -> None:
        self.arrive("remove", path)
        before = self.keep(path)
        if path.is_dir() and any(path.iterdir()):
            self.arrive("half of", path, lambda: next(iter(sorted(path.iterdir()))).unlink())
        self.real["_remove"](path)
        if before:
            self.names.append(["remove", path, before])


# ---- jobs ---------------------------------------------------------------------------------------------------------------


def content(step: int, version: int = 0) -> tuple[dict, dict]:
    """What the trials save at a step: reproducible, and different at every step and version."""
    draw = torch.Generator().manual_seed(1000 * version + step)
    tensors = {
        "model.layers.0.weight": torch.randn(16, 8, generator=draw),
        "model.norm": torch.randn(8, generator=draw).to(torch.bfloat16),
        "optimizer.exp_avg.layers.0.weight": torch.randn(16, 8, generator=draw),
        "buffer": torch.arange(step),
    }
    return tensors, {"step": step, "version": version, "loss": 1 / (step + 1)}


def saves(folder: str, steps: list[int], keep_last: int, version: int = 0) -> None:
    for step in steps:
        tensors, state = content(step, version)
        checkpoint.save(Path(folder), step, tensors, state, keep_last=keep_last)


def small_file(path: str, text: str) -> None:
    checkpoint.write_atomic(Path(path), text)


def export(model: str, out: str) -> None:
    """Exports the model of one folder over whatever stands in another."""
    from transformers import AutoModelForCausalLM, AutoTokenizer

    hf, tokenizer = AutoModelForCausalLM.from_pretrained(model), AutoTokenizer.from_pretrained(model)
    checkpoint.export_model(hf, tokenizer, Path(out), chat_template=tokenizer.chat_template, dtype=torch.float32)


def sft(**fields) -> None:
    """A training run whose process starts from random numbers of its own, as any new process does."""
    random.seed(os.urandom(8))
    np.random.seed(int.from_bytes(os.urandom(4), "little"))
    torch.manual_seed(int.from_bytes(os.urandom(4), "little"))
    from longtrace.trainer import train
    from longtrace.trainer.config import SFTConfig

    lighten()
    train.sft(SFTConfig(**fields))


def command(arguments: list[str]) -> None:
    from longtrace.trainer import cli

    lighten()
    sys.exit(cli.main(arguments))


ESTIMATES: dict[int, object] = {}  # made by the warm-up run in the server, found by its children


def lighten() -> None:
    """Leaves out what has no part in resuming and takes half of a tiny run: the report's pictures, the memory estimate."""
    from longtrace.trainer import plan, report

    estimate = getattr(plan.estimate, "real", plan.estimate)

    def known(model, config, lengths):
        if config.lora_rank not in ESTIMATES:
            ESTIMATES[config.lora_rank] = estimate(model, config, lengths)
        return ESTIMATES[config.lora_rank]

    known.real = estimate
    plan.estimate = known
    report.sft_report = lambda out, **_: out / "report.html"


# ---- the server ---------------------------------------------------------------------------------------------------------


def child(trial: dict, log: Path, tally: Path) -> None:
    os.setpgid(0, 0)
    handle = os.open(log, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    os.dup2(handle, 1)
    os.dup2(handle, 2)
    disk = Disk(trial.get("point", 0), trial.get("power", ""))
    status = 1
    try:
        globals()[trial["job"]](**trial["arguments"])
        status = 0
    except SystemExit as leave:
        status = leave.code or 0
    except BaseException:
        traceback.print_exc()
    tally.write_text(json.dumps(disk.passed))
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(status)


def moment(trial: dict, started: float):
    """A function that says whether it is time to kill the trial from outside."""
    if trial.get("after") is not None:
        return lambda: time.monotonic() - started >= trial["after"]
    if trial.get("lines"):
        path, lines = Path(trial["lines"][0]), trial["lines"][1]
        return lambda: path.exists() and path.read_bytes().count(b"\n") >= lines
    return lambda: False


def run(trial: dict, folder: Path) -> dict:
    log, tally = folder / "log", folder / "points"
    tally.unlink(missing_ok=True)
    started = time.monotonic()
    pid = os.fork()
    if pid == 0:
        child(trial, log, tally)
    due = moment(trial, started)
    killed = False
    while True:
        done, status = os.waitpid(pid, os.WNOHANG)
        if done:
            break
        if not killed and due():
            os.kill(pid, trial.get("signal", signal.SIGKILL))
            killed = True
        time.sleep(0.001)
    return {
        "status": os.waitstatus_to_exitcode(status),
        "points": json.loads(tally.read_text()) if tally.exists() else None,
        "seconds": time.monotonic() - started,
        "log": log.read_text(errors="replace") if log.exists() else "",
    }


def main() -> None:
    torch.set_num_threads(1)
    with tempfile.TemporaryDirectory() as folder:
        print(json.dumps({"ready": True}), flush=True)
        for line in sys.stdin:
            trial = json.loads(line)
            if trial.get("here"):  # in this process, so that the children find everything imported and warm
                with contextlib.redirect_stdout(sys.stderr):
                    globals()[trial["job"]](**trial["arguments"])
                print(json.dumps({"status": 0}), flush=True)
                continue
            print(json.dumps(run(trial, Path(folder))), flush=True)


if __name__ == "__main__":
    main()

"""The trial server: one process that has imported torch, which forks a child to be killed in every trial."""

from __future__ import annotations

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest


class Trials:
    def __init__(self):
        script = Path(__file__).with_name("trial_server.py")
        environment = os.environ | {"HF_HUB_OFFLINE": "1", "CUDA_VISIBLE_DEVICES": ""}
        self.process = subprocess.Popen(
            [sys.executable, str(script)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=environment
        )
        self._answer()

    def preload(self, *modules: str) -> None:
        self._ask({"preload": modules})

    def run(self, job: str, /, *, point: int = 0, power: str = "", after=None, signal: int = 9, **arguments) -> dict:
        """One trial in a process of its own; see trial_server.py."""
        trial = {"job": job, "arguments": arguments, "point": point, "power": power, "after": after, "signal": signal}
        return self._ask(trial)

    def points(self, job: str, /, **arguments) -> int:
        """How many disk points the job passes when nothing kills it."""
        answer = self.run(job, **arguments)
        assert answer["status"] == 0, answer["log"]
        return answer["points"]

    def close(self) -> None:
        self.process.stdin.close()
        self.process.wait(timeout=60)

    def _ask(self, trial: dict) -> dict:
        self.process.stdin.write(json.dumps(trial) + "\n")
        self.process.stdin.flush()
        return self._answer()

    def _answer(self) -> dict:
        line = self.process.stdout.readline()
        assert line, f"the trial server died with {self.process.wait(timeout=60)}"
        return json.loads(line)


@pytest.fixture(scope="session")
def trials():
    if not hasattr(os, "fork"):
        pytest.skip("needs os.fork")
    server = Trials()
    yield server
    server.close()

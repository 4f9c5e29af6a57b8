"""The trial server: one process that has imported torch, which forks a child to be killed in every trial."""

from __future__ import annotations

import json
import os
import signal
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

    def warm(self, job: str, /, **arguments) -> None:
        """Does the job in the server itself: what it imports need not be imported by every trial."""
        self._ask({"job": job, "arguments": arguments, "here": True})

    def run(
        self, job: str, /, *, point=0, power="", after=None, lines=None, signal=signal.SIGKILL, **arguments
    ) -> dict:
        """One trial in a process of its own; see trial_server.py."""
        death = {"point": point, "power": power, "after": after, "lines": lines, "signal": int(signal)}
        return self._ask({"job": job, "arguments": arguments} | death)

    def points(self, job: str, /, **arguments) -> list[str]:
        """The disk points the job passes when nothing kills it; the first one is number 1."""
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

"""One process of the verifier's pool: a keeper that imports once, and a child of it that does the checks and may be killed.

Fed JSON lines [kind, answer, gold, seconds, sys.path]; answers {"value", "event"} to each. Never imports torch. The keeper forks a new
child in milliseconds after a kill; where there is no fork (Windows) it checks by itself and is killed from outside.
"""

from __future__ import annotations

import importlib
import json
import os
import select
import signal
import sys
from collections.abc import Callable
from typing import Any, BinaryIO

LIMITS: dict[str, Any] = {}
"""seconds, memory_mb: of one check, and of one test of a program."""


def math(answer: str, gold: str) -> float:
    """1.0 where math-verify finds both equal, else 0.0. LaTeX only: its parser of plain expressions evaluates what it reads."""
    from math_verify import LatexExtractionConfig, parse, verify

    latex = [LatexExtractionConfig(boxed_match_priority=0)]
    wanted, given = (parse(f"\\boxed{{{text}}}", latex, parsing_timeout=None) for text in (gold, answer))
    return float(bool(wanted and given and verify(wanted, given, timeout_seconds=None)))


def gym(answer: str, gold: str) -> float:
    """The score that a reasoning_gym task gives an answer. gold: JSON of {"task": name, "entry": the item}."""
    import reasoning_gym

    asked = json.loads(gold)
    entry = tuples(asked["entry"]) if asked["task"] in ("arc_agi", "rearc") else asked["entry"]
    return float(reasoning_gym.get_score_answer_fn(asked["task"])(answer=answer, entry=entry))


def tuples(value: Any) -> Any:
    """Lists as tuples, all the way down: some tasks compare with tuples, which JSON does not have."""
    if isinstance(value, dict):
        return {key: tuples(item) for key, item in value.items()}
    return tuple(map(tuples, value)) if isinstance(value, list) else value


def code(answer: str, gold: str) -> float | tuple[float, str]:
    """1.0 where a Python program passes all its tests, else 0.0 (DeepSeek-R1's compiler reward).

    gold: JSON of {"cases": [{"input", "output"}, ...], "tests": source run after the program, or ""}. The program runs once
    for every case and once for the tests, each time in a process of its own (`sandbox.py`); the first failure ends it.
    """
    from longtrace.trainer import sandbox

    asked = json.loads(gold)
    for case in asked["cases"]:
        run = sandbox.run(answer, stdin=case["input"], **LIMITS)
        if not run.ok or not same_output(run.output, case["output"]):
            return (0.0, "timed_out") if run.timed_out else 0.0
    if asked["tests"]:
        run = sandbox.run(answer, tests=asked["tests"], **LIMITS)
        if not run.ok:
            return (0.0, "timed_out") if run.timed_out else 0.0
    return 1.0


def same_output(found: str, expected: str) -> bool:
    """Whether two outputs agree but for blanks at the ends of lines and empty lines at the end."""
    lines = ([line.rstrip() for line in text.rstrip().splitlines()] for text in (found, expected))
    return next(lines) == next(lines)


KINDS: dict[str, Callable[[str, str], Any]] = {"math": math, "gym": gym, "code": code}
NEEDED = {"math": "math_verify", "gym": "reasoning_gym", "code": "longtrace.trainer.sandbox"}


def load(kind: str) -> Callable[[str, str], Any]:
    """The function of a kind, imported and warm; ImportError for a kind that is not there."""
    if kind not in KINDS:
        module, _, name = kind.partition(":")
        function = getattr(importlib.import_module(module), name, None)
        if not callable(function):
            raise ImportError(f"{kind}: found no such function; accepted: {', '.join(KINDS)} or module:function")
        KINDS[kind] = function
    if kind in NEEDED:
        importlib.import_module(NEEDED[kind])
    if kind == "math":
        math("(x+\\frac12)^2", "x^2+x+\\frac14")  # grammars and tables are built on first use
    return KINDS[kind]


def check(kind: str, answer: str, gold: str) -> dict[str, Any]:
    """The reply to one job; a scorer that raises gives no verdict."""
    try:
        found = KINDS[kind](answer, gold)
        value, event = found if isinstance(found, tuple) else (found, None)
        value = float(value)
        if value != value:
            raise ValueError("the score is NaN")
        return {"value": min(1.0, max(0.0, value)), "event": event}
    except Exception:  # whatever a scorer raises on a hostile answer; counted by the pool
        return {"value": None, "event": "failed"}


class Child:
    """The process that does the checks: a fork of the keeper under limits, kept for as many as it survives."""

    def __init__(self, memory_mb: int):
        to_child, self.jobs = os.pipe()
        self.replies, from_child = os.pipe()
        keeper = os.getpid()
        self.pid = os.fork()
        if self.pid == 0:
            first, second = sorted((to_child, from_child))  # nothing else is inherited: not the keeper's own channel
            for start, end in ((3, first), (first + 1, second), (second + 1, 1024)):
                os.closerange(start, end)
            try:
                die_with(keeper)
                self._serve(os.fdopen(to_child, "rb"), from_child, memory_mb)
            finally:
                os._exit(1)
        os.close(to_child)
        os.close(from_child)
        self.pending = b""

    @staticmethod
    def _serve(jobs: BinaryIO, replies: int, memory_mb: int) -> None:
        import resource

        def lower(limit: int, value: int) -> None:
            hard = resource.getrlimit(limit)[1]
            resource.setrlimit(limit, (value if hard == resource.RLIM_INFINITY else min(value, hard), hard))

        if sys.platform != "darwin":  # macOS refuses to limit address space
            lower(resource.RLIMIT_AS, memory_mb << 20)
        lower(resource.RLIMIT_CORE, 0)
        for line in jobs:
            kind, answer, gold, seconds, _ = json.loads(line)
            used = resource.getrusage(resource.RUSAGE_SELF)
            lower(resource.RLIMIT_CPU, int(used.ru_utime + used.ru_stime + seconds) + 2)
            reply = json.dumps(check(kind, answer, gold)).encode() + b"\n"
            while reply:
                reply = reply[os.write(replies, reply) :]

    def ask(self, line: bytes, seconds: float) -> bytes:
        """The child's reply, or the keeper's where it is late or dies; then the child is gone."""
        while line:
            try:
                line = line[os.write(self.jobs, line) :]
            except BrokenPipeError:
                break
        reply = b""
        while not reply.endswith(b"\n"):
            ready, _, _ = select.select([self.replies], [], [], seconds)
            piece = os.read(self.replies, 65536) if ready else b""
            if not piece:
                status = self.kill()
                late = not ready or (os.WIFSIGNALED(status) and os.WTERMSIG(status) == signal.SIGXCPU)
                return json.dumps({"value": None, "event": "timed_out" if late else "crashed"}).encode() + b"\n"
            reply += piece
        return reply

    def kill(self) -> int:
        os.kill(self.pid, signal.SIGKILL)
        status = os.waitpid(self.pid, 0)[1]
        os.close(self.jobs)
        os.close(self.replies)
        self.pid = 0
        return status


def die_with(parent: int) -> None:
    """Linux: this process is killed when its parent goes, however that ends."""
    if sys.platform == "linux":
        import ctypes

        ctypes.CDLL(None).prctl(1, signal.SIGKILL, 0, 0, 0)  # PR_SET_PDEATHSIG
        if os.getppid() != parent:  # gone already
            os._exit(1)


def main() -> None:
    """Serves standard input until it ends. Whatever a scorer prints goes nowhere: the replies have a channel of their own."""
    LIMITS.update(json.loads(sys.argv[2]))
    replies = os.fdopen(os.dup(1), "wb")
    os.dup2(2, 1)
    jobs = os.fdopen(os.dup(0), "rb")
    os.dup2(os.open(os.devnull, os.O_RDONLY), 0)
    child, loaded = None, set()
    for line in jobs:
        kind, answer, gold, seconds, path = json.loads(line)
        if kind not in loaded:
            sys.path[:] = path
            try:
                load(kind)
            except Exception as error:  # an import may raise anything; the pool raises it as ImportError
                replies.write(json.dumps({"refused": f"{type(error).__name__}: {error}"}).encode() + b"\n")
                replies.flush()
                continue
            loaded.add(kind)
            if child and child.pid:
                child.kill()  # a new one inherits what was imported
        if hasattr(os, "fork"):
            child = child if child and child.pid else Child(LIMITS["memory_mb"])
            reply = child.ask(line, seconds)
        else:
            reply = json.dumps(check(kind, answer, gold)).encode() + b"\n"
        replies.write(reply)
        replies.flush()

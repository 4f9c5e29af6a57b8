"""Checks answers in a pool of killable processes: CPU, memory and wall-clock limits, hard kills, counts and a cache.

A computer algebra system, a scorer or a candidate program may hang, eat memory or die; the training job does neither.
"""

from __future__ import annotations

import atexit
import contextlib
import hashlib
import json
import os
import queue
import signal
import subprocess
import sys
import threading
from collections import Counter, OrderedDict
from collections.abc import Sequence
from functools import lru_cache
from typing import Any

from . import answers

_BOOT = (
    "import json, sys; sys.path[:] = json.loads(sys.argv[1]); "
    "from longtrace.trainer.verifier_worker import main; main()"
)
LOADING = 120
"""Seconds a worker may take to start and to import what a kind needs, beside the limit of the check itself."""

Job = tuple[str, str, str]
"""(kind, answer, gold)."""


class Verifier:
    """A pool of processes that check answers.

    workers: processes, started when first needed. seconds: wall-clock limit of one check (of one test case for code); the
    CPU time of the process is limited to as much. memory_mb: address space of the process. cache: verdicts kept, the
    oldest go first.

    Kinds: `math` (equality by math-verify), `gym` (gold: JSON of {"task", "entry"}), `code` (gold: JSON of the tests, see
    `verifier_worker.code`), or `module:function`, a function of (answer, gold) that returns a number. `counts` has asked,
    cached (verdicts that were there already), timed_out, crashed (processes that died) and failed (scorers that raised).

    Processes are fresh interpreters that never load torch. Thread-safe; close it, use it in `with`, or let it end with
    the program. On Windows there is no limit of CPU time and memory, only the wall clock.
    """

    def __init__(self, workers: int = 2, seconds: float = 5, memory_mb: int = 1024, cache: int = 100_000):
        if workers < 1 or seconds <= 0 or memory_mb < 64 or cache < 1:
            raise ValueError(
                f"found workers={workers}, seconds={seconds}, memory_mb={memory_mb}, cache={cache}; accepted: workers and "
                "cache of 1 or more, seconds above 0, memory_mb of 64 or more"
            )
        self.seconds, self.memory_mb, self.cache_size = seconds, memory_mb, cache
        self.counts: Counter[str] = Counter(asked=0, cached=0, timed_out=0, crashed=0, failed=0)
        self._cache: OrderedDict[str, float | None] = OrderedDict()
        self._workers = [_Worker(seconds, memory_mb) for _ in range(workers)]
        self._lock = threading.Lock()
        atexit.register(self.close)

    def check(self, jobs: Sequence[Job]) -> list[float | None]:
        """One verdict per (kind, answer, gold), in order: a score in [0, 1], or None without one (it hung, crashed, raised).

        Equal jobs are checked once. What was seen to hang is not tried again.
        """
        with self._lock:
            self.counts["asked"] += len(jobs)
            found: list[float | str] = []  # a verdict, or the key it will have in the cache
            waiting: dict[str, Job] = {}
            for kind, answer, gold in jobs:
                if kind == "math":
                    answer, gold = answers.canonical(answer), answers.canonical(gold)
                    same = answers.compare(answer, gold)
                    if same is not None:
                        found.append(float(same))
                        continue
                found.append(_key(kind, answer, gold))
                if found[-1] in self._cache or found[-1] in waiting:
                    self.counts["cached"] += 1
                else:
                    waiting[found[-1]] = kind, answer, gold
            self._run(waiting)
            verdicts = [self._cache[key] if isinstance(key, str) else key for key in found]
            for key in found:
                if isinstance(key, str):
                    self._cache.move_to_end(key)
            while len(self._cache) > self.cache_size:
                self._cache.popitem(last=False)
            return verdicts

    def _run(self, waiting: dict[str, Job]) -> None:
        """Spreads jobs over the workers, one thread each; a job whose worker died is tried once more on a new one."""
        if not waiting:
            return
        todo: queue.SimpleQueue = queue.SimpleQueue()
        for item in waiting.items():
            todo.put(item)
        results: list[tuple[str, float | None, list[str]]] = []
        errors: list[BaseException] = []

        def work(worker: _Worker) -> None:
            try:
                while not errors:
                    key, job = todo.get_nowait()
                    events = []
                    for _ in range(2):
                        value, event = worker.ask(job)
                        events += [event] if event else []
                        if event != "crashed":
                            break
                    results.append((key, value, events))
            except queue.Empty:
                pass
            except BaseException as error:  # raised again below, in the caller's thread
                errors.append(error)

        threads = [threading.Thread(target=work, args=(w,), daemon=True) for w in self._workers[: len(waiting)]]
        for thread in threads:
            thread.start()
        for thread in threads:
            thread.join()
        for key, value, events in results:
            self._cache[key] = value
            self.counts.update(events)
        if errors:
            raise errors[0]

    def state_dict(self) -> dict[str, Any]:
        """Verdicts by key (at most `cache` of them) and counts, as plain JSON values, oldest verdict first."""
        with self._lock:
            return {"verdicts": dict(self._cache), "counts": dict(self.counts)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        with self._lock:
            self._cache = OrderedDict(state["verdicts"])
            self.counts = Counter(state["counts"])

    def close(self) -> None:
        """Ends the processes. A closed pool starts new ones when asked again."""
        for worker in self._workers:
            worker.stop()

    def __enter__(self) -> Verifier:
        return self

    def __exit__(self, *_) -> None:
        self.close()
        atexit.unregister(self.close)


@lru_cache(maxsize=1)
def default() -> Verifier:
    """The pool of this process, shared by all who name no other."""
    return Verifier()


def _key(*job: str) -> str:
    text = json.dumps(job)
    return text if len(text) <= 120 else hashlib.sha256(text.encode("utf-8", "surrogatepass")).hexdigest()


def _path() -> list[str]:
    return [path or os.getcwd() for path in (*sys.path, "")]  # the current folder last, where users keep scorers


class _Worker:
    """One process and the pipes to it."""

    def __init__(self, seconds: float, memory_mb: int):
        self.limits = {"seconds": seconds, "memory_mb": memory_mb}
        self.process: subprocess.Popen | None = None
        self.kinds: set[str] = set()

    def start(self) -> subprocess.Popen:
        command = [sys.executable, "-I", "-c", _BOOT, json.dumps(_path())]
        self.kinds = set()
        self.process = subprocess.Popen(
            [*command, json.dumps(self.limits)],
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            start_new_session=True,  # a group of its own: killed whole, and no Ctrl-C reaches it
        )
        return self.process

    def ask(self, job: Job) -> tuple[float | None, str | None]:
        """(verdict, None or one of timed_out, crashed, failed)."""
        process = self.process or self.start()
        kind = job[0]
        limit = self.limits["seconds"]
        if kind == "code":  # the limit is one test's
            limit = (limit + 1) * (len(json.loads(job[2])["cases"]) + 1)
        patience = limit + 5 + (0 if kind in self.kinds else LOADING)
        timer = threading.Timer(patience, self.stop)
        timer.start()
        try:
            path = None if kind in self.kinds else _path()  # where to find the kind; it may have grown
            process.stdin.write(json.dumps([*job, limit, path]).encode() + b"\n")
            process.stdin.flush()
            line = process.stdout.readline()
        except (OSError, ValueError):  # the pipe is closed: the process is gone
            line = b""
        finally:
            timer.cancel()
        if not line.endswith(b"\n"):
            self.stop()
            return None, "crashed"
        reply = json.loads(line)
        if "refused" in reply:
            self.stop()
            raise ImportError(reply["refused"])
        self.kinds.add(kind)
        return reply["value"], reply["event"]

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is None:
            return
        try:
            if os.name == "posix":
                os.killpg(process.pid, signal.SIGKILL)  # not yet reaped, so the number is still its own
            else:
                process.kill()
        except ProcessLookupError:
            pass
        process.wait()
        for pipe in (process.stdin, process.stdout):
            with contextlib.suppress(OSError):
                pipe.close()

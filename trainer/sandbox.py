"""Runs a Python program that nobody has read, for code rewards: a fresh process with limits, no network, no forks.

What holds is asked of the kernel, not of Python: `protections()` tries each on this machine. It is no virtual machine.
"""

from __future__ import annotations

import contextlib
import json
import os
import secrets
import select
import signal
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass
from pathlib import Path

OUTPUT_BYTES = 1 << 20
"""What a program may print; more fails it."""
DISK_BYTES = 64 << 20
"""What a program may have on disk; looked at twenty times a second, so a little more can get there before it is killed."""


@dataclass(frozen=True)
class Run:
    """How a program ended: `ok` (by itself, without an error, all tests passed), what it printed, whether time ran out."""

    ok: bool
    output: str
    timed_out: bool = False


def run(program: str, *, stdin: str = "", tests: str = "", seconds: float = 5, memory_mb: int = 1024) -> Run:
    """Runs Python source in a fresh interpreter; with `tests`, source that follows in the same namespace and must not raise.

    Held to: CPU and wall-clock seconds, address space, 16 MB a file and 64 MB in all, 64 open files, 1 MB of output; an
    environment without the caller's variables; a temporary folder that is removed afterwards. The whole process group is
    killed at the end.

    Linux (x86-64, arm64), by Landlock and a seccomp filter, which need no privileges and cannot be undone: no sockets but
    pairs, no new processes, no exec, no signals to others, no capabilities (a trainer that runs as root does not make
    root programs); writes only in its folder, reads only there and of Python and the system's libraries.

    Not covered: faults of the kernel, the processor's side channels, memory in many small pieces under memory_mb, and, with
    `tests`, a program that attacks the tests themselves: both share an interpreter, as in every benchmark of this kind, so
    an `__eq__` that is always true passes an assert. Leaving early does not pass: a secret must be printed after the last
    test. Expected outputs of stdin cases never enter the process. Where Landlock or seccomp are missing (old kernels,
    macOS, Windows) an audit hook of Python denies sockets, processes and writes outside the folder, which stops accidents
    and not a program that means harm.
    """
    token = secrets.token_hex(16)
    with (
        tempfile.TemporaryDirectory(prefix="longtrace-", ignore_cleanup_errors=True) as folder,
        tempfile.TemporaryFile() as feed,
    ):
        Path(folder, "solution.py").write_text(program, encoding="utf-8", errors="replace")
        feed.write((json.dumps({"tests": tests, "token": token}) if tests else stdin).encode("utf-8", "replace"))
        feed.seek(0)
        environment = {
            **{"PATH": os.defpath, "HOME": folder, "TMPDIR": folder, "LANG": "C.UTF-8", "PYTHONHASHSEED": "0"},
            **{"OMP_NUM_THREADS": "1", "OPENBLAS_NUM_THREADS": "1", "MKL_NUM_THREADS": "1"},
            **{name: os.environ[name] for name in ("SYSTEMROOT", "LD_LIBRARY_PATH") if name in os.environ},
        }
        limits = {"seconds": seconds, "memory_mb": memory_mb, "tests": bool(tests), "parent": os.getpid()}
        process = subprocess.Popen(
            [sys.executable, "-B", "-s", "-c", _bootstrap(), json.dumps(limits)],
            stdin=feed,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            cwd=folder,
            env=environment,
            start_new_session=True,
        )
        try:
            output, timed_out = _watch(process, folder, seconds)
        finally:
            _kill(process)
        ok = process.returncode == 0 and not timed_out
        if tests:
            ok = ok and output.endswith(token)
        return Run(ok, output, timed_out or process.returncode == -getattr(signal, "SIGXCPU", 0))


def _bootstrap() -> str:
    """Passed as source: a script's folder would stand on the program's sys.path."""
    return Path(__file__).with_name("sandbox_child.py").read_text("utf-8")


def _watch(process: subprocess.Popen, folder: str, seconds: float) -> tuple[str, bool]:
    """Reads what the process prints until it ends or breaks a limit: (output, whether time ran out)."""
    deadline, pieces, size = time.monotonic() + seconds, [], 0
    pipe = process.stdout.fileno()
    if os.name != "posix":  # no select on pipes
        try:
            return process.communicate(timeout=seconds)[0][:OUTPUT_BYTES].decode("utf-8", "replace"), False
        except subprocess.TimeoutExpired:
            return "", True
    while size <= OUTPUT_BYTES and _size(folder) <= DISK_BYTES:
        left = deadline - time.monotonic()
        if left <= 0:
            return "", True
        if select.select([pipe], [], [], min(left, 0.05))[0]:
            piece = os.read(pipe, 65536)
            if not piece:  # closed: it ended, or only closed its output
                ended = _ends(process, deadline)
                return (b"".join(pieces).decode("utf-8", "replace"), False) if ended else ("", True)
            pieces.append(piece)
            size += len(piece)
    return "", False


def _ends(process: subprocess.Popen, deadline: float) -> bool:
    """Whether the process ends in time. It is not reaped yet where that can be helped, so that its number stays its own."""
    while time.monotonic() < deadline:
        if hasattr(os, "waitid"):
            ended = os.waitid(os.P_PID, process.pid, os.WEXITED | os.WNOHANG | os.WNOWAIT) is not None
        else:
            ended = process.poll() is not None
        if ended:
            return True
        time.sleep(0.002)
    return False


def _size(folder: str) -> int:
    """Bytes on disk below a folder, as far as it can be read."""
    total = 0
    for path, _, names in os.walk(folder):
        for name in names:
            with contextlib.suppress(OSError):
                total += os.lstat(os.path.join(path, name)).st_blocks * 512 + 4096  # an empty file costs too
    return total


def _kill(process: subprocess.Popen) -> None:
    try:
        if os.name == "posix":
            os.killpg(process.pid, signal.SIGKILL)
        else:
            process.kill()
    except (ProcessLookupError, PermissionError):
        pass
    process.wait()
    process.stdout.close()


PROBES = {
    "no network": "import socket; socket.socket().connect(('127.0.0.1', 9))",
    "no new processes": "import os; os.fork() or os._exit(0)",
    "no programs": "import os; os.execv('/bin/true', ['true'])",
    "no signals to others": "import os; os.kill(os.getppid(), 0)",
    "no writes outside": "import os; os.mkdir({outside!r})",
    "no reads outside": "import os; os.listdir({home!r})",
    "no root rights": "import os; os.chroot('.')",
    "memory limit": "x = bytearray(2 << 30)",
    "file size limit": "f = open('x', 'wb'); f.truncate(1 << 30)",
}


def protections() -> dict[str, bool]:
    """Which limits hold on this machine: each is tried by a program that breaks it, and holds when the kernel or Python says no."""
    outside = os.path.join(tempfile.gettempdir(), f"longtrace-probe-{os.getpid()}")
    held = {}
    for name, program in PROBES.items():
        program = program.replace("{outside!r}", repr(outside)).replace("{home!r}", repr(str(Path.home())))
        attempt = f"try:\n {program}\nexcept (OSError, MemoryError) as e:\n print('held' if 'refused' not in str(e) else 'let through')"
        result = run(attempt, seconds=10)
        held[name] = result.output.strip() == "held" if result.ok else not result.timed_out
        if os.path.isdir(outside):
            os.rmdir(outside)
            held[name] = False
    return held

"""Times on a device: events around each call, a cold L2 before it, implementations in turn, medians.

Without CUDA (a dry run) the same loop runs on the host's clock, so that all of it can be tested.
"""

from __future__ import annotations

import gc
import statistics
import subprocess
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field

import torch

L2_BYTES = 256 * 2**20  # written before each timed call: more than any part's L2 (B200: 126 MB)
SMI = ("name", "driver_version", "clocks.sm", "clocks.max.sm", "clocks.mem", "power.draw", "power.limit",
       "temperature.gpu", "clocks_event_reasons.active")  # fmt: skip


class Clock:
    """Milliseconds of one call on the device, its L2 holding nothing of the call's."""

    def __init__(self, device: str):
        self.device = device
        self.buffer = torch.empty(L2_BYTES, dtype=torch.int8, device=device) if device == "cuda" else None

    def flush(self) -> None:
        if self.buffer is not None:
            self.buffer.zero_()

    def __call__(self, run: Callable[[], object]) -> float:
        self.flush()
        if self.device != "cuda":
            begin = time.perf_counter()
            run()
            return 1e3 * (time.perf_counter() - begin)
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        run()
        end.record()
        end.synchronize()
        return begin.elapsed_time(end)


@dataclass
class Times:
    """What `measure` found: milliseconds by name, in the order taken, and what failed with the reason."""

    ms: dict[str, list[float]] = field(default_factory=dict)
    failed: dict[str, str] = field(default_factory=dict)

    def row(self, name: str) -> dict:
        """{"ms": median, "ms_min", "ms_max", "runs"} of an implementation; ms None if it was never timed."""
        found = self.ms.get(name)
        if not found:
            return {"ms": None, "ms_min": None, "ms_max": None, "runs": 0}
        return {"ms": statistics.median(found), "ms_min": min(found), "ms_max": max(found), "runs": len(found)}


def measure(
    runs: Mapping[str, Callable[[], object]],
    clock: Callable[[Callable[[], object]], float],
    *,
    repeats: int = 7,
    warmup: int = 1,
    deadline: float | None = None,
    now: Callable[[], float] = time.monotonic,
    after: Callable[[Times], None] = lambda times: None,
) -> Times:
    """Times a, b, a, b, …: `warmup` turns that do not count, then `repeats`; what raises is not tried again.

    No turn begins after `deadline` (of `now`), so a slow one costs turns, not the rest. `after` each turn gets the times
    so far.
    """
    times = Times()
    for turn in range(-warmup, repeats):
        if deadline is not None and now() >= deadline:
            break
        for name, run in runs.items():
            if name in times.failed:
                continue
            try:
                ms = clock(run)
            except Exception as error:  # a peer's failure is a finding, not the end of the benchmark
                times.failed[name] = f"{type(error).__name__}: {str(error).splitlines()[0] if str(error) else ''}"
                times.ms.pop(name, None)
                release()
                continue
            if turn >= 0:
                times.ms.setdefault(name, []).append(ms)
        after(times)
    return times


def release() -> None:
    """Gives back what a failed or finished implementation left in the allocator."""
    gc.collect()
    if torch.cuda.is_available():
        torch.cuda.empty_cache()


def peak_mb(run: Callable[[], object], device: str) -> float | None:
    """Largest device memory above what was held before the call, in MB (10^6 bytes); None without CUDA."""
    if device != "cuda":
        run()
        return None
    release()
    torch.cuda.reset_peak_memory_stats()
    held = torch.cuda.memory_allocated()
    run()
    torch.cuda.synchronize()
    return (torch.cuda.max_memory_allocated() - held) / 1e6


def smi() -> dict[str, str] | str:
    """Clocks, power and temperature as nvidia-smi reads them now, or why it does not."""
    command = ["nvidia-smi", f"--query-gpu={','.join(SMI)}", "--format=csv,noheader", "-i", "0"]
    try:
        done = subprocess.run(command, capture_output=True, text=True, timeout=20)
    except (OSError, subprocess.TimeoutExpired) as error:
        return f"nvidia-smi: {error}"
    if done.returncode:
        return f"nvidia-smi: {(done.stdout + done.stderr).strip().splitlines()[-1]}"
    return dict(zip(SMI, (value.strip() for value in done.stdout.strip().split(","))))

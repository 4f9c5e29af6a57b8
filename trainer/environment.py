"""What a run ran on: versions, processor, accelerators, git state. Stored in every run folder."""

from __future__ import annotations

import contextlib
import ctypes
import os
import platform
import subprocess
import sys
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

import torch

PACKAGES = [
    "longtrace",
    "torch",
    "transformers",
    "tokenizers",
    "datasets",
    "safetensors",
    "triton",
    "peft",
    "torchao",
    "numpy",
]


def return_freed_memory() -> None:
    """Lets glibc give every freed block above 4 MB back to the system at once; other C libraries are left alone.

    By default it keeps blocks of up to 32 MB on its heap once one of them was freed, and a step's activations, of all
    sizes, leave that heap in pieces: peaks were a tenth higher.
    """
    with contextlib.suppress(OSError, AttributeError):
        mallopt = ctypes.CDLL("libc.so.6").mallopt
        mallopt(-3, 4 << 20)  # M_MMAP_THRESHOLD
        mallopt(-1, 64 << 20)  # M_TRIM_THRESHOLD: the heap's end stays where it is for smaller blocks


def environment() -> dict:
    """JSON-able record; packages that are not installed are left out."""
    return {
        "command": [Path(sys.argv[0]).name, *sys.argv[1:]],
        "python": platform.python_version(),
        "packages": packages(),
        "platform": platform.platform(),
        "cpu": cpu_name(),
        "cpu_capability": torch.backends.cpu.get_cpu_capability(),
        "threads": torch.get_num_threads(),
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "gpus": [torch.cuda.get_device_name(i) for i in range(torch.cuda.device_count())],
        "git": git_state(),
    }


def packages() -> dict[str, str]:
    found = {}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def cpu_name() -> str:
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return platform.processor()
    return next((line.split(":", 1)[1].strip() for line in lines if line.startswith("model name")), platform.machine())


def cpu_features() -> list[str]:
    """The instruction sets the kernels care about, as the operating system names them (Linux x86-64)."""
    try:
        lines = Path("/proc/cpuinfo").read_text().splitlines()
    except OSError:
        return []
    flags = next((line.split(":", 1)[1].split() for line in lines if line.startswith("flags")), [])
    return [flag for flag in ("avx2", "fma", "avx512f", "avx512_bf16", "amx_bf16") if flag in flags]


def memory_bytes() -> int:
    """Physical memory in bytes (0 where it cannot be read)."""
    try:
        return os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    except (AttributeError, ValueError, OSError):
        return 0


def git_state() -> str:
    """`commit` or `commit+changes` of the source tree longtrace is imported from; empty for an installed wheel."""
    here = Path(__file__).resolve().parent
    try:
        if Path(_git(here, "rev-parse", "--show-toplevel")) != here.parent:
            return ""
        return _git(here, "rev-parse", "--short=12", "HEAD") + (
            "+changes" if _git(here, "status", "--porcelain", "-uno") else ""
        )
    except (OSError, subprocess.CalledProcessError):
        return ""


def _git(folder: Path, *arguments: str) -> str:
    return subprocess.run(["git", "-C", folder, *arguments], capture_output=True, text=True, check=True).stdout.strip()

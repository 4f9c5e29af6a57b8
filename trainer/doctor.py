"""`longtrace doctor`: what is installed, what the machine can do, which backend serves each op, and whether it is right."""

from __future__ import annotations

import shutil
import sys
import time
from dataclasses import dataclass

import torch
from rich.console import Console
from rich.table import Table

from longtrace import kernels as K
from longtrace.kernels.selfcheck import self_check

from . import sandbox
from .config import Refusal
from .environment import cpu_features, cpu_name, memory_bytes, packages

OPTIONAL = {
    "triton": "GPU kernels (Linux): pip install 'longtrace[gpu]'",
    "peft": "LoRA: pip install 'longtrace[lora]'",
    "reasoning_gym": "its tasks and scorers: pip install 'longtrace[rl]'",
    "torchao": "8-bit AdamW: pip install 'longtrace[optim]'",
    "flash_attn": "flash-attention on CUDA: docs/install.md",
    "trl": "the peer of `longtrace bench`: pip install 'longtrace[bench]'",
}


@dataclass(kw_only=True)
class DoctorConfig:
    """Versions, processor, GPU, which backend serves each op and why, and a self-check of every op."""


def doctor(config: DoctorConfig) -> None:
    """Prints the report; Refusal (exit 2) when an op disagrees with its reference."""
    console = Console()
    found = packages()
    facts = Table(show_header=False, box=None, padding=(0, 2, 0, 0))
    facts.add_row("python", sys.version.split()[0])
    facts.add_row("packages", ", ".join(f"{name} {version}" for name, version in found.items()))
    features = ", ".join(cpu_features()) or "not listed by this system"
    facts.add_row("processor", f"{cpu_name()}: {features}; torch runs {torch.get_num_threads()} threads")
    facts.add_row("memory", f"{memory_bytes() / 1e9:.1f} GB" if memory_bytes() else "unknown")
    facts.add_row("accelerator", _accelerator())
    facts.add_row("compiler", shutil.which("g++") or shutil.which("clang++") or "none: pure PyTorch kernels")
    let_through = [limit for limit, holds in sandbox.protections().items() if not holds]
    facts.add_row("sandbox", f"does not hold: {', '.join(let_through)}" if let_through else "all limits hold")
    console.print(facts)

    console.rule("backends", align="left")
    console.print(K.explain(), highlight=False, markup=False)

    console.rule("self-check against the float64 reference", align="left")
    started = time.perf_counter()
    checks = Table(box=None, padding=(0, 2, 0, 0))
    for column in ("op", "backend", "largest error", ""):
        checks.add_column(column)
    results = self_check()
    for op, backend, error, good in results:
        checks.add_row(op, backend, f"{error:.1e}", "[green]ok[/]" if good else "[red]WRONG[/]")
    console.print(checks)
    console.print(f"{len(results)} checks in {time.perf_counter() - started:.1f} s")

    missing = [f"  {name}: {why}" for name, why in OPTIONAL.items() if not _importable(name)]
    if missing:
        console.rule("not installed, and what it would add", align="left")
        console.print("\n".join(missing), highlight=False, markup=False)
    wrong = [op for op, _, _, good in results if not good]
    if wrong:
        raise Refusal(
            f"self-check failed: {', '.join(wrong)}; LONGTRACE_EXTENSION=0 runs without the extension; please report this output"
        )


def _accelerator() -> str:
    if torch.cuda.is_available():
        parts = [torch.cuda.get_device_properties(i) for i in range(torch.cuda.device_count())]
        return "; ".join(f"{p.name}, {p.total_memory / 1e9:.0f} GB, sm_{p.major}{p.minor}" for p in parts)
    if shutil.which("nvidia-smi"):
        return f"an NVIDIA driver is here, but torch {torch.__version__} has no CUDA: pip install a CUDA build of torch (docs/install.md)"
    return "none: training runs on the processor"


def _importable(name: str) -> bool:
    from importlib.util import find_spec

    return find_spec(name) is not None

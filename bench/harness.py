"""What every benchmark shares: one process per measurement, interleaved, a record of the machine, JSON, picture, table."""

from __future__ import annotations

import contextlib
import importlib
import importlib.util
import json
import os
import platform
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable, Collection, Sequence
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path

from rich.console import Console
from rich.table import Table

from longtrace.trainer.config import Refusal
from longtrace.trainer.environment import cpu_features, cpu_name, memory_bytes, packages

console = Console()
if not console.is_terminal:  # a log has no edge to wrap at
    console = Console(width=120)

PEERS = ("trl", "accelerate", "liger-kernel", "cut-cross-entropy", "flash-attn")
MB = 1e6


class MeasurementFailed(RuntimeError):
    """A measuring process ended without a result."""


# ----------------------------------------------------------------------------------------------------------------------
# The machine


def threads_here(wanted: int = 0) -> int:
    """`wanted`, or as many threads as this process has cores."""
    if wanted:
        return wanted
    return len(os.sched_getaffinity(0)) if hasattr(os, "sched_getaffinity") else os.cpu_count() or 1


def begin(config, impls: Collection[str], default: Sequence[str] = ()) -> tuple[list[str], dict]:
    """How a benchmark begins: (the implementations to time, the machine with the threads to use).

    `config`: its BenchConfig; without `--impls` those in `default` are timed, or all `impls`. Says so when the machine is
    busy. Raises Refusal for an implementation that is none of `impls`.
    """
    chosen = config.impls or list(default or impls)
    if unknown := set(chosen) - set(impls):
        raise Refusal(f"--impls: found {sorted(unknown)[0]}; accepted: {', '.join(impls)}")
    here = machine(threads_here(config.threads))
    if (here["load_before"] or 0) > 0.5:
        console.print(f"note: the machine is busy (load {here['load_before']}); times will say so", style="yellow")
    return chosen, here


def machine(threads: int) -> dict:
    """JSON-able: processor, cores, threads used, memory, and how busy the machine was before the first measurement."""
    return {
        "cpu": cpu_name(),
        "features": cpu_features(),
        "cores": threads_here(),
        "threads": threads,
        "memory_gb": round(memory_bytes() / 1e9, 1),
        "platform": platform.platform(),
        "load_before": round(os.getloadavg()[0], 2) if hasattr(os, "getloadavg") else None,
        "date": time.strftime("%Y-%m-%d"),
    }


def versions() -> dict[str, str]:
    """Versions of what is installed: Python, our dependencies, the peers."""
    found = {"python": platform.python_version(), **packages()}
    for name in PEERS:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def reset_peak() -> int:
    """Starts the measure of `peak_bytes` anew where the kernel lets a process (Linux); returns what is held now."""
    with contextlib.suppress(OSError):
        Path("/proc/self/clear_refs").write_text("5")
    return peak_bytes()


def installed(package: str) -> bool:
    """Whether the package can be imported; it is not imported here."""
    return importlib.util.find_spec(package) is not None


def peak_bytes() -> int:
    """The largest resident memory of this process so far, in bytes.

    Linux keeps it per program in VmHWM; getrusage's ru_maxrss would start at the size of the process that launched
    this one.
    """
    try:
        lines = Path("/proc/self/status").read_text().splitlines()
        return next(int(line.split()[1]) * 1024 for line in lines if line.startswith("VmHWM"))
    except (OSError, StopIteration):
        unit = 1 if sys.platform == "darwin" else 1024
        import resource  # not on Windows

        return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit


# ----------------------------------------------------------------------------------------------------------------------
# One process per measurement


def in_process(
    target: str, job: dict, *, threads: int, timeout_s: float | None = None, environment: dict[str, str] | None = None
) -> dict:
    """Runs `module:function(job) -> dict` in a fresh process with so many threads and returns what it returned.

    The process starts in an empty folder, so that no module of the clone shadows an installed one, and is kept from the
    network. Raises MeasurementFailed with the last lines it printed.
    """
    with tempfile.TemporaryDirectory(prefix="longtrace-bench-") as folder:
        spec = Path(folder) / "job.json"
        spec.write_text(json.dumps({"target": target, "job": job}))
        environment = {
            **os.environ,
            "OMP_NUM_THREADS": str(threads),
            "MKL_NUM_THREADS": str(threads),
            "HF_HUB_OFFLINE": "1",
            "TOKENIZERS_PARALLELISM": "false",
            **(environment or {}),
        }
        command = [sys.executable, "-c", "from longtrace.bench.harness import _work; _work()", str(spec)]
        try:
            done = subprocess.run(
                command,
                cwd=folder,
                env=environment,
                timeout=timeout_s,
                text=True,
                capture_output=True,
                errors="replace",
            )
        except subprocess.TimeoutExpired as error:
            raise MeasurementFailed(f"{target}: no result after {timeout_s:.0f} s") from error
        answer = Path(folder) / "result.json"
        if done.returncode or not answer.is_file():
            why = "killed, most likely out of memory" if done.returncode == -9 else f"exit {done.returncode}"
            tail = "\n".join((done.stderr or done.stdout).strip().splitlines()[-15:])
            raise MeasurementFailed(f"{target}: {why}\n{tail}")
        return json.loads(answer.read_text())


def _work() -> None:
    """The measuring process: run the job's function, leave its answer beside the job."""
    import torch

    spec = Path(sys.argv[1])
    order = json.loads(spec.read_text())
    torch.set_num_threads(int(os.environ["OMP_NUM_THREADS"]))
    module, function = order["target"].split(":")
    result = getattr(importlib.import_module(module), function)(order["job"])
    spec.with_name("result.json").write_text(json.dumps(result))


def interleaved(
    targets: dict[str, tuple[str, dict]], *, repeats: int, threads: int, report: Callable[[str], None] = console.print
) -> tuple[dict[str, list[dict]], dict[str, str]]:
    """Measures a, b, a, b, … `repeats` times, so that a machine that slows down slows all of them.

    `targets`: name → (target, job) of `in_process`. Returns the results by name, and what failed with the reason (a
    failed one is not tried again).
    """
    results: dict[str, list[dict]] = {name: [] for name in targets}
    failed: dict[str, str] = {}
    for turn in range(repeats):
        for name, (target, job) in targets.items():
            if name in failed:
                continue
            began = time.perf_counter()
            try:
                results[name].append(in_process(target, job, threads=threads))
            except MeasurementFailed as error:
                failed[name] = str(error)
                report(f"{name}: failed\n{error}", markup=False)
                continue
            report(f"{name} {turn + 1}/{repeats}: {time.perf_counter() - began:.0f} s", highlight=False)
    return {name: found for name, found in results.items() if found and name not in failed}, failed


def median(results: Sequence[dict], key: str) -> float:
    """The median of a number over the repetitions."""
    return statistics.median(result[key] for result in results)


# ----------------------------------------------------------------------------------------------------------------------
# What a benchmark leaves


def write_record(name: str, json_path: Path | None, *, machine: dict, rows: list[dict], ratios: dict, **more) -> Path:
    """Writes {"name", "machine", "versions", "rows", "ratios", …} and returns the path. `rows` are flat dicts."""
    path = Path(json_path) if json_path else Path("runs/bench") / f"{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    record = {"name": name, "machine": machine, "versions": versions(), "rows": rows, "ratios": ratios, **more}
    path.write_text(json.dumps(record, indent=1) + "\n")
    return path


def print_table(title: str, columns: dict[str, str], rows: list[dict], formats: dict[str, str] | None = None) -> None:
    """A table of `rows`: `columns` maps a row's key to its heading (with the unit), `formats` to a format spec."""
    table = Table(title=title, title_justify="left", title_style="bold")
    for key, heading in columns.items():
        text = all(isinstance(row.get(key), str) for row in rows)
        table.add_column(heading, justify="left" if text else "right")
    for row in rows:
        values = [row.get(key) for key in columns]
        spec = formats or {}
        table.add_row(*("–" if v is None else format(v, spec.get(k, "")) for k, v in zip(columns, values)))
    console.print(table)


def bar_picture(path: Path, title: str, panels: Sequence[tuple[str, list[dict], str, str]], note: str = "") -> Path:
    """A PNG of horizontal bars side by side, one panel per measure: (heading, rows, key, format spec)."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    bars = max(len(rows) for _, rows, _, _ in panels)
    names = max(len(row["impl"]) for _, rows, _, _ in panels for row in rows)
    shared = len({tuple(row["impl"] for row in rows) for _, rows, _, _ in panels}) == 1  # one set of names will do
    width = 4.2 * len(panels) + 0.085 * names * (1 if shared else len(panels))
    figure = Figure(figsize=(width, 1.5 + 0.42 * bars), dpi=150, layout="constrained", facecolor="white")
    FigureCanvasAgg(figure)
    figure.suptitle(title, x=0.012, ha="left", fontsize=12, fontweight="bold", color="#15181e")
    axes = figure.subplots(1, len(panels), squeeze=False)[0]
    for ax, (heading, rows, key, spec) in zip(axes, panels):
        values = [row[key] for row in rows]
        colours = ["#2f6fde" if row["impl"].startswith("longtrace") else "#9aa4b2" for row in rows]
        ax.barh(range(len(rows)), values, color=colours, height=0.6)
        named = not shared or ax is axes[0]
        ax.set_yticks(range(len(rows)), [row["impl"] if named else "" for row in rows], fontsize=10)
        ax.set_ylim(len(rows) - 0.4, -0.6)
        for i, row in enumerate(rows):
            low, high = row.get(f"{key}_min", row[key]), row.get(f"{key}_max", row[key])
            ax.plot([low, high], [i, i], color="#15181e", linewidth=1.4)
            ax.annotate(
                format(row[key], spec), (max(high, row[key]), i), (5, 0), textcoords="offset points", va="center"
            )
        ax.set_xlim(0, 1.25 * max(row.get(f"{key}_max", row[key]) for row in rows))
        ax.set_title(heading, loc="left", fontsize=10, color="#5d6673")
        ax.spines[["top", "right", "left"]].set_visible(False)
        ax.tick_params(axis="y", length=0)
        ax.tick_params(axis="x", labelsize=8, colors="#5d6673")
    if note:
        figure.supxlabel(note, x=0.012, ha="left", fontsize=8, color="#5d6673")
    figure.savefig(path)
    return path

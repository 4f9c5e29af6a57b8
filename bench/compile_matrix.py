"""What do our GPU kernels need of a GPU? Every shipped configuration compiled for parts this machine does not have.

Registers, spills, shared memory, predicted occupancy and matrix instructions of each object, held against the rules (no
spill, within the part, a matrix instruction where a dot is) and against a committed baseline of the same compiler.
"""

from __future__ import annotations

import functools
import itertools
import json
import os
import time
from collections.abc import Callable, Iterable
from concurrent.futures import ProcessPoolExecutor
from multiprocessing import get_context
from pathlib import Path

from longtrace.trainer.config import Refusal

from . import BenchConfig, harness
from .harness import console

BASELINE = Path(__file__).with_name("compile_baseline.json")
MEASURES = ("registers", "spills", "shared_bytes", "occupancy", "instruction")
GROWTH = 1.10  # of registers and shared memory, before it is a regression
COLUMNS = {
    "kernel": "kernel", "arch": "part", "configs": "objects", "registers": "registers", "spills": "spills",
    "shared_kb": "shared KB", "occupancy": "occupancy", "instruction": "matrix", "compile_s": "compile s",
}  # fmt: skip
FORMATS = {"shared_kb": ".1f", "occupancy": ".0%", "compile_s": ".1f"}


def bench(config: BenchConfig) -> None:
    """Compiles, prints the table, draws compile_matrix.png, writes the record. Raises Refusal if a check fails."""
    check_installed()
    parts = architectures(config.inputs)
    machine = harness.machine(harness.threads_here(config.threads))
    level = "quick" if config.quick else "shipped"
    rows = compile_rows(level, parts, machine["threads"], functools.partial(console.print, highlight=False))
    baseline = read_baseline()
    checks = check_rows(rows, baseline)
    table = summary(rows)
    harness.print_table(
        "Compiled ahead of time: the most, and the least occupancy, over shipped configurations",
        COLUMNS,
        table,
        FORMATS,
    )
    record = harness.write_record(
        "compile_matrix", config.json, machine=machine, rows=rows, ratios={}, checks=checks,
        compilers=sorted({row["compiler"] for row in rows}),
    )  # fmt: skip
    draw(record.parent / "compile_matrix.png", table, machine)
    for check in checks:
        console.print(check, highlight=False, markup=False)
    console.print(f"record in {record}, picture beside it", highlight=False)
    if config.baseline:
        write_baseline(rows, baseline)
        console.print(f"baseline kept in {BASELINE}", highlight=False)
    elif failed := [check for check in checks if check.startswith("FAILS")]:
        raise Refusal(f"bench compile_matrix: {len(failed)} of {len(checks)} checks failed")


def check_installed() -> None:
    """Raises Refusal where nothing can be compiled."""
    if not harness.installed("triton"):
        raise Refusal("bench compile_matrix: triton is not installed; accepted: pip install 'longtrace[gpu]'")
    if os.environ.get("TRITON_INTERPRET") == "1":
        raise Refusal("bench compile_matrix: found TRITON_INTERPRET=1, under which nothing is compiled; unset it")


def architectures(wanted: list[str] | None = None) -> list[str]:
    """All parts, or those wanted. Raises Refusal for an unknown one."""
    from .compile_cases import ARCHITECTURES

    if unknown := set(wanted or ()) - set(ARCHITECTURES):
        raise Refusal(f"--inputs: found {sorted(unknown)[0]}; accepted: {', '.join(ARCHITECTURES)}")
    return list(wanted or ARCHITECTURES)


# ----------------------------------------------------------------------------------------------------------------------
# Compiling


def compile_rows(level: str, parts: Iterable[str], processes: int, report: Callable[[str], None]) -> list[dict]:
    """The rows of every case of a level ("shipped" or "quick"), of every .cu file that is there, in so many processes."""
    from .compile_objects import CUDA_SOURCES, nvcc_version

    sources = sorted(CUDA_SOURCES.glob("*.cu")) if nvcc_version() else []
    rows: list[dict] = []
    context = get_context("spawn")  # a fork would share Triton's and torch's threads
    with ProcessPoolExecutor(processes, mp_context=context) as pool:
        for arch in parts:
            began = time.perf_counter()
            jobs = [(level, arch, name) for name in _cases(level, arch)]
            if arch == "sm_90" or (level != "quick" and not arch.startswith("gfx")):
                jobs += [("nvcc", arch, str(source)) for source in sources]
            found = list(itertools.chain.from_iterable(pool.map(_rows, jobs, chunksize=4)))
            problems = sum(bool(row["problem"]) for row in found)
            report(f"{arch}: {len(found)} objects, {problems} with a problem, {time.perf_counter() - began:.0f} s")
            rows += found
    return rows


@functools.cache
def _cases(level: str, arch: str) -> dict:
    from . import compile_cases

    found = compile_cases.quick() if level == "quick" else compile_cases.shipped(arch)
    return {case.name: case for case in found if case.arch == arch}


def _rows(job: tuple[str, str, str]) -> list[dict]:
    """One job of a process of the pool."""
    from . import compile_objects

    level, arch, name = job
    if level == "nvcc":
        return compile_objects.nvcc_rows(Path(name), arch)
    return [compile_objects.triton_row(_cases(level, arch)[name])]


# ----------------------------------------------------------------------------------------------------------------------
# The baseline: {compiler: {"kernel, config, arch": [MEASURES]}}


def row_name(row: dict) -> str:
    return ", ".join((row["kernel"], row["config"], row["arch"]))


def read_baseline(path: Path | None = None) -> dict[str, dict[str, list]]:
    """What the baseline holds of each compiler; nothing where there is none."""
    path = path or BASELINE
    return json.loads(path.read_text()) if path.is_file() else {}


def write_baseline(rows: list[dict], baseline: dict[str, dict[str, list]], path: Path | None = None) -> None:
    """`baseline` with `rows` in the place of what it held of them, a line an object."""
    kept = {compiler: dict(objects) for compiler, objects in baseline.items()}
    for row in rows:
        if "registers" in row:
            kept.setdefault(row["compiler"], {})[row_name(row)] = [row[key] for key in MEASURES]
    blocks = []
    for compiler, objects in sorted(kept.items()):
        lines = ",\n".join(f"  {json.dumps(name)}: {json.dumps(values)}" for name, values in sorted(objects.items()))
        blocks.append(f"{json.dumps(compiler)}: {{\n{lines}\n}}")
    (path or BASELINE).write_text("{\n" + ",\n".join(blocks) + "\n}\n")


def regressions(row: dict, before: list) -> list[str]:
    """What got worse in an object: more spills, over 10 % more registers or shared memory, and so on."""
    was = dict(zip(MEASURES, before))
    found = []
    for key in ("registers", "shared_bytes"):
        if row[key] > GROWTH * was[key]:
            found.append(f"{key} {was[key]} → {row[key]}")
    if row["spills"] > was["spills"]:
        found.append(f"spills {was['spills']} → {row['spills']}")
    if row["occupancy"] < was["occupancy"]:
        found.append(f"occupancy {was['occupancy']:.0%} → {row['occupancy']:.0%}")
    if was["instruction"] and row["instruction"] != was["instruction"]:
        found.append(f"instruction {was['instruction']} → {row['instruction'] or 'none'}")
    return found


def check_rows(rows: list[dict], baseline: dict[str, dict[str, list]]) -> list[str]:
    """Lines that begin with "holds", "FAILS" (naming the object) or "skipped"."""
    checks = [f"FAILS {row_name(row)}: {row['problem']}" for row in rows if row["problem"]]
    checks = checks or [
        f"holds {len(rows)} objects: no spill, within shared memory, a matrix instruction where a dot is"
    ]
    for compiler in sorted({row["compiler"] for row in rows}):
        known = baseline.get(compiler)
        if known is None:
            others = ", ".join(sorted(baseline)) or "none"
            checks.append(f"skipped the baseline: none of {compiler} (there are: {others}); --baseline keeps one")
            continue
        mine = [row for row in rows if row["compiler"] == compiler and "registers" in row]
        worse = [(row, regressions(row, known[row_name(row)])) for row in mine if row_name(row) in known]
        new = [row_name(row) for row in mine if row_name(row) not in known]
        checks += [f"FAILS {row_name(row)}: {', '.join(found)}" for row, found in worse if found]
        checks += [f"FAILS {name}: not in the baseline; --baseline keeps it" for name in new]
        if not new and not any(found for _, found in worse):
            checks.append(f"holds {len(mine)} objects against the baseline of {compiler}")
    return checks


# ----------------------------------------------------------------------------------------------------------------------
# What is shown


def summary(rows: list[dict]) -> list[dict]:
    """One row for each kernel and part: the most registers, spills and shared memory, the least occupancy."""
    table = []
    for kernel, arch in dict.fromkeys((row["kernel"], row["arch"]) for row in rows):
        mine = [row for row in rows if (row["kernel"], row["arch"]) == (kernel, arch)]
        built = [row for row in mine if "registers" in row]
        most = lambda key: max((row[key] for row in built), default=None)  # noqa: B023, E731
        seconds = [row["compile_s"] for row in built if row["compile_s"] is not None]
        table.append({
            "kernel": kernel, "arch": arch, "configs": len(mine), "registers": most("registers"), "spills": most("spills"),
            "shared_kb": most("shared_bytes") and most("shared_bytes") / 1024,
            "occupancy": min((row["occupancy"] for row in built), default=None),
            "instruction": " ".join(sorted({row["instruction"] for row in built} - {""})),
            "compile_s": sum(seconds) if seconds else None, "problems": sum(bool(row["problem"]) for row in mine),
        })  # fmt: skip
    return table


def draw(path: Path, table: list[dict], machine: dict) -> Path:
    """Least occupancy of each kernel, a panel a part."""
    panels = []
    for arch in dict.fromkeys(row["arch"] for row in table):
        mine = [
            row | {"impl": row["kernel"], "percent": 100 * (row["occupancy"] or 0)}
            for row in table
            if row["arch"] == arch
        ]
        panels.append((f"{arch}: % of the warps it can hold", mine, "percent", ".0f"))
    note = f"predicted from registers, shared memory and warps; nothing was run; {machine['date']}"
    return harness.bar_picture(path, "Least occupancy over shipped configurations", panels, note)

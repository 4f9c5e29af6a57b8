"""`make verify-gpu`: all that can be known of the GPU kernels without a GPU, in one table; exits 1 if anything fails.

Triton in the interpreter (values, addresses, races), every shipped configuration compiled for five parts and held against
the baseline, and the CUDA C++ kernels, where they are, compiled and run on the host.
"""

from __future__ import annotations

import subprocess
import sys
import tempfile
import time
import xml.etree.ElementTree as xml
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from triton_cases import run_script

from longtrace.bench import compile_matrix, harness
from longtrace.bench.harness import console
from longtrace.trainer.config import Refusal

HERE = Path(__file__).parent
GROUPS = {  # the slow ones first, so that cores end together
    "triton_attention_interpreted.py": ("shipped", "more", "options", "shapes", "random"),
    "triton_head_interpreted.py": ("tile", "rows", "columns"),
    "triton_guard_interpreted.py": ("guard",),
}
HOST = HERE / "test_cuda_host.py"  # CUDA C++ on the host
COLUMNS = {
    "kernel": "kernel", "arch": "part", "configs": "objects", "registers": "registers", "spills": "spills",
    "shared_kb": "shared KB", "occupancy": "occupancy", "instruction": "matrix", "fp32": "error fp32",
    "16-bit": "error 16-bit", "host": "host run",
}  # fmt: skip
FORMATS = {"shared_kb": ".1f", "occupancy": ".0%", "fp32": ".0e", "16-bit": ".0e"}


def say(line: str) -> None:
    console.print(line, highlight=False, markup=False)


def interpret(processes: int) -> tuple[dict[str, float], list[str]]:
    """({kernel and precision: relative error}, lines that hold or fail) of every interpreted case."""

    def run(job: tuple[str, str]) -> dict:
        began = time.perf_counter()
        try:
            report = run_script(HERE / job[0], job[1])
        except (RuntimeError, subprocess.TimeoutExpired) as error:
            report = {"results": {job[1]: str(error)}}
        return report | {"job": f"{job[0].removesuffix('.py')} {job[1]}", "seconds": time.perf_counter() - began}

    errors: dict[str, float] = {}
    lines, passed = [], 0
    with ThreadPoolExecutor(processes) as pool:  # each waits for a process of its own
        for report in pool.map(run, [(script, group) for script, groups in GROUPS.items() for group in groups]):
            if "skip" in report:
                lines.append(f"FAILS {report['job']}: {report['skip']}")
                continue
            failed = {name: problem for name, problem in report["results"].items() if problem}
            lines += [f"FAILS {report['job']}, {name}: {problem.splitlines()[-1]}" for name, problem in failed.items()]
            passed += len(report["results"]) - len(failed)
            say(f"{report['job']}: {len(report['results'])} cases, {len(failed)} failed, {report['seconds']:.0f} s")
            for name, error in report.get("errors", {}).items():
                errors[name] = max(errors.get(name, 0.0), error)
    return errors, [*lines, f"holds {passed} interpreted cases"]


def run_on_host() -> tuple[dict[str, str], dict[str, float], list[str]]:
    """({.cu file: "12 passed"}, {"cuda FILE fp32": error}, lines) from the host tests' report; nothing where they are not.

    A test counts for each .cu file whose stem is in its name, and gives errors by record_property("error FILE fp32", x).
    """
    if not HOST.is_file():
        return {}, {}, []
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = [sys.executable, "-m", "pytest", "--import-mode=importlib", "-q", "-p", "no:cacheprovider"]
        root = ["--rootdir", HERE.parents[1], "-c", HERE.parents[1] / "pyproject.toml"]
        done = subprocess.run(
            [*command, *root, f"--junitxml={report}", HOST], cwd=folder, capture_output=True, text=True
        )
        if not report.is_file():
            return {}, {}, [f"FAILS host run: {(done.stdout + done.stderr).strip().splitlines()[-1:]}"]
        return read_host_report(xml.parse(report).getroot(), [x.stem for x in cuda_sources()])


def read_host_report(root: xml.Element, stems: list[str]) -> tuple[dict[str, str], dict[str, float], list[str]]:
    """What `run_on_host` returns, of a junit report."""
    cases = list(root.iter("testcase"))
    failed = [case.get("name") for case in cases if case.find("failure") is not None or case.find("error") is not None]
    skipped = [case.get("name") for case in cases if case.find("skipped") is not None]
    counts, errors = {}, {}
    for stem in stems:
        mine = [case.get("name") for case in cases if stem in case.get("name") and case.get("name") not in skipped]
        wrong = [name for name in mine if name in failed]
        counts[stem] = f"{len(wrong)} of {len(mine)} failed" if wrong else f"{len(mine)} passed" if mine else "not run"
    for entry in root.iter("property"):
        if entry.get("name").startswith("error "):
            name = f"cuda {entry.get('name').removeprefix('error ')}"
            errors[name] = max(errors.get(name, 0.0), float(entry.get("value")))
    lines = [f"FAILS host run: {name}" for name in failed]
    lines += [f"FAILS host run: no test of {stem}.cu ran" for stem, count in counts.items() if count == "not run"]
    return counts, errors, lines or [f"holds host run: {len(cases) - len(skipped)} tests"]


def cuda_sources() -> list[Path]:
    return sorted((HERE.parents[1] / "csrc" / "cuda").glob("*.cu"))


def main() -> int:
    began = time.perf_counter()
    compile_matrix.check_installed()
    processes = harness.threads_here()
    errors, lines = interpret(processes)
    counts, more, host_lines = run_on_host()
    rows = compile_matrix.compile_rows("shipped", compile_matrix.architectures(), processes, say)
    lines += host_lines + compile_matrix.check_rows(rows, compile_matrix.read_baseline())
    errors |= more
    table = []
    for row in compile_matrix.summary(rows):
        kernel = row["kernel"]
        row |= {kind: errors.get(f"{kernel} {kind}") for kind in ("fp32", "16-bit")}
        if not kernel.startswith("cuda ") and row["fp32"] is None and row["16-bit"] is None:
            lines.append(f"FAILS {kernel}: no interpreted case measures its error")
        table.append(row | {"host": counts.get(kernel.removeprefix("cuda "))})
    harness.print_table(
        "GPU kernels, without a GPU: relative errors against float64; occupancy is predicted", COLUMNS, table, FORMATS
    )
    for line in dict.fromkeys(lines):
        say(line)
    failed = [line for line in lines if line.startswith("FAILS")]
    say(
        f"{len(failed)} of {len(lines)} checks fail; {(time.perf_counter() - began) / 60:.1f} minutes, {processes} processes"
    )
    return int(bool(failed))


if __name__ == "__main__":
    try:
        sys.exit(main())
    except Refusal as error:
        sys.exit(str(error))

"""What do the kernels do on this GPU? One command: parity against float64, then times beside the peers, under ten minutes.

`make bench-gpu` builds the extensions where that is needed and runs this. Each part is a process of its own with a budget,
writes its rows as it finds them, and is stopped when it outstays; what is not installed is skipped and said.
`--dry-run` runs all of it on the CPU at tiny shapes (Triton in its interpreter), to see that it runs.
"""

from __future__ import annotations

import argparse
import json
import os
import time
from dataclasses import dataclass
from pathlib import Path

from longtrace.trainer.config import Refusal

from . import BenchConfig, harness
from .harness import console

MINUTES = 10
PREDICTED = Path(__file__).parent / "results" / "2026-11-22" / "traffic.json"


@dataclass(frozen=True)
class Part:
    """`target(job)` runs in a process of its own; `seconds` is its budget, of which imports take about five."""

    target: str
    seconds: int
    what: str
    compare: str | None = None  # the implementation that others are compared with


# A later benchmark adds itself here: its function takes {"device", "dry", "seconds", "rows": path} and calls `note`.
PARTS = {
    "parity": Part("longtrace.bench.gpu_parts:parity", 70, "values and gradients on the device against float64"),
    "head": Part("longtrace.bench.gpu_parts:head", 160, "the vocabulary head, forward and backward", "exact"),
    "attention": Part("longtrace.bench.gpu_parts:attention", 75, "packed attention", "longtrace"),
    "layers": Part("longtrace.bench.gpu_parts:layers", 60, "norms, rotary embedding, gated activations", "longtrace"),
    "advantages": Part("longtrace.bench.gpu_parts:advantages", 20, "group advantages", "longtrace"),
    "blend": Part("longtrace.bench.gpu_parts:blend", 20, "two gradients blended, with their statistics", "longtrace"),
    "sft": Part("longtrace.bench.gpu_sft:sft", 125, "an SFT step at 15k tokens, a 1.5B-shaped model", "longtrace"),
    "grpo": Part("longtrace.bench.gpu_grpo:reinforcement", 70, "rollouts and GRPO steps, 135M parameters", "longtrace"),
}

COLUMNS = {"impl": "", "case": "", "ms": "ms", "ms_min": "min", "ms_max": "max", "runs": "runs", "predicted_ms": "predicted",
           "peak_mb": "MB", "error": "error", "note": ""}  # fmt: skip
FORMATS = {"ms": ",.3f", "ms_min": ",.3f", "ms_max": ",.3f", "predicted_ms": ",.2f", "peak_mb": ",.0f", "error": ".1e"}


def bench(config: BenchConfig) -> None:
    """`longtrace bench gpu`; `--impls` chooses parts, `--json` the record."""
    path = config.json or Path("runs/bench-gpu/gpu.json")
    run(Path(path).parent, config.dry_run, config.impls, Path(path).name)


def main() -> None:
    """What `make bench-gpu` calls: needs no more than torch, numpy, rich and matplotlib."""
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--dry-run", action="store_true", help="tiny shapes on the CPU")
    parser.add_argument("--out", type=Path, default=Path("runs/bench-gpu"), help="where record and pictures go")
    parser.add_argument("--parts", nargs="*", help=f"of {', '.join(PARTS)}")
    options = parser.parse_args()
    try:
        run(options.out, options.dry_run, options.parts)
    except Refusal as error:
        console.print(str(error), style="bold red", markup=False)
        raise SystemExit(2) from None


def run(out: Path, dry: bool, chosen: list[str] | None = None, name: str = "gpu.json") -> dict:
    """Runs the parts and leaves the record, a line a row per part, and pictures in `out`; returns the record.

    Raises Refusal for an unknown part, and where there is no CUDA device (without `dry`).
    """
    import torch

    from longtrace import kernels as K

    from .device import smi

    if unknown := set(chosen or ()) - set(PARTS):
        raise Refusal(f"bench gpu: found {sorted(unknown)[0]}; accepted: {', '.join(PARTS)}")
    if not dry and not torch.cuda.is_available():
        raise Refusal("bench gpu: torch sees no CUDA device; --dry-run runs all of it on the CPU at tiny shapes")
    out = out.resolve()
    out.mkdir(parents=True, exist_ok=True)
    device = "cpu" if dry else "cuda"
    began = time.monotonic()
    gpu = None if dry else torch.cuda.get_device_name()
    console.print(f"{gpu or 'dry run on the CPU'}\n{K.explain()}", highlight=False, markup=False)
    rows, skipped, states = [], {}, {"before": smi()}
    environment = {"TRITON_INTERPRET": "1"} if dry else {}
    record = write(out, name, rows, skipped, states, gpu, dry, 0.0)
    for part, spec in PARTS.items():
        if chosen and part not in chosen:
            continue
        left = 60 * MINUTES - (time.monotonic() - began)
        seconds = spec.seconds * (3 if dry else 1)  # a dry run may be on a slow machine, and is not about time
        if left < spec.seconds:
            skipped[part] = f"its {spec.seconds} s would end after {MINUTES} minutes"
            continue
        lines = out / f"{part}.jsonl"
        lines.write_text("")
        job = {"device": device, "dry": dry, "seconds": seconds - 10, "rows": str(lines)}
        start = time.monotonic()
        try:
            skipped |= {
                f"{part}: {k}": v
                for k, v in harness.in_process(
                    spec.target, job, threads=harness.threads_here(1 if dry else 0), timeout_s=min(seconds + 20, left),
                    environment=environment,
                ).items()
            }  # fmt: skip
        except harness.MeasurementFailed as error:
            skipped[part] = str(error)
        states[part] = smi()
        found = read_rows(lines, part)
        rows += found
        title = f"{part}: {spec.what} ({time.monotonic() - start:.0f} s)"
        harness.print_table(title, COLUMNS, with_predictions(found, gpu), FORMATS)
        record = write(out, name, rows, skipped, states, gpu, dry, time.monotonic() - began)  # as it comes
    for what, why in skipped.items():
        console.print(f"skipped: {what}: {why.splitlines()[0] if why else ''}", style="yellow", highlight=False)
    pictures(out, with_predictions(rows, gpu), gpu or "dry run")
    for check in record["checks"]:
        if not check.startswith("holds"):
            console.print(check, style="bold red", highlight=False)
    console.print(f"{time.monotonic() - began:.0f} s; record, rows and pictures in {out}", highlight=False)
    return record


def read_rows(lines: Path, part: str) -> list[dict]:
    """The rows of a part; a later line for the same implementation and case replaces an earlier one."""
    found: dict[tuple, dict] = {}
    for line in lines.read_text().splitlines():
        row = json.loads(line)
        key = (row["impl"], row["case"])
        found[key] = found.get(key, {"part": part}) | row
    return list(found.values())


def with_predictions(rows: list[dict], gpu: str | None) -> list[dict]:
    """The rows with `predicted_ms`, the roofline of bench/traffic.py for this part, where the shape is the predicted one."""
    kind = next((kind for kind in ("A100", "H100", "H200", "B200") if kind in (gpu or "")), None)
    if kind is None or not PREDICTED.is_file():
        return rows
    table = {row["impl"]: row for row in json.loads(PREDICTED.read_text())["rows"] if row["group"] == "as shipped"}
    shape = next(iter(table.values()))
    case = f"{shape['T']:,} x {shape['H']:,} x {shape['V']:,}"
    predicted = {(row.get("predicts"), case): table.get(row.get("predicts")) for row in rows}
    return [
        row | ({"predicted_ms": found[f"{kind}_ms"]} if (found := predicted.get((row.get("predicts"), row["case"]))) else {})
        for row in rows
    ]  # fmt: skip


def write(out: Path, name: str, rows, skipped, states, gpu, dry: bool, seconds: float) -> dict:
    """Writes the record of what is known so far."""
    rows = with_predictions(rows, gpu)
    checks = [row["check"] for row in rows if row.get("check")]
    path = harness.write_record(
        "gpu", out / name, machine=harness.machine(harness.threads_here()) | {"gpu": gpu}, rows=rows,
        ratios=ratios(rows), checks=checks, skipped=skipped, clocks=states, dry_run=dry, seconds=round(seconds, 1),
        setting="device events, medians, implementations in turn, L2 emptied before each call, warm-up excluded",
    )  # fmt: skip
    return json.loads(path.read_text())


def ratios(rows: list[dict]) -> dict[str, float]:
    """How many times longer each implementation takes than ours, by part and case."""
    found = {}
    for part, spec in PARTS.items():
        here = [r for r in rows if r["part"] == part and r.get("ms")]
        for case in dict.fromkeys(r["case"] for r in here):
            times = {r.get("key", r["impl"]): r["ms"] for r in here if r["case"] == case}
            if spec.compare in times:
                found |= {
                    f"{part} {case}: {key} / {spec.compare}": ms / times[spec.compare]
                    for key, ms in times.items()
                    if key != spec.compare
                }
    return found


def pictures(out: Path, rows: list[dict], name: str) -> list[Path]:
    """A picture per part with times, and measured against predicted where there is a prediction."""
    drawn = []
    for part in dict.fromkeys(row["part"] for row in rows):
        here = [r for r in rows if r["part"] == part and r.get("ms")]
        panels = []
        for case in dict.fromkeys(r["case"] for r in here):
            these = [r for r in here if r["case"] == case]
            panels.append((f"{case}: ms", these, "ms", ",.2f"))
        if panels:
            drawn.append(harness.bar_picture(out / f"{part}.png", f"{part}: {PARTS[part].what}", panels[:4], name))
    both = [r for r in rows if r.get("ms") and r.get("predicted_ms")]
    if both:
        panels = [("measured, ms", both, "ms", ",.1f"), ("roofline, ms", both, "predicted_ms", ",.1f")]
        drawn.append(harness.bar_picture(out / "predicted.png", "Measured against predicted", panels, name))
    return drawn


def note(job: dict, impl: str, case: str, **values) -> None:
    """Adds a row to the part's lines, at once: what was found stays when the part is stopped later."""
    with open(job["rows"], "a") as file:
        file.write(json.dumps({"impl": impl, "case": case, **values}) + "\n")
        file.flush()
        os.fsync(file.fileno())

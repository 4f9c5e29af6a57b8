"""How fast is the gradient blend on the CPU, and how exact? Ours, torch's foreach ops and a loop over tensors, beside a copy.

All take the same two lists of gradients in one process, in turn, and give the blend in place with both norms and the dot
product. GB/s count what has to move, 3 values an element (two read, one written); a copy's count 2. `of_copy`, `of_memcpy`: the
share of the rate at which as many values are copied, in one piece, in the same turns and on as many threads, by torch's copy_
and by libc's memcpy, which may write past the caches. Errors are against float64.
"""

from __future__ import annotations

import ctypes
from concurrent.futures import ThreadPoolExecutor

import torch
from torch import Tensor

from longtrace import kernels as K
from longtrace.trainer.config import Refusal

from . import BenchConfig, harness
from .device import Clock, measure
from .harness import console

ALPHA = 0.3
GOAL = 0.8  # of a copy's rate
FASTER = 1.8  # times than torch's foreach ops
INPUTS = ["smollm2-135m", "tensors:64x65536"]
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}
SAMPLE = 1 << 20  # values that errors are taken on


def bench(config: BenchConfig) -> None:
    """Measures, prints a table a case, draws blend.png, writes the record. Raises Refusal for unusable options."""
    inputs = config.inputs or (INPUTS[1:] if config.quick else INPUTS)
    for name in inputs:
        shapes_of(name)
    chosen, machine = harness.begin(config, IMPLS)
    repeats = max(config.repeats, 3) * (3 if config.quick else 5)
    found = work({"inputs": inputs, "chosen": chosen, "threads": machine["threads"], "repeats": repeats})
    print_tables(found["rows"])
    for line in found["checks"]:
        console.print(line, style=None if line.startswith("holds") else "bold red", highlight=False)
    record = harness.write_record(
        "blend", config.json, machine=machine, **found, setting="one warm-up turn, implementations in turn, medians",
    )  # fmt: skip
    note = f"GB/s of what has to move; {machine['cpu']}, {machine['threads']} threads, {machine['date']}"
    panels = [(f"{case}: GB/s", rows, "gb_per_s", ",.1f") for case, rows in by_case(found["rows"]).items()]
    harness.bar_picture(record.parent / "blend.png", "Blending two gradients on the CPU", panels[:4], note)
    console.print(f"record in {record}, picture beside it", highlight=False)


def work(job: dict) -> dict:
    """JSON-able rows, ratios and checks of a job's `inputs` and implementations (`chosen`) in both dtypes."""
    torch.set_num_threads(job["threads"])
    rows, ratios, checks = [], {}, []

    def check(case: str, value: float, least: float, what: str) -> None:
        checks.append(f"{'holds' if value >= least else 'FAILS'}: {case}: {value:.2f} {what}, at least {least}")

    for name in job["inputs"]:
        for dtype in DTYPES:
            found = _measure(name, shapes_of(name), dtype, job["chosen"], job["repeats"])
            rows += found
            case, times = f"{name} {dtype}", {row["impl"]: row for row in found}
            if "longtrace" not in times:
                continue
            ours = times["longtrace"]
            others = {k: row["ms"] / ours["ms"] for k, row in times.items() if k in IMPLS and k != "longtrace"}
            ratios |= {f"{case}: {k} / longtrace": value for k, value in others.items()}
            check(case, ours["of_copy"], GOAL, "of a copy's rate")
            if "torch foreach" in others:
                check(case, others["torch foreach"], FASTER, "times as fast as torch's foreach ops")
    return {"rows": rows, "ratios": ratios, "checks": checks}


def by_case(rows: list[dict]) -> dict[str, list[dict]]:
    """The rows of each input and dtype."""
    return {
        f"{name} {dtype}": [row for row in rows if (row["inputs"], row["dtype"]) == (name, dtype)]
        for name, dtype in dict.fromkeys((row["inputs"], row["dtype"]) for row in rows)
    }


def print_tables(rows: list[dict]) -> None:
    """A table a case."""
    for case, found in by_case(rows).items():
        title = f"{case}: {found[0]['tensors']:,} tensors, {found[0]['values'] / 1e6:,.1f}M values"
        harness.print_table(title, COLUMNS, found, FORMATS)


COLUMNS = {
    "impl": "", "ms": "ms", "ms_min": "min", "ms_max": "max", "gb_per_s": "GB/s", "of_copy": "of a copy",
    "of_memcpy": "of memcpy", "err": "error", "sums_err": "norms and dot",
}  # fmt: skip
FORMATS = {
    "ms": ",.2f",
    "ms_min": ",.2f",
    "ms_max": ",.2f",
    "gb_per_s": ",.1f",
    "of_copy": ".2f",
    "of_memcpy": ".2f",
    "err": ".1e",
    "sums_err": ".1e",
}


def shapes_of(name: str) -> list[torch.Size]:
    """Shapes of "smollm2-135m" (its parameters) or "tensors:COUNTxVALUES"."""
    if name == "smollm2-135m":
        H, inner, V, layers, kv = 576, 1536, 49152, 30, 192
        layer = [(H, H), (kv, H), (kv, H), (H, H), (inner, H), (inner, H), (H, inner), (H,), (H,)]
        return [torch.Size(shape) for shape in ((V, H), *layer * layers, (H,))]
    kind, _, numbers = name.partition(":")
    parts = numbers.split("x")
    if kind != "tensors" or len(parts) != 2 or not all(n.isdigit() and int(n) for n in parts):
        raise Refusal(f"--inputs: found {name}; accepted: smollm2-135m, tensors:COUNTxVALUES")
    return [torch.Size((int(parts[1]),))] * int(parts[0])


def _measure(name: str, shapes: list[torch.Size], dtype: str, chosen: list[str], repeats: int) -> list[dict]:
    generator = torch.Generator().manual_seed(0)
    trace, empty = ([torch.randn(s, generator=generator).to(DTYPES[dtype]) for s in shapes] for _ in range(2))
    runs = {key: lambda run=IMPLS[key]: run(trace, empty) for key in chosen}
    source, copy = (torch.zeros(sum(x.numel() for x in trace), dtype=DTYPES[dtype]) for _ in range(2))
    with ThreadPoolExecutor(torch.get_num_threads()) as pool:
        copies = {"copy": lambda: copy.copy_(source), "memcpy": lambda: memcpy(copy, source, pool)}
        runs |= copies
        times = measure(runs, Clock("cpu"), repeats=repeats)
    if times.failed:
        raise RuntimeError(f"bench blend: {times.failed}")
    size = copy.numel() * copy.element_size()
    rate = {key: (2 if key in copies else 3) * size / times.row(key)["ms"] / 1e6 for key in runs}
    found = []
    for key in runs:
        err, sums_err = errors(IMPLS[key], DTYPES[dtype]) if key in IMPLS else (None, None)
        found.append({
            "impl": key, "inputs": name, "tensors": len(shapes), "values": copy.numel(), "dtype": dtype,
            **times.row(key), "gb_per_s": rate[key], **{f"of_{name}": rate[key] / rate[name] for name in copies},
            "err": err, "sums_err": sums_err,
        })  # fmt: skip
    return found


def memcpy(target: Tensor, source: Tensor, pool: ThreadPoolExecutor) -> None:
    """libc's, an equal share of the bytes on each of torch's threads (ctypes lets go of the interpreter's lock)."""
    size, threads = source.nbytes, torch.get_num_threads()
    ends = [size * i // threads for i in range(threads + 1)]
    to, of = target.data_ptr(), source.data_ptr()
    list(pool.map(lambda begin, end: ctypes.memmove(to + begin, of + begin, end - begin), ends[:-1], ends[1:]))


def errors(run, dtype: torch.dtype) -> tuple[float, float | None]:
    """(relative Frobenius error of the blend, largest error of norms and dot over the product of the norms)."""
    generator = torch.Generator().manual_seed(1)
    trace, empty = ([torch.randn(SAMPLE, generator=generator).to(dtype)] for _ in range(2))
    t, e = trace[0].double(), empty[0].double()
    exact, sums = ALPHA * t + (1 - ALPHA) * e, [t.norm(), e.norm(), t.dot(e)]
    told = run(trace, empty)
    error = float((trace[0].double() - exact).norm() / exact.norm())
    if told is None:
        return error, None
    scale = [sums[0], sums[1], sums[0] * sums[1]]
    return error, max(float(abs(float(a) - b) / s) for a, b, s in zip(told, sums, scale))


# ----------------------------------------------------------------------------------------------------------------------
# Implementations: trace <- ALPHA trace + (1 - ALPHA) empty; they return |trace|, |empty|, <trace, empty> of before, or None


def _ours(trace: list[Tensor], empty: list[Tensor]):
    stats = K.blend_gradients(trace, empty, ALPHA)
    return stats.trace_sq.sqrt(), stats.empty_sq.sqrt(), stats.dot


def _foreach(trace, empty):
    norms = [torch.stack(torch._foreach_norm(x)).norm() for x in (trace, empty)]
    products = torch._foreach_mul(trace, empty)
    dot = torch.stack([x.sum(dtype=torch.float32) for x in products]).sum()
    torch._foreach_lerp_(trace, empty, 1 - ALPHA)
    return *norms, dot


def _loop(trace, empty):
    sums = torch.zeros(3)
    for t, e in zip(trace, empty):
        a, b = t.flatten(), e.flatten()
        sums += torch.stack([a.norm().float().square(), b.norm().float().square(), a.dot(b).float()])
        t.mul_(ALPHA).add_(e, alpha=1 - ALPHA)
    return sums[0].sqrt(), sums[1].sqrt(), sums[2]


def _lerp(trace, empty):
    torch._foreach_lerp_(trace, empty, 1 - ALPHA)


IMPLS = {"longtrace": _ours, "torch foreach": _foreach, "torch loop": _loop, "torch lerp, no statistics": _lerp}

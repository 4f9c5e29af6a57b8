"""What does the vocabulary head cost, forward and backward, and how exact is it? Ours, its peers and three bare GEMMs.

Every implementation computes sum_i c_i nll_i from bf16 states and weights, and its gradients in both. Time, memory and
error are measured apart: times round-robin in one process, memory and errors in a process per implementation, all
against one float64 reference per input.
"""

from __future__ import annotations

import gc
import tempfile
import time
from pathlib import Path

from longtrace.trainer.config import Refusal
from longtrace.trainer.environment import memory_bytes

from . import BenchConfig, harness
from .harness import MB, console

EPS = 2.0**-12  # a vocabulary row is "dropped" if every p stays below this and it is never a target
LENGTHS = (1024, 2048, 4096, 8192, 16384, 32768)
LONG = 8192  # beyond this many tokens only ours, eager and the GEMMs run
# every malloc of 64 KB or more is a mapping of its own, returned when freed: the peak is what was needed at once
ALLOCATOR = {"MALLOC_ARENA_MAX": "1", "MALLOC_MMAP_THRESHOLD_": "65536", "MALLOC_TRIM_THRESHOLD_": "65536"}
COLUMNS = {"label": "", "T": "T", "coefficients": "c", "ms": "ms", "workspace_mb": "MB", "logprob_err": "log p err", "dh_err": "dh err",
           "dw_err": "dW err", "dw_row_err": "dW rows", "columns_kept": "kept"}  # fmt: skip
FORMATS = {"T": ",", "ms": ",.0f", "workspace_mb": ",.0f", "logprob_err": ".1e", "dh_err": ".1e", "dw_err": ".1e",
           "dw_row_err": ".1e", "columns_kept": ".3f"}  # fmt: skip


def bench(config: BenchConfig) -> None:
    """Measures, prints a table per input, draws head.png and head_errors.png, writes the JSON record."""
    from . import head_inputs, head_peers, head_report

    if config.repeats < 1:
        raise Refusal("bench: accepted: --repeats 1 or more")
    names = ["generated:512,8192,256"] if config.quick else config.inputs or _default_inputs(config)
    usual = [k for k in head_peers.IMPLS if not (config.quick and k in head_peers.SWEEP)]
    keys, machine = harness.begin(config, head_peers.IMPLS, usual)
    threads = machine["threads"]
    skipped = {
        k: "compiles for half a minute; not in --quick" for k in keys if config.quick and head_peers.IMPLS[k].slow_start
    }
    skipped |= {k: why for k in keys if k not in skipped and (why := head_peers.missing(k))}
    keys = [k for k in keys if k not in skipped]
    rows, texts, profiles = [], {}, {}
    with tempfile.TemporaryDirectory(prefix="longtrace-bench-") as folder:
        for name in names:
            source, T, V, H = _parse(name, config)
            path, reference = Path(folder) / "inputs.pt", Path(folder) / "reference.pt"
            # lengths are for time and memory only
            kinds = ["ones"] if source == "lengths" else ["ones", "sequence"] if T > LONG else list(head_inputs.KINDS)
            more = {} if source == "lengths" else {"kinds": kinds, "reference": str(reference)}
            console.print(f"{name}: making the inputs and their float64 reference", style="dim", highlight=False)
            job = {"source": source, "T": T, "V": V, "H": H, "path": str(path), **more,
                   "model": str(Path(config.model).resolve()), "data": [_absolute(d) for d in config.data or []]}  # fmt: skip
            made = harness.in_process("longtrace.bench.head:make_inputs", job, threads=threads)
            texts[name], profiles[name] = made["text"], made["profile"]
            console.print(f"{name}: {made['text']}", highlight=False)
            here = keys if T <= LONG and source != "lengths" else [k for k in keys if k in head_peers.CORE]
            for length in [n for n in LENGTHS if n <= T] if source == "lengths" else [T]:
                job = {"path": str(path), "T": length, "reference": more.get("reference")}
                rows += _measure(config, job, name, here, kinds, made["shape"], threads, skipped)
    ratios = head_report.ratios(rows)
    for name in names:
        title = f"{texts[name]}\nMB: workspace and saved tensors, without gradients; dW rows: those never above 2^-12"
        table = [r | {"label": head_report.label(r)} for r in rows if r["inputs"] == name]
        harness.print_table(title, COLUMNS, table, FORMATS)
        for what, value in ratios.get(name, {}).items():
            console.print(f"  {what} {value:.2f}", highlight=False)
    checks = [] if config.quick else head_report.checks(rows, ratios)
    failing = [check for check in checks if not check.startswith("holds")]
    if checks:
        console.print(
            f"{len(checks) - len(failing)} of {len(checks)} checks hold; the record lists them", highlight=False
        )
    for check in failing:
        console.print(check, style="bold red", highlight=False)
    for key, why in skipped.items():
        console.print(f"skipped: {key}: {why.splitlines()[0]}", style="yellow", highlight=False)
    record = harness.write_record(
        "head", config.json, machine=machine, rows=rows, ratios=ratios, inputs=texts, profiles=profiles,
        measured=head_inputs.MEASURED, skipped=skipped, checks=checks, reference="float64, all rows and columns",
    )  # fmt: skip
    note = f"{machine['cpu']}, {threads} threads, {machine['date']}, bf16"
    pictures = head_report.pictures(record.parent, rows, note)
    console.print(f"record in {record}, pictures: {', '.join(p.name for p in pictures)}", highlight=False)


def _absolute(spec: str) -> str:
    return str(Path(spec).resolve()) if Path(spec).is_file() else spec


def _default_inputs(config: BenchConfig) -> list[str]:
    real = ["real:4096", "real:15360"] if config.model and config.data else ["generated:4096,49152,576"]
    return [*real, "generated:2048,151936,896", "lengths"]


def _parse(name: str, config: BenchConfig) -> tuple[str, int, int, int]:
    source, _, numbers = name.partition(":")
    parts = numbers.split(",") if numbers else []
    sizes = [int(p) for p in parts if p.isdigit()]
    wanted = {"real": 1, "generated": 3, "lengths": len(sizes) if len(sizes) in (0, 3) else 3}
    if source not in wanted or len(sizes) != len(parts) or len(sizes) != wanted[source] or 0 in sizes:
        raise Refusal(f"--inputs: found {name}; accepted: real:T, generated:T,V,H, lengths or lengths:T,V,H")
    if source == "real" and not (config.model and config.data):
        raise Refusal(f"--inputs {name}: found no --model or no --data; accepted: a model folder and rows of traces")
    T, V, H = (*sizes, 0, 0)[:3] if sizes else (max(LENGTHS), 49152, 576)
    return source, T, V, H


def _measure(
    config: BenchConfig,
    job: dict,
    name: str,
    keys: list[str],
    kinds: list[str],
    shape: list[int],
    threads: int,
    skipped: dict,
) -> list[dict]:
    """The rows of one input at one length: every implementation with c = ones, ours and eager with every kind."""
    from . import head_peers

    T, V, H = job["T"], *shape
    room = 0.7 * memory_bytes() - 2 * (T + V) * H
    fits = [k for k in keys if head_peers.IMPLS[k].logits * T * V < room]
    for key in set(keys) - set(fits):
        skipped[f"{key} at T = {T:,}, V = {V:,}"] = "its logits do not fit in memory"
    core = [k for k in fits if k in head_peers.CORE and head_peers.IMPLS[k].weighted and k != "gemms"]
    pairs = [(k, "ones") for k in fits] + [(k, kind) for kind in kinds[1:] for k in core]
    console.print(f"{name}, T = {T:,}: timing {len(pairs)} x {config.repeats}", style="dim", highlight=False)
    job |= {"pairs": pairs, "repeats": config.repeats}
    times = harness.in_process("longtrace.bench.head:timed", job, threads=threads)
    rows = []
    # --quick shares one process: freed memory returns at once, so only imports and a crash are shared
    for group in [fits] if config.quick else [[k] for k in fits]:
        job["pairs"] = [p for p in pairs if p[0] in group]
        try:
            found = harness.in_process("longtrace.bench.head:measured", job, threads=threads, environment=ALLOCATOR)
        except harness.MeasurementFailed as error:
            skipped[f"{', '.join(group)} at T = {T:,}, V = {V:,}"] = str(error)
            continue
        for pair, row in found.items():
            key, kind = pair.split("/")
            rows.append(_row(name, key, kind, (T, V, H), times["seconds"].get(pair), row))
    skipped.update({f"{k} at T = {T:,}, V = {V:,}": why for k, why in times["failed"].items()})
    return rows


def _row(name: str, key: str, kind: str, shape: tuple[int, int, int], seconds: list[float] | None, found: dict) -> dict:
    from . import head_peers

    impl, (T, V, H) = head_peers.IMPLS[key], shape
    seconds = sorted(seconds or [])
    ms = (
        {"ms": 1e3 * seconds[len(seconds) // 2], "ms_min": 1e3 * seconds[0], "ms_max": 1e3 * seconds[-1]}
        if seconds
        else {}
    )
    return {
        "impl": impl.impl, "op": impl.op, "T": T, "H": H, "V": V, "dtype": "bfloat16", "ms": None, **ms,
        **found, "coefficients": kind, "inputs": name, "key": key,
        "eps": impl.options.get("eps"), "rank": impl.options.get("rank"), "runs": len(seconds), "note": impl.note,
    }  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# The measuring processes


def make_inputs(job: dict) -> dict:
    """Writes the inputs, and their reference if asked; returns their shape (V, H), how they were made in words, and what their softmax looks like."""
    import torch

    from . import head_inputs

    if job["source"] == "real":
        data, text = head_inputs.real(job["model"], job["data"], job["T"])
    else:
        data = head_inputs.generate(job["T"], job["V"], job["H"])
        text = f"generated states and weights, T = {job['T']:,}, V = {job['V']:,}, H = {job['H']:,}"
    torch.save(data, job["path"])
    if "reference" in job:
        write_reference(job)
    V, H = data["w"].shape
    first = {k: (v if k == "w" else v[: head_inputs.ROWS]) for k, v in data.items()}
    return {"shape": [V, H], "text": text, "profile": head_inputs.profile(**first, ranks=())}


def _load(job: dict):
    import torch

    data = torch.load(job["path"], weights_only=True)
    return data["h"][: job["T"]].clone(), data["w"], data["y"][: job["T"]].clone()


def timed(job: dict) -> dict:
    """Seconds of forward and backward by "key/kind", the pairs in turn, `repeats` times; and what failed.

    Before the first turn every implementation runs once on 256 rows (one that compiles: on all of them).
    """
    from . import head_inputs, head_peers

    h, w, y = _load(job)
    c = {kind: head_inputs.coefficients(kind, job["T"]) for kind in head_inputs.KINDS}
    seconds: dict[str, list[float]] = {}
    failed: dict[str, str] = {}
    for turn in range(-1, job["repeats"]):
        for key, kind in job["pairs"]:
            if key in failed:
                continue
            n = job["T"] if turn >= 0 or head_peers.IMPLS[key].slow_start else min(256, job["T"])
            gc.collect()
            began = time.perf_counter()
            try:
                head_peers.run(key, h[:n], w, y[:n], c[kind][:n])
            except Exception as error:  # a peer's failure is a finding, not the end of the benchmark
                failed[key] = f"{type(error).__name__}: {error}"
                continue
            if turn >= 0:
                seconds.setdefault(f"{key}/{kind}", []).append(time.perf_counter() - began)
    return {"seconds": {k: v for k, v in seconds.items() if k.split("/")[0] not in failed}, "failed": failed}


def measured(job: dict) -> dict:
    """Memory and errors by "key/kind".

    Resident memory is what counts, whoever allocated it. Before the backward no gradient exists, so the peak of the
    forward is all workspace and saved tensors; the gradients' bytes are taken off the peak of the backward. That can only
    flatter an implementation whose peak comes before its gradients do; `peak_mb` has nothing taken off.
    """
    import torch

    from . import head_inputs, head_peers

    h, w, y = _load(job)
    reference = torch.load(job["reference"], weights_only=True, mmap=True) if job["reference"] else None
    few, found = min(64, job["T"]), {}
    for key, kind in job["pairs"]:
        c = head_inputs.coefficients(kind, job["T"])
        head_peers.run(key, h[:few], w, y[:few], torch.ones(few))  # libraries set themselves up
        gc.collect()
        marks, base = [], harness.reset_peak()

        def forward_done(marks=marks) -> None:
            marks.append(harness.peak_bytes())
            harness.reset_peak()

        result = head_peers.run(key, h, w, y, c, between=forward_done)
        marks.append(harness.peak_bytes())
        gradients = sum(g.nbytes for g in result[2:4] if g is not None)
        workspace = max(marks[0] - base, marks[1] - base - gradients, 0)
        memory = {"workspace_mb": workspace / MB, "gradient_mb": gradients / MB, "peak_mb": (max(marks) - base) / MB}
        found[f"{key}/{kind}"] = memory | compare(result, reference, kind)
        del result
    return found


def write_reference(job: dict) -> dict:
    """Float64 log-probs, dh and dW for every kind of coefficients, 512 rows at a time, and which rows are dropped."""
    import torch

    from . import head_inputs

    h, w, y = _load(job)
    c = {kind: head_inputs.coefficients(kind, job["T"]) for kind in job["kinds"]}
    truth = exact(h, w, y, c)
    torch.save({k: v.float() if k.startswith("d") and v.is_floating_point() else v for k, v in truth.items()},
               job["reference"])  # fmt: skip
    return {"dropped": truth["dropped"].double().mean().item()}


def exact(h, w, y, coefficients: dict) -> dict:
    """What `compare` wants, in float64 on h's device: log_prob, which rows are dropped, y, and by kind c, dh and dw."""
    import torch

    c = {kind: values.double().to(h.device) for kind, values in coefficients.items()}
    w = w.double()
    log_prob, largest = w.new_empty(len(h)), w.new_zeros(len(w))
    dh = {kind: w.new_empty(h.shape) for kind in c}
    dw = {kind: torch.zeros_like(w) for kind in c}
    for rows in torch.arange(len(h), device=h.device).split(512):
        x = h[rows].double()
        log_p = (x @ w.T).log_softmax(1)
        log_prob[rows] = log_p.gather(1, y[rows, None])[:, 0]
        p = log_p.exp_()
        largest = torch.maximum(largest, p.amax(0))
        p[torch.arange(len(rows), device=h.device), y[rows]] -= 1
        for kind, weights in c.items():
            alive = weights[rows].nonzero()[:, 0]
            dz = p[alive] * weights[rows][alive, None]
            dh[kind][rows] = torch.zeros_like(x).index_copy_(0, alive, dz @ w)
            dw[kind].addmm_(dz.T, x[alive])
    dropped = largest < EPS
    dropped[y] = False
    return {"log_prob": log_prob, "dropped": dropped, "y": y, **{f"dh/{k}": v for k, v in dh.items()},
            **{f"dw/{k}": v for k, v in dw.items()}, **{f"c/{k}": v for k, v in c.items()}}  # fmt: skip


def compare(result: tuple, reference: dict | None, kind: str) -> dict:
    """Errors of (loss, log_prob, dh, dw, stats) against the reference; None where there is nothing to compare.

    logprob_err: largest absolute. dh_err, dw_err: relative, Frobenius. dw_row_err: median over the dropped rows of the
    relative error of a row of dW.
    """
    _, log_prob, dh, dw, stats = result
    numbers = {f"stats_{k}": v for k, v in stats.items() if isinstance(v, (int, float))}
    errors = dict.fromkeys(("logprob_err", "dh_err", "dw_err", "dw_row_err", "columns_kept"))
    if stats:
        errors["columns_kept"] = float(stats.get("columns_kept", 1.0))
    if reference is None or dh is None:
        return errors | numbers
    if log_prob is not None:
        # a row without a coefficient may have been left out
        alive = reference[f"c/{kind}"] != 0
        errors["logprob_err"] = (log_prob.double() - reference["log_prob"])[alive].abs().max().item()
    errors["dh_err"] = _relative(dh, reference[f"dh/{kind}"]).item()
    errors["dw_err"] = _relative(dw, reference[f"dw/{kind}"]).item()
    dropped = reference["dropped"]
    if dropped.any():
        errors["dw_row_err"] = _relative(dw[dropped], reference[f"dw/{kind}"][dropped], dim=1).median().item()
    return errors | numbers


def _relative(found, true, dim=None):
    true = true.double()
    return (found.double() - true).norm(dim=dim) / true.norm(dim=dim)

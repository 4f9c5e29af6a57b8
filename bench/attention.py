"""How fast is packed attention on the CPU, and how exact? Ours, a loop of SDPA over documents, a padded batch, a dense mask.

All get the same packed q, k, v and upstream gradient, take turns in one process, and are timed forward and backward
apart. FLOPs count the visible (query, key) pairs: 4 D a pair and head forward, 10 D backward.
"""

from __future__ import annotations

import itertools
import statistics
import time
from pathlib import Path

import numpy as np
import torch
import torch.nn.functional as F

from longtrace import kernels as K
from longtrace.trainer.config import Refusal
from longtrace.trainer.plan import measure_matmul_peak

from . import BenchConfig, harness
from .harness import console

HEADS, KV_HEADS, D = 9, 3, 64  # SmolLM2-135M
EXACT_TO = 4096  # tokens up to which errors against float64 are measured
PADDED_TO = 1 << 28  # scores a padded batch or a dense mask may have
INPUTS = ["one:2048", "one:15500", "mix:16384"]


def bench(config: BenchConfig) -> None:
    """Measures, prints the tables, draws attention.png, writes the record. Raises Refusal for unusable options."""
    names = config.inputs or (["one:512", "mix:1024"] if config.quick else INPUTS)
    cases = {name: lengths_of(name) for name in names}
    chosen, machine = harness.begin(config, IMPLS)
    torch.set_num_threads(machine["threads"])
    rows, ratios, panels = [], {}, []
    for dtype in (torch.bfloat16,) if config.quick else (torch.bfloat16, torch.float32):
        peak = measure_matmul_peak(dtype) / 1e9
        console.print(f"{_name(dtype)} matmul of 1,024: {peak:,.0f} GFLOP/s", highlight=False)
        for name, lengths in cases.items():
            found = _measure(name, lengths, dtype, chosen, config.repeats, peak)
            rows += found
            ratios[f"{name} {_name(dtype)}"] = _ratios(found)
            title = f"{name}, {_name(dtype)}: {len(lengths)} documents, {sum(lengths):,} tokens, {HEADS} query and {KV_HEADS} kv heads of {D}"
            harness.print_table(title, COLUMNS, found, FORMATS)
            for what, value in ratios[f"{name} {_name(dtype)}"].items():
                console.print(f"  {what} {value:.2f}", highlight=False)
            both = [r for r in found if r["direction"] == "both"]
            panels.append((f"{name}, {_name(dtype)}: ms", both, "ms", ",.0f"))
    record = harness.write_record("attention", config.json, machine=machine, rows=rows, ratios=ratios)
    note = f"forward and backward; {machine['cpu']}, {machine['threads']} threads, {machine['date']}"
    harness.bar_picture(record.parent / "attention.png", "Packed attention on the CPU", panels, note)
    console.print(f"record in {record}, picture beside it", highlight=False)


COLUMNS = {
    "impl": "", "direction": "", "ms": "ms", "gflops": "GFLOP/s", "of_matmul": "of matmul", "out_err": "out error",
    "grad_err": "gradient error",
}  # fmt: skip
FORMATS = {"ms": ",.1f", "gflops": ",.0f", "of_matmul": ".2f", "out_err": ".1e", "grad_err": ".1e"}


def lengths_of(name: str) -> list[int]:
    """Lengths of the documents of "one:T", "mix:T" (60 short ones and one long) or "FILE.npz:T" (the fullest real row)."""
    source, _, size = name.rpartition(":")
    if not size.isdigit() or int(size) < 256 or not (source in ("one", "mix") or source.endswith(".npz")):
        raise Refusal(
            f"--inputs: found {name}; accepted: one:T, mix:T, FILE.npz:T (an array `lengths` in it), T 256 or more"
        )
    T = int(size)
    if source == "one":
        return [T]
    if source == "mix":  # half of the row in one document, in the middle
        cuts = np.random.default_rng(0).dirichlet(np.full(60, 2.0)) * (T // 2 - 60)
        short = [1 + int(c) for c in cuts]
        return [*short[:30], T - sum(short), *short[30:]]
    if not Path(source).is_file():
        raise Refusal(f"--inputs {name}: no such file")
    lengths = [int(n) for n in np.load(source)["lengths"] if n <= T]
    if not lengths:
        raise Refusal(f"--inputs {name}: every document is longer than {T:,}")
    row = max(K.pack(lengths, T), key=lambda r: (len(r), sum(lengths[i] for i in r)))
    return [lengths[i] for i in row]


def _measure(name: str, lengths: list[int], dtype, chosen: list[str], repeats: int, peak: float) -> list[dict]:
    T = sum(lengths)
    generator = torch.Generator().manual_seed(0)
    q, k, v, grad = (torch.randn(T, h, D, generator=generator).to(dtype) for h in (HEADS, KV_HEADS, KV_HEADS, HEADS))
    pairs = sum(n * (n + 1) / 2 for n in lengths)
    flops = {"forward": 4 * pairs * HEADS * D, "backward": 10 * pairs * HEADS * D}
    flops["both"] = sum(flops.values())
    runs = {key: IMPLS[key](lengths) for key in chosen}
    runs = {key: run for key, run in runs.items() if run is not None}
    times: dict[str, list[tuple[float, float]]] = {key: [] for key in runs}
    results = {}
    for turn in range(repeats + 1):  # the first warms up
        for key, run in runs.items():
            leaves = [x.clone().requires_grad_() for x in (q, k, v)]
            begin = time.perf_counter()
            out = run(*leaves)
            middle = time.perf_counter()
            gradients = torch.autograd.grad(out, leaves, grad)
            times[key] += [(middle - begin, time.perf_counter() - middle)] if turn else []
            results[key] = (out.detach(), *gradients)
    exact = None
    if T <= EXACT_TO:
        leaves = [x.double().requires_grad_() for x in (q, k, v)]
        out = _loop(lengths)(*leaves)
        exact = (out.detach(), *torch.autograd.grad(out, leaves, grad.double()))
    found = []
    for key, taken in times.items():
        errors = [None, None]
        if exact is not None:
            relative = [float((a - b).norm() / b.norm()) for a, b in zip(results[key], exact)]
            errors = [relative[0], max(relative[1:])]
        for direction in flops:
            seconds = [f + b if direction == "both" else f if direction == "forward" else b for f, b in taken]
            middle = statistics.median(seconds)
            found.append({
                "impl": key, "direction": direction, "T": T, "docs": len(lengths), "dtype": _name(dtype),
                "inputs": Path(name).name, "ms": 1e3 * middle, "ms_min": 1e3 * min(seconds), "ms_max": 1e3 * max(seconds),
                "gflops": flops[direction] / middle / 1e9, "of_matmul": flops[direction] / middle / 1e9 / peak,
                "out_err": errors[0], "grad_err": errors[1],
            })  # fmt: skip
    return found


def _ratios(rows: list[dict]) -> dict[str, float]:
    time = {(r["impl"], r["direction"]): r["ms"] for r in rows}
    return {
        f"{direction}: {other} / longtrace": time[other, direction] / time["longtrace", direction]
        for other in dict.fromkeys(r["impl"] for r in rows)
        for direction in ("forward", "backward", "both")
        if other != "longtrace" and ("longtrace", direction) in time
    }


def _name(dtype: torch.dtype) -> str:
    return {torch.bfloat16: "bf16", torch.float32: "fp32"}[dtype]


# ----------------------------------------------------------------------------------------------------------------------
# Implementations: each takes the lengths and returns a function of packed q, k, v, or None where it would not fit


def _ours(lengths):
    offsets, longest = torch.tensor([0, *lengths]).cumsum(0), max(lengths)
    return lambda q, k, v: K.varlen_attention(q, k, v, offsets, longest)


def _sdpa(q, k, v, **how):
    """SDPA on (tokens, heads, D)."""
    q, k, v = (x.transpose(0, 1).unsqueeze(0) for x in (q, k, v))
    return F.scaled_dot_product_attention(q, k, v, enable_gqa=True, **how).squeeze(0).transpose(0, 1)


def _loop(lengths):
    def run(q, k, v):
        parts = zip(*(x.split(lengths) for x in (q, k, v)))
        return torch.cat([_sdpa(*part, is_causal=True) for part in parts])

    return run


def _padded(lengths):
    """One batch row a document, padded to the longest."""
    longest = max(lengths)
    if len(lengths) == 1 or len(lengths) * longest * longest > PADDED_TO:
        return None
    where = torch.cat([i * longest + torch.arange(n) for i, n in enumerate(lengths)])

    def run(q, k, v):
        spread = [
            x.new_zeros(len(lengths) * longest, *x.shape[1:]).index_copy(0, where, x).unflatten(0, (-1, longest))
            for x in (q, k, v)
        ]
        out = F.scaled_dot_product_attention(*(x.transpose(1, 2) for x in spread), is_causal=True, enable_gqa=True)
        return out.transpose(1, 2).flatten(0, 1)[where]

    return run


def _dense(lengths):
    """One row with a block mask."""
    T = sum(lengths)
    if len(lengths) == 1 or T * T > PADDED_TO:
        return None
    mask = torch.zeros(T, T, dtype=torch.bool)
    for begin, end in itertools.pairwise(np.cumsum([0, *lengths]).tolist()):
        mask[begin:end, begin:end] = torch.ones(end - begin, end - begin, dtype=torch.bool).tril()
    return lambda q, k, v: _sdpa(q, k, v, attn_mask=mask)


IMPLS = {"longtrace": _ours, "sdpa loop": _loop, "padded batch": _padded, "dense mask": _dense}

"""What does the head move and compute beside its peers, and how long must that take on a GPU? Counted, not measured.

Triton kernels run in the interpreter and are counted lane by lane; our whole ops run with every pass written down at a
small shape and are read off at the large one; peers that do not run here are counted by their closed form (costs.py).
Times are rooflines at data-sheet rates: predicted, not measured.
"""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import asdict
from pathlib import Path

from longtrace.trainer.config import Refusal

from . import BenchConfig, harness
from .harness import console

T, H, V = 15_360, 1_536, 151_936  # one trace of DeepSeek-R1's length; DeepSeek-R1-Distill-Qwen-1.5B's head
RECORD = Path(__file__).parent / "results" / "2026-11-22" / "head-15k.json"  # columns kept on real states
KEPT = 0.083  # as in RECORD: the mean share of columns kept at 2^-12 in chunks of 1,024 rows, 15,360 tokens of a trace
RANK = 64
# The small shape: no two sizes alike, so that each dimension of a pass says which size it is.
SMALL = {"rows": 6, "H": 28, "V": 613}
SMALL_COMPRESSED = {"rows": 20, "H": 28, "V": 613, "kept": 17, "rank": 3}
CONSTANTS = (0, 1, 2, 4, 15, 16, 48, 1024)  # sketches' widths and broadcast dimensions stay as they are

COLUMNS = {"impl": "", "tflops": "TFLOP", "gbytes": "GB", "again_gb": "again", "workspace_gb": "held", "flops_vs_liger": "FLOP/Liger",
           "bytes_vs_liger": "GB/Liger", "A100_ms": "A100", "H100_ms": "H100", "H200_ms": "H200", "B200_ms": "B200"}  # fmt: skip
FORMATS = {"tflops": ".1f", "gbytes": ",.1f", "again_gb": ",.0f", "workspace_gb": ".2f", "flops_vs_liger": ".2f",
           "bytes_vs_liger": ".2f", **{f"{part}_ms": ".1f" for part in ("A100", "H100", "H200", "B200")}}  # fmt: skip
KERNEL_COLUMNS = {"kernel": "", "shape": "shape", "loads": "loaded", "stores": "stored", "distinct": "distinct",
                  "form": "closed form", "flops": "dot FLOP"}  # fmt: skip


def bench(config: BenchConfig) -> None:
    """Counts, prints the tables, draws traffic.png, writes the record. Raises Refusal without triton."""
    for package in ("triton", "numpy"):
        if not harness.installed(package):
            raise Refusal(f"bench traffic: found no {package}; accepted: pip install 'longtrace[gpu]'")
    environment = {"TRITON_INTERPRET": "1", "LONGTRACE_EXTENSION": "0"}
    counted = harness.in_process(
        "longtrace.bench.traffic:count", {"quick": config.quick}, threads=1, environment=environment
    )
    rows, kernels = counted["heads"], counted["kernels"]
    largest = [row for row in kernels if row["shape"] == kernels[-1]["shape"]]
    harness.print_table("Triton kernels, bf16 operands, counted in the interpreter (bytes)", KERNEL_COLUMNS, largest,
                        {k: "," for k in ("loads", "stores", "distinct", "form", "flops")})  # fmt: skip
    title = (
        f"The head, forward and backward, T = {T:,}, H = {H:,}, V = {V:,}, bf16. GB: each byte once a pass\n"
        "again: GB that kernels load and store again; held: GB beside inputs and returned gradients\n"
        "A100 to B200: ms of the roofline at data-sheet rates; predicted, not measured"
    )
    for group in dict.fromkeys(row["group"] for row in rows):
        harness.print_table(f"{title}\n{group}", COLUMNS, [r for r in rows if r["group"] == group], FORMATS)
    ratios, checks = targets(rows)
    for line in checks:
        console.print(line, style=None if line.startswith("holds") else "bold red", highlight=False)
    for name, why in counted["skipped"].items():
        console.print(f"skipped: {name}: {why}", style="yellow", highlight=False)
    from .costs import PARTS

    record = harness.write_record(
        "traffic", config.json, machine=harness.machine(1), rows=rows, ratios=ratios, kernels=kernels, checks=checks,
        skipped=counted["skipped"], parts={name: asdict(part) for name, part in PARTS.items()},
        setting=f"predicted, not measured; columns kept {KEPT} as measured on real states, k = {RANK}",
    )  # fmt: skip
    picture(record.parent / "traffic.png", rows)
    console.print(f"record in {record}, picture beside it", highlight=False)


def head_rows(ours: dict) -> list[dict]:
    """The table: ours as counted, the peers by their closed form, as shipped and at our workspace."""
    from . import costs

    shipped = {
        "longtrace exact, known": ours["known"], "longtrace exact, unknown": ours["unknown"],
        f"longtrace compressed, k = {RANK}": ours["compressed"], "Liger": costs.liger(T, H, V),
        "CCE exact": costs.cce(T, H, V), "CCE filtered": costs.cce(T, H, V, KEPT), "TRL": costs.trl(T, H, V),
        "QuACK": costs.quack(T, H, V), "Liger Triton GRPO": costs.liger_grpo(T, H, V),
        "torch chunked": costs.torch_chunked(T, H, V), "torch eager": costs.eager(T, H, V),
    }  # fmt: skip
    held = ours["known"].workspace
    # the largest power of two that fits what ours holds: Liger rounds its chunks so, and torch is given the same
    rows = 1 << int(held / (2 * V)).bit_length() - 1
    equal = {
        "longtrace exact, known": ours["known"],
        "longtrace compressed, k = 64": ours["compressed"],
        "Liger": costs.liger(T, H, V, budget=_liger_budget(rows)),
        "Liger, fp32 dW": costs.liger(T, H, V, budget=_liger_budget(1 << int((held - 4 * V * H) / (2 * V)).bit_length() - 1),
                                      accumulate=4),
        "torch chunked": costs.torch_chunked(T, H, V, 1 << int(held / (6 * V)).bit_length() - 1),
        "QuACK": costs.quack(T, H, V),
    }  # fmt: skip
    found = []
    for group, heads in (("as shipped", shipped), (f"within the {held / 1e9:.1f} GB that ours holds", equal)):
        base = heads["Liger"]
        for name, head in heads.items():
            found.append({
                "impl": name, "group": group, "T": T, "H": H, "V": V, "dtype": "bf16", "tflops": head.flops / 1e12,
                "gbytes": head.bytes / 1e9, "again_gb": head.again / 1e9, "workspace_gb": head.workspace / 1e9,
                "chunks": head.chunks, "flops_vs_liger": head.flops / base.flops,
                "bytes_vs_liger": head.bytes / base.bytes, "counted": name.startswith("longtrace"),
                **{f"{part}_ms": costs.roofline_ms(head.passes, rates) for part, rates in costs.PARTS.items()},
            })  # fmt: skip
    return found


def _liger_budget(rows: int) -> int:
    """The chunk_mem_const that makes Liger take chunks of `rows`."""
    return next(c for c in range(1, 10**4) if (1 << (-(-T // -(-V // (c * H))) - 1).bit_length()) >= rows)


def targets(rows: list[dict]) -> tuple[dict, list[str]]:
    """Ratios to Liger, and the issue's targets as lines that hold or fail."""
    ratios: dict[str, dict] = {}
    lines = []
    for group in dict.fromkeys(row["group"] for row in rows):
        here = {r["impl"]: r for r in rows if r["group"] == group}
        known, compressed = here["longtrace exact, known"], here["longtrace compressed, k = 64"]
        ratios[group] = {
            "exact_flops_vs_liger": known["flops_vs_liger"], "exact_bytes_vs_liger": known["bytes_vs_liger"],
            "compressed_flops_vs_liger": compressed["flops_vs_liger"],
            "exact_h100_vs_liger": here["Liger"]["H100_ms"] / known["H100_ms"],
            "compressed_h100_vs_liger": here["Liger"]["H100_ms"] / compressed["H100_ms"],
        }  # fmt: skip
        bounds = [("exact_flops_vs_liger", 1.0), ("exact_bytes_vs_liger", 0.7), ("compressed_flops_vs_liger", 0.55)]
        if same := here.get("Liger, fp32 dW"):  # its own sums dW in bf16
            ratios[group]["exact_bytes_vs_liger_fp32_dw"] = known["gbytes"] / same["gbytes"]
            bounds.insert(2, ("exact_bytes_vs_liger_fp32_dw", 0.7))
        for name, bound in bounds:
            value = ratios[group][name]
            ok = value <= bound * (1 + 1e-9)
            lines.append(f"{'holds' if ok else 'FAILS'}: {group}: {name} {value:.2f}, at most {bound:.2f}")
    return ratios, lines


def picture(path: Path, rows: list[dict]) -> Path:
    """traffic.png: FLOPs, bytes and the H100's roofline of the heads as shipped."""
    here = [r for r in rows if r["group"] == rows[0]["group"]]
    panels = [("TFLOP", here, "tflops", ".1f"), ("GB moved, each byte once a pass", here, "gbytes", ",.0f"),
              ("H100 roofline, ms: predicted, not measured", here, "H100_ms", ".0f")]  # fmt: skip
    note = f"T = {T:,}, H = {H:,}, V = {V:,}, bf16; ours counted, peers by closed form; {KEPT:.1%} of columns kept"
    return harness.bar_picture(path, "The vocabulary head, forward and backward: counted work", panels, note)


# ----------------------------------------------------------------------------------------------------------------------
# The counting process (TRITON_INTERPRET=1)


def count(job: dict) -> dict:
    """{"kernels": rows, "heads": rows, "skipped"}; raises RuntimeError where a closed form is not what was counted."""
    shapes = SHAPES[:1] if job["quick"] else SHAPES
    kernels, skipped = kernel_rows(shapes)
    return {"kernels": kernels, "heads": head_rows({kind: ours(kind) for kind in HEADS}), "skipped": skipped}


SHAPES = ((3, 24, 300), (2, 40, 2500), (4, 64, 2048))  # (T, H, V): the last fills whole blocks, the others none


def kernel_rows(shapes) -> tuple[list[dict], dict[str, str]]:
    """Every kernel of ours and the peers at every shape, counted and by its closed form; and who was left out."""
    from . import costs
    from .counting import interpreted

    forms, found, skipped = costs.OURS | costs.PEERS, {}, {}

    def launched(name: str, arguments: dict, traffic) -> None:
        empty = {"launches": 0, "loads": 0, "stores": 0, "distinct": 0, "form": None, "form_again": None, "flops": 0}
        row = found.setdefault((name, shape), {"kernel": name, "shape": shape} | empty)
        for key in ("launches", "loads", "stores", "distinct", "flops"):
            row[key] += getattr(traffic, key)
        if name in forms:
            form, again = forms[name](arguments), costs.AGAIN[name](arguments)
            row["form"], row["form_again"] = (row["form"] or 0) + form.bytes, (row["form_again"] or 0) + again
            seen, closed = (traffic.distinct, traffic.bytes), (form.bytes, form.bytes + again)
            if seen != closed or form.flops != traffic.flops:
                raise RuntimeError(f"{name} at {shape}: counted {seen} bytes (distinct, all), the form says {closed}")

    for sizes in shapes:
        shape = " x ".join(map(str, sizes))
        for case in (our_kernels, liger_kernels, trl_kernels):
            try:
                with interpreted(launched):
                    case(*sizes)
            except ImportError as error:
                skipped[case.__name__.partition("_")[0]] = f"not installed: {error}"
    return list(found.values()), skipped


def our_kernels(T: int, H: int, V: int) -> None:
    """Each kernel of ours once: the head's passes and tiles, attention of one document of 8 T tokens."""
    import torch

    from longtrace.kernels.attention import cuda as attention
    from longtrace.kernels.head import triton_columns, triton_rows, triton_tile
    from longtrace.kernels.head.spec import Transform

    draw, plain = torch.Generator().manual_seed(0), Transform()
    h, w = (torch.randn(n, H, generator=draw).bfloat16() for n in (T, V))
    target, one = torch.arange(T) % V, torch.ones(T)
    logits = h.float() @ w.float().t()
    stats = triton_rows.softmax_stats(logits, target, None, plain, False)
    p = torch.empty(T, -(-V // 16) * 16, dtype=torch.bfloat16)[:, :V]
    triton_rows.dlogits(logits, target, None, plain, stats, one, None, p)
    triton_columns.column_max(p, one)
    triton_columns.compact(p, torch.arange(0, V, 3))
    stats = triton_tile.softmax_tiles(h, w, None, target, plain, True, True, p).stats
    triton_tile.gradient_tiles(h, w, None, target, plain, stats, one, 2 * one, p)
    q, k, v = (torch.randn(8 * T, heads, 64, generator=draw).bfloat16().requires_grad_() for heads in (2, 1, 1))
    ends = torch.tensor([0, 8 * T], dtype=torch.int32)
    attention.varlen_attention(q, k, v, ends, ends, True, 0.125, (-1, -1), None, None).sum().backward()


class Scalar(float):
    """A number with the cast that compiled kernels have on their scalars and interpreted ones lack."""

    def to(self, dtype) -> float:
        return self


def liger_kernels(T: int, H: int, V: int) -> None:
    """Liger's fused linear cross-entropy, its GRPO loss on whole logits, and its RMSNorm, forward and backward."""
    import torch
    import triton.language as tl
    from liger_kernel.ops import rms_norm
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
    from liger_kernel.ops.grpo_loss import GrpoLossFunction
    from liger_kernel.ops.rms_norm import LigerRMSNormFunction

    h, w = (torch.randn(n, H).bfloat16().requires_grad_() for n in (T, V))
    y = torch.arange(T) % V
    LigerFusedLinearCrossEntropyFunction.apply(h, w, y)[0].backward()
    logits = torch.randn(2, T + 1, V).bfloat16().requires_grad_()
    ids, advantages = torch.stack([y, y]), torch.tensor([1.0, -1.0])
    GrpoLossFunction.apply(logits, None, None, ids, advantages, None, 1.0, 0.0, 0.2, 0.2, True)[0].backward()
    weight = torch.ones(H).bfloat16().requires_grad_()
    before, rms_norm.rsqrt = rms_norm.rsqrt, lambda x: tl.rsqrt(x)  # libdevice's is machine code
    try:
        row = LigerRMSNormFunction.apply(h, weight, Scalar(1e-6), Scalar(0.0), "llama", False, True)
        row.sum().backward()
    finally:
        rms_norm.rsqrt = before


def trl_kernels(T: int, H: int, V: int) -> None:
    """TRL's chunked log-probs in two tiles of the vocabulary, as on a GPU: its kernels instead of their PyTorch twins."""
    import torch
    from trl.kernels import ChunkedLogProbFunction, chunked_logprob

    h, w = (torch.randn(n, H).bfloat16().requires_grad_() for n in (T, V))
    before, chunked_logprob._use_triton = chunked_logprob._use_triton, lambda device: True
    try:
        tile = -(-V // 2)
        ChunkedLogProbFunction.apply(h, w, None, torch.arange(T) % V, 1.0, tile, None, 1.0, ())[0].sum().backward()
    finally:
        chunked_logprob._use_triton = before


HEADS = {"known": "linear_weighted_nll", "unknown": "linear_log_prob", "compressed": "linear_weighted_nll"}


def ours(kind: str, small: dict[str, int] | None = None):
    """A costs.Head of our CUDA path at (T, H, V): run at the small shape with as many chunks, read off at the large one."""
    import torch

    from longtrace import kernels as K
    from longtrace.kernels.head import triton_tile

    from . import costs
    from .counting import Ledger

    plan = K.plan_chunks(T, H, V, torch.bfloat16, device="cuda")
    rows = min(plan.rows, 1024) if kind == "compressed" else plan.rows
    calls = -(-rows // plan.block)  # of a library product of ours in a chunk
    if T % rows:
        raise ValueError(f"T = {T} is no multiple of the {rows} rows of a chunk")
    chunks, kept = T // rows, round(KEPT * V)
    small = small or (SMALL_COMPRESSED if kind == "compressed" else SMALL)
    n, F, k = small["rows"], small.get("kept", small["rows"]), small.get("rank", 1)
    draw = torch.Generator().manual_seed(0)
    h = torch.randn(chunks * n, small["H"], generator=draw).bfloat16().requires_grad_()
    w = (0.02 * torch.randn(small["V"], small["H"], generator=draw)).bfloat16().requires_grad_()
    y = torch.arange(n).remainder(F).repeat(chunks) * 3 + 1  # F targets a chunk; nothing else exceeds eps
    c = torch.ones(chunks * n)
    ledger = Ledger()
    with cuda_path(n, n // calls, TOGETHER * k // RANK), ledger.recording(costs.OURS):
        if kind == "unknown":
            values = K.linear_log_prob(h, w, y)
            values.log_prob.backward(c)
        else:
            more = {"grad": "compressed", "eps": 0.9, "rank": round(k * 1024 / n), "target_error": 10.0}
            loss, values = K.linear_weighted_nll(h, w, y, c, **(more if kind == "compressed" else {}))
            loss.backward()
    if values.stats["chunks"] != chunks or values.stats.get("exact_chunks"):
        raise RuntimeError(f"the small run went another way: {values.stats}")
    sizes = {d: d for d in CONSTANTS}
    block = triton_tile.BLOCKS["aligned"]
    blocks = -(-V // block["BLOCK_V"])
    sizes |= {
        n: rows,
        n // calls: rows // calls,
        chunks * n: T,
        small["H"]: H,
        small["V"]: V,
        -(-small["V"] // block["BLOCK_V"]): blocks,
    }
    parts = 3 if kind == "compressed" else 2
    held = (2 * V + 4 * parts * blocks) * rows + 4 * (V + T) * H  # bf16 g, sums of its tiles; dW and dh in fp32
    tile = {"h": torch.empty(rows, H, device="meta"), "w": torch.empty(V, H, device="meta"), "bias": None, **block}
    again = costs.AGAIN["triton_tile.exp_kernel"](tile)
    again += costs.AGAIN["triton_tile.gradient_kernel"](tile | {"HAS_E": False}) if kind == "unknown" else 0
    if kind == "compressed":
        sampled = -(-(V - kept) // ((V - kept) // 4096))  # dropped rows of dW that an error is estimated on
        sizes |= {F: kept, k: RANK, small["V"] - F: sampled, n - 1: rows - 1}
        for together in {TOGETHER // RANK, chunks % (TOGETHER // RANK)} - {0}:  # tails of several chunks in one product
            sizes[together * k] = together * RANK
        pending = TOGETHER // RANK
        # kept columns of p and W, and dW's rows thrice; tails: fp32 sums twice, bf16 ones of several chunks, side by side
        held += 2 * rows * kept + 14 * kept * H + (8 + 4 * pending) * V * RANK
        again += costs.AGAIN["triton_columns.column_max_kernel"]({"R": rows, "V": V, "COLS": 128, "HAS_SCALE": True})
        again += 8 * (kept + sampled) * (rows - 1)  # column numbers, twice compacted
    # the targets of a chunk of the small run are as many as its columns kept, those of the large one at most its rows
    gathered = sizes | {F: rows}
    passes = [x.at(gathered if x.name == "triton_tile.target_kernel" else sizes) for x in ledger.passes]
    return costs.Head(passes, held, chunks * again, chunks)


TOGETHER = 256  # as in kernels/head/compressed.py


@contextmanager
def cuda_path(rows: int, block: int, together: int) -> Iterator[None]:
    """The head as on CUDA, on CPU tensors: the engine of bf16, chunks of `rows`, 16-bit products of `block`
    rows by out_dtype."""
    import torch

    from longtrace.kernels import backend
    from longtrace.kernels.head import compressed, engines, gemm
    from longtrace.kernels.head.plan import Chunks

    def narrow(self, weight, block):
        self.accumulate, self.block, self.narrow, self.fast = torch.float32, block, True, False
        self.weight = weight

    changes = [
        (backend, "FORCED", "triton"),
        (engines, "plan_chunks", lambda *_: Chunks(rows, block, 0, 0, 0.0)),
        (gemm.HeadGemm, "__init__", narrow),
        (compressed, "TOGETHER", together),
    ]
    before = [(owner, name, getattr(owner, name)) for owner, name, _ in changes]
    try:
        for owner, name, value in changes:
            setattr(owner, name, value)
        yield
    finally:
        for owner, name, value in before:
            setattr(owner, name, value)

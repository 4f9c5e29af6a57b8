"""Counted traffic: the counter on a kernel done by hand, closed forms against counts, whole ops, and what is concluded."""

from __future__ import annotations

import json
import os
import subprocess
import sys

import pytest

from longtrace.bench import costs, harness, traffic

pytest.importorskip("triton", reason="pip install triton (Linux)")

INTERPRETED = {"TRITON_INTERPRET": "1", "LONGTRACE_EXTENSION": "0"}

# 5 of 8 lanes, loaded twice and stored once; a dot of 16 x 16 x 16; one atomic on 3 of 4 lanes
BY_HAND = """
import json, sys, torch, triton, triton.language as tl
from longtrace.bench.counting import interpreted

@triton.jit
def by_hand(x, y, z, n, BLOCK: tl.constexpr):
    i = tl.arange(0, BLOCK)
    a = tl.load(x + i, mask=i < n, other=0.0)
    b = tl.load(x + i, mask=i < n, other=0.0)
    tl.store(y + i, a + b, mask=i < n)
    square = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    m = tl.load(z + square)
    tl.store(z + square, tl.dot(m, m, input_precision="ieee"))
    k = tl.arange(0, 4)
    tl.atomic_add(y + k, tl.full((4,), 1.0, tl.float32), mask=k < 3)

seen = []
with interpreted(lambda name, arguments, traffic: seen.append([name, arguments["n"], traffic.distinct])) as counts:
    for n in (5, 5):
        by_hand[(1,)](torch.ones(8), torch.zeros(8, dtype=torch.float32), torch.ones(16, 16), n, 8)
t = counts["__main__.by_hand"]
print(json.dumps([t.launches, t.loads, t.stores, t.distinct_loads, t.distinct_stores, t.flops, seen]))
from triton.runtime.interpreter import InterpreterBuilder
assert InterpreterBuilder.create_dot.__module__ == "triton.runtime.interpreter"  # the hooks are gone
"""


def script(code: str, **more) -> str:
    done = subprocess.run(
        [sys.executable, "-W", "ignore", "-"], input=code, capture_output=True, text=True, timeout=600,
        env=os.environ | INTERPRETED | {"OMP_NUM_THREADS": "1"}, **more,
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout


def test_a_kernel_counted_by_hand(tmp_path):
    file = tmp_path / "by_hand.py"  # triton reads a kernel's source from its file
    file.write_text(BY_HAND)
    done = subprocess.run(
        [sys.executable, "-W", "ignore", str(file)], capture_output=True, text=True, env=os.environ | INTERPRETED
    )
    assert done.returncode == 0, done.stderr[-3000:]
    launches, loads, stores, distinct_loads, distinct_stores, flops, seen = json.loads(done.stdout.splitlines()[-1])
    once = 5 * 4 + 16 * 16 * 4 + 3 * 4  # x, z, y by the atomic
    assert launches == 2 and flops == 2 * 2 * 16**3
    assert loads == 2 * (2 * 5 * 4 + 16 * 16 * 4 + 3 * 4) and distinct_loads == 2 * once
    assert stores == 2 * (5 * 4 + 16 * 16 * 4 + 3 * 4) and distinct_stores == 2 * (5 * 4 + 16 * 16 * 4)
    assert seen == [["__main__.by_hand", 5, (distinct_loads + distinct_stores) // 2]] * 2


def test_counting_needs_the_interpreter():
    code = "from longtrace.bench.counting import interpreted\nwith interpreted(): pass"
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True,
        env={k: v for k, v in os.environ.items() if k != "TRITON_INTERPRET"},
    )  # fmt: skip
    assert "set TRITON_INTERPRET=1" in done.stderr


@pytest.fixture(scope="module")
def counted():
    """Every kernel at every shape, held against its closed form as it is counted; and the table of heads."""
    return harness.in_process("longtrace.bench.traffic:count", {"quick": False}, threads=1, environment=INTERPRETED)


@pytest.mark.slow
def test_every_closed_form_equals_its_count_at_every_shape(counted):
    shapes = {" x ".join(map(str, shape)) for shape in traffic.SHAPES}
    for name in [*costs.OURS, *(k for k in costs.PEERS if not _skipped(k, counted))]:
        here = [row for row in counted["kernels"] if row["kernel"] == name]
        assert {row["shape"] for row in here} == shapes, name
        for row in here:
            assert row["form"] == row["distinct"] and row["form"] + row["form_again"] == row["loads"] + row["stores"], (
                row
            )


def _skipped(kernel: str, counted: dict) -> bool:
    peer = "trl" if kernel.startswith("chunked_logprob") else "liger"
    return peer in counted["skipped"]


@pytest.mark.slow
def test_dots_of_the_tiles(counted):
    """2 THV, and at the shape that fills its blocks only the block of tokens is padded."""
    T, H, V = traffic.SHAPES[-1]
    found = {r["kernel"]: r["flops"] for r in counted["kernels"] if r["shape"] == f"{T} x {H} x {V}"}
    for name in ("exp", "gradient"):
        assert found[f"triton_tile.{name}_kernel"] == 2 * 128 * H * V


def test_a_form_that_is_off_by_one_byte_is_refused():
    code = """
from dataclasses import replace
from longtrace.bench import costs, traffic
from longtrace.bench.counting import Operand
true = costs.OURS["triton_tile.exp_kernel"]
costs.OURS["triton_tile.exp_kernel"] = lambda a: replace(true(a), reads=(*true(a).reads, Operand((1,), 1)))
for run in (lambda: traffic.kernel_rows(traffic.SHAPES[:1]), lambda: traffic.ours("known")):
    try:
        run()
    except RuntimeError as error:
        print("refused", error)
"""
    assert script(code).count("refused triton_tile.exp_kernel") == 2


def test_every_closed_form_equals_its_count():
    """At one shape, and without the peers' imports; the slow tests take them all."""
    code = """
import json
from longtrace.bench import traffic
traffic.liger_kernels = traffic.trl_kernels = lambda *_: None
print(json.dumps(traffic.kernel_rows(traffic.SHAPES[1:2])[0]))
"""
    found = {row["kernel"]: row for row in json.loads(script(code).splitlines()[-1])}
    for name in costs.OURS:
        assert found[name]["form"] == found[name]["distinct"] > 0


@pytest.fixture(scope="module")
def heads():
    """Our heads counted from two small shapes, as totals."""
    code = """
import json
from longtrace.bench import traffic
others = {"known": {"rows": 10, "H": 27, "V": 370}, "unknown": {"rows": 14, "H": 25, "V": 381},
          "compressed": {"rows": 29, "H": 27, "V": 1000, "kept": 23, "rank": 6}}
found = {}
for kind, other in others.items():
    for name, small in (("first", None), ("second", other)):
        head = traffic.ours(kind, small)
        passes = [(x.name, x.flops, x.bytes) for x in head.passes]
        found[f"{kind} {name}"] = {"flops": head.flops, "bytes": head.bytes, "chunks": head.chunks, "passes": passes}
print(json.dumps(found))
"""
    return json.loads(script(code).splitlines()[-1])


@pytest.mark.slow
def test_two_small_shapes_say_the_same_of_the_large_one(heads):
    for kind in traffic.HEADS:
        first, second = (heads[f"{kind} {which}"]["passes"] for which in ("first", "second"))
        assert [x[:2] for x in first] == [x[:2] for x in second]
        for a, b in zip(first, second):  # one pass gathers k single numbers, k of the small shape
            assert a[2] == b[2] or (a[0] == "stack" and max(a[2], b[2]) < 1000), (kind, a, b)


@pytest.mark.slow
def test_products_of_our_heads_are_what_the_documents_say(heads):
    T, H, V, f, k = traffic.T, traffic.H, traffic.V, round(traffic.KEPT * traffic.V) / traffic.V, traffic.RANK
    unit = T * H * V
    large = {kind: sum(n for _, n, _ in heads[f"{kind} first"]["passes"] if n > 1e9) for kind in ("known", "unknown")}
    assert large == {"known": 6 * unit, "unknown": 8 * unit}
    compressed = heads["compressed first"]["flops"] / unit
    assert 2 + 4 * f + 4 * k / 1024 < compressed < 0.55 * 6, compressed


@pytest.mark.slow
def test_matrix_passes_of_the_exact_head_by_hand(heads):
    """Products, kernels and casts over (n, V), (V, H) and (n, H), n rows a chunk, written out; vectors are what is left."""
    T, H, V = traffic.T, traffic.H, traffic.V
    found = heads["known first"]
    c = found["chunks"]
    logits = (2 + 2 + 2) * T * V  # g written by its tile, dh, dW
    sums = (4 + 4) * 2 * T * -(-V // 128)  # the sum and the maximum of each tile's rows, written and read
    # W once a chunk and once a block of dh; dW written, and read but at first
    weights = c * (2 + 2 * 2) * V * H + (c * 4 + (c - 1) * 4) * V * H
    last = (4 + 2) * (V + T) * H  # times upstream, rounded
    # gathered (2 + 2), read for the target with its row of W (2 + 2), multiplied (2), dh out, scaled and put in place
    # (4, 4 + 4, 4 + 4), h scaled for dW (2 + 2, 2), and dh set to zero (4) once
    rows = (2 + 2 + 2 + 2 + 2 + 4 + 4 + 4 + 4 + 4 + 2 + 2 + 2 + 4) * T * H
    # the smallest matrix pass is 2 T H bytes: half of that is room for vectors, and for no pass forgotten
    assert 0 <= found["bytes"] - (logits + sums + weights + last + rows) < T * H


@pytest.mark.slow
def test_the_table_has_everyone_and_says_it_is_predicted(counted):
    rows = counted["heads"]
    shipped = [r for r in rows if r["group"] == "as shipped"]
    assert {r["impl"] for r in shipped} >= {
        "longtrace exact, known", "longtrace exact, unknown", "longtrace compressed, k = 64", "Liger", "CCE exact",
        "CCE filtered", "TRL", "QuACK", "torch chunked", "torch eager",
    }  # fmt: skip
    by_name = {r["impl"]: r for r in shipped}
    unit = traffic.T * traffic.H * traffic.V / 1e12
    for name, passes in (
        ("Liger", 6),
        ("torch eager", 6),
        ("torch chunked", 6),
        ("QuACK", 6),
        ("TRL", 8),
        ("CCE exact", 8),
    ):
        assert by_name[name]["tflops"] == pytest.approx(passes * unit), name
    assert by_name["CCE filtered"]["tflops"] == pytest.approx((4 + 4 * traffic.KEPT) * unit, rel=1e-4)
    assert by_name["Liger"]["chunks"] == 60 and by_name["torch chunked"]["chunks"] == 120
    for row in rows:
        for name, part in costs.PARTS.items():
            least = max(row["tflops"] / part.tflops, row["gbytes"] / part.gbytes) * 1e3
            assert row[f"{name}_ms"] >= least * (1 - 1e-9)
    ratios, lines = traffic.targets(rows)
    assert ratios["as shipped"]["exact_flops_vs_liger"] == pytest.approx(1.0, abs=1e-4)
    assert any(line.startswith("holds: as shipped: exact_bytes") for line in lines)
    assert any(line.startswith("holds: as shipped: compressed_flops") for line in lines)


def test_liger_closed_form_is_its_source():
    """Liger's own chunk rule, and its products and kernel as they pass by at a small shape."""
    if not harness.installed("liger_kernel"):
        pytest.skip("liger-kernel is not installed")
    code = """
import json, torch
from longtrace.bench import costs
from longtrace.bench.counting import Ledger
from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction
T, H, V = 64, 24, 300
h, w = (torch.randn(n, H).bfloat16().requires_grad_() for n in (T, V))
ledger = Ledger()
with ledger.recording(costs.PEERS):
    LigerFusedLinearCrossEntropyFunction.apply(h, w, torch.arange(T))[0].backward()
form = costs.liger(T, H, V)
kernel = "cross_entropy.liger_cross_entropy_kernel"
print(json.dumps([[sorted(x.flops for x in passes if x.dims) for passes in (ledger.passes, form.passes)],
                  [sum(x.bytes for x in passes if x.name == kernel) for passes in (ledger.passes, form.passes)],
                  [sum(x.name == kernel for x in ledger.passes), form.chunks]]))
"""
    for seen, closed in json.loads(script(code).splitlines()[-1]):
        assert seen == closed


def test_roofline_takes_the_longer_of_computing_and_moving():
    part = costs.Part(tflops=1.0, tflops_fp64=0.5, gbytes=1.0, source="")
    heavy = costs.product("computes", 1000, 1000, 1000)  # 2e9 FLOPs, 6e6 bytes: 2 ms and 6 ms
    assert costs.roofline_ms([heavy], part) == pytest.approx(6.0)
    fast = costs.Part(tflops=1.0, tflops_fp64=0.5, gbytes=1e3, source="")
    assert costs.roofline_ms([heavy], fast) == pytest.approx(2.0)
    assert costs.roofline_ms([heavy, heavy], fast) == pytest.approx(4.0)


@pytest.mark.slow
def test_the_committed_record_is_what_is_counted_now(counted):
    from longtrace.bench import gpu

    record = json.loads(gpu.PREDICTED.read_text())
    for now, then in zip(counted["heads"], record["rows"], strict=True):
        assert now == pytest.approx(then)

"""`longtrace bench advantages` and `bench blend`: their peers' formulas on pinned values, their records, refusals."""

from __future__ import annotations

import json
from concurrent.futures import ThreadPoolExecutor

import pytest
import torch

from longtrace.bench import BenchConfig, advantages, bench, blend
from longtrace.trainer.config import Refusal


def record(tmp_path, name, *inputs):
    path = tmp_path / f"{name}.json"
    bench(BenchConfig(name, quick=True, json=path, repeats=1, threads=torch.get_num_threads(), inputs=list(inputs)))
    assert path.with_suffix(".png").stat().st_size > 1000
    return json.loads(path.read_text())


def test_every_formula_on_two_rewards():
    groups = advantages.groups_of("equal:2x2")
    for name, make in advantages.IMPLS.items():
        if name == "Liger":
            assert "take advantages as an argument" in make(groups)
            continue
        found = make(groups)(torch.tensor([0.0, 1.0, 0.2, 0.4], dtype=torch.float64))
        added = 1e-6 if name.startswith("verl") else 1e-4
        expected = [-0.5 / (0.5**0.5 + added), 0.5 / (0.5**0.5 + added), -0.1 / (0.02**0.5 + added)]
        assert found[:3].tolist() == pytest.approx(expected, rel=1e-9), name


def test_advantages(tmp_path):
    found = record(tmp_path, "advantages", "equal:40x8", "ragged:30")
    rows = {(row["inputs"], row["impl"]): row for row in found["rows"]}
    assert {impl for case, impl in rows if case == "equal:40x8"} == set(advantages.IMPLS) - {"Liger"}
    assert (
        "Liger at equal:40x8" in found["skipped"]
        and "TRL at ragged:30" in found["skipped"]
        and ("ragged:30", "TRL") not in rows
    )
    assert all(row["ms"] > 0 and row["err"] < 1e-4 for row in rows.values())
    for case in ("equal:40x8", "ragged:30"):
        ours = rows[case, "longtrace"]
        assert ours["constant"] == 0 < rows[case, "verl"]["constant"]
        assert ours["err"] < 1e-7 and ours["close_err"] < 1e-7 < rows[case, "verl vectorised"]["close_err"]
    assert found["ratios"]["equal:40x8: TRL / longtrace"] > 0


def test_blend(tmp_path):
    found = record(tmp_path, "blend", "tensors:5x3000")
    rows = {(row["dtype"], row["impl"]): row for row in found["rows"]}
    copies = ("copy", "memcpy")
    assert {impl for _, impl in rows} == {*blend.IMPLS, *copies} and len(found["checks"]) == 4
    for dtype, unit in (("bf16", 2**-8), ("fp32", 2**-24)):
        ours, plain = rows[dtype, "longtrace"], rows[dtype, "torch lerp, no statistics"]
        assert ours["values"] == 15_000
        for copy in copies:
            assert rows[dtype, copy][f"of_{copy}"] == 1
            assert ours[f"of_{copy}"] == pytest.approx(ours["gb_per_s"] / rows[dtype, copy]["gb_per_s"])
        assert ours["gb_per_s"] == pytest.approx(3 * 15_000 * (2 if dtype == "bf16" else 4) / ours["ms"] / 1e6)
        assert ours["err"] < unit and ours["sums_err"] < 1e-6 and plain["sums_err"] is None
        assert all(row["err"] < 4 * unit for (kind, impl), row in rows.items() if kind == dtype and impl not in copies)


def test_memcpy_copies_every_byte():
    source, target = torch.arange(10_001, dtype=torch.int16), torch.zeros(10_001, dtype=torch.int16)
    before = torch.get_num_threads()
    try:
        torch.set_num_threads(3)
        with ThreadPoolExecutor(3) as pool:
            blend.memcpy(target, source, pool)
    finally:
        torch.set_num_threads(before)
    assert torch.equal(target, source)


def test_the_model_is_smollm2():
    assert sum(map(torch.Size.numel, blend.shapes_of("smollm2-135m"))) == 134_515_008


@pytest.mark.parametrize(
    "name, options, message",
    (
        ("advantages", {"inputs": ["equal:4"]}, "found equal:4; accepted: equal:GROUPSxSIZE"),
        ("advantages", {"inputs": ["ragged:0"]}, "found ragged:0"),
        ("advantages", {"impls": ["ours"]}, "--impls: found ours; accepted: longtrace, TRL"),
        ("blend", {"inputs": ["tensors:4"]}, "found tensors:4; accepted: smollm2-135m, tensors:COUNTxVALUES"),
        ("blend", {"impls": ["ours"]}, "--impls: found ours; accepted: longtrace, torch foreach"),
    ),
)
def test_what_cannot_be_measured_is_refused(name, options, message):
    with pytest.raises(Refusal, match=message.replace("(", r"\(")):
        bench(BenchConfig(name, quick=True, **options))

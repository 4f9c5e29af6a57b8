"""The Triton kernels compiled ahead of time, for GPUs this machine does not have: see longtrace.bench.compile_objects.

Held here: no spill, shared memory within the part, matrix instructions where a dot is, fp32 products in full, and nothing
worse than in the committed baseline of the same Triton.
"""

from __future__ import annotations

import dataclasses
import os

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)
triton = pytest.importorskip("triton", reason="triton is not installed: pip install 'longtrace[gpu]'")

from longtrace.bench import compile_cases, compile_matrix, compile_objects  # noqa: E402
from longtrace.kernels.attention import cuda, triton_backward, triton_forward  # noqa: E402
from longtrace.kernels.head import triton_columns, triton_rows, triton_tile  # noqa: E402

MODULES = (triton_rows, triton_columns, triton_tile, triton_forward, triton_backward)
PARTS = compile_cases.ARCHITECTURES
BASELINE = compile_matrix.read_baseline().get(f"triton {triton.__version__}", {})


def check(case):
    row = compile_objects.triton_row(case)
    assert not row["problem"], f"{case.name}: {row['problem']}"
    assert row["spills"] == 0 and row["registers"] > 0 and 0 < row["occupancy"] <= 1, row
    if case.name in BASELINE:
        worse = compile_matrix.regressions(row, BASELINE[case.name])
        assert not worse, f"{case.name}: {', '.join(worse)}"
    return row


def listed(cases):
    return pytest.mark.parametrize("case", list(cases), ids=lambda case: case.name)


# Families of parts differ in their sizes, so each gets its widest common case; sm_80 and sm_120 share theirs.
ATTENTION = [
    ("sm_90", "forward", "bf16", 128, 128),
    ("sm_90", "dk_dv", "bf16", 128, 128),
    ("sm_90", "dq", "bf16", 128, 128),
    ("sm_120", "dk_dv", "bf16", 128, 128),
    ("sm_120", "dk_dv", "bf16", 64, 64, "all"),
    ("sm_120", "dq", "fp32", 128, 128),
    ("sm_100", "forward", "bf16", 128, 128),
    ("gfx942", "forward", "bf16", 128, 128),
    ("sm_80", "delta", "bf16", 128, 128),
]


@listed(compile_cases.attention_case(*values) for values in ATTENTION)
def test_attention(case):
    check(case)


@listed(case for arch in ("sm_90", "gfx942") for case in compile_cases.head_cases(arch) if "fp16" not in case.config)
def test_head(case):
    row = check(case)
    if case.product and case.arch == "sm_90":  # the tiles are made for it
        assert row["instruction"] == "wgmma.mma_async", row


@pytest.mark.slow
@listed(case for arch in PARTS for case in compile_cases.everything(arch))
def test_everything(case):
    row = check(case)
    if case.product and case.kernel.startswith("tile"):
        assert row["instruction"] == compile_objects.MATRIX[case.arch][0], row


@pytest.mark.skipif(not BASELINE, reason="no baseline of this Triton")
@pytest.mark.parametrize(
    "change, said",
    [({"constants": {"BLOCK": 4096}}, "registers .* → "), ({"options": {"num_warps": 1}}, "spilled")],
    ids=["block", "warps"],
)
def test_a_regression_is_noticed(change, said):
    """A shipped size made worse, and compiled: more values a thread take more registers, or spill."""
    case = next(case for case in compile_cases.head_cases("sm_90") if case.kernel == "rows stats")
    worse = {field: getattr(case, field) | values for field, values in change.items()}
    with pytest.raises(AssertionError, match=said):
        check(dataclasses.replace(case, **worse))


def test_every_kernel_is_compiled():
    there = {x for m in MODULES for name, x in vars(m).items() if name.endswith("_kernel")}
    assert there == {case.function for case in compile_cases.shipped("sm_90")}
    assert {case.arch for arch in PARTS for case in compile_cases.shipped(arch)} == set(PARTS)


def test_no_size_or_hyper_parameter_is_a_constant():
    """A constant would recompile for each length, scale or window; so would specialising on a size being 1 or 16 n."""
    for case in compile_cases.shipped("sm_90"):
        constants = {x.name for x in case.function.params if x.is_constexpr}
        assert constants == set(case.constants), case.name
        assert all(
            x.isupper() and x.startswith(("HAS_", "BLOCK", "ROWS", "COLS", "PADDED", "ALIGNED")) for x in constants
        )
        special = {x.name for x in case.function.params if compile_cases.is_size(x.name) and not x.do_not_specialize}
        assert not special, f"{case.name}: {special}"


def test_offsets_within_a_block_fit_32_bits():
    """Rows of operands lie nearer than NEAR; a kernel that multiplies an int32 row by a stride has at most 128 of them."""
    rows = [
        value for arch in PARTS for case in compile_cases.shipped(arch) if case.kernel.startswith(("tile", "attention"))
        for key, value in case.constants.items() if key in ("BLOCK_M", "BLOCK_N", "BLOCK_T", "BLOCK_V")
    ]  # fmt: skip
    assert max(rows) == 128 and 128 * (triton_rows.NEAR - 1) < 2**31


def test_every_attention_size_that_ships_is_compiled():
    """The default widths reach each entry of SIZES on some part."""
    reached = {
        tuple(sorted(cuda.sizes(name, compile_cases.DTYPES[dtype], D, D, cap, arch).items()))
        for arch in PARTS for name in compile_cases.ATTENTION for dtype in ("bf16", "fp32") for D in (64, 128, 256)
        for cap in (False, True)
    }  # fmt: skip
    widths = lambda key: {"BLOCK_D": key[2], "BLOCK_DV": key[2]}  # noqa: E731
    shipped = {
        tuple(sorted((entry | widths(key)).items())) for key, row in cuda.SIZES.items() for entry in row.values()
    }
    assert shipped == reached


def test_sizes_are_found_for_every_width_and_part():
    for arch in (*PARTS, "sm_86", "sm_89", "sm_103", "gfx90a"):
        for kernel in compile_cases.ATTENTION:
            for dtype in compile_cases.DTYPES.values():
                for D in (8, 40, 64, 72, 96, 192, 256):
                    chosen = cuda.sizes(kernel, dtype, D, D, False, arch)
                    assert chosen["BLOCK_D"] >= D and chosen["BLOCK_D"] == triton.next_power_of_2(max(16, D))

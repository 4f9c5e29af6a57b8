"""The Triton head kernels compiled ahead of time, for GPUs this machine does not have.

Read from the compiled object: local memory (a spill), shared memory, and the matrix instructions of the dots.
"""

from __future__ import annotations

import functools
import os
import re
import subprocess
from pathlib import Path

import pytest

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)
triton = pytest.importorskip("triton", reason="triton is not installed: pip install 'longtrace[gpu]'")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from longtrace.kernels.head import triton_columns, triton_rows, triton_tile  # noqa: E402

SHARED_KB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
POINTERS = {
    "target": "i64", "columns": "i64", "order": "i64", "first": "i64", "dropped": "u8", "logits": "fp32",
} | dict.fromkeys(
    ("bias", "maximum", "log_sum", "log_prob", "entropy", "a", "b", "e", "s", "class_weight", "out", "parts", "scale",
     "weight", "d_bias"), "fp32",
)  # fmt: skip
SIZES = ("V", "H", "T", "R", "F", "span", "spans", "stride", "out_stride", "h_stride", "w_stride")
TILE = {"stats": triton_tile.stats_kernel, "dh": triton_tile.dh_kernel, "dw": triton_tile.dw_kernel}


def cases():
    """(name, kernel, {pointer: type}, shipped sizes, aligned) for every kernel and shipped configuration."""
    for name, config in triton_rows.BLOCKS.items():
        for out in ("fp32", "bf16", "fp16") if name == "dlogits" else ("fp32",):
            yield f"rows {name} {out}", getattr(triton_rows, f"{name}_kernel"), {"out": out}, config, True
    for name, config in triton_columns.BLOCKS.items():
        for p in ("fp32", "bf16", "fp16"):
            types = {"p": p, "out": p if name == "compact" else "fp32"}
            yield f"columns {name} {p}", getattr(triton_columns, f"{name}_kernel"), types, config, True
    yield "tile combine fp32", triton_tile.combine_kernel, {}, triton_tile.COMBINE, True
    for group, configs in triton_tile.BLOCKS.items():
        for p in ("fp32",) if "fp32" in group else ("bf16", "fp16"):
            for name, config in configs.items():
                yield f"tile {name} {p} {group}", TILE[name], {"h": p, "w": p}, config, "ragged" not in group


CASES = {name: values for name, *values in cases()}


@functools.cache
def compiled(name: str, arch: str, on: bool = True):
    """The object of case `name` for `arch`, with its optional inputs all there (`on`) or all absent."""
    kernel, types, config, aligned = CASES[name]
    types = {**POINTERS, **types}
    if "column_max" in name:
        types["scale"] = "fp32"
    signature, constants = {}, {}
    for argument in kernel.arg_names:
        if argument in config:
            constants[argument] = config[argument]
        elif argument.startswith("HAS_"):
            constants[argument] = on
        elif argument == "ALIGNED":
            constants[argument] = aligned
        elif argument in SIZES:
            signature[argument] = "i32"
        elif argument in types and not (argument == "scale" and "column_max" not in name):
            signature[argument] = "*" + types[argument]
        else:
            signature[argument] = "fp32"
    wide = {
        (i,): [["tt.divisibility", 16]] for i, x in enumerate(kernel.arg_names) if signature.get(x, "").startswith("*")
    }
    signature = {x: signature.get(x, "constexpr") for x in kernel.arg_names}
    constants = {(kernel.arg_names.index(x),): value for x, value in constants.items()}
    source = ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=wide)
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    return triton.compile(source, target=target, options={k: v for k, v in config.items() if not k.isupper()})


def resources(binary: bytes, folder: Path) -> dict[str, int]:
    """{"REG": registers a thread, "STACK": and "LOCAL": bytes of local memory a thread} of a cubin."""
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    text = subprocess.run([CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def check(name: str, arch: str, folder: Path, on: bool = True) -> None:
    built = compiled(name, arch, on)
    assert built.metadata.shared <= SHARED_KB[arch] * 1024, f"{built.metadata.shared} bytes of shared memory"
    dot, narrow = "tile " in name and "combine" not in name, "fp32" not in name
    if arch.startswith("gfx"):
        text = built.asm["amdgcn"]
        spilled = re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)
        assert spilled == ["0"], f"{spilled} spilled vector registers"
        assert not (dot and narrow) or "mfma" in text
        return
    used = resources(built.asm["cubin"], folder)
    assert used["STACK"] == used["LOCAL"] == 0, used
    ptx = built.asm["ptx"]
    assert "tf32" not in ptx
    if dot and narrow:
        wanted = {"sm_90": "wgmma.mma_async", "sm_100": "tcgen05.mma"}.get(arch, "mma.sync")
        assert wanted in ptx, f"no {wanted}"


def listed(names):
    return pytest.mark.parametrize("name", list(names))


QUICK = [name for name in CASES if "fp16" not in name]


@pytest.mark.parametrize("arch", ["sm_90", "gfx942"])
@listed(QUICK)
def test_compiles_without_spills(name, arch, tmp_path):
    check(name, arch, tmp_path)


@pytest.mark.slow
@pytest.mark.parametrize("on", [True, False], ids=["all inputs", "no options"])
@pytest.mark.parametrize("arch", list(SHARED_KB))
@listed(CASES)
def test_full_matrix(name, arch, on, tmp_path):
    check(name, arch, tmp_path, on)


def test_every_kernel_is_here():
    modules = (triton_rows, triton_columns, triton_tile)
    there = {x for m in modules for n, x in vars(m).items() if n.endswith("_kernel")}
    assert there == {kernel for kernel, *_ in CASES.values()}


def test_no_size_or_hyper_parameter_is_a_constant():
    """A constant would recompile for each length or temperature; so would specialising on a size being 1 or 16 n."""
    for kernel, _, config, _ in CASES.values():
        constants = {p.name for p in kernel.params if p.is_constexpr}
        assert constants <= set(config) | {x for x in constants if x.startswith("HAS_")} | {"ALIGNED"}, constants
        sizes = {p.name for p in kernel.params if p.name in SIZES and not p.do_not_specialize}
        assert not sizes, f"{kernel.fn.__name__}: {sizes}"

"""The Triton attention kernels compiled ahead of time, for GPUs this machine does not have.

Read from the compiled object: local memory (a spill), shared memory, and the matrix instructions of the dots.
"""

from __future__ import annotations

import os
import re
import subprocess
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("TRITON_INTERPRET=1: nothing is compiled", allow_module_level=True)
triton = pytest.importorskip("triton", reason="triton is not installed: pip install 'longtrace[gpu]'")

from triton.backends.compiler import GPUTarget  # noqa: E402
from triton.compiler import ASTSource  # noqa: E402

from longtrace.kernels.attention import cuda  # noqa: E402

SHARED_KB = {"sm_80": 163, "sm_90": 227, "sm_100": 227, "sm_120": 99, "gfx942": 64}
CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
DTYPES = {"bf16": torch.bfloat16, "fp16": torch.float16, "fp32": torch.float32}
KERNELS = {"forward": cuda.forward_kernel, "dk_dv": cuda.dk_dv_kernel, "dq": cuda.dq_kernel}
FEATURES = {  # what is on; PADDED follows from the head dims
    "full": (),
    "causal": ("HAS_RIGHT",),
    "window": ("HAS_LEFT", "HAS_RIGHT", "HAS_SINKS"),
    "all": ("HAS_LEFT", "HAS_RIGHT", "HAS_CAP", "HAS_SINKS"),
}
NUMBERS = {"documents", "steps", "T", "heads", "group", "D", "DV", "left", "right"}
REAL = {"inner", "outer", "scale"}
WIDE = {"stats", "delta", "sinks"}  # fp32 always


def compiled(kernel: str, arch: str, dtype: str, D: int, DV: int, features: str):
    """The object of one kernel with its shipped sizes."""
    if kernel == "delta":
        function, config = cuda.delta_kernel, {**cuda.DELTA, "BLOCK_DV": cuda.padded(DV)}
    else:
        function, config = (
            KERNELS[kernel],
            cuda.sizes(kernel, DTYPES[dtype], D, DV, "HAS_CAP" in FEATURES[features], arch),
        )
    signature, constants, wide = {}, {}, {}
    for i, argument in enumerate(function.arg_names):
        signature[argument] = "constexpr"
        if argument in config:
            constants[(i,)] = config[argument]
        elif argument.startswith("HAS_"):
            constants[(i,)] = argument in FEATURES[features]
        elif argument == "PADDED":
            constants[(i,)] = cuda._is_padded(D, DV)
        elif argument in NUMBERS or argument.endswith(("_stride", "_head")):
            signature[argument] = "i32"
        elif argument in REAL:
            signature[argument] = "fp32"
        else:
            offsets = argument.startswith("offsets")
            signature[argument] = "*" + ("i32" if offsets else "fp32" if argument in WIDE else dtype)
            wide[(i,)] = [["tt.divisibility", 16]]
    source = ASTSource(fn=function, signature=signature, constexprs=constants, attrs=wide)
    target = GPUTarget("hip", arch, 64) if arch.startswith("gfx") else GPUTarget("cuda", int(arch[3:]), 32)
    return triton.compile(source, target=target, options={k: v for k, v in config.items() if not k.isupper()})


def resources(binary: bytes, folder: Path) -> dict[str, int]:
    """{"REG": registers a thread, "STACK": and "LOCAL": bytes of local memory a thread} of a cubin."""
    path = folder / "kernel.cubin"
    path.write_bytes(binary)
    text = subprocess.run([CUOBJDUMP, "--dump-resource-usage", path], capture_output=True, text=True, check=True).stdout
    return {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}


def check(folder: Path, kernel: str, arch: str, dtype: str, D: int, DV: int, features: str) -> None:
    built = compiled(kernel, arch, dtype, D, DV, features)
    assert built.metadata.shared <= SHARED_KB[arch] * 1024, f"{built.metadata.shared} bytes of shared memory"
    product = kernel != "delta" and dtype != "fp32"
    if arch.startswith("gfx"):
        text = built.asm["amdgcn"]
        spilled = re.findall(r"\.vgpr_spill_count:\s+(\d+)", text)
        assert spilled == ["0"], f"{spilled} spilled vector registers"
        assert not product or "mfma" in text
        return
    used = resources(built.asm["cubin"], folder)
    assert used["STACK"] == used["LOCAL"] == 0, used
    ptx = built.asm["ptx"]
    assert "tf32" not in ptx
    if product:
        assert re.search(r"wgmma\.mma_async|tcgen05\.mma|mma\.sync", ptx), "no matrix instruction"


# Families differ in their sizes, so each gets its widest common case; sm_80 and sm_120 share theirs.
QUICK = [
    ("forward", "sm_90", "bf16", 128, 128, "causal"),
    ("dk_dv", "sm_90", "bf16", 128, 128, "causal"),
    ("dq", "sm_90", "bf16", 128, 128, "causal"),
    ("dk_dv", "sm_120", "bf16", 128, 128, "causal"),
    ("dk_dv", "sm_120", "bf16", 64, 64, "all"),
    ("dq", "sm_120", "fp32", 128, 128, "causal"),
    ("forward", "sm_100", "bf16", 128, 128, "causal"),
    ("forward", "gfx942", "bf16", 128, 128, "causal"),
    ("delta", "sm_80", "bf16", 128, 128, "full"),
]


@pytest.mark.parametrize("values", QUICK, ids=lambda x: " ".join(map(str, x)))
def test_compiles_without_spills(values, tmp_path):
    check(tmp_path, *values)


WIDTHS = ((64, 64), (96, 96), (128, 128), (128, 64), (256, 256))


@pytest.mark.slow
@pytest.mark.parametrize("features", list(FEATURES))
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("widths", WIDTHS, ids=str)
@pytest.mark.parametrize("kernel", list(KERNELS))
@pytest.mark.parametrize("arch", list(SHARED_KB))
def test_full_matrix(arch, kernel, widths, dtype, features, tmp_path):
    check(tmp_path, kernel, arch, dtype, *widths, features)


@pytest.mark.slow
@pytest.mark.parametrize("dtype", list(DTYPES))
@pytest.mark.parametrize("DV", (64, 96, 256))
@pytest.mark.parametrize("arch", list(SHARED_KB))
def test_delta(arch, DV, dtype, tmp_path):
    check(tmp_path, "delta", arch, dtype, DV, DV, "full")


def test_no_size_or_hyper_parameter_is_a_constant():
    """A constant would recompile for each length, scale or window; so would specialising on a size being 1 or 16 n."""
    for kernel in (*KERNELS.values(), cuda.delta_kernel):
        constants = {p.name for p in kernel.params if p.is_constexpr}
        assert all(x.isupper() and x.startswith(("HAS_", "BLOCK", "PADDED")) for x in constants), constants
        numbers = [p for p in kernel.params if p.name in NUMBERS or p.name.endswith(("_stride", "_head"))]
        assert numbers and all(p.do_not_specialize for p in numbers), kernel.fn.__name__


def test_sizes_are_found_for_every_width_and_part():
    for arch in (*SHARED_KB, "sm_86", "sm_89", "sm_103", "gfx90a"):
        for kernel in KERNELS:
            for dtype in DTYPES.values():
                for D in (8, 40, 64, 72, 96, 192, 256):
                    chosen = cuda.sizes(kernel, dtype, D, D, False, arch)
                    assert chosen["BLOCK_D"] >= D and chosen["BLOCK_D"] == triton.next_power_of_2(max(16, D))

"""Predicted occupancy against what NVIDIA and LLVM publish: worked examples, and their own calculators."""

from __future__ import annotations

import importlib.util
import os
import random
import re
import shutil
import subprocess
from pathlib import Path

import pytest

from longtrace.bench.occupancy import PARTS, occupancy, resident_blocks

CALCULATOR = """
#include <stdio.h>
#include "cuda_occupancy.h"

int main() {
  int major, threads_sm, shared_sm, shared_block, registers, shared, threads;
  while (scanf("%d %d %d %d %d %d %d", &major, &threads_sm, &shared_sm, &shared_block, &registers, &shared, &threads) == 7) {
    cudaOccDeviceProp part;
    part.computeMajor = major;
    part.maxThreadsPerBlock = 1024;
    part.maxThreadsPerMultiprocessor = threads_sm;
    part.regsPerBlock = part.regsPerMultiprocessor = 65536;
    part.warpSize = 32;
    part.sharedMemPerBlock = 48 * 1024;
    part.sharedMemPerMultiprocessor = shared_sm;
    part.numSms = 1;
    part.sharedMemPerBlockOptin = shared_block;
    part.reservedSharedMemPerBlock = 1024;
    cudaOccFuncAttributes kernel;
    kernel.maxThreadsPerBlock = 1024;
    kernel.numRegs = registers;
    kernel.shmemLimitConfig = FUNC_SHMEM_LIMIT_OPTIN;
    kernel.maxDynamicSharedSizeBytes = shared;
    kernel.numBlockBarriers = 1;
    cudaOccDeviceState state;
    cudaOccResult result;
    cudaOccError error = cudaOccMaxActiveBlocksPerMultiprocessor(&result, &part, &kernel, &state, threads, shared);
    printf("%d\\n", error ? -int(error) : result.activeBlocksPerMultiprocessor);
  }
}
"""


@pytest.mark.parametrize(
    "arch, registers, shared, warps, blocks, share, limit",
    [
        # CUDA C++ Best Practices Guide, "Calculating Occupancy": 7.0, whose limits of these kinds are 8.0's and 9.0's
        ("sm_80", 37, 0, 4, 12, 0.75, "registers"),
        ("sm_90", 37, 0, 10, 4, 0.625, "registers"),
        ("sm_90", 32, 0, 4, 16, 1.0, "warps"),
        # CUDA Programming Guide, on occupancy: blocks of one warp stop at 32 of them
        ("sm_100", 16, 0, 1, 32, 0.5, "blocks"),
        # what the tables say: half of 228 KB less a KB each; one byte more; all a block may have, and one byte more
        ("sm_90", 32, 113 * 1024, 8, 2, 0.25, "shared memory"),
        ("sm_90", 32, 113 * 1024 + 1, 8, 1, 0.125, "shared memory"),
        ("sm_120", 32, 99 * 1024, 8, 1, 1 / 6, "shared memory"),
        ("sm_120", 32, 99 * 1024 + 1, 8, 0, 0.0, "shared memory"),
        # AMD: 512 registers a lane and SIMD, 8 waves; 128 of them leave 4
        ("gfx942", 128, 0, 4, 4, 0.5, "registers"),
        ("gfx942", 505, 0, 4, 1, 0.125, "registers"),
        ("gfx942", 32, 32 * 1024, 4, 2, 0.25, "shared memory"),
    ],
)
def test_published_examples(arch, registers, shared, warps, blocks, share, limit):
    assert resident_blocks(PARTS[arch], registers, shared, warps) == (blocks, limit)
    assert occupancy(PARTS[arch], blocks, warps) == pytest.approx(share)


def test_tensor_memory_is_shared_by_the_blocks():
    assert resident_blocks(PARTS["sm_100"], 64, 0, 4, 256) == (2, "tensor memory")
    assert resident_blocks(PARTS["sm_100"], 64, 0, 4, 32)[1] != "tensor memory"


def test_nvidia_calculator_agrees(tmp_path, seed):
    """Random kernels through cuda_occupancy.h, which comes with Triton and with CUDA."""
    spec = importlib.util.find_spec("triton")
    folders = [Path(spec.origin).parent / "backends" / "nvidia" / "include"] if spec else []
    folders += [Path(nvcc).resolve().parents[1] / "include" for nvcc in [shutil.which("nvcc")] if nvcc]
    folders = [folder for folder in folders if (folder / "cuda_occupancy.h").is_file()]
    compiler = shutil.which(os.environ.get("CXX", "c++"))
    if not folders or not compiler:
        pytest.skip("no cuda_occupancy.h, or no C++ compiler to build it with")
    source = tmp_path / "calculator.cpp"
    source.write_text(CALCULATOR)
    program = tmp_path / "calculator"
    subprocess.run([compiler, "-w", "-I", folders[0], source, "-o", program], check=True)
    draw = random.Random(seed)
    kernels = []
    for arch in ("sm_80", "sm_90", "sm_100", "sm_120"):
        for _ in range(500):
            shared = draw.choice([0, draw.randrange(4096), draw.randrange(PARTS[arch].shared_block + 1)])
            kernels.append((arch, draw.randint(1, 255), shared, draw.choice([1, 2, 4, 5, 8, 10, 16])))
    lines = [
        f"{int(arch[3:]) // 10} {32 * PARTS[arch].warps} {PARTS[arch].shared} {PARTS[arch].shared_block} {registers} {shared} {32 * warps}"
        for arch, registers, shared, warps in kernels
    ]
    text = subprocess.run([program], input="\n".join(lines), capture_output=True, text=True, check=True).stdout
    theirs = [int(line) for line in text.split()]
    ours = [resident_blocks(PARTS[arch], *kernel)[0] for arch, *kernel in kernels]
    assert len(theirs) == len(ours) == 2000
    wrong = [(kernel, a, b) for kernel, a, b in zip(kernels, ours, theirs) if a != b]
    assert not wrong, f"seed {seed}: {len(wrong)}, first {wrong[:3]}"


def test_llvm_agrees():
    """The "; Occupancy:" LLVM prints for gfx942: waves of a SIMD, as far as registers go."""
    pytest.importorskip("triton", reason="triton is not installed: pip install 'longtrace[gpu]'")
    if os.environ.get("TRITON_INTERPRET") == "1":
        pytest.skip("TRITON_INTERPRET=1: nothing is compiled")
    from longtrace.bench import compile_cases, compile_objects

    cases = [
        compile_cases.attention_case("gfx942", "forward", "bf16", 128, 128),
        *(case for case in compile_cases.head_cases("gfx942") if case.config.startswith(("fp32,", "bf16 narrow"))),
    ]
    seen = set()
    for case in cases:
        built = compile_objects.compile_triton(case)
        waves = int(re.search(r"; Occupancy: (\d+)", built.asm["amdgcn"])[1])
        registers, scalars, _ = compile_objects.amd_resources(built.asm["amdgcn"])
        assert resident_blocks(PARTS["gfx942"], registers, 0, 4, scalars=scalars)[0] == waves, case.name
        seen.add(waves)
    assert len(seen) > 1

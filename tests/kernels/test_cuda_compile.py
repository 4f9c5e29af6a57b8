"""The CUDA C++ kernels compiled by nvcc for GPUs this machine does not have: registers, no spills, no local memory."""

from __future__ import annotations

import re
import shutil
import subprocess

import cuda_host_cases as host
import pytest

NVCC = shutil.which("nvcc")
ARCHITECTURES = ("sm_80", "sm_90", "sm_100", "sm_120")
KERNEL_COUNT = {"advantages": 1, "blend": 2, "pack": 6}
pytestmark = pytest.mark.skipif(not NVCC, reason="nvcc is not installed")


def resources(kernel: str, arch: str, folder) -> list[dict[str, int]]:
    """registers, stack, stores and loads of spills of each kernel of a source, as ptxas reports them."""
    known = subprocess.run([NVCC, "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    if arch not in known:
        pytest.skip(f"this nvcc does not know {arch}")
    source, out = host.SOURCES / f"{kernel}.cu", folder / "kernel.cubin"
    command = [
        NVCC,
        "-O3",
        "-std=c++17",
        "-Werror=all-warnings",
        "-Xptxas=-v",
        f"-arch={arch}",
        "-cubin",
        "-o",
        out,
        source,
    ]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    pattern = r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads\s+ptxas info\s+: Used (\d+) registers"
    return [dict(zip(("stack", "stores", "loads", "registers"), map(int, m))) for m in re.findall(pattern, done.stderr)]


@pytest.mark.parametrize("arch", ARCHITECTURES)
@pytest.mark.parametrize("kernel", host.KERNELS)
def test_compiles_without_spills(kernel, arch, tmp_path):
    found = resources(kernel, arch, tmp_path)
    print(kernel, arch, found)
    assert len(found) == KERNEL_COUNT[kernel], found
    for used in found:
        assert used["stack"] == used["stores"] == used["loads"] == 0, used
        assert used["registers"] <= 64, used  # half the threads of an SM or more

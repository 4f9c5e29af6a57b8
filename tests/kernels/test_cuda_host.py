"""The CUDA C++ kernels, run on the host under ASan and UBSan in random thread orders; and faults planted in them are found."""

from __future__ import annotations

import cuda_host_cases as host
import pytest

from longtrace.kernels import cuda

pytestmark = pytest.mark.skipif(bool(host.missing()), reason=host.missing())


@pytest.fixture(scope="module")
def libraries(tmp_path_factory):
    """kernel -> its library for the host, built once."""
    folder, made = tmp_path_factory.mktemp("cuda_host"), {}
    return lambda kernel: made[kernel] if kernel in made else made.setdefault(kernel, host.build(kernel, folder))


@pytest.mark.parametrize("kernel", host.KERNELS)
def test_against_the_reference_in_any_thread_order(libraries, kernel, seed):
    assert host.failures(libraries(kernel), host.cases(kernel, seed), seed) == []


def test_every_source_is_here():
    assert sorted(path.stem for path in host.SOURCES.glob("*.cu")) == sorted(host.KERNELS)


FAULTS = {  # name: (kernel, text of the source, what stands there instead)
    "advantages: no barrier before the counts": (
        "advantages", "block_counts[threadIdx.x] = 0;\n  __syncthreads();", "block_counts[threadIdx.x] = 0;"),
    "advantages: no barrier after the counts": (
        "advantages", "  __syncthreads();\n  if (threadIdx.x < 4) atomicAdd(&counts", "  if (threadIdx.x < 4) atomicAdd(&counts"),
    "advantages: barrier inside a branch": (
        "advantages", "    if (lane == 0) {\n", "    if (lane == 0) {\n      __syncthreads();\n"),
    "advantages: statistics one reward too far": ("advantages", "for (int64_t i = lane; i < size; i += kWarp) {\n      const float r = rewards[begin + i], x", "for (int64_t i = lane; i <= size; i += kWarp) {\n      const float r = rewards[begin + i], x"),
    "advantages: int32 offset": ("advantages", "const int64_t begin = offsets[group], size", "const int begin = int(offsets[group]); const int64_t size"),
    "advantages: a lane's half left out": ("advantages", "for (int step = kWarp / 2; step; step /= 2) {", "for (int step = kWarp / 4; step; step /= 2) {"),
    "advantages: unscored rewards counted": ("advantages", "if (!isfinite(r)) continue;", ""),
    "blend: no barrier in the block's sum": ("blend", "  __syncthreads();\n", ""),
    "blend: mask off by one": ("blend", "      if (i < left) line[i] = p[i];", "      if (i <= left) line[i] = p[i];"),
    "blend: store mask off by one": ("blend", "      if (i < left) p[i] = line[i];", "      if (i <= left) p[i] = line[i];"),
    "blend: int32 offset": ("blend", "const int64_t begin = (chunk - p.first_chunk) * kChunk;", "const int begin = int((chunk - p.first_chunk) * kChunk);"),
    "blend: no mask on the last chunk": ("blend", "begin + kChunk < p.n ? begin + kChunk : p.n", "begin + kChunk"),
    "blend: vector loads of unaligned tensors": ("blend", "% sizeof(uint4) == 0;", "% sizeof(uint4) < 16;"),
    "blend: tensors of one chunk swapped": ("blend", "pairs[middle].first_chunk <= chunk", "pairs[middle].first_chunk < chunk"),
    "pack: strides swapped": ("pack", "low * document_stride + (row - offsets[low]) * row_stride", "low * row_stride + (row - offsets[low]) * document_stride"),
    "pack: int32 offset": ("pack", "padded + low * document_stride", "padded + int(low) * int(document_stride)"),
    "pack: rows past the last": ("pack", "if (row >= rows) return;", "if (row > rows) return;"),
    "unpack: mask off by one": ("pack", "row < offsets[document + 1] - offsets[document];", "row <= offsets[document + 1] - offsets[document];"),
    "unpack: int32 offset": ("pack", "padded + document * document_stride", "padded + int(document) * int(document_stride)"),
    "unpack: strides swapped": ("pack", "padded + document * document_stride + row * row_stride", "padded + document * row_stride + row * document_stride"),
}  # fmt: skip
QUICK = (
    "blend: no barrier in the block's sum", "blend: mask off by one", "blend: int32 offset",
    "blend: no mask on the last chunk", "pack: strides swapped",
)  # fmt: skip


@pytest.mark.parametrize("fault", [pytest.param(f, marks=() if f in QUICK else pytest.mark.slow) for f in FAULTS])
def test_a_planted_fault_is_found(fault, seed, tmp_path):
    kernel, before, after = FAULTS[fault]
    text = (host.SOURCES / f"{kernel}.cu").read_text()
    assert text.count(before) == 1, "the fault's place is not in the source, or not alone"
    changed = tmp_path / f"{kernel}.cu"
    changed.write_text(text.replace(before, after))
    found = host.failures(host.build(kernel, tmp_path, changed), host.cases(kernel, seed), seed)
    print(f"{fault}: {found[0] if found else 'not found'}")
    assert found


HOST_CHECKS = {  # what the host run itself refuses: a kernel's body, and what the error says
    "if (threadIdx.x < 40) return; __syncthreads();": "40 of 64 threads have left",
    "if (threadIdx.x % 2) __syncthreads(); else\n__syncthreads();": "__syncthreads of line 7; __syncthreads of line 6",
    "if (threadIdx.x % 32) __shfl_sync(0xffffffffu, 1, 0); else __syncthreads();": "cannot go on",
    "__shfl_sync(1u << threadIdx.x % 32, 1, 3);": "reads a lane outside the mask",
    "if (threadIdx.x < 40) __ballot_sync(0xffu, true);": "the mask leaves this lane out",
    "__shfl_down_sync(threadIdx.x % 32 < 8 ? 0xffffffffu : 0xfffffffeu, 1, 1);": "masks",
}


@pytest.mark.slow
@pytest.mark.parametrize("body", HOST_CHECKS)
def test_the_host_run_reports_what_does_not_meet(body, seed, tmp_path):
    source = tmp_path / "probe.cu"
    source.write_text(
        f"""#include "launch.h"
#include "longtrace_cuda.h"

__global__ void kernel(int) {{
  // the next lines are 6 and 7
  {body}
}}
LONGTRACE_EXPORT int probe(int x, void* stream) {{ return longtrace::launch(kernel, 2, 64, stream, x); }}
"""
    )
    case = host.Case("probe", "probe", {}, [0, 0], "ip", lambda result: None, {})
    found = host.failures(host.build("probe", tmp_path, source), [case], seed)
    assert len(found) == host.SEEDS and all(HOST_CHECKS[body] in line for line in found), found


def test_the_python_side_agrees_with_the_header():
    """Names and numbers of arguments of every function in the header are those that kernels/cuda.py declares."""
    header = (host.SOURCES / "longtrace_cuda.h").read_text().split("LONGTRACE_EXPORT")[2:]
    declared = {}
    for text in header:
        name, arguments = text.split(";")[0].split("(", 1)
        words = [a.strip() for a in arguments.rsplit(")", 1)[0].split(",") if a.strip()]
        kinds = [
            cuda.POINTER if "*" in w else {"int64_t": cuda.INT64, "int": cuda.INT, "float": cuda.FLOAT}[w.split()[0]]
            for w in words
        ]
        declared[name.split()[-1]] = kinds
    assert declared == cuda.SIGNATURES


def test_the_chunk_is_the_librarys(libraries, seed):
    case = host.Case("chunk", "longtrace_blend_chunk", {}, [], "", lambda result: None, {})
    found = host.failures(libraries("blend"), [case], seed)  # the number in place of a status
    assert {line.split(": ")[1] for line in found} == {str(host.CHUNK)}

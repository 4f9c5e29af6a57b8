"""Compile one kernel for a GPU that is not there, and read its object: registers, spills, shared memory, instructions.

Triton through its own compiler and cache; CUDA C++ through nvcc. A row of numbers comes back, and what is wrong with it.
"""

from __future__ import annotations

import functools
import re
import shutil
import subprocess
import tempfile
import time
from pathlib import Path

import triton
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource

from .compile_cases import Case
from .occupancy import PARTS, occupancy, resident_blocks

CUOBJDUMP = Path(triton.__file__).parent / "backends" / "nvidia" / "bin" / "cuobjdump"
MATRIX = {  # what a dot should become, by part, the best first
    "sm_80": ("mma.sync",),
    "sm_90": ("wgmma.mma_async", "mma.sync"),
    "sm_100": ("tcgen05.mma", "mma.sync"),
    "sm_120": ("mma.sync",),
    "gfx942": ("v_mfma",),
}
REDUCED = re.compile(r"tf32|xf32")  # fp32 products in fewer bits


def compile_triton(case: Case):
    """The object of a case, from Triton's cache if it is there; triton.compile's exceptions pass."""
    position = {argument: (i,) for i, argument in enumerate(case.function.arg_names)}
    source = ASTSource(
        fn=case.function,
        signature=case.signature,
        constexprs={position[x]: value for x, value in case.constants.items()},
        attrs={position[x]: [["tt.divisibility", 16]] for x, kind in case.signature.items() if kind.startswith("*")},
    )
    amd = case.arch.startswith("gfx")
    target = GPUTarget("hip", case.arch, 64) if amd else GPUTarget("cuda", int(case.arch[3:]), 32)
    return triton.compile(source, target=target, options=case.options)


def triton_row(case: Case) -> dict:
    """What the object of a case needs: flat, for a record. Never raises: a failed compile is a row with its `problem`.

    registers and spills (bytes; AMD: registers) are per thread, shared_bytes per block; compile_s is None for an object
    that was in the cache.
    """
    row = {"kernel": case.kernel, "config": case.config, "arch": case.arch, "compiler": f"triton {triton.__version__}"}
    seconds = []

    def listen(*, times, cache_hit, **_):
        seconds.append(None if cache_hit else times.total / 1e6)

    triton.knobs.compilation.listener = listen
    try:
        built = compile_triton(case)
    except Exception as error:
        return row | {"problem": f"does not compile: {type(error).__name__}: {(str(error).splitlines() or [''])[-1]}"}
    finally:
        triton.knobs.compilation.listener = None
    if case.arch.startswith("gfx"):
        text = built.asm["amdgcn"]
        registers, scalars, scratch = amd_resources(text)
        spills = int(re.search(r"\.vgpr_spill_count:\s+(\d+)", text)[1]) + scratch
        extra, shared = {"scalars": scalars}, built.metadata.shared
    else:
        text = built.asm["ptx"]
        registers, spills = cubin_resources(built.asm["cubin"])
        extra, shared = {"tensor_columns": built.metadata.tmem_size or 0}, built.metadata.shared
    row |= {"compile_s": seconds[0] if seconds else None}
    return finish(row, text, registers, spills, shared, built.metadata.num_warps, case.product, **extra)


def amd_resources(text: str) -> tuple[int, int, int]:
    """(vector registers a lane, of both kinds, scalar registers a wave, bytes of scratch a lane) of AMD assembly."""
    return tuple(
        int(re.search(rf"; {key}: (\d+)", text)[1]) for key in ("TotalNumVgprs", "TotalNumSgprs", "ScratchSize")
    )


def cubin_resources(cubin: bytes) -> tuple[int, int]:
    """(registers a thread, bytes of local memory a thread) of a cubin's one kernel.

    Its SHARED is left alone: Triton has no static shared memory, and from sm_90 on it is what the system reserves.
    """
    with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
        file.write(cubin)
        file.flush()
        command = [CUOBJDUMP, "--dump-resource-usage", file.name]
        text = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    used = {key: int(value) for key, value in re.findall(r"\b(REG|STACK|LOCAL):(\d+)", text)}
    return used["REG"], used["STACK"] + used["LOCAL"]


def finish(row, text: str, registers: int, spills: int, shared: int, warps: int, product: bool, **more: int) -> dict:
    """`row` with its numbers, the occupancy they (and `more`, of `resident_blocks`) allow, and `problem`: "" or what
    must not be."""
    arch = row["arch"]
    part = PARTS[arch]
    blocks, limit = resident_blocks(part, registers, shared, warps, **more)
    found = next((x for x in MATRIX[arch] if x in text), "")
    problems = []
    if spills:
        problems.append(f"{spills} spilled")
    if shared > part.shared_block:
        problems.append(f"{shared} bytes of shared memory, {arch} has {part.shared_block}")
    if product and not found:
        problems.append(f"a dot without {' or '.join(MATRIX[arch])}")
    if reduced := REDUCED.search(text):
        problems.append(f"products in {reduced[0]}")
    return row | {
        "registers": registers,
        "spills": spills,
        "shared_bytes": shared,
        "warps": warps,
        "occupancy": round(occupancy(part, blocks, warps), 4),
        "limited_by": limit,
        "instruction": found,
        "problem": "; ".join(problems),
    }


# ----------------------------------------------------------------------------------------------------------------------
# CUDA C++

CUDA_SOURCES = Path(__file__).resolve().parents[1] / "csrc" / "cuda"
THREADS = 256  # of a block, for a kernel without __launch_bounds__


@functools.cache
def nvcc_version() -> str:
    """Of the nvcc on PATH, "13.0"; "" where there is none."""
    if not shutil.which("nvcc"):
        return ""
    text = subprocess.run(["nvcc", "--version"], capture_output=True, text=True, check=True).stdout
    return re.search(r"release ([\d.]+)", text)[1]


def nvcc_rows(source: Path, arch: str) -> list[dict]:
    """A row, as of `triton_row`, for each kernel of a .cu file, with what ptxas says of it; never raises.

    A block is what the kernel's __launch_bounds__ allow (THREADS without them); all kernels share the file's seconds.
    """
    row = {"kernel": f"cuda {source.stem}", "config": "", "arch": arch, "compiler": f"nvcc {nvcc_version()}"}
    began = time.perf_counter()
    with tempfile.TemporaryDirectory() as folder:
        command = ["nvcc", f"-arch={arch}", "-O3", "-std=c++17", "-I", source.parent, "-Xptxas", "-v", "-keep"]
        command += ["-keep-dir", folder, "-cubin", "-o", f"{folder}/{source.stem}.cubin", source]
        done = subprocess.run(command, capture_output=True, text=True)
        if done.returncode:
            lines = [line for line in done.stderr.splitlines() if "error" in line] or ["?"]
            return [row | {"problem": f"does not compile: {lines[0]}"}]
        ptx = (Path(folder) / f"{source.stem}.ptx").read_text()
    seconds = time.perf_counter() - began
    threads = {
        name: int(bound) for name, bound in re.findall(r"\.entry (\w+)\([^)]*\)\s*\.maxntid (\d+)", ptx)
    }  # fmt: skip
    return sorted(
        (
            finish(row | {"config": demangled(name)}, ptx, *numbers, threads.get(name, THREADS) // 32, False)
            | {"compile_s": seconds}
            for name, *numbers in ptxas_usage(done.stderr)
        ),
        key=lambda found: found["config"],
    )


def ptxas_usage(text: str) -> list[tuple[str, int, int, int]]:
    """[(kernel, registers a thread, bytes spilled or on the stack, bytes of shared memory)] of what ptxas -v printed."""
    found = []
    for part in re.split(r"Compiling entry function ", text)[1:]:
        name = re.match(r"'([^']+)'", part)[1]
        stack, stores, loads = map(
            int, re.search(r"(\d+) bytes stack frame, (\d+) bytes spill stores, (\d+) bytes spill loads", part).groups()
        )
        registers = int(re.search(r"Used (\d+) registers", part)[1])
        shared = re.search(r"(\d+) bytes smem", part)
        found.append((name, registers, max(stack, stores + loads), int(shared[1]) if shared else 0))
    return sorted(found)


def demangled(name: str) -> str:
    """A kernel's name and template arguments as C++ has them; as they are where no tool is there."""
    if not name.startswith("_Z") or not (tool := shutil.which("cu++filt") or shutil.which("c++filt")):
        return name
    text = subprocess.run([tool, name], capture_output=True, text=True).stdout.strip() or name
    return re.sub(r"^void |\(.*\)$", "", text.replace("(anonymous namespace)::", ""))

"""Builds the extensions where it can: `longtrace.kernels._C` (torch ops, stable ABI), `_pack` (pybind11), `_cuda` (nvcc).

All are optional. Without torch in the build environment (pip's build isolation), without a compiler, or with
LONGTRACE_BUILD=0, the install is pure Python. Everything else about the package is in pyproject.toml.
"""

import os
import platform
import shutil
import subprocess
import sys
from pathlib import Path

from setuptools import Extension, setup
from setuptools.command.build_ext import build_ext
from setuptools.modified import newer_group

AVX2 = ["-mavx2", "-mfma"]
AVX512 = ["-mavx512f", "-mavx512bw", "-mavx512dq", "-mavx512vl", "-mfma", "-mprefer-vector-width=512"]
AVX512_BF16 = [*AVX512, "-mavx512bf16"]
UNITS = {  # one instruction set each, chosen at run time; never -march=native
    "baseline": [],
    "avx2": AVX2,
    "avx512": AVX512,
    "avx512_bf16": AVX512_BF16,
    "amx": [*AVX512_BF16, "-mamx-tile", "-mamx-bf16"],
}
KINDS = {  # of units, and the instruction sets that each has one for
    "tile": list(UNITS),
    "layers": [unit for unit in UNITS if unit != "amx"],  # no products in them
    "blend": ["baseline", "avx2", "avx512"],  # its bf16 keeps subnormals
    "decode": ["baseline", "avx2", "avx512"],  # memory sets its pace
}
FLAGS = {f"csrc/cpu/{kind}_{unit}.cpp": UNITS[unit] for kind, units in KINDS.items() for unit in units}
COMMON = [
    "-O3",
    "-g0",
    "-std=c++17",
    "-fvisibility=hidden",
    "-Wall",
    "-Wno-psabi",
    "-Wno-maybe-uninitialized",
]  # the last: GCC bug 105593

CUDA = "longtrace.kernels._cuda"
ARCHITECTURES = ("80", "90", "100", "120")  # Ampere, Hopper, Blackwell: those of them that nvcc knows
NVCC_FLAGS = ["-O3", "-std=c++17", "-Xcompiler=-fPIC,-fvisibility=hidden,-Wall"]


def extensions() -> list[Extension]:
    if os.environ.get("LONGTRACE_BUILD", "1") == "0":
        return skip("LONGTRACE_BUILD=0")
    if sys.platform != "linux" or platform.machine() not in ("x86_64", "aarch64"):
        return skip(f"extensions are built on Linux x86-64 and arm64, this is {sys.platform} {platform.machine()}")
    try:
        from torch.utils.cpp_extension import include_paths, library_paths
    except Exception as error:  # not there, or there and broken
        return skip(f"no torch in the build environment ({error}); pip install --no-build-isolation builds them")
    units = list(UNITS) if platform.machine() == "x86_64" else ["baseline"]
    found = [
        Extension(
            "longtrace.kernels._C",
            [
                "csrc/head_ops.cpp",
                "csrc/attention_ops.cpp",
                "csrc/cpu/attention.cpp",
                "csrc/layer_ops.cpp",
                "csrc/linear_ops.cpp",
                "csrc/cpu/head.cpp",
                "csrc/cpu/layers.cpp",
                "csrc/cpu/tile.cpp",
                "csrc/advantage_ops.cpp",
                "csrc/blend_ops.cpp",
                "csrc/cpu/blend.cpp",
                "csrc/cpu/decode.cpp",
                *(f"csrc/cpu/{kind}_{unit}.cpp" for kind, some in KINDS.items() for unit in units if unit in some),
            ],
            depends=[str(path) for pattern in ("*.h", "*.inc") for path in Path("csrc").rglob(pattern)],
            include_dirs=include_paths(),
            library_dirs=library_paths(),
            libraries=["torch_cpu", "gcc"],  # libgcc.a: fp16 conversions that libgcc_s has only from GCC 12 on
            define_macros=[("TORCH_TARGET_VERSION", "0x020b000000000000"), ("Py_LIMITED_API", "0x030a0000")],
            extra_compile_args=COMMON,
            py_limited_api=True,
            optional=True,
        )
    ]
    try:
        import pybind11

        found.append(
            Extension(
                "longtrace.kernels._pack",
                ["csrc/pack.cpp"],
                include_dirs=[pybind11.get_include()],
                extra_compile_args=COMMON,
                optional=True,
            )
        )
    except ImportError as error:
        skip(f"_pack: {error}")
    if nvcc():
        sources, headers = (sorted(map(str, Path("csrc/cuda").glob(f"*.{kind}"))) for kind in ("cu", "h"))
        found.append(Extension(CUDA, sources, depends=headers, py_limited_api=True, optional=True))
    return found


def nvcc() -> str | None:
    home = os.environ.get("CUDA_HOME")
    return shutil.which(f"{home}/bin/nvcc" if home else "nvcc")


def build_cuda(sources: list[str], out: Path) -> None:
    """A shared library with a C interface: no torch, the CUDA runtime inside, code for each architecture and PTX for later ones."""
    known = subprocess.run([nvcc(), "--list-gpu-code"], capture_output=True, text=True, check=True).stdout.split()
    some = [a for a in ARCHITECTURES if f"sm_{a}" in known]
    code = [f"-gencode=arch=compute_{a},code=sm_{a}" for a in some] + [
        f"-gencode=arch=compute_{some[-1]},code=compute_{some[-1]}"
    ]
    host = ["-ccbin", os.environ["CXX"]] if os.environ.get("CXX") else []
    out.parent.mkdir(parents=True, exist_ok=True)
    subprocess.run([nvcc(), *NVCC_FLAGS, *code, *host, "--threads=0", "-shared", "-o", str(out), *sources], check=True)


def skip(why: str) -> list[Extension]:
    print(f"longtrace: pure Python kernels: {why}", file=sys.stderr)
    return []


class OptionalBuild(build_ext):
    """Compiles with per-file flags; an extension that fails to build is left out with one line."""

    def build_extension(self, ext: Extension) -> None:
        compile_all = self.compiler.compile
        try:
            if ext.name == CUDA:
                out = self.get_ext_fullpath(ext.name)
                if self.force or newer_group([*ext.sources, *ext.depends], out):
                    build_cuda(ext.sources, Path(out))
                return

            def compile_each(sources, extra_postargs=None, **options):
                objects = []
                for source in sources:
                    objects += compile_all(
                        [source], extra_postargs=[*(extra_postargs or []), *FLAGS.get(source, [])], **options
                    )
                return objects

            self.compiler.compile = compile_each
            super().build_extension(ext)
        except Exception as error:
            skip(f"{ext.name} did not build: {error}")
            for stale in Path("kernels").glob(ext.name.rpartition(".")[2] + ".*"):
                stale.unlink()  # an editable install would go on loading the older binary
        finally:
            self.compiler.compile = compile_all


setup(ext_modules=extensions(), cmdclass={"build_ext": OptionalBuild})

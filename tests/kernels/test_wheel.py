"""What a release uploads: an sdist with every source, and a wheel that serves each torch from 2.11 on without a compiler."""

from __future__ import annotations

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile
from pathlib import Path

import pytest
import torch

from longtrace.kernels import cuda, extension

ROOT = Path(__file__).resolve().parents[2]
OLDEST = 11  # torch 2.11
BUILT = {"_C": (extension.LIBRARY, {"libtorch_cpu.so"}), "_cuda": (cuda.LIBRARY, set())}  # and what of torch each needs
EVERYWHERE = {"libstdc++.so.6", "libgcc_s.so.1", "libm.so.6", "libc.so.6"}


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what is released, without anything built."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("kernels", "trainer", "bench", "csrc", "tests"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__", "results"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE", "CHANGELOG.md"):
        shutil.copy(ROOT / name, folder)
    return folder


def sources(folder: Path) -> set[str]:
    """Files that the install or the build reads."""
    code = {path for name in ("kernels", "trainer", "bench") for path in (folder / name).rglob("*.py")}
    code |= {path for name in ("kernels", "trainer", "bench") for path in (folder / name).rglob("py.typed")}
    data = {*(folder / "trainer" / "templates").iterdir(), *(folder / "bench").glob("*.json")}
    files = {path for path in (folder / "csrc").rglob("*") if path.is_file()}
    top = {folder / name for name in ("pyproject.toml", "setup.py", "README.md", "LICENSE", "CHANGELOG.md")}
    return {str(path.relative_to(folder)) for path in code | data | files | top}


def test_the_sdist_holds_every_source(tree, tmp_path):
    """By MANIFEST.in alone: with no extension to build, setuptools adds no source by itself."""
    done = subprocess.run(
        [sys.executable, "setup.py", "-q", "sdist", "-d", tmp_path], cwd=tree, capture_output=True, text=True,
        env=os.environ | {"LONGTRACE_BUILD": "0"},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = tmp_path.glob("longtrace-*.tar.gz")
    with tarfile.open(path) as archive:
        held = {name.partition("/")[2] for name in archive.getnames()}
    wanted = sources(tree)
    assert {"csrc/head_ops.cpp", "csrc/cpu/tile.inc", "csrc/cuda/blend.cu", "kernels/head/tile.py"} <= wanted
    assert not wanted - held, sorted(wanted - held)
    assert not [name for name in held if name.endswith((".so", ".pyc"))]


# ----------------------------------------------------------------------------------------------------------------------
# What the binaries ask for


def shims() -> dict[str, int]:
    """{C function of LibTorch's stable ABI: the minor version of torch 2 that brought it, 0 for before 2.10}."""
    found: dict[str, int] = {}
    for header in ("inductor/aoti_torch/c/shim.h", "stable/c/shim.h"):
        since = 0
        for line in (Path(torch.__file__).parent / "include" / "torch" / "csrc" / header).read_text().splitlines():
            if begin := re.match(r"#if TORCH_FEATURE_VERSION >= TORCH_VERSION_2_(\d+)_0", line):
                since = int(begin[1])
            elif line.startswith("#endif // TORCH_FEATURE_VERSION"):
                since = 0
            for name in re.findall(r"\b((?:aoti_)?torch_\w+)\(", line):
                found.setdefault(name, since)
    return found


def unserved(symbols: set[str]) -> set[str]:
    """Those that the oldest torch does not have by contract."""
    since = shims()
    return {name for name in symbols if since.get(name, 99) > OLDEST}


def imported(library: Path) -> set[str]:
    """Undefined symbols without a version: what is not of glibc, libstdc++ or libgcc."""
    done = subprocess.run(["nm", "-D", "--undefined-only", library], capture_output=True, text=True, check=True)
    symbols = (line.split() for line in done.stdout.splitlines())
    return {name for kind, name in symbols if kind == "U" and "@" not in name}


def needed(library: Path) -> set[str]:
    done = subprocess.run(["readelf", "-d", library], capture_output=True, text=True, check=True)
    return set(re.findall(r"\(NEEDED\).*\[(.+)\]", done.stdout))


def library_of(name: str) -> tuple[Path, set[str]]:
    library, torch_parts = BUILT[name]
    if not library.exists():
        pytest.skip(f"{name} was not built here")
    if not shutil.which("nm") or not shutil.which("readelf"):
        pytest.skip("needs nm and readelf (binutils)")
    return library, torch_parts


def test_the_extension_asks_torch_only_for_what_2_11_has():
    """So one binary serves 2.11 and later: the C functions are what LibTorch promises, and nothing of Python is used."""
    library, _ = library_of("_C")
    symbols = imported(library)
    assert {"aoti_torch_library_impl", "torch_parallel_for"} & symbols, "not the symbols of our ops"
    assert not unserved(symbols)
    assert f'"torch>=2.{OLDEST}"' in (ROOT / "pyproject.toml").read_text()
    assert f"0x02{OLDEST:02x}" in (ROOT / "setup.py").read_text()


def test_a_later_or_an_unstable_function_would_be_noticed():
    later = {name for name, since in shims().items() if since > OLDEST}
    unstable = {"_ZN2at4_ops10add_Tensor4callERKNS_6TensorES4_RKN3c106ScalarE", "PyObject_Call"}
    assert unserved({"torch_parallel_for", *later, *unstable}) == later | unstable


@pytest.mark.parametrize("name", BUILT)
def test_a_binary_needs_nothing_but_the_system_and_libtorch(name):
    library, torch_parts = library_of(name)
    found = {x for x in needed(library) if not x.startswith("ld-linux")}
    assert torch_parts <= found <= torch_parts | EVERYWHERE, found
    if name == "_cuda":
        assert not imported(library), "the CUDA runtime is inside"


# ----------------------------------------------------------------------------------------------------------------------
# The wheel itself


@pytest.fixture(scope="module")
def wheel(tree):
    """The wheel that `make wheels` makes where no nvcc is."""
    if not shutil.which("g++"):
        pytest.skip("no g++")
    probe = subprocess.run(
        [sys.executable, "-m", "pip", "download", "-q", "--no-deps", "-d", tree / "probe", "auditwheel"],
        capture_output=True,
    )
    if probe.returncode:
        pytest.skip("pip cannot fetch auditwheel here")
    done = subprocess.run(
        [tree / "tests" / "wheels.sh"], capture_output=True, text=True,
        env=os.environ | {"PYTHON": sys.executable, "CUDA_HOME": "/none"},
    )  # fmt: skip
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    (path,) = (tree / "dist").glob("*.whl")
    return path


@pytest.mark.slow
def test_the_wheel_holds_the_extensions_and_nothing_of_torch(wheel, tree):
    names = zipfile.ZipFile(wheel).namelist()
    binaries = sorted(name for name in names if ".so" in Path(name).name)
    assert [Path(name).name.split(".")[0] for name in binaries] == ["_C", "_pack"], binaries
    assert binaries[0] == "longtrace/kernels/_C.abi3.so"
    assert not [name for name in names if name.startswith(("csrc", "tests", "longtrace.libs"))]
    python = f"cp{sys.version_info[0]}{sys.version_info[1]}"  # _pack is of this Python
    assert re.search(rf"-{python}-{python}-manylinux_2_\d+_\w+\.whl$", wheel.name), wheel.name
    assert len(list((tree / "dist").glob("*.tar.gz"))) == 1


CODE = """
from longtrace import kernels as K
from longtrace.kernels import extension
from longtrace.kernels.selfcheck import self_check
print(K.__file__)
print(K.explain())
assert extension.LOADED, extension.WHY
for op, backend, error, ok in self_check():
    print(f"{op}  {backend}  {error:.1e}")
    assert ok, op
"""


@pytest.mark.slow
def test_the_wheel_installs_and_runs_where_no_compiler_is(wheel, tmp_path):
    """A fresh environment with the torch that runs this, whose wheel pip has from the time it was installed."""
    subprocess.run([sys.executable, "-m", "venv", tmp_path / "fresh"], check=True)
    bare = {key: value for key, value in os.environ.items() if not key.startswith(("PYTHON", "LONGTRACE"))}
    bare |= {"PATH": str(tmp_path / "fresh" / "bin"), "CC": "/bin/false", "CXX": "/bin/false"}
    python = tmp_path / "fresh" / "bin" / "python"
    assert not any(shutil.which(tool, path=bare["PATH"]) for tool in ("cc", "gcc", "c++", "g++", "nvcc"))

    def run(*arguments):
        done = subprocess.run([python, *arguments], cwd=tmp_path, capture_output=True, text=True, env=bare)
        return done.returncode, done.stdout + done.stderr

    code, output = run("-m", "pip", "install", "-q", f"torch=={torch.__version__.partition('+')[0]}")
    if code:
        pytest.skip(f"pip cannot fetch torch here: {output[-300:]}")
    code, output = run("-m", "pip", "install", "-q", "--no-deps", "--only-binary=:all:", wheel)
    assert code == 0, output
    code, output = run("-c", CODE)
    print(output)
    assert code == 0, output
    assert output.startswith(str(tmp_path / "fresh"))
    table = dict(line.split(maxsplit=1) for line in output.splitlines()[1:7])
    assert table.keys() == {"pack", "head", "varlen_attention", "group_advantages", "blend_gradients", "layers"}
    assert all("C++" in line for line in table.values()), table

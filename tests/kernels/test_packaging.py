"""Installing: with a compiler and torch the extensions are in the wheel, without either it is pure Python, never an error."""

from __future__ import annotations

import os
import shutil
import site
import subprocess
import sys
import zipfile
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
pytestmark = pytest.mark.slow


def pip(*arguments, **environment):
    return subprocess.run(
        [sys.executable, "-m", "pip", *map(str, arguments)],
        capture_output=True,
        text=True,
        env=os.environ | environment,
    )


@pytest.fixture(scope="module")
def tree(tmp_path_factory):
    """A copy of what a build reads, without anything built."""
    folder = tmp_path_factory.mktemp("tree")
    for name in ("kernels", "trainer", "bench", "csrc"):
        shutil.copytree(ROOT / name, folder / name, ignore=shutil.ignore_patterns("*.so", "__pycache__"))
    for name in ("pyproject.toml", "setup.py", "MANIFEST.in", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, folder)
    return folder


def wheel(tree, out, *flags, **environment):
    """Build a wheel and return (its file names, its own name, pip's output)."""
    shutil.rmtree(tree / "build", ignore_errors=True)
    done = pip("wheel", "-v", "--no-deps", "-w", out, *flags, tree, **environment)
    assert done.returncode == 0, done.stderr[-2000:]
    (path,) = Path(out).glob("*.whl")
    return zipfile.ZipFile(path).namelist(), path, done.stdout + done.stderr


def assert_pure(names, path):
    assert path.name.endswith("-py3-none-any.whl") and not [n for n in names if n.endswith(".so")]


def assert_typed_and_complete(names):
    for wanted in ("kernels/py.typed", "trainer/py.typed", "bench/py.typed", "kernels/head/dispatch.py"):
        assert f"longtrace/{wanted}" in names
    assert any(n.startswith("longtrace/trainer/templates/") for n in names)
    assert not [n for n in names if n.startswith(("csrc", "tests"))]


def test_a_wheel_with_extensions(tree, tmp_path):
    if not shutil.which("g++"):
        pytest.skip("no g++")
    names, _, _ = wheel(tree, tmp_path, "--no-build-isolation")
    assert_typed_and_complete(names)
    assert "longtrace/kernels/_C.abi3.so" in names
    assert [n for n in names if n.startswith("longtrace/kernels/_pack.")]


def test_no_build_when_asked(tree, tmp_path):
    names, path, _ = wheel(tree, tmp_path, "--no-build-isolation", LONGTRACE_BUILD="0")
    assert_pure(names, path)
    assert_typed_and_complete(names)


def test_no_compiler_is_no_error(tree, tmp_path):
    names, _, output = wheel(tree, tmp_path, "--no-build-isolation", CC="/nowhere/cc", CXX="/nowhere/c++")
    assert not [n for n in names if n.endswith(".so")]
    assert_typed_and_complete(names)
    assert "pure Python kernels: longtrace.kernels._C did not build" in output


def test_an_sdist_installs_under_build_isolation_as_pure_python(tree, tmp_path):
    built = subprocess.run(
        [sys.executable, "-m", "build", "--sdist", "--no-isolation", "-o", tmp_path, tree],
        capture_output=True,
        text=True,
    )
    assert built.returncode == 0, built.stderr[-2000:]
    (sdist,) = tmp_path.glob("*.tar.gz")
    probe = pip("download", "-q", "--no-deps", "-d", tmp_path / "probe", "setuptools>=77")
    if probe.returncode:
        pytest.skip("build isolation downloads setuptools, and pip cannot reach an index here")
    names, path, _ = wheel(sdist, tmp_path / "wheels")
    assert_pure(names, path)
    assert_typed_and_complete(names)
    target = tmp_path / "site"  # -S below: the environment's own editable longtrace stays out, its torch comes in
    assert pip("install", "--no-deps", "--target", target, path).returncode == 0
    code = "import longtrace.kernels as K; print(K.__file__); print(K.pack([2, 1], 3)); print(K.explain())"
    done = subprocess.run(
        [sys.executable, "-S", "-c", code], cwd=tmp_path, capture_output=True, text=True,
        env=os.environ | {"PYTHONPATH": os.pathsep.join([str(target), *site.getsitepackages()])},
    )  # fmt: skip
    assert done.returncode == 0, done.stderr[-2000:]
    assert done.stdout.splitlines()[:2] == [str(target / "longtrace/kernels/__init__.py"), "[[0, 1]]"]
    assert "was not built" in done.stdout

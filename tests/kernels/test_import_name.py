"""The folder is called kernels, and so is a PyPI package that transformers imports: the two must not be confused."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
TINY = """
import transformers, torch
from transformers import LlamaConfig, LlamaForCausalLM
from transformers.utils import is_kernels_available
config = LlamaConfig(vocab_size=50, hidden_size=16, intermediate_size=16, num_hidden_layers=1, num_attention_heads=2)
print(LlamaForCausalLM(config)(torch.arange(5)[None]).logits.shape, "kernels:", is_kernels_available())
from longtrace import kernels as K
print("packed", K.pack([1, 2], 3), K.__name__)
"""
# the names transformers 5 imports from `kernels`
STAND_IN = """
__version__ = {version!r}
class _Any:
    def __init__(self, *args, **kwargs): pass
    def __call__(self, x=None, *args, **kwargs): return x
CUDAProperties = Device = KernelizeFallback = LayerRepository = LocalLayerRepository = Mode = ROCMProperties = _Any
FuncRepository = LocalFuncRepository = _Any
def register_kernel_mapping(*args, **kwargs): pass
replace_kernel_forward_from_hub = use_kernel_mapping = get_kernel = kernelize = register_kernel_mapping
def use_kernel_forward_from_hub(name): return lambda cls: cls
use_kernel_func_from_hub = use_kernel_forward_from_hub
def use_kernelized_func(*names): return lambda cls: cls
def has_kernel(*args, **kwargs): return False
"""


def python(code, path):
    environment = os.environ | {"PYTHONPATH": os.pathsep.join(map(str, path)), "PYTHONSAFEPATH": ""}
    return subprocess.run([sys.executable, "-c", code], cwd=ROOT, capture_output=True, text=True, env=environment)


def stand_in(folder: Path) -> Path:
    """A package named kernels with a version transformers accepts."""
    from transformers.utils import import_utils

    version = import_utils.KERNELS_MIN_VERSION
    (folder / "kernels").mkdir()
    (folder / "kernels" / "__init__.py").write_text(STAND_IN.format(version=version))
    (folder / "kernels" / "extra.py").write_text("here = True\n")
    info = folder / f"kernels-{version}.dist-info"
    info.mkdir()
    (info / "METADATA").write_text(f"Metadata-Version: 2.1\nName: kernels\nVersion: {version}\n")
    return folder


def test_models_load_with_the_clone_first_and_no_other_kernels():
    done = python(TINY, [ROOT])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[1, 5, 50]" in done.stdout and "packed [[1, 0]] longtrace.kernels" in done.stdout


def test_models_load_with_the_clone_first_and_pypi_s_kernels_behind(tmp_path):
    other = stand_in(tmp_path)
    code = TINY + (
        "import kernels, kernels.extra\n"
        f"assert kernels.__file__.startswith({str(other)!r}), kernels.__file__\n"
        "assert kernels.extra.here and kernels.get_kernel\n"
    )
    done = python(code, [ROOT, other])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "kernels: True" in done.stdout and "packed [[1, 0]] longtrace.kernels" in done.stdout


@pytest.mark.slow
def test_models_load_with_the_real_package(tmp_path):
    got = subprocess.run(
        [sys.executable, "-m", "pip", "install", "-q", "--no-deps", "--target", str(tmp_path), "kernels"],
        cwd=tmp_path, capture_output=True, text=True,
    )  # fmt: skip
    if got.returncode:
        pytest.skip(f"pip cannot fetch kernels: {got.stderr.strip().splitlines()[-1]}")
    done = python(TINY, [ROOT, tmp_path])
    assert done.returncode == 0, done.stderr[-2000:]
    assert "[1, 5, 50]" in done.stdout


def test_nothing_of_ours_is_found_under_the_bare_name():
    code = (
        "import kernels\ntry:\n    from kernels import pack\nexcept ImportError as error:\n    print('refused:', error)"
    )
    done = python(code, [ROOT])
    assert done.returncode == 0 and done.stdout.startswith("refused:"), done.stdout + done.stderr

"""Fused kernels for training on long traces; the public names of `longtrace.kernels`."""

if __name__ == "kernels":  # transformers imports PyPI's `kernels`; from the clone's root it must never find this folder
    raise ImportError("this folder is longtrace.kernels, not the PyPI package `kernels`")

from importlib.metadata import version

__version__ = version("longtrace")

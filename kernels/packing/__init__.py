"""Packing documents into rows."""

from longtrace.kernels.packing.dispatch import pack

__all__ = ["pack"]

"""Packing documents into rows, and the rows of padded batches into packed ones."""

from longtrace.kernels.packing.dispatch import pack
from longtrace.kernels.packing.rows import pack_rows, unpack_rows

__all__ = ["pack", "pack_rows", "unpack_rows"]

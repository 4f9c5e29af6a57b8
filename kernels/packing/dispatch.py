"""`pack`: documents into rows of a fixed capacity, none lost, cut or repeated."""

from __future__ import annotations

import operator
from collections.abc import Sequence
from importlib import import_module

from longtrace.kernels.packing.reference import best_fit_decreasing

try:
    _pack = import_module("longtrace.kernels._pack")
    BACKEND, WHY = "C++", "longtrace.kernels._pack"
except ImportError as error:
    _pack = None
    BACKEND, WHY = "Python", f"the extension is not here: {error}"


def pack(lengths: Sequence[int], capacity: int) -> list[list[int]]:
    """Pack rows of `lengths` tokens into bins of at most `capacity` tokens by best-fit decreasing.

    Args: lengths, one integer >= 0 a row (a list, an integer numpy array or tensor); capacity >= 1, in tokens.
    Returns: bins as lists of row numbers; every row is in exactly one bin. Deterministic: equal lengths in row order.
    Raises: ValueError naming the first row that is negative or longer than `capacity`; nothing is ever truncated.
    Source: best-fit decreasing (Johnson 1974), at most 11/9 of the optimal number of bins plus 1.
    """
    lengths = [operator.index(n) for n in (lengths.tolist() if hasattr(lengths, "tolist") else lengths)]
    capacity = operator.index(capacity)
    if capacity < 1:
        raise ValueError(f"capacity must be at least 1 token, got {capacity}")
    for row, length in enumerate(lengths):
        if not 0 <= length <= capacity:
            raise ValueError(f"row {row} has {length} tokens; accepted: 0 to {capacity} (the capacity)")
    return best_fit_decreasing(lengths, capacity) if _pack is None else _pack.best_fit_decreasing(lengths, capacity)

"""Best-fit decreasing in plain Python: what `_pack` (C++) must reproduce row for row, and the fallback without it."""

from __future__ import annotations


def best_fit_decreasing(lengths: list[int], capacity: int) -> list[list[int]]:
    """Bins of row numbers: rows longest first (ties in row order), each into the fullest bin that still takes it.

    Ties between equally full bins go to the one that reached that fill last. O(n log capacity) by a segment tree over
    the remaining room; lengths are checked by the caller.
    """
    size = 1
    while size < capacity + 1:
        size *= 2
    tree = [False] * (2 * size)  # leaf r: some bin has room r
    open_bins: list[list[int]] = [[] for _ in range(capacity + 1)]  # room -> stack of bins
    bins: list[list[int]] = []
    for row in sorted(range(len(lengths)), key=lambda i: -lengths[i]):
        length = lengths[row]
        room = _first_at_least(tree, size, length)
        if room < 0:
            room, number = capacity, len(bins)
            bins.append([])
        else:
            number = open_bins[room].pop()
            if not open_bins[room]:
                _clear(tree, size + room)
        bins[number].append(row)
        room -= length
        if room:
            open_bins[room].append(number)
            node = size + room
            while node and not tree[node]:
                tree[node] = True
                node //= 2
    return bins


def _first_at_least(tree: list[bool], size: int, room: int) -> int:
    """The smallest marked leaf >= room, or -1."""
    node = size + room
    if tree[node]:
        return room
    while node > 1:
        if node % 2 == 0 and tree[node + 1]:
            node += 1
            break
        node //= 2
    else:
        return -1
    while node < size:
        node *= 2
        if not tree[node]:
            node += 1
    return node - size


def _clear(tree: list[bool], node: int) -> None:
    tree[node] = False
    while node > 1 and not tree[node ^ 1]:
        node //= 2
        tree[node] = False

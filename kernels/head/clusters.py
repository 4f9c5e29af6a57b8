"""Clusters of a chunk's rows by hidden state: spherical k-means, the same on every run and for any number of threads.

Rows that are close in direction have close softmax tails; the compressed gradient keeps one tail per cluster.
"""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor


def runs_or_signs(coefficient: Tensor, most: int) -> Tensor:
    """(n,) group of each row: its run of equal coefficients (a sequence's advantage), else only its sign.

    Runs are taken for sequences when there are at most `most` of them. Either way no group mixes signs, in which the
    tails of a cluster would cancel.
    """
    edges = coefficient[1:] != coefficient[:-1]
    if int(edges.sum()) < most:
        return torch.cat([edges.new_zeros(1), edges]).cumsum(0)
    return (coefficient < 0).long()


def spherical_kmeans(
    h: Tensor, weight: Tensor, group: Tensor, k: int, similarity: Callable[[Tensor, Tensor], Tensor], steps: int = 3
) -> Tensor:
    """(n,) cluster in [0, k') of each row of h (n, H); rows of different `group` (n,) never share one.

    weight (n,) >= 0 is a row's share in its centroid. Each group gets clusters in proportion to its rows, at least
    one, so k' can exceed k when there are many groups; clusters may end empty. `similarity` (n, k) = x @ centre^T and the
    sums of the centres are the same for any number of threads, so no row moves to another cluster by chance.
    """
    x = torch.nn.functional.normalize(h.to(weight.dtype), dim=1)
    n, counts = len(x), torch.bincount(group)
    starts, owners = [], []
    order = group.argsort(stable=True)
    begin = 0
    for g, count in enumerate(counts.tolist()):
        share = min(count, max(1, round(k * count / n)))
        starts += [order[begin + (2 * j + 1) * count // (2 * share)] for j in range(share)]  # evenly along the text
        owners += [g] * share
        begin += count
    centre = x[torch.stack(starts)]
    foreign = group[:, None] != torch.tensor(owners, device=h.device)
    for step in range(steps + 1):
        cluster = similarity(x, centre).masked_fill(foreign, -torch.inf).argmax(1)
        if step == steps:
            return cluster
        if x.is_cuda:  # index_add_ would add in any order there
            moved = (
                torch.nn.functional.one_hot(cluster, len(owners)).double().t() @ (x * weight[:, None]).double()
            ).to(x)
        else:
            moved = torch.zeros_like(centre).index_add_(0, cluster, x * weight[:, None])
        length = moved.norm(dim=1, keepdim=True)
        centre = torch.where(length > 0, moved / length, centre)  # an empty cluster stays where it was
    raise AssertionError("unreachable")

"""Clusters of a chunk's rows by hidden state: spherical k-means, the same on every run and for any number of threads.

Rows that are close in direction have close softmax tails; the compressed gradient keeps one tail per cluster.
"""

from __future__ import annotations

import torch
from torch import Tensor

from longtrace.kernels.head.engine import TorchEngine


def runs_or_signs(coefficient: Tensor, most: int) -> Tensor:
    """(n,) group of each row: its run of equal coefficients (a sequence's advantage), else only its sign.

    Runs are taken for sequences when there are at most `most` of them. Either way no group mixes signs, in which the
    tails of a cluster would cancel.
    """
    edges = coefficient[1:] != coefficient[:-1]
    if int(edges.sum()) < most:
        return torch.cat([edges.new_zeros(1), edges]).cumsum(0)
    return (coefficient < 0).long()


def membership(cluster: Tensor, k: int, dtype: torch.dtype) -> Tensor:
    """(k, n) of 0 and 1: whether row i belongs to cluster j."""
    return (cluster == torch.arange(k, device=cluster.device)[:, None]).to(dtype)


def spherical_kmeans(h: Tensor, weight: Tensor, group: Tensor, k: int, engine: TorchEngine, steps: int = 3) -> Tensor:
    """(n,) cluster in [0, k') of each row of h (n, H); rows of different `group` (n,) never share one.

    weight (n,) >= 0 is a row's share in its centroid. Each group gets clusters in proportion to its rows, at least
    one, so k' can exceed k when there are many groups; clusters may end empty. Both products are the engine's, with
    operands rounded to its dtype: its sums do not depend on threads, so no row moves to another cluster by chance.
    """
    n, counts = len(h), torch.bincount(group)
    starts, owners = [], []
    order = group.argsort(stable=True)
    begin = 0
    for g, count in enumerate(counts.tolist()):
        share = min(count, max(1, round(k * count / n)))
        starts += [order[begin + (2 * j + 1) * count // (2 * share)] for j in range(share)]  # evenly along the text
        owners += [g] * share
        begin += count
    foreign = None if len(counts) == 1 else group[:, None] != torch.tensor(owners, device=h.device)
    rows = engine.pack(h, weight.new_ones(h.shape[1]))
    share = weight / h.to(weight.dtype).norm(dim=1).clamp(min=torch.finfo(weight.dtype).tiny)
    share = share / share.max().clamp(min=torch.finfo(weight.dtype).tiny)  # fp16 operands lose small ones
    centre = h[torch.stack(starts)].to(weight.dtype)
    centre = centre / centre.norm(dim=1, keepdim=True).clamp(min=torch.finfo(weight.dtype).tiny)
    for step in range(steps + 1):
        similarity = engine.project(rows, centre.t())
        if foreign is not None:
            similarity.masked_fill_(foreign, -torch.inf)
        cluster = similarity.argmax(1)
        if step == steps:
            return cluster
        moved = engine.project(engine.pack(membership(cluster, len(owners), weight.dtype), share), h)
        length = moved.norm(dim=1, keepdim=True)
        centre = torch.where(length > 0, moved / length, centre)  # an empty cluster stays where it was
    raise AssertionError("unreachable")

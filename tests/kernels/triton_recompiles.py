"""How often Triton would compile our kernels when lengths and hyper-parameters change, counted without a GPU.

A launch takes Triton's own path as on sm_90: it binds the arguments, specialises them (dtypes, alignment of pointers, values of
integers that are not declared exempt) and looks the key up in its cache. Where it would compile, its hook notes the key
and declines. Only the driver is a stand-in; no kernel runs, so outputs hold zeros.

Run as a script: prints {scenario: {kernel: keys}} in JSON; of the scenarios whose names start with its argument, if one is given.
"""

from __future__ import annotations

import functools
import itertools
import json
import sys
from collections import defaultdict
from collections.abc import Callable, Iterator
from pathlib import Path

import torch
import triton
from triton.backends.compiler import GPUTarget

from longtrace import kernels as K
from longtrace.kernels import backend
from longtrace.kernels.head import triton_columns as columns
from longtrace.kernels.head import triton_rows as rows
from longtrace.kernels.head import triton_tile as tile
from longtrace.kernels.head.epilogue import RowStats
from longtrace.kernels.head.spec import Transform

LENGTHS = (1, 16, 17, 1000, 1024, 4097)  # 1 and multiples of 16 are what Triton looks for in an integer
TEMPERATURES = (1.0, 1, 0.7, 2)
SCALES = (1.0, 1, 0.25, 16)
CAPS = (1.0, 1, 30, 50.0)
H = 32


class Driver:
    """Stands for a Hopper."""

    def get_current_device(self) -> int:
        return 0

    def get_current_stream(self, device: int) -> int:
        return 0

    def get_current_target(self) -> GPUTarget:
        return GPUTarget("cuda", 90, 32)


SCENARIOS: dict[str, Callable[[], Iterator[object]]] = {}


def scenario(*variants):
    """Register a generator that makes launches, for each tuple of arguments: what is fixed while all else changes."""

    def register(function):
        for values in variants:
            name = " ".join([function.__name__, *(str(v).replace("torch.", "") for v in values)])
            SCENARIOS[name] = functools.partial(function, *values)
        return function

    return register


def head_inputs(T: int, V: int, dtype: torch.dtype):
    return torch.ones(T, H, dtype=dtype, requires_grad=True), torch.ones(V, H, dtype=dtype, requires_grad=True)


def transforms(capped: bool) -> Iterator[dict]:
    for temperature, scale, cap in zip(TEMPERATURES, SCALES, CAPS):
        yield {"temperature": temperature, "logit_scale": scale} | ({"softcap": cap} if capped else {})


HEADS = tuple(itertools.product((torch.bfloat16, torch.float32), (96, 97), (False, True)))


@scenario(*HEADS)
def weighted_nll(dtype, V, capped):
    for T, options in itertools.product(LENGTHS, transforms(capped)):
        h, w = head_inputs(T, V, dtype)
        K.linear_weighted_nll(h, w, torch.zeros(T, dtype=torch.int64), torch.ones(T), entropy=True, **options)[
            0
        ].backward()


@scenario(*HEADS)
def log_prob(dtype, V, capped):
    for T, options in itertools.product(LENGTHS, transforms(capped)):
        h, w = head_inputs(T, V, dtype)
        K.linear_log_prob(h, w, torch.zeros(T, dtype=torch.int64), **options).log_prob.sum().backward()


@scenario(*HEADS)
def cross_entropy(dtype, V, capped):
    for T, smoothing, z_loss, options in zip(
        LENGTHS * 4, (0.1, 0.2, 0.5) * 8, (1e-4, 1.0, 1) * 8, [*transforms(capped)] * 6
    ):
        h, w = head_inputs(T, V, dtype)
        y = torch.zeros(T, dtype=torch.int64)
        K.linear_cross_entropy(h, w, y, label_smoothing=smoothing, z_loss=z_loss, **options).backward()


@scenario((96,), (97,))
def compressed(V):
    for T, options, eps, rank in zip(
        LENGTHS * 4, [*transforms(False)] * 6, (2**-12, 1e-3, 0.5) * 8, (1, 16, 17, 64) * 6
    ):
        h, w = head_inputs(T, V, torch.bfloat16)
        y, more = (
            torch.zeros(T, dtype=torch.int64),
            {"grad": "compressed", "eps": eps, "rank": rank, "target_error": 1e6},
        )
        K.linear_weighted_nll(h, w, y, torch.ones(T), **options, **more)[0].backward()


@scenario(*itertools.product((torch.bfloat16, torch.float32), (96, 97)))
def column_passes(dtype, V):
    for R, F in itertools.product(LENGTHS, (1, 16, 33)):
        p, w = torch.zeros(R, V, dtype=dtype), torch.zeros(R)
        columns.column_max(p, w)
        columns.compact(p, torch.arange(F))


def row_values(T: int) -> tuple:
    """(transforms of one kind, stats, a, e) of T rows, all options there."""
    made = [Transform(**options) for options in transforms(True)]
    return made, RowStats(*(torch.zeros(T) for _ in range(4))), *(torch.zeros(T) for _ in range(2))


@scenario((96,), (97,))
def row_passes(V):
    for T in LENGTHS:
        logits, y, bias = torch.zeros(T, V), torch.zeros(T, dtype=torch.int64), torch.zeros(V)
        made, stats, a, e = row_values(T)
        for transform in made:
            rows.softmax_stats(logits, y, bias, transform, True)
            rows.dlogits(logits, y, bias, transform, stats, a, e, torch.empty_like(logits))


@scenario(*itertools.product((H, H + 1), (96, 97)))
def tiles(width, V):
    for T in LENGTHS:
        h, w = (torch.zeros(n, width, dtype=torch.bfloat16) for n in (T, V))
        y, bias = torch.zeros(T, dtype=torch.int64), torch.zeros(V)
        made, stats, a, e = row_values(T)
        for transform in made:
            g = torch.zeros(T, 112, dtype=torch.bfloat16)[:, :V]
            tile.softmax_tiles(h, w, bias, y, transform, True, True, g)
            tile.gradient_tiles(h, w, bias, y, transform, stats, a, e, g)


@scenario(*itertools.product((torch.bfloat16, torch.float32), (64, 72), (False, True), (False, True)))
def packed_attention(dtype, D, windowed, capped):
    heads, kv_heads = 4, 2
    for T, documents, scale, i in zip(LENGTHS * 3, (1, 2, 16, 17) * 5, SCALES * 5, range(20)):
        q, k, v = (torch.zeros(T, n, D, dtype=dtype, requires_grad=True) for n in (heads, kv_heads, kv_heads))
        cu = torch.linspace(0, T, documents + 1).to(torch.int32)
        options = {"window": ((0, 1, 16, 511)[i % 4], 0)} if windowed else {}
        options |= {"softcap": CAPS[i % 4]} if capped else {}
        K.varlen_attention(q, k, v, cu, T, scale=scale, **options).sum().backward()


def count(start: str = "") -> dict[str, dict[str, int]]:
    """Keys of every kernel in every scenario: how often it would be compiled."""
    triton.runtime.driver.set_active(Driver())
    keys: dict[str, set] = defaultdict(set)

    def decline(*, key, fn, **_) -> bool:
        keys[f"{fn.module.rpartition('.')[2]}.{fn.name.rpartition('.')[2]}"].add(key)
        return True

    triton.knobs.runtime.jit_cache_hook = decline
    torch.Tensor.new_empty, torch.empty_like = torch.Tensor.new_zeros, torch.zeros_like
    backend.triton_lacks = lambda device: ""
    backend.FORCED = "triton"
    found = {}
    for name in (x for x in SCENARIOS if x.startswith(start)):
        keys.clear()
        SCENARIOS[name]()
        found[name] = {kernel: len(seen) for kernel, seen in sorted(keys.items())}
    return found


if __name__ == "__main__":
    torch.set_num_threads(1)
    print(json.dumps({"counts": count(*sys.argv[1:]), "kernels": str(Path(K.__file__).parent)}))

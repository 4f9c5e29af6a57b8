"""What kernels and whole heads cost in closed form, and how long that takes at a part's rates.

Kernel forms are held against counts in Triton's interpreter (tests/bench/test_traffic.py). Heads are lists of passes:
library products by formula (operands once and the result; 2 M N K), kernels by their form, torch ops as they read and
write. T tokens, H width, V vocabulary; sizes in bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass

from .counting import Operand, Pass

# ----------------------------------------------------------------------------------------------------------------------
# Parts


@dataclass(frozen=True)
class Part:
    """Dense rates without sparsity, as the vendor's data sheet states them."""

    tflops: float  # bf16 tensor cores
    tflops_fp64: float  # fp64 tensor cores
    gbytes: float  # memory, GB/s
    source: str


PARTS = {
    "A100": Part(312, 19.5, 2039, "NVIDIA A100 80GB SXM data sheet"),
    "H100": Part(989, 67, 3350, "NVIDIA H100 SXM data sheet"),
    "H200": Part(989, 67, 4800, "NVIDIA H200 SXM data sheet"),
    "B200": Part(2250, 37, 8000, "NVIDIA DGX B200 and HGX B200 data sheets, an eighth of the system"),
}


def roofline_ms(passes: list[Pass], part: Part) -> float:
    """The sum over the passes of the longer of computing and moving: what no implementation of them can beat."""
    seconds = 0.0
    for x in passes:
        rate = part.tflops_fp64 if x.double else part.tflops
        seconds += max(x.flops / (rate * 1e12), x.bytes / (part.gbytes * 1e9))
    return 1e3 * seconds


# ----------------------------------------------------------------------------------------------------------------------
# Triton kernels: the distinct bytes of one launch from its arguments. `again` (below) is what it loads and stores beyond.


def _size(tensor) -> int:
    return 0 if tensor is None else tensor.element_size()


def _rows(n: int, *sizes: int) -> tuple[Operand, ...]:
    """Vectors of n elements."""
    return tuple(Operand((n,), size) for size in sizes if size)


def target_logit(a: Mapping) -> Pass:
    """Ours: the logit of each token's target; rows of w that several tokens share count once."""
    T, H = a["h"].shape
    targets = len(set(a["target"].tolist()))
    reads = (Operand((T, H), 2), Operand((targets, H), 2), *_rows(T, 8), *_rows(targets, _size(a["bias"])))
    return Pass("triton_tile.target_kernel", reads, _rows(T, 4))


def _tile(name: str, a: Mapping, rows: tuple[int, ...], writes: tuple[Operand, ...]) -> Pass:
    """A product of ours with something in its epilogue, which reads `rows` of each token."""
    (T, H), V = a["h"].shape, a["w"].shape[0]
    reads = (Operand((T, H), 2), Operand((V, H), 2), *_rows(T, *rows), *_rows(V, _size(a["bias"])))
    out = () if a["out"] is None else (Operand((T, V), _size(a["out"])),)
    return Pass(name, reads, (*writes, *out), (T, H, V), blocks=(a["BLOCK_T"], a["BLOCK_H"], a["BLOCK_V"]))


def _parts(a: Mapping) -> tuple[Operand, ...]:
    """The sums of each block of the vocabulary, of the kinds that are asked for."""
    kinds = 2 + bool(a["HAS_DOT"]) + bool(a["HAS_MASS"])
    return (Operand(tuple(a["total"].shape), 4),) * kinds


def exp_tiles(a: Mapping) -> Pass:
    """Ours: exponentials of logits that stay in their tile, and their sums."""
    return _tile("triton_tile.exp_kernel", a, (8, 4), _parts(a))


def tile_sums(a: Mapping) -> Pass:
    """Ours: these sums over the blocks."""
    parts = _parts(a)
    return Pass("triton_tile.sums_kernel", parts, _rows(a["total"].shape[1], *(4 for _ in parts)))


def gradient_tiles(a: Mapping) -> Pass:
    """Ours: the gradient of logits that stay in their tile, from known statistics."""
    return _tile("triton_tile.gradient_kernel", a, (8, 4, 4, 4, *((4, 4) if a["HAS_E"] else ())), ())


def stats(a: Mapping) -> Pass:
    """Ours, fp16 and fp32: softmax statistics of R rows of raw logits."""
    R, V = a["logits"].shape
    more = 4 if a["HAS_ENTROPY"] else 0
    bias = _rows(V, _size(a["bias"]))
    reads = (Operand((R, V), _size(a["logits"])), *_rows(R, 8), *bias)
    return Pass("triton_rows.stats_kernel", reads, _rows(R, 4, 4, 4, more))


def dlogits(a: Mapping) -> Pass:
    """Ours, fp16 and fp32: raw logits to their gradient in the operand dtype."""
    R, V = a["logits"].shape
    entropy = (4, 4) if a["HAS_E"] else ()
    reads = (Operand((R, V), _size(a["logits"])), *_rows(R, 8, 4, 4, 4, *entropy), *_rows(V, _size(a["bias"])))
    return Pass("triton_rows.dlogits_kernel", reads, (Operand((R, V), _size(a["out"])),))


def column_max(a: Mapping) -> Pass:
    """Ours: the largest value of each column."""
    R, V = a["p"].shape
    return Pass(
        "triton_columns.column_max_kernel",
        (Operand((R, V), _size(a["p"])), *_rows(R, 4 if a["HAS_SCALE"] else 0)),
        _rows(V, 4),
    )


def compact(a: Mapping) -> Pass:
    """Ours: kept columns side by side; every column of `columns` is distinct."""
    (R, F), size = a["out"].shape, _size(a["p"])
    return Pass("triton_columns.compact_kernel", (Operand((R, F), size), *_rows(F, 8)), (Operand((R, F), size),))


def liger_cross_entropy(a: Mapping) -> Pass:
    """Liger: statistics and gradient of bf16 logits in place; the second read of a row counts in `again`."""
    R, V = a["X_ptr"].shape
    logits = Operand((R, V), _size(a["X_ptr"]))
    return Pass("cross_entropy.liger_cross_entropy_kernel", (logits, *_rows(R, 8)), (logits, *_rows(R, 4)))


def liger_grpo_forward(a: Mapping) -> Pass:
    """Liger: the GRPO loss of whole logits (B, L + 1, N); on policy, no reference, no mask."""
    B, L, N = a["LOSS"].shape[0], a["L"], a["N"]
    reads = (Operand((B, L, N), _size(a["LOGITS"])), *_rows(B * L, 8), *_rows(B, 4))
    return Pass("grpo_loss._grpo_loss_fwd_kernel", reads, _rows(B * L, 4, 4, 4))


def liger_grpo_backward(a: Mapping) -> Pass:
    """Liger: its gradient."""
    B, L, N = a["LSE"].shape[0], a["L"], a["N"]
    logits = Operand((B, L, N), _size(a["LOGITS"]))
    return Pass("grpo_loss._grpo_loss_bwd_kernel", (logits, *_rows(B * L, 8, 4, 4), *_rows(B, 4)), (logits,))


def liger_rms_forward(a: Mapping) -> Pass:
    """Liger: RMSNorm, a row a program."""
    T, H = a["Y_ptr"].shape
    x = Operand((T, H), _size(a["X_ptr"]))
    return Pass("rms_norm._rms_norm_forward_kernel", (x, *_rows(H, _size(a["W_ptr"]))), (x, *_rows(T, 4)))


def liger_rms_backward(a: Mapping) -> Pass:
    """Liger: its gradients; dW in fp32, a row of partial sums a program (one on the CPU, one a multiprocessor on CUDA)."""
    (T, H), programs = a["dY_ptr"].shape, a["dW_ptr"].shape[0]
    x = Operand((T, H), _size(a["X_ptr"]))
    reads = (x, x, *_rows(T, 4), *_rows(H, _size(a["W_ptr"])))
    return Pass("rms_norm._rms_norm_backward_kernel", reads, (x, Operand((programs, H), 4)))


def trl_forward(a: Mapping) -> Pass:
    """TRL: one tile of logits folded into the running statistics (log-probs alone); `hits`: targets inside the tile."""
    R, V = a["mm_ptr"].shape
    local = a["targets_ptr"] - a["vocab_start"]
    hits = int(((local >= 0) & (local < V)).sum())
    reads = (Operand((R, V), _size(a["mm_ptr"])), *_rows(R, 8, 4, 4, 4, 4, 4, 4))
    return Pass("chunked_logprob._forward_kernel", reads, (*_rows(R, 4, 4), *_rows(hits, 4)))


def trl_backward(a: Mapping) -> Pass:
    """TRL: one tile of logits turned into its gradient in place."""
    R, V = a["mm_ptr"].shape
    tile = Operand((R, V), _size(a["mm_ptr"]))
    return Pass("chunked_logprob._backward_kernel", (tile, *_rows(R, 8, 4, 4)), (tile,))


OURS: dict[str, Callable[[Mapping], Pass]] = {
    "triton_tile.target_kernel": target_logit, "triton_tile.exp_kernel": exp_tiles, "triton_tile.sums_kernel": tile_sums,
    "triton_tile.gradient_kernel": gradient_tiles, "triton_rows.stats_kernel": stats,
    "triton_rows.dlogits_kernel": dlogits, "triton_columns.column_max_kernel": column_max,
    "triton_columns.compact_kernel": compact,
}  # fmt: skip
PEERS: dict[str, Callable[[Mapping], Pass]] = {
    "cross_entropy.liger_cross_entropy_kernel": liger_cross_entropy, "grpo_loss._grpo_loss_fwd_kernel": liger_grpo_forward,
    "grpo_loss._grpo_loss_bwd_kernel": liger_grpo_backward, "rms_norm._rms_norm_forward_kernel": liger_rms_forward,
    "rms_norm._rms_norm_backward_kernel": liger_rms_backward, "chunked_logprob._forward_kernel": trl_forward, "chunked_logprob._backward_kernel": trl_backward,
}  # fmt: skip


def _blocks(n: int, block: int) -> int:
    return -(-n // block)


def _tile_again(a: Mapping, rows: int) -> int:
    """Every tile loads its operands, and `rows` bytes of each token; caches serve them, as they do a library's product."""
    (T, H), V = a["h"].shape, a["w"].shape[0]
    tiles, blocks = _blocks(T, a["BLOCK_T"]), _blocks(V, a["BLOCK_V"])
    return (blocks - 1) * T * (2 * H + rows) + (tiles - 1) * V * (2 * H + _size(a["bias"]))


def _target_again(a: Mapping) -> int:
    return (a["h"].shape[0] - len(set(a["target"].tolist()))) * (2 * a["h"].shape[1] + _size(a["bias"]))


# What a launch loads and stores again, beyond each byte once: values a block reloads, and second reads of a row.
AGAIN: dict[str, Callable[[Mapping], int]] = {
    "triton_tile.target_kernel": _target_again,
    "triton_tile.exp_kernel": lambda a: _tile_again(a, 12),
    "triton_tile.sums_kernel": lambda a: 8 * a["total"].numel() * bool(a["HAS_DOT"]),
    "triton_tile.gradient_kernel": lambda a: _tile_again(a, 20 + 8 * a["HAS_E"]),
    "triton_rows.stats_kernel": lambda a: a["logits"].shape[0] * _size(a["logits"]),
    "triton_rows.dlogits_kernel": lambda a: (
        a["logits"].shape[0] * (_blocks(a["V"], a["BLOCK"]) - 1) * (20 + 8 * a["HAS_E"])
    ),
    "triton_columns.column_max_kernel": lambda a: 4 * a["R"] * (_blocks(a["V"], a["COLS"]) - 1) * a["HAS_SCALE"],
    "triton_columns.compact_kernel": lambda a: 8 * a["F"] * (a["out"].shape[0] - 1),
    "cross_entropy.liger_cross_entropy_kernel": lambda a: (
        a["X_ptr"].shape[0] * (a["n_cols"] + 2) * _size(a["X_ptr"])
    ),
    "grpo_loss._grpo_loss_fwd_kernel": lambda a: (
        a["LOSS"].numel() * _size(a["LOGITS"]) + 4 * (a["LOSS"].numel() - a["LOSS"].shape[0])
    ),
    "grpo_loss._grpo_loss_bwd_kernel": lambda a: (
        a["LSE"].numel() * _size(a["LOGITS"]) + 4 * (a["LSE"].numel() - a["LSE"].shape[0])
    ),
    "rms_norm._rms_norm_forward_kernel": lambda a: (a["Y_ptr"].shape[0] - 1) * a["n_cols"] * _size(a["W_ptr"]),
    "rms_norm._rms_norm_backward_kernel": lambda a: (a["dW_ptr"].shape[0] - 1) * a["n_cols"] * _size(a["W_ptr"]),
    "chunked_logprob._forward_kernel": lambda a: trl_forward(a).writes[-1].shape[0] * _size(a["mm_ptr"]),
    "chunked_logprob._backward_kernel": lambda a: 16 * a["mm_ptr"].shape[0] * (_blocks(a["n_cols"], a["BLOCK_SIZE"]) - 1),
}  # fmt: skip


# ----------------------------------------------------------------------------------------------------------------------
# Heads of the peers, from their sources (versions: docs/gpu.md)


@dataclass(frozen=True)
class Head:
    """A whole forward and backward: its passes, and the bytes it holds beyond inputs and returned gradients.

    `again`: what its kernels load and store beyond each byte once, where that was counted or follows from the tiles.
    """

    passes: list[Pass]
    workspace: float
    again: float = 0.0
    chunks: int = 1

    @property
    def flops(self) -> float:
        return sum(x.flops for x in self.passes)

    @property
    def bytes(self) -> float:
        return sum(x.bytes for x in self.passes)


def _moved(name: str, *operands: tuple[int, ...]) -> Pass:
    """A pass over matrices, each given as (rows, columns, bytes per element), read or written."""
    return Pass(name, tuple(Operand(x[:-1], x[-1]) for x in operands))


def product(name: str, m: int, k: int, n: int, out: int = 2, add: bool = False, wide: int = 2) -> Pass:
    """(m, n) [+]= (m, k) (k, n) of 16-bit operands; `out`: bytes of a result; `add` also reads what it adds to."""
    result = Operand((m, n), out)
    reads = (Operand((m, k), wide), Operand((k, n), wide), *([result] if add else []))
    return Pass(name, reads, (result,), (m, k, n))


def _chunks(T: int, rows: int) -> list[int]:
    return [min(rows, T - i) for i in range(0, T, rows)]


def _power(n: int) -> int:
    return 1 << max(0, math.ceil(math.log2(max(1, n))))


def eager(T: int, H: int, V: int) -> Head:
    """torch: F.linear and F.cross_entropy, bf16 logits."""
    logits = (T, V, 2)
    return Head([
        product("logits", T, H, V),
        _moved("log_softmax", logits, logits),
        _moved("nll backward", logits),
        _moved("log_softmax backward", logits, logits, logits),
        product("dh", T, V, H),
        product("dW", V, T, H),
    ], workspace=6.0 * T * V)  # fmt: skip


def torch_chunked(T: int, H: int, V: int, rows: int = 0) -> Head:
    """torch 2.13 F.linear_cross_entropy, "compact" on CUDA: fp32 logits, dW summed in bf16; rows 0 = its own choice."""
    rows = rows or max(1, _power(_blocks(T, _blocks(V, H))) // 2)
    passes = []
    for n in _chunks(T, rows):
        wide, narrow, h = (n, V, 4), (n, V, 2), (n, H, 2)
        passes += [
            product("logits", n, H, V, out=4),
            _moved("amax", wide),
            _moved("sub", wide, wide),
            _moved("exp", wide, wide),
            _moved("sum", wide),
            _moved("mul", wide, wide),
            _moved("to bf16", wide, narrow),
            _moved("target rows", h, h, h, h),
            product("dh", n, V, H, add=True),
            product("dW", V, n, H, add=True),
            _moved("target rows", h, h, h, h),
        ]
    passes.append(_moved("zeros", (V, H, 2)))
    passes.append(_moved("times upstream", *[(V, H, 2), (T, H, 2)] * 2))
    return Head(passes, workspace=6.0 * rows * V, chunks=len(_chunks(T, rows)))


def liger(T: int, H: int, V: int, budget: int = 1, accumulate: int = 2) -> Head:
    """Liger's fused linear cross-entropy; `budget`: its chunk_mem_const; `accumulate`: bytes of dW's accumulator."""
    rows = min(T, _power(_blocks(T, _blocks(V, budget * H))))
    passes = [_moved("zeros", (V, H, accumulate), (T, H, 2))]
    for n in _chunks(T, rows):
        logits = Operand((n, V), 2)
        passes += [
            product("logits", n, H, V),
            Pass("cross_entropy.liger_cross_entropy_kernel", (logits, *_rows(n, 8)), (logits, *_rows(n, 4))),
            product("dh", n, V, H),
            product("dW", V, n, H, out=accumulate, add=True),
        ]
    if accumulate == 4:
        passes.append(_moved("to bf16", (V, H, 4), (V, H, 2)))
    workspace = 2.0 * rows * V + (4.0 * V * H if accumulate == 4 else 0.0)
    return Head(passes, workspace, again=2.0 * T * V, chunks=len(_chunks(T, rows)))


def liger_grpo(T: int, H: int, V: int) -> Head:
    """Logits whole in bf16, then Liger's Triton GRPO loss and its backward in place."""
    logits = Operand((T, V), 2)
    return Head([
        product("logits", T, H, V),
        Pass("grpo_loss._grpo_loss_fwd_kernel", (logits, *_rows(T, 8)), _rows(T, 4, 4, 4)),
        Pass("grpo_loss._grpo_loss_bwd_kernel", (logits, *_rows(T, 8, 4, 4)), (logits,)),
        product("dh", T, V, H),
        product("dW", V, T, H),
    ], workspace=2.0 * T * V)  # fmt: skip


def trl(T: int, H: int, V: int, rows: int = 4096, columns: int = 32768) -> Head:
    """TRL's ChunkedLogProbFunction: tiles of bf16 logits, made again in the backward, gradients summed in fp32."""
    passes = [_moved("zeros", (V, H, 4), (T, H, 4))]
    for n in _chunks(T, rows):
        for v in _chunks(V, columns):
            tile = Operand((n, v), 2)
            passes += [
                product("logits", n, H, v),
                Pass("chunked_logprob._forward_kernel", (tile, *_rows(n, 8, 4, 4, 4, 4, 4, 4)), _rows(n, 4, 4)),
                product("logits again", n, H, v),
                Pass("chunked_logprob._backward_kernel", (tile, *_rows(n, 8, 4, 4)), (tile,)),
                product("dh", n, v, H, out=4, add=True),
                product("dW", v, n, H, out=4, add=True),
            ]
    passes.append(_moved("to bf16", (V, H, 4), (V, H, 2), (T, H, 4), (T, H, 2)))
    chunks = len(_chunks(T, rows)) * len(_chunks(V, columns))
    return Head(passes, 2.0 * rows * columns + 4.0 * H * (V + T), chunks=chunks)


def quack(T: int, H: int, V: int, rows: int = 4096) -> Head:
    """QuACK's chunked linear cross-entropy: one kernel reads the logits and writes their gradient, dW in fp32.

    From its documentation: the last chunk's dW is taken in the backward and rounded there.
    """
    passes, sizes = [], _chunks(T, rows)
    for i, n in enumerate(sizes):
        logits, last = (n, V, 2), i == len(sizes) - 1
        reads = (Operand((V, n), 2), Operand((n, H), 2), *([Operand((V, H), 4)] if i else []))
        passes += [
            product("logits", n, H, V),
            _moved("cross entropy", logits, logits),
            product("dh", n, V, H),
            Pass("dW", reads, (Operand((V, H), 2 if last else 4),), (V, n, H)),
        ]
    return Head(passes, 2.0 * rows * V + 4.0 * V * H, chunks=len(sizes))


def cce(T: int, H: int, V: int, kept: float = 1.0) -> Head:
    """Apple's CCE: logits in registers, forward and again backward; `kept`: share of the tiles that are not filtered.

    Compulsory bytes only: every tile reads its operands again and adds into dh and dW under locks (`again`), which
    caches serve as far as they reach. Blocks of 256 x 128 forward and 128 x 128 backward, its heuristics' choice.
    """
    h, w = Operand((T, H), 2), Operand((V, H), 2)
    passes = [
        Pass("cce forward", (h, w), _rows(T, 4), (T, H, V)),
        Pass("indexed dot", (h, h, *_rows(T, 8)), _rows(T, 4)),
        _moved("zeros", (T, H, 2), (V, H, 2)),
        Pass("cce backward", (h, w, h, w, *_rows(T, 8, 4, 4)), (h, w), (round((1 + 2 * kept) * T), H, V)),
    ]
    tiles = _blocks(T, 128) * _blocks(V, 128)
    forward, backward = _blocks(T, 256) * _blocks(V, 128) * (256 + 128), tiles * (128 + 128) * (1 + 3 * kept)
    again = 2.0 * H * (forward + backward) - 4 * (h.bytes + w.bytes)
    return Head(passes, workspace=8.0 * T + 4.0 * V, again=again)

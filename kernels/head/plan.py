"""How many rows a head call works on at a time: bounded by bytes, and no more than the traffic of dW asks for."""

from __future__ import annotations

import os
from dataclasses import dataclass

import torch

from longtrace.kernels import extension
from longtrace.kernels.head.backend import CPU_TILES, TRITON_PASSES, TRITON_TILES, choose

# One GEMM call of the PyTorch engine works on a fixed number of rows, so that a row's result cannot depend on how many
# rows travel with it: BLAS libraries choose their summation order by shape.
BLOCK_ROWS = 256
PANEL_ROWS = 32  # what the C++ tile kernels pad to
DEFAULT_BUDGET_MB = {"cpu": 256.0, "cuda": 1536.0}

# A chunk of R rows spends 6 R H V FLOPs and moves dW once through memory, 8 H V bytes in fp32: the moving costs
# (8 / 6) (FLOP/s per byte/s) / R of the computing, whatever H and V are. Machine balances, FLOP per byte:
BALANCE = {"cpu": 27.0, "cuda": 200.0}
WORTH = {"cpu": 0.035, "cuda": 0.052}  # the share at which longer chunks stop being worth their memory


@dataclass(frozen=True)
class Chunks:
    """`rows` rows live at a time (a multiple of `block`), each library GEMM call takes `block` rows."""

    rows: int
    block: int
    buffer_bytes: int  # of the (rows, V) buffer
    workspace_bytes: int  # that, and all else that is neither input nor gradient
    traffic: float  # time of moving dW once a chunk over the time of the three GEMMs, estimated

    def count(self, total: int) -> int:
        """Chunks needed for `total` rows."""
        return -(-total // self.rows)

    def __str__(self) -> str:
        return (
            f"{self.rows:,} rows a chunk, {self.buffer_bytes / 2**20:,.0f} MB of probabilities, "
            f"dW traffic about {self.traffic:.1%} of the GEMMs"
        )


def budget_bytes(budget_mb: float | None, device: str = "cpu") -> float:
    """The byte budget of a head call: the argument, else LONGTRACE_HEAD_BUDGET_MB, else the device's default."""
    if budget_mb is None:
        text = os.environ.get("LONGTRACE_HEAD_BUDGET_MB")
        try:
            budget_mb = float(text) if text else DEFAULT_BUDGET_MB.get(device, 256.0)
        except ValueError:
            raise ValueError(f"LONGTRACE_HEAD_BUDGET_MB: found {text!r}; accepted: a number of megabytes") from None
    if not budget_mb > 0:
        raise ValueError(f"budget_mb must be > 0, got {budget_mb}")
    return budget_mb * 2**20


def logit_bytes(engine: str, dtype: torch.dtype, device: str) -> int:
    """Bytes that a chunk holds for each logit, at most: by tile kernels probabilities alone, else logits before them."""
    if engine == TRITON_TILES:
        return 2
    if engine == CPU_TILES:
        return 2 if dtype == torch.bfloat16 and extension.BF16_OPERANDS else 4
    wide = 8 if dtype == torch.float64 else 4
    if device != "cuda":
        return wide
    narrow = 2 if dtype in (torch.bfloat16, torch.float16) else 0
    return (1 if engine == TRITON_PASSES else 2) * wide + narrow  # PyTorch multiplies the row factors into a copy


def plan_chunks(
    T: int,
    H: int,
    V: int,
    dtype: torch.dtype,
    budget_mb: float | None = None,
    device: str = "cpu",
    engine: str | None = None,
    compressed: bool = False,
) -> Chunks:
    """Rows per chunk and per GEMM call for `T` rows of width `H` against a vocabulary of `V`; `str()` tells the plan.

    Args: dtype of the inputs; budget_mb bounds the (rows, V) buffer (default: LONGTRACE_HEAD_BUDGET_MB, else 256 on CPU
    and 1536 on CUDA); engine: what computes it, as `K.explain()` calls it (default: what is chosen here); `logit_bytes`
    says what a logit takes there; compressed: also count what compressed gradients need. At least 16 rows are always
    taken (32 by the CPU's tile kernels).
    The block size depends on V, dtype and budget but not on T; a short last block is padded with zero rows.
    """
    engine = engine or choose(device, dtype).name
    itemsize, panels = logit_bytes(engine, dtype, device), engine == CPU_TILES
    width = max(V, 1) * itemsize
    fit = int(min(budget_bytes(budget_mb, device) / width, 2**40))
    kind = "cuda" if device == "cuda" else "cpu"
    cost = 4 / 3 * BALANCE[kind]
    enough = max(BLOCK_ROWS, round(cost / WORTH[kind] / BLOCK_ROWS) * BLOCK_ROWS)
    if panels:
        block = PANEL_ROWS
    elif fit < BLOCK_ROWS:
        block = max(16, 1 << (max(fit, 1).bit_length() - 1))
    elif device == "cuda":  # cuBLAS wants tall tiles, a short batch little padding: two calls a chunk, of fixed size
        block = max(BLOCK_ROWS, min(fit, enough) // 2 // BLOCK_ROWS * BLOCK_ROWS)
    else:
        block = BLOCK_ROWS
    blocks = max(1, min(fit, enough, max(T, 1) + block - 1) // block)
    if panels and blocks % 2 == 0:  # an even number of panels would be padded by one (row_stride in csrc)
        blocks += 1 if (blocks + 1) * block <= fit else -1
    rows = blocks * block
    if panels:  # packed rows, and partial sums of dH (csrc/cpu/head.cpp: head::dh)
        ranges = min(16, max(1, -(-V // 4096)), max(1, 2**26 // (4096 * max(H, 1))))
        extra = rows * H * (4 * ranges + 8)
    elif engine == TRITON_TILES:  # up to four sums of each token and 128 columns
        extra = 16 * rows * -(-V // 128)
    else:  # the fp32 copy of the weight that a CPU GEMM of narrow operands needs
        extra = 4 * V * H if device == "cpu" and itemsize == 4 and dtype != torch.float32 else 0
    if compressed:  # cluster sums, profiles and pending tails, and the kept columns of several chunks
        extra += 2400 * V + rows * width // 2
    return Chunks(rows, block, rows * width, rows * width + extra, cost / rows)

"""`rms_norm`, `rope`, `swiglu`, `geglu`: one pass over memory each where a fused kernel serves the device and dtype."""

from __future__ import annotations

from collections.abc import Iterator

import torch
from torch import Tensor

from longtrace.kernels import backend, extension
from longtrace.kernels.backend import Candidate, Choice
from longtrace.kernels.layers import liger, native, reference

DTYPES = (torch.bfloat16, torch.float32)


@torch.compiler.assume_constant_result
def choose(
    device: str, dtype: torch.dtype, mixed: bool = False, learned: bool = False, partial: bool = False
) -> Choice:
    """What serves tensors of `dtype` on `device`.

    mixed: operands differ in dtype or device; learned: cos and sin take gradients; partial: part of a head is rotated.
    """
    return backend.choose("layers", _candidates, device, dtype, mixed, learned, partial)


def _candidates(device: str, dtype: torch.dtype, mixed: bool, learned: bool, partial: bool) -> Iterator[Candidate]:
    lacks = ""
    if dtype not in DTYPES:
        lacks = "the kernels take bf16 and fp32"
    elif mixed:
        lacks = "operands of several dtypes: PyTorch promotes them as the models do"
    elif learned:
        lacks = "the kernels have no gradient for cos and sin"
    if device in ("cpu", "meta"):  # shapes alone, to plan memory with
        yield Candidate("cpu", "C++", lacks or extension.WHY, extension.LOADED and not lacks)
    if device == "cuda":
        lacks = lacks or ("Liger's kernel rotates whole heads" if partial else "")
        found = "liger-kernel is installed (not run on a GPU by this project's tests)"
        why = found if liger.FOUND else "liger-kernel is not installed: pip install 'longtrace[gpu]'"
        yield Candidate("triton", "Liger", lacks or why, liger.FOUND and not lacks)
    yield Candidate("reference", "PyTorch", "")


def _serves(*tensors: Tensor | None, learned: bool = False, partial: bool = False) -> str:
    """The backend for these operands."""
    device, dtype = tensors[0].device.type, tensors[0].dtype
    mixed = any(t is not None and (t.dtype != dtype or t.device.type != device) for t in tensors)
    return choose(device, dtype, mixed, learned, partial).backend


class _Rows:
    """A view of a tensor as a matrix of rows, in the order in which they lie in memory: no copy of a transposed tensor."""

    def __init__(self, x: Tensor):
        strides = x.stride()
        order = sorted(range(x.ndim - 1), key=lambda d: -strides[d])
        # permutes are autograd nodes: none where the rows are in order as they are
        self.order = None if order == list(range(x.ndim - 1)) else [*order, x.ndim - 1]
        self.shape = self._turn(x).shape

    def _turn(self, x: Tensor) -> Tensor:
        return x if self.order is None else x.permute(self.order)

    def flat(self, x: Tensor) -> Tensor:
        x = self._turn(x)
        if x.ndim == 2:
            return native.dense(x)
        # rows first: reshape alone would not copy a transposed last dimension
        return native.dense(x).reshape(-1 if x.numel() else self.shape[:-1].numel(), self.shape[-1])

    def back(self, flat: Tensor) -> Tensor:
        x = flat.view(self.shape)
        return x if self.order is None else x.permute([self.order.index(d) for d in range(x.ndim)])


def rms_norm(
    x: Tensor, weight: Tensor, eps: float, *, residual: Tensor | None = None, offset: float = 0.0
) -> Tensor | tuple[Tensor, Tensor]:
    """RMSNorm over the last dimension: x / sqrt(mean(x^2) + eps) * (offset + weight).

    Args: x (..., H), any leading shape and row stride; weight (H,); residual, like x, is added first; offset 0 rounds
    x / rms to x's dtype before the weight, as Llama, Qwen and Mistral do, any other (1.0: Gemma) rounds once at the end.
    Returns: y like x, or (y, x + residual) with a residual. Sums in fp32 (fp64 for fp64).
    Keeps for the backward: what is normalised and 1 / rms of each row in fp32. dweight is summed in fp32 in a fixed
    order: on the CPU its bits do not depend on the number of threads. Double backward raises RuntimeError.
    Raises: ValueError for shapes that do not fit.
    Source: Zhang and Sennrich 2019, arXiv:1910.07467.
    """
    if x.ndim == 0 or weight.shape != x.shape[-1:]:
        raise ValueError(
            f"weight must be ({x.shape[-1] if x.ndim else '?'},) for x {tuple(x.shape)}, got {tuple(weight.shape)}"
        )
    if residual is not None and residual.shape != x.shape:
        raise ValueError(f"residual must be {tuple(x.shape)} like x, got {tuple(residual.shape)}")
    serves = _serves(x, weight, residual)
    if serves == "reference":
        return reference.rms_norm(x, weight, eps, residual=residual, offset=offset)
    rows = _Rows(x)
    flat, other = rows.flat(x), None if residual is None else rows.flat(residual)
    if serves == "triton":
        out = liger.rms_norm(flat, weight, eps, residual=other, offset=offset)
    else:
        out = native.RMSNorm.apply(flat, other, native.dense(weight), eps, offset)
    return rows.back(out) if residual is None else (rows.back(out[0]), rows.back(out[1]))


def rope(q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, *, rotary_dim: int | None = None) -> tuple[Tensor, Tensor]:
    """Rotary position embedding of packed queries and keys, in the half-rotation convention of Llama, Qwen and Gemma.

    Args: q (T, heads, D) and k (T, kv_heads, D), any strides over T and heads; cos, sin (T, rotary_dim), or
    (T, rotary_dim / 2) if `rotary_dim` says so, from the model's rotary embedding at each token's own position: packed
    documents need no more. rotary_dim: by default the width of cos; entries of a head past it are copied.
    Returns: new (q, k); the inputs stay as they were. fp32 arithmetic, rounded once. Keeps cos and sin alone for the
    backward; they get no gradient. Double backward raises RuntimeError.
    Raises: ValueError for shapes that do not fit.
    Source: Su et al. 2021, arXiv:2104.09864, in the layout of GPT-NeoX.
    """
    D, width = q.shape[-1], cos.shape[-1]
    rotary_dim = width if rotary_dim is None else rotary_dim
    if q.ndim != 3 or k.ndim != 3 or q.shape[0] != k.shape[0] or k.shape[2] != D:
        raise ValueError(
            f"q and k must be (T, heads, D) and (T, kv_heads, D), got {tuple(q.shape)} and {tuple(k.shape)}"
        )
    if rotary_dim % 2 or not 0 < rotary_dim <= D or width not in (rotary_dim, rotary_dim // 2):
        raise ValueError(
            f"rotary_dim must be even, at most D = {D}, and cos as wide or half: got {rotary_dim} and {width}"
        )
    if cos.shape != (q.shape[0], width) or sin.shape != cos.shape:
        raise ValueError(f"cos and sin must be ({q.shape[0]}, {width}), got {tuple(cos.shape)} and {tuple(sin.shape)}")
    learned = torch.is_grad_enabled() and (cos.requires_grad or sin.requires_grad)
    serves = _serves(q, k, cos, sin, learned=learned, partial=rotary_dim != D)
    if serves == "cpu":
        return native.Rope.apply(*map(native.dense, (q, k, cos, sin)), rotary_dim)
    if serves == "triton":
        if width != D:
            cos, sin = torch.cat((cos, cos), -1), torch.cat((sin, sin), -1)
        return liger.Rope.apply(q, k, cos, sin)
    return reference.rope(q, k, cos, sin, rotary_dim)


def swiglu(gate: Tensor, up: Tensor) -> Tensor:
    """silu(gate) * up; gate and up (..., I) of one shape, any row stride (two halves of one projection, say).

    fp32 arithmetic, rounded once. Keeps gate and up alone for the backward. Double backward raises RuntimeError.
    Raises ValueError for shapes that differ. Source: Shazeer 2020, arXiv:2002.05202.
    """
    return _glu(gate, up, False)


def geglu(gate: Tensor, up: Tensor) -> Tensor:
    """gelu(gate) * up with gelu's tanh formula (Gemma's gelu_pytorch_tanh); otherwise as `swiglu`."""
    return _glu(gate, up, True)


def _glu(gate: Tensor, up: Tensor, gelu: bool) -> Tensor:
    if gate.shape != up.shape or gate.ndim == 0:
        raise ValueError(f"gate and up must have one shape, got {tuple(gate.shape)} and {tuple(up.shape)}")
    serves = _serves(gate, up)
    if serves == "reference":
        return (reference.geglu if gelu else reference.swiglu)(gate, up)
    rows = _Rows(gate)
    function = liger.Glu if serves == "triton" else native.Glu
    return rows.back(function.apply(rows.flat(gate), rows.flat(up), gelu))

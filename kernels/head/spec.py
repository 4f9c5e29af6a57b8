"""What a head call is made of: the logit transform, the result tuple, and the checks every head op shares."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor


class LogProbs(NamedTuple):
    """Per-token results of a head op; each tensor has the shape of `target`, in fp32 (fp64 for fp64 inputs).

    Rows whose target is `ignore_index` never reach the GEMM and read 0 everywhere.
    """

    log_prob: Tensor  # log p(target), nats
    entropy: Tensor | None  # of the whole distribution, nats; None unless asked for
    lse: Tensor  # log-sum-exp of the final logits
    stats: dict[str, float]  # rows that reached the GEMM, rows in all, chunks, rows per chunk; more when compressed


@dataclass(frozen=True)
class Transform:
    """z = softcap(logit_scale * (h . w) + bias) / temperature, with softcap(s) = cap * tanh(s / cap)."""

    logit_scale: float = 1.0
    softcap: float | None = None
    temperature: float = 1.0

    def __post_init__(self) -> None:
        if not self.temperature > 0:
            raise ValueError(f"temperature must be > 0, got {self.temperature}")
        if self.softcap is not None and not self.softcap > 0:
            raise ValueError(f"softcap must be > 0 or None, got {self.softcap}")

    def apply_(self, logits: Tensor, bias: Tensor | None) -> Tensor:
        """Turn h . w of shape (rows, V) into final logits, in place."""
        if self.softcap is None:  # scale and temperature fold into one pass
            scale = self.logit_scale / self.temperature
            if scale != 1.0:
                logits.mul_(scale)
            return logits if bias is None else logits.add_(bias, alpha=1.0 / self.temperature)
        if self.logit_scale != 1.0:
            logits.mul_(self.logit_scale)
        if bias is not None:
            logits.add_(bias)
        return logits.div_(self.softcap).tanh_().mul_(self.softcap / self.temperature)

    def slope(self, logits: Tensor) -> Tensor | None:
        """1 - tanh^2 of the softcap, read back from final logits; None without one."""
        if self.softcap is None:
            return None
        return 1 - (logits * (self.temperature / self.softcap)).square_()

    @property
    def gain(self) -> float:
        """d(final logit)/d(h . w), but for the softcap's slope."""
        return self.logit_scale / self.temperature


def compute_dtype(dtype: torch.dtype) -> torch.dtype:
    """The dtype of logits, log-probs and sums for inputs of `dtype`: fp64 stays, everything else is fp32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


FLOATS = (torch.bfloat16, torch.float16, torch.float32, torch.float64)


def check(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    linear_bias: Tensor | None,
    coefficient: Tensor | None,
    ignore_index: int,
) -> tuple[Tensor, Tensor, Tensor | None, Tensor]:
    """Refuse what cannot be computed and return (input (T, H), weight, bias, target (T,)).

    Under autocast, input, weight and bias are cast as `torch.nn.functional.linear` would cast them.
    """
    for name, tensor in (("input", input), ("linear_weight", linear_weight), ("linear_bias", linear_bias)):
        if tensor is not None and type(tensor).__module__.startswith("torch.distributed.tensor"):
            raise ValueError(f"{name} is a DTensor; gather it first (full_tensor()), sharded heads are not offered")
    if linear_weight.ndim != 2 or input.ndim < 1 or input.shape[-1] != linear_weight.shape[1]:
        raise ValueError(
            f"input {tuple(input.shape)} and linear_weight {tuple(linear_weight.shape)} do not fit: "
            "expected (..., H) and (V, H)"
        )
    if target.shape != input.shape[:-1]:
        raise ValueError(f"target has shape {tuple(target.shape)}; input {tuple(input.shape)} needs {input.shape[:-1]}")
    if target.dtype not in (torch.int64, torch.int32):
        raise ValueError(f"target must be int64 or int32 class indices, got {target.dtype}")
    if coefficient is not None:
        if coefficient.shape != target.shape:
            raise ValueError(f"coefficient has shape {tuple(coefficient.shape)}, target {tuple(target.shape)}")
        if coefficient.requires_grad:
            raise ValueError("coefficient requires grad; detach it, or use linear_log_prob for a differentiable weight")
    if torch.is_autocast_enabled(input.device.type):
        dtype = torch.get_autocast_dtype(input.device.type)
        if input.dtype != torch.float64:
            input, linear_weight = input.to(dtype), linear_weight.to(dtype)
            linear_bias = None if linear_bias is None else linear_bias.to(dtype)
    if input.dtype not in FLOATS or linear_weight.dtype != input.dtype:
        raise ValueError(
            f"input is {input.dtype}, linear_weight {linear_weight.dtype}; accepted: both bf16, fp16, fp32 or fp64"
        )
    if linear_bias is not None:
        if linear_bias.shape != (linear_weight.shape[0],):
            raise ValueError(f"linear_bias has shape {tuple(linear_bias.shape)}, expected ({linear_weight.shape[0]},)")
        if linear_bias.dtype != input.dtype:
            raise ValueError(f"linear_bias is {linear_bias.dtype}, input {input.dtype}; accepted: the same dtype")
    devices = {t.device for t in (input, linear_weight, target, linear_bias, coefficient) if t is not None}
    if len(devices) > 1:
        raise ValueError(f"tensors on different devices: {sorted(map(str, devices))}")
    target = target.reshape(-1).long()
    bad = ((target < 0) | (target >= linear_weight.shape[0])) & (target != ignore_index)
    if bad.any():
        position = int(bad.nonzero()[0])
        raise ValueError(
            f"target[{position}] = {int(target[position])}; accepted: 0 <= target < {linear_weight.shape[0]} "
            f"or ignore_index = {ignore_index}"
        )
    return input.reshape(-1, input.shape[-1]), linear_weight, linear_bias, target

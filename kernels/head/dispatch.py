"""The public head ops: one vocabulary pass, many losses (docs/kernels.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from longtrace.kernels.head.chunked import Loss, TokenValues, WeightedLoss
from longtrace.kernels.head.spec import LogProbs, Transform, check, compute_dtype


def _options(grad: str, weight: Tensor, weight_grad: Tensor | None) -> None:
    if grad != "exact":
        raise ValueError(f"grad = {grad!r}; accepted: 'exact'")
    if weight_grad is not None and (weight_grad.shape != weight.shape or weight_grad.dtype != torch.float32):
        raise ValueError(
            f"weight_grad is {weight_grad.dtype} {tuple(weight_grad.shape)}; accepted: float32 {tuple(weight.shape)}"
        )


@torch.compiler.disable
def linear_weighted_nll(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    coefficient: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    grad: str = "exact",
    weight_grad: Tensor | None = None,
    budget_mb: float | None = None,
) -> tuple[Tensor, LogProbs]:
    """sum_i coefficient_i * nll_i, with the gradients taken in the forward chunk: 6 T H V FLOPs, no logits kept.

    Args:
        input: (..., H) hidden states; bf16, fp16, fp32 or fp64.
        linear_weight: (V, H), same dtype. linear_bias: (V,) or None.
        target: (...) int64 class indices; rows equal to `ignore_index` are left out.
        coefficient: (...) known before the backward and detached (1/count for SFT, advantages for policy gradients).
            Rows with coefficient 0 leave before the GEMM: they cost nothing.
        logit_scale, softcap, temperature: log p = log_softmax(softcap(logit_scale * h.w + b) / temperature).
        entropy: also return each row's entropy (detached).
        weight_grad: (V, H) fp32 buffer that the backward adds linear_weight's gradient to, in fp32 and never rounded;
            linear_weight itself then gets none. At least one input must require grad.
        budget_mb: bound on the logits buffer; default LONGTRACE_HEAD_BUDGET_MB, else 256 (CPU) or 1024 (CUDA).

    Returns:
        the scalar sum in fp32 (fp64 for fp64 inputs), differentiable once in input, linear_weight and linear_bias; and
        LogProbs, detached, shaped like `target`. Rows that were left out read 0 in every field.

    Raises:
        ValueError: shapes or dtypes that do not fit, a target out of range (with its position), a coefficient that
            requires grad, a DTensor weight. RuntimeError: double backward.

    Under torch.no_grad() only the forward GEMM runs. Gradients are held in fp32 until the backward, scaled by the
    upstream scalar and rounded once.
    """
    _options(grad, linear_weight, weight_grad)
    transform = Transform(logit_scale, softcap, temperature)
    h, weight, bias, flat = check(input, linear_weight, target, linear_bias, coefficient, ignore_index)
    loss = Loss(transform, ignore_index, 0.0, 0.0, entropy, False, budget_mb)
    total, log_prob, ent, lse, stats = WeightedLoss.apply(
        h, weight, bias, flat, coefficient.reshape(-1), None, weight_grad, loss, torch.is_grad_enabled()
    )
    shape = target.shape
    return total, LogProbs(log_prob.view(shape), None if ent is None else ent.view(shape), lse.view(shape), stats)


@torch.compiler.disable
def linear_log_prob(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    ignore_index: int = -100,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    entropy: bool = False,
    grad: str = "exact",
    weight_grad: Tensor | None = None,
    budget_mb: float | None = None,
) -> LogProbs:
    """log p(target), optionally the entropy, and the log-sum-exp of each row, differentiable: 8 T H V FLOPs.

    For losses whose per-token coefficient is known only after all log-probs are (preference losses, sequence-level
    ratios). The backward recomputes the logits chunk by chunk and skips rows whose upstream gradients are all 0.
    Arguments and errors as `linear_weighted_nll`. Returns LogProbs shaped like `target`, fp32 (fp64 for fp64 inputs);
    `ignore_index` rows read 0 and get no gradient.
    """
    _options(grad, linear_weight, weight_grad)
    transform = Transform(logit_scale, softcap, temperature)
    h, weight, bias, flat = check(input, linear_weight, target, linear_bias, None, ignore_index)
    loss = Loss(transform, ignore_index, 0.0, 0.0, entropy, False, budget_mb)
    log_prob, ent, lse, _, stats = TokenValues.apply(h, weight, bias, flat, None, weight_grad, loss)
    shape = target.shape
    return LogProbs(log_prob.view(shape), None if ent is None else ent.view(shape), lse.view(shape), stats)


@torch.compiler.disable
def linear_cross_entropy(
    input: Tensor,
    linear_weight: Tensor,
    target: Tensor,
    *,
    linear_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    ignore_index: int = -100,
    label_smoothing: float = 0.0,
    logit_scale: float = 1.0,
    softcap: float | None = None,
    temperature: float = 1.0,
    z_loss: float = 0.0,
    grad: str = "exact",
    weight_grad: Tensor | None = None,
    budget_mb: float | None = None,
) -> Tensor:
    """`torch.nn.functional.cross_entropy(linear(input, linear_weight, linear_bias), target, ...)`, logits never whole.

    Args:
        weight: (V,) class weights; label_smoothing in [0, 1): both as torch defines them.
        reduction: "mean" divides by the number of valid targets, or by the sum of their class weights; "sum"; "none".
        z_loss: adds z_loss * lse^2 to each valid token's loss (before the reduction).
        The rest as `linear_weighted_nll`.

    Returns:
        a scalar, or losses shaped like `target` for "none"; fp32 (fp64 for fp64 inputs), where torch's own returns
        bf16 for bf16 inputs. A batch with no valid target gives 0, not NaN.
    """
    _options(grad, linear_weight, weight_grad)
    if reduction not in ("none", "mean", "sum"):
        raise ValueError(f"reduction = {reduction!r}; accepted: 'none', 'mean', 'sum'")
    if not 0.0 <= label_smoothing < 1.0:
        raise ValueError(f"label_smoothing = {label_smoothing}; accepted: 0 <= label_smoothing < 1")
    transform = Transform(logit_scale, softcap, temperature)
    h, matrix, bias, flat = check(input, linear_weight, target, linear_bias, None, ignore_index)
    class_weight = None
    if weight is not None:
        if weight.shape != (matrix.shape[0],):
            raise ValueError(f"weight has shape {tuple(weight.shape)}, expected ({matrix.shape[0]},)")
        class_weight = weight.detach().to(compute_dtype(h.dtype))
    smooth = label_smoothing > 0
    loss = Loss(transform, ignore_index, label_smoothing, z_loss, False, smooth, budget_mb)
    valid = flat != ignore_index
    if reduction == "none":
        log_prob, _, lse, smoothed, _ = TokenValues.apply(h, matrix, bias, flat, class_weight, weight_grad, loss)
        values = -(1 - label_smoothing) * log_prob
        if class_weight is not None:
            values = values * class_weight[flat.where(valid, 0)]
        if smooth:
            values = values - label_smoothing / matrix.shape[0] * smoothed
        if z_loss:
            values = values + z_loss * lse.square()
        return values.view(target.shape)
    coefficient = valid.to(compute_dtype(h.dtype))
    if reduction == "mean":
        weights = coefficient if class_weight is None else coefficient * class_weight[flat.where(valid, 0)]
        total = weights.sum()
        coefficient = coefficient / torch.where(total == 0, 1.0, total)
    out = WeightedLoss.apply(
        h, matrix, bias, flat, coefficient, class_weight, weight_grad, loss, torch.is_grad_enabled()
    )
    return out[0]

"""The public head ops: one vocabulary pass, many losses (docs/kernels.md)."""

from __future__ import annotations

import torch
from torch import Tensor

from longtrace.kernels.head import chunked as exact
from longtrace.kernels.head import compressed
from longtrace.kernels.head.chunked import Loss
from longtrace.kernels.head.spec import LogProbs, Transform, check, compute_dtype
from longtrace.kernels.head.tail import Compression


def _gradients(
    grad: str, weight: Tensor, weight_grad: Tensor | None, eps: float, rank: int, target_error: float | None
) -> Compression | None:
    """The compression asked for; None means exact gradients, which fp32 and fp64 always get."""
    if grad not in ("exact", "compressed"):
        raise ValueError(f"grad = {grad!r}; accepted: 'exact', 'compressed'")
    wide = compute_dtype(weight.dtype)
    if weight_grad is not None:
        fits = weight_grad.shape == weight.shape and weight_grad.dtype == wide and weight_grad.device == weight.device
        if not fits or not weight_grad.is_contiguous():
            raise ValueError(
                f"weight_grad is {weight_grad.dtype} {tuple(weight_grad.shape)} on {weight_grad.device}; "
                f"accepted: contiguous {wide} {tuple(weight.shape)} on {weight.device}"
            )
    options = Compression(eps, rank, target_error)
    if grad == "exact" or weight.dtype not in (torch.bfloat16, torch.float16):
        return None
    return options


def _weighted_loss(*args, options: Compression | None):
    return exact.WeightedLoss.apply(*args) if options is None else compressed.WeightedLoss.apply(*args, options)


def _token_values(*args, options: Compression | None):
    if options is None:
        return exact.TokenValues.apply(*args)
    return compressed.TokenValues.apply(*args, options, torch.is_grad_enabled())


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
    eps: float = 2**-12,
    rank: int = 64,
    target_error: float | None = None,
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
        grad: "exact", or "compressed": log-probs stay exact, the gradients' softmax is kept where some row of a chunk of
            1,024 exceeds `eps` and replaced by `rank` cluster profiles elsewhere: less than half the FLOPs, an error
            that is estimated chunk by chunk (`stats`), and exact gradients for a chunk whose estimate exceeds
            `target_error` (None: 1 % of dH, 15 % of a dropped vocabulary row of dW). docs/head.md says where it must not
            be used. fp32 and fp64 take exact.
        weight_grad: (V, H) fp32 buffer that the backward adds linear_weight's gradient to, in fp32 and never rounded;
            linear_weight itself then gets none. At least one input must require grad.
        budget_mb: bound on the logits buffer; default LONGTRACE_HEAD_BUDGET_MB, else 256 (CPU) or 1536 (CUDA).

    Returns:
        the scalar sum in fp32 (fp64 for fp64 inputs), differentiable once in input, linear_weight and linear_bias; and
        LogProbs, detached, shaped like `target`. Rows that were left out read 0 in every field.

    Raises:
        ValueError: shapes or dtypes that do not fit, a target out of range (with its position), a coefficient that
            requires grad, a DTensor weight. RuntimeError: double backward.

    Under torch.no_grad() only the forward GEMM runs. Gradients are held in fp32 until the backward, scaled by the
    upstream scalar and rounded once.
    """
    options = _gradients(grad, linear_weight, weight_grad, eps, rank, target_error)
    transform = Transform(logit_scale, softcap, temperature)
    h, weight, bias, flat = check(input, linear_weight, target, linear_bias, coefficient, ignore_index)
    loss = Loss(transform, ignore_index, 0.0, 0.0, entropy, False, budget_mb)
    total, log_prob, ent, lse, stats = _weighted_loss(
        h,
        weight,
        bias,
        flat,
        coefficient.reshape(-1),
        None,
        weight_grad,
        loss,
        torch.is_grad_enabled(),
        options=options,
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
    eps: float = 2**-12,
    rank: int = 64,
    target_error: float | None = None,
    weight_grad: Tensor | None = None,
    budget_mb: float | None = None,
) -> LogProbs:
    """log p(target), optionally the entropy, and the log-sum-exp of each row, differentiable: 8 T H V FLOPs.

    For losses whose per-token coefficient is known only after all log-probs are (preference losses, sequence-level
    ratios). The backward recomputes the logits chunk by chunk and skips rows whose upstream gradients are all 0.
    Arguments and errors as `linear_weighted_nll`. Returns LogProbs shaped like `target`, fp32 (fp64 for fp64 inputs);
    `ignore_index` rows read 0 and get no gradient.
    """
    options = _gradients(grad, linear_weight, weight_grad, eps, rank, target_error)
    transform = Transform(logit_scale, softcap, temperature)
    h, weight, bias, flat = check(input, linear_weight, target, linear_bias, None, ignore_index)
    loss = Loss(transform, ignore_index, 0.0, 0.0, entropy, False, budget_mb)
    log_prob, ent, lse, _, stats = _token_values(h, weight, bias, flat, None, weight_grad, loss, options=options)
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
    eps: float = 2**-12,
    rank: int = 64,
    target_error: float | None = None,
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
    options = _gradients(grad, linear_weight, weight_grad, eps, rank, target_error)
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
        log_prob, _, lse, smoothed, _ = _token_values(
            h, matrix, bias, flat, class_weight, weight_grad, loss, options=options
        )
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
        total = weights.double().sum().to(weights.dtype)  # fp32 sums depend on the number of threads
        coefficient = coefficient / torch.where(total == 0, 1.0, total)
    grads = torch.is_grad_enabled()
    args = (h, matrix, bias, flat, coefficient, class_weight, weight_grad, loss, grads)
    return _weighted_loss(*args, options=options)[0]

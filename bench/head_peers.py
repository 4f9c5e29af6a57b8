"""The competitors of the head benchmark and our own ops, all as one function: sum_i c_i nll_i, differentiable in h and w.

An implementation takes (h, w, y, c) and returns (loss, log_probs or None, stats); where it cannot take per-token weights
it uses its own mean, which is c = 1/T ("ones"), and refuses the other kinds. Backward is called on the loss by the caller.
"""

from __future__ import annotations

import functools
import importlib
import inspect
from collections.abc import Callable
from dataclasses import dataclass, field

import torch
import torch.nn.functional as F
from torch import Tensor

from longtrace import kernels as K

Result = tuple[Tensor, Tensor | None, dict]


@dataclass(frozen=True)
class Impl:
    """`passes`: GEMMs of 2 T H V FLOPs it needs. `logits`: bytes held per logit if it keeps them whole, else 0."""

    impl: str
    op: str
    run: Callable[..., Result]
    passes: float
    needs: str = "torch"  # the module that has to import
    weighted: bool = True
    logits: float = 0.0
    slow_start: bool = False  # compiles: warmed up at full size, and left out of --quick
    options: dict = field(default_factory=dict)
    note: str = ""


def gemms(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Result:
    """The least work there is: logits, dh and dW as bare products, 4,096 rows at a time; nothing in between."""
    h, w = h.detach(), w.detach()
    for rows in h.split(4096):
        dz = rows @ w.t()
        dz @ w
        dz.t() @ rows
    return h.new_zeros(()), None, {}


def eager(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Result:
    nll = F.cross_entropy(F.linear(h, w), y, reduction="none")
    return (c * nll).sum(), -nll, {}


def eager_fp32(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Result:
    nll = F.cross_entropy(F.linear(h, w).float(), y, reduction="none")
    return (c * nll).sum(), -nll, {}


def eager_log_softmax(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Result:
    log_prob = F.log_softmax(F.linear(h, w), -1).gather(1, y[:, None]).squeeze(1)
    return -(c * log_prob).sum(), log_prob, {}


def torch_chunked(h: Tensor, w: Tensor, y: Tensor, c: Tensor, chunk: int = 0) -> Result:
    more = {"batch_chunk_size": chunk, "chunking_method": None} if chunk else {}
    options = torch.nn.LinearCrossEntropyOptions(**more)
    return F.linear_cross_entropy(h, w, y, options=options), None, {}


def cce(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Result:
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(h, w, y, reduction="none", impl="torch_compile")
    return (c * nll).sum(), -nll, {}


def liger_scaled(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Result:
    from liger_kernel.ops import LigerFusedLinearScaledCrossEntropyFunction

    nll = LigerFusedLinearScaledCrossEntropyFunction.apply(h, w, y)
    nll = nll[0] if isinstance(nll, tuple) else nll
    return (c * nll).sum(), -nll, {}


def liger_grpo(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Result:
    from liger_kernel.chunked_loss import LigerFusedLinearGRPOLoss

    loss = LigerFusedLinearGRPOLoss(beta=0.0, compiled=False, use_ref_model=False, loss_type="dapo")
    mask, advantage = torch.ones_like(y)[None], torch.ones(1)
    return loss(h[None], w, y[None], mask, advantage)[0], None, {}


@functools.cache
def _compiled():
    return torch.compile(lambda h, w, y: F.cross_entropy(F.linear(h, w), y, reduction="none"))


def eager_compiled(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Result:
    nll = _compiled()(h, w, y)
    return (c * nll).sum(), -nll, {}


def cce_kernel(h: Tensor, w: Tensor, y: Tensor, c: Tensor, filter_eps: str | None) -> Result:
    from cut_cross_entropy import linear_cross_entropy

    nll = linear_cross_entropy(h, w, y, reduction="none", impl="cce", filter_eps=filter_eps)
    return (c * nll).sum(), -nll, {}


def liger(h: Tensor, w: Tensor, y: Tensor, c: Tensor, **options) -> Result:
    from liger_kernel.ops.fused_linear_cross_entropy import LigerFusedLinearCrossEntropyFunction

    known = list(inspect.signature(LigerFusedLinearCrossEntropyFunction.forward).parameters.values())[4:]
    if unknown := set(options) - {p.name for p in known}:
        raise TypeError(f"this liger-kernel has no {', '.join(unknown)}")
    # a Function takes no keywords
    return (
        LigerFusedLinearCrossEntropyFunction.apply(h, w, y, *(options.get(p.name, p.default) for p in known))[0],
        None,
        {},
    )


def quack(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Result:
    from quack.linear_cross_entropy import chunked_linear_cross_entropy

    return chunked_linear_cross_entropy(h, w, y, reduction="mean"), None, {}


def trl(h: Tensor, w: Tensor, y: Tensor, c: Tensor) -> Result:
    from trl.kernels import ChunkedLogProbFunction

    # the defaults of TRL's fused head: tiles of 32,768 tokens of the vocabulary, no extra outputs
    log_prob = ChunkedLogProbFunction.apply(h, w, None, y, 1.0, 32768, None, 1.0, ())[0]
    return -(c * log_prob).sum(), log_prob, {}


def ours_nll(h: Tensor, w: Tensor, y: Tensor, c: Tensor, **options) -> Result:
    loss, rows = K.linear_weighted_nll(h, w, y, c, **options)
    return loss, rows.log_prob, rows.stats


def ours_log_prob(h: Tensor, w: Tensor, y: Tensor, c: Tensor, **options) -> Result:
    rows = K.linear_log_prob(h, w, y, **options)
    return -(c * rows.log_prob).sum(), rows.log_prob, rows.stats


def compressed(eps: int = 12, rank: int = 64) -> dict:
    """`eps`: the exponent of two, negated."""
    return {"grad": "compressed", "eps": 2.0**-eps, "rank": rank}


NLL, LOG_PROB = "linear_weighted_nll", "linear_log_prob"
IMPLS = {
    "gemms": Impl("three bare GEMMs", "mm", gemms, 3, note="bf16, nothing in between: a roofline, not a loss"),
    "eager": Impl("torch eager", "linear + cross_entropy", eager, 3, logits=6, note="bf16 logits"),
    "eager-fp32": Impl("torch eager, fp32 logits", "linear + cross_entropy", eager_fp32, 3, logits=14),
    "eager-log-softmax": Impl("torch eager", "linear + log_softmax + gather", eager_log_softmax, 3, logits=6),
    "torch-1024": Impl("torch chunked, 1,024 tokens", "F.linear_cross_entropy", torch_chunked, 3, weighted=False,
                       options={"chunk": 1024}, note="no per-token weights: mean"),
    "torch-auto": Impl("torch chunked, auto", "F.linear_cross_entropy", torch_chunked, 3, weighted=False,
                       note="no per-token weights: mean"),
    "cce": Impl("CCE torch_compile", "linear_cross_entropy", cce, 3, "cut_cross_entropy", logits=8, slow_start=True,
                note="its only CPU path; compile time left out"),
    "liger-scaled": Impl("Liger scaled CE", "LigerFusedLinearScaledCrossEntropy", liger_scaled, 4, "liger_kernel.ops",
                         note="its PyTorch fallback"),
    "liger-grpo": Impl("Liger chunked GRPO", "LigerFusedLinearGRPOLoss", liger_grpo, 4, "liger_kernel.chunked_loss",
                       weighted=False, note="one sequence of advantage 1 on policy: the gradient of the mean NLL; "
                       "its loss is -1"),
    "trl": Impl("TRL chunked log-prob", "ChunkedLogProbFunction", trl, 4, "trl.kernels"),
    "exact": Impl("longtrace exact", NLL, ours_nll, 3),
    "exact-log-prob": Impl("longtrace exact", LOG_PROB, ours_log_prob, 4),
    "compressed": Impl("longtrace compressed", NLL, ours_nll, 1.3, options=compressed()),
    "compressed-log-prob": Impl("longtrace compressed", LOG_PROB, ours_log_prob, 1.3, options=compressed()),
}  # fmt: skip
# error against cost, so the bound on the error is out of the way; the default (12, 64) is "compressed", with its bound
SWEEP = {
    f"compressed-{eps}-{rank}": Impl(
        "longtrace compressed",
        NLL,
        ours_nll,
        1.3,
        options=compressed(eps, rank) | {"target_error": 1.0},
        note="never falls back",
    )
    for eps in (10, 12, 14)
    for rank in (16, 64, 128)
    if (eps, rank) != (12, 64)
}
IMPLS |= SWEEP
# what needs CUDA, or Triton's interpreter (`make bench-gpu`)
GPU = {
    "eager-compiled": Impl("torch compiled", "linear + cross_entropy", eager_compiled, 3, logits=6, slow_start=True),
    "liger": Impl("Liger", "LigerFusedLinearCrossEntropy", liger, 3, "liger_kernel.ops", weighted=False,
                  note="no per-token weights: mean"),
    "liger-wide": Impl("Liger, our workspace, fp32 dW", "LigerFusedLinearCrossEntropy", liger, 3, "liger_kernel.ops",
                       weighted=False, options={"chunk_mem_const": 16, "accum_dtype": torch.float32}),
    "cce-exact": Impl("CCE exact", "linear_cross_entropy", cce_kernel, 4, "cut_cross_entropy",
                      options={"filter_eps": None}),
    "cce-filtered": Impl("CCE filtered", "linear_cross_entropy", cce_kernel, 2.2, "cut_cross_entropy",
                         options={"filter_eps": "high"}),
    "quack": Impl("QuACK", "chunked_linear_cross_entropy", quack, 3, "quack.linear_cross_entropy", weighted=False),
}  # fmt: skip
CORE = ["gemms", "eager", "exact", "exact-log-prob", "compressed", "compressed-log-prob"]


def missing(key: str) -> str | None:
    """Why this implementation cannot run here, in a sentence; None if it can. Imports it, and runs ours once, tiny."""
    impl = (IMPLS | GPU)[key]
    try:
        importlib.import_module(impl.needs)
    except Exception as error:
        return f"{impl.needs} does not import: {error}"
    if impl.run in (ours_nll, ours_log_prob):
        h, w = (torch.randn(n, 16).bfloat16().requires_grad_() for n in (4, 32))
        try:
            impl.run(h, w, torch.arange(4), torch.ones(4), **impl.options)[0].backward()
        except (TypeError, ValueError, NotImplementedError) as error:
            return f"refused by this build: {error}"
    return None


def run(key: str, h: Tensor, w: Tensor, y: Tensor, c: Tensor, *, between: Callable[[], None] = lambda: None) -> tuple:
    """Forward and backward once: (loss, log_probs or None, dh, dw, stats); `between` is called before the backward."""
    impl = (IMPLS | GPU)[key]
    h, w = h.detach().requires_grad_(), w.detach().requires_grad_()
    loss, log_prob, stats = impl.run(h, w, y, c, **impl.options)
    between()
    if loss.requires_grad:
        loss.backward()
    return loss.detach(), None if log_prob is None else log_prob.detach(), h.grad, w.grad, stats

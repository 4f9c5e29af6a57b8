"""What a run will take, before it starts: bytes by rehearsing one step on shapes alone, seconds from measured rates.

Memory is not guessed by formulas: the model is built on torch's meta device (shapes without data) and one packed row is
run forward and backward through it while every tensor that is alive is counted. So any architecture, LoRA and activation
checkpointing come out as they are. What it cannot see: the allocator's fragmentation and libraries' scratch space.
"""

from __future__ import annotations

import copy
import dataclasses
import functools
import time
import weakref
from collections.abc import Sequence
from contextlib import nullcontext
from dataclasses import dataclass

import torch
from rich.table import Table
from torch import nn
from torch.autograd.graph import saved_tensors_hooks
from torch.utils._python_dispatch import TorchDispatchMode
from torch.utils._pytree import tree_leaves
from transformers import AttentionInterface, AutoModelForCausalLM, PretrainedConfig

from longtrace.kernels import varlen_attention
from longtrace.kernels.attention.dispatch import choose as choose_attention
from longtrace.kernels.head.plan import plan_chunks
from longtrace.kernels.layers.dispatch import choose as choose_layers

from .config import TrainConfig
from .environment import memory_bytes
from .model import DTYPES, Model, add_lora, checkpoint_activations, fuse_layers

GB = 1e9
PROCESS_BYTES = {"cpu": 0.55e9, "cuda": 0.6e9}  # Python with torch and transformers imported; a CUDA context
ADAM_BYTES = {"adamw": 8, "adamw8bit": 2}  # two moments a trained parameter
CHECKPOINT_FROM = 1e9  # activations below this are never worth a recompute


@dataclass
class Rehearsal:
    """Bytes of one forward and backward over one packed row; weights, masters and optimizer state apart."""

    activations: int  # alive when the body's forward is done
    peak: int  # largest at any moment, gradients included


@dataclass
class Memory:
    """Bytes by purpose. Gradients and activations do not peak together, so `peak` is less than the sum."""

    weights: int
    masters: int
    optimizer: int
    gradients: int
    activations: int
    head: int
    process: int
    peak: int

    @property
    def held(self) -> int:
        """What stays from step to step."""
        return self.weights + self.masters + self.optimizer


@dataclass
class Estimate:
    """The plan of a run. `memory` is of the chosen checkpointing; the other one's peak is in `peaks`."""

    parameters: int
    trained: int
    checkpointing: bool
    memory: Memory
    peaks: dict[bool, int]  # by checkpointing
    flops_per_token: float
    flops_recomputed: float  # a token, with checkpointing
    peak_flops: float  # FLOP/s of a matmul here in the run's dtype; 0 = not measured
    seconds_per_token: float  # 0 = not measured


# ----------------------------------------------------------------------------------------------------------------------
# Memory


class _Alive(TorchDispatchMode):
    """Counts the bytes of all tensors made inside the block for as long as they live."""

    def __init__(self, known: nn.Module):
        super().__init__()
        self.seen = {p.untyped_storage()._cdata: None for p in [*known.parameters(), *known.buffers()]}
        self.now = self.peak = 0

    def _count(self, tensor: torch.Tensor) -> None:
        storage = tensor.untyped_storage()
        key, size = storage._cdata, storage.nbytes()
        if key in self.seen:
            return

        def gone(_):
            self.now -= size
            del self.seen[key]

        self.seen[key] = weakref.ref(storage, gone)
        self.now += size
        self.peak = max(self.peak, self.now)

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        out = function(*args, **(kwargs or {}))
        for leaf in tree_leaves(out):
            if isinstance(leaf, torch.Tensor):
                self._count(leaf)
        return out


# An op, so that activation checkpointing can keep what it returns as it keeps a real attention's.
_library = torch.library.Library("longtrace", "FRAGMENT")
_library.define("rehearsed_attention(Tensor q, Tensor v) -> (Tensor, Tensor)")


@torch.library.impl(_library, "rehearsed_attention", "Meta")
def _rehearsed_attention(q, v):
    sums = q.new_empty(*q.shape[:3], 2, dtype=torch.float32)  # log-sums and maxima
    return q.new_empty(q.shape[0], q.shape[2], q.shape[1], v.shape[3]), sums


class _FlashAttention(torch.autograd.Function):
    """Keeps what flash attention keeps: q, k, v, the output and the sums of a row and head."""

    @staticmethod
    def forward(ctx, q, k, v):
        out, sums = torch.ops.longtrace.rehearsed_attention(q, v)
        ctx.save_for_backward(q, k, v, out, sums)
        return out

    @staticmethod
    def backward(ctx, grad):
        return tuple(torch.empty_like(t) for t in ctx.saved_tensors[:3])


class _Head(torch.autograd.Function):
    """Allocates what `linear_weighted_nll` allocates: a chunk's workspace, fp32 gradients taken in the forward."""

    @staticmethod
    def forward(ctx, hidden, weight, budget_mb, device):
        chunks = plan_chunks(len(hidden), hidden.shape[1], len(weight), hidden.dtype, budget_mb, device)
        workspace = hidden.new_empty(chunks.workspace_bytes, dtype=torch.uint8)
        d_hidden = torch.empty_like(hidden, dtype=torch.float32)
        d_weight = torch.empty_like(weight, dtype=torch.float32) if weight.requires_grad else None
        ctx.save_for_backward(d_hidden, d_weight)
        ctx.dtype = hidden.dtype
        del workspace
        return hidden.new_empty(())

    @staticmethod
    def backward(ctx, upstream):
        return *(None if g is None else g.to(ctx.dtype) for g in ctx.saved_tensors), None, None


def _shape(x: torch.Tensor):
    return x.shape, x.stride(), x.dtype


def _empty(packed) -> torch.Tensor:
    shape, stride, dtype = packed
    return torch.empty_strided(shape, stride, dtype=dtype, device="meta")


def _attention(module, query, key, value, attention_mask, **kwargs):
    return _FlashAttention.apply(query, key, value), None


def _shapes(hf: PretrainedConfig, config: TrainConfig, checkpointing: bool, device: str = "cpu") -> Model:
    """The run's model on the meta device."""
    AttentionInterface.register("longtrace_rehearsal", _attention)
    with torch.device("meta"):
        net = AutoModelForCausalLM.from_config(
            copy.deepcopy(hf), dtype=DTYPES[config.dtype], attn_implementation="longtrace_rehearsal"
        )
        if config.lora_rank:
            net = add_lora(net, config)
    if choose_layers(device, DTYPES[config.dtype]).backend != "reference":
        fuse_layers(net)
    model = Model(net.train(), None, config.model, bool(config.lora_rank), "")
    for parameter in net.parameters():  # peft makes its adapters in fp32; the run computes in one dtype
        parameter.data = parameter.data.to(DTYPES[config.dtype])
    if checkpointing:
        checkpoint_activations(model)
    return model


def rehearse(
    model: Model,
    tokens: int,
    *,
    accumulate: bool = False,
    budget_mb: int | None = None,
    device: str = "cpu",
    offload: bool = False,
) -> Rehearsal:
    """One packed row of `tokens` through a model on the meta device.

    accumulate: gradients of earlier rows are held; offload: what is saved outside of checkpointed layers is elsewhere.
    """
    compute = next(model.hf.parameters()).dtype
    trained = [p for p in model.hf.parameters() if p.requires_grad]
    gradients: list[torch.Tensor] = []

    def keep(parameter: torch.Tensor) -> None:  # as model.Masters: widen to fp32, free the narrow one
        if not accumulate:
            gradients.append(parameter.grad.float())
        parameter.grad = None

    hooks = [p.register_post_accumulate_grad_hook(keep) for p in trained]
    ids = torch.zeros(1, tokens, dtype=torch.int64, device="meta")
    alive = _Alive(model.hf)
    with alive:
        if accumulate:
            gradients += [torch.empty_like(p, dtype=torch.float32) for p in trained]
        with saved_tensors_hooks(_shape, _empty) if offload else nullcontext():
            states = model.base.base_model(input_ids=ids, position_ids=ids, use_cache=False).last_hidden_state
        activations = alive.now - (4 * sum(p.numel() for p in trained) if accumulate else 0)
        hidden = states[0].clone()
        loss = _Head.apply(hidden, model.base.get_output_embeddings().weight.to(compute), budget_mb, device)
        loss.backward()
    for hook in hooks:
        hook.remove()
    return Rehearsal(activations, alive.peak)


def plan_memory(
    hf: PretrainedConfig, config: TrainConfig, *, checkpointing: bool, device: str = "cpu", model: Model | None = None
) -> Memory:
    """Bytes of a run of `config` (resolved: tokens_per_row and tokens_per_step set) on a model of this configuration.

    Weights are held in the compute dtype (2 bytes a parameter in bf16), fp32 masters (4; in fp32 the weights are their
    own), fp32 gradients (4) and optimizer state (8, or 2 in 8 bits) of the trained ones. `model`: a `_shapes` to reuse.
    """
    model = model or _shapes(hf, config, checkpointing, device)
    dtype = DTYPES[config.dtype]
    total = sum(p.numel() for p in model.hf.parameters())
    trained = sum(p.numel() for p in model.hf.parameters() if p.requires_grad)
    accumulate = config.tokens_per_step > config.tokens_per_row
    step = rehearse(
        model, config.tokens_per_row, accumulate=accumulate, budget_mb=config.head_budget_mb or None, device=device,
        offload=checkpointing and config.activation_checkpointing == "offload",
    )  # fmt: skip
    weight = model.base.get_output_embeddings().weight
    chunks = plan_chunks(
        config.tokens_per_row,
        weight.shape[1],
        len(weight),
        dtype,
        config.head_budget_mb or None,
        device,
        compressed=config.head_grad == "compressed",
    )
    head = chunks.workspace_bytes + 4 * weight.numel() * bool(weight.requires_grad)
    memory = Memory(
        weights=total * dtype.itemsize,
        masters=0 if dtype == torch.float32 else 4 * trained,
        optimizer=ADAM_BYTES[config.optimizer] * trained,
        gradients=4 * trained * config.gradient_buffers,
        activations=step.activations,
        head=head,
        process=int(PROCESS_BYTES[device]),
        peak=0,
    )
    other = memory.gradients - 4 * trained  # a second set is there from the first backward on
    memory.peak = memory.process + memory.held + max(step.peak + other, memory.gradients)
    return memory


def should_checkpoint(plain: Memory) -> bool:
    """The "auto" of --activation-checkpointing: activations outweigh all else that is held, and take more than 1 GB."""
    return plain.activations > max(plain.held + plain.gradients, CHECKPOINT_FROM)


# ----------------------------------------------------------------------------------------------------------------------
# Time


def flops(model: Model, lengths: Sequence[int], *, supervised: float = 1.0) -> tuple[float, float, float]:
    """FLOPs a token: (matmuls of body and head, attention), and what checkpointing adds, for documents of these lengths.

    Body: 2 forward, 2 to the inputs, 2 to the weights where they are trained, for each weight of a linear layer. Head: 6
    for each of its weights (4 when frozen) on supervised tokens. Attention: 12 x heads x head_dim for each (query, key)
    pair a causal mask or window lets see each other. MFU counts these, never what is computed twice.
    """
    head = model.base.get_output_embeddings()
    linear = [m.weight for m in model.hf.modules() if isinstance(m, nn.Linear) and m is not head]
    body = sum(4 * w.numel() + 2 * w.numel() * w.requires_grad for w in linear)
    top = (4 + 2 * head.weight.requires_grad) * head.weight.numel() * supervised

    text = model.base.config.get_text_config()
    n = torch.as_tensor([int(length) for length in lengths], dtype=torch.float64)
    width = text.num_attention_heads * (getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads)
    kinds = getattr(text, "layer_types", None) or ["full_attention"] * text.num_hidden_layers
    pairs = 0.0
    for kind in kinds:
        reach = n.clamp(max=text.sliding_window) if kind == "sliding_attention" and text.sliding_window else n
        pairs += float((reach * (n - reach / 2)).sum() / n.sum())
    attention = 12 * width * pairs
    backend = choose_attention(model.device.type, model.base.dtype).name  # checkpointing keeps what an op returned
    kept = backend in ("tiles", "flash_attn", "torch_varlen")
    return body + top, attention, sum(2 * w.numel() for w in linear) + attention / 3 * (not kept)


def measure_matmul_peak(dtype: torch.dtype, device: str = "cpu", seconds: float = 0.3) -> float:
    """FLOP/s of the best of repeated square matmuls in this dtype on this device, measured for about `seconds`."""
    return _matmul_peak(dtype, device, seconds)


@functools.cache
def _matmul_peak(dtype: torch.dtype, device: str, seconds: float) -> float:
    n = 8192 if device == "cuda" else 1024
    a, b = torch.ones(n, n, dtype=dtype, device=device), torch.ones(n, n, dtype=dtype, device=device)
    return 2 * n**3 / _best_time(lambda: torch.mm(a, b), device, seconds)


@functools.cache
def measure_attention(heads: int, kv_heads: int, head_dim: int, dtype: torch.dtype, device: str = "cpu") -> float:
    """FLOP/s of causal attention, forward and backward, on one document of 1,024 tokens (4,096 on CUDA)."""
    n = 4096 if device == "cuda" else 1024
    q, k, v = (torch.ones(n, h, head_dim, dtype=dtype, device=device) for h in (heads, kv_heads, kv_heads))
    offsets = torch.tensor([0, n], device=device)
    for t in (q, k, v):
        t.requires_grad_()

    def step():
        out = varlen_attention(q, k, v, offsets, n)
        torch.autograd.grad(out, (q, k, v), torch.ones_like(out))

    return 12 * heads * head_dim * n * n / 2 / _best_time(step, device, 0.3)


def _best_time(step, device: str, seconds: float) -> float:
    """Seconds of the fastest of the runs that fit into `seconds`; the first warms up."""
    wait = torch.cuda.synchronize if device == "cuda" else lambda: None
    best, end = float("inf"), None
    while end is None or time.perf_counter() < end or best == float("inf"):
        begin = time.perf_counter()
        step()
        wait()
        if end is None:
            end = time.perf_counter() + seconds
        else:
            best = min(best, time.perf_counter() - begin)
    return best


# ----------------------------------------------------------------------------------------------------------------------
# The plan of a run


def estimate(
    model: Model, config: TrainConfig, lengths: Sequence[int], *, supervised: float = 1.0, measure: bool = True
) -> Estimate:
    """Plans a run: memory with and without checkpointing, FLOPs, rates measured here (about 0.6 s, once a process).

    `config` is resolved (tokens_per_row, tokens_per_step); `lengths`: tokens of each training document;
    `supervised`: share of the tokens that are targets (the head sees no others).
    """
    device = model.device.type
    hf = model.base.config
    memories = {on: plan_memory(hf, config, checkpointing=on, device=device) for on in (False, True)}
    asked = config.activation_checkpointing
    checkpointing = should_checkpoint(memories[False]) if asked == "auto" else asked != "off"
    matmuls, attention, recompute = flops(model, lengths, supervised=supervised)
    peak = seconds = 0.0
    if measure:
        text, dtype = hf.get_text_config(), DTYPES[config.dtype]
        kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
        head_dim = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
        with torch.autocast(device, enabled=False) if device == "cuda" else nullcontext():
            peak = measure_matmul_peak(dtype, device)
            rate = measure_attention(text.num_attention_heads, kv_heads, head_dim, dtype, device)
        seconds = (matmuls + recompute * checkpointing) / peak + attention / rate
    return Estimate(
        parameters=sum(p.numel() for p in model.hf.parameters()),
        trained=sum(p.numel() for p in model.hf.parameters() if p.requires_grad),
        checkpointing=checkpointing,
        memory=memories[checkpointing],
        peaks={on: memory.peak for on, memory in memories.items()},
        flops_per_token=matmuls + attention,
        flops_recomputed=recompute,
        peak_flops=peak,
        seconds_per_token=seconds,
    )


def table(config: TrainConfig, model: Model, source, steps: int, estimate: Estimate) -> Table:
    """The plan as a table to print: model, rows and steps, memory by purpose, time. `source`: a TraceSource."""
    grid = Table(
        title="Plan", title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 3, 0, 0)
    )
    grid.add_column(style="bold")
    grid.add_column()
    m, text = estimate.memory, model.base.config.get_text_config()
    trained = "all trained" if estimate.trained == estimate.parameters else f"{estimate.trained:,} trained"
    grid.add_row(
        "model", f"{model.source}: {estimate.parameters:,} parameters, {trained}; {text.num_hidden_layers} layers"
    )
    if model.rope:
        grid.add_row("context", model.rope)
    grid.add_row(
        "rows",
        f"{len(source.documents):,} documents in {source.rows_per_epoch:,} rows of {config.tokens_per_row:,} tokens, "
        f"{100 * source.fill:.1f} % full",
    )
    grid.add_row(
        "steps",
        f"{steps:,} of {config.tokens_per_step:,} tokens ({source.rows_per_step} row{'s' * (source.rows_per_step > 1)}), "
        f"{steps * source.rows_per_step / source.rows_per_epoch:.2f} epochs",
    )
    state = "8-bit AdamW state" if config.optimizer == "adamw8bit" else "AdamW state"
    parts = {
        f"{config.dtype} weights": m.weights,
        "fp32 masters": m.masters,
        state: m.optimizer,
        "fp32 gradients": m.gradients,
        "activations": m.activations,
        "head": m.head,
        "process": m.process,
    }
    grid.add_row("memory", f"about {size_text(m.peak)} at the peak" + against(m.peak, model.device))
    grid.add_row("", ", ".join(f"{name} {size_text(size)}" for name, size in parts.items() if size))
    other = estimate.peaks[not estimate.checkpointing]
    how, offload = "on" if estimate.checkpointing else "off", config.activation_checkpointing == "offload"
    grid.add_row(
        "",
        f"activation checkpointing {how}{', inputs of layers in host memory' * offload} "
        f"({size_text(other)} with it {'off' if how == 'on' else 'on'})",
    )
    if estimate.seconds_per_token:
        step_seconds = estimate.seconds_per_token * config.tokens_per_step * source.fill
        grid.add_row(
            "time",
            f"at least {seconds_text(step_seconds)} a step, {seconds_text(step_seconds * steps)} in all: "
            f"{estimate.flops_per_token / 1e9:.3g} GFLOP a token at the rates measured here "
            f"({estimate.peak_flops / 1e9:,.0f} GFLOP/s matmul in {config.dtype}), nothing else counted",
        )
    return grid


def size_text(size: float) -> str:
    if size < 0.1 * GB:
        return f"{size / 1e6:.3g} MB"
    return f"{size / GB:.2f} GB" if size < 10 * GB else f"{size / GB:.1f} GB"


def seconds_text(seconds: float) -> str:
    if seconds < 90:
        return f"{seconds:.2g} s" if seconds < 10 else f"{seconds:.0f} s"
    return f"{seconds / 60:.1f} min" if seconds < 5400 else f"{seconds / 3600:.1f} h"


def against(peak: float, device: torch.device) -> str:
    """What the device has, and a warning when the peak does not fit."""
    has = torch.cuda.get_device_properties(device).total_memory if device.type == "cuda" else memory_bytes()
    if not has:
        return ""
    return f" of {size_text(has)}" + ("; does not fit: lower --tokens-per-row" if peak > has else "")


def gpu_fit(hf: PretrainedConfig, config: TrainConfig, gigabytes: Sequence[int] = (24, 40, 80)) -> list[dict]:
    """Which settings of a run fit on one GPU of so much memory, by the estimate (untimed; 8 % kept for fragmentation).

    One dict for each of: full training with AdamW and 8-bit AdamW, LoRA of rank 16; all with activation checkpointing.
    """
    rows = []
    for name, changes in {
        "full, AdamW": {"optimizer": "adamw", "lora_rank": 0},
        "full, 8-bit AdamW": {"optimizer": "adamw8bit", "lora_rank": 0},
        "LoRA, rank 16": {"optimizer": "adamw", "lora_rank": 16},
    }.items():
        memory = plan_memory(hf, dataclasses.replace(config, **changes), checkpointing=True, device="cuda")
        fits = [size for size in gigabytes if 1.08 * memory.peak <= size * 2**30]
        rows.append({"setting": name, "peak_gb": memory.peak / GB, "fits_gb": fits})
    return rows

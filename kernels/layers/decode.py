"""One decoding step through the layers of a patched Llama, Mistral, Qwen2 or Qwen3: eleven ops a layer, no modules.

A step of decoding is a few rows through every weight, and the modules of transformers take longer to call than the rows to
compute. The weights are packed once, those that share an input together; the numbers are those of the patched modules.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from longtrace.kernels.linear import PackedLinear, packs

FAMILIES = ("llama", "mistral", "qwen2", "qwen3")
FAR = 2**40  # an open window
KINDS = ("layer", "rotary", "norm", "swiglu", "geglu")

ops = torch.ops.longtrace


@dataclass
class _Norm:
    weight: Tensor
    eps: float

    @classmethod
    def of(cls, module: nn.Module) -> _Norm:
        return cls(module.weight.detach(), module.variance_epsilon)

    def __call__(self, x: Tensor, residual: Tensor | None = None) -> tuple[Tensor, Tensor]:
        y, total, _ = ops.rms_norm(x, residual, self.weight, self.eps, 0.0)
        return y, x if residual is None else total


@dataclass
class _Layer:
    before: _Norm
    qkv: PackedLinear
    norms: tuple[_Norm, _Norm] | None  # of each head's query and key (Qwen3)
    out: PackedLinear
    after: _Norm
    gate_up: PackedLinear
    gelu: bool
    down: PackedLinear
    number: int  # of its caches
    width: int  # of a head
    kv_heads: int
    scale: float
    window: int  # keys before a query's own

    @classmethod
    def of(cls, layer: nn.Module) -> _Layer:
        attention, mlp = layer.self_attn, layer.mlp
        window = getattr(attention, "sliding_window", None)
        if attention.config.model_type == "mistral":
            window = getattr(attention.config, "sliding_window", None)
        return cls(
            _Norm.of(layer.input_layernorm),
            _packed(attention.q_proj, attention.k_proj, attention.v_proj),
            (_Norm.of(attention.q_norm), _Norm.of(attention.k_norm)) if hasattr(attention, "q_norm") else None,
            _packed(attention.o_proj),
            _Norm.of(layer.post_attention_layernorm),
            _packed(mlp.gate_proj, mlp.up_proj),
            type(mlp)._longtrace_kind == "geglu",
            _packed(mlp.down_proj),
            attention.layer_idx,
            attention.head_dim,
            attention.k_proj.out_features // attention.head_dim,
            attention.scaling,
            FAR if window is None else window - 1,
        )

    def __call__(self, x, residual, cos, sin, at, starts_q, starts_k, keys, values) -> tuple[Tensor, Tensor]:
        """What the layer adds, and what it adds to."""
        x, residual = self.before(x, residual)
        heads = self.qkv(x).view(len(x), -1, self.width)
        q, k, v = heads.split([heads.shape[1] - 2 * self.kv_heads, self.kv_heads, self.kv_heads], 1)
        if self.norms:
            q, k = (norm(h.reshape(-1, self.width))[0].view(h.shape) for norm, h in zip(self.norms, (q, k)))
        q, k = ops.rope(q, k, cos, sin, cos.shape[1], False)
        keys.index_copy_(0, at, k)
        values.index_copy_(0, at, v)
        seen = ops.attention_decode(q, keys, values, starts_q, starts_k, self.scale, 0.0, self.window, None)
        x, residual = self.after(self.out(seen.view(len(x), -1)), residual)
        gate, up = self.gate_up(x).chunk(2, 1)
        return self.down(ops.glu(gate, up, self.gelu)), residual


class DecodeStack:
    """The body of a causal language model, its weights as they are now packed for decoding (a second copy of them)."""

    def __init__(self, body: nn.Module):
        self.embed, self.rotary = body.embed_tokens, body.rotary_emb
        self.layers = [_Layer.of(layer) for layer in body.layers[: body.config.num_hidden_layers]]
        self.norm = _Norm.of(body.norm)

    @staticmethod
    def serves(body: nn.Module) -> bool:
        """Whether `body` (a model without its head) is known through and through: patched, and nothing put on top."""
        family = body.config.model_type
        if family not in FAMILIES or type(body).forward.__module__ != f"transformers.models.{family}.modeling_{family}":
            return False
        layers = list(body.layers)
        known = [body.norm, *(m for layer in layers for m in layer.modules())]
        return (
            not _hooked(body)
            and type(body.embed_tokens) is nn.Embedding
            and all(_plain(m) for m in known)
            and all(type(m) is nn.Linear for layer in layers for m in _linears(layer))
            and len({p.dtype for p in body.parameters()}) == 1
            and packs(*(m.weight for layer in layers for m in _linears(layer)))
        )

    def __call__(
        self, ids: Tensor, positions: Tensor, at: Tensor, starts_q: Tensor, starts_k: Tensor, keys: dict, values: dict
    ) -> Tensor:
        """(n, H) final hidden states of one token each for n documents.

        ids, positions (n,) int64; keys, values: for each layer (rows, kv heads, D) caches, written at rows `at` (n,);
        starts_q, starts_k (documents + 1,) int64: the documents' queries (one or none each) and keys, the last being its own.
        """
        x, residual = self.embed(ids), None
        cos, sin = (each[0] for each in self.rotary(x[None], positions[None]))
        for layer in self.layers:
            own = keys[layer.number], values[layer.number]
            x, residual = layer(x, residual, cos, sin, at, starts_q, starts_k, *own)
        return self.norm(x, residual)[0]


def _packed(*modules: nn.Linear) -> PackedLinear:
    return PackedLinear([m.weight for m in modules], [m.bias for m in modules])


def _hooked(module: nn.Module) -> bool:
    return "forward" in vars(module) or bool(module._forward_hooks or module._forward_pre_hooks)


def _linears(layer: nn.Module) -> list[nn.Module]:
    attention, mlp = layer.self_attn, layer.mlp
    return [
        attention.q_proj,
        attention.k_proj,
        attention.v_proj,
        attention.o_proj,
        mlp.gate_proj,
        mlp.up_proj,
        mlp.down_proj,
    ]


def _plain(module: nn.Module) -> bool:
    """A patched module, a linear layer of torch or an activation, with its class's forward and no hooks."""
    if _hooked(module):
        return False
    if type(module) is nn.Linear or vars(type(module)).get("_longtrace_kind") in KINDS:  # not a class put on top of it
        return True
    return not any(True for found in (module.parameters(), module.buffers(), module.children()) for _ in found)

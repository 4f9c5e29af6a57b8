"""`patch(model)`: fused layers in a transformers model, by changing the class of its modules; `unpatch` changes it back.

A patched module is an instance of a subclass of its own class, under the same name, that differs in `forward` alone.
Nothing global changes, no attribute is added to a module, and isinstance, hooks, adapters, state_dict, save_pretrained
and gradient checkpointing (which transformers ties to the class) see what they saw before.
"""

from __future__ import annotations

import functools
import inspect
import types
from dataclasses import dataclass

from torch import Tensor, nn

from longtrace.kernels.attention.transformers import NAME, register_attention
from longtrace.kernels.layers.dispatch import geglu, rms_norm, rope, swiglu

OFFSETS = {"llama": 0.0, "mistral": 0.0, "qwen2": 0.0, "qwen3": 0.0, "gemma": 1.0, "gemma2": 1.0, "gemma3": 1.0}
KINDS = ("RMSNorm", "MLP", "Attention", "DecoderLayer")  # how the classes' names end
LLAMA_LAYER = {"input_layernorm", "self_attn", "post_attention_layernorm", "mlp"}


@dataclass(frozen=True)
class Patched:
    """What `patch` replaced in a model, counted in its modules."""

    norms: int
    fused_norms: int  # of these, norms that take the residual add with them
    gated: int  # act(gate) * up
    rotary: int
    attention: str | None  # the attention implementation set, if any
    left: tuple[str, ...]  # modules of these kinds that stay as they are, and why

    def __str__(self) -> str:
        done = (
            f"{self.norms} norms ({self.fused_norms} with the residual add), {self.gated} gated activations, "
            f"{self.rotary} rotary embeddings, attention {self.attention or 'as it was'}"
        )
        return done + (f"; left as they are: {', '.join(self.left)}" if self.left else "")


def patch(model: nn.Module, *, attention: bool = True) -> nn.Module:
    """Put the fused layers into a Llama, Mistral, Qwen2, Qwen3, Gemma, Gemma2 or Gemma3 model of transformers, in place.

    RMSNorm, act(gate) * up of the MLP, the rotary embedding, and, in layers of Llama's shape, the residual add with the
    norm after it; with `attention` also `attn_implementation="longtrace"` (packed rows, no padding). The model may be
    wrapped (peft, a classifier), trained, checkpointed or generated from as before. Modules of other classes stay as
    they are: `patched(model)` counts and names them. A second call changes nothing.
    Returns: the model. Raises: ValueError if it has nothing to replace.
    """
    for module in list(model.modules()):
        kind, _ = _kind(module)
        if kind and kind != "layer":
            _swap(module, kind)
    for module in list(model.modules()):  # now that the norms take a residual
        if _kind(module)[0] == "layer":
            _swap(module, "layer")
    if not any(_is_patched(m) for m in model.modules()):
        raise ValueError(
            f"{type(model).__name__} has nothing to replace; accepted: transformers models of {', '.join(OFFSETS)}"
        )
    if attention:
        _set_attention(model)
    return model


def unpatch(model: nn.Module) -> nn.Module:
    """Undo `patch`: every module its own class again, every config its own attention. Returns the model."""
    for module in model.modules():
        if "_longtrace_kind" in vars(type(module)):  # not a class that something else has put on top since
            module.__class__ = type(module)._longtrace_original
        for config, implementation in module.__dict__.pop("_longtrace_attention", ()):
            config._attn_implementation_internal = implementation
    return model


def patched(model: nn.Module) -> Patched:
    """What is replaced in `model` now; all zeros if it was never patched."""
    kinds = [type(m)._longtrace_kind for m in model.modules() if _is_patched(m)]
    left = []
    for name, module in model.named_modules():
        kind, why = _kind(module)
        if not _is_patched(module) and (kind or why):
            left.append(f"{name} ({why or 'not patched'})")
    attention = NAME if any("_longtrace_attention" in m.__dict__ for m in model.modules()) else None
    gated = kinds.count("swiglu") + kinds.count("geglu")
    return Patched(kinds.count("norm"), kinds.count("layer"), gated, kinds.count("rotary"), attention, tuple(left))


def _is_patched(module: nn.Module) -> bool:
    return hasattr(type(module), "_longtrace_kind")


def _kind(module: nn.Module) -> tuple[str | None, str]:
    """(what this module would be patched as, or None; why not, "" for a module that is of no interest)."""
    cls = type(module)
    suffix = next((k for k in KINDS if cls.__name__.endswith(k)), None)
    if suffix is None or _is_patched(module):
        return None, ""
    owner = next(c for c in cls.__mro__ if "forward" in vars(c))
    forward, family = owner.forward, owner.__module__.split(".")[-1].removeprefix("modeling_")
    if family not in OFFSETS or owner.__module__ != f"transformers.models.{family}.modeling_{family}":
        return None, f"{cls.__name__} is not known"
    if "forward" in vars(module) or (forward.__module__, forward.__qualname__) != (
        owner.__module__,
        f"{owner.__name__}.forward",
    ):
        return None, "its forward is replaced already"
    if suffix == "RMSNorm":
        return "norm", ""
    if suffix == "MLP":
        kind = _activation(module.act_fn)
        return kind, "" if kind else f"activation {type(module.act_fn).__name__}"
    if suffix == "Attention":
        known = isinstance(forward, types.FunctionType) and "apply_rotary_pos_emb" in forward.__code__.co_names
        return ("rotary", "") if known else (None, "no apply_rotary_pos_emb in its forward")
    if {name for name, _ in module.named_children()} != LLAMA_LAYER:
        return None, ""  # Gemma2 and Gemma3 norm the branch before the add: nothing to fuse, their norms are patched
    norm = module.post_attention_layernorm
    if _is_patched(norm) or _kind(norm)[0]:
        return "layer", ""
    return None, "its norm is not known"


def _activation(act: nn.Module) -> str | None:
    if type(act).__name__ in ("SiLU", "SiLUActivation"):
        return "swiglu"
    tanh = type(act).__name__ in ("GELUTanh", "PytorchGELUTanh") or getattr(act, "approximate", None) == "tanh"
    return "geglu" if tanh else None


def _swap(module: nn.Module, kind: str) -> None:
    module.__class__ = _subclass(type(module), kind)


@functools.cache
def _subclass(original: type, kind: str) -> type:
    """The class of patched instances of `original`; pickles by its original."""
    make = {"norm": _norm_forward, "layer": _layer_forward, "rotary": _attention_forward}.get(kind, _mlp_forward)
    namespace = {
        "forward": make(original, kind),
        "__reduce_ex__": _reduce,
        "__module__": original.__module__,
        "__qualname__": original.__qualname__,
        "__doc__": original.__doc__,
        "_longtrace_original": original,
        "_longtrace_kind": kind,
    }
    return type(original)(original.__name__, (original,), namespace)


def _reduce(self, protocol):
    """Pickles as (original class, kind) and the state of the module; the class itself has no name to be found by."""
    cls = type(self)
    _, _, *state = super(cls, self).__reduce_ex__(max(2, protocol))
    return (_rebuild, (cls._longtrace_original, cls._longtrace_kind), *state)


def _rebuild(original: type, kind: str) -> nn.Module:
    register_attention()  # the unpickled config may name it
    cls = _subclass(original, kind)
    return cls.__new__(cls)


def _norm_forward(original: type, kind: str):
    family = next(c for c in original.__mro__ if "forward" in vars(c)).__module__.rpartition("_")[2]
    offset = OFFSETS[family]
    epsilon = "eps" if offset else "variance_epsilon"

    def forward(self, hidden_states: Tensor, residual: Tensor | None = None):
        """The norm of hidden_states (+ residual, then also the sum)."""
        return rms_norm(hidden_states, self.weight, getattr(self, epsilon), residual=residual, offset=offset)

    return forward


def _mlp_forward(original: type, kind: str):
    act = {"swiglu": swiglu, "geglu": geglu}[kind]

    def forward(self, x: Tensor) -> Tensor:
        return self.down_proj(act(self.gate_proj(x), self.up_proj(x)))

    return forward


def _layer_forward(original: type, kind: str):
    named = list(inspect.signature(original.forward).parameters.values())[2:]
    named = [p for p in named if p.kind is inspect.Parameter.POSITIONAL_OR_KEYWORD]
    names, defaults = [p.name for p in named], {p.name: p.default for p in named if p.default is not p.empty}

    def forward(self, hidden_states: Tensor, *args, **kwargs) -> Tensor:
        residual = hidden_states
        kwargs = {**defaults, **dict(zip(names, args)), **kwargs}
        hidden_states, _ = self.self_attn(hidden_states=self.input_layernorm(hidden_states), **kwargs)
        norm = self.post_attention_layernorm
        if norm._forward_hooks or norm._forward_pre_hooks:  # they see one tensor in and one out, as ever
            residual = residual + hidden_states
            hidden_states = norm(residual)
        else:
            hidden_states, residual = norm(hidden_states, residual)
        return residual + self.mlp(hidden_states)

    return forward


def _attention_forward(original: type, kind: str):
    """The class's own forward, with our rotary embedding for its module's."""
    own = next(c for c in original.__mro__ if "forward" in vars(c)).forward
    scope = {**own.__globals__, "apply_rotary_pos_emb": apply_rotary_pos_emb}
    del scope["__name__"]  # torch.compile would look names up in the module of that name
    forward = types.FunctionType(own.__code__, scope, own.__name__, own.__defaults__, own.__closure__)
    forward.__kwdefaults__, forward.__doc__ = own.__kwdefaults__, own.__doc__
    return forward


def apply_rotary_pos_emb(
    q: Tensor, k: Tensor, cos: Tensor, sin: Tensor, unsqueeze_dim: int = 1
) -> tuple[Tensor, Tensor]:
    """transformers' signature: q (B, heads, T, D), k (B, kv heads, T, D), cos and sin (B or 1, T, rotary_dim)."""
    if unsqueeze_dim != 1:
        raise ValueError(f"unsqueeze_dim must be 1 (heads before tokens), got {unsqueeze_dim}")
    batch, _, length, _ = q.shape
    cos, sin = (x.expand(batch, -1, -1).reshape(batch * length, x.shape[-1]) for x in (cos, sin))
    # projections lie in memory token by token, so these are views
    flat = [x.transpose(1, 2).reshape(batch * length, x.shape[1], x.shape[3]) for x in (q, k)]
    turned = rope(*flat, cos, sin)
    return tuple(x.view(batch, length, x.shape[1], x.shape[2]).transpose(1, 2) for x in turned)


def _configs(model) -> list:
    """The configs of a transformers model, of the models inside it, and their sub-configs, each once."""
    from transformers import PreTrainedModel

    found, todo = {}, [m.config for m in model.modules() if isinstance(m, PreTrainedModel)]
    while todo:
        config = todo.pop()
        if id(config) not in found:
            found[id(config)] = config
            todo += [c for key in config.sub_configs if (c := getattr(config, key, None)) is not None]
    return list(found.values())


def _set_attention(model: nn.Module) -> None:
    from transformers import PreTrainedModel

    root = next((m for m in model.modules() if isinstance(m, PreTrainedModel)), None)
    if root is None or any("_longtrace_attention" in m.__dict__ for m in model.modules()):
        return
    register_attention()
    before = [(config, config._attn_implementation_internal) for config in _configs(root)]
    root.set_attn_implementation(NAME)
    root.__dict__["_longtrace_attention"] = before

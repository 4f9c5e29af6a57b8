"""Loads a Hugging Face causal language model for packed training: body, head, tokenizer, adapters, fp32 masters."""

from __future__ import annotations

import contextlib
import json
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

import torch
from safetensors import SafetensorError
from torch import nn
from torch.autograd.graph import save_on_cpu
from torch.utils.checkpoint import CheckpointPolicy, create_selective_checkpoint_contexts
from transformers import (
    AutoConfig,
    AutoModelForCausalLM,
    AutoTokenizer,
    GenerationConfig,
    PreTrainedModel,
    PreTrainedTokenizerBase,
)

from longtrace import kernels as K

from .config import Refusal, TrainConfig
from .environment import return_freed_memory
from .rope import extend_rope
from .source import IGNORE, PackedBatch

SAFE = {"trust_remote_code": False, "use_safetensors": True}  # no code and no pickle from a model folder
ATTENTION_OPS = {  # forwards that activation checkpointing keeps; others (Triton, SDPA) are recomputed
    "longtrace::attention_forward",
    "longtrace::rehearsed_attention",
    "flash_attn::_flash_attn_varlen_forward",
    "torch_attn::_varlen_attn",
}
DTYPES = {"bf16": torch.bfloat16, "fp32": torch.float32}


@dataclass
class Head:
    """The vocabulary projection: log p = log_softmax(softcap(logit_scale * h.w + b))."""

    weight: torch.Tensor  # (V, H)
    bias: torch.Tensor | None  # (V,)
    logit_scale: float
    softcap: float | None


@dataclass
class Model:
    """A causal language model taken apart the way the loop uses it."""

    hf: PreTrainedModel  # or the peft wrapper around it
    tokenizer: PreTrainedTokenizerBase
    source: str
    lora: bool
    rope: str  # what became of the context window
    offload: bool = False  # what the forward saves outside of checkpointed layers, their inputs, waits in host memory

    @property
    def base(self) -> PreTrainedModel:
        return self.hf.get_base_model() if self.lora else self.hf

    @property
    def device(self) -> torch.device:
        return next(self.hf.parameters()).device

    def head(self) -> Head:
        """The head as plain tensors; read anew at every use, since the weights change in place."""
        return head_of(self.base)

    def hidden(self, batch: PackedBatch) -> torch.Tensor:
        """(N, H) final hidden states at the supervised positions of the packed row."""
        with save_on_cpu(pin_memory=self.device.type == "cuda") if self.offload else contextlib.nullcontext():
            states = self.base.base_model(
                input_ids=batch.input_ids[None],
                position_ids=batch.position_ids[None],
                use_cache=False,
                cu_seq_lens_q=batch.cu_seqlens,
                cu_seq_lens_k=batch.cu_seqlens,
                max_length_q=batch.max_seqlen,
                max_length_k=batch.max_seqlen,
            ).last_hidden_state
        return states[0][batch.labels != IGNORE]


def head_of(hf: PreTrainedModel) -> Head:
    """The vocabulary projection of a model as plain tensors. Raises Refusal where it is not an nn.Linear."""
    output, config = hf.get_output_embeddings(), hf.config.get_text_config()
    if not isinstance(output, nn.Linear):
        raise Refusal(
            f"the output head is a {type(output).__name__}; the fused head takes a plain nn.Linear: merge adapters first"
        )
    scale = getattr(config, "logit_scale", None) or 1.0 / (getattr(config, "logits_scaling", None) or 1.0)
    return Head(output.weight, output.bias, scale, getattr(config, "final_logit_softcapping", None))


def load_tokenizer(source: str) -> PreTrainedTokenizerBase:
    with _refusing(source, "tokenizer"):
        return AutoTokenizer.from_pretrained(source, trust_remote_code=False)


def load_model(config: TrainConfig) -> Model:
    """Loads model and tokenizer, extends the context, adds adapters, turns packed attention on.

    Parameters are held in the compute dtype; `Masters` keeps the fp32 originals. Raises Refusal for a missing or
    unsuitable model folder.
    """
    torch.manual_seed(config.seed)  # adapters are drawn here
    return_freed_memory()
    tokenizer = load_tokenizer(config.model)
    with _refusing(config.model, "model"):
        hf_config = AutoConfig.from_pretrained(config.model, trust_remote_code=False)
    if getattr(hf_config, "quantization_config", None):
        raise Refusal(
            f"{config.model}: quantised weights cannot be trained here (no QLoRA); pass the unquantised model"
        )
    if getattr(hf_config.get_text_config(), "attention_dropout", 0):
        raise Refusal(f"{config.model}: packed attention has no dropout; set attention_dropout to 0 in its config.json")
    rope = extend_rope(hf_config.get_text_config(), config.max_tokens, config.rope)
    K.register_attention()
    with _refusing(config.model, "model"):
        # the file's own dtype: a bf16 load would round fp32 weights before the masters are taken
        hf = AutoModelForCausalLM.from_pretrained(
            config.model, config=hf_config, dtype="auto", attn_implementation="longtrace", **SAFE
        )
    rows = hf.get_input_embeddings().weight.shape[0]
    if len(tokenizer) > rows:
        raise Refusal(
            f"{config.model}: the tokenizer has {len(tokenizer):,} entries, the embedding only {rows:,}; resize it first"
        )
    if config.lora_rank:
        hf = add_lora(hf, config)
    fuse_layers(hf)
    hf.to(choose_device(config.device))
    hf.train()
    return Model(hf, tokenizer, config.model, bool(config.lora_rank), rope)


def fuse_layers(hf: PreTrainedModel) -> None:
    """Fused norms, gated activations and rotary embeddings where the model's family is known; others stay as they are."""
    with contextlib.suppress(ValueError):  # nothing to replace
        K.patch(hf, attention=False)


def load_trained(source: str, dtype: torch.dtype | str = "auto") -> PreTrainedModel:
    """The model of a folder or hub name; for a folder of LoRA adapters, its base with the adapters on (unmerged)."""
    adapter = Path(source) / "adapter_config.json"
    if not adapter.exists():
        with _refusing(source, "model"):
            return AutoModelForCausalLM.from_pretrained(source, dtype=dtype, **SAFE)
    try:
        from peft import PeftModel
    except ImportError as error:
        raise Refusal(f"{source} holds LoRA adapters and needs peft: pip install 'longtrace[lora]'") from error
    base = json.loads(adapter.read_bytes())["base_model_name_or_path"]
    with _refusing(base, f"base model of {source}"):
        # a config.json beside adapters says that the run extended the base's context
        hf_config = AutoConfig.from_pretrained(
            source if (Path(source) / "config.json").exists() else base, trust_remote_code=False
        )
        model = AutoModelForCausalLM.from_pretrained(base, config=hf_config, dtype=dtype, **SAFE)
        if (Path(source) / "generation_config.json").exists():  # where generation stops, as the run learned it
            model.generation_config = GenerationConfig.from_pretrained(source)
    with _refusing(source, "adapters"):
        return PeftModel.from_pretrained(model, source, use_safetensors=True)


def load_for_generation(
    source: str, device: torch.device, dtype: torch.dtype | str = "auto"
) -> tuple[PreTrainedModel, PreTrainedTokenizerBase]:
    """Model (merged, if the folder holds LoRA adapters) and tokenizer, ready for `generate`."""
    tokenizer, model = load_tokenizer(source), load_trained(source, dtype)
    model = model.merge_and_unload() if hasattr(model, "merge_and_unload") else model
    return model.to(device).eval(), tokenizer


def choose_device(device: str) -> torch.device:
    if device == "cuda" and not torch.cuda.is_available():
        raise Refusal("--device cuda: torch sees no CUDA device; `longtrace doctor` says why")
    return torch.device("cuda" if device == "cuda" or (device == "auto" and torch.cuda.is_available()) else "cpu")


@torch.no_grad()
def check_model(model: Model) -> None:
    """Two facts the trainer rests on, tried on a few tokens of this very model before any data is read.

    Documents of a packed row do not see each other: changing the first leaves the second's hidden states as they were.
    And our head is the model's: same log-probabilities from our formula and from its own forward. Raises Refusal
    otherwise (state-space layers leak; some models scale their logits in ways of their own).
    """
    model.hf.eval()
    try:
        draw = torch.Generator().manual_seed(0)
        vocabulary = model.base.get_input_embeddings().weight.shape[0]
        ids = torch.randint(vocabulary, (2, 24), generator=draw)
        ids[1, 12:] = ids[0, 12:]  # two rows: first documents differ, second documents are the same
        positions, cu_seqlens = torch.arange(12).repeat(2), torch.tensor([0, 12, 24], dtype=torch.int32)
        rows = [PackedBatch(i, positions, cu_seqlens, 12, i, []).to(model.device) for i in ids]
        one, two = (model.hidden(row)[12:].float() for row in rows)
        own = model.base(input_ids=rows[0].input_ids[None, 12:], use_cache=False).logits[0].float()
        head = model.head()
        ours = head.logit_scale * (two @ head.weight.float().T) + (0 if head.bias is None else head.bias.float())
        ours = head.softcap * torch.tanh(ours / head.softcap) if head.softcap else ours
    except (ValueError, RuntimeError, TypeError, AttributeError) as error:
        what = str(error).strip().splitlines()[0]
        raise Refusal(
            f"{model.source} ({model.base.config.model_type}) cannot be trained on packed rows: {what}"
        ) from error
    finally:
        model.hf.train()
    rounding = 2 * torch.finfo(model.base.dtype).eps
    leak = float((one - two).abs().max() / two.abs().max())
    # experts take tokens in groups, and a group's size may change the rounding
    if leak > (rounding if "expert" in str(model.base.config) else 0):
        raise Refusal(
            f"{model.source} ({model.base.config.model_type}): documents of a packed row see each other (hidden states change by "
            f"{leak:.1e}); accepted: models whose layers mix tokens by attention alone"
        )
    off = float((ours.log_softmax(-1) - own.log_softmax(-1)).abs().max() / own.abs().max().clamp(min=1))
    if not off < 8 * rounding:
        raise Refusal(
            f"{model.source} ({model.base.config.model_type}): its logits are not softcap(scale * h.w + b) as longtrace reads them from "
            f"the config (relative difference {off:.1e})"
        )


def checkpoint_activations(model: Model, offload: bool = False) -> None:
    """Recompute each layer in the backward but for its attention; kept are a layer's input and attention output.

    At long lengths attention is most of a layer's FLOPs and its output a thirtieth of what the layer saves. `offload`:
    the inputs are kept in (pinned) host memory.
    """
    model.offload = offload
    # transformers renamed it in 5.23
    enable = getattr(model.base, "activation_checkpointing_enable", model.base.gradient_checkpointing_enable)
    enable({"use_reentrant": False, "context_fn": _contexts})


def _contexts():
    return create_selective_checkpoint_contexts(_keep_attention)


def _keep_attention(context, op, *args, **kwargs) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if op.name() in ATTENTION_OPS else CheckpointPolicy.PREFER_RECOMPUTE


def add_lora(hf: PreTrainedModel, config: TrainConfig):
    try:
        from peft import LoraConfig, get_peft_model
    except ImportError as error:
        raise Refusal("--lora-rank needs peft: pip install 'longtrace[lora]'") from error
    lora = LoraConfig(
        r=config.lora_rank,
        lora_alpha=config.lora_alpha or 2 * config.lora_rank,
        lora_dropout=config.lora_dropout,
        target_modules="all-linear",
        task_type="CAUSAL_LM",
    )
    return get_peft_model(hf, lora)


@contextlib.contextmanager
def computing_in(model: Model, dtype: torch.dtype) -> Iterator[None]:
    """The weights rounded to the compute dtype for a while, as the loop will publish them; then as they were."""
    kept = {p: p.data for p in model.hf.parameters() if p.dtype != dtype}
    for parameter, weight in kept.items():
        parameter.data = weight.to(dtype)
    try:
        yield
    finally:
        for parameter, weight in kept.items():
            parameter.data = weight


class Masters:
    """fp32 masters and fp32 gradients of a model that computes in bf16.

    The model's parameters are the rounded copies. Each backward's bf16 gradient is added to the master's fp32 gradient
    and freed at once (a post-accumulate hook), so accumulation over micro-batches loses nothing. With fp32 compute the
    parameters are their own masters. 100 steps at lr 1e-6 then move the weights as fp32 training does, where bf16
    weights would round every step away.
    """

    def __init__(self, model: Model, dtype: torch.dtype):
        self.parameters: dict[str, nn.Parameter] = {}
        self.masters: dict[str, torch.Tensor] = {}
        self.other: dict[str, torch.Tensor | None] = {}  # a second set of gradients, of BVPO's other path
        for name, parameter in model.hf.named_parameters():
            if not parameter.requires_grad:
                parameter.data = parameter.data.to(dtype)
                continue
            master = parameter.data.float()
            self.parameters[name] = parameter
            if dtype == torch.float32:
                parameter.data = master
                self.masters[name] = parameter
                continue
            parameter.data = master.to(dtype)
            self.masters[name] = master.requires_grad_()
            parameter.register_post_accumulate_grad_hook(self._adder(master))

    @staticmethod
    def _adder(master: torch.Tensor):
        def add(parameter: torch.Tensor) -> None:
            if master.grad is None:
                master.grad = parameter.grad.float()
            else:
                master.grad.add_(parameter.grad)
            parameter.grad = None

        return add

    def groups(self, weight_decay: float) -> list[dict]:
        """Optimizer groups: matrices decay, vectors (norms, biases) do not."""
        matrices = [m for m in self.masters.values() if m.ndim >= 2]
        vectors = [m for m in self.masters.values() if m.ndim < 2]
        return [{"params": matrices, "weight_decay": weight_decay}, {"params": vectors, "weight_decay": 0.0}]

    @torch.no_grad()
    def publish(self) -> None:
        """Rounds the masters into the model's parameters."""
        for name, parameter in self.parameters.items():
            if parameter is not self.masters[name]:
                parameter.copy_(self.masters[name])

    @torch.no_grad()
    def load(self, saved: dict[str, torch.Tensor]) -> None:
        """Takes masters from a checkpoint. Raises Refusal when names or shapes are another model's."""
        if saved.keys() != self.masters.keys():
            odd = sorted(saved.keys() ^ self.masters.keys())[0]
            raise Refusal(
                f"the checkpoint holds other weights than this model (first difference: {odd}); same --model and --lora-rank?"
            )
        for name, master in self.masters.items():
            if saved[name].shape != master.shape:
                raise Refusal(
                    f"{name} is {tuple(saved[name].shape)} in the checkpoint, {tuple(master.shape)} in the model"
                )
            master.copy_(saved[name])
        self.publish()

    def gradients(self) -> list[torch.Tensor]:
        return [m.grad for m in self.masters.values() if m.grad is not None]

    def zero_grad(self) -> None:
        for master in self.masters.values():
            master.grad = None

    def swap_gradients(self) -> None:
        """Backwards add to the second set of gradients from here on, and what was added so far becomes the second."""
        for name, master in self.masters.items():
            master.grad, self.other[name] = self.other.get(name), master.grad

    def paired_gradients(self) -> tuple[list[torch.Tensor], list[torch.Tensor]]:
        """Both sets, tensor by tensor, zeros where one had no backward through a weight."""
        for name, master in self.masters.items():
            if master.grad is None and self.other.get(name) is not None:
                master.grad = torch.zeros_like(self.other[name])
            elif master.grad is not None and self.other.get(name) is None:
                self.other[name] = torch.zeros_like(master.grad)
        names = [name for name, master in self.masters.items() if master.grad is not None]
        return [self.masters[n].grad for n in names], [self.other[n] for n in names]

    def drop_other_gradients(self) -> None:
        self.other = {}


@contextlib.contextmanager
def _refusing(source: str, what: str):
    try:
        yield
    except (OSError, ValueError, KeyError, SafetensorError) as error:
        where = (
            "no such folder" if source.startswith((".", "/", "~")) and not Path(source).expanduser().exists() else None
        )
        first = str(error).strip().splitlines()[0] if str(error).strip() else type(error).__name__
        raise Refusal(f"{source}: cannot load the {what}: {where or first}") from error

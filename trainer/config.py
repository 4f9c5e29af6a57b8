"""One dataclass per command: the command line, the YAML file and the Python call all fill the same one."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass, field
from pathlib import Path
from typing import ClassVar, Literal

import yaml


class Refusal(Exception):
    """Input or arguments that cannot be used. One clear line; the command line prints it and exits with 2."""


class NonFinite(RuntimeError):
    """Loss, gradients or logits are not finite; the weights were not touched. The command line exits with 1."""


@dataclass(kw_only=True)
class TrainConfig:
    """What every training command shares: the model, the loop, precision, checkpoints."""

    gradient_buffers: ClassVar[int] = 1  # sets of gradients a step holds: no option, a property of the objective

    model: str
    """Hugging Face folder or hub name."""
    out: Path
    """Run folder: the trained model, metrics.jsonl, report.html, config.yaml, checkpoints/."""

    # batches
    max_tokens: int = 16_384
    """Longest document, in tokens."""
    tokens_per_row: int = 0
    """Tokens in one packed micro-batch: what memory depends on (0 = --max-tokens)."""
    tokens_per_step: int = 0
    """Tokens in one optimizer step, a multiple of --tokens-per-row (0 = one row)."""

    # optimisation
    steps: int = 0
    """Optimizer steps (0 = --epochs passes over the data)."""
    epochs: float = 1.0
    """Passes over the data when --steps is 0."""
    lr: float = 1e-5
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "cosine"
    """Shape of the learning rate after the warm-up."""
    warmup: float = 0.03
    """Warm-up: a share of the steps below 1, a number of steps from 1 on."""
    min_lr_ratio: float = 0.0
    """Final learning rate as a share of --lr (cosine and linear)."""
    optimizer: Literal["adamw", "adamw8bit"] = "adamw"
    """adamw keeps fp32 state; adamw8bit keeps torchao's 8-bit state."""
    weight_decay: float = 0.0
    """Decoupled weight decay of matrices (norms and biases have none)."""
    betas: tuple[float, float] = (0.9, 0.95)
    """Adam's decay rates."""
    adam_eps: float = 1e-8
    """Adam's epsilon."""
    clip: float = 1.0
    """Largest gradient norm (0 = no clipping)."""

    # precision and memory
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Compute precision; the trained weights are fp32 masters either way."""
    activation_checkpointing: Literal["auto", "on", "off", "offload"] = "auto"
    """Recompute layers but for their attention in the backward; auto = when activations would take over 1 GB and outweigh weights and optimizer state; offload = on, and layers' inputs wait in host memory (CUDA)."""
    head_budget_mb: int = 0
    """Largest block of logits held at once, in MB (0 = the planner's choice)."""
    head_grad: Literal["exact", "compressed"] = "exact"
    """Gradients of the vocabulary head; compressed: less than half the FLOPs at an estimated error (docs/head.md; bf16 only)."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to train."""
    rope: Literal["auto", "none", "linear", "ntk", "yarn"] = "auto"
    """How to extend the context when --max-tokens exceeds the model's window; auto = yarn."""

    # LoRA
    lora_rank: int = 0
    """Rank of LoRA adapters on every linear layer of the body (0 = train all weights)."""
    lora_alpha: float = 0.0
    """LoRA scale (0 = twice the rank)."""
    lora_dropout: float = 0.0
    """Dropout in front of the adapters."""

    # evaluation and checkpoints
    eval_every: int = 0
    """Steps between evaluations (0 = only at the end, when there is held-out data)."""
    patience: int = 0
    """Stop after this many evaluations without a better eval loss (0 = never)."""
    save_every: int = 0
    """Steps between checkpoints (0 = only at the end)."""
    keep_last: int = 2
    """Checkpoints kept."""
    resume: str = ""
    """auto = the run folder's newest checkpoint, if there is one; or a checkpoint folder."""

    # the run
    seed: int = 0
    """Seeds data order, dropout and adapters."""
    tracker: Literal["none", "tensorboard", "wandb", "trackio"] = "none"
    """Where metrics go besides metrics.jsonl."""
    plan: bool = False
    """Print model, packing, memory and time estimates, and exit."""


@dataclass(kw_only=True)
class SFTConfig(TrainConfig):
    """Supervised fine-tuning of a causal language model on packed traces."""

    data: list[str]
    """Sources: file.jsonl, file.parquet, hub/name, generated:countdown,n=4,target=15000, reasoning_gym:chain_sum."""
    eval_data: list[str] = field(default_factory=list)
    """Held-out sources; when empty, --eval-fraction of --data is held out."""
    eval_fraction: float = 0.0
    """Share of the documents held out for the eval loss (0 = none)."""
    on_too_long: Literal["refuse", "skip", "split"] = "refuse"
    """What happens to a document above --max-tokens: stop, leave it out, or cut it into separate pieces."""
    template: str = "auto"
    """auto = the model's own, or one of ours if it has none; model = its own only; longtrace = one that keeps the thought; or a .jinja file."""
    columns: list[str] = field(default_factory=list)
    """Renames fields of the rows: old=new."""
    allow: list[Literal["no-thought", "no-answer", "no-eos", "not-a-prefix"]] = field(default_factory=list)
    """Audit findings that do not stop the run."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read or that the audit refuses (counted and named) instead of stopping at the first."""


def options(config_class) -> list[str]:
    """The names of a command's options: the fields of its dataclass that may be given."""
    return [f.name for f in dataclasses.fields(config_class) if f.init]


def to_yaml(config) -> str:
    """The resolved config as YAML; `--config` reads it back."""

    def plain(value):
        if isinstance(value, Path):
            return str(value)
        if isinstance(value, (list, tuple)):
            return [plain(v) for v in value]
        if isinstance(value, dict):
            return {k: plain(v) for k, v in value.items()}
        return value

    return yaml.safe_dump({name: plain(getattr(config, name)) for name in options(config)}, sort_keys=False)


def parse_columns(columns: list[str]) -> dict[str, str]:
    """["old=new"] to {"old": "new"}."""
    for item in columns:
        if item.count("=") != 1 or item.startswith("=") or item.endswith("="):
            raise Refusal(f"--columns {item}: accepted: old=new, for example question=problem")
    return dict(item.split("=") for item in columns)


def read_yaml(path: Path, config_class: type) -> dict:
    """The fields a YAML file sets; Refusal for a missing or broken file and for a field the command does not have."""
    try:
        fields = yaml.safe_load(Path(path).read_text(encoding="utf-8"))
    except OSError as error:
        raise Refusal(f"--config {path}: {error.strerror}") from error
    except (yaml.YAMLError, UnicodeDecodeError) as error:
        raise Refusal(f"--config {path}: not YAML: {' '.join(str(error).split())}") from error
    if not isinstance(fields, dict):
        raise Refusal(f"--config {path}: found {type(fields).__name__}; accepted: a mapping of option names to values")
    known = set(options(config_class))
    fields = {str(key).replace("-", "_"): value for key, value in fields.items()}
    for key in fields.keys() - known:
        raise Refusal(f"--config {path}: no option {key}; {config_class.__name__} has {', '.join(sorted(known))}")
    for key, value in fields.items():
        if value is None or isinstance(value, dict):
            raise Refusal(f"--config {path}: {key}: found {value!r}; accepted: a value or a list of values")
    return fields

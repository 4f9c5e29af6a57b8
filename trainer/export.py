"""`longtrace export`: one Hugging Face folder from a run or from one of its checkpoints, LoRA merged, and checked."""

from __future__ import annotations

import dataclasses
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

import torch
from rich.console import Console
from transformers import AutoModelForCausalLM, PreTrainedModel, PreTrainedTokenizerBase

from . import checkpoint, traces
from .config import Refusal, TrainConfig
from .model import DTYPES, load_model, load_tokenizer, load_trained

console = Console()


@dataclass(kw_only=True)
class ExportConfig:
    """One Hugging Face folder from a run or one of its checkpoints; LoRA adapters are merged into their base."""

    run: Path
    """Run folder of a training command, or any LoRA adapter folder."""
    to: Path
    """The folder to write; it must not hold a model yet."""
    checkpoint: str = ""
    """Export this checkpoint folder instead of the finished model; `latest` = the run's newest."""
    dtype: Literal["bf16", "fp32"] = "bf16"
    """Precision of the exported weights."""


@torch.no_grad()
def export(config: ExportConfig) -> Path:
    """Writes `config.to`, reloads it, compares its logits with the source's, and prints what was written.

    Merging is done in fp32 and rounded once, at the end. Raises Refusal for a run or checkpoint that cannot be used and
    for a folder that holds a model already, RuntimeError when the reloaded model differs.
    """
    run, to = Path(config.run), Path(config.to)
    for name in ("config.json", "adapter_config.json"):
        if (to / name).exists():
            raise Refusal(f"--to {to}: holds a model already ({name}); accepted: a new folder")
    if config.checkpoint:
        model, tokenizer, template, source = _from_checkpoint(run, config.checkpoint)
    else:
        model, tokenizer, template, source = _from_run(run)
    if hasattr(model, "peft_config"):
        adapted = _logits(model)
        model = model.merge_and_unload()
        _compare(_logits(model), adapted, 1e-3, f"{source}: merging the adapters")
        source += ", adapters merged"
    for parameter in model.parameters():
        parameter.data = parameter.data.to(DTYPES[config.dtype]).float()  # what the file will hold
    expected = _logits(model)
    names = checkpoint.export_model(model, tokenizer, to, chat_template=template, dtype=DTYPES[config.dtype])
    del model
    reloaded = AutoModelForCausalLM.from_pretrained(to, dtype=torch.float32)
    difference = _compare(_logits(reloaded), expected, 1e-5, f"{to}: reloading")
    parameters = sum(p.numel() for p in reloaded.parameters())
    lines = [f"{source} -> {to}, {config.dtype}, {parameters:,} parameters"]
    lines += [f"  {(to / name).stat().st_size:>14,} bytes  {name}" for name in names]
    lines += [f"reloaded with AutoModelForCausalLM; largest difference of a logit: {difference:.1e}"]
    console.print("\n".join(lines), highlight=False, markup=False, soft_wrap=True)
    return to


def _from_run(run: Path) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str, str]:
    """The finished model of a run folder, or base and adapters of a LoRA one, in fp32."""
    adapter = run / "adapter_config.json"
    if not adapter.exists() and not (run / "config.json").exists():
        newest = checkpoint.latest(run / "checkpoints")
        advice = f"pass --checkpoint latest for {newest.name}" if newest else "and no checkpoints"
        raise Refusal(f"--run {run}: no finished model there (config.json or adapter_config.json); {advice}")
    model, tokenizer = load_trained(str(run), torch.float32), load_tokenizer(str(run))
    return model, tokenizer, tokenizer.chat_template or "", str(run)


def _from_checkpoint(run: Path, name: str) -> tuple[PreTrainedModel, PreTrainedTokenizerBase, str, str]:
    """The model a checkpoint belongs to, with its fp32 masters."""
    path = checkpoint.latest(run / "checkpoints") if name == "latest" else Path(name)
    if path is None:
        raise Refusal(f"--checkpoint latest: no checkpoints in {run / 'checkpoints'}")
    tensors, state = checkpoint.load(path)
    known = {field.name for field in dataclasses.fields(TrainConfig)}
    saved = {key: value for key, value in state["config"].items() if key in known}
    model = load_model(TrainConfig(**saved | {"device": "cpu", "resume": ""}))
    parameters = {f"model.{key}": p for key, p in model.hf.named_parameters() if p.requires_grad}
    masters = {key: tensor for key, tensor in tensors.items() if key.startswith("model.")}
    if odd := sorted(parameters.keys() ^ masters.keys()):
        raise Refusal(f"{path}: its weights do not fit {saved['model']} (first difference: {odd[0]})")
    model.hf.float().eval()
    for key, parameter in parameters.items():
        parameter.copy_(masters[key])
    model.base.generation_config.eos_token_id = state["eos_token_id"]
    model.base.set_attn_implementation("sdpa")  # that of training is for packed rows
    template = traces.chat_template(model.tokenizer, state["config"].get("template", "auto"))
    return model.hf, model.tokenizer, template, str(path)


def _logits(model) -> torch.Tensor:
    """(16, V) fp32 logits of the first tokens of the vocabulary."""
    ids = torch.arange(16)[None] % model.get_input_embeddings().weight.shape[0]
    return model.eval()(input_ids=ids).logits[0].float()


def _compare(got: torch.Tensor, expected: torch.Tensor, tolerance: float, what: str) -> float:
    """The largest difference; RuntimeError when it exceeds `tolerance` times the largest logit."""
    difference = float((got - expected).abs().max())
    if not difference <= tolerance * float(expected.abs().max()):
        raise RuntimeError(
            f"{what} changed the logits by {difference:.3g} (largest logit {float(expected.abs().max()):.3g})"
        )
    return difference

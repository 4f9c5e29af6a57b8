"""Exported folders: what is in them, that they reload to the same model, and that adapters are merged exactly."""

from __future__ import annotations

import json
import os
import shutil

import pytest
import torch
from safetensors.torch import load_file
from transformers import AutoModelForCausalLM, AutoTokenizer

from longtrace.trainer import checkpoint
from longtrace.trainer.config import Refusal
from longtrace.trainer.export import ExportConfig, export
from longtrace.trainer.rope import extend_rope

TEMPLATE = "{% for m in messages %}{{ m['content'] }}{% endfor %}"
FILES = {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json", "tokenizer_config.json"}
IDS = torch.arange(12)[None] + 3


def load(folder, dtype="auto"):
    return AutoModelForCausalLM.from_pretrained(folder, dtype=dtype).eval()


@torch.no_grad()
def logits(model):
    return model(input_ids=IDS).logits


def write(folder, out, dtype=torch.float32, model=None):
    tokenizer = AutoTokenizer.from_pretrained(folder)
    return checkpoint.export_model(
        model or load(folder), tokenizer, out, chat_template=TEMPLATE, dtype=dtype
    ), tokenizer


@pytest.fixture
def adapter(tiny_model, tmp_path, seed):
    """A LoRA run folder with trained-looking adapters: (folder, the peft model)."""
    from peft import LoraConfig, get_peft_model

    base = tiny_model("llama")
    lora = LoraConfig(r=4, lora_alpha=8, target_modules="all-linear", task_type="CAUSAL_LM")
    model = get_peft_model(load(base, torch.float32), lora).eval()
    for name, parameter in model.named_parameters():
        if "lora_B" in name:
            torch.nn.init.normal_(parameter, std=0.2)
    write(base, tmp_path / "run", model=model)
    return tmp_path / "run", model


# ---- export_model -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("architecture", ["llama", "qwen3", "gemma3"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float32])
def test_reloads_to_the_same_model(tiny_model, tmp_path, architecture, dtype):
    folder = tiny_model(architecture)
    names, tokenizer = write(folder, tmp_path / "out", dtype)
    assert set(names) == set(os.listdir(tmp_path / "out")) == FILES | {"chat_template.jinja"}
    assert json.loads((tmp_path / "out" / "config.json").read_text())["dtype"] == str(dtype)[6:]
    model, original = load(tmp_path / "out"), load(folder)
    assert model.dtype == dtype
    for (name, parameter), (_, expected) in zip(model.named_parameters(), original.named_parameters(), strict=True):
        assert torch.equal(parameter, expected.to(dtype)), name
    if dtype == torch.float32:
        assert torch.equal(logits(model), logits(original))
    # the template of training goes along, and the caller's tokenizer keeps its own
    assert (tmp_path / "out" / "chat_template.jinja").read_text() == TEMPLATE
    assert AutoTokenizer.from_pretrained(tmp_path / "out").chat_template == TEMPLATE
    assert tokenizer.chat_template != TEMPLATE
    assert original.config.dtype == torch.float32


def test_tied_weights_stay_tied(tiny_model, tmp_path):
    write(tiny_model("qwen3"), tmp_path / "out", torch.bfloat16)
    assert "lm_head.weight" not in load_file(tmp_path / "out" / "model.safetensors")
    model = load(tmp_path / "out")
    assert model.lm_head.weight is model.model.embed_tokens.weight


def test_other_files_stay_and_old_weights_go(tiny_model, tmp_path, monkeypatch):
    """From one file to shards and back, with a run's own files beside."""
    out, folder = tmp_path / "out", tiny_model("llama")
    checkpoint.save(out / "checkpoints", 4, {}, {}, keep_last=1)
    (out / "metrics.jsonl").write_text("{}\n")
    (out / ".export.tmp-1").mkdir()
    write(folder, out)
    with monkeypatch.context() as patch:
        patch.setattr(checkpoint, "SHARD", "30KB")
        names, _ = write(folder, out)
    assert "model.safetensors.index.json" in names and not (out / "model.safetensors").exists()
    assert torch.equal(logits(load(out)), logits(load(folder)))
    write(folder, out)
    assert set(os.listdir(out)) == FILES | {"chat_template.jinja", "checkpoints", "metrics.jsonl"}


def test_a_failed_export_leaves_the_old_model(tiny_model, tmp_path, monkeypatch):
    out, folder = tmp_path / "out", tiny_model("llama")
    write(folder, out)
    before = {name: (out / name).read_bytes() for name in os.listdir(out)}

    def full(path):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(checkpoint, "_fsync", full)
    with pytest.raises(OSError, match="No space"):
        write(folder, out, torch.bfloat16)
    assert {name: (out / name).read_bytes() for name in os.listdir(out)} == before


def test_an_adapter_folder(adapter):
    """Adapters and tokenizer; peft and transformers both load it."""
    from peft import AutoPeftModelForCausalLM

    folder, model = adapter
    assert {"adapter_config.json", "adapter_model.safetensors", "tokenizer.json"} <= set(os.listdir(folder))
    assert not {"README.md", "model.safetensors", "config.json"} & set(os.listdir(folder))
    assert torch.equal(logits(AutoPeftModelForCausalLM.from_pretrained(folder).eval()), logits(model))
    assert torch.equal(logits(load(folder, torch.float32)), logits(model))


def test_adapters_on_an_extended_context_do_not_load_on_the_bases_own(adapter, tmp_path):
    """transformers would read the rope settings of the base folder; `longtrace export` keeps the run's."""
    folder, model = adapter
    extend_rope(model.get_base_model().config, 4096, "yarn")
    write(folder, tmp_path / "extended", model=model)
    with pytest.raises(OSError, match=r"model\.safetensors"):
        load(tmp_path / "extended")
    export(ExportConfig(run=tmp_path / "extended", to=tmp_path / "merged"))
    merged = load(tmp_path / "merged").config
    assert merged.max_position_embeddings == 4096 and merged.rope_parameters["rope_type"] == "yarn"


# ---- longtrace export ---------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("dtype", ["bf16", "fp32"])
def test_merges_adapters(adapter, tmp_path, dtype, capsys):
    folder, model = adapter
    export(ExportConfig(run=folder, to=tmp_path / "merged", dtype=dtype))
    assert set(os.listdir(tmp_path / "merged")) == FILES | {"chat_template.jinja"}
    merged = load(tmp_path / "merged", torch.float32)
    tolerance = {"fp32": 1e-5, "bf16": 2e-2}[dtype]
    assert (logits(merged) - logits(model)).abs().max() < tolerance * logits(model).abs().max()
    base = load(model.peft_config["default"].base_model_name_or_path, torch.float32)
    assert (logits(base) - logits(model)).abs().max() > 0.1  # the adapters do something
    printed = capsys.readouterr().out
    assert "model.safetensors" in printed and "largest difference of a logit" in printed


def test_exports_a_full_run_in_another_precision(tiny_model, tmp_path):
    write(tiny_model("qwen3"), tmp_path / "run")
    export(ExportConfig(run=tmp_path / "run", to=tmp_path / "to", dtype="bf16"))
    model = load(tmp_path / "to")
    assert model.dtype == torch.bfloat16
    for name, parameter in load(tmp_path / "run").named_parameters():
        assert torch.equal(model.get_parameter(name), parameter.bfloat16()), name
    assert (tmp_path / "to" / "chat_template.jinja").read_text() == TEMPLATE


@pytest.mark.parametrize("lora_rank", [0, 4])
def test_exports_a_checkpoint(tiny_model, tmp_path, seed, lora_rank):
    """A run that never finished: masters from the checkpoint, the model and template from its config."""
    from dataclasses import asdict

    from longtrace.trainer.config import SFTConfig
    from longtrace.trainer.model import load_model

    base = tiny_model("qwen3")
    config = SFTConfig(model=str(base), data=["x"], out=tmp_path / "run", max_tokens=512, lora_rank=lora_rank)
    model = load_model(config)
    masters = {k: torch.randn_like(p.float()) * 0.1 for k, p in model.hf.named_parameters() if p.requires_grad}
    tensors = {f"model.{name}": master for name, master in masters.items()}
    state = {"config": json.loads(json.dumps(asdict(config), default=str)), "eos_token_id": 2}
    path = checkpoint.save(tmp_path / "run" / "checkpoints", 6, tensors, state, keep_last=1)
    for to, which in (("one", "latest"), ("two", str(path))):
        export(ExportConfig(run=tmp_path / "run", to=tmp_path / to, checkpoint=which, dtype="fp32"))
    assert (tmp_path / "one/model.safetensors").read_bytes() == (tmp_path / "two/model.safetensors").read_bytes()
    got = load(tmp_path / "one")
    with torch.no_grad():
        for name, parameter in model.hf.named_parameters():
            if name in masters:
                parameter.copy_(masters[name])
    model.base.set_attn_implementation("sdpa")
    expected = logits(model.hf.float().eval())
    assert (logits(got) - expected).abs().max() < 1e-5 * expected.abs().max()
    assert (tmp_path / "one" / "chat_template.jinja").read_text() == AutoTokenizer.from_pretrained(base).chat_template


# ---- refusals -----------------------------------------------------------------------------------------------------------


def refused(**fields):
    with pytest.raises(Refusal) as caught:
        export(ExportConfig(**fields))
    assert "\n" not in str(caught.value)
    return str(caught.value)


def test_a_folder_that_holds_a_model_is_refused(tiny_model, tmp_path):
    shutil.copytree(tiny_model("llama"), tmp_path / "run")
    assert "holds a model already (config.json)" in refused(run=tmp_path / "run", to=tmp_path / "run")


def test_a_run_without_a_model_is_refused(tmp_path):
    assert "no finished model there" in refused(run=tmp_path, to=tmp_path / "to")
    checkpoint.save(tmp_path / "checkpoints", 8, {}, {}, keep_last=1)
    assert "--checkpoint latest for step-00000008" in refused(run=tmp_path, to=tmp_path / "to")


def test_absent_checkpoints_are_refused(tmp_path):
    assert "no checkpoints in" in refused(run=tmp_path, to=tmp_path / "to", checkpoint="latest")
    assert "no checkpoint folder there" in refused(run=tmp_path, to=tmp_path / "to", checkpoint=str(tmp_path / "x"))


def test_a_missing_base_is_named(adapter, tmp_path):
    folder, _ = adapter
    config = json.loads((folder / "adapter_config.json").read_text())
    config["base_model_name_or_path"] = str(tmp_path / "gone")
    (folder / "adapter_config.json").write_text(json.dumps(config))
    assert "cannot load the base model of" in refused(run=folder, to=tmp_path / "to")


def test_weights_of_another_model_are_refused(tiny_model, tmp_path):
    from dataclasses import asdict

    from longtrace.trainer.config import TrainConfig

    config = TrainConfig(model=str(tiny_model("llama")), out=tmp_path, max_tokens=512)
    state = {"config": json.loads(json.dumps(asdict(config), default=str)), "eos_token_id": 2}
    checkpoint.save(tmp_path / "checkpoints", 2, {"model.other": torch.ones(2)}, state, keep_last=1)
    assert "do not fit" in refused(run=tmp_path, to=tmp_path / "to", checkpoint="latest")


def test_a_reload_that_differs_is_an_error(tiny_model, tmp_path, monkeypatch):
    write(tiny_model("llama"), tmp_path / "run")
    real = checkpoint.export_model

    def spoils(*arguments, **keywords):
        names = real(*arguments, **keywords)
        path = tmp_path / "to" / "model.safetensors"
        data = bytearray(path.read_bytes())
        data[-3] ^= 0x40
        path.write_bytes(data)
        return names

    monkeypatch.setattr(checkpoint, "export_model", spoils)
    with pytest.raises(RuntimeError, match="reloading changed the logits"):
        export(ExportConfig(run=tmp_path / "run", to=tmp_path / "to"))

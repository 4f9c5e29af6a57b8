"""The plan: bytes against hand counts and against real tensors, FLOPs against formulas, the checkpointing rule."""

from __future__ import annotations

import dataclasses
from pathlib import Path

import pytest
import torch
from transformers import Gemma3TextConfig, LlamaConfig, LlamaForCausalLM, Qwen2Config, Qwen3Config

from longtrace import kernels as K
from longtrace.kernels import extension
from longtrace.trainer import plan
from longtrace.trainer.config import SFTConfig
from longtrace.trainer.model import Model

H, I, V, L, T = 64, 160, 512, 3, 384  # noqa: E741
HEADS, KV, D = 4, 2, 16


def llama(**changes) -> LlamaConfig:
    shape = {
        "vocab_size": V, "hidden_size": H, "intermediate_size": I, "num_hidden_layers": L,
        "num_attention_heads": HEADS, "num_key_value_heads": KV, "head_dim": D, "tie_word_embeddings": True,
    }  # fmt: skip
    return LlamaConfig(**shape | changes)


def config(**changes) -> SFTConfig:
    fields = {"model": "m", "data": [], "out": Path("x"), "tokens_per_row": T, "tokens_per_step": T}
    return SFTConfig(**fields | changes)


def parameters(hf) -> int:
    with torch.device("meta"):
        return sum(p.numel() for p in LlamaForCausalLM(hf).parameters())


def test_weights_masters_gradients_and_state_by_hand():
    n = parameters(llama())
    m = plan.plan_memory(llama(), config(), checkpointing=False)
    assert (m.weights, m.masters, m.gradients, m.optimizer) == (2 * n, 4 * n, 4 * n, 8 * n)
    assert plan.plan_memory(llama(), config(optimizer="adamw8bit"), checkpointing=False).optimizer == 2 * n
    m = plan.plan_memory(llama(), config(dtype="fp32"), checkpointing=False)
    assert (m.weights, m.masters, m.gradients, m.optimizer) == (4 * n, 0, 4 * n, 8 * n)


def test_activations_of_llama_by_hand():
    # per token and layer, bf16: two norms keep their input and the linear layers after them what comes out (4H each), and
    # 4 for the root mean square; the MLP gate, up and their product; attention q, k, v, its output, 8 a head
    norms, mlp = 2 * 4 * H + 2 * 4, 3 * 2 * I
    if not extension.LOADED:  # in PyTorch a norm keeps an fp32 input and the normalised value too, the MLP one more
        norms, mlp = 2 * 8 * H + 2 * 4, 4 * 2 * I
    layer = norms + mlp + 2 * (2 * HEADS * D + 2 * KV * D) + 8 * HEADS
    more, fewer = (
        plan.plan_memory(llama(num_hidden_layers=n), config(), checkpointing=False).activations for n in (L + 1, L)
    )
    assert more - fewer == T * layer


def test_checkpointing_keeps_a_layers_input_and_its_attention():
    m = plan.plan_memory(llama(num_hidden_layers=8), config(), checkpointing=True)
    m2 = plan.plan_memory(llama(num_hidden_layers=9), config(), checkpointing=True)
    assert m2.activations - m.activations == T * (2 * H + 2 * HEADS * D + 8 * HEADS)


def test_offloading_leaves_a_layers_attention_alone():
    on, offload = config(activation_checkpointing="on"), config(activation_checkpointing="offload")
    m = plan.plan_memory(llama(num_hidden_layers=8), offload, checkpointing=True)
    m2 = plan.plan_memory(llama(num_hidden_layers=9), offload, checkpointing=True)
    assert m2.activations - m.activations == T * (2 * HEADS * D + 8 * HEADS)
    kept = plan.plan_memory(llama(num_hidden_layers=8), on, checkpointing=True)
    final_norm = T * (2 * H + 4)  # its input and the factor of a row
    assert kept.activations - m.activations == 8 * T * 2 * H + final_norm and m.peak <= kept.peak
    plain = [plan.plan_memory(llama(), c, checkpointing=False) for c in (on, offload)]
    assert plain[0] == plain[1], "the flag changes nothing where layers are not checkpointed"


def test_activations_grow_with_the_row_and_nothing_else_does():
    a, b = (plan.plan_memory(llama(), config(tokens_per_row=t), checkpointing=False) for t in (T, 2 * T))
    assert b.activations == pytest.approx(2 * a.activations, rel=1e-3)
    assert (a.held, a.gradients) == (b.held, b.gradients)


def test_accumulation_holds_gradients_through_the_forward():
    one = plan.plan_memory(llama(), config(), checkpointing=True)
    two = plan.plan_memory(llama(), config(tokens_per_step=2 * T), checkpointing=True)
    assert one.peak < two.peak <= one.peak + one.gradients
    assert two.activations == one.activations


def test_lora_trains_only_adapters():
    pytest.importorskip("peft", reason="peft is not installed")
    full = plan.plan_memory(llama(), config(), checkpointing=False)
    lora = plan.plan_memory(llama(), config(lora_rank=4), checkpointing=False)
    adapters = 4 * L * ((H + HEADS * D) * 2 + (H + KV * D) * 2 + (H + I) * 3)
    assert lora.gradients == 4 * adapters
    assert lora.weights == full.weights + 2 * adapters


def test_rehearsal_counts_what_real_tensors_keep():
    """The same model with data: the distinct storages autograd keeps for the backward are the activations planned."""
    hf = llama()
    planned = plan.plan_memory(hf, config(dtype="fp32"), checkpointing=False).activations
    torch.manual_seed(0)
    net = K.patch(LlamaForCausalLM(hf).train(), attention=False)
    net.set_attn_implementation("sdpa")
    weights = {p.untyped_storage().data_ptr() for p in net.parameters()}
    kept = {}

    def pack(tensor):
        storage = tensor.untyped_storage()
        if storage.data_ptr() not in weights:
            kept[storage.data_ptr()] = storage.nbytes()
        return tensor

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor):
        net.model(input_ids=torch.zeros(1, T, dtype=torch.int64)).last_hidden_state.sum()
    assert planned == pytest.approx(sum(kept.values()), rel=0.06), f"kept {sum(kept.values())}, planned {planned}"


@pytest.mark.parametrize(
    "hf",
    [
        Qwen2Config(vocab_size=V, hidden_size=H, intermediate_size=I, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2),
        Qwen3Config(vocab_size=V, hidden_size=H, intermediate_size=I, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2, head_dim=16),
        Gemma3TextConfig(vocab_size=V, hidden_size=H, intermediate_size=I, num_hidden_layers=6, num_attention_heads=4, num_key_value_heads=2, head_dim=16, sliding_window=64),
    ],
    ids=lambda hf: type(hf).__name__,
)  # fmt: skip
def test_other_architectures_are_rehearsed_too(hf):
    before = hf._attn_implementation
    plain, checkpointed = (plan.plan_memory(hf, config(), checkpointing=on) for on in (False, True))
    assert plain.activations > 3 * checkpointed.activations > 0
    assert hf._attn_implementation == before, "planning must not change the model's configuration"


def test_flops_by_the_formulas():
    model = Model(LlamaForCausalLM(llama()), None, "m", False, "")
    linear = L * (2 * H * HEADS * D + 2 * H * KV * D + 3 * H * I)
    matmuls, attention, recompute = plan.flops(model, [100, 300])
    assert matmuls == 6 * linear + 6 * H * V
    pairs = (100**2 / 2 + 300**2 / 2) / 400  # a token attends to half its document on average
    assert attention == pytest.approx(12 * L * HEADS * D * pairs)
    assert recompute == pytest.approx(2 * linear + attention / 3 * (not extension.LOADED))
    model.hf.requires_grad_(False)
    assert plan.flops(model, [100])[0] == 4 * linear + 4 * H * V


def test_a_window_bounds_the_attention():
    hf = Gemma3TextConfig(
        vocab_size=V, hidden_size=H, intermediate_size=I, num_hidden_layers=6, num_attention_heads=4,
        num_key_value_heads=2, head_dim=16, sliding_window=32,
    )  # fmt: skip
    from transformers import Gemma3ForCausalLM

    model = Model(Gemma3ForCausalLM(hf), None, "m", False, "")
    n, w = 1000, 32
    windowed = hf.layer_types.count("sliding_attention")
    pairs = windowed * (n * w - w * w / 2) / n + (6 - windowed) * n / 2
    assert 0 < windowed < 6
    assert plan.flops(model, [n])[1] == pytest.approx(12 * 64 * pairs)


def test_auto_checkpoints_only_what_is_large_and_outweighs_the_rest():
    m = plan.Memory(0, 0, 0, 0, 0, 0, 0, 0)
    large = dataclasses.replace(m, activations=12 * 10**9, weights=2 * 10**9)
    assert plan.should_checkpoint(large)
    assert not plan.should_checkpoint(dataclasses.replace(large, optimizer=11 * 10**9))
    assert not plan.should_checkpoint(dataclasses.replace(m, activations=5 * 10**8)), (
        "half a GB is not worth a recompute"
    )


def test_estimate_follows_the_flag_and_its_table_prints():
    from rich.console import Console

    model = Model(LlamaForCausalLM(llama()).to(torch.bfloat16), None, "models/tiny", False, "window kept")

    class Source:
        documents, rows_per_epoch, rows_per_step, fill = [0] * 9, 4, 1, 0.96

    for flag, expected in {"auto": False, "on": True, "off": False}.items():
        settings = config(activation_checkpointing=flag)
        found = plan.estimate(model, settings, [100, 200])
        assert found.checkpointing is expected
        assert found.memory.peak == found.peaks[expected]
        assert found.peak_flops > 1e8 and 0 < found.seconds_per_token < 1
        console = Console(width=120, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
        console.print(plan.table(settings, model, Source, 7, found))
        text = console.export_text()
        for words in ("models/tiny", "9 documents in 4 rows of 384 tokens, 96.0 % full", "7 of 384 tokens", "fp32 masters",
                      f"activation checkpointing {'on' if expected else 'off'}", "at least"):  # fmt: skip
            assert words in text, f"{words!r} is not in the plan:\n{text}"


@pytest.mark.slow
def test_a_7b_fits_where_expected():
    hf = Qwen2Config(
        vocab_size=152064, hidden_size=3584, intermediate_size=18944, num_hidden_layers=28, num_attention_heads=28,
        num_key_value_heads=4, tie_word_embeddings=False,
    )  # fmt: skip
    full, eight_bit, lora = plan.gpu_fit(hf, config(tokens_per_row=16384, tokens_per_step=16384))
    assert full["peak_gb"] > 7.6 * (2 + 4 + 4 + 8), "weights, masters, gradients and state of 7.6 billion parameters"
    assert full["fits_gb"] == [] and lora["fits_gb"] == [40, 80]
    assert eight_bit["peak_gb"] < full["peak_gb"] - 40

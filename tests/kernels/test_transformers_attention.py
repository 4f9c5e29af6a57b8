"""`attn_implementation="longtrace"`: packed documents give what each gives alone, for every architecture we name."""

from __future__ import annotations

import pytest
import torch
import transformers

from longtrace import kernels as K

LENGTHS = (17, 1, 30, 9)
SIZES = dict(
    vocab_size=97, hidden_size=32, intermediate_size=48, num_hidden_layers=3, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, attention_dropout=0.0,
)  # fmt: skip
GEMMA = dict(sliding_window=6, query_pre_attn_scalar=8)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES, use_sliding_window=True, sliding_window=6, max_window_layers=1),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, **GEMMA, attn_logit_softcapping=3.0),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, **GEMMA, sliding_window_pattern=2),
    "gpt_oss": lambda: transformers.GptOssConfig(
        **SIZES, sliding_window=6, num_local_experts=4, num_experts_per_tok=2, rope_parameters={"rope_type": "default"}
    ),
}


@pytest.fixture(autouse=True)
def registered():
    K.register_attention()


@pytest.fixture
def everything_in_double(monkeypatch):
    """transformers upcasts softmax, norms and rotary angles to fp32; in a float64 comparison that is rounding down."""
    monkeypatch.setattr(torch, "float32", torch.float64)
    monkeypatch.setattr(torch, "float", torch.float64)
    monkeypatch.setattr(torch.Tensor, "float", torch.Tensor.double)


def build(name):
    torch.manual_seed(1)
    config = CONFIGS[name]()
    config._experts_implementation = "eager"
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="eager").double()
    for parameter in model.parameters():  # norms start at 0 or 1, sinks at 0: make them matter
        torch.nn.init.normal_(parameter, std=0.3)
    return model


def hidden_and_gradients(model, inputs):
    outputs = [model.model(use_cache=False, **x).last_hidden_state for x in inputs]
    hidden = torch.cat(outputs, 1)
    up = torch.linspace(-1, 1, hidden.numel(), dtype=torch.float64).view_as(hidden)
    parameters = list(model.model.parameters())
    grads = torch.autograd.grad((hidden * up).sum(), parameters, allow_unused=True)
    return hidden, [g for g in grads if g is not None]


@pytest.mark.parametrize("name", CONFIGS)
@pytest.mark.parametrize("offsets", (False, True), ids=("position_ids", "cu_seq_lens"))
def test_packed_equals_one_by_one(name, offsets, everything_in_double):
    model = build(name)
    ids = torch.randint(0, 97, (1, sum(LENGTHS)), generator=torch.Generator().manual_seed(2))
    positions = torch.cat([torch.arange(n) for n in LENGTHS])[None]
    alone, alone_grads = hidden_and_gradients(model, [{"input_ids": x} for x in ids.split(LENGTHS, 1)])
    model.set_attn_implementation("longtrace")
    packed_inputs = {"input_ids": ids, "position_ids": positions}
    if offsets:
        cu = torch.tensor([0, *LENGTHS]).cumsum(0).to(torch.int32)
        packed_inputs |= dict(cu_seq_lens_q=cu, cu_seq_lens_k=cu, max_length_q=30, max_length_k=30)
    packed, packed_grads = hidden_and_gradients(model, [packed_inputs])
    assert (packed - alone).abs().max() < 1e-10
    for a, b in zip(packed_grads, alone_grads, strict=True):
        assert (a - b).abs().max() < 1e-10 * max(1.0, b.abs().max().item())


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_with_a_cache(name):
    model = build(name).eval()
    ids = torch.randint(0, 97, (2, 12), generator=torch.Generator().manual_seed(3))
    run = dict(
        attention_mask=torch.ones_like(ids), max_new_tokens=12, do_sample=False, eos_token_id=None, pad_token_id=0
    )
    expected = model.generate(ids, **run)
    model.set_attn_implementation("longtrace")
    assert torch.equal(model.generate(ids, **run), expected)


def test_what_needs_a_mask_is_refused():
    model = build("llama")
    model.set_attn_implementation("longtrace")
    ids = torch.arange(12).view(2, 6)
    mask = torch.ones_like(ids)
    mask[0, :2] = 0
    with pytest.raises(ValueError, match="packed rows without padding"):
        model(input_ids=ids, attention_mask=mask)
    with pytest.raises(ValueError, match="takes no attention mask"):
        model(input_ids=ids, attention_mask=torch.zeros(2, 1, 6, 6, dtype=torch.float64))
    model.train()
    model.model.layers[0].self_attn.attention_dropout = 0.1
    with pytest.raises(ValueError, match="no attention dropout"):
        model(input_ids=ids)


def test_chunked_attention_is_refused_not_widened():
    sizes = SIZES | dict(
        intermediate_size_mlp=48, num_local_experts=2, attention_chunk_size=4, no_rope_layers=[1, 1, 1]
    )
    config = transformers.Llama4TextConfig(**sizes)
    model = transformers.AutoModelForCausalLM.from_config(config, attn_implementation="longtrace")
    with pytest.raises(ValueError, match="chunked_overlay"):
        model(input_ids=torch.arange(12)[None])


def test_batches_without_padding_are_rows_of_their_own():
    model = build("llama")
    ids = torch.randint(0, 97, (3, 8), generator=torch.Generator().manual_seed(4))
    expected = model(input_ids=ids).logits
    model.set_attn_implementation("longtrace")
    torch.testing.assert_close(model(input_ids=ids).logits, expected, rtol=1e-4, atol=1e-4)

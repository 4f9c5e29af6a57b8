"""`patch(model)`: outputs and gradients beside the unpatched model and float64, and everything around a model that stays."""

from __future__ import annotations

import copy
import io
import os
import statistics

import pytest
import torch
import transformers

from longtrace import kernels as K

SIZES = dict(
    vocab_size=97, hidden_size=40, intermediate_size=56, num_hidden_layers=2, num_attention_heads=4,
    num_key_value_heads=2, head_dim=8, max_position_embeddings=128, attention_dropout=0.0,
    pad_token_id=0, bos_token_id=1, eos_token_id=2,
)  # fmt: skip
GEMMA = dict(sliding_window=6, query_pre_attn_scalar=8)
CONFIGS = {
    "llama": lambda: transformers.LlamaConfig(**SIZES),
    "mistral": lambda: transformers.MistralConfig(**SIZES, sliding_window=6),
    "qwen2": lambda: transformers.Qwen2Config(**SIZES),
    "qwen3": lambda: transformers.Qwen3Config(**SIZES),
    "gemma": lambda: transformers.GemmaConfig(**SIZES, hidden_act="gelu_pytorch_tanh"),
    "gemma2": lambda: transformers.Gemma2Config(**SIZES, **GEMMA),
    "gemma3": lambda: transformers.Gemma3TextConfig(**SIZES, **GEMMA, sliding_window_pattern=2),
}
ATTENTION = {"gemma2": "eager"}  # transformers has no sdpa for its softcap
COUNTS = {  # norms, with the residual add, gated activations, rotary embeddings
    "llama": (5, 2, 2, 2), "mistral": (5, 2, 2, 2), "qwen2": (5, 2, 2, 2), "qwen3": (9, 2, 2, 2),
    "gemma": (5, 2, 2, 2), "gemma2": (9, 0, 2, 2), "gemma3": (13, 0, 2, 2),
}  # fmt: skip


@pytest.fixture
def seed():
    seed = int(os.environ.get("LONGTRACE_TEST_SEED", int.from_bytes(os.urandom(3), "little")))
    print(f"LONGTRACE_TEST_SEED={seed}")
    return seed


def build(name, seed=0, dtype=torch.float32):
    torch.manual_seed(seed)
    model = transformers.AutoModelForCausalLM.from_config(
        CONFIGS[name](), attn_implementation=ATTENTION.get(name, "sdpa")
    )
    for parameter in model.parameters():  # norms start at 0 or 1: make them matter
        torch.nn.init.normal_(parameter, mean=0.3 if parameter.ndim == 1 else 0.0, std=0.3)
    return model.to(dtype)


def tokens(seed=0, batch=1, length=21):
    return torch.randint(3, 97, (batch, length), generator=torch.Generator().manual_seed(seed))


def values(model, ids):
    """Logits and the gradients of all parameters, for a fixed upstream gradient."""
    logits = model(ids, use_cache=False).logits
    up = torch.linspace(-1, 1, logits.numel(), dtype=torch.float64).cos().view_as(logits).to(logits.dtype)
    return [logits, *torch.autograd.grad((logits * up).sum(), list(model.parameters()))]


def in_double(model, ids, monkeypatch):
    """The unpatched model in float64 throughout: transformers rounds norms and angles to fp32 on the way."""
    with monkeypatch.context() as m:
        m.setattr(torch, "float32", torch.float64)
        m.setattr(torch, "float", torch.float64)
        m.setattr(torch.Tensor, "float", torch.Tensor.double)
        return values(copy.deepcopy(model).double(), ids)


def classes(model):
    return [(name, type(m)) for name, m in model.named_modules()]


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
@pytest.mark.parametrize("name", CONFIGS)
def test_no_worse_than_unpatched(name, dtype, seed, monkeypatch):
    """Errors against float64, ours over theirs: one draw of such a chain scatters by a factor of two, the mean of 12 does not."""
    ratios = []
    for draw in range(seed, seed + 12):
        model, ids = build(name, draw, dtype), tokens(draw)
        exact, theirs = in_double(model, ids, monkeypatch), values(model, ids)
        assert K.patch(model) is model
        for a, b, c in zip(values(model, ids), exact, theirs, strict=True):
            assert a.shape == b.shape and a.dtype == dtype and a.isfinite().all()
            floor = 1e-12 * b.norm() + 1e-30  # of two exact results
            ratios.append(float(((a.double() - b).norm() + floor) / ((c.double() - b).norm() + floor)))
    assert statistics.geometric_mean(ratios) <= 1.25, sorted(ratios)[-20:]


@pytest.mark.parametrize("name", CONFIGS)
def test_unpatch_restores_bits_and_classes(name):
    model, ids = build(name), tokens()
    before, was, keys = values(model, ids), classes(model), list(model.state_dict())
    attributes = [set(vars(m)) for m in model.modules()]
    assert K.patched(model).norms == 0
    K.patch(model)
    found = K.patched(model)
    assert (found.norms, found.fused_norms, found.gated, found.rotary) == COUNTS[name] and not found.left
    assert model.config._attn_implementation == found.attention == "longtrace"
    assert list(model.state_dict()) == keys and "norms" in str(found)
    patched = classes(model)
    K.patch(model)  # harmless
    assert classes(model) == patched
    assert K.unpatch(model) is model
    assert classes(model) == was and [set(vars(m)) for m in model.modules()] == attributes
    assert model.config._attn_implementation == ATTENTION.get(name, "sdpa")
    assert all(torch.equal(a, b) for a, b in zip(before, values(model, ids), strict=True))


def test_other_models_are_not_touched():
    other, ids = build("llama"), tokens()
    before = values(other, ids)
    K.patch(build("llama"))
    assert all(torch.equal(a, b) for a, b in zip(before, values(other, ids), strict=True))
    with pytest.raises(ValueError, match="Linear has nothing to replace") as error:
        K.patch(torch.nn.Linear(2, 2))
    assert "\n" not in str(error.value)


def test_what_is_not_known_stays():
    config = CONFIGS["llama"]()
    config.hidden_act = "relu"
    model = transformers.AutoModelForCausalLM.from_config(config)
    model.model.norm.forward = model.model.norm.forward  # as accelerate's hooks do
    K.patch(model, attention=False)
    found = K.patched(model)
    assert (found.norms, found.gated, found.attention) == (4, 0, None)
    assert any("activation" in left for left in found.left)
    assert any("model.norm" in left and "replaced already" in left for left in found.left)


def test_pickle_deepcopy_and_save(tmp_path):
    model, ids = build("qwen3"), tokens()
    K.patch(model)
    expected = values(model, ids)
    stream = io.BytesIO()
    torch.save(model, stream)
    stream.seek(0)
    for twin in (copy.deepcopy(model), torch.load(stream, weights_only=False)):
        assert K.patched(twin) == K.patched(model)
        assert all(torch.equal(a, b) for a, b in zip(expected, values(twin, ids), strict=True))
        K.unpatch(twin)
        assert K.patched(twin).norms == 0 and twin.config._attn_implementation == "sdpa"
    assert K.patched(model).norms == 9
    model.save_pretrained(tmp_path / "patched")
    K.unpatch(model).save_pretrained(tmp_path / "plain")
    names = sorted(p.name for p in (tmp_path / "plain").iterdir())
    assert names == sorted(p.name for p in (tmp_path / "patched").iterdir())
    for file in names:
        assert (tmp_path / "plain" / file).read_bytes() == (tmp_path / "patched" / file).read_bytes(), file


@pytest.mark.parametrize("reentrant", (False, True))
@pytest.mark.parametrize("name", ("llama", "gemma3"))
def test_gradient_checkpointing_gives_the_same_bits(name, reentrant):
    model, ids = build(name).train(), tokens()
    K.patch(model)
    model(ids, use_cache=False).logits.square().sum().backward()
    expected = [p.grad for p in model.parameters()]
    model.zero_grad()
    model.gradient_checkpointing_enable({"use_reentrant": reentrant})
    model.enable_input_require_grads()
    calls = []
    model.model.layers[0].mlp.gate_proj.register_forward_hook(lambda *_: calls.append(1))
    model(ids, use_cache=False).logits.square().sum().backward()
    assert len(calls) == 2  # the layer ran again in the backward
    assert all(torch.equal(a, p.grad) for a, p in zip(expected, model.parameters(), strict=True))


@pytest.mark.parametrize("first", ("patch", "lora"))
def test_lora(first):
    peft = pytest.importorskip("peft")
    config = peft.LoraConfig(r=4, target_modules="all-linear", task_type="CAUSAL_LM", init_lora_weights=False)
    model, ids = build("llama"), tokens()
    if first == "patch":
        K.patch(model)
    wrapped = peft.get_peft_model(model, config)
    if first == "lora":
        K.patch(wrapped)
    found = K.patched(wrapped)
    assert (found.norms, found.fused_norms, found.gated, found.rotary) == COUNTS["llama"]

    def grads():
        loss = wrapped(input_ids=ids, use_cache=False).logits.square().sum()
        return torch.autograd.grad(loss, [p for p in wrapped.parameters() if p.requires_grad])

    ours = grads()
    theirs = (K.unpatch(wrapped), grads())[1]
    assert len(ours) == len(theirs) == 28
    for a, b in zip(ours, theirs):
        assert (a - b).norm() <= 1e-4 * b.norm()


@pytest.mark.parametrize("name", CONFIGS)
def test_generation_with_a_cache(name):
    model, ids = build(name).eval(), tokens(length=9)
    options = dict(max_new_tokens=12, do_sample=False, use_cache=True)
    expected = model.generate(ids, **options)
    assert torch.equal(K.patch(model).generate(ids, **options), expected)
    with torch.no_grad():  # several rows, and hidden states as transformers records them
        out = model(tokens(batch=3), output_hidden_states=True)
        again = K.unpatch(model)(tokens(batch=3), output_hidden_states=True)
    assert len(out.hidden_states) == len(again.hidden_states) == 3
    for a, b in zip(out.hidden_states, again.hidden_states):
        torch.testing.assert_close(a, b, rtol=1e-4, atol=1e-4)


def test_packed_documents_equal_one_by_one():
    model = K.patch(build("llama", dtype=torch.float32)).eval()
    one, two = tokens(1, length=13), tokens(2, length=8)
    positions = torch.cat((torch.arange(13), torch.arange(8)))[None]
    packed = model(torch.cat((one, two), 1), position_ids=positions, use_cache=False).logits
    alone = torch.cat([model(x, use_cache=False).logits for x in (one, two)], 1)
    torch.testing.assert_close(packed, alone, rtol=1e-5, atol=1e-5)

"""A step of decoding by `DecodeStack` against the patched model itself, a row of documents that grow by a token each."""

import pytest
import torch
from transformers import AutoModelForCausalLM

from longtrace.kernels import extension, patch
from longtrace.kernels.layers.decode import DecodeStack

pytestmark = pytest.mark.skipif(not extension.LOADED, reason=extension.WHY)
MODELS = {
    "llama": ("llama", {}),
    "mistral with a window": ("mistral", {"sliding_window": 6}),
    "qwen2, biases": ("qwen2", {}),
    "qwen2 with windows in some layers": (
        "qwen2",
        {"sliding_window": 5, "use_sliding_window": True, "layer_types": ["full_attention", "sliding_attention"]},
    ),
    "qwen3, norms of heads": ("qwen3", {}),
}


def body_of(tiny_model, name, dtype):
    architecture, changes = MODELS[name]
    torch.manual_seed(0)
    model = AutoModelForCausalLM.from_pretrained(tiny_model(architecture, **changes), dtype=dtype)
    for p in model.parameters():  # norms and biases as they are after training: not ones and zeros
        if p.ndim == 1:
            p.data += 0.3 * torch.randn_like(p)
    return patch(model).base_model.eval()


class Rows:
    """Caches of `slots` documents, `capacity` rows each."""

    def __init__(self, stack, slots, capacity, dtype):
        layers = stack.layers
        self.capacity = capacity
        shape = [(slots * capacity, layer.kv_heads, layer.width) for layer in layers]
        self.keys = {i: torch.full(s, float("nan"), dtype=dtype) for i, s in enumerate(shape)}  # gaps must not be read
        self.values = {i: torch.full(s, float("nan"), dtype=dtype) for i, s in enumerate(shape)}

    def step(self, stack, slots, lengths, tokens):
        """One token for each of `slots`, which hold `lengths` tokens."""
        at = torch.tensor([s * self.capacity + n for s, n in zip(slots, lengths)])
        edges = [0]
        for s, n in zip(slots, lengths):
            edges += [s * self.capacity, s * self.capacity + n + 1]
        starts_k = torch.tensor([*edges, len(self.keys[0])])
        starts_q = torch.arange(len(slots) + 1).repeat_interleave(2)
        return stack(torch.tensor(tokens), torch.tensor(lengths), at, starts_q, starts_k, self.keys, self.values)


@pytest.mark.parametrize(("dtype", "most"), [(torch.float32, 2e-5), (torch.bfloat16, 5e-2)], ids=["fp32", "bf16"])
@pytest.mark.parametrize("name", MODELS)
@torch.no_grad()
def test_against_the_model(name, dtype, most, tiny_model, seed):
    if dtype == torch.bfloat16 and not extension.BF16_OPERANDS:
        pytest.skip("this processor's tiles take fp32")
    body = body_of(tiny_model, name, dtype)
    assert DecodeStack.serves(body)
    stack = DecodeStack(body)
    torch.manual_seed(seed)
    texts = torch.randint(5, body.config.vocab_size, (3, 20))
    rows = Rows(stack, 5, 24, dtype)
    wholes = [body(input_ids=t[None], use_cache=False).last_hidden_state[0] for t in texts]
    for n in range(20):  # documents 0, 2, 4 of five, the last a step later than the others
        who = [i for i in range(3) if n >= (i == 2)]
        lengths = [n - (i == 2) for i in who]
        hidden = rows.step(stack, [2 * i for i in who], lengths, [int(texts[i, m]) for i, m in zip(who, lengths)])
        for i, m, row in zip(who, lengths, hidden):
            gap = (row.float() - wholes[i][m].float()).abs().max()
            assert gap < most * wholes[i][m].float().abs().max(), (i, m)


@pytest.mark.parametrize("dtype", [torch.float32] + [torch.bfloat16] * extension.BF16_OPERANDS, ids=str)
@torch.no_grad()
def test_a_documents_bits_depend_on_it_alone(dtype, tiny_model, seed):
    body = body_of(tiny_model, "qwen3, norms of heads", dtype)
    stack = DecodeStack(body)
    torch.manual_seed(seed)
    texts = torch.randint(5, body.config.vocab_size, (4, 9)).tolist()
    together, alone = Rows(stack, 4, 9, dtype), Rows(stack, 1, 30, dtype)
    for n in range(9):
        both = together.step(stack, [0, 1, 2, 3], [n] * 4, [t[n] for t in texts])
        assert torch.equal(alone.step(stack, [0], [n], [texts[2][n]])[0], both[2])


@torch.no_grad()
def test_layers_may_be_left_out(tiny_model, seed):
    """Caches go by the layers' own numbers, and the config says how many layers run."""
    body = body_of(tiny_model, "llama", torch.float32)
    whole = DecodeStack(body)
    body.config.num_hidden_layers = 1
    assert len(DecodeStack(body).layers) == 1
    body.config.num_hidden_layers = 2
    del body.layers[0]
    assert [layer.number for layer in whole.layers] == [0, 1] and [
        layer.number for layer in DecodeStack(body).layers
    ] == [1]


def test_only_what_is_known_is_served(tiny_model):
    body = body_of(tiny_model, "llama", torch.float32)
    assert DecodeStack.serves(body)
    for module in (body, body.layers[0], body.layers[1].self_attn.q_proj, body.norm, body.layers[0].mlp.act_fn):
        hook = module.register_forward_hook(lambda *_: None)
        assert not DecodeStack.serves(body)
        hook.remove()
    assert DecodeStack.serves(body)

    class Adapted(torch.nn.Linear):
        pass

    body.layers[1].mlp.up_proj.__class__ = Adapted
    assert not DecodeStack.serves(body)
    body.layers[1].mlp.up_proj.__class__ = torch.nn.Linear
    assert DecodeStack.serves(body)

    class Louder(type(body.layers[0].mlp)):  # over the patched class
        def forward(self, x):
            return 2 * super().forward(x)

    own, body.layers[0].mlp.__class__ = type(body.layers[0].mlp), Louder
    assert not DecodeStack.serves(body)
    body.layers[0].mlp.__class__ = own

    class Scaled(type(body)):
        def forward(self, *args, **kwargs):
            return super().forward(*args, **kwargs)

    own, body.__class__ = type(body), Scaled
    assert not DecodeStack.serves(body)
    body.__class__ = own

    class Quantised(torch.nn.Module):  # a linear layer whose weight is a buffer
        def __init__(self):
            super().__init__()
            self.register_buffer("packed", torch.zeros(3))

    linear, body.layers[0].mlp.down_proj = body.layers[0].mlp.down_proj, Quantised()
    assert not DecodeStack.serves(body)
    body.layers[0].mlp.down_proj = torch.nn.Module()
    assert not DecodeStack.serves(body)
    body.layers[0].mlp.down_proj = linear
    assert DecodeStack.serves(body)
    body.norm.weight.data = body.norm.weight.data.bfloat16()
    assert not DecodeStack.serves(body), "two dtypes"
    plain = AutoModelForCausalLM.from_pretrained(tiny_model("llama")).base_model
    assert not DecodeStack.serves(plain), "not patched"
    assert not DecodeStack.serves(patch(AutoModelForCausalLM.from_pretrained(tiny_model("gemma3"))).base_model)
    assert not DecodeStack.serves(body_of(tiny_model, "llama", torch.float64))

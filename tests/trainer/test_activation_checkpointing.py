"""Activation checkpointing recomputes the cheap parts of a layer, never its attention, and changes no bit of a gradient."""

from __future__ import annotations

import pytest
import torch
from torch.utils._python_dispatch import TorchDispatchMode
from transformers import LlamaConfig, LlamaForCausalLM

from longtrace import kernels as K
from longtrace.kernels import extension
from longtrace.trainer.model import Model, checkpoint_activations, fuse_layers
from longtrace.trainer.source import PackedBatch

LAYERS = 3


class Count(TorchDispatchMode):
    """How often each op runs."""

    def __init__(self):
        super().__init__()
        self.calls = {}

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name()
        self.calls[name] = self.calls.get(name, 0) + 1
        return function(*args, **(kwargs or {}))


def run(checkpointing: bool, dtype: torch.dtype):
    K.register_attention()
    torch.manual_seed(0)
    shape = dict(vocab_size=97, hidden_size=64, intermediate_size=96, num_attention_heads=4, num_key_value_heads=2)
    hf = (
        LlamaForCausalLM(LlamaConfig(**shape, num_hidden_layers=LAYERS, attn_implementation="longtrace"))
        .to(dtype)
        .train()
    )
    fuse_layers(hf)
    model = Model(hf, None, "tiny", False, "")
    if checkpointing:
        checkpoint_activations(model)
    ids = torch.randint(97, (50,))
    positions = torch.cat([torch.arange(20), torch.arange(30)])
    batch = PackedBatch(ids, positions, torch.tensor([0, 20, 50], dtype=torch.int32), 30, ids, [0, 1])
    with Count() as count:
        hidden = model.hidden(batch)
        hidden.float().square().sum().backward()
    return hidden.detach(), [p.grad for p in hf.parameters() if p.grad is not None], count.calls


@pytest.mark.parametrize("dtype", (torch.float32, torch.bfloat16), ids=str)
def test_attention_is_kept_and_gradients_are_the_same(dtype):
    hidden, gradients, plain = run(False, dtype)
    hidden_again, gradients_again, checkpointed = run(True, dtype)
    assert torch.equal(hidden, hidden_again) and len(gradients) == len(gradients_again) > 10
    assert all(torch.equal(a, b) for a, b in zip(gradients, gradients_again))
    assert checkpointed["aten::mm"] > plain["aten::mm"]  # the linear layers run again
    if extension.LOADED:
        forward = "longtrace::attention_forward"
        assert plain[forward] == checkpointed[forward] == LAYERS

"""A task of thinking so small that every trace can be listed: exact marginals, exact gradients, on a real transformer.

Letters are 0 to 3. A prompt has PROMPT letters; a trace has as many letters as the experiment says, then END is written for the model,
as a template writes `</think>`, and then comes the answer, a letter: right is the sum of the prompt modulo 4. A good trace is the
prompt's running sums. A Llama of 3,060 weights in float64 does it, here first taught by a teacher that errs.
"""

from __future__ import annotations

import itertools
from collections.abc import Callable

import torch
from torch import Tensor
from torch.func import functional_call, jacrev, vmap
from transformers import AttentionInterface, LlamaConfig, LlamaForCausalLM
from transformers.models.llama.modeling_llama import LlamaRMSNorm

LETTERS, END, PROMPT = 4, 4, 4
BATCH = 128  # sequences of a step of the cold start
CHUNK = 512  # sequences whose gradients are taken at once
ERRS = (
    0.25  # of the teacher's letters are drawn at random, and so are the answers that follow no thought: half of those
)
Params = dict[str, Tensor]


def make_model(seed: int, spread: float = 0.1) -> LlamaForCausalLM:
    """Random weights of standard deviation `spread`; 3,060 of them, float64."""
    config = LlamaConfig(
        vocab_size=LETTERS + 1, hidden_size=12, intermediate_size=24, num_hidden_layers=2, num_attention_heads=2,
        max_position_embeddings=256, initializer_range=spread, tie_word_embeddings=False,
        attn_implementation="enumerable",
    )  # fmt: skip
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        model = LlamaForCausalLM(config).double().eval()
    for module in model.modules():
        for name, norm in module.named_children():
            if isinstance(norm, LlamaRMSNorm):  # it goes through fp32
                setattr(module, name, torch.nn.RMSNorm(config.hidden_size, norm.variance_epsilon, dtype=torch.float64))
    return model


def attention(module, query, key, value, mask, scaling, **_):
    """Softmax attention in the dtype given (transformers' own is fp32), of ops that torch.func has batching rules for."""
    scores = query @ key.mT * scaling
    length, seen = scores.shape[-2:]
    later = torch.ones(length, seen, dtype=torch.bool).triu(seen - length + 1)
    return (scores.masked_fill(later, -torch.inf).softmax(-1) @ value).transpose(1, 2).contiguous(), None


AttentionInterface.register("enumerable", attention)


def params_of(model: LlamaForCausalLM) -> Params:
    return {name: p.detach().clone() for name, p in model.named_parameters()}


def all_words(length: int) -> Tensor:
    """(4**length, length): every word of so many letters."""
    return torch.tensor(list(itertools.product(range(LETTERS), repeat=length)), dtype=torch.long).view(
        LETTERS**length, length
    )


def right(prompts: Tensor) -> Tensor:
    """The right answers, (n,)."""
    return prompts.sum(1) % LETTERS


def joint(model: LlamaForCausalLM, params: Params, prompts: Tensor, traces: Tensor) -> Tensor:
    """log pi(trace, answer | prompt) of every answer: (n, LETTERS) for prompts (n, PROMPT) and traces (n, length).

    Traces of length 0 are the empty path: log pi(answer | prompt, no thought).
    """
    sequences = torch.cat((prompts, traces, torch.full_like(prompts[:, :1], END)), 1)
    logits = functional_call(model, params, (), {"input_ids": sequences, "use_cache": False}).logits
    log_probs = logits[:, PROMPT - 1 :, :LETTERS].log_softmax(-1)  # END is never the model's to write
    chosen = log_probs[:, :-2].gather(2, traces[:, :, None]).sum((1, 2))
    return log_probs[:, -1] + chosen[:, None]


def every_joint(model: LlamaForCausalLM, params: Params, prompts: Tensor, traces: Tensor) -> Tensor:
    """log pi(trace, answer | prompt) of every prompt with every trace: (prompts, traces, LETTERS)."""
    n, m = len(prompts), len(traces)
    return joint(model, params, prompts.repeat_interleave(m, 0), traces.repeat(n, 1)).view(n, m, LETTERS)


def gradients(
    model: LlamaForCausalLM, params: Params, prompts: Tensor, traces: Tensor, answers: Tensor | None = None
) -> Tensor:
    """The gradient of each of `joint`'s values, (n, LETTERS, weights); of those of `answers` (n,) alone, (n, weights)."""

    def one(params: Params, prompt: Tensor, trace: Tensor, answer: Tensor) -> Tensor:
        values = joint(model, params, prompt[None], trace[None])[0]
        return values.gather(0, answer)

    n = len(prompts)
    wanted = torch.arange(LETTERS).expand(n, -1) if answers is None else answers[:, None]
    each = vmap(jacrev(one), in_dims=(None, 0, 0, 0))
    found = [
        torch.cat([g.flatten(2) for g in each(params, *part).values()], 2)
        for part in zip(prompts.split(CHUNK), traces.split(CHUNK), wanted.split(CHUNK))
    ]
    return torch.cat(found) if answers is None else torch.cat(found)[:, 0]


def adam(params: Params, loss: Callable[[Params], Tensor], steps: int, lr: float) -> Params:
    """The weights after so many steps on a loss of all weights."""
    trained = {name: p.clone().requires_grad_() for name, p in params.items()}
    optimizer = torch.optim.Adam(trained.values(), lr=lr)
    for _ in range(steps):
        optimizer.zero_grad()
        loss(trained).backward()
        optimizer.step()
    return {name: p.detach() for name, p in trained.items()}


def cold_start(model: LlamaForCausalLM, steps: int, seed: int = 0) -> Params:
    """The weights after learning from a teacher that errs: running sums as traces, and answers without a thought."""
    generator = torch.Generator().manual_seed(seed)

    def noisy(letters: Tensor, share: float) -> Tensor:
        wrong = torch.rand(letters.shape, generator=generator) < share
        return torch.where(wrong, torch.randint(LETTERS, letters.shape, generator=generator), letters)

    def loss(params: Params) -> Tensor:
        prompts = torch.randint(LETTERS, (BATCH, PROMPT), generator=generator)
        traces = noisy(prompts.cumsum(1) % LETTERS, ERRS)
        answers, guesses = noisy(traces[:, -1:], ERRS), noisy(right(prompts)[:, None], 2 * ERRS)
        thinking = joint(model, params, prompts, traces).gather(1, answers)
        return -(thinking + joint(model, params, prompts, prompts[:, :0]).gather(1, guesses)).mean()

    return adam(params_of(model), loss, steps, 1e-2)


def solved(joint: Tensor, answers: Tensor) -> Tensor:
    """The chance of the right answer, of each prompt, from `every_joint`'s values."""
    return joint.logsumexp(1).exp().gather(1, answers[:, None])[:, 0]

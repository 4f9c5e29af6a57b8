"""The rollout engine: the model's own distribution, whatever the slots; caches filled once a group."""

import numpy as np
import pytest
import torch

from longtrace import kernels as K
from longtrace.trainer.config import Refusal, TrainConfig
from longtrace.trainer.experience import Experience, RolloutSource
from longtrace.trainer.model import load_model
from longtrace.trainer.rollout import Engine, Sampling, _ends, _invert, draw

ARCHITECTURES = ("llama", "qwen2", "qwen3", "gemma3")


def loaded(folder, tmp_path, dtype="fp32"):
    model = load_model(TrainConfig(model=str(folder), out=tmp_path / "out", max_tokens=256, dtype=dtype))
    for parameter in model.hf.parameters():
        parameter.data = parameter.data.to({"fp32": torch.float32, "bf16": torch.bfloat16}[dtype])
    model.base.generation_config.eos_token_id = 2
    return model


def prompts_of(lengths, vocabulary, seed):
    draw = torch.Generator().manual_seed(seed)
    return [torch.randint(5, vocabulary, (n,), generator=draw).tolist() for n in lengths]


def text(completions):
    return [[c.tokens for c in group] for group in completions]


@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_greedy_is_the_models_own_generation(architecture, tiny_model, tmp_path, seed):
    model = loaded(tiny_model(architecture), tmp_path)
    vocabulary = model.base.config.get_text_config().vocab_size
    prompts = prompts_of((1, 7, 30, 12, 7), vocabulary, seed)
    ours = Engine.of(model, slots=2).generate(prompts, Sampling(24, temperature=0))
    reference = model.base
    reference.eval()
    for prompt, (completion,) in zip(prompts, ours, strict=True):
        with torch.no_grad():
            ids = list(prompt)
            for token in completion.tokens:  # teacher-forced: each token is the model's own best one
                logits = reference(torch.tensor([ids]), use_cache=False).logits[0, -1].float()
                assert logits[token] >= logits.max() - 1e-4
                ids.append(token)
        assert completion.finished == (completion.tokens[-1] == 2)
        assert completion.finished or len(completion.tokens) == 24


@pytest.mark.parametrize(("dtype", "most", "mean"), [("fp32", 1e-4, 1e-5), ("bf16", 2e-2, 2e-3)])
@pytest.mark.parametrize("architecture", ARCHITECTURES)
def test_log_probs_are_the_trainers(architecture, dtype, most, mean, tiny_model, tmp_path, seed):
    model = loaded(tiny_model(architecture), tmp_path, dtype)
    prompts = prompts_of((3, 20, 9), model.base.config.get_text_config().vocab_size, seed)
    sampling = Sampling(30, temperature=0.7)
    done = Engine.of(model, slots=4).generate(prompts, sampling, samples=3, seed=(seed,))
    experiences = [
        Experience(prompt, c.tokens, 0.0, 0, np.array(c.log_probs, dtype=np.float32))
        for prompt, group in zip(prompts, done)
        for c in group
    ]
    source = RolloutSource.__new__(RolloutSource)
    source.model, source.tokens_per_row = model, 128
    source.config = type("C", (), {"temperature": 0.7, "head_budget_mb": 0})
    gaps = np.concatenate(
        [np.abs(e.rollout_log_prob - trained) for e, trained in zip(experiences, source.log_probs(experiences))]
    )
    assert len(gaps) > 50 and gaps.max() < most and gaps.mean() < mean


@pytest.mark.parametrize("slots", [1, 3, 5, 64])
def test_samples_depend_neither_on_slots_nor_on_order(slots, tiny_model, tmp_path, seed):
    model = loaded(tiny_model("llama"), tmp_path)
    prompts = prompts_of((4, 11, 2, 19, 6), model.base.config.vocab_size, seed)
    sampling = Sampling(20, top_p=0.9)
    wide = Engine.of(model, slots=15).generate(prompts, sampling, samples=3, seed=(7, seed))
    assert text(Engine.of(model, slots=slots).generate(prompts, sampling, samples=3, seed=(7, seed))) == text(wide)
    other = Engine.of(model, slots=slots).generate(prompts, sampling, samples=3, seed=(8, seed))
    assert text(other) != text(wide)
    assert len({tuple(c.tokens) for group in wide for c in group}) == 15


def test_a_prompt_is_computed_once_for_its_group(tiny_model, tmp_path, seed):
    model = loaded(tiny_model("llama"), tmp_path)
    prompts = prompts_of((40, 50), model.base.config.vocab_size, seed)
    seen = []
    hook = model.base.base_model.register_forward_pre_hook(
        lambda module, args, kwargs: seen.append(kwargs["input_ids"].shape[1]), with_kwargs=True
    )
    Engine.of(model, slots=3).generate(prompts, Sampling(5), samples=4, seed=(seed,))
    hook.remove()
    assert sum(n for n in seen if n > 3) == 90


def test_stop_strings_cut_offs_and_refusals(tiny_model, tmp_path, seed):
    model = loaded(tiny_model("llama"), tmp_path)
    tokenizer = model.tokenizer
    prompts = prompts_of((4, 4), model.base.config.vocab_size, seed)
    done = Engine.of(model).generate(prompts, Sampling(60, stop=("a", "bc")), samples=8, seed=(seed,))
    texts = [(tokenizer.decode(c.tokens), c) for group in done for c in group]
    assert any("a" in t for t, _ in texts)
    for t, c in texts:
        assert ("a" in t or "bc" in t or c.tokens[-1] == 2) == c.finished
        assert "a" not in tokenizer.decode(c.tokens[:-1])
    with pytest.raises(Refusal, match="accepted: up to 508"):
        Engine.of(model).generate(prompts, Sampling(600))
    with pytest.raises(Refusal, match="without tokens"):
        Engine.of(model).generate([[1], []], Sampling(6))
    assert Engine.of(model).generate([], Sampling(6)) == []
    assert model.hf.training, "the model is handed back as it was"


@pytest.mark.parametrize("vocabulary", [1, 2, 255, 256, 257, 5000])
def test_tokens_are_drawn_by_their_probability(vocabulary, seed):
    """Every column's share of many evenly spread uniforms is its probability."""
    logits = torch.randn(1, vocabulary, generator=torch.Generator().manual_seed(seed)) * 3
    n = 20_000
    uniform = (torch.arange(n, dtype=torch.float64) + 0.5) / n
    tokens, log_probs = draw(logits.repeat(n, 1), uniform, Sampling(1))
    share = torch.bincount(tokens, minlength=vocabulary) / n
    p = logits[0].double().softmax(0)
    assert (share - p).abs().max() <= 2 / n
    assert (log_probs.double() - p.log()[tokens]).abs().max() < 1e-5


def test_edges_of_the_cumulative_distribution(seed):
    p = torch.zeros(2, 600)
    p[0, [3, 599]] = 0.5
    p[1, 300] = 1e-30
    for u in (0.0, 0.4999999, 0.5, 1 - 2**-53):
        first, second = _invert(p, _ends(p), torch.tensor([u, u], dtype=torch.float64)).tolist()
        assert first == (3 if u < 0.5 else 599) and second == 300


@pytest.mark.parametrize(("top_k", "top_p"), [(0, 0.9), (5, 1.0), (5, 0.5), (0, 1e-9), (0, 0.9999)])
def test_top_k_and_top_p(top_k, top_p, seed):
    logits = torch.randn(3, 4000, generator=torch.Generator().manual_seed(seed)) * 2
    n = 3000
    uniform = ((torch.arange(n, dtype=torch.float64) + 0.5) / n).repeat(3)
    tokens, log_probs = draw(logits.repeat_interleave(n, 0), uniform, Sampling(1, top_k=top_k, top_p=top_p))
    for row, drawn, told in zip(logits, tokens.split(n), log_probs.split(n)):
        p, order = row.double().softmax(0).sort(descending=True)
        p = p[: top_k or None] / p[: top_k or None].sum()
        kept = int((p.cumsum(0) - p < top_p).sum())
        expected = torch.zeros(4000, dtype=torch.float64)
        expected[order[:kept]] = p[:kept] / p[:kept].sum()
        share = torch.bincount(drawn, minlength=4000) / n
        assert (share - expected).abs().max() <= 2 / n + 1e-6
        assert (told.double() - row.double().log_softmax(0)[drawn]).abs().max() < 1e-5


def test_the_engine_uses_our_attention(tiny_model, tmp_path):
    assert loaded(tiny_model("llama"), tmp_path).base.config._attn_implementation == K.register_attention()

"""Policy-gradient objectives against formulas written out completion by completion in float64."""

import math

import numpy as np
import pytest
import torch

from longtrace.trainer.experience import Experience, collate, cut_off_rewards
from longtrace.trainer.model import Head
from longtrace.trainer.objectives import PolicyGradient, divergence, policy_loss, token_weights
from longtrace.trainer.source import IGNORE

V, H = 37, 16
LOSSES = ("grpo", "dr_grpo", "dapo", "gspo", "cispo")
LONGEST = 12


def case(seed, old=True, ref=False, scale=0.3):
    """Ragged completions with hidden states and head in float64: experiences, hidden states of a row, head weight."""
    rng = np.random.default_rng(seed)
    torch.manual_seed(seed)
    experiences = []
    for n, length in enumerate((1, 7, 12, 3, 5, 2)):
        experiences.append(
            Experience(
                rng.integers(0, V, rng.integers(1, 6)).tolist(),
                rng.integers(0, V, length).tolist(),
                float(rng.normal()),
                n,
                rng.normal(-3, scale, length).astype(np.float32),
                rng.normal(-3, scale, length).astype(np.float32) if old else None,
                rng.normal(-3, scale, length).astype(np.float32) if ref else None,
            )
        )
    targets = sum(len(e.completion) for e in experiences)
    hidden = torch.randn(targets, H, dtype=torch.float64, requires_grad=True)
    weight = (torch.randn(V, H, dtype=torch.float64) * 0.5).requires_grad_()
    return experiences, hidden, weight


def batch_of(experiences, loss):
    weights, count = token_weights(loss, [len(e.completion) for e in experiences], LONGEST)
    return collate(experiences, weights, count)


def written_out(objective, experiences, hidden, weight):
    """The step's loss, completion by completion, token by token, as the papers have it."""
    logits = hidden @ weight.T / objective.temperature
    log_p = logits.log_softmax(-1)
    total, at = [], 0
    for e in experiences:
        n = len(e.completion)
        rows = log_p[at : at + n]
        now = torch.stack([rows[t, token] for t, token in enumerate(e.completion)])
        old = now.detach() if e.old_log_prob is None else torch.tensor(e.old_log_prob).double()
        ratios = (now - old).exp()
        if objective.loss == "gspo":
            ratios = ((now - old).sum() / n).exp().expand(n)
        tokens = []
        for t in range(n):
            w, a = ratios[t], e.advantage
            if objective.loss == "cispo":
                value = -min(w.item(), 1 + objective.clip_high) * a * now[t]
            else:
                bounded = torch.clamp(w, 1 - objective.clip_low, 1 + objective.clip_high)
                if objective.clip_ratio and a < 0 and w.item() > objective.clip_ratio:
                    w = torch.tensor(objective.clip_ratio, dtype=torch.float64)
                value = -torch.min(w * a, bounded * a)
            if objective.importance_cap:
                value = value * min(math.exp(float(old[t]) - float(e.rollout_log_prob[t])), objective.importance_cap)
            if objective.beta:
                r = float(e.ref_log_prob[t]) - now[t]
                kl = {"k1": -r, "k2": 0.5 * r**2, "k3": r.exp() - r - 1}[objective.divergence.removeprefix("weighted_")]
                value = value + objective.beta * (kl * ratios[t] if objective.divergence == "weighted_k3" else kl)
            if objective.entropy_bonus:
                value = value + objective.entropy_bonus * (rows[t].exp() * rows[t]).sum()
            tokens.append(value)
        total.append(torch.stack(tokens))
        at += n
    if objective.loss in ("grpo", "gspo"):
        return sum(t.mean() for t in total) / len(total)
    if objective.loss == "dr_grpo":
        return sum(t.sum() for t in total) / (len(total) * LONGEST)
    return sum(t.sum() for t in total) / sum(len(t) for t in total)


OPTIONS = [
    {},  # each loss's own clips
    {"clip_low": 0.2, "clip_high": 0.2},
    {"clip_low": 0.2, "clip_high": 0.2, "clip_ratio": 1.3},
    {"beta": 0.1},
    {"beta": 0.1, "divergence": "k1"},
    {"beta": 0.1, "divergence": "k2"},
    {"beta": 0.1, "divergence": "weighted_k3"},
    {"entropy_bonus": 0.02},
    {"importance_cap": 1.2},
    {"importance_cap": 1.2, "beta": 0.03, "entropy_bonus": 0.01, "clip_low": 0.1, "clip_high": 0.4, "temperature": 0.7},
]


@pytest.mark.parametrize("options", OPTIONS, ids=lambda o: "-".join(o) or "plain")
@pytest.mark.parametrize("on_policy", [False, True], ids=["later", "first"])
@pytest.mark.parametrize("loss", LOSSES)
def test_every_variant_is_its_formula(loss, on_policy, options, seed):
    experiences, hidden, weight = case(seed, old=not on_policy, ref="beta" in options)
    objective = PolicyGradient(loss, **options)
    batch = batch_of(experiences, loss)
    value, _ = objective(hidden, Head(weight, None, 1.0, None), batch)
    value = value / objective.count(batch)
    got = torch.autograd.grad(value, (hidden, weight))
    expected = written_out(objective, experiences, hidden, weight)
    wanted = torch.autograd.grad(expected, (hidden, weight))
    # arrays of a batch are fp32
    torch.testing.assert_close(value, expected, rtol=1e-6, atol=1e-7)
    for a, b in zip(got, wanted):
        torch.testing.assert_close(a, b, rtol=1e-5, atol=1e-7 * float(b.abs().max()) + 1e-9)


@pytest.mark.parametrize("loss", LOSSES)
def test_known_coefficients_are_the_ratio_form_at_ratio_one(loss, seed):
    """The 6THV path and the 8THV path agree where both apply."""
    experiences, hidden, weight = case(seed, old=False)
    batch, head = batch_of(experiences, loss), Head(weight, None, 1.0, None)
    known, _ = PolicyGradient(loss)(hidden, head, batch)
    ratio, metrics = PolicyGradient(loss, entropy_bonus=1e-300)(hidden, head, batch)
    total, tokens = metrics["ratio"]
    assert tokens == len(hidden) and abs(total / tokens - 1) < 1e-12
    torch.testing.assert_close(known, ratio, rtol=2**-22, atol=1e-9)  # coefficients are fp32 products
    for a, b in zip(torch.autograd.grad(known, (hidden, weight)), torch.autograd.grad(ratio, (hidden, weight))):
        torch.testing.assert_close(a, b, rtol=0, atol=2**-22 * float(b.abs().max()))


def test_prompts_and_left_out_completions_get_no_gradient(seed):
    """Only completion tokens are targets, and an advantage of 0 leaves exact zeros."""
    experiences, hidden, weight = case(seed, old=False)
    experiences[2].advantage = 0.0
    batch = batch_of(experiences, "grpo")
    lengths = [len(e.completion) for e in experiences]
    assert int((batch.labels != IGNORE).sum()) == sum(lengths)
    spans = batch.cu_seqlens.tolist()
    for e, a, b in zip(experiences, spans, spans[1:]):
        assert batch.labels[a:b].tolist() == [IGNORE] * (len(e.prompt) - 1) + e.completion + [IGNORE]
        assert batch.input_ids[a:b].tolist() == e.prompt + e.completion
    value, _ = PolicyGradient()(hidden, Head(weight, None, 1.0, None), batch)
    (gradient,) = torch.autograd.grad(value, hidden)
    parts = gradient.split(lengths)
    assert torch.count_nonzero(parts[2]) == 0
    assert all(torch.count_nonzero(part) for i, part in enumerate(parts) if i != 2)


def test_divergence_estimators(seed):
    """On samples of p: k1, k3 and the weighted k3 have KL(p || q)'s mean; as losses k2 and weighted k3 have its gradient,
    k3 that of KL(q || p), k1 none. Sums over the whole vocabulary, so nothing is sampled."""
    torch.manual_seed(seed)
    z = torch.randn(V, dtype=torch.float64, requires_grad=True)
    q = torch.randn(V, dtype=torch.float64).log_softmax(0)

    def log_p():
        return z.log_softmax(0)

    def mean_of(kind):
        value = divergence(kind, log_p(), q, log_p() - log_p().detach())
        return (log_p().exp().detach() * value).sum()

    reverse = (log_p().exp() * (log_p() - q)).sum()
    forward = (q.exp() * (q - log_p())).sum()
    reverse_gradient, forward_gradient = (torch.autograd.grad(x, z)[0] for x in (reverse, forward))
    for kind in ("k1", "k3", "weighted_k3"):
        torch.testing.assert_close(mean_of(kind), reverse)
    for kind, wanted in (
        ("k1", torch.zeros_like(z)),
        ("k2", reverse_gradient),
        ("k3", forward_gradient),
        ("weighted_k3", reverse_gradient),
    ):
        torch.testing.assert_close(torch.autograd.grad(mean_of(kind), z)[0], wanted, rtol=1e-9, atol=1e-12)


def test_leave_one_out_is_the_mean_baseline_rescaled(seed):
    from longtrace import kernels as K

    rewards = torch.rand(7, generator=torch.Generator().manual_seed(seed), dtype=torch.float64)
    mean = K.group_advantages(rewards, [0, 7], scale="none").values
    others = K.group_advantages(rewards, [0, 7], scale="none", baseline="leave_one_out").values
    torch.testing.assert_close(others, 7 / 6 * mean)


def test_every_loss_has_its_papers_clips():
    assert {loss: (o.clip_low, o.clip_high) for loss in LOSSES for o in [PolicyGradient(loss)]} == {
        "grpo": (0.2, 0.2), "dr_grpo": (0.2, 0.2), "dapo": (0.2, 0.28), "gspo": (3e-4, 4e-4), "cispo": (1.0, 4.0),
    }  # fmt: skip
    given = PolicyGradient("gspo", clip_low=0.0, clip_high=0.3)
    assert (given.clip_low, given.clip_high) == (0.0, 0.3), "what is given stands, 0 too"


def test_a_huge_ratio_stays_finite():
    log_prob = torch.tensor([0.0, 0.0, -200.0], requires_grad=True)
    old = torch.tensor([-500.0, -500.0, 0.0])
    for loss in LOSSES:
        value, *_ = policy_loss(
            loss, log_prob, old, torch.tensor([1.0, -1.0, 1.0]), torch.tensor([0, 1, 2]), clip_low=0.2, clip_high=0.2
        )
        (gradient,) = torch.autograd.grad(value.sum(), log_prob)
        assert value.isfinite().all() and gradient.isfinite().all()


def test_what_the_clips_count():
    """A ratio held from above, from below, by the second bound, or not at all."""
    ratio = torch.tensor([1.5, 1.5, 0.5, 0.5, 9.0, 9.0, 1.0, 1.5])
    advantage = torch.tensor([1.0, -1.0, 1.0, -1.0, 1.0, -1.0, 1.0, 0.0])
    log_prob = ratio.log().requires_grad_()
    old, sequence = torch.zeros(8), torch.arange(8)
    options = dict(clip_low=0.2, clip_high=0.2, clip_ratio=4.0)
    value, _, above, below = policy_loss("grpo", log_prob, old, advantage, sequence, **options)
    assert above.nonzero().flatten().tolist() == [0, 4, 5] and below.nonzero().flatten().tolist() == [3]
    (gradient,) = torch.autograd.grad(value.sum(), log_prob)
    held = gradient == 0
    assert held.tolist() == (above | below | (advantage == 0)).tolist()
    _, _, above, below = policy_loss("cispo", log_prob, old, advantage, sequence, **options)
    assert above.nonzero().flatten().tolist() == [0, 1, 4, 5] and not below.any()


def test_rewards_of_completions_that_were_cut_off():
    rewards, cut = np.array([1.0, 0.0, math.nan, 0.5, math.nan]), np.array([False, False, True, True, False])
    assert cut_off_rewards(rewards, cut, "penalty").tolist()[:4] == [1, 0, 0, 0.5]
    masked = cut_off_rewards(rewards, cut, "mask")
    assert masked[:2].tolist() == [1, 0] and np.isnan(masked[2:4]).all()
    assert math.isnan(cut_off_rewards(rewards, cut, "penalty")[4]), "not cut off and not scored stays so"

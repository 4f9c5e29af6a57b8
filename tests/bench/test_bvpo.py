"""The BVPO benches on a model whose traces can be listed: what is exact is exact, and small whole runs."""

from __future__ import annotations

import json
import math

import pytest
import torch

from longtrace import kernels as K
from longtrace.bench import BenchConfig, bench
from longtrace.bench.experiments import bvpo_theorems, bvpo_training, enumerable

TINY = bvpo_theorems.Size(
    cold_start=20, prompts=3, letters=2, drift=6, traces=60, groups=64, draws=6, lengths=(2, 16), pairs=96
)


@pytest.fixture(scope="module")
def paths() -> list[bvpo_theorems.Paths]:
    """The policy as it was, and drifted."""
    return bvpo_theorems.make_paths(TINY, (0, TINY.drift))


def test_chances_add_up_and_the_model_is_causal_in_float64(seed):
    model = enumerable.make_model(seed, spread=0.5)
    params = enumerable.params_of(model)
    prompts, traces = enumerable.all_words(4)[::50], enumerable.all_words(3)
    joint = enumerable.every_joint(model, params, prompts, traces)
    assert joint.dtype == torch.float64
    torch.testing.assert_close(
        joint.logsumexp((1, 2)), torch.zeros(len(prompts), dtype=torch.float64), rtol=0, atol=1e-12
    )
    shorter = enumerable.every_joint(model, params, prompts, enumerable.all_words(2))
    begun = joint.logsumexp(2).view(len(prompts), 16, 4).logsumexp(2)
    torch.testing.assert_close(begun, shorter.logsumexp(2), rtol=1e-12, atol=1e-12)
    assert joint.std() > 0.1 and sum(p.numel() for p in params.values()) == 3060


def test_gradients_are_autograds_and_finite_differences(seed):
    model = enumerable.make_model(seed)
    params = {name: p.requires_grad_() for name, p in enumerable.params_of(model).items()}
    prompts, traces = enumerable.all_words(4)[[7, 200]], torch.tensor([[1, 2, 0], [3, 3, 1]])
    found = enumerable.gradients(model, params, prompts, traces)
    values = enumerable.joint(model, params, prompts, traces)
    one = torch.cat([g.flatten() for g in torch.autograd.grad(values[1, 2], list(params.values()))])
    torch.testing.assert_close(found[1, 2], one, rtol=1e-10, atol=1e-12)
    picked = enumerable.gradients(model, params, prompts, traces, torch.tensor([0, 2]))
    torch.testing.assert_close(picked, found[[0, 1], [0, 2]], rtol=1e-12, atol=1e-14)
    name, step = "model.layers.1.mlp.down_proj.weight", 1e-6
    offset = sum(p.numel() for n, p in list(params.items())[: list(params).index(name)])
    moved = {n: p.detach().clone() for n, p in params.items()}
    moved[name][0, 3] += step
    slope = (enumerable.joint(model, moved, prompts, traces) - values.detach()) / step
    torch.testing.assert_close(found[:, :, offset + 3], slope, rtol=1e-4, atol=1e-6)


def test_sampling_follows_the_chances(seed):
    model = enumerable.make_model(seed, spread=0.5)
    prompt = torch.tensor([[1, 3, 0, 2]])
    chances = enumerable.every_joint(model, enumerable.params_of(model), prompt, enumerable.all_words(1))[0].exp()
    generator = torch.Generator().manual_seed(seed)
    traces, answers = bvpo_theorems.sampled(model, prompt.expand(20_000, -1), 1, generator)
    counts = torch.zeros(4, 4, dtype=torch.float64).index_put_(
        (traces[:, 0], answers), torch.ones((), dtype=torch.float64), accumulate=True
    )
    chi_square = ((counts - 20_000 * chances) ** 2 / (20_000 * chances)).sum()
    assert chi_square < 45, "15 degrees of freedom: one in 10,000"


def test_exact_moments_are_those_of_draws(paths, seed):
    """The enumerated means, covariances and cross-covariance against 16,000 sampled pairs."""
    drifted, m = paths[1], paths[1].moments()
    trace, empty = drifted.draw(16_000, torch.Generator().manual_seed(seed))
    stats = K.path_statistics(*(x.view(400, 40, -1).sum(1) for x in (trace, empty)), [40] * 400)
    errors = stats.covariance.diagonal().sqrt()
    truth = [m.trace, m.empty, m.cross, *(float(a @ b) for a, b in _mean_pairs(m))]
    assert ((stats.values - torch.tensor(truth)).abs() < 4.5 * errors).all()
    assert 0 < m.given_data < m.trace and m.cross != 0
    mse = ((0.3 * trace + 0.7 * empty).view(2000, 8, -1).mean(1) - m.mu).square().sum(1)
    assert abs(float(mse.mean()) - float(m.mse(0.3, 8))) < 4.5 * float(mse.std()) / 2000**0.5


def _mean_pairs(m):
    trace, empty = m.mu + m.trace_bias, m.mu + m.empty_bias
    return (trace, trace), (empty, empty), (trace, empty)


def test_drift_makes_the_bias(paths):
    still, drifted = (p.moments() for p in paths)
    assert float(still.trace_bias.norm() / still.mu.norm()) < 1e-10
    assert float(drifted.trace_bias.norm() / drifted.mu.norm()) > 0.01
    for p, m in zip(paths, (still, drifted)):
        params = {name: w.clone().requires_grad_() for name, w in p.policy.items()}
        loss = p.marginal_loss(params)
        grads = torch.autograd.grad(loss, list(params.values()))
        torch.testing.assert_close(torch.cat([g.flatten() for g in grads]), m.mu, rtol=1e-9, atol=1e-12)
    first = paths[0].marginal_loss(paths[0].policy)
    assert float(first) == pytest.approx(math.log(2), rel=1e-12), "ln 2 at the reference"
    assert float(loss.detach()) < float(first)


def test_theorems(paths, seed):
    """The checks of the bench, at reduced size, on fresh draws."""
    drifted = paths[1]
    m, generator = drifted.moments(), torch.Generator().manual_seed(seed)
    for row in bvpo_theorems.given_data(drifted, TINY, generator):
        assert abs(row["ratio"] - row["alpha"] ** 2) < 4 * row["error"] and row["error"] < row["alpha"] ** 2 / 4
    grid = torch.linspace(0, 1, 2001, dtype=torch.float64)
    alphas = [m.best(batch) for batch in (1, 8, 128, 512)]
    for batch, alpha in zip((1, 8, 128, 512), alphas):
        assert alpha == pytest.approx(float(grid[m.mse(grid, batch).argmin()]), abs=6e-4)
        assert m.mse(alpha, batch) <= min(m.mse(0.0, batch), m.mse(1.0, batch))
    assert alphas == sorted(alphas) and alphas[-1] > alphas[0] + 0.1
    still = paths[0].moments()
    for batch in (1, 8, 128, 512):  # with an unbiased trace path the best alpha is estimable, with drift not quite
        assert still.estimable(batch) == pytest.approx(still.best(batch), abs=1e-9)
        assert m.mse(m.estimable(batch), batch) >= m.mse(m.best(batch), batch)
    rows = bvpo_theorems.estimated(paths[0], still, TINY, generator)
    last = [row for row in rows if row["microbatches"] == TINY.groups]
    assert len(last) == 6 and all(row["mse_ratio"] <= 1.15 for row in last)
    short, long = bvpo_theorems.against_length(TINY, 8, generator)
    assert long["trace_variance"] > 4 * short["trace_variance"] and long["alpha"] < short["alpha"]


def test_a_failed_check_is_seen(paths):
    """Moments that are wrong do not pass: the checks can fail."""
    m = paths[1].moments()
    wrong = m._replace(mu=1.01 * m.mu)
    rows = [bvpo_theorems._row(m, batch) for batch in (1, 512)]
    drawn = [{"alpha": 0.5, "ratio": 0.5, "error": 0.05}]
    estimates = [
        {"source": s, "batch": b, "microbatches": 8, "mse_ratio": 1.2} for s in ("gradients", "sketches") for b in bvpo_theorems.BATCHES
    ]  # fmt: skip
    flat = [
        {"length": x, "trace_variance": v, "alpha": 0.5, "alpha_error": 0.01} for x, v in ((2, 5.0), (4, 9.0), (8, 6.0))
    ]
    found = bvpo_theorems._checks(paths[1], m, wrong, rows, drawn, estimates, flat)
    failed = [i for i, (holds, _) in enumerate(found) if not holds]
    assert {0, 1, 2, 5, 8, 9} <= set(failed)


@pytest.mark.slow
def test_the_bench_runs(tmp_path, monkeypatch):
    monkeypatch.setattr(bvpo_theorems, "QUICK", bvpo_theorems.Size(
        cold_start=40, prompts=3, letters=2, drift=10, traces=100, groups=128, draws=6, lengths=(2, 8, 16), pairs=192
    ))  # fmt: skip
    bench(BenchConfig("experiments/bvpo_theorems", quick=True, json=tmp_path / "r.json"))
    record = json.loads((tmp_path / "r.json").read_text())
    assert len(record["checks"]) == 11 and all(line.startswith("holds") for line in record["checks"])
    assert record["half_is_close"] and (tmp_path / "bvpo_theorems.png").stat().st_size > 50_000


# ----------------------------------------------------------------------------------------------------------------------
# Training


def test_training_steps_follow_the_exact_gradients(paths, seed):
    """Means over many sampled pairs of each arm's gradient, along the two exact means."""
    still = paths[0]
    m = still.moments()
    exact = {"trace": m.mu + m.trace_bias, "k_trace": m.mu + m.trace_bias, "empty": m.mu + m.empty_bias}
    for arm, mean in exact.items():
        runs = bvpo_training.Runs(still, still.policy, arm, 600, [seed], 1e-3)
        runs.groups = 60  # samples of the gradient
        (found,) = (g for g in runs.path_gradients() if g is not None)
        assert found.shape == (1, 60, 3060)
        for direction in (m.mu, m.empty_bias):
            along = found[0] @ direction / direction.norm()
            truth = float(mean @ direction / direction.norm())
            assert abs(float(along.mean()) - truth) < 4.5 * float(along.std()) / 60**0.5, arm


def test_seeds_trained_together_are_those_trained_alone(paths):
    still = paths[0]
    for arm in bvpo_training.ARMS:
        together, alphas = bvpo_training.train(still, still.policy, arm, 4, 3, 1e-2, [5, 6])
        alone, _ = bvpo_training.train(still, still.policy, arm, 4, 3, 1e-2, [6])
        torch.testing.assert_close(together.weights[1], alone.weights[0], rtol=1e-7, atol=1e-9)
        assert not torch.equal(together.weights[0], together.weights[1]) and len(alphas) == 3
        assert (together.weights - torch.cat([p.flatten() for p in still.policy.values()])).abs().max() > 1e-3


def test_arms_cost_what_they_say():
    assert [bvpo_training.tokens_of(arm, 4) for arm in ("trace", "empty", "half", "auto", "k_trace")] == [
        20,
        12,
        32,
        32,
        80,
    ]


@pytest.mark.slow
def test_the_training_bench_runs(tmp_path, monkeypatch):
    tiny = bvpo_training.Size(
        cold_start=20, prompts=2, letters=2, batches=(4, 8), trace_steps=(6, 4), tuning=1, seeds=3
    )
    monkeypatch.setattr(bvpo_training, "QUICK", tiny)
    monkeypatch.setattr(bvpo_training, "RATES", (3e-3,))
    bench(BenchConfig("experiments/bvpo_training", quick=True, json=tmp_path / "r.json"))
    record = json.loads((tmp_path / "r.json").read_text())
    assert [row["impl"] for row in record["rows"]] == 2 * list(bvpo_training.ARMS)
    assert record["before"]["loss"] == pytest.approx(math.log(2), abs=1e-12)
    for row in record["rows"]:
        step = row["batch"] * bvpo_training.tokens_of(row["impl"], 2)
        assert abs(row["steps"] * step - row["tokens"]) <= step / 2, "equal tokens, to half a step"
    assert len(record["rows"][0]["loss_seeds"]) == 3 and (tmp_path / "bvpo_training.png").stat().st_size > 30_000

"""Preference losses against float64 formulas, packed pairs against single ones, and the two ways to blend against each other."""

import math

import numpy as np
import pytest
import torch

from longtrace import kernels as K
from longtrace.trainer.config import Refusal
from longtrace.trainer.model import Masters, Model
from longtrace.trainer.pair_source import PairSource
from longtrace.trainer.paths import GROUPS, SETTLED, START, Alpha, Paths
from longtrace.trainer.preference import Preference, preference_loss, sequence_log_probs
from longtrace.trainer.preferences import PairSet

LENGTHS = [(3, 5, 2), (1, 1, 90), (40, 70, 1), (7, 2, 2), (20, 33, 30), (2, 160, 3)]
"""(prompt, chosen, rejected) of pairs of wildly different lengths."""


def random_pairs(lengths, vocabulary, seed, paths=("trace",)):
    """Pairs of random tokens; the documents of a pair share their prompt."""
    rng = np.random.default_rng(seed)
    documents, prompts = [], []
    for prompt, chosen, rejected in lengths:
        context = rng.integers(0, vocabulary, prompt)
        for path in paths:
            own = context if path == "trace" else np.append(context, rng.integers(0, vocabulary))
            for n in (chosen, rejected) if path == "trace" else (1 + chosen // 8, 1 + rejected // 8):
                documents.append(np.concatenate([own, rng.integers(0, vocabulary, n)]))
                prompts.append(len(own))
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])])
    tokens = np.concatenate(documents).astype(np.uint32)
    return PairSet(tokens, offsets, np.array(prompts), paths, np.arange(len(lengths)), audit=None)


def load(folder, dtype=torch.float64):
    from transformers import AutoModelForCausalLM

    K.register_attention()
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=dtype, attn_implementation="longtrace")
    return Model(hf.train(), None, str(folder), False, "")


def source_of(pairs, *, tokens_per_row=100_000, pairs_per_step=None, reference=None, **options):
    source = PairSource(
        pairs, np.arange(len(pairs)), tokens_per_row=tokens_per_row, pairs_per_step=pairs_per_step or len(pairs), seed=0,
        **options,
    )  # fmt: skip
    source.reference = reference
    return source


def gradients(model, batches, objective):
    """(loss, {name: gradient}) of a step over the rows."""
    model.hf.zero_grad()
    count, total = sum(objective.count(batch) for batch in batches), 0.0
    for batch in batches:
        value, _ = objective(model.hidden(batch), model.head(), batch)
        (value / count).backward()
        total += float(value.detach())
    return total / count, {name: p.grad.clone() for name, p in model.hf.named_parameters()}


def reference_of(model, pairs):
    """(documents,) log-probs by transformers' own forward, one document at a time."""
    sums = []
    for d in range(len(pairs.lengths)):
        ids = torch.from_numpy(pairs.tokens[pairs.offsets[d] : pairs.offsets[d + 1]].astype(np.int64))
        log_probs = model.hf(input_ids=ids[None], use_cache=False).logits[0].log_softmax(-1)
        at = torch.arange(int(pairs.prompts[d]), len(ids))
        sums.append(log_probs[at - 1, ids[at]].sum())
    return torch.stack(sums)


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
@pytest.mark.parametrize("smoothing", [0.0, 0.2])
def test_losses_are_the_papers(loss, smoothing, seed):
    chosen, rejected, ref_chosen, ref_rejected = (-50 * torch.rand(4, 9, dtype=torch.float64)).unbind()
    lengths = torch.randint(1, 40, (2, 9)).double().unbind()
    losses, good, bad = preference_loss(
        loss, chosen, rejected, beta=0.3, gamma=0.7, label_smoothing=smoothing,
        reference=(ref_chosen, ref_rejected), lengths=lengths,
    )  # fmt: skip
    if loss == "dpo":
        margin = 0.3 * ((chosen - ref_chosen) - (rejected - ref_rejected)) - 0.7
    else:
        margin = 0.3 * (chosen / lengths[0] - rejected / lengths[1]) - 0.7
    wanted = -(1 - smoothing) * torch.sigmoid(margin).log() - smoothing * torch.sigmoid(-margin).log()
    assert torch.allclose(losses, wanted, rtol=1e-12, atol=1e-12)
    assert torch.allclose(good - bad, margin + 0.7, rtol=1e-12, atol=1e-12)


def test_losses_of_extreme_margins_are_finite():
    far = torch.tensor([1e5, -1e5], dtype=torch.float64, requires_grad=True)
    losses, _, _ = preference_loss("dpo", far, -far, beta=1.0, reference=(torch.zeros(2), torch.zeros(2)))
    losses.sum().backward()
    assert losses.tolist() == [0.0, 2e5] and torch.isfinite(far.grad).all()


@pytest.mark.parametrize("loss", ["dpo", "simpo"])
@pytest.mark.parametrize("paths", [("trace",), ("trace", "empty")])
def test_packed_equals_one_by_one_and_transformers(tiny_model, loss, paths, seed):
    model = load(tiny_model("llama"))
    pairs = random_pairs(LENGTHS, model.base.config.vocab_size, seed, paths)
    documents = reference_of(model, pairs)
    reference = documents.detach().numpy() + np.random.default_rng(seed).normal(0, 3, len(documents))
    objective = Preference(loss, beta=0.2, gamma=0.1, label_smoothing=0.1, suffixes=("_trace", "_empty"))
    weights = (0.3, 0.7) if len(paths) > 1 else (1.0, 0.0)
    source = source_of(pairs, reference=reference)
    packed = gradients(model, source.rows(range(len(pairs)), weights), objective)
    small = source_of(pairs, reference=reference, tokens_per_row=int(source.pair_lengths.max()))
    rows = small.rows(range(len(pairs)), weights)
    assert len(rows) > 1
    several = gradients(model, rows, objective)
    alone = gradients(model, [row for i in range(len(pairs)) for row in source.rows([i], weights)], objective)

    # transformers' logits, one document at a time
    model.hf.zero_grad()
    by_pair = reference_of(model, pairs).view(-1, len(paths), 2)
    ref = torch.from_numpy(reference).view(-1, len(paths), 2)
    sizes = torch.from_numpy(pairs.lengths - pairs.prompts).view(-1, len(paths), 2).double()
    losses, _, _ = preference_loss(
        loss, by_pair[..., 0], by_pair[..., 1], beta=0.2, gamma=0.1, label_smoothing=0.1,
        reference=(ref[..., 0], ref[..., 1]), lengths=(sizes[..., 0], sizes[..., 1]),
    )  # fmt: skip
    wanted = (losses.mean(0) * torch.tensor(weights[: len(paths)], dtype=torch.float64)).sum()
    wanted.backward()
    theirs = {name: p.grad for name, p in model.hf.named_parameters()}
    for value, found in (packed, several, alone):
        assert abs(value - float(wanted.detach())) < 1e-10
        for name, gradient in theirs.items():
            assert gradient.abs().max() > 0, name
            assert (found[name] - gradient).abs().max() < 1e-10, name


@pytest.mark.parametrize("dtype", [torch.float64, torch.float32, torch.bfloat16])
@pytest.mark.parametrize("paths", [("trace",), ("trace", "empty"), ("empty",)])
def test_the_first_loss_is_ln_2(tiny_model, dtype, paths, seed):
    """Packed and one by one; bf16 too, since the reference is taken on the rows that are trained on."""
    model = load(tiny_model("llama"), dtype)
    pairs = random_pairs(LENGTHS, model.base.config.vocab_size, seed, paths)
    for room in (100_000, 330):
        source = source_of(pairs, tokens_per_row=room, pairs_per_step=2)
        with torch.no_grad():
            first = list(source.first_pass(steps=3))
            assert sum(len(row.sizes) for row in first) == source.completions_ahead(3)
            source.keep_reference(
                (row, sequence_log_probs(model.hidden(row), model.head(), row).numpy()) for row in first
            )
        assert np.isfinite(source.reference).all()
        for _ in range(3):
            objective = Preference("dpo", beta=0.5, suffixes=("_trace", "_empty"))
            batches = source.next()
            sums = [objective(model.hidden(b), model.head(), b) for b in batches]
            values = [float(value.detach()) / float(b.weight.sum()) for b, (value, _) in zip(batches, sums)]
            assert all(abs(value - math.log(2)) < 1e-6 for value in values), values
            for _, told in sums:
                assert all(part / n == 0.5 for name, (part, n) in told.items() if name.startswith("accuracy"))


def test_every_pair_is_seen_once_an_epoch_and_the_last_step_is_short(seed):
    pairs = random_pairs([(2, 3, 4)] * 11, 50, seed, ("trace", "empty"))
    source = source_of(pairs, pairs_per_step=4, tokens_per_row=30, epochs=2)
    assert source.steps_left() == 6
    seen = []
    for left in range(6, 0, -1):
        assert source.steps_left() == left
        batches = source.next()
        assert sum(b.count for b in batches) == (4 if left > 1 else 2)
        assert all(b.tokens <= 30 for b in batches)
        seen += [d for b in batches for d in b.completions]
    assert source.steps_left() == 0 and source.progress == 2
    assert np.array_equal(np.bincount(seen), np.full(44, 2))
    labels = source.rows([3])[0]
    wanted = [pairs.tokens[pairs.offsets[d] + pairs.prompts[d] : pairs.offsets[d + 1]] for d in labels.completions]
    assert np.array_equal(labels.labels[labels.labels != -100].numpy(), np.concatenate(wanted))


def test_a_step_never_holds_more_than_all_pairs_and_epochs_may_be_parts(seed):
    pairs = random_pairs([(2, 3, 4)] * 10, 50, seed)
    assert sum(b.count for b in source_of(pairs, pairs_per_step=32, epochs=2).next()) == 10
    source = source_of(pairs, pairs_per_step=2, epochs=0.3)
    assert [sum(b.count for b in source.next()) for _ in range(source.steps_left())] == [2, 1]
    state, longer = source.state_dict(), source_of(pairs, pairs_per_step=2, epochs=1)
    longer.load_state_dict(state, {})
    seen = [sum(b.count for b in longer.next()) for _ in range(longer.steps_left())]
    assert seen == [2, 2, 2, 1] and longer.progress == 1


def test_a_pair_that_fits_no_row_is_refused(seed):
    with pytest.raises(Refusal, match="a pair of 27 tokens does not fit --tokens-per-row 26"):
        source_of(random_pairs([(10, 3, 4)], 50, seed), tokens_per_row=26)


# ---- two paths --------------------------------------------------------------------------------------------------------


def step_of(model, pairs, reference, alpha, *, apart, dtype, clip=0.0, steps=1):
    """The gradients the optimizer would get, and what was told, of the `steps`-th of equal steps."""
    masters = Masters(model, dtype)
    paths = Paths(Alpha.parse(alpha), apart=apart, clip=clip)
    objective = Preference("dpo", beta=0.2, suffixes=("_trace", "_empty"), paths=paths)
    source = source_of(
        pairs, reference=reference, grouped=True, tokens_per_row=300, weights=lambda s: paths.weights(s, 9)
    )
    for _ in range(steps):
        masters.zero_grad()
        batches = source.next()
        count, losses = sum(objective.count(b) for b in batches), {}
        for batch in batches:
            value, told = objective(model.hidden(batch), model.head(), batch)
            with paths.of(batch, masters, count):
                (value / count).backward()
            for name, (part, _) in told.items():
                losses[name] = losses.get(name, 0.0) + part / len(pairs)
        loss = paths.finish(masters, losses)
    return loss, {name: m.grad.clone() for name, m in masters.masters.items()}, paths


@pytest.fixture
def two_paths(tiny_model, seed):
    model = load(tiny_model("llama"), torch.float32)
    pairs = random_pairs(LENGTHS * 2, model.base.config.vocab_size, seed, ("trace", "empty"))
    with torch.no_grad():
        reference = reference_of(model, pairs).double().numpy()
    return model, pairs, reference + np.random.default_rng(seed).normal(0, 2, len(reference))


@pytest.mark.parametrize("alpha", [0.0, 0.3, 1.0])
def test_weighted_losses_equal_blended_gradients(two_paths, alpha):
    model, pairs, reference = two_paths
    plain = Preference("dpo", beta=0.2, suffixes=("_trace", "_empty"))
    value, weighted = gradients(
        model, source_of(pairs, reference=reference).rows(range(len(pairs)), (alpha, 1 - alpha)), plain
    )
    model.hf.zero_grad()
    blended_value, blended, paths = step_of(model, pairs, reference, str(alpha), apart=True, dtype=torch.float32)
    assert abs(value - blended_value) < 1e-6
    scale = max(float(g.abs().max()) for g in weighted.values())
    for name, gradient in weighted.items():
        assert (blended[name] - gradient).abs().max() < 2e-6 * scale, name
    assert paths.metrics["alpha"] == alpha


@pytest.mark.parametrize("path", ["trace", "empty"])
def test_alpha_of_one_path_is_that_path_bit_for_bit(two_paths, path):
    """alpha 1 is DPO on traces, alpha 0 DPO on empty traces: the other path's rows are not even there."""
    model, pairs, reference = two_paths
    side = 0 if path == "trace" else 1
    alpha = Alpha.parse("1" if path == "trace" else "0")
    assert alpha.paths == (path,)
    chosen = np.arange(len(pairs.lengths)).reshape(-1, 2, 2)[:, side].ravel()
    documents = [pairs.tokens[pairs.offsets[d] : pairs.offsets[d + 1]] for d in chosen]
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])])
    alone = PairSet(np.concatenate(documents), offsets, pairs.prompts[chosen], (path,), pairs.source, None)
    objective = Preference("dpo", beta=0.2)
    source = source_of(alone, reference=reference[chosen], tokens_per_row=330)
    weights = alpha.at(0, 1), 1 - alpha.at(0, 1)
    value, found = gradients(model, source.rows(range(len(pairs)), weights), objective)
    as_dpo = PairSet(alone.tokens, alone.offsets, alone.prompts, ("trace",), alone.source, None)
    dpo = source_of(as_dpo, reference=reference[chosen], tokens_per_row=330)
    wanted_value, wanted = gradients(model, dpo.rows(range(len(pairs))), objective)
    assert value == wanted_value and all(torch.equal(found[name], g) for name, g in wanted.items())


@pytest.mark.parametrize("apart", [True, False])
def test_the_estimate_is_that_of_whole_gradients(two_paths, apart):
    """Sketched as differences of one or two buffers, against the gradients of each group by themselves."""
    model, pairs, reference = two_paths
    plain = Preference("dpo", beta=0.2, suffixes=("_trace", "_empty"))
    source = source_of(pairs, reference=reference)
    order = source.order.tolist()
    groups = np.array_split(np.array(order), GROUPS)
    sums = [[], []]
    for group in groups:
        for path, weights in enumerate(((1.0, 0.0), (0.0, 1.0))):
            _, found = gradients(model, source.rows(group.tolist(), weights), plain)
            sums[path].append(torch.cat([g.flatten() for g in found.values()]).double() * len(group))
    exact = K.path_statistics(*(torch.stack(s) for s in sums), [len(g) for g in groups])
    model.hf.zero_grad()
    _, _, paths = step_of(model, pairs, reference, "auto", apart=apart, dtype=torch.float32)
    scale = exact.values[:2].sum()  # the tiny model has fewer weights than the sketch numbers: nothing collides much
    assert torch.allclose(paths.running.value().values, exact.values, atol=0.02 * float(scale), rtol=0.02)
    best = K.optimal_alpha(exact, len(pairs))
    assert abs(paths.metrics["alpha_estimate"] - best.alpha) < 0.03
    norms = [torch.stack(s).sum(0).norm() / len(pairs) for s in sums]
    assert abs(paths.metrics["grad_norm_trace"] / norms[0] - 1) < 0.02
    assert abs(paths.metrics["grad_norm_empty"] / norms[1] - 1) < 0.02
    cosine = torch.stack(sums[0]).sum(0) @ torch.stack(sums[1]).sum(0) / (norms[0] * norms[1] * len(pairs) ** 2)
    assert abs(paths.metrics["grad_cosine"] - cosine) < 0.02


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_one_buffer_and_two_agree_on_the_estimate(tiny_model, dtype, seed):
    results = []
    for apart in (True, False):
        model = load(tiny_model("llama"), torch.float32)
        pairs = random_pairs(LENGTHS * 2, model.base.config.vocab_size, seed, ("trace", "empty"))
        reference = np.random.default_rng(seed).normal(-200, 2, len(pairs.lengths))
        results.append(step_of(model, pairs, reference, "auto", apart=apart, dtype=dtype, steps=2)[2])
    a, b = (paths.running.value().values for paths in results)
    assert torch.allclose(a, b, rtol=1e-3, atol=1e-3 * float(a.abs().max())), (a, b)


def test_alpha_waits_for_significance_and_each_path_is_clipped(two_paths):
    model, pairs, reference = two_paths
    _, _, paths = step_of(model, pairs, reference, "auto", apart=True, dtype=torch.float32)
    told = paths.metrics
    assert told["alpha"] == START and math.isfinite(told["alpha_error"])  # one step is not enough
    paths.prompts[0] = 8.0
    paths.trusted, paths.running = False, K.RunningStatistics()
    noisy = K.PathStatistics(torch.tensor([4.0, 1, 0.5, 1, 1, 0.9]).double(), 100 * torch.eye(6).double())
    for _ in range(SETTLED + 1):
        paths._estimate(noisy)
    assert not paths.trusted and paths.alpha == START
    sure = K.PathStatistics(noisy.values, 1e-9 * torch.eye(6).double())
    for _ in range(60):
        paths._estimate(sure)
    assert paths.trusted and paths.alpha == K.optimal_alpha(paths.running.value(), 8.0).alpha != START

    model.hf.zero_grad()
    _, clipped, paths = step_of(model, pairs, reference, "0.25", apart=True, dtype=torch.float32, clip=1e-3)
    assert paths.metrics["clipped_trace"] == paths.metrics["clipped_empty"] == 1
    assert min(paths.metrics["grad_norm_trace"], paths.metrics["grad_norm_empty"]) > 0.1  # before clipping
    cosine = paths.metrics["grad_cosine"]
    wanted = 1e-3 * math.sqrt(0.25**2 + 0.75**2 + 2 * 0.25 * 0.75 * cosine)
    norm = float(torch.cat([g.flatten() for g in clipped.values()]).norm())
    assert abs(norm - wanted) < 1e-7


def test_the_estimators_state_survives_json(two_paths):
    import json

    model, pairs, reference = two_paths
    _, _, paths = step_of(model, pairs, reference, "auto", apart=True, dtype=torch.float32, steps=2)
    copy = Paths(Alpha.parse("auto"), apart=True)
    copy.load_state_dict(json.loads(json.dumps(paths.state_dict())))
    assert copy.state_dict() == paths.state_dict() and copy.alpha == paths.alpha


@pytest.mark.parametrize(("text", "ends", "paths"), [
    ("1", (1, 1), ("trace",)), ("0", (0, 0), ("empty",)), ("0.5", (0.5, 0.5), ("trace", "empty")),
    ("1:0.5", (1, 0.5), ("trace", "empty")), ("auto", (START, START), ("trace", "empty")),
])  # fmt: skip
def test_alpha_is_a_number_a_line_or_auto(text, ends, paths):
    alpha = Alpha.parse(text)
    assert (alpha.at(0, 11), alpha.at(10, 11)) == ends and alpha.paths == paths
    assert alpha.at(5, 11) == sum(ends) / 2 and alpha.at(99, 11) == ends[1]


@pytest.mark.parametrize("text", ["", "2", "-0.1", "nan", "0.5:", "a", "0:1:0", "Auto"])
def test_other_alphas_are_refused(text):
    with pytest.raises(Refusal, match="accepted: a number from 0 to 1"):
        Alpha.parse(text)

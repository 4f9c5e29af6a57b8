"""Do BVPO's theorems hold on a transformer, and is alpha = 0.5 right? Everything exact, by listing every trace.

From a small Llama whose traces can be enumerated (`enumerable`), a reference, and a policy that has drifted from it: the gradient mu
of the marginal loss, which trains what a user sees; bias and variance of the trace path (one sampled trace an answer) and of
the empty path about it; the blend's error against alpha and batch size. Then what a trainer would know: alpha from sampled
micro-batches, from sketches of them too. Last, longer traces than can be listed, sampled.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise
from pathlib import Path
from typing import NamedTuple

import numpy as np
import torch
from torch import Tensor
from torch.func import grad, vmap
from torch.nn.functional import logsigmoid

from longtrace import kernels as K

from .. import BenchConfig, harness
from ..harness import console
from ..head_report import _figure
from . import enumerable, toy
from .enumerable import LETTERS, Params

BETA = 0.5
BATCHES = (1, 8, 128)  # at which alpha is estimated
MOST = 512  # pairs of a batch
EXAMPLES, WIDTH = 8, 1024  # pairs of a micro-batch; numbers of a sketch (the model has 3,060 weights)
CLOSE = 1.15  # times the least error: close enough
ALPHAS = (0.25, 0.5, 0.75)
FIXED = {"trace": 1.0, "empty": 0.0, "half": 0.5}
STYLES = {"gradients": "-", "sketches": ":"}
LENGTH_BATCH = 8


@dataclass(frozen=True)
class Size:
    cold_start: int = 200  # steps
    prompts: int = 8
    letters: int = 4  # of a trace
    drift: int = 15  # steps from the reference to the policy
    traces: int = 300  # drawn for each of 6 pairs and alpha, theorem 1
    groups: int = 256  # micro-batches, at most
    draws: int = 25  # of alpha
    lengths: tuple[int, ...] = (2, 4, 8, 16, 32, 64)
    pairs: int = 640  # sampled at each length


QUICK = Size(
    cold_start=40, prompts=4, letters=3, drift=10, traces=150, groups=128, draws=10, lengths=(2, 8, 32), pairs=256
)


class Moments(NamedTuple):
    """Of one pair's gradients of the two paths: traces of covariances, and biases about mu."""

    trace: float  # S_t
    empty: float  # S_e
    cross: float  # S_te
    given_data: float  # of S_t, the part that the sampled traces cause: E Var(g_t | pair)
    trace_bias: Tensor  # (weights,)
    empty_bias: Tensor
    mu: Tensor

    def mse(self, alpha, batch: float):
        """E |alpha g_t + (1 - alpha) g_e - mu|^2 of means over a batch; alpha: a number or a tensor of any shape."""
        noise = alpha**2 * self.trace + (1 - alpha) ** 2 * self.empty + 2 * alpha * (1 - alpha) * self.cross
        b_t, b_e = self.trace_bias, self.empty_bias
        bias = alpha**2 * (b_t @ b_t) + (1 - alpha) ** 2 * (b_e @ b_e) + 2 * alpha * (1 - alpha) * (b_t @ b_e)
        return noise / batch + bias

    def best(self, batch: float) -> float:
        """Theorem 2's alpha at batch level, the trace path's own bias included."""
        b_t, b_e = self.trace_bias, self.empty_bias
        above = (self.empty - self.cross) / batch + b_e @ b_e - b_t @ b_e
        below = (self.trace + self.empty - 2 * self.cross) / batch + (b_t - b_e) @ (b_t - b_e)
        return float((above / below).clamp(0, 1))

    def estimable(self, batch: float) -> float:
        """The alpha that estimates from gradients tend to: the trace path taken for unbiased, as mu is not to be had."""
        trace, empty = self.mu + self.trace_bias, self.mu + self.empty_bias
        six = [self.trace, self.empty, self.cross, float(trace @ trace), float(empty @ empty), float(trace @ empty)]
        six = torch.tensor(six, dtype=torch.float64)
        return K.optimal_alpha(K.PathStatistics(six, torch.zeros(6, 6, dtype=torch.float64)), batch).alpha


class Pairs:
    """Preference data as the reference would give it. A pair is a prompt's right answer over a wrong one; each answer comes after
    a sampled trace, or, on the empty path, after none."""

    def __init__(self, model, reference: Params, prompts: Tensor, letters: int):
        self.model, self.prompts, self.right = model, prompts, enumerable.right(prompts)
        self.traces, self.nothing = enumerable.all_words(letters), enumerable.all_words(0)
        self.reference = enumerable.every_joint(model, reference, prompts, self.traces)  # (n, traces, LETTERS)
        self.reference_empty = enumerable.every_joint(model, reference, prompts, self.nothing)[:, 0]  # (n, LETTERS)
        self.posterior = (
            self.reference - self.reference.logsumexp(1, keepdim=True)
        ).exp()  # of a trace, given its answer
        self.wrong = self._wrong(
            self.reference.logsumexp(1)
        )  # (n, LETTERS): the chance of a wrong answer beside the right
        self.wrong_empty = self._wrong(self.reference_empty)

    def _wrong(self, log_probs: Tensor) -> Tensor:
        """Chances of wrong answers, the right one left out."""
        chances = log_probs.exp().scatter(1, self.right[:, None], 0)
        return chances / chances.sum(1, keepdim=True)

    def sample(self, shape: tuple[int, ...], generator: torch.Generator) -> dict[str, Tensor]:
        """So many pairs of both paths, as indices: prompt x, answers right, wrong, wrong_empty, traces good, bad."""
        x = torch.randint(len(self.prompts), shape, generator=generator)
        right, wrong, other = self.right[x], *(_pick(c[x], generator) for c in (self.wrong, self.wrong_empty))
        good, bad = (_pick(self.posterior.mT[x, answer], generator) for answer in (right, wrong))
        return {"x": x, "right": right, "wrong": wrong, "wrong_empty": other, "good": good, "bad": bad}

    def marginal_loss(self, params: Params) -> Tensor:
        """L_m: the preference loss of answers, their traces summed over."""
        return self.loss_of(enumerable.every_joint(self.model, params, self.prompts, self.traces))

    def loss_of(self, joint: Tensor) -> Tensor:
        """The same from `every_joint`'s values."""
        right = self.right[:, None]
        shift = BETA * (joint.logsumexp(1) - self.reference.logsumexp(1))
        return -(self.wrong * logsigmoid(shift.gather(1, right) - shift)).sum(1).mean()


class Paths(Pairs):
    """Both paths' gradients of every pair and trace."""

    def __init__(self, model, policy: Params, reference: Params, prompts: Tensor, letters: int):
        super().__init__(model, reference, prompts, letters)
        self.policy = policy
        n, m = len(prompts), len(self.traces)
        self.joint = enumerable.every_joint(model, policy, prompts, self.traces)
        self.grads = torch.stack(
            [enumerable.gradients(model, policy, x.expand(m, -1), self.traces) for x in prompts]
        )  # (n, m, LETTERS, weights)
        joint_empty = enumerable.every_joint(model, policy, prompts, self.nothing)[:, 0]
        empty_grads = enumerable.gradients(model, policy, prompts, prompts[:, :0])  # (n, LETTERS, weights)
        self.shift = BETA * (self.joint - self.reference)  # (n, m, LETTERS); a pair's margin is a difference of two
        rows = torch.arange(n)
        shift = BETA * (joint_empty - self.reference_empty)
        weight = torch.sigmoid(shift - shift[rows, self.right, None])  # (n, LETTERS), by the wrong answer
        self.empty = -BETA * weight[:, :, None] * (empty_grads[rows, self.right, None] - empty_grads)
        self._given_pairs()

    def _given_pairs(self) -> None:
        """Mean and mean square of g_t given the pair, by all traces of both answers; mu, by Fisher's identity."""
        n, _, _, weights = self.grads.shape
        self.trace = torch.zeros(n, LETTERS, weights, dtype=torch.float64)
        self.square = torch.zeros(n, LETTERS, dtype=torch.float64)
        self.mu = torch.zeros(weights, dtype=torch.float64)
        marginal = BETA * (self.joint.logsumexp(1) - self.reference.logsumexp(1))
        policy_posterior = (self.joint - self.joint.logsumexp(1, keepdim=True)).exp()
        scores = torch.einsum("xry,xryp->xyp", policy_posterior, self.grads)  # of log pi(answer | prompt)
        for x, y in enumerate(self.right.tolist()):
            good, p_good = self.grads[x, :, y], self.posterior[x, :, y]
            for w in range(LETTERS):
                if w == y:
                    continue
                bad, p_bad = self.grads[x, :, w], self.posterior[x, :, w]
                weight = torch.sigmoid(self.shift[x, None, :, w] - self.shift[x, :, None, y])  # (good, bad)
                chance = p_good[:, None] * p_bad * weight
                self.trace[x, w] = -BETA * (chance.sum(1) @ good - chance.sum(0) @ bad)
                chance = chance * weight
                squares = chance.sum(1) @ good.square().sum(1) + chance.sum(0) @ bad.square().sum(1)
                self.square[x, w] = BETA**2 * (squares - 2 * (chance * (good @ bad.T)).sum())
                weight = torch.sigmoid(marginal[x, w] - marginal[x, y])
                self.mu -= self.wrong[x, w] / n * BETA * weight * (scores[x, y] - scores[x, w])

    def moments(self) -> Moments:
        n = len(self.prompts)
        trace_given, empty_given = (
            torch.einsum("xw,xwp->xp", chances, values)
            for chances, values in ((self.wrong, self.trace), (self.wrong_empty, self.empty))
        )
        trace, empty = trace_given.mean(0), empty_given.mean(0)
        square = (self.wrong * self.square).sum() / n
        given = square - (self.wrong * self.trace.square().sum(2)).sum() / n
        return Moments(
            trace=float(square - trace @ trace),
            empty=float((self.wrong_empty * self.empty.square().sum(2)).sum() / n - empty @ empty),
            cross=float((trace_given * empty_given).sum() / n - trace @ empty),  # the paths share the prompt alone
            given_data=float(given),
            trace_bias=trace - self.mu,
            empty_bias=empty - self.mu,
            mu=self.mu,
        )

    def draw(self, pairs: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
        """The two paths' gradients of so many pairs, as data from the reference would give them: (pairs, weights) each."""
        x, y, w, other, good, bad = self.sample((pairs,), generator).values()
        weight = torch.sigmoid(self.shift[x, bad, w] - self.shift[x, good, y])
        return -BETA * weight[:, None] * (self.grads[x, good, y] - self.grads[x, bad, w]), self.empty[x, other]


def _pick(chances: Tensor, generator: torch.Generator) -> Tensor:
    """An index for each row of chances (..., n)."""
    return torch.multinomial(chances.flatten(0, -2), 1, generator=generator).view(chances.shape[:-1])


def make_pairs(cold_start: int, prompts: int, letters: int) -> tuple[Params, Pairs]:
    """A taught reference and the pairs that it gives for so many prompts."""
    model = enumerable.make_model(0)
    reference = enumerable.cold_start(model, cold_start)
    words = enumerable.all_words(enumerable.PROMPT)
    chosen = torch.randperm(len(words), generator=torch.Generator().manual_seed(1))[:prompts]
    return reference, Pairs(model, reference, words[chosen], letters)


def make_paths(size: Size, drifts: tuple[int, ...]) -> list[Paths]:
    """For each drift the policy that many steps on from the reference along the exact marginal loss."""
    reference, pairs = make_pairs(size.cold_start, size.prompts, size.letters)
    policies = [enumerable.adam(reference, pairs.marginal_loss, drift, 3e-3) for drift in drifts]
    return [Paths(pairs.model, policy, reference, pairs.prompts, size.letters) for policy in policies]


def given_data(paths: Paths, size: Size, generator: torch.Generator) -> list[dict]:
    """Theorem 1, measured: variances of gradients of the weighted loss over traces drawn for 6 pairs, beside exact ones of g_t.

    The gradients are autograd's, of the loss a trainer would write; the exact ones are sums over all traces.
    """
    pairs, model = 6, paths.model
    x = torch.randint(len(paths.prompts), (pairs,), generator=generator)
    y = paths.right[x]
    w, other = (_pick(chances[x], generator) for chances in (paths.wrong, paths.wrong_empty))
    exact = (paths.square - paths.trace.square().sum(2))[x, w]

    def loss(params: Params, prompt, good, bad, before, answers, alpha):
        """before: the reference's log-probabilities; both of the answers (right, wrong, wrong without a thought)."""

        def value(trace, answer, before):
            return enumerable.joint(model, params, prompt[None], trace[None])[0].gather(0, answer[None])[0] - before

        y, w, other = answers
        trace = value(good, y, before[0]) - value(bad, w, before[1])
        empty = value(good[:0], y, before[2]) - value(good[:0], other, before[3])
        return -alpha * logsigmoid(BETA * trace) - (1 - alpha) * logsigmoid(BETA * empty)

    each = vmap(grad(loss), in_dims=(None, 0, 0, 0, 0, 0, None))
    rows = []
    for alpha in ALPHAS:
        found, errors = 0.0, 0.0
        for i in range(pairs):
            many = size.traces
            good, bad = (_pick(paths.posterior[x[i], :, a].expand(many, -1), generator) for a in (y[i], w[i]))
            before = torch.stack(
                (
                    paths.reference[x[i], good, y[i]],
                    paths.reference[x[i], bad, w[i]],
                    paths.reference_empty[x[i], y[i]].expand(many),
                    paths.reference_empty[x[i], other[i]].expand(many),
                ),
                1,
            )
            answers = torch.stack((y[i], w[i], other[i])).expand(many, -1)
            prompts = paths.prompts[x[i]].expand(many, -1)
            drawn = each(paths.policy, prompts, paths.traces[good], paths.traces[bad], before, answers, alpha)
            grads = torch.cat([g.flatten(1) for g in drawn.values()], 1)
            squares = (grads - grads.mean(0)).square().sum(1) * many / (many - 1)
            found += float(squares.mean())
            errors += float(squares.var()) / many
        total = float(exact.sum())
        rows.append({"alpha": alpha, "ratio": found / total, "error": errors**0.5 / total})
    return rows


def estimated(paths: Paths, moments: Moments, size: Size, generator: torch.Generator) -> list[dict]:
    """The blend's error with alpha from sampled micro-batches, over the least, averaged over draws; from sketches too."""
    shapes = [p.shape for p in paths.policy.values()]
    numels = [p.numel() for p in paths.policy.values()]
    counts = [n for n in (4, 8, 16, 32, 64, 128, 256, 512) if n <= size.groups]
    errors: dict[tuple, list[tuple[float, float]]] = {}
    for draw in range(size.draws):
        sketch = K.CountSketch(shapes, WIDTH, seed=draw)
        sums = [g.view(size.groups, EXAMPLES, -1).sum(1) for g in paths.draw(size.groups * EXAMPLES, generator)]
        sketches = [
            torch.stack([sketch([p.view(s) for p, s in zip(row.split(numels), shapes)]) for row in g]) for g in sums
        ]
        for source, path in (("gradients", sums), ("sketches", sketches)):
            for n in counts:
                stats = K.path_statistics(path[0][:n], path[1][:n], [EXAMPLES] * n)
                for batch in BATCHES:
                    alpha = K.optimal_alpha(stats, batch).alpha
                    errors.setdefault((source, n, batch), []).append((alpha, float(moments.mse(alpha, batch))))
    rows = []
    for (source, n, batch), found in errors.items():
        alphas, values = torch.tensor(found, dtype=torch.float64).T
        least = float(moments.mse(moments.best(batch), batch))
        rows.append({
            "source": source, "microbatches": n, "batch": batch, "alpha": float(alphas.mean()),
            "alpha_sd": float(alphas.std()), "mse_ratio": float(values.mean()) / least,
        })  # fmt: skip
    return rows


def against_length(size: Size, batch: int, generator: torch.Generator) -> list[dict]:
    """Variances and alpha against the letters of a trace: sampled, at random weights, the policy being the reference.

    No trace was taught at these lengths, so no answer is right: of two unequal answers the larger letter is preferred.
    """
    model = enumerable.make_model(0)
    params, rows = enumerable.params_of(model), []
    for length in size.lengths:
        prompts = torch.randint(LETTERS, (size.pairs, enumerable.PROMPT), generator=generator)
        paths = [_pairs(model, params, prompts, letters, generator) for letters in (length, 0)]
        stats = K.path_statistics(*paths, [1] * size.pairs)
        best = K.optimal_alpha(stats, batch)
        rows.append({
            "length": length, "trace_variance": stats.trace_variance, "empty_variance": stats.empty_variance,
            "trace_error": float(stats.covariance[0, 0].sqrt()), "distance_sq": best.distance_sq,
            "alpha": best.alpha, "alpha_error": best.error, "batch": batch,
        })  # fmt: skip
    return rows


def _pairs(model, params: Params, prompts: Tensor, letters: int, generator: torch.Generator) -> Tensor:
    """The gradient of one sampled pair for each prompt, at the reference: (prompts, weights)."""
    gradients = torch.zeros(len(prompts), sum(p.numel() for p in params.values()), dtype=torch.float64)
    missing = torch.arange(len(prompts))
    while len(missing):  # equal answers are no pair: drawn again
        few = prompts[missing]
        both = [sampled(model, few, letters, generator) for _ in range(2)]
        sign = (both[0][1] - both[1][1]).sign()  # 1: the first is the larger letter
        pairs = sign.nonzero()[:, 0]
        if len(pairs):
            scores = [enumerable.gradients(model, params, few[pairs], t[pairs], a[pairs]) for t, a in both]
            gradients[missing[pairs]] = -BETA / 2 * sign[pairs, None] * (scores[0] - scores[1])
        missing = missing[sign == 0]
    return gradients


@torch.no_grad()
def sampled(model, prompts: Tensor, letters: int, generator: torch.Generator) -> tuple[Tensor, Tensor]:
    """A trace and an answer for each prompt: (n, letters), (n,)."""
    out = model(input_ids=prompts, use_cache=True)
    written = []
    for _ in range(letters):
        written.append(_pick(out.logits[:, -1, :LETTERS].softmax(-1), generator))
        out = model(input_ids=written[-1][:, None], past_key_values=out.past_key_values, use_cache=True)
    end = torch.full_like(prompts[:, :1], enumerable.END)
    out = model(input_ids=end, past_key_values=out.past_key_values, use_cache=True)
    traces = torch.stack(written, 1) if written else prompts[:, :0]
    return traces, _pick(out.logits[:, -1, :LETTERS].softmax(-1), generator)


def bench(config: BenchConfig) -> None:
    """Enumerates, samples, prints the checks, draws bvpo_theorems.png, writes the record. Raises Refusal if a check fails."""
    size = QUICK if config.quick else Size()
    torch.set_num_threads(1)  # a model this small is slower on more
    machine = harness.machine(1)
    generator = torch.Generator().manual_seed(2)
    still, paths = make_paths(size, (0, size.drift))
    unmoved, moments = still.moments(), paths.moments()
    del still  # its gradients fill a few hundred megabytes
    drawn = given_data(paths, size, generator)
    sampled_alpha = estimated(paths, moments, size, generator)
    lengths = against_length(size, LENGTH_BATCH, generator)
    batches = [_row(moments, batch) for batch in range(1, MOST + 1)]
    columns = {"batch": "B", "alpha": "alpha*", "mse": "least MSE", "trace": "trace only", "empty": "empty only", "half": "alpha = 0.5", "estimable": "estimable alpha"}  # fmt: skip
    shown = [batches[b - 1] for b in (1, 2, 4, 8, 16, 32, 64, 128, 256, 512)]
    formats = dict.fromkeys(("alpha", "trace", "empty", "half", "estimable"), ".2f") | {"mse": ".3g"}
    harness.print_table("MSE about the marginal gradient, over the least", columns, shown, formats)
    _print_moments(moments)
    checks = toy.hold(_checks(paths, unmoved, moments, batches, drawn, sampled_alpha, lengths))
    what = (
        f"a Llama of 3,060 weights in float64, {size.prompts} prompts, every trace of {size.letters} letters of {LETTERS}, beta {BETA}, "
        f"policy {size.drift} steps from its reference"
    )
    rows = [*({"part": "batch"} | row for row in shown), *({"part": "given data"} | row for row in drawn),
            *({"part": "estimated"} | row for row in sampled_alpha), *({"part": "length"} | row for row in lengths)]  # fmt: skip
    found = {name: value for name, value in moments._asdict().items() if isinstance(value, float)}
    norms = {name: float(getattr(moments, name).norm()) for name in ("trace_bias", "empty_bias", "mu")}
    record = harness.write_record(
        "bvpo_theorems", config.json, machine=machine, rows=rows, ratios={}, setting=what, moments=found | norms,
        half_is_close=_band(batches), microbatches_needed=_needed(sampled_alpha), checks=checks,
    )  # fmt: skip
    _picture(record.parent / "bvpo_theorems.png", moments, batches, drawn, sampled_alpha, lengths, what)
    console.print(f"record in {record}, picture beside it", highlight=False)
    toy.refuse_failed("bvpo_theorems", checks)


def _row(moments: Moments, batch: int) -> dict:
    """At a batch size: the best alpha, its MSE, and how many times that the fixed ones have."""
    alpha = moments.best(batch)
    least = float(moments.mse(alpha, batch))
    fixed = {name: float(moments.mse(value, batch)) / least for name, value in FIXED.items()}
    limit = moments.estimable(batch)
    fixed |= {"estimable_alpha": limit, "estimable": float(moments.mse(limit, batch)) / least}
    return {"batch": batch, "alpha": alpha, "mse": least} | fixed


def _band(batches: list[dict]) -> list[int]:
    """The smallest and the largest batch at which 0.5 is close to the best; empty where none is."""
    close = [row["batch"] for row in batches if row["half"] <= CLOSE]
    return [close[0], close[-1]] if close else []


def _needed(rows: list[dict]) -> dict[str, dict[int, int | None]]:
    """By source and batch size: the fewest micro-batches from which on the estimated alpha's error is close to the least."""
    needed: dict[str, dict[int, int | None]] = {}
    for source in ("gradients", "sketches"):
        for batch in BATCHES:
            mine = [r for r in rows if (r["source"], r["batch"]) == (source, batch)]
            far = [i for i, r in enumerate(mine) if r["mse_ratio"] > CLOSE]
            first = far[-1] + 1 if far else 0
            needed.setdefault(source, {})[batch] = mine[first]["microbatches"] if first < len(mine) else None
    return needed


def _print_moments(m: Moments) -> None:
    console.print(
        f"one pair: S_t {m.trace:.2f} ({m.given_data / m.trace:.0%} of it from the sampled traces), S_e {m.empty:.2f}, S_te {m.cross:.2f}; "
        f"|mu| {float(m.mu.norm()):.2f}, |b_t| {float(m.trace_bias.norm()):.2f}, |b_e| {float(m.empty_bias.norm()):.2f}",
        highlight=False,
    )


def _checks(paths, still, m, batches, drawn, estimates, lengths) -> list[tuple[bool, str]]:
    params = {name: p.clone().requires_grad_() for name, p in paths.policy.items()}
    autograd = torch.autograd.grad(paths.marginal_loss(params), list(params.values()))
    fisher = float((torch.cat([g.flatten() for g in autograd]) - m.mu).norm() / m.mu.norm())
    unbiased = float(still.trace_bias.norm() / still.mu.norm())
    grid = torch.linspace(0, 1, 10_001, dtype=torch.float64)
    gaps = [abs(row["alpha"] - float(grid[m.mse(grid, row["batch"]).argmin()])) for row in batches]
    worst = max(1 / min(row["trace"], row["empty"]) for row in batches)
    off = max(abs(row["ratio"] - row["alpha"] ** 2) / row["error"] for row in drawn)
    ratios = {b: max(r["mse_ratio"] for r in estimates if r["batch"] == b and r["microbatches"] == _most(estimates)) for b in BATCHES}  # fmt: skip
    needed = [n for found in _needed(estimates).values() for n in found.values()]
    enough = f"{max(needed)}" if None not in needed else "more"
    band = _band(batches)
    slope, fit = _line(lengths)
    first, last = lengths[0], lengths[-1]
    kappa = 0.1  # step size times smoothness: the noise counts kappa times (theorem 4)
    b_t, b_e = m.trace_bias, m.empty_bias
    bound = [float(_square(a * b_t + (1 - a) * b_e) * (1 - kappa) + kappa * m.mse(a, 1)) for a in grid[::10]]
    steps = abs(m.best(1 / kappa) - float(grid[::10][int(np.argmin(bound))]))
    return [
        (fisher < 1e-10, f"enumerated mu = autograd of the marginal loss ({fisher:.0e} apart)"),
        (unbiased < 1e-10, f"without drift the trace path is unbiased (|b_t| / |mu| {unbiased:.0e}; {float(b_t.norm() / m.mu.norm()):.2f} with)"),
        (off <= 3, f"Var(g_c | data) = alpha^2 Var(g_t | data): sampled ratios at most {off:.1f} standard errors off"),
        (worst <= 1 + 1e-12, f"MSE(alpha*) <= min(MSE_t, MSE_e) at every batch of 1 to {MOST} (at most {worst:.3f} of it)"),
        (max(gaps) <= 1e-4, f"closed form = minimum over a grid at every batch (at most {max(gaps):.0e} apart)"),
        (all(r <= CLOSE for r in ratios.values()), f"MSE(estimated alpha) <= {CLOSE} MSE(alpha*) at B = " + ", ".join(f"{b}: {r:.3f}" for b, r in ratios.items()) + f"; {enough} micro-batches of {EXAMPLES} pairs do, sketched or not"),
        (bool(band) and (band[0] > 1 or band[1] < MOST), f"alpha = 0.5 is within {CLOSE} of the least MSE only from B = {band[0] if band else '-'} to {band[1] if band else '-'} (B = 1: {batches[0]['half']:.2f}, B = {MOST}: {batches[-1]['half']:.2f})"),
        (all(a["alpha"] <= b["alpha"] for a, b in pairwise(batches)), f"alpha* rises with the batch, {batches[0]['alpha']:.2f} to {batches[-1]['alpha']:.2f}"),
        (fit > 0.98 and slope > 0, f"S_t grows linearly with the trace, {first['trace_variance']:.0f} at {first['length']} letters to {last['trace_variance']:.0f} at {last['length']} (R^2 {fit:.4f})"),
        (last["alpha"] + last["alpha_error"] < first["alpha"] - first["alpha_error"], f"alpha* falls with it at B = {LENGTH_BATCH}, {first['alpha']:.2f} +- {first['alpha_error']:.2f} to {last['alpha']:.2f} +- {last['alpha_error']:.2f}"),
        (steps <= 1e-3, f"theorem 4 at eta L = {kappa}: its alpha is theorem 2's at B / {kappa} ({m.best(1):.2f} becomes {m.best(1 / kappa):.2f} at B = 1)"),
    ]  # fmt: skip


def _most(rows: list[dict]) -> int:
    return max(row["microbatches"] for row in rows)


def _square(x: Tensor) -> Tensor:
    return x @ x


def _line(lengths: list[dict]) -> tuple[float, float]:
    """Slope of S_t against the length, and the share of its variation that a line explains."""
    x, y = (np.array([row[key] for row in lengths]) for key in ("length", "trace_variance"))
    slope, start = np.polyfit(x, y, 1)
    return float(slope), float(1 - ((y - slope * x - start) ** 2).sum() / ((y - y.mean()) ** 2).sum())


BLUE, RED, GREEN, GREY, INK = "#2f6fde", "#c0392b", "#1f9d63", "#9aa4b2", "#15181e"


def _picture(path: Path, m: Moments, batches, drawn, estimates, lengths, note: str) -> None:
    figure, axes = _figure("BVPO's blend on a transformer whose every trace is listed", note, 3, 8.6, rows=2)
    curves, fixed, measured, alphas, guesses, longer = axes
    grid = torch.linspace(0, 1, 201, dtype=torch.float64)
    colours = dict(zip(BATCHES, (BLUE, GREEN, RED)))
    for batch, colour in colours.items():
        best = m.best(batch)
        scale = float(m.mse(best, batch))
        curves.plot(grid, m.mse(grid, batch) / scale, color=colour, label=f"B = {batch}: alpha* = {best:.2f}")
        curves.plot(best, 1, "o", color=colour, markersize=6)
    curves.axvline(0.5, color=GREY, linestyle=":", linewidth=1.2)
    _axes(
        curves,
        "Error against alpha, by batch size",
        "alpha (0: empty path alone, 1: traces alone)",
        "MSE / least MSE",
        (0.9, 6),
    )
    sizes = [row["batch"] for row in batches]
    for key, label, colour in (
        ("trace", "traces alone", RED),
        ("empty", "empty path alone", GREEN),
        ("half", "alpha = 0.5", INK),
    ):
        fixed.plot(sizes, [row[key] for row in batches], color=colour, label=label)
    fixed.axhline(1, color=BLUE, label="alpha*")
    fixed.plot(
        sizes, [row["estimable"] for row in batches], "--", color=BLUE, label="alpha estimated from endless data"
    )
    _shade(fixed, batches)
    _axes(fixed, "What a fixed alpha costs", "batch size, pairs", "MSE / least MSE", (0.9, 6))
    alphas.plot(sizes, [row["alpha"] for row in batches], color=BLUE, label="alpha*")
    alphas.plot(
        sizes, [row["estimable_alpha"] for row in batches], "--", color=BLUE, label="estimated from endless data"
    )
    alphas.axhline(0.5, color=INK, linewidth=1, label="alpha = 0.5")
    _shade(alphas, batches)
    _axes(alphas, "The best alpha rises with the batch", "batch size, pairs", "alpha*", (0, 1))
    for ax in (fixed, alphas):
        _powers(ax, [1, 2, 4, 8, 16, 32, 64, 128, 256, 512])
    measured.plot(grid, grid**2, color=GREY, label="alpha^2")
    measured.errorbar(
        [r["alpha"] for r in drawn], [r["ratio"] for r in drawn], [3 * r["error"] for r in drawn], fmt="o", color=BLUE,
        capsize=4, label="sampled (bars: 3 standard errors)",
    )  # fmt: skip
    _axes(measured, "Theorem 1: variance over traces, data given", "alpha", "Var(g_c | data) / Var(g_t | data)", (0, 1))
    for (batch, colour), (source, style) in ((c, s) for c in colours.items() for s in STYLES.items()):
        line = [(r["microbatches"], r["mse_ratio"]) for r in estimates if (r["source"], r["batch"]) == (source, batch)]
        label = f"B = {batch}, {source}"
        guesses.plot(*zip(*line), style, marker="o", markersize=3.5, color=colour, label=label)
    guesses.axhline(CLOSE, color=GREY, linestyle=":", linewidth=1.2)
    highest = max([CLOSE, *(r["mse_ratio"] for r in estimates)])
    _axes(
        guesses,
        f"alpha estimated from micro-batches of {EXAMPLES} pairs",
        "micro-batches",
        "MSE / least MSE, mean over draws",
        (0.99, 1.02 * highest),
    )
    _powers(guesses, sorted({r["microbatches"] for r in estimates}))
    x = [r["length"] for r in lengths]
    longer.errorbar(
        x,
        [r["trace_variance"] for r in lengths],
        [1.96 * r["trace_error"] for r in lengths],
        fmt="o-",
        color=RED,
        markersize=4,
        label="S_t, traces",
    )
    longer.plot(x, [r["empty_variance"] for r in lengths], "o-", color=GREEN, markersize=4, label="S_e, empty path")
    longer.set_yscale("log")
    _axes(
        longer,
        f"Longer traces: more variance, less alpha (B = {LENGTH_BATCH})",
        "letters of a trace",
        "variance of one pair's gradient",
        None,
        "upper center",
    )
    _powers(longer, x)
    other = longer.twinx()
    other.errorbar(
        x,
        [r["alpha"] for r in lengths],
        [1.96 * r["alpha_error"] for r in lengths],
        fmt="s--",
        color=BLUE,
        capsize=3,
        markersize=4,
    )
    other.set_ylabel("alpha* (dashed; bars 95 %)", color=BLUE)
    other.set_ylim(0, None)
    other.spines[["top"]].set_visible(False)
    figure.savefig(path)


def _axes(ax, title: str, x: str, y: str, limits: tuple[float, float] | None, legend: str = "best") -> None:
    ax.set_title(title, loc="left", fontsize=10, color="#5d6673")
    ax.set_xlabel(x)
    ax.set_ylabel(y)
    if limits:
        ax.set_ylim(*limits)
    ax.legend(frameon=False, fontsize=8, loc=legend)


def _shade(ax, batches: list[dict]) -> None:
    """The batches at which 0.5 is close to the best."""
    if band := _band(batches):
        ax.axvspan(*band, color=GREY, alpha=0.18, linewidth=0, label=f"0.5 within {CLOSE}: B = {band[0]} to {band[1]}")


def _powers(ax, ticks: list[int]) -> None:
    ax.set_xscale("log", base=2)
    ax.set_xticks(ticks, [f"{tick}" for tick in ticks])
    ax.minorticks_off()

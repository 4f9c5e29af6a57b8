"""BVPO's two gradients: sampled, kept apart where asked for, and blended: g = alpha g_trace + (1 - alpha) g_empty.

`--blend loss`: the losses are weighted, one buffer, one backward; `--blend gradients`: a buffer for each path, then
`K.blend_gradients`. Either way each group of prompts is a sample of both gradients, from which the best alpha is computed.
"""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from rich.console import Console

from longtrace import kernels as K

from .config import Refusal
from .model import Masters
from .source import PairBatch

console = Console()

GROUPS = 8  # samples of the gradients a step is cut into
FEWEST = 3  # below which a step says nothing of their variance
SIGNIFICANT = 2.0  # standard errors that the estimate has to be away from START, once
SETTLED = 4  # steps before that may be found
START = 0.5
EDGE = 0.01  # with one buffer a path of weight 0 could not be estimated any more


@dataclass(frozen=True)
class Alpha:
    """`--alpha`: a constant, a line from one to another over the run, or estimated."""

    first: float = 1.0
    last: float = 1.0
    auto: bool = False

    @staticmethod
    def parse(text: str) -> Alpha:
        """auto, 0.5 or 1:0.5. Raises Refusal."""
        text = str(text)  # of a Python call
        if text == "auto":
            return Alpha(START, START, auto=True)
        try:
            first, line, last = text.partition(":")
            ends = float(first), float(last if line else first)
            if not all(0 <= x <= 1 for x in ends):
                raise ValueError
        except ValueError:
            raise Refusal(
                f"--alpha {text}: accepted: a number from 0 to 1, FROM:TO (a line over the run; in YAML between quotes), or auto"
            ) from None
        return Alpha(*ends)

    def at(self, step: int, steps: int) -> float:
        """Of the step (0-based) of so many; auto's comes from `Paths`."""
        return self.first + (self.last - self.first) * min(1.0, step / max(1, steps - 1))

    @property
    def paths(self) -> tuple[str, ...]:
        """The paths that are trained on at all."""
        if self.auto or self.first != self.last or 0 < self.first < 1:
            return ("trace", "empty")
        return ("trace",) if self.first else ("empty",)


def significant(best: K.OptimalAlpha, steps: int) -> bool:
    """Whether an estimate over so many steps may be trusted from here on."""
    return steps >= SETTLED and abs(best.alpha - START) > SIGNIFICANT * best.error


class Paths:
    """What the loop hands each backward to where the two paths' gradients are looked at one by one.

    apart: two buffers, blended at the end of the step (else the rows carry the weights). clip: the largest norm of a path's
    gradient, with `apart`. The estimate of alpha runs in both: with `apart` it counts the step it blends, else the steps before.
    """

    def __init__(self, alpha: Alpha, *, apart: bool, clip: float = 0.0):
        self.schedule, self.apart, self.clip = alpha, apart, clip
        self.running = K.RunningStatistics()
        self.alpha = self.used = alpha.first  # as of now; of the step at hand
        self.trusted = False  # the estimate has been significant
        self.warned = False  # of a D^2 below 0
        self.metrics: dict[str, float] = {}
        self._sketch: K.CountSketch | None = None
        self._begin()

    def _begin(self) -> None:
        self.samples: dict[int, dict[int, torch.Tensor | float]] = {0: defaultdict(float), 1: defaultdict(float)}
        self.prompts: dict[int, float] = defaultdict(float)
        self.active = 0  # the path whose buffers the masters hold
        self.before = [0.0, 0.0]  # the sketches of the two buffers (of the one: the first) so far
        self.open: tuple[int, int, float] | None = None  # (group, path, scale) whose rows are under way

    def weights(self, step: int, steps: int) -> tuple[float, float]:
        """What a trace pair's and an empty pair's losses are multiplied by in this step."""
        if not self.schedule.auto:
            self.alpha = self.schedule.at(step, steps)
        if self.apart:
            return 1.0, 1.0
        self.used = min(max(self.alpha, EDGE), 1 - EDGE)
        return self.used, 1 - self.used

    @contextmanager
    def of(self, batch: PairBatch, masters: Masters, count: float) -> Iterator[None]:
        """Around a backward: its gradients go to its path's buffer, and what they add to it into the group's sample."""
        path = int(batch.path[0])
        if self.open is None or self.open[:2] != (batch.group, path):
            self._close(masters)
            self.open = batch.group, path, count / float(batch.weight[0])
        if self.apart and path != self.active:
            masters.swap_gradients()
            self.active = path
        if path == 0:
            self.prompts[batch.group] += len(batch.path)
        yield

    def _close(self, masters: Masters) -> None:
        """Samples what the rows since the last call added: the sketch is linear, so the difference of two sums will do, and no
        third buffer is needed."""
        if self.open is None:
            return
        group, path, scale = self.open
        if self._sketch is None:
            self._sketch = K.CountSketch([m.numel() for m in masters.masters.values()])
        now = self._sketch([torch.zeros_like(m) if m.grad is None else m.grad for m in masters.masters.values()])
        mine = path if self.apart else 0
        self.samples[path][group] += (now - self.before[mine]) * scale
        self.before[mine] = now

    def finish(self, masters: Masters, metrics: dict[str, float]) -> float:
        """Estimates, then blends; the masters are left with the step's gradient. Returns the blend of the paths' mean losses,
        which are in the step's `metrics`; the object's own say what else was found."""
        self.metrics = {}
        self._close(masters)
        if self.apart and self.active == 1:
            masters.swap_gradients()
        groups = sorted(self.prompts)
        if len(groups) >= FEWEST:
            samples = [torch.stack([self.samples[path][g] for g in groups]) for path in (0, 1)]
            counts = torch.tensor([self.prompts[g] for g in groups], dtype=torch.float64)
            if all(bool(s.isfinite().all()) for s in samples):  # else the loop's gate stops the step
                self._estimate(K.path_statistics(*samples, counts))
        if self.apart:
            self.used = self.alpha
            self._blend(masters)
        else:
            self.metrics |= self._norms()
        self.metrics["alpha"] = self.used
        self._begin()
        return self.used * metrics["loss_trace"] + (1 - self.used) * metrics["loss_empty"]

    def _estimate(self, found: K.PathStatistics) -> None:
        self.running.update(found)
        value, prompts = self.running.value(), sum(self.prompts.values())
        best = K.optimal_alpha(value, prompts)
        self.trusted |= significant(best, self.running.steps)
        if self.schedule.auto:
            self.alpha = best.alpha if self.trusted else START
        if best.clipped and self.schedule.auto and not self.warned:
            self.warned = True
            console.print(
                "alpha: the squared distance of the two paths' gradients came out below 0 and counts as 0 (their noise hides "
                "it); more --pairs-per-step would show it",
                style="yellow", soft_wrap=True,
            )  # fmt: skip
        told = {
            "path_distance_sq": best.distance_sq,
            "path_distance_clipped": float(best.clipped),
            "grad_variance_trace": K.gradient_variance(value, prompts, 1.0),
            "grad_variance_empty": K.gradient_variance(value, prompts, 0.0),
            "grad_variance": K.gradient_variance(value, prompts, self.alpha if self.apart else self.used),
        }
        if math.isfinite(best.error):  # else the paths do not differ, and any alpha will do
            told |= {"alpha_estimate": best.alpha, "alpha_error": best.error}
        self.metrics |= told

    def _blend(self, masters: Masters) -> None:
        both = masters.paired_gradients()
        norms = [1.0, 1.0]  # by which what the blend sees was divided
        for path, (grads, name) in enumerate(zip(both, ("trace", "empty"))):
            if self.clip:
                norm = float(torch.nn.utils.get_total_norm(grads))
                self.metrics[f"clipped_{name}"] = float(norm > self.clip)
                if norm > self.clip:
                    torch._foreach_mul_(grads, self.clip / norm)
                    norms[path] = norm / self.clip
        stats = K.blend_gradients(*both, self.alpha)
        masters.drop_other_gradients()
        clipped = math.sqrt(float(stats.trace_sq)), math.sqrt(float(stats.empty_sq))
        self.metrics |= {"grad_norm_trace": clipped[0] * norms[0], "grad_norm_empty": clipped[1] * norms[1]}
        if clipped[0] * clipped[1] > 0:
            self.metrics["grad_cosine"] = float(stats.dot) / (clipped[0] * clipped[1])

    def _norms(self) -> dict[str, float]:
        """The same from the sketches, where there is one buffer."""
        sums, n = [sum(self.samples[path].values()) for path in (0, 1)], sum(self.prompts.values())
        norms = [float(s.norm()) / n for s in sums]
        told = {"grad_norm_trace": norms[0], "grad_norm_empty": norms[1]}
        if norms[0] * norms[1] > 0:
            told["grad_cosine"] = float(sums[0] @ sums[1]) / n**2 / (norms[0] * norms[1])
        return told

    def state_dict(self) -> dict:
        told = {"alpha": self.alpha, "trusted": self.trusted, "warned": self.warned}
        return told | {"running": self.running.state_dict()}

    def load_state_dict(self, state: dict) -> None:
        self.alpha, self.trusted, self.warned = state["alpha"], state["trusted"], state["warned"]
        self.running.load_state_dict(state["running"])

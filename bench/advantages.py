"""How fast are group advantages on the CPU, and how exact? Ours, TRL's formula, verl's two, and two passes of scatter.
Liger has none: its GRPO losses take advantages ready-made, so the record lists it as left out.

All take the same rewards in one process, in turn. Errors are against each one's own formula in float64: on rewards in [0, 1), on
rewards that differ in the third digit (10 + r / 100), and as the largest advantage of a group whose rewards are all 0.7, which
should be 0.
"""

from __future__ import annotations

import time
from collections import defaultdict
from collections.abc import Callable
from dataclasses import dataclass

import torch
from torch import Tensor

from longtrace import kernels as K
from longtrace.trainer.config import Refusal

from . import BenchConfig, harness
from .device import measure
from .harness import console

INPUTS = ["equal:512x16", "equal:32768x16", "ragged:512", "ragged:32768"]
QUICK = ["equal:512x16", "ragged:512"]
LARGEST = 64  # of a ragged group; sizes are drawn from 2 on
LOOP_TO = 20_000  # rewards that verl's loop over samples is given


@dataclass(frozen=True)
class Groups:
    """Sizes of the groups, and what implementations ask for of them."""

    sizes: Tensor  # (G,)
    offsets: Tensor  # (G + 1,)
    index: Tensor  # (N,) group of each reward
    width: int | None  # if all are equal

    @property
    def rewards(self) -> int:
        return len(self.index)


def bench(config: BenchConfig) -> None:
    """Measures, prints a table a case, draws advantages.png, writes the record. Raises Refusal for unusable options."""
    cases = {name: groups_of(name) for name in config.inputs or (QUICK if config.quick else INPUTS)}
    chosen, machine = harness.begin(config, IMPLS)
    torch.set_num_threads(machine["threads"])
    rows, ratios, skipped, panels = [], {}, {}, []
    for name, groups in cases.items():
        found = _measure(name, groups, chosen, config.repeats, 0.02 if config.quick else 0.3, skipped)
        rows += found
        ours = {row["impl"]: row["ms"] for row in found}
        if "longtrace" in ours:
            ratios |= {f"{name}: {k} / longtrace": ms / ours["longtrace"] for k, ms in ours.items() if k != "longtrace"}
        title = f"{name}: {len(groups.sizes):,} groups, {groups.rewards:,} rewards, fp32"
        harness.print_table(title, COLUMNS, found, FORMATS)
        panels.append((f"{name}: ms", found, "ms", ",.3f"))
    for what, why in skipped.items():
        console.print(f"skipped: {what}: {why}", style="yellow", highlight=False)
    record = harness.write_record(
        "advantages", config.json, machine=machine, rows=rows, ratios=ratios, skipped=skipped,
        setting="calls repeated for a while in each turn, implementations in turn, medians of the turns",
    )  # fmt: skip
    note = f"{machine['cpu']}, {machine['threads']} threads, {machine['date']}"
    harness.bar_picture(record.parent / "advantages.png", "Group advantages on the CPU", panels[:4], note)
    console.print(f"record in {record}, picture beside it", highlight=False)


COLUMNS = {
    "impl": "", "ms": "ms", "ms_min": "min", "ms_max": "max", "m_per_s": "M rewards/s", "err": "error",
    "close_err": "error, close rewards", "constant": "constant groups",
}  # fmt: skip
FORMATS = {"ms": ",.3f", "ms_min": ",.3f", "ms_max": ",.3f", "m_per_s": ",.1f"} | dict.fromkeys(
    ("err", "close_err", "constant"), ".1e"
)


def groups_of(name: str) -> Groups:
    """Groups of "equal:GROUPSxSIZE" or "ragged:GROUPS" (2 to 64 rewards each)."""
    kind, _, numbers = name.partition(":")
    parts = numbers.split("x")
    if (
        kind not in ("equal", "ragged")
        or len(parts) != 1 + (kind == "equal")
        or not all(n.isdigit() and int(n) for n in parts)
    ):
        raise Refusal(f"--inputs: found {name}; accepted: equal:GROUPSxSIZE, ragged:GROUPS")
    if kind == "equal":
        sizes = torch.full((int(parts[0]),), int(parts[1]))
    else:
        sizes = torch.randint(2, LARGEST + 1, (int(parts[0]),), generator=torch.Generator().manual_seed(0))
    offsets = torch.cat((torch.zeros(1, dtype=torch.int64), sizes.cumsum(0)))
    return Groups(sizes, offsets, torch.repeat_interleave(sizes), int(parts[1]) if kind == "equal" else None)


def _measure(name: str, groups: Groups, chosen: list[str], repeats: int, seconds: float, skipped: dict) -> list[dict]:
    uniform = torch.rand(groups.rewards, generator=torch.Generator().manual_seed(1))
    runs = {key: IMPLS[key](groups) for key in chosen}
    for key in [key for key, run in runs.items() if isinstance(run, str)]:
        skipped[f"{key} at {name}"] = runs.pop(key)
    times = measure(
        {key: lambda run=run: run(uniform) for key, run in runs.items()}, _Repeated(seconds), repeats=repeats
    )
    skipped |= {f"{key} at {name}": why for key, why in times.failed.items()}
    found = []
    for key in times.ms:
        errors = [
            _relative(runs[key](rewards), runs[key](rewards.double())) for rewards in (uniform, 10 + uniform / 100)
        ]
        taken = times.row(key)
        found.append({
            "impl": key, "inputs": name, "groups": len(groups.sizes), "rewards": groups.rewards, "dtype": "fp32", **taken,
            "m_per_s": groups.rewards / taken["ms"] / 1e3, "err": errors[0], "close_err": errors[1],
            "constant": float(runs[key](torch.full_like(uniform, 0.7)).abs().max()),
        })  # fmt: skip
    return found


class _Repeated:
    """Milliseconds of one call, the mean over calls that fill `seconds`: one call is too short to time."""

    def __init__(self, seconds: float):
        self.seconds = seconds

    def __call__(self, run: Callable[[], object]) -> float:
        calls, begin = 0, time.perf_counter()
        while (taken := time.perf_counter() - begin) < self.seconds or not calls:
            run()
            calls += 1
        return 1e3 * taken / calls


def _relative(found: Tensor, true: Tensor) -> float:
    return float((found.double() - true.double()).norm() / true.double().norm())


# ----------------------------------------------------------------------------------------------------------------------
# Implementations: each takes the groups and returns a function of the rewards (N,), or why it does not serve them. In float64
# they are their own formula's truth.


def _ours(groups: Groups):
    return lambda rewards: K.group_advantages(rewards, groups.offsets).values


def _trl(groups: Groups):
    """TRL 1.16: NaN-aware mean and standard deviation of rows of equal length, 1e-4 added."""
    if groups.width is None:
        return "TRL takes groups of one size"

    def run(rewards):
        rows = rewards.view(-1, groups.width)
        mean = rows.nanmean(1, keepdim=True)
        count = rows.isfinite().sum(1, keepdim=True)
        std = ((rows - mean).square().nanmean(1, keepdim=True) * (count / (count - 1))).sqrt()
        mean, std = (x.squeeze(1).repeat_interleave(groups.width) for x in (mean, std))
        return torch.nan_to_num((rewards - mean) / (std + 1e-4), nan=0.0)

    return run


def _verl(groups: Groups):
    """verl's default: samples gathered in a dictionary, one by one; 1e-6 added."""
    if groups.rewards > LOOP_TO:
        return f"a Python loop over samples: only timed up to {LOOP_TO:,}"
    index = groups.index.tolist()

    def run(rewards):
        members, statistics = defaultdict(list), {}
        for i, group in enumerate(index):
            members[group].append(rewards[i])
        for group, values in members.items():
            values = torch.stack(values)
            statistics[group] = (values.mean(), values.std())
        out = rewards.clone()
        for i, group in enumerate(index):
            mean, std = statistics[group]
            out[i] = (out[i] - mean) / (std + 1e-6)
        return out

    return run


def _verl_vectorised(groups: Groups):
    """verl's vectorised form: sums and sums of squares in one pass, variances of at least 1e-6."""
    index, G = groups.index, len(groups.sizes)

    def run(rewards):
        count, first, second = (
            rewards.new_zeros(G).index_add_(0, index, x) for x in (torch.ones_like(rewards), rewards, rewards * rewards)
        )
        std = ((second - first * first / count) / (count - 1).clamp(min=1)).clamp(min=1e-6).sqrt()
        return (rewards - (first / count)[index]) / (std[index] + 1e-6)

    return run


def _liger(groups: Groups):
    """Liger-Kernel 0.8.5: `advantages` is an argument of its losses (chunked_loss/grpo_loss.py, transformers/grpo_loss.py)."""
    return "it has no formula: its GRPO losses take advantages as an argument"


def _two_passes(groups: Groups):
    """What one would write: scatter the sums, centre, scatter the squares; our 1e-4."""
    index, sizes = groups.index, groups.sizes

    def run(rewards):
        n = sizes.to(rewards.dtype)
        centred = rewards - (rewards.new_zeros(len(n)).index_add_(0, index, rewards) / n)[index]
        std = (rewards.new_zeros(len(n)).index_add_(0, index, centred.square()) / (n - 1)).sqrt()
        return centred / (std + 1e-4)[index]

    return run


IMPLS = {
    "longtrace": _ours, "TRL": _trl, "verl": _verl, "verl vectorised": _verl_vectorised, "Liger": _liger,
    "torch, two passes": _two_passes,
}  # fmt: skip

"""`longtrace prefer`: DPO, SimPO and BVPO on preference pairs.

longtrace prefer --model DIR --data pairs.jsonl --alpha 0.5 --out runs/bvpo
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
import torch
from rich.console import Console
from rich.table import Table

from . import checkpoint, plan, traces
from .config import Refusal, TrainConfig, parse_columns
from .evaluate import wilson
from .model import DTYPES, Model, check_model, computing_in, load_model
from .pair_source import PairSource
from .paths import FEWEST, GROUPS, Alpha, Paths
from .prefer_report import prefer_report
from .preference import DEFAULTS, Preference, PreferenceLoss
from .preferences import PairSet, load_pairs
from .reference import Reference
from .train import RunResult, describe, planned, refusing_out_of_memory, resolve, run, stop_at

console = Console()


@dataclass(kw_only=True)
class PreferConfig(TrainConfig):
    """Preference optimisation on pairs: DPO or SimPO, on traces, on empty traces, or on both (BVPO)."""

    FOLLOWS: ClassVar[dict[str, tuple[str, ...]]] = {
        "loss": ("beta", "gamma"),
        "alpha": ("blend", "path_clip"),
        "blend": ("path_clip",),
    }
    """Options whose default depends on another's value: a config file's are forgotten where a flag changes that."""

    data: list[str]
    """Pairs: file.jsonl, file.parquet, hub/name; rows with prompt, chosen and rejected, UltraFeedback's, HH's, or those of `longtrace pairs`."""
    tokens_per_row: int = 0
    """Tokens in one packed micro-batch, which holds both completions of a pair: what memory depends on (0 = twice --max-tokens, or a step where that is less)."""
    tokens_per_step: int = field(default=0, init=False)  # no option: `--pairs-per-step`
    pairs_per_step: int = 32
    """Prompts in one optimizer step: a pair of each, or with BVPO one on each path."""
    eval_data: list[str] = field(default_factory=list)
    """Held-out pairs; when empty, --eval-fraction of --data is held out."""
    eval_fraction: float = 0.0
    """Share of the pairs held out for loss and accuracy (0 = none)."""
    on_too_long: Literal["refuse", "skip"] = "refuse"
    """What happens to a pair with a completion above --max-tokens: stop, or leave it out."""
    template: str = "auto"
    """auto = the model's own, or one of ours if it has none; model = its own only; longtrace = one that keeps the thought; or a .jinja file."""
    columns: list[str] = field(default_factory=list)
    """Renames fields of the rows: old=new."""
    skip_bad_rows: bool = False
    """Leave out pairs that cannot be used (counted and named) instead of stopping at the first."""
    lr: float = 1e-6
    """Peak learning rate."""
    warmup: float = 0.1
    """Warm-up: a share of the steps below 1, a number of steps from 1 on."""

    # objective
    loss: PreferenceLoss = "dpo"
    """dpo (against the starting model) or simpo (no reference, log-probs a token)."""
    beta: float | None = None
    """Scale of the implicit rewards (None = the loss's own: dpo 0.1, simpo 2)."""
    gamma: float | None = None
    """Margin the rewards of a pair should differ by (None = the loss's own: dpo 0, simpo 1)."""
    label_smoothing: float = 0.0
    """Share of the pairs taken to be labelled the wrong way round."""
    alpha: str = "1"
    """Weight of the trace path against the empty-trace path (BVPO): 1 = traces alone, 0 = empty traces alone, 0.5, FROM:TO = a line over the run, auto = estimated (docs/bvpo.md)."""
    blend: Literal["auto", "loss", "gradients"] = "auto"
    """What alpha weighs: loss = the paths' losses, in one backward; gradients = the paths' gradients, from two buffers; auto = gradients where alpha is estimated."""
    path_clip: float = 0.0
    """Largest norm of each path's gradient before they are blended (0 = no clipping; with --blend gradients; auto's estimate is of gradients that are not clipped)."""

    @property
    def gradient_buffers(self) -> int:
        """Sets of gradients a step holds."""
        return 2 if self.blend == "gradients" else 1


def check(config: PreferConfig) -> PreferConfig:
    """What `resolve` does, the loss's own beta and gamma where none are given, and what pairs ask besides. Raises Refusal."""
    beta, gamma = DEFAULTS[config.loss]
    config = replace(
        config,
        beta=beta if config.beta is None else config.beta,
        gamma=gamma if config.gamma is None else config.gamma,
    )
    for name, low, high in (
        ("pairs_per_step", 1, math.inf), ("path_clip", 0, math.inf), ("gamma", 0, math.inf), ("label_smoothing", 0, 0.5),
    ):  # fmt: skip
        value = getattr(config, name)
        if not (math.isfinite(value) and low <= value <= high):
            accepted = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise Refusal(f"--{name.replace('_', '-')} {value}: accepted: {accepted}")
    if not (math.isfinite(config.beta) and config.beta > 0):
        raise Refusal(f"--beta {config.beta}: accepted: above 0")
    alpha = Alpha.parse(config.alpha)
    if config.blend == "auto":
        config.blend = "gradients" if alpha.auto else "loss"
    if config.blend == "gradients" and len(alpha.paths) == 1:
        raise Refusal(f"--blend gradients with --alpha {config.alpha}: there is one path to take gradients of")
    if config.path_clip and config.blend != "gradients":
        raise Refusal("--path-clip needs --blend gradients: weighted losses have one gradient")
    if alpha.auto and config.pairs_per_step < FEWEST:
        raise Refusal(
            f"--alpha auto with --pairs-per-step {config.pairs_per_step}: accepted: {FEWEST} or more, to see how gradients vary"
        )
    if config.patience and not (config.eval_every and (config.eval_data or config.eval_fraction)):
        raise Refusal("--patience needs --eval-every and held-out pairs: --eval-data or --eval-fraction")
    asked = config.tokens_per_row
    config = resolve(config)
    config.tokens_per_row = asked or 2 * config.max_tokens
    return config


def prefer(config: PreferConfig) -> RunResult | None:
    """`longtrace prefer`: reads and audits the pairs, takes the reference's log-probs, trains, leaves a Hugging Face folder.

    Returns None after `--plan`. Raises Refusal for anything about the input or the arguments that cannot be used.
    """
    asked_row, config = config.tokens_per_row, check(config)
    alpha = Alpha.parse(config.alpha)
    model = load_model(config)
    check_model(model)
    drop_nothing(model)
    read = dict(
        paths=alpha.paths, template=config.template, max_tokens=config.max_tokens, on_too_long=config.on_too_long,
        columns=parse_columns(config.columns), skip_bad_rows=config.skip_bad_rows,
    )  # fmt: skip
    pairs = load_pairs(config.data, model.tokenizer, **read)
    console.print(pairs.audit.table())
    held = load_pairs(config.eval_data, model.tokenizer, **read) if config.eval_data else None
    if held:
        console.print(held.audit.table())
    numbers, held_out = (np.arange(len(pairs)), np.arange(len(held))) if held else hold_out(pairs, config)
    pairs_per_step = min(config.pairs_per_step, len(numbers))
    if alpha.auto and pairs_per_step < FEWEST:
        raise Refusal(
            f"--alpha auto with {len(numbers)} prompts to train on: accepted: {FEWEST} or more, to see how gradients vary"
        )
    steps = config.steps or -(-max(1, round(len(numbers) * config.epochs)) // pairs_per_step)
    paths = None
    if alpha.auto or config.blend == "gradients":
        paths = Paths(alpha, apart=config.blend == "gradients", clip=config.path_clip)
    _size_rows(config, asked_row, pairs, numbers, pairs_per_step, grouped=paths is not None)

    def weights(step: int) -> tuple[float, float]:
        return paths.weights(step, steps) if paths else (alpha.at(step, steps), 1 - alpha.at(step, steps))

    source = PairSource(
        pairs, numbers, tokens_per_row=config.tokens_per_row, pairs_per_step=pairs_per_step, seed=config.seed,
        epochs=None if config.steps else config.epochs, weights=weights, grouped=paths is not None,
    )  # fmt: skip
    objective = Preference(
        config.loss, config.beta, config.gamma, config.label_smoothing, config.head_budget_mb, config.head_grad,
        suffixes=("_trace", "_empty") if len(alpha.paths) > 1 else ("", ""), paths=paths,
    )  # fmt: skip
    lengths = pairs.lengths.reshape(len(pairs), -1)[numbers].ravel()
    estimate = planned(
        config,
        model,
        lambda: plan.estimate(model, config, lengths, supervised=1 - pairs.prompts.sum() / len(pairs.tokens)),
        lambda found: plan_table(config, model, pairs, numbers, steps, found),
    )
    if config.plan:
        return None

    judge = Judge(config, model, objective, held or pairs, held_out, (pairs, numbers)) if len(held_out) else None
    if config.loss == "dpo":
        _take_reference(config, model, source, judge, steps)

    template = traces.chat_template(model.tokenizer, config.template)
    ends = np.unique(pairs.tokens[pairs.offsets[1:] - 1]).tolist()
    stop_at(model, model.tokenizer.convert_ids_to_tokens(ends))

    def begin() -> None:
        audits = {"audit.json": pairs} | ({"audit-eval.json": held} if held else {})
        asked = replace(config, tokens_per_row=asked_row)  # what was made of it fits these pairs and this step alone
        describe(asked, {name: json.dumps(found.audit.as_dict(), indent=1) for name, found in audits.items()})

    def finish() -> None:
        checkpoint.export_model(
            model.hf, model.tokenizer, config.out, chat_template=template, dtype=DTYPES[config.dtype]
        )

    result = run(
        config, model, source, objective,
        steps=config.steps, begin=begin, finish=finish, evaluate=judge,
        flops_per_token=estimate.flops_per_token if estimate else 0.0,
        peak_flops=estimate.peak_flops if estimate else 0.0,
    )  # fmt: skip
    if judge and result.metrics:
        judge.say(result.metrics[-1])
    page = prefer_report(config.out)
    console.print(f"model and tokenizer in {config.out}; the run's story in {page}", markup=False, soft_wrap=True)
    return result


def drop_nothing(model: Model) -> None:
    """Turns off the model's own dropout (not that of adapters): policy and reference would differ by noise from the first step."""
    for name, module in model.hf.named_modules():
        if isinstance(module, torch.nn.Dropout) and "lora_dropout" not in name:
            module.p = 0.0


def _size_rows(
    config: PreferConfig, asked: int, pairs: PairSet, numbers: np.ndarray, pairs_per_step: int, *, grouped: bool
) -> None:
    """Sets the tokens of a row, no more than are ever put into one, and of a step: what memory is planned with."""
    each = pairs.lengths.reshape(len(pairs), len(pairs.paths), 2).sum(-1)[numbers]  # (prompts, paths)
    each = each.max(1) if grouped else each.sum(1)  # rows of one path, or of both
    together = -(-pairs_per_step // GROUPS) if grouped else pairs_per_step
    most = int(np.sort(each)[-together:].sum())
    config.tokens_per_row = asked or min(config.tokens_per_row, most)
    rows = -(-most // config.tokens_per_row) * (2 * -(-pairs_per_step // together) if grouped else 1)
    config.tokens_per_step = config.tokens_per_row * rows


def prompt_lengths(pairs: PairSet) -> np.ndarray:
    """(prompts,) tokens of all of a prompt's documents."""
    return pairs.lengths.reshape(len(pairs), -1).sum(1)


def hold_out(pairs: PairSet, config: PreferConfig) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) numbers of prompts; pairs of the same prompt stay together."""
    if not config.eval_fraction:
        return np.arange(len(pairs)), np.arange(0)
    step = 2 * len(pairs.paths)
    starts = pairs.offsets[:-1:step]
    keys = [pairs.tokens[a : a + n].tobytes() for a, n in zip(starts, pairs.prompts[::step])]
    number_of = {key: i for i, key in enumerate(dict.fromkeys(keys))}
    group = np.array([number_of[key] for key in keys])
    cut = max(1, round(config.eval_fraction * len(number_of)))
    if cut == len(number_of):
        raise Refusal(f"--eval-fraction {config.eval_fraction} of {len(number_of)} prompts leaves none to train on")
    held = np.isin(group, np.random.default_rng(config.seed).permutation(len(number_of))[:cut])
    return np.flatnonzero(~held), np.flatnonzero(held)


def _take_reference(config: PreferConfig, model: Model, source: PairSource, judge: Judge | None, steps: int) -> None:
    """Gives source and judge the summed log-probs of the model as it starts: a forward over the first epoch, and held-out pairs."""
    with computing_in(model, DTYPES[config.dtype]), refusing_out_of_memory(config.tokens_per_row):
        reference = Reference(model, config.head_budget_mb)
        source.keep_reference(reference(source.first_pass(steps), source.completions_ahead(steps), "training pairs"))
        if judge:
            held = judge.source
            held.keep_reference(reference(held.first_pass(1), held.completions_ahead(1), "held-out pairs"))


class Judge:
    """Loss, accuracy and margins on held-out pairs, beside what the completions' lengths alone would say."""

    def __init__(
        self, config: PreferConfig, model: Model, objective: Preference, held: PairSet, held_out: np.ndarray, trained: tuple[PairSet, np.ndarray],
    ):  # fmt: skip
        alpha = Alpha.parse(config.alpha)
        share = alpha.first if alpha.first == alpha.last and not alpha.auto else 0.5  # one that does not move
        self.model, self.objective, self.suffixes = model, objective, objective.suffixes[: len(alpha.paths)]
        longest = int(held.lengths.reshape(len(held), -1, 2).sum(-1)[held_out].max())
        self.source = PairSource(
            held, held_out, tokens_per_row=max(config.tokens_per_row, longest), pairs_per_step=len(held_out), seed=0,
            weights=lambda step: (share, 1 - share),
        )  # fmt: skip
        # which of two lengths wins is learned where the model learns
        longer = [np.sign(d).sum() >= 0 for d in length_differences(*trained)]
        self.by_length = [
            float(np.mean(d == 0) / 2 + np.mean(d > 0 if up else d < 0))
            for up, d in zip(longer, length_differences(held, held_out))
        ]

    @torch.no_grad()
    def __call__(self) -> dict[str, float]:
        """The error first: what early stopping goes by."""
        self.model.hf.eval()
        total = count = 0.0
        sums: dict[str, tuple[float, int]] = {}
        for batch in self.source.first_pass(1):
            batch = batch.to(self.model.device)
            value, told = self.objective(self.model.hidden(batch), self.model.head(), batch)
            total, count = total + float(value), count + batch.count
            for name, (part, n) in told.items():
                before = sums.get(name, (0.0, 0))
                sums[name] = before[0] + part, before[1] + n
        self.model.hf.train()
        found = {"eval_loss": total / count} | {f"eval_{name}": part / n for name, (part, n) in sums.items()}
        for suffix, by_length in zip(self.suffixes, self.by_length):
            right, n = sums["accuracy" + suffix]
            found[f"eval_accuracy_low{suffix}"], found[f"eval_accuracy_high{suffix}"] = wilson(right, n)
            found[f"eval_by_length{suffix}"] = by_length
        return found | {"eval_pairs": n}

    def say(self, row: dict) -> None:
        """One line a path of what the last evaluation found."""
        for suffix in self.suffixes:
            if f"eval_accuracy{suffix}" in row:
                of = f" ({suffix[1:]})" if suffix else ""
                low, high = row[f"eval_accuracy_low{suffix}"], row[f"eval_accuracy_high{suffix}"]
                above = low > max(0.5, row[f"eval_by_length{suffix}"])
                console.print(
                    f"held-out accuracy{of} {row[f'eval_accuracy{suffix}']:.3f} (95 %: {low:.3f} to {high:.3f}) of {row['eval_pairs']:,} pairs; "
                    f"chance 0.5, length alone {row[f'eval_by_length{suffix}']:.3f}: the interval is {'' if above else 'not '}above both",
                    highlight=False, soft_wrap=True,
                )  # fmt: skip


def length_differences(pairs: PairSet, numbers: np.ndarray) -> list[np.ndarray]:
    """For each path (n,): tokens of the chosen completion less those of the rejected."""
    sizes = (pairs.lengths - pairs.prompts).reshape(len(pairs), len(pairs.paths), 2)[numbers]
    return list((sizes[..., 0] - sizes[..., 1]).T)


def plan_table(
    config: PreferConfig, model: Model, pairs: PairSet, numbers: np.ndarray, steps: int, estimate: plan.Estimate
) -> Table:
    """The plan as a table to print: model, steps, objective, memory by purpose."""
    grid = Table(
        title="Plan", title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 3, 0, 0)
    )
    grid.add_column(style="bold")
    grid.add_column()
    grid.add_row("model", f"{model.source}: {estimate.parameters:,} parameters, {estimate.trained:,} trained")
    if model.rope:
        grid.add_row("context", model.rope)
    tokens = prompt_lengths(pairs)[numbers]
    pairs_per_step = min(config.pairs_per_step, len(numbers))
    seen = steps * pairs_per_step if config.steps else max(1, round(len(numbers) * config.epochs))
    each = "a pair of each" if len(pairs.paths) == 1 else "two pairs of each, one a path"
    grid.add_row(
        "steps",
        f"{steps:,} of {pairs_per_step:,} prompts, {each}; {len(numbers):,} prompts, {seen / len(numbers):.2f} epochs",
    )
    kind = {"dpo": "DPO", "simpo": "SimPO"}[config.loss]
    margin = f", gamma {config.gamma:g}" if config.gamma else ""
    where = {("trace",): "", ("empty",): " on empty traces"}.get(
        pairs.paths, f", BVPO with alpha {config.alpha} of the {config.blend}"
    )
    grid.add_row("objective", f"{kind}{where}: beta {config.beta:g}{margin}")
    m = estimate.memory
    parts = {
        f"{config.dtype} weights": m.weights, "fp32 masters": m.masters, "optimizer": m.optimizer,
        "two sets of fp32 gradients" if config.gradient_buffers == 2 else "fp32 gradients": m.gradients,
        "activations": m.activations, "head": m.head, "process": m.process,
    }  # fmt: skip
    grid.add_row("memory", f"about {plan.size_text(m.peak)} at the peak" + plan.against(m.peak, model.device))
    grid.add_row("", ", ".join(f"{name} {plan.size_text(size)}" for name, size in parts.items() if size))
    how = "on" if estimate.checkpointing else "off"
    grid.add_row("", f"rows of up to {config.tokens_per_row:,} tokens, activation checkpointing {how}")
    if estimate.seconds_per_token:
        forward = min(seen, len(numbers)) / 3 if config.loss == "dpo" else 0  # the reference's
        seconds = estimate.seconds_per_token * float(tokens.mean()) * (seen + forward)
        grid.add_row(
            "time", f"at least {plan.seconds_text(seconds)} in all, at the rates measured here, nothing else counted"
        )
    return grid

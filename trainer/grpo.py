"""`longtrace grpo`: reinforcement learning with verifiable rewards (DeepSeek-R1's recipe) on prompts with answers.

longtrace grpo --model DIR --data generated:chain,steps=4,rows=2000 --out runs/rl
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from typing import ClassVar, Literal

import numpy as np
from rich.console import Console
from rich.table import Table

from . import checkpoint, plan, traces
from .answers import final_answer
from .config import Refusal, TrainConfig
from .evaluate import cons_at_k, pass_at_k
from .experience import Experience, RolloutSource, sampling_of
from .grpo_report import grpo_report
from .model import DTYPES, Model, check_model, load_model
from .objectives import CLIPS, Divergence, PolicyGradient, PolicyLoss
from .prompts import Prompt, as_scored, prompts_of
from .rewards import Rewards
from .rewards import score as verdicts
from .rollout import Completion, Engine
from .rollout_server import ServerEngine
from .servers import is_address
from .train import RunResult, describe, planned, resolve, run

console = Console()

RIGHT = "\0right"  # stands for every right answer in a vote; none is written so
EVALUATION = 2**32 - 1  # stands where training has the number of a rollout


@dataclass(kw_only=True)
class GRPOConfig(TrainConfig):
    """Group-relative policy optimisation: reinforcement learning on prompts whose answers can be checked."""

    FOLLOWS: ClassVar[dict[str, tuple[str, ...]]] = {
        "loss": ("clip_low", "clip_high", "scale_rewards"),
        "engine": ("importance_cap",),
    }
    """Options whose default depends on another's value: a config file's are forgotten where a flag changes that."""

    data: list[str]
    """Prompts: rows with a problem and an answer (file.jsonl, file.parquet, hub/name), generated:chain,steps=4, reasoning_gym:chain_sum."""
    max_tokens: int = 16_384
    """Longest prompt with its completion, in tokens."""
    tokens_per_step: int = field(default=0, init=False)  # no option: `check` sets the most a step's completions hold
    epochs: float = 1.0
    """Passes over the prompts when --steps is 0."""
    patience: int = 0
    """Stop after this many evaluations without a better pass@1 (0 = never)."""
    eval_data: list[str] = field(default_factory=list)
    """Held-out prompts for pass@1, pass@k and cons@k."""
    eval_limit: int = 128
    """Held-out prompts taken, from the first on (0 = all)."""
    eval_samples: int = 4
    """Completions of each held-out prompt, at --temperature."""
    template: str = "auto"
    """auto = the model's own, or one of ours if it has none; model = its own only; longtrace = one that keeps the thought; or a .jinja file."""
    columns: list[str] = field(default_factory=list)
    """Renames fields of the rows: old=new."""
    lr: float = 1e-6
    """Peak learning rate."""
    schedule: Literal["cosine", "linear", "constant"] = "constant"
    """Shape of the learning rate after the warm-up."""
    skip_bad_rows: bool = False
    """Leave out rows that cannot be read, have no answer or are too long (counted) instead of stopping at the first."""

    # rewards
    reward: list[str] = field(default_factory=lambda: ["accuracy"])
    """Rewards with weights, summed: accuracy format=0.5 language:en=0.1 module:function (docs/rewards.md lists them)."""
    cut_off: Literal["penalty", "mask"] = "penalty"
    """Completions that reach --max-new-tokens: penalty = they are not right; mask = they leave the group and the loss."""
    scale_rewards: Literal["auto", "group_std", "each", "none"] = "auto"
    """Divide advantages by the group's standard deviation; auto = yes, but for dr_grpo; each = every reward by its own, then their weighted sum by the batch's (GDPO)."""
    baseline: Literal["mean", "leave_one_out"] = "mean"
    """What is taken from a reward: the group's mean, or that of the others (RLOO)."""

    # rollouts
    prompts_per_rollout: int = 16
    """Prompts of one rollout."""
    group_size: int = 8
    """Completions of each prompt."""
    steps_per_rollout: int = 1
    """Optimizer steps a rollout is dealt out over; 1 is on-policy."""
    resample: int = 0
    """Rounds in which groups with equal rewards are replaced by other prompts' (DAPO's dynamic sampling; 0 = off)."""
    max_new_tokens: int = 1024
    """Longest completion, in tokens."""
    temperature: float = 1.0
    """Sampling temperature; log-probs are taken at it too."""
    top_p: float = 1.0
    """Share of the probability mass sampled from."""
    top_k: int = 0
    """Tokens sampled from (0 = all)."""
    stop: list[str] = field(default_factory=list)
    """Strings that end a completion."""
    slots: int = 128
    """Completions decoded at once (of a server: requests in flight)."""
    engine: Literal["own", "vllm", "sglang"] = "own"
    """What writes the completions: own = the training model itself; vllm, sglang = a server at --server (docs/grpo.md)."""
    server: str = ""
    """The server's address, http://HOST:PORT; it must see --out under the same path."""
    server_timeout: float = 1800.0
    """Seconds one request to the server may take."""

    # objective
    loss: PolicyLoss = "grpo"
    """grpo, dr_grpo, dapo, gspo or cispo (docs/grpo.md has the formulas)."""
    clip_low: float | None = None
    """Ratios are clipped below at 1 - this (None = the loss's own: 0.2, gspo 3e-4; cispo has no lower clip)."""
    clip_high: float | None = None
    """Ratios are clipped above at 1 + this (None = the loss's own: 0.2, dapo 0.28, gspo 4e-4, cispo 4)."""
    clip_ratio: float = 0.0
    """Largest ratio where the advantage is negative (two-sided clip; 0 = none)."""
    beta: float = 0.0
    """Weight of the divergence from the reference model (0 = no reference)."""
    divergence: Divergence = "k3"
    """Estimator of the divergence: k1, k2, k3 or weighted_k3."""
    reference_reset: int = 0
    """Optimizer steps after which the reference becomes the policy (R1-Zero: 400; 0 = never)."""
    entropy_bonus: float = 0.0
    """Weight of the tokens' entropy."""
    importance_cap: float | Literal["auto"] = "auto"
    """Largest ratio of the trainer's probability to the engine's (truncated importance sampling; 0 = off); auto = 2 for a server, else off."""


RANGES = {
    "eval_limit": 0, "eval_samples": 1, "prompts_per_rollout": 1, "group_size": 1, "steps_per_rollout": 1,
    "resample": 0, "max_new_tokens": 1, "temperature": 0, "top_k": 0, "slots": 1,
    "clip_low": 0, "clip_high": 0, "clip_ratio": 0, "beta": 0, "reference_reset": 0, "importance_cap": 0, "entropy_bonus": 0,
}  # fmt: skip


def check(config: GRPOConfig) -> GRPOConfig:
    """What `resolve` does, the loss's own clips where none are given, and what GRPO asks besides. Raises Refusal."""
    low, high = CLIPS[config.loss]
    config = replace(
        config,
        clip_low=low if config.clip_low is None else config.clip_low,
        clip_high=high if config.clip_high is None else config.clip_high,
    )
    if config.importance_cap == "auto":
        config.importance_cap = 0.0 if config.engine == "own" else 2.0
    for name, low in RANGES.items():
        value = getattr(config, name)
        if not (math.isfinite(value) and value >= low):
            raise Refusal(f"--{name.replace('_', '-')} {value}: accepted: {low} or more")
    if not 0 < config.top_p <= 1:
        raise Refusal(f"--top-p {config.top_p}: accepted: above 0, up to 1")
    if config.group_size == 1 and not (config.beta or config.entropy_bonus):
        raise Refusal(
            "--group-size 1: a group of one has no advantage, and nothing would be learned; accepted: 2 or more"
        )
    if 0 < config.clip_ratio <= 1 + config.clip_high:
        raise Refusal(f"--clip-ratio {config.clip_ratio}: accepted: above 1 + --clip-high, or 0 for none")
    if config.loss == "cispo" and (config.clip_low != CLIPS["cispo"][0] or config.clip_ratio):
        raise Refusal("--loss cispo bounds ratios by --clip-high alone: it takes no --clip-low and no --clip-ratio")
    if "" in config.stop:
        raise Refusal("--stop: found an empty string, which ends everything; accepted: text")
    if config.temperature == 0:
        raise Refusal("--temperature 0: a group's completions would all be the same; accepted: above 0")
    if config.steps_per_rollout > config.prompts_per_rollout:
        raise Refusal(
            f"--steps-per-rollout {config.steps_per_rollout}: accepted: up to --prompts-per-rollout "
            f"({config.prompts_per_rollout})"
        )
    if config.reference_reset and (not config.beta or config.lora_rank):
        raise Refusal("--reference-reset needs --beta, and all weights trained (no --lora-rank)")
    _check_server(config)
    if config.patience and not (config.eval_every and config.eval_data):
        raise Refusal("--patience needs --eval-every and --eval-data")
    if config.max_new_tokens >= config.max_tokens:
        raise Refusal(
            f"--max-new-tokens {config.max_new_tokens:,}: accepted: below --max-tokens ({config.max_tokens:,}), which "
            "holds prompt and completion"
        )
    config = resolve(config)
    completions = -(-config.prompts_per_rollout // config.steps_per_rollout) * config.group_size
    config.tokens_per_step = config.tokens_per_row * -(-completions * config.max_tokens // config.tokens_per_row)
    if config.tokens_per_row < config.max_tokens:
        raise Refusal(
            f"--tokens-per-row {config.tokens_per_row:,}: accepted: --max-tokens ({config.max_tokens:,}) or more"
        )
    if config.scale_rewards == "auto":
        config.scale_rewards = "none" if config.loss == "dr_grpo" else "group_std"
    return config


def _check_server(config: GRPOConfig) -> None:
    if config.engine == "own":
        if config.server:
            raise Refusal(f"--server {config.server} needs --engine vllm or --engine sglang")
        return
    if not is_address(config.server):
        raise Refusal(f"--engine {config.engine}: found --server {config.server!r}; accepted: http://HOST:PORT")
    if config.lora_rank:
        raise Refusal(
            f"--lora-rank with --engine {config.engine}: a server is sent whole models; accepted: --engine own"
        )
    if config.engine == "vllm" and config.temperature != 1:
        raise Refusal(
            f"--temperature {config.temperature} with --engine vllm: its log-probs are those before the temperature; "
            "accepted: 1, or another engine"
        )
    if not config.server_timeout > 0:
        raise Refusal(f"--server-timeout {config.server_timeout}: accepted: above 0")


def read_prompts(
    specs: list[str], model: Model, config: GRPOConfig, *, limit: int = 0, checkable: bool = True
) -> list[Prompt]:
    """The prompts of the sources as the template asks them; `checkable`: of rows whose answers can be checked.

    Raises Refusal at the first that cannot be used, or with config.skip_bad_rows leaves it out and says how many.
    """
    bad: list[str] = []
    prompts = list(
        prompts_of(
            specs, model.tokenizer, template=config.template, columns=config.columns, limit=limit,
            longest=config.max_tokens - config.max_new_tokens, room="--max-tokens less --max-new-tokens",
            checkable=checkable, skip_bad_rows=config.skip_bad_rows, bad_rows=bad,
        )
    )  # fmt: skip
    if bad:
        console.print(f"{len(bad):,} rows left out, the first: {bad[0]}", markup=False)
    if not prompts:
        raise Refusal(f"--data {' '.join(specs)}: no prompt to train on")
    return prompts


def grpo(config: GRPOConfig) -> RunResult | None:
    """`longtrace grpo`: samples groups of completions, rewards them, and moves the weights towards the better ones.

    Leaves a Hugging Face folder in config.out. Returns None after `--plan`. Raises Refusal for anything about the input or
    the arguments that cannot be used.
    """
    config = check(config)
    model = load_model(config)
    check_model(model)
    rewards = Rewards(config.reward, device=str(model.device))
    prompts = read_prompts(config.data, model, config, checkable="accuracy" in rewards.weights)
    held_out = read_prompts(config.eval_data, model, config, limit=config.eval_limit) if config.eval_data else []

    def score(asked: Sequence[Prompt], done: Sequence[Completion]) -> tuple[np.ndarray, dict[str, np.ndarray]]:
        found = rewards(as_scored(model.tokenizer, asked, done))
        return found.total, found.parts

    template = traces.chat_template(model.tokenizer, config.template)
    server = None
    if config.engine != "own":
        server = ServerEngine(
            config.engine, config.server, model, config.out / "rollout-weights", dtype=DTYPES[config.dtype],
            chat_template=template, slots=config.slots, timeout=config.server_timeout,
            log_probs=lambda prompt, done: source.log_probs([Experience(prompt, c.tokens, 0.0, 0) for c in done]),
        )  # fmt: skip
    engine = server or Engine.of(model, config.slots)
    source = RolloutSource(config, model, engine, prompts, score, rewards)

    estimate = planned(
        config,
        model,
        lambda: plan.estimate(model, config, [len(p.tokens) + config.max_new_tokens for p in prompts]),
        lambda found: plan_table(config, model, source, found),
    )
    if config.plan:
        return None
    if server:
        server.connect()

    def begin() -> None:
        describe(config)
        source.samples = checkpoint.MetricsLog(config.out / "samples.jsonl", source.steps)

    def finish() -> None:
        if server:
            server.close()
        checkpoint.export_model(
            model.hf, model.tokenizer, config.out, chat_template=template, dtype=DTYPES[config.dtype]
        )

    objective = PolicyGradient(
        config.loss, config.clip_low, config.clip_high, config.clip_ratio, config.beta, config.divergence,
        config.entropy_bonus, config.importance_cap, config.temperature, config.head_budget_mb, config.head_grad,
    )  # fmt: skip
    result = run(
        config, model, source, objective,
        steps=config.steps, begin=begin, finish=finish, evaluate=(lambda: evaluate(engine, held_out, config)) if held_out else None,
        flops_per_token=estimate.flops_per_token if estimate else 0.0,
        peak_flops=estimate.peak_flops if estimate else 0.0,
    )  # fmt: skip
    page = grpo_report(config.out)
    console.print(f"model and tokenizer in {config.out}; the run's story in {page}", markup=False, soft_wrap=True)
    return result


def evaluate(engine: Engine, prompts: list[Prompt], config: GRPOConfig) -> dict[str, float]:
    """Error (1 - pass@1), pass@1, pass@k and cons@k of k = config.eval_samples completions of each prompt at
    config.temperature, the same random streams every time; their mean length and the share cut off."""
    k = config.eval_samples
    done = engine.generate([p.tokens for p in prompts], sampling_of(config), samples=k, seed=(config.seed, EVALUATION))
    completions = as_scored(engine.tokenizer, [p for p in prompts for _ in range(k)], [c for g in done for c in g])
    right = np.array([verdict == 1 for verdict in verdicts(completions)]).reshape(-1, k)
    answers = [final_answer(c.text, c.thinking) if c.finished else None for c in completions]
    votes = [
        [RIGHT if ok else answer for ok, answer in zip(row, answers[i * k : (i + 1) * k])]
        for i, row in enumerate(right)
    ]
    return {
        "eval_error": 1 - float(right.mean()),
        "eval_pass@1": float(right.mean()),
        f"eval_pass@{k}": float(np.mean([pass_at_k(k, int(n), k) for n in right.sum(1)])),
        f"eval_cons@{k}": float(np.mean([cons_at_k(v, RIGHT, k) for v in votes])),
        "eval_tokens": float(np.mean([c.tokens for c in completions])),
        "eval_cut_off": float(np.mean([not c.finished for c in completions])),
    }


def plan_table(config: GRPOConfig, model: Model, source: RolloutSource, estimate: plan.Estimate) -> Table:
    """The plan as a table to print: model, rollouts, memory by purpose."""
    grid = Table(
        title="Plan", title_justify="left", title_style="bold", show_header=False, box=None, padding=(0, 3, 0, 0)
    )
    grid.add_column(style="bold")
    grid.add_column()
    grid.add_row("model", f"{model.source}: {estimate.parameters:,} parameters, {estimate.trained:,} trained")
    if model.rope:
        grid.add_row("context", model.rope)
    completions = config.prompts_per_rollout * config.group_size
    grid.add_row(
        "rollouts",
        f"{config.prompts_per_rollout:,} of {len(source.prompts):,} prompts x {config.group_size} completions of up to "
        f"{config.max_new_tokens:,} tokens, {min(config.slots, completions):,} at once",
    )
    dealt = "one step" if config.steps_per_rollout == 1 else f"{config.steps_per_rollout} steps"
    grid.add_row("steps", f"{config.steps or source.steps_left():,}; a rollout is dealt out over {dealt}")
    below = "" if config.clip_low >= 1 else f"{1 - config.clip_low:g} to "
    grid.add_row("objective", f"{config.loss}, ratios clipped at {below}{1 + config.clip_high:g}, beta {config.beta:g}")
    text, size = model.base.config.get_text_config(), DTYPES[config.dtype].itemsize
    width = getattr(text, "head_dim", None) or text.hidden_size // text.num_attention_heads
    kv_heads = getattr(text, "num_key_value_heads", None) or text.num_attention_heads
    longest = max(len(p.tokens) for p in source.prompts) + config.max_new_tokens
    cache = 2 * text.num_hidden_layers * kv_heads * width * size * longest * min(config.slots, completions)
    cache *= config.engine == "own"  # a server has its own
    reference = estimate.parameters * size if source.reference is not None else 0
    m = estimate.memory
    parts = {"training": m.peak, "key-value cache": cache, "reference": reference}
    grid.add_row(
        "memory",
        f"about {plan.size_text(m.peak + cache + reference)}: "
        + ", ".join(f"{name} {plan.size_text(part)}" for name, part in parts.items() if part),
    )
    how = "on" if estimate.checkpointing else "off"
    grid.add_row("", f"rows of {config.tokens_per_row:,} tokens, activation checkpointing {how}")
    return grid

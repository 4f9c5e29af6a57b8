"""The loop. Every training command builds a Source and an Objective and hands them to `run`, which reads top to bottom:

micro-batches of a step -> global count -> forward, loss, backward each -> gate on finite -> clip -> optimizer
-> log -> evaluate -> checkpoint

longtrace sft --model DIR --data traces.jsonl --out runs/x
"""

from __future__ import annotations

import contextlib
import json
import math
import signal
import threading
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn
from rich.table import Table

from longtrace import kernels as K

from . import checkpoint, plan, report, traces
from .config import NonFinite, Refusal, SFTConfig, TrainConfig, parse_columns, to_yaml
from .environment import environment
from .model import DTYPES, Masters, Model, check_model, checkpoint_activations, choose_device, load_model
from .objectives import SFT, Objective
from .source import IGNORE, PackedBatch, TraceSource
from .trackers import tracker

console = Console()


class Source(Protocol):
    """Where steps come from: packed rows of a file, or rollouts of the model itself."""

    def next(self, say: Callable[[str], None]) -> list[PackedBatch]:
        """The micro-batches of one optimizer step; `say` shows what takes long, and raises Stopped after a signal."""

    def steps_left(self) -> int:
        """Steps until the source ends; asked only when the number of steps is not given."""

    def state_dict(self) -> dict: ...

    def tensors(self) -> dict[str, torch.Tensor]:
        """What its state needs that is no JSON, as of the last state_dict; asked for when a checkpoint is written."""

    def load_state_dict(self, state: dict, tensors: dict[str, torch.Tensor]) -> None: ...

    progress: float  # epochs seen
    tokens_per_row: int
    metrics: dict[str, float]  # what it has to say about the step it gave last


class Stopped(Exception):
    """A signal came while a source was at work."""


@dataclass
class RunResult:
    """What a finished run leaves: its folder, the steps made, the last loss and all metrics rows."""

    out: Path
    steps: int
    final_loss: float
    metrics: list[dict] = field(default_factory=list)


# ---------------------------------------------------------------------------------------------------------------------
# schedules and optimizers


def lr_at(step: int, steps: int, config: TrainConfig) -> float:
    """Learning rate of the step (0-based): linear warm-up, then cosine, linear or constant down to min_lr_ratio."""
    warmup = round(config.warmup * steps) if config.warmup < 1 else int(config.warmup)
    if step < warmup:
        return config.lr * (step + 1) / warmup
    if config.schedule == "constant":
        return config.lr
    done = (step - warmup) / max(1, steps - warmup)
    shape = 0.5 * (1 + math.cos(math.pi * done)) if config.schedule == "cosine" else 1 - done
    return config.lr * (config.min_lr_ratio + (1 - config.min_lr_ratio) * shape)


def make_optimizer(config: TrainConfig, masters: Masters) -> torch.optim.Optimizer:
    groups = masters.groups(config.weight_decay)
    if config.optimizer == "adamw":
        return torch.optim.AdamW(groups, lr=config.lr, betas=config.betas, eps=config.adam_eps, fused=True)
    try:
        from torchao.optim import AdamW8bit
    except ImportError as error:
        raise Refusal("--optimizer adamw8bit needs torchao: pip install 'longtrace[optim]'") from error
    return AdamW8bit(groups, lr=config.lr, betas=config.betas, eps=config.adam_eps)


def optimizer_tensors(optimizer: torch.optim.Optimizer, masters: Masters) -> dict[str, torch.Tensor]:
    """Every state tensor by name, `KEY.PARAMETER`; 8-bit states as their parts, `KEY.PARAMETER.PART`."""
    names = {id(master): name for name, master in masters.masters.items()}
    tensors = {}
    for parameter, state in optimizer.state.items():
        for key, value in state.items():
            stem = f"{key}.{names[id(parameter)]}"
            if hasattr(value, "__tensor_flatten__"):
                tensors.update({f"{stem}.{part}": getattr(value, part) for part in value.__tensor_flatten__()[0]})
            else:
                tensors[stem] = value
    return tensors


def set_lr(optimizer: torch.optim.Optimizer, lr: float) -> None:
    for group in optimizer.param_groups:
        if isinstance(group["lr"], torch.Tensor):  # torchao compiles its step and keeps the rate in a tensor
            group["lr"].fill_(lr)
        else:
            group["lr"] = lr


def restore_optimizer(optimizer: torch.optim.Optimizer, masters: Masters, saved: dict[str, torch.Tensor]) -> None:
    """Fills the state in place; one step at lr 0 on zero gradients makes the optimizer allocate it and moves nothing."""
    set_lr(optimizer, 0.0)
    for name, master in masters.masters.items():
        if f"step.{name}" in saved:  # a weight that never had a gradient has no state
            master.grad = torch.zeros_like(master)
    optimizer.step()
    masters.zero_grad()
    held = optimizer_tensors(optimizer, masters)
    if held.keys() != saved.keys():
        odd = sorted(held.keys() ^ saved.keys())[0]
        raise Refusal(
            f"the checkpoint's optimizer state does not fit this run (first difference: {odd}); same --optimizer?"
        )
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(saved[name])


def restore(
    path: Path, masters: Masters, optimizer: torch.optim.Optimizer, source: Source, objective: Objective
) -> dict:
    """Takes everything back from a checkpoint; returns its state. The mapped files are let go when this returns."""
    tensors, state = checkpoint.load(path)
    objective.load_state_dict(state["objective"])
    parts = {"model": {}, "optimizer": {}, "source": {}}
    for name, tensor in tensors.items():
        part, _, rest = name.partition(".")
        parts[part][rest] = tensor
    source.load_state_dict(state["source"], parts["source"])
    masters.load(parts["model"])
    restore_optimizer(optimizer, masters, parts["optimizer"])
    checkpoint.set_rng_state(state["rng"])
    return state


# ---------------------------------------------------------------------------------------------------------------------
# the loop


@torch.no_grad()
def evaluate_loss(model: Model, objective: Objective, batches: list[PackedBatch]) -> float:
    """Mean loss over held-out packed rows."""
    model.hf.eval()
    total = count = 0.0
    for batch in batches:
        n = objective.count(batch)
        if n:
            batch = batch.to(model.device)
            total += float(objective(model.hidden(batch), model.head(), batch)[0])
            count += n
    model.hf.train()
    return total / max(count, 1)


def run(
    config: TrainConfig,
    model: Model,
    source: Source,
    objective: Objective,
    *,
    steps: int,
    begin: Callable[[], None],
    finish: Callable[[], None],
    evaluate: Callable[[], dict[str, float]] | None = None,
    flops_per_token: float = 0.0,
    peak_flops: float = 0.0,
) -> RunResult:
    """Trains for `steps` optimizer steps (0: until the source ends) and leaves a run folder.

    `begin` writes what the run is, once a checkpoint to resume from has been accepted; `finish` exports the model;
    `peak_flops` (FLOP/s of a measured matmul) turns `flops_per_token` into MFU. Raises Refusal (out of memory, a
    checkpoint that does not fit), NonFinite, and SystemExit(143 or 130) after SIGTERM or Ctrl-C; the last two leave a
    checkpoint of the last whole step.
    """
    with refusing_out_of_memory(source.tokens_per_row):
        return _run(config, model, source, objective, steps, begin, finish, evaluate, flops_per_token, peak_flops)


@contextlib.contextmanager
def refusing_out_of_memory(tokens_per_row: int):
    """Refusal that names what to lower, in the place of torch's errors."""
    try:
        yield
    except (MemoryError, RuntimeError) as error:
        if isinstance(error, (MemoryError, torch.OutOfMemoryError)) or "can't allocate memory" in str(error):
            raise Refusal(
                f"out of memory with --tokens-per-row {tokens_per_row:,}: lower it, or --head-budget-mb, or pass "
                "--activation-checkpointing on, --optimizer adamw8bit or --lora-rank 16 (the README's table says which "
                "helps when)"
            ) from error
        raise


def _run(config, model, source, objective, steps, begin, finish, evaluate, flops_per_token, peak_flops) -> RunResult:
    out, device = config.out, model.device
    masters = Masters(model, DTYPES[config.dtype])
    optimizer = make_optimizer(config, masters)
    step, best = 0, {"loss": None, "bad": 0}
    paths = getattr(objective, "paths", None)  # of an objective whose two gradients are kept apart, or looked at apart

    def state() -> dict:
        """What a resumed run needs besides weights: taken at step boundaries, so a save may come at any time after."""
        return {
            "step": step,
            "source": source.state_dict(),
            "objective": objective.state_dict(),
            "rng": checkpoint.rng_state(),
            "best": dict(best),
            "eos_token_id": model.base.generation_config.eos_token_id,
            "config": json.loads(json.dumps(asdict(config), default=str)),
        }

    def save(boundary: dict) -> None:
        history.sync()  # whoever resumes from here finds every row of metrics up to here
        tensors = {f"model.{name}": master.detach() for name, master in masters.masters.items()}
        tensors |= {f"optimizer.{name}": t for name, t in optimizer_tensors(optimizer, masters).items()}
        tensors |= {f"source.{name}": t for name, t in source.tensors().items()}
        checkpoint.save(out / "checkpoints", boundary["step"], tensors, boundary, keep_last=config.keep_last)

    # ---- resume -------------------------------------------------------------------------------------------------------
    checkpoint.tidy(out / "checkpoints")
    resumed = checkpoint.latest(out / "checkpoints") if config.resume == "auto" else Path(config.resume or ".")
    if config.resume and resumed:
        saved = restore(resumed, masters, optimizer, source, objective)
        step, best = saved["step"], saved["best"]
        console.print(f"resumed from {escape(resumed.name)}: weights, optimizer, data position, random state")
        _print_changes(saved["config"], state()["config"])
    steps = steps or step + source.steps_left()
    stopped_early = 0 < config.patience <= best["bad"]
    begin()
    history = checkpoint.MetricsLog(out / "metrics.jsonl", step)
    track = tracker(config.tracker, out.name, out, asdict(config))

    started, last_line, loss, began_at = time.perf_counter(), 0.0, math.nan, step
    with (
        stop_signals() as stop,
        contextlib.closing(history),
        contextlib.ExitStack() as closing,
        Progress(
            TextColumn("step {task.completed:,}/{task.total:,}"),
            BarColumn(),
            TextColumn("{task.fields[line]}"),
            TimeRemainingColumn(),
            console=console,
            disable=not console.is_terminal,
        ) as bar,
    ):
        closing.callback(track.finish)
        task = bar.add_task("train", total=steps, completed=step, line="")

        def say(text: str) -> None:
            if stop:
                raise Stopped
            bar.update(task, line=text)

        def due() -> bool:
            return evaluate is not None and (step == steps or bool(config.eval_every and step % config.eval_every == 0))

        def judged() -> dict[str, float]:
            nonlocal best, stopped_early
            found = evaluate()
            error = next(iter(found.values()))
            better = best["loss"] is None or error < best["loss"]
            best = {"loss": error, "bad": 0} if better else {"loss": best["loss"], "bad": best["bad"] + 1}
            stopped_early = 0 < config.patience <= best["bad"]
            return found

        last = (history.rows() or [{}])[-1]
        if step and due() and last.get("step") == step and not any(name.startswith("eval_") for name in last):
            history.amend(judged())  # it failed, and that ended the run

        while step < steps and not stopped_early:
            boundary = state()
            tick = time.perf_counter()
            lr = lr_at(step, steps, config)
            set_lr(optimizer, lr)

            # ---- forward and backward, micro-batch by micro-batch; the count is known before the first ---------------
            try:
                batches = source.next(say)
            except Stopped:
                batches = []
            except Refusal:  # of a server that writes the rollouts, say: nothing of what was learned is lost
                if step > began_at:
                    save(boundary)
                raise
            if stop:
                save(boundary)
                raise SystemExit(stop[0])
            sourced = time.perf_counter() - tick
            count = sum(objective.count(batch) for batch in batches)
            loss_sum, metrics = torch.zeros((), dtype=torch.float64, device=device), {}
            for batch in batches:
                if stop:
                    save(boundary)
                    raise SystemExit(stop[0])
                if objective.count(batch) == 0:  # all of it masked: nothing to learn, and no GEMM to pay
                    continue
                batch = batch.to(device)
                part, sums = objective(model.hidden(batch), model.head(), batch)
                with paths.of(batch, masters, count) if paths else contextlib.nullcontext():
                    (part / count).backward()
                loss_sum += part.detach()
                for key, (value, n) in sums.items():
                    value_before, n_before = metrics.get(key, (0.0, 0))
                    metrics[key] = value_before + value, n_before + n
            metrics = {key: value / n for key, (value, n) in metrics.items()}

            # ---- gate, clip, step ------------------------------------------------------------------------------------
            loss = float(loss_sum) / (count or 1)
            if paths:
                loss = paths.finish(masters, metrics)
            gradients = masters.gradients()
            grad_norm = float(torch.nn.utils.get_total_norm(gradients)) if gradients else 0.0
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                save(boundary)
                rows = sorted({row for batch in batches for row in batch.documents})
                raise NonFinite(
                    f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; the weights were not touched and are saved as "
                    f"of step {step} in {out / 'checkpoints'}. Rows of the data in this step, counted from 0: {rows[:20]}"
                )
            if config.clip and grad_norm > config.clip:
                torch._foreach_mul_(gradients, config.clip / grad_norm)
            optimizer.step()
            del gradients  # else this list keeps 4 bytes a parameter alive through the next forward
            masters.zero_grad()
            masters.publish()
            step += 1

            # ---- log ---------------------------------------------------------------------------------------------------
            if device.type == "cuda":
                torch.cuda.synchronize()
            dt = time.perf_counter() - tick
            tokens = sum(batch.tokens for batch in batches)
            supervised = int(sum((batch.labels != IGNORE).sum() for batch in batches))
            row = {
                "step": step,
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "dt": dt,
                "tok_per_sec": tokens / dt,
                "mfu": tokens / dt * flops_per_token / peak_flops if peak_flops else None,
                "tokens": tokens,
                "supervised": supervised,
                "fill": tokens / max(len(batches) * source.tokens_per_row, 1),
                "epoch": source.progress,
                "seconds": time.perf_counter() - started,
                **metrics,
                **source.metrics,
                **(paths.metrics if paths else {}),
            }
            if "generated" in row:  # the step without its rollout
                row["train_tok_per_sec"] = tokens / (dt - sourced)

            # ---- evaluate ----------------------------------------------------------------------------------------------
            if due():
                try:
                    row |= judged()
                except Refusal:
                    history.append(row)
                    save(state())
                    raise
            history.append(row)
            track.log(row, step)

            # ---- checkpoint --------------------------------------------------------------------------------------------
            if step == steps or stopped_early or (config.save_every and step % config.save_every == 0):
                save(state())

            line = _line(row, steps)
            bar.update(task, completed=step, line=line)
            quiet = time.perf_counter() - last_line < 5
            if not console.is_terminal and (step in (1, steps) or "eval" in line or not quiet):
                console.print(f"step {step:>{len(str(steps))}}/{steps} | {line}", highlight=False, soft_wrap=True)
                last_line = time.perf_counter()
    if stopped_early:
        console.print(f"stopped early: {config.patience} evaluations without an evaluation below {best['loss']:.4f}")
    finish()
    rows = history.rows()
    return RunResult(out, step, rows[-1]["loss"] if rows else loss, rows)


@contextlib.contextmanager
def stop_signals():
    """A list that holds the exit code once SIGTERM (143) or Ctrl-C (130) has come; the loop then saves the last whole step.

    A second Ctrl-C interrupts at once. Outside the main thread Python takes no handlers, and signals act as they do.
    """
    stop: list[int] = []
    if threading.current_thread() is not threading.main_thread():
        yield stop
        return

    def handle(number, frame) -> None:
        if stop and number == signal.SIGINT:
            raise KeyboardInterrupt
        stop.append(128 + number)

    previous = {number: signal.signal(number, handle) for number in (signal.SIGTERM, signal.SIGINT)}
    try:
        yield stop
    finally:
        for number, handler in previous.items():
            signal.signal(number, handler)


def _print_changes(before: dict, now: dict) -> None:
    """What differs from the run being resumed; the data is held to the same tokens by the source itself."""
    for key in sorted(before.keys() & now.keys() - {"resume", "out", "plan"}):
        if before[key] != now[key]:
            console.print(f"  changed since the checkpoint: {key} {before[key]} -> {now[key]}", markup=False)


SHOWN = ("eval_loss", "eval_pass@1", "eval_accuracy", "eval_accuracy_trace", "eval_accuracy_empty")


def _line(row: dict, steps: int) -> str:
    parts = [
        f"loss {row['loss']:.4f}",
        f"lr {row['lr']:.1e}",
        f"norm {row['grad_norm']:.2f}",
        f"{row['tok_per_sec']:,.0f} tok/s",
    ]
    if row["mfu"] is not None:
        parts.append(f"mfu {row['mfu']:.0%}")
    if "reward" in row:
        parts.append(f"reward {row['reward']:.3f}")
        of = [name for name in row if name.startswith("reward_") and name != "reward_std"]
        parts += [f"{name.removeprefix('reward_')} {row[name]:.2f}" for name in of if len(of) > 1]
        parts.append(f"{row['completion_tokens']:.0f} tokens")
    for name in ("accuracy", "accuracy_trace", "accuracy_empty", "alpha"):
        if name in row:
            parts.append(f"{name.replace('_', ' ')} {row[name]:.2f}")
    parts += [f"{name.replace('_', ' ')} {row[name]:.4f}" for name in SHOWN if name in row]
    return " | ".join([*parts, f"epoch {row['epoch']:.2f}"])


# ---------------------------------------------------------------------------------------------------------------------
# what every training command does around the loop


def planned(
    config: TrainConfig,
    model: Model,
    estimate: Callable[[], plan.Estimate],
    table: Callable[[plan.Estimate], Table],
) -> plan.Estimate | None:
    """Prints the plan and, unless that is all that was asked for, checkpoints activations where it says so."""
    found = None
    try:
        found = estimate()
        console.print(table(found))
    except Exception as error:  # a plan is a courtesy: an architecture it cannot rehearse trains all the same
        console.print(
            f"no estimate of memory and time for this model: {(str(error).splitlines() or [type(error).__name__])[0]}",
            markup=False,
        )
    if not config.plan and (found.checkpointing if found else config.activation_checkpointing != "off"):
        checkpoint_activations(model, offload=config.activation_checkpointing == "offload")
    return found


def describe(config: TrainConfig, more: dict[str, str] | None = None) -> None:
    """Writes what the run is into its folder: config, environment and `more` files; prints which backends serve."""
    config.out.mkdir(parents=True, exist_ok=True)
    files = {
        "config.yaml": to_yaml(replace(config, resume="")),
        "environment.json": json.dumps(environment(), indent=1),
    }
    for name, text in (files | (more or {})).items():
        checkpoint.write_atomic(config.out / name, text)
    console.print(K.explain(), highlight=False, markup=False)


# ---------------------------------------------------------------------------------------------------------------------
# supervised fine-tuning


def sft(config: SFTConfig) -> RunResult | None:
    """`longtrace sft`: reads and audits the traces, prints the plan, trains, leaves a Hugging Face folder in config.out.

    Returns None after `--plan`. Raises Refusal for anything about the input or the arguments that cannot be used.
    """
    config = resolve(config)
    if config.patience and not (config.eval_every and (config.eval_data or config.eval_fraction)):
        raise Refusal("--patience needs --eval-every and held-out data: --eval-data or --eval-fraction")
    model = load_model(config)
    check_model(model)
    load = dict(
        template=config.template,
        max_tokens=config.max_tokens,
        on_too_long=config.on_too_long,
        columns=parse_columns(config.columns),
        allow=config.allow,
        skip_bad_rows=config.skip_bad_rows,
    )
    data = traces.load_traces(config.data, model.tokenizer, **load)
    console.print(data.audit.table())
    held_data = None
    if config.eval_data:
        held_data = traces.load_traces(config.eval_data, model.tokenizer, **load)
        console.print(held_data.audit.table())
        documents, held_out = np.arange(len(data.lengths)), np.arange(len(held_data.lengths))
    else:
        documents, held_out = _hold_out(data, config.eval_fraction, config.seed)

    epochs = None if config.steps else config.epochs
    rows_per_step = config.tokens_per_step // config.tokens_per_row
    source = TraceSource(data, documents, config.tokens_per_row, rows_per_step, config.seed, epochs)
    objective, evaluate = SFT(config.head_budget_mb, config.head_grad), None
    if len(held_out):
        eval_batches = TraceSource(held_data or data, held_out, config.tokens_per_row, 1, 0).all_rows()

        def evaluate() -> dict[str, float]:
            return {"eval_loss": evaluate_loss(model, objective, eval_batches)}

    lengths = data.lengths[documents]
    estimate = planned(
        config,
        model,
        lambda: plan.estimate(model, config, lengths, supervised=data.loss_mask.mean()),
        lambda found: plan.table(config, model, source, config.steps or source.steps_left(), found),
    )
    if config.plan:
        return None

    template = traces.chat_template(model.tokenizer, config.template)
    stop_at(model, [*data.audit.ends])

    def begin() -> None:
        audits = {"audit.json": data} | ({"audit-eval.json": held_data} if held_data else {})
        describe(config, {name: json.dumps(found.audit.as_dict(), indent=1) for name, found in audits.items()})

    def finish() -> None:
        checkpoint.export_model(
            model.hf, model.tokenizer, config.out, chat_template=template, dtype=DTYPES[config.dtype]
        )

    result = run(
        config,
        model,
        source,
        objective,
        steps=config.steps,
        begin=begin,
        finish=finish,
        evaluate=evaluate,
        flops_per_token=estimate.flops_per_token if estimate else 0.0,
        peak_flops=estimate.peak_flops if estimate else 0.0,
    )
    page = report.sft_report(config.out, lengths=lengths)
    console.print(f"model and tokenizer in {config.out}; the run's story in {page}", markup=False, soft_wrap=True)
    return result


def _hold_out(data: traces.TraceSet, share: float, seed: int) -> tuple[np.ndarray, np.ndarray]:
    """(training, held-out) documents; the pieces of a split row stay together."""
    rows = np.unique(data.source)
    if not share:
        return np.arange(len(data.source)), np.arange(0)
    cut = max(1, round(share * len(rows)))
    if cut == len(rows):
        raise Refusal(f"--eval-fraction {share} of {len(rows)} rows leaves none to train on")
    held = np.isin(data.source, np.random.default_rng(seed).permutation(rows)[:cut])
    return np.flatnonzero(~held), np.flatnonzero(held)


def stop_at(model: Model, ends: list[str]) -> None:
    """Generation stops at the tokens the trained turns end in; the model's own list may lack a template's."""
    generation = model.base.generation_config
    stops = generation.eos_token_id if generation.eos_token_id is not None else []
    stops = list(stops) if isinstance(stops, (list, tuple)) else [stops]
    learned = [model.tokenizer.convert_tokens_to_ids(token) for token in ends if token != "nothing"]
    new = [token for token in learned if token not in stops]
    if new:
        generation.eos_token_id = [*stops, *new]


# option: (lowest, highest); all must be finite
RANGES = {
    "max_tokens": (2, math.inf),
    "tokens_per_row": (0, math.inf),
    "tokens_per_step": (0, math.inf),
    "steps": (0, math.inf),
    "epochs": (0, math.inf),
    "lr": (0, math.inf),
    "warmup": (0, math.inf),
    "min_lr_ratio": (0, 1),
    "weight_decay": (0, math.inf),
    "adam_eps": (0, math.inf),
    "clip": (0, math.inf),
    "head_budget_mb": (0, math.inf),
    "lora_rank": (0, math.inf),
    "lora_alpha": (0, math.inf),
    "lora_dropout": (0, 1),
    "eval_every": (0, math.inf),
    "patience": (0, math.inf),
    "save_every": (0, math.inf),
    "keep_last": (1, math.inf),
    "seed": (0, 2**32 - 1),
    "eval_fraction": (0, 1),
}


def resolve(config: TrainConfig) -> TrainConfig:
    """A copy with what depends on other fields filled in. Raises Refusal for what is out of range or does not fit."""
    config = replace(config, out=Path(config.out))
    for name, (low, high) in RANGES.items():
        value = getattr(config, name, low)
        if not (math.isfinite(value) and low <= value <= high):
            accepted = f"{low} or more" if high == math.inf else f"{low} to {high}"
            raise Refusal(f"--{name.replace('_', '-')} {value}: accepted: {accepted}")
    if not all(0 <= beta < 1 for beta in config.betas):
        raise Refusal(f"--betas {' '.join(map(str, config.betas))}: accepted: two numbers from 0 to below 1")
    if not config.steps and not config.epochs:
        raise Refusal("--steps 0 and --epochs 0: nothing to do; accepted: one of them above 0")
    if (config.lora_alpha or config.lora_dropout) and not config.lora_rank:
        raise Refusal("--lora-alpha and --lora-dropout need --lora-rank")
    if config.activation_checkpointing == "offload" and choose_device(config.device).type == "cpu":
        raise Refusal(
            "--activation-checkpointing offload keeps activations in host memory, where those of a run on the CPU are "
            "already; accepted here: auto, on, off"
        )
    config.tokens_per_row = config.tokens_per_row or config.max_tokens
    config.tokens_per_step = config.tokens_per_step or config.tokens_per_row
    if config.tokens_per_step % config.tokens_per_row:
        raise Refusal(
            f"--tokens-per-step {config.tokens_per_step:,} is not a multiple of --tokens-per-row {config.tokens_per_row:,}: "
            f"pass {max(1, round(config.tokens_per_step / config.tokens_per_row)) * config.tokens_per_row}"
        )
    out = config.out
    if out.exists() and not out.is_dir():
        raise Refusal(f"--out {out} is a file; accepted: a folder, new or of the same run")
    if out.resolve() == Path(config.model).resolve():
        raise Refusal(f"--out {out} is the --model folder: the run would overwrite the weights it starts from")
    holds_a_model = (out / "config.json").exists() or (out / "adapter_config.json").exists()
    if holds_a_model and not (out / "config.yaml").exists():
        raise Refusal(f"--out {out} holds a model that no run of longtrace left there: pass another --out")
    if (out / "checkpoints").exists() and not config.resume and not config.plan:
        raise Refusal(f"{out} already holds a run: pass --resume auto to go on with it, or another --out")
    return config

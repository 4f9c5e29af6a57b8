"""The loop. Every training command builds a Source and an Objective and hands them to `run`, which reads top to bottom:

micro-batches of a step -> global count -> forward, loss, backward each -> gate on finite -> clip -> optimizer
-> log -> evaluate -> checkpoint

longtrace sft --model DIR --data traces.jsonl --out runs/x
"""

from __future__ import annotations

import json
import math
import signal
import time
from collections.abc import Callable
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import Protocol

import numpy as np
import torch
from rich.console import Console
from rich.markup import escape
from rich.progress import BarColumn, Progress, TextColumn, TimeRemainingColumn

from longtrace import kernels as K

from . import checkpoint, plan, report, traces
from .config import Refusal, SFTConfig, TrainConfig, parse_columns, to_yaml
from .environment import environment
from .model import DTYPES, Masters, Model, checkpoint_activations, load_model
from .objectives import SFT, Objective
from .source import PackedBatch, TraceSource
from .trackers import tracker

console = Console()


class Source(Protocol):
    """Where steps come from: packed rows of a file, or rollouts of the model itself."""

    def next(self) -> list[PackedBatch]:
        """The micro-batches of one optimizer step."""

    def state_dict(self) -> dict: ...

    def load_state_dict(self, state: dict) -> None: ...

    progress: float  # epochs seen
    tokens_per_row: int


class NonFinite(RuntimeError):
    """Loss or gradients are not finite; the weights were not touched."""


class Terminated(SystemExit):
    """SIGTERM: the state of the last whole step is saved, and the process ends with 143."""


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
        raise Refusal("--optimizer adamw8bit needs torchao: pip install torchao") from error
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


def restore_optimizer(optimizer: torch.optim.Optimizer, masters: Masters, saved: dict[str, torch.Tensor]) -> None:
    """Fills the state in place; one step at lr 0 on zero gradients makes the optimizer allocate it and moves nothing."""
    rates = [group["lr"] for group in optimizer.param_groups]
    for group in optimizer.param_groups:
        group["lr"] = 0.0
    for master in masters.masters.values():
        master.grad = torch.zeros_like(master)
    optimizer.step()
    masters.zero_grad()
    for group, rate in zip(optimizer.param_groups, rates):
        group["lr"] = rate
    held = optimizer_tensors(optimizer, masters)
    if held.keys() != saved.keys():
        odd = sorted(held.keys() ^ saved.keys())[0]
        raise Refusal(
            f"the checkpoint's optimizer state does not fit this run (first difference: {odd}); same --optimizer?"
        )
    with torch.no_grad():
        for name, tensor in held.items():
            tensor.copy_(saved[name])


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
    finish: Callable[[], None],
    eval_batches: list[PackedBatch] | None = None,
    flops_per_token: float = 0.0,
    peak_flops: float = 0.0,
) -> RunResult:
    """Trains for `steps` optimizer steps and leaves a run folder.

    `finish` exports the model; `peak_flops` (FLOP/s of a measured matmul) turns `flops_per_token` into MFU. Raises
    Refusal (out of memory, a checkpoint that does not fit), NonFinite, and SystemExit(143) after SIGTERM.
    """
    out, device = config.out, model.device
    masters = Masters(model, DTYPES[config.dtype])
    optimizer = make_optimizer(config, masters)
    step, stopped_early, best = 0, False, {"loss": math.inf, "bad": 0}

    def state() -> dict:
        """What a resumed run needs besides weights: taken at step boundaries, so a save may come at any time after."""
        return {
            "step": step,
            "source": source.state_dict(),
            "objective": objective.state_dict(),
            "rng": checkpoint.rng_state(),
            "best": dict(best),
            "config": json.loads(json.dumps(asdict(config), default=str)),
        }

    def save(boundary: dict) -> None:
        history.sync()  # whoever resumes from here finds every row of metrics up to here
        tensors = {f"model.{name}": master.detach() for name, master in masters.masters.items()}
        tensors |= {f"optimizer.{name}": t for name, t in optimizer_tensors(optimizer, masters).items()}
        checkpoint.save(out / "checkpoints", boundary["step"], tensors, boundary, keep_last=config.keep_last)

    # ---- resume -------------------------------------------------------------------------------------------------------
    checkpoint.tidy(out / "checkpoints")
    resumed = checkpoint.latest(out / "checkpoints") if config.resume == "auto" else Path(config.resume or ".")
    if config.resume and resumed:
        tensors, saved = checkpoint.load(resumed)
        source.load_state_dict(saved["source"])
        objective.load_state_dict(saved["objective"])
        parts = {"model": {}, "optimizer": {}}
        for name, tensor in tensors.items():
            part, _, rest = name.partition(".")
            parts[part][rest] = tensor
        masters.load(parts["model"])
        restore_optimizer(optimizer, masters, parts["optimizer"])
        del tensors, parts  # memory-mapped: they would keep a removed checkpoint's disk space
        checkpoint.set_rng_state(saved["rng"])
        step, best = saved["step"], saved["best"]
        console.print(
            f"resumed from {resumed.name}: weights, optimizer, data position, random state; {steps - step} steps to go"
        )
        _print_changes(saved["config"], state()["config"])
    history = checkpoint.MetricsLog(out / "metrics.jsonl", step)
    track = tracker(config.tracker, out.name, out, asdict(config))

    # ---- SIGTERM saves the last whole step, within one micro-batch ------------------------------------------------------
    terminate = []
    previous = signal.signal(signal.SIGTERM, lambda *_: terminate.append(True))

    started, last_line, loss = time.perf_counter(), 0.0, math.nan
    with Progress(
        TextColumn("step {task.completed:,}/{task.total:,}"),
        BarColumn(),
        TextColumn("{task.fields[line]}"),
        TimeRemainingColumn(),
        console=console,
        disable=not console.is_terminal,
    ) as bar:
        task = bar.add_task("train", total=steps, completed=step, line="")
        while step < steps and not stopped_early:
            boundary = state()
            tick = time.perf_counter()
            lr = lr_at(step, steps, config)
            for group in optimizer.param_groups:
                group["lr"] = lr

            # ---- forward and backward, micro-batch by micro-batch; the count is known before the first ---------------
            batches = source.next()
            count = sum(objective.count(batch) for batch in batches)
            loss_sum, metrics = torch.zeros((), dtype=torch.float64, device=device), {}
            for batch in batches:
                if terminate:
                    save(boundary)
                    raise Terminated(143)
                if objective.count(batch) == 0:  # all of it masked: nothing to learn, and no GEMM to pay
                    continue
                try:
                    batch = batch.to(device)
                    part, sums = objective(model.hidden(batch), model.head(), batch)
                    (part / count).backward()
                except (torch.OutOfMemoryError, RuntimeError) as error:
                    raise _out_of_memory(error, source.tokens_per_row) or error from error
                loss_sum += part.detach()
                for key, value in sums.items():
                    metrics[key] = metrics.get(key, 0.0) + float(value)

            # ---- gate, clip, step ------------------------------------------------------------------------------------
            gradients = masters.gradients()
            norm = torch.nn.utils.get_total_norm(gradients) if gradients else torch.zeros(())
            loss, grad_norm = float(loss_sum) / max(count, 1), float(norm)
            if not (math.isfinite(loss) and math.isfinite(grad_norm)):
                rows = sorted({row for batch in batches for row in batch.documents})
                raise NonFinite(
                    f"step {step + 1}: loss {loss}, gradient norm {grad_norm}; the weights were not touched. Rows in the step: "
                    f"{rows[:20]}. The last checkpoint in {out / 'checkpoints'} stands."
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
            row = {
                "step": step,
                "loss": loss,
                "lr": lr,
                "grad_norm": grad_norm,
                "dt": dt,
                "tok_per_sec": tokens / dt,
                "mfu": tokens / dt * flops_per_token / peak_flops if peak_flops else None,
                "tokens": tokens,
                "supervised": int(sum((batch.labels != -100).sum() for batch in batches)),
                "fill": tokens / (len(batches) * source.tokens_per_row),
                "epoch": source.progress,
                "seconds": time.perf_counter() - started,
                **{key: value / max(count, 1) for key, value in metrics.items()},
            }

            # ---- evaluate ----------------------------------------------------------------------------------------------
            due = config.eval_every and step % config.eval_every == 0
            if eval_batches and (due or step == steps):
                row["eval_loss"] = evaluate_loss(model, objective, eval_batches)
                better = row["eval_loss"] < best["loss"]
                best = {"loss": min(row["eval_loss"], best["loss"]), "bad": 0 if better else best["bad"] + 1}
                stopped_early = bool(config.patience) and best["bad"] >= config.patience
            history.append(row)
            track.log(row, step)

            # ---- checkpoint --------------------------------------------------------------------------------------------
            if step == steps or stopped_early or (config.save_every and step % config.save_every == 0):
                save(state())

            line = _line(row, steps)
            bar.update(task, completed=step, line=line)
            if not console.is_terminal and (
                step in (1, steps) or "eval_loss" in row or time.perf_counter() - last_line > 5
            ):
                console.print(f"step {step:>{len(str(steps))}}/{steps} | {line}", highlight=False)
                last_line = time.perf_counter()
    signal.signal(signal.SIGTERM, previous)
    if stopped_early:
        console.print(
            f"stopped early: {config.patience} evaluations without a better eval loss than {best['loss']:.4f}"
        )
    finish()
    track.finish()
    rows = history.rows()
    return RunResult(out, step, rows[-1]["loss"] if rows else loss, rows)


def _print_changes(before: dict, now: dict) -> None:
    """What differs from the run being resumed; the data is held to the same tokens by the source itself."""
    for key in sorted(before.keys() & now.keys() - {"resume", "out", "plan"}):
        if before[key] != now[key]:
            console.print(f"  changed since the checkpoint: {key} {before[key]} -> {now[key]}", markup=False)


def _line(row: dict, steps: int) -> str:
    parts = [
        f"loss {row['loss']:.4f}",
        f"lr {row['lr']:.1e}",
        f"norm {row['grad_norm']:.2f}",
        f"{row['tok_per_sec']:,.0f} tok/s",
    ]
    if row["mfu"] is not None:
        parts.append(f"mfu {row['mfu']:.0%}")
    if "eval_loss" in row:
        parts.append(f"eval {row['eval_loss']:.4f}")
    return " | ".join([*parts, f"epoch {row['epoch']:.2f}"])


def _out_of_memory(error: Exception, tokens_per_row: int) -> Refusal | None:
    if isinstance(error, torch.OutOfMemoryError) or "can't allocate memory" in str(error):
        return Refusal(
            f"out of memory with --tokens-per-row {tokens_per_row:,}: lower it, or --head-budget-mb, or pass "
            "--activation-checkpointing on, --optimizer adamw8bit or --lora-rank 16 (the README's table says which helps when)"
        )
    return None


# ---------------------------------------------------------------------------------------------------------------------
# supervised fine-tuning


def sft(config: SFTConfig) -> RunResult | None:
    """`longtrace sft`: reads and audits the traces, prints the plan, trains, leaves a Hugging Face folder in config.out.

    Returns None after `--plan`. Raises Refusal for anything about the input or the arguments that cannot be used.
    """
    config = resolve(config)
    model = load_model(config)
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
    train_documents, held_out, held_data = np.arange(len(data.lengths)), np.arange(0), data
    if config.eval_data:
        held_data = traces.load_traces(config.eval_data, model.tokenizer, **load)
        held_out = np.arange(len(held_data.lengths))
    elif config.eval_fraction:
        order = np.random.default_rng(config.seed).permutation(len(data.lengths))
        cut = max(1, round(config.eval_fraction * len(order)))
        held_out, train_documents = np.sort(order[:cut]), np.sort(order[cut:])

    rows_per_step = config.tokens_per_step // config.tokens_per_row
    source = TraceSource(data, train_documents, config.tokens_per_row, rows_per_step, config.seed)
    steps = config.steps or source.steps_for(config.epochs)
    eval_batches = TraceSource(held_data, held_out, config.tokens_per_row, 1, 0).all_rows() if len(held_out) else []

    lengths = data.lengths[train_documents]
    estimate = plan.estimate(model, config, lengths)
    if estimate.checkpointing:
        checkpoint_activations(model)
    console.print(plan.table(config, model, source, steps, estimate))
    if config.plan:
        return None

    template = traces.chat_template(model.tokenizer, config.template)
    _stop_at(model, [*data.audit.ends])
    _open_run(config, data)

    def finish() -> None:
        checkpoint.export_model(
            model.hf, model.tokenizer, config.out, chat_template=template, dtype=DTYPES[config.dtype]
        )

    result = run(
        config,
        model,
        source,
        SFT(config.head_budget_mb),
        steps=steps,
        finish=finish,
        eval_batches=eval_batches,
        flops_per_token=estimate.flops_per_token,
        peak_flops=estimate.peak_flops,
    )
    page = report.sft_report(config.out, lengths=lengths)
    console.print(f"model and tokenizer in {escape(str(config.out))}; the run's story in {escape(str(page))}")
    return result


def _stop_at(model: Model, ends: list[str]) -> None:
    """Generation stops at the tokens the trained turns end in; the model's own list may lack a template's."""
    generation = model.base.generation_config
    stops = generation.eos_token_id if generation.eos_token_id is not None else []
    stops = list(stops) if isinstance(stops, (list, tuple)) else [stops]
    learned = [model.tokenizer.convert_tokens_to_ids(token) for token in ends if token != "nothing"]
    new = [token for token in learned if token not in stops]
    if new:
        generation.eos_token_id = [*stops, *new]


def resolve(config: TrainConfig) -> TrainConfig:
    """Fills what depends on other fields and checks what does not fit together."""
    config.out = Path(config.out)
    config.tokens_per_row = config.tokens_per_row or config.max_tokens
    config.tokens_per_step = config.tokens_per_step or config.tokens_per_row
    if config.tokens_per_step % config.tokens_per_row:
        raise Refusal(
            f"--tokens-per-step {config.tokens_per_step:,} is not a multiple of --tokens-per-row {config.tokens_per_row:,}: "
            f"pass {max(1, round(config.tokens_per_step / config.tokens_per_row)) * config.tokens_per_row}"
        )
    if not config.warmup >= 0 or not 0 <= config.min_lr_ratio <= 1:
        raise Refusal(
            f"--warmup {config.warmup} and --min-lr-ratio {config.min_lr_ratio} must be >= 0, the latter <= 1"
        )
    if config.out.resolve() == Path(config.model).resolve():
        raise Refusal(f"--out {config.out} is the --model folder: the run would overwrite the weights it starts from")
    if (config.out / "checkpoints").exists() and not config.resume and not config.plan:
        raise Refusal(f"{config.out} already holds a run: pass --resume auto to go on with it, or another --out")
    return config


def _open_run(config: SFTConfig, data: traces.TraceSet) -> None:
    """Writes what the run is: config, environment and audit, before the first step."""
    config.out.mkdir(parents=True, exist_ok=True)
    checkpoint.write_atomic(config.out / "config.yaml", to_yaml(config))
    checkpoint.write_atomic(config.out / "environment.json", json.dumps(environment(), indent=1))
    checkpoint.write_atomic(config.out / "audit.json", json.dumps(data.audit.as_dict(), indent=1))
    console.print(K.explain(), highlight=False)

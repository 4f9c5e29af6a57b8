"""How fast does SFT train, and in how much memory? This trainer and TRL's SFTTrainer on the same packed rows.

Both sides get the same weights, the same rows in the same order, the same learning rate, AdamW settings and clipping,
and the same threads; activation checkpointing is off but for the implementations named so. The losses are compared first: a speed-up that changes the loss is
none. What is timed is a whole optimizer step, from the end of one to the end of the next, the first left out.
"""

from __future__ import annotations

import contextlib
import itertools
import json
import tempfile
import time
from pathlib import Path

import numpy as np

from longtrace.trainer.config import Refusal

from . import BenchConfig, harness
from .harness import console

LR, BETAS, EPS, CLIP = 1e-5, (0.9, 0.95), 1e-8, 1.0

# name: (worker, package it needs, how it holds and computes with weights)
IMPLS = {
    "longtrace": ("ours", "longtrace", "fp32 masters, bf16 weights and compute"),
    "longtrace-checkpointing": ("ours", "longtrace", "the same, layers recomputed but for their attention"),
    "trl": ("trl", "trl", "bf16 weights, bf16 AdamW state, no autocast"),
    "trl-checkpointing": ("trl", "trl", "the same, layers recomputed"),
    "trl-autocast": ("trl", "trl", "fp32 weights, bf16 autocast (TRL's default)"),
}
FULL = 0.98  # of --tokens: a row of traces that is less full would not be the length that is asked about
DEFAULT_IMPLS = ["longtrace", "trl"]

SMOLLM2_135M = {
    "vocab_size": 49152,
    "hidden_size": 576,
    "intermediate_size": 1536,
    "num_hidden_layers": 30,
    "num_attention_heads": 9,
    "num_key_value_heads": 3,
    "max_position_embeddings": 8192,
    "rope_theta": 100000.0,
    "tie_word_embeddings": True,
}
TINY = SMOLLM2_135M | {
    "vocab_size": 4096,
    "hidden_size": 192,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 3,
    "num_key_value_heads": 1,
}


def bench(config: BenchConfig) -> None:
    """Measures, prints the table, draws sft_throughput.png, writes the JSON record."""
    if config.quick:
        config.model, config.data, config.tokens, config.document_tokens = "", None, 1024, 256
        config.repeats, config.steps = 3, 3
    config.tokens, config.steps = config.tokens or 8192, config.steps or 3
    if config.steps < 2 or config.repeats < 1 or config.tokens < 16:
        raise Refusal("bench: accepted: --steps 2 or more (the first is not timed), --repeats 1, --tokens 16 or more")
    chosen, machine = harness.begin(config, IMPLS, DEFAULT_IMPLS)
    threads = machine["threads"]
    skipped = {n: f"{IMPLS[n][1]} is not installed" for n in chosen if not harness.installed(IMPLS[n][1])}

    with tempfile.TemporaryDirectory(prefix="longtrace-bench-") as folder:
        model, weights = model_folder(config, Path(folder))
        rows, tokens_text = _rows(config, model)
        np.savez(Path(folder) / "rows.npz", **rows)
        what = f"{weights}; {config.tokens:,}-token rows, {tokens_text}; bf16"
        console.print(f"sft_throughput: {what}; {threads} threads", highlight=False)
        targets = {
            name: (
                f"longtrace.bench.sft_throughput:{IMPLS[name][0]}",
                {"impl": name, "model": str(model), "rows": f"{folder}/rows.npz", "steps": config.steps},
            )
            for name in chosen
            if name not in skipped
        }
        results, failed = harness.interleaved(targets, repeats=config.repeats, threads=threads)
    checks = [_same_loss(mine, name, results) for mine, name in rivals(results)]
    report(
        "sft_throughput", "SFT throughput", config, machine, results, skipped | failed, what,
        policies={name: IMPLS[name][2] for name in results}, checks=checks,
    )  # fmt: skip
    if failed:
        raise Refusal(f"bench sft_throughput: {', '.join(failed)} did not finish; the record says why")


def rivals(results: dict[str, list[dict]]) -> list[tuple[str, str]]:
    """(one of ours, one of theirs), every two that were measured."""
    pairs = itertools.product(results, results)
    return [(mine, name) for mine, name in pairs if mine.startswith("longtrace") and not name.startswith("longtrace")]


def _same_loss(mine: str, name: str, results: dict[str, list[dict]]) -> str:
    a, b = results[mine][0]["losses"], results[name][0]["losses"]
    differences = [abs(x - y) / abs(y) for x, y in zip(a, b)]
    return (
        f"{'holds' if differences[0] < 5e-3 else 'FAILS'}: {mine}: first loss within 0.5 % of {name}'s "
        f"({a[0]:.4f} and {b[0]:.4f}; largest difference over {len(a)} steps {100 * max(differences):.2f} %)"
    )


def report(
    file: str,
    title: str,
    config: BenchConfig,
    machine: dict,
    results: dict[str, list[dict]],
    left_out: dict[str, str],
    what: str,
    *,
    policies: dict[str, str],
    checks: list[str],
    ratios: dict[str, float] | None = None,
    **more,
) -> None:
    """What a benchmark of optimizer steps leaves: the table, ratios of ours and theirs, FILE.json and FILE.png.

    `results`: by implementation, what `measured` returned in each of its processes; `policies`: how each holds and computes
    with weights; `left_out`: why one was not measured; `ratios` and `more` join the record.
    """
    table = [_row(name, found, policies[name]) for name, found in results.items()]
    by_name = {row["impl"]: row for row in table}
    ratios, pairs = dict(ratios or {}), rivals(results)
    for mine, name in pairs:
        key = f"vs_{name}" if mine == "longtrace" else f"{mine}_vs_{name}"
        ratios[f"tokens_per_s_{key}"] = by_name[mine]["tokens_per_s"] / by_name[name]["tokens_per_s"]
        ratios[f"peak_mb_{key}"] = by_name[mine]["peak_mb"] / by_name[name]["peak_mb"]
        a, b = results[mine][0]["losses"], results[name][0]["losses"]
        ratios[f"first_loss_difference_{key}"] = abs(a[0] - b[0]) / abs(b[0])
        ratios[f"largest_loss_difference_{key}"] = max(abs(x - y) / abs(y) for x, y in zip(a, b))
    for check in checks:
        console.print(check, style="green" if check.startswith("holds") else "bold red", highlight=False)
    columns = {"impl": "", "tokens_per_s": "tokens/s", "step_seconds": "s/step", "peak_mb": "peak MB",
               "floor_mb": "imports MB", "final_loss": "final loss", "timed_steps": "timed steps"}  # fmt: skip
    formats = {
        "tokens_per_s": ",.1f",
        "step_seconds": ",.2f",
        "peak_mb": ",.0f",
        "floor_mb": ",.0f",
        "final_loss": ".4f",
    }
    if table:
        harness.print_table(f"{title} (peak memory is above what the imports take)", columns, table, formats)
        for row in table:
            console.print(f"  {row['impl']}: {row['policy']}", style="dim", highlight=False)
    for mine, name in pairs:
        speed, peak = (by_name[mine][key] / by_name[name][key] for key in ("tokens_per_s", "peak_mb"))
        console.print(f"{mine} / {name}: {speed:.2f}x the tokens per second, {peak:.2f}x the memory", highlight=False)
    for name, why in left_out.items():
        console.print(f"skipped: {name}: {why.splitlines()[0]}", style="yellow")
    path = harness.write_record(
        file, config.json, machine=machine, rows=table, ratios=ratios, setting=what,
        losses={name: found[0]["losses"] for name, found in results.items()}, skipped=left_out, checks=checks,
        optimizer={"lr": LR, "betas": BETAS, "eps": EPS, "weight_decay": 0.0, "clip": CLIP, "schedule": "constant"},
        **more,
    )  # fmt: skip
    if table:
        panels = [("tokens per second (more is better)", table, "tokens_per_s", ",.1f"),
                  ("peak memory above imports, MB (less is better)", table, "peak_mb", ",.0f")]  # fmt: skip
        note = f"{what}\n{machine['cpu']}, {machine['threads']} threads, {machine['date']}"
        harness.bar_picture(path.parent / f"{file}.png", title, panels, note)
    console.print(f"record in {path}, picture beside it", highlight=False)


def _row(name: str, found: list[dict], policy: str) -> dict:
    seconds = [second for result in found for second in result["seconds"]]
    rates = [tokens / second for result in found for tokens, second in zip(result["tokens"], result["seconds"])]
    return {
        "impl": name,
        "tokens_per_s": float(np.median(rates)),
        "peak_mb": harness.median(found, "peak_mb"),
        "final_loss": found[0]["losses"][-1],
        "step_seconds": float(np.median(seconds)),
        "tokens_per_s_min": min(rates),
        "tokens_per_s_max": max(rates),
        "floor_mb": harness.median(found, "floor_mb"),
        "timed_steps": len(seconds),
        "processes": len(found),
        "policy": policy,
    }


# ----------------------------------------------------------------------------------------------------------------------
# What both sides get: a model folder and packed rows


def model_folder(config: BenchConfig, folder: Path) -> tuple[Path, str]:
    """A Hugging Face folder with bf16 weights and a tokenizer, and what it is in words."""
    if config.model:
        if not (Path(config.model) / "config.json").is_file():
            raise Refusal(f"--model {config.model}: found no config.json there; accepted: a Hugging Face model folder")
        return Path(config.model).resolve(), f"weights of {Path(config.model).resolve().name}"
    size = random_model(folder / "model", "LlamaConfig", TINY if config.quick else SMOLLM2_135M)
    return folder / "model", f"random weights, {size:.1f}M parameters" + (
        "" if config.quick else " (SmolLM2-135M's shape)"
    )


def random_model(folder: Path, kind: str, shape: dict, device: str = "cpu") -> float:
    """Writes bf16 random weights of a transformers config class `kind`, with a tokenizer; returns millions of parameters."""
    import torch
    import transformers
    from tokenizers import Tokenizer
    from tokenizers.models import WordLevel

    torch.manual_seed(0)
    config = getattr(transformers, kind)(**shape, bos_token_id=None, eos_token_id=1, pad_token_id=0)
    with torch.device(device):
        model = transformers.AutoModelForCausalLM.from_config(config, dtype=torch.bfloat16)
    model.save_pretrained(folder)
    words = Tokenizer(WordLevel({"<pad>": 0, "<eos>": 1, "<unk>": 2}, unk_token="<unk>"))
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="<pad>", eos_token="<eos>", unk_token="<unk>"
    )
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters()) / 1e6


def _rows(config: BenchConfig, model: Path) -> tuple[dict[str, np.ndarray], str]:
    """One packed row a step as flat arrays: ids, labels (next token, -100 = not a target), document lengths."""
    if config.data:
        return _rows_of_traces(config, model)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(0)
    length = min(config.document_tokens or config.tokens, config.tokens)
    prompt = min(64, length // 4)
    rows: dict[str, np.ndarray] = {}
    frequency = 1.0 / (np.arange(3, vocabulary) + 10.0)
    for step in range(config.steps):
        lengths = [length] * (config.tokens // length) + ([config.tokens % length] if config.tokens % length else [])
        ids = rng.choice(np.arange(3, vocabulary), size=config.tokens, p=frequency / frequency.sum())
        labels = np.roll(ids, -1)
        for end in np.cumsum(lengths):
            labels[end - 1] = -100  # the next token belongs to the next document
        for start, n in zip(np.cumsum([0, *lengths[:-1]]), lengths):
            labels[start : start + min(prompt, n) - 1] = -100  # the prompt is not a target
        rows |= {f"ids{step}": ids, f"labels{step}": labels, f"lengths{step}": np.array(lengths)}
    return rows, f"generated tokens (frequency 1/(rank + 10)), documents of {length:,}, {prompt} of them prompt"


def _rows_of_traces(config: BenchConfig, model: Path) -> tuple[dict[str, np.ndarray], str]:
    from longtrace.trainer.model import load_tokenizer
    from longtrace.trainer.source import TraceSource
    from longtrace.trainer.traces import load_traces

    traces = load_traces(
        config.data,
        load_tokenizer(str(model)),
        template="auto",
        max_tokens=config.tokens,
        on_too_long="split",
        skip_bad_rows=True,
    )
    source = TraceSource(traces, np.arange(len(traces.lengths)), config.tokens, 1, 0)
    full = [batch for batch in source.all_rows() if len(batch.input_ids) >= FULL * config.tokens][: config.steps]
    if len(full) < config.steps:
        raise Refusal(
            f"--data: found {len(full)} rows of {config.tokens:,} tokens; accepted: {config.steps} or more, or fewer --steps"
        )
    rows: dict[str, np.ndarray] = {}
    for step, batch in enumerate(full):
        rows[f"ids{step}"], rows[f"labels{step}"] = batch.input_ids.numpy(), batch.labels.numpy()
        rows[f"lengths{step}"] = np.diff(batch.cu_seqlens.numpy())
    return rows, f"traces of {', '.join(Path(spec).name for spec in config.data)}, longer ones split"


# ----------------------------------------------------------------------------------------------------------------------
# The measuring processes. Each returns seconds per timed step, tokens per step, losses, and memory


def measured(marks: list[float], losses: list[float], tokens: list[int], floor: int, peak: int) -> dict:
    """`marks`: the moments between steps, the first before step 1; `tokens` of each step."""
    seconds = [after - before for before, after in itertools.pairwise(marks)][1:]
    return {
        "seconds": seconds,
        "tokens": tokens[1:],
        "losses": losses,
        "floor_mb": floor / harness.MB,
        "peak_mb": (peak - floor) / harness.MB,
    }


def peak_bytes(device: str) -> int:
    """The largest memory so far: the device's allocations on CUDA, else what the process holds."""
    import torch

    return torch.cuda.max_memory_allocated() if device == "cuda" else harness.peak_bytes()


def moment(device: str) -> float:
    """Now, in seconds, all work handed to the device done."""
    import torch

    if device == "cuda":
        torch.cuda.synchronize()
    return time.perf_counter()


class _Done(Exception):
    """All steps are made."""


class Replay:
    """A Source of given steps that notes the time between them and stops after the last."""

    progress, metrics = 0.0, {}

    def __init__(self, steps: list[list], tokens_per_row: int, device: str = "cpu"):
        self.steps, self.tokens_per_row, self.device = steps, tokens_per_row, device
        self.marks: list[float] = []
        self.peaks: list[int] = []

    def next(self, say) -> list:
        self.marks.append(moment(self.device))
        self.peaks.append(peak_bytes(self.device))
        if len(self.marks) > len(self.steps):
            raise _Done  # before the run's closing checkpoint, which is not training (TRL's is off too)
        return self.steps[len(self.marks) - 1]

    def state_dict(self) -> dict:
        return {}

    def tensors(self) -> dict:
        return {}

    def load_state_dict(self, state: dict, tensors: dict) -> None:
        pass

    def run(self, train, config, model, objective, floor: int) -> dict:
        """Trains on the steps with `train` (`longtrace.trainer.train.run`) and returns what was `measured`."""
        config.out.mkdir()
        with contextlib.suppress(_Done):
            train(config, model, self, objective, steps=config.steps, begin=lambda: None, finish=lambda: None)
        losses = [json.loads(line)["loss"] for line in (config.out / "metrics.jsonl").read_text().splitlines()]
        tokens = [sum(batch.tokens for batch in step) for step in self.steps]
        return measured(self.marks, losses, tokens, floor, self.peaks[-1])


def ours(job: dict) -> dict:
    """The trainer's loop on the rows, one a step."""
    import torch

    from longtrace.trainer import train
    from longtrace.trainer.config import SFTConfig
    from longtrace.trainer.model import checkpoint_activations, load_model
    from longtrace.trainer.objectives import SFT
    from longtrace.trainer.source import PackedBatch

    device = job.get("device", "cpu")
    floor = peak_bytes(device)
    rows = np.load(job["rows"])
    tokens = max(len(rows[f"ids{step}"]) for step in range(job["steps"]))

    def row(step: int) -> list[PackedBatch]:
        ids, labels, lengths = (torch.from_numpy(rows[f"{name}{step}"]) for name in ("ids", "labels", "lengths"))
        return [
            PackedBatch(
                ids.long(),
                torch.cat([torch.arange(n) for n in lengths.tolist()]),
                torch.cat([torch.zeros(1, dtype=torch.int32), lengths.cumsum(0, dtype=torch.int32)]),
                int(lengths.max()),
                labels.long(),
                list(range(len(lengths))),
            )
        ]

    source = Replay([row(step) for step in range(job["steps"])], tokens, device)
    config = SFTConfig(
        model=job["model"], data=[], out=Path.cwd() / "out", max_tokens=tokens, tokens_per_row=tokens, tokens_per_step=tokens,
        steps=job["steps"] + 1, lr=LR, schedule="constant", warmup=0, betas=BETAS, adam_eps=EPS, weight_decay=0.0,
        clip=CLIP, dtype="bf16", activation_checkpointing="off", device=device, rope="none",
    )  # fmt: skip
    model = load_model(config)
    if job["impl"] == "longtrace-checkpointing":
        checkpoint_activations(model)
    return source.run(train.run, config, model, SFT(), floor)


def trl(job: dict) -> dict:
    """TRL's SFTTrainer on the rows, already packed and tokenised: padding-free, so documents stay apart."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import SFTConfig, SFTTrainer

    device = job.get("device", "cpu")
    floor = peak_bytes(device)
    rows = np.load(job["rows"])
    autocast = job["impl"] == "trl-autocast"
    examples = []
    for step in range(job["steps"]):
        ids, labels = rows[f"ids{step}"], rows[f"labels{step}"]
        own = np.concatenate([[-100], labels[:-1]])  # TRL shifts by itself: the label stands at its own token
        examples.append(
            {"input_ids": ids.tolist(), "labels": own.tolist(), "seq_lengths": rows[f"lengths{step}"].tolist()}
        )
    marks, peaks = [], []

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            marks.append(moment(device))

        def on_step_end(self, args, state, control, **_):
            marks.append(moment(device))
            peaks.append(peak_bytes(device))

    # use_cpu with bf16=True means autocast over fp32 weights; without it the weights' own bf16 is the compute dtype
    arguments = SFTConfig(
        output_dir=str(Path.cwd() / "out"), use_cpu=device == "cpu", bf16=autocast, fp16=False,
        gradient_checkpointing=job["impl"] == "trl-checkpointing",
        per_device_train_batch_size=1, gradient_accumulation_steps=1, max_steps=job["steps"],
        learning_rate=LR, lr_scheduler_type="constant", warmup_steps=0, adam_beta1=BETAS[0], adam_beta2=BETAS[1],
        adam_epsilon=EPS, weight_decay=0.0, max_grad_norm=CLIP, optim="adamw_torch_fused",
        packing=False, padding_free=True, max_length=None, dataset_kwargs={"skip_prepare_dataset": True},
        train_sampling_strategy="sequential", dataloader_pin_memory=False, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32 if autocast else torch.bfloat16)
    trainer = SFTTrainer(
        model=model,
        args=arguments,
        train_dataset=Dataset.from_list(examples),
        processing_class=AutoTokenizer.from_pretrained(job["model"]),
        callbacks=[Clock()],
    )
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    return measured(marks, losses, [len(e["input_ids"]) for e in examples], floor, peaks[-1])

"""How fast is a step of preference optimisation, and in how much memory? This trainer and TRL's DPOTrainer on the same pairs.

Both sides get the same weights, the same pairs in the same order, the same beta, learning rate, AdamW settings, clipping and
threads, and hold no reference model: its log-probs are computed before the clock starts. The first loss must be ln 2. Rates
count the tokens of the pairs; padding is none. The blend of BVPO's two gradients is measured as well (`bench blend`).
"""

from __future__ import annotations

import json
import math
import os
import tempfile
import time
from pathlib import Path

import numpy as np

from longtrace.trainer.config import Refusal

from . import BenchConfig, blend, harness
from .harness import console
from .sft_throughput import BETAS, CLIP, EPS, LR, Replay, measured, model_folder, moment, peak_bytes, report

BETA = 0.1
PAIRS = 2  # a step
SPREAD = 4  # times: the longest document over the shortest
APART = 4 / 3  # times: the longer document of a pair over the shorter, at most
FASTER, LEANER = 2.0, 0.5  # than the best of TRL's, each measure by itself
PROMPT = 64

# name: (worker, package it needs, how it holds and computes with weights)
IMPLS = {
    "longtrace": ("ours", "longtrace", "packed, fp32 masters, bf16 weights and compute"),
    "longtrace-checkpointing": ("ours", "longtrace", "the same, layers recomputed but for their attention"),
    "trl": ("trl", "trl", "padded pair by pair, bf16 weights, bf16 AdamW state, no autocast"),
    "trl-unmasked": (
        "trl",
        "trl",
        "the same, its collator told not to mask padding, which causality hides: no dense mask",
    ),
    "trl-batched": ("trl", "trl", "as trl, a step's pairs padded together"),
    "trl-checkpointing": ("trl", "trl", "padded pair by pair, layers recomputed"),
    "trl-autocast": ("trl", "trl", "padded pair by pair, fp32 weights, bf16 autocast (TRL's default)"),
}
DEFAULT_IMPLS = ["longtrace", "trl", "trl-unmasked"]


def bench(config: BenchConfig) -> None:
    """Measures, prints the tables, draws prefer.png, writes the JSON record."""
    if config.quick:
        config.model, config.data, config.tokens, config.repeats, config.steps = "", None, 512, 1, 4
    config.tokens, config.steps = config.tokens or 8192, config.steps or 3
    if config.steps < 2 or config.repeats < 1 or config.tokens < 64:
        raise Refusal(
            "bench prefer: accepted: --steps 2 or more (the first is not timed), --repeats 1, --tokens 64 or more"
        )
    chosen, machine = harness.begin(config, IMPLS, DEFAULT_IMPLS[: 2 if config.quick else None])
    threads = machine["threads"]
    skipped = {n: f"{IMPLS[n][1]} is not installed" for n in chosen if not harness.installed(IMPLS[n][1])}
    with tempfile.TemporaryDirectory(prefix="longtrace-bench-") as folder:
        model, weights = model_folder(config, Path(folder))
        pairs, text = pairs_of(config, model)
        np.savez(Path(folder) / "pairs.npz", **pairs)
        what = f"{weights}; {PAIRS} pairs a step ({text}); bf16"
        console.print(f"prefer: {what}; {threads} threads", highlight=False)
        job = {"model": str(model), "pairs": f"{folder}/pairs.npz", "steps": config.steps}
        targets = {
            name: (f"longtrace.bench.prefer:{IMPLS[name][0]}", job | {"impl": name})
            for name in chosen
            if name not in skipped
        }
        results, failed = harness.interleaved(targets, repeats=config.repeats, threads=threads)
    blended = blend.work({
        "inputs": ["tensors:64x65536" if config.quick else "smollm2-135m"], "chosen": list(blend.IMPLS),
        "threads": threads, "repeats": 5 if config.quick else 15,
    })  # fmt: skip
    blend.print_tables(blended["rows"])
    report(
        "prefer", "Preference optimisation", config, machine, results, skipped | failed, what,
        policies={name: IMPLS[name][2] for name in results},
        checks=[_first_loss(name, found[0]["losses"][0]) for name, found in results.items()]
        + _against_best(results)
        + blended["checks"],
        ratios=blended["ratios"],
        blend=blended["rows"],
        setup_seconds={name: harness.median(found, "setup_seconds") for name, found in results.items()},
        padding=padding(pairs["offsets"]),
    )  # fmt: skip
    if failed:
        raise Refusal(f"bench prefer: {', '.join(failed)} did not finish; the record says why")


def _first_loss(name: str, loss: float) -> str:
    """Where the policy is the reference still, a margin is 0 and DPO's loss ln 2."""
    off = abs(loss - math.log(2))
    return f"{'holds' if off < 1e-6 else 'FAILS'}: {name}: first loss {loss:.7f}, ln 2 to 1e-6 (off by {off:.1e})"


def _against_best(results: dict[str, list[dict]]) -> list[str]:
    """Ours beside the fastest and the leanest of TRL's: a line for time and one for memory."""
    theirs = [name for name in results if name.startswith("trl")]
    if "longtrace" not in results or not theirs:
        return []

    def rate(name: str) -> float:
        return float(np.median([t / s for found in results[name] for t, s in zip(found["tokens"], found["seconds"])]))

    def peak(name: str) -> float:
        return harness.median(results[name], "peak_mb")

    fastest, leanest = max(theirs, key=rate), min(theirs, key=peak)
    speed, memory = rate("longtrace") / rate(fastest), peak("longtrace") / peak(leanest)
    return [
        f"{'holds' if speed >= FASTER else 'FAILS'}: {speed:.2f}x the tokens per second of {fastest}, at least {FASTER:g}",
        f"{'holds' if memory <= LEANER else 'FAILS'}: {memory:.2f}x the memory of {leanest}, at most {LEANER:g}",
    ]


def padding(offsets: np.ndarray) -> float:
    """Padding over tokens where each pair is padded to its longer document, as TRL does."""
    lengths = np.diff(offsets).reshape(-1, 2)
    return float(2 * lengths.max(1).sum() / lengths.sum() - 1)


# ----------------------------------------------------------------------------------------------------------------------
# What both sides get: pairs as flat arrays


def pairs_of(config: BenchConfig, model: Path) -> tuple[dict[str, np.ndarray], str]:
    """Arrays of a PairSet with the pairs of all steps (tokens, offsets, prompts), and what they are in words."""
    count, shortest = PAIRS * config.steps, config.tokens // SPREAD
    if config.data:
        return _pairs_of_data(config, model, count, shortest)
    vocabulary = json.loads((model / "config.json").read_text())["vocab_size"]
    rng = np.random.default_rng(0)
    prompt = min(PROMPT, shortest // 2)
    frequency = 1.0 / (np.arange(3, vocabulary) + 10.0)
    chosen = rng.integers(shortest, config.tokens + 1, count)
    rejected = chosen * APART ** rng.uniform(-1, 1, count)
    lengths = np.stack([chosen, np.clip(rejected.astype(int), shortest, config.tokens)], 1).ravel()
    ids = rng.choice(np.arange(3, vocabulary), size=int(lengths.sum()), p=frequency / frequency.sum())
    offsets = np.concatenate([[0], np.cumsum(lengths)])
    for chosen, rejected in offsets[:-1].reshape(-1, 2):
        ids[rejected : rejected + prompt] = ids[chosen : chosen + prompt]
    pairs = {"tokens": ids.astype(np.uint32), "offsets": offsets, "prompts": np.full(2 * count, prompt)}
    return pairs, f"generated, {shortest:,} to {config.tokens:,} tokens a side, {prompt} of them the prompt"


def _pairs_of_data(config: BenchConfig, model: Path, count: int, shortest: int) -> tuple[dict[str, np.ndarray], str]:
    from longtrace.trainer.model import load_tokenizer
    from longtrace.trainer.preferences import load_pairs

    pairs = load_pairs(
        config.data, load_tokenizer(str(model)), paths=("trace",), max_tokens=config.tokens, on_too_long="skip",
        skip_bad_rows=True,
    )  # fmt: skip
    fit = np.flatnonzero((pairs.lengths.reshape(-1, 2) >= shortest).all(1))[:count]
    if len(fit) < count:
        raise Refusal(
            f"--data: found {len(fit)} pairs of {shortest:,} to {config.tokens:,} tokens a side; accepted: {count} or more, "
            "fewer --steps, or other --tokens"
        )
    documents = np.stack([2 * fit, 2 * fit + 1], 1).ravel()
    parts = [pairs.tokens[pairs.offsets[d] : pairs.offsets[d + 1]] for d in documents]
    arrays = {
        "tokens": np.concatenate(parts),
        "offsets": np.concatenate([[0], np.cumsum(pairs.lengths[documents])]),
        "prompts": pairs.prompts[documents],
    }
    names = ", ".join(Path(spec).name for spec in config.data)
    return arrays, f"of {names}, {shortest:,} to {config.tokens:,} tokens a side"


# ----------------------------------------------------------------------------------------------------------------------
# The measuring processes


def ours(job: dict) -> dict:
    """The trainer's loop on the pairs, its reference log-probs computed as `longtrace prefer` does."""
    from longtrace.trainer import train
    from longtrace.trainer.model import DTYPES, checkpoint_activations, computing_in, load_model
    from longtrace.trainer.pair_source import PairSource
    from longtrace.trainer.prefer import PreferConfig
    from longtrace.trainer.preference import Preference
    from longtrace.trainer.preferences import PairSet
    from longtrace.trainer.reference import Reference

    os.environ["XDG_CACHE_HOME"] = str(Path.cwd())  # what other runs computed is not there
    floor = peak_bytes("cpu")
    arrays = np.load(job["pairs"])
    count = len(arrays["prompts"]) // 2
    pairs = PairSet(**arrays, paths=("trace",), source=np.arange(count), audit=None)
    tokens = int(pairs.lengths.reshape(-1, 2).sum(1).max())
    config = PreferConfig(
        model=job["model"], data=[], out=Path.cwd() / "out", max_tokens=tokens, tokens_per_row=tokens, pairs_per_step=PAIRS,
        steps=job["steps"] + 1, lr=LR, schedule="constant", warmup=0, betas=BETAS, adam_eps=EPS, weight_decay=0.0,
        clip=CLIP, dtype="bf16", activation_checkpointing="off", device="cpu", rope="none", loss="dpo", beta=BETA,
    )  # fmt: skip
    began = time.perf_counter()
    model = load_model(config)
    source = PairSource(pairs, np.arange(count), tokens_per_row=tokens, pairs_per_step=PAIRS, seed=0)
    numbers = np.arange(count).reshape(-1, PAIRS).tolist()
    rows = [row for step in numbers for row in source.rows(step)]
    with computing_in(model, DTYPES["bf16"]):
        source.keep_reference(Reference(model)(rows, 2 * count, "pairs"))
    seconds = time.perf_counter() - began
    if job["impl"] == "longtrace-checkpointing":
        checkpoint_activations(model)
    replay = Replay([source.rows(step) for step in numbers], tokens)
    return replay.run(train.run, config, model, Preference("dpo", BETA), floor) | {"setup_seconds": seconds}


def trl(job: dict) -> dict:
    """TRL's DPOTrainer on the pairs, tokenised, with precomputed reference log-probs: it holds one model."""
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import DPOConfig, DPOTrainer
    from trl.trainer.dpo_trainer import DataCollatorForPreference

    floor = peak_bytes("cpu")
    arrays = np.load(job["pairs"])
    autocast, batch = job["impl"] == "trl-autocast", PAIRS if job["impl"] == "trl-batched" else 1
    documents = [ids.tolist() for ids in np.split(arrays["tokens"].astype(np.int64), arrays["offsets"][1:-1])]
    examples = [
        {"prompt_ids": chosen[:prompt], "chosen_ids": chosen[prompt:], "rejected_ids": rejected[prompt:]}
        for chosen, rejected, prompt in zip(documents[::2], documents[1::2], arrays["prompts"][::2].tolist())
    ]
    marks, peaks, losses = [], [], []

    class Unmasked(DataCollatorForPreference):
        def torch_call(self, examples):
            batch = super().torch_call(examples)
            return batch | {"attention_mask": torch.ones_like(batch["attention_mask"])}

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            marks.append(moment("cpu"))

        def on_step_end(self, args, state, control, **_):
            marks.append(moment("cpu"))
            peaks.append(peak_bytes("cpu"))

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # it has token ids already

        def compute_loss(self, *args, **options):
            loss = super().compute_loss(*args, **options)
            losses.append(float(loss[0] if isinstance(loss, tuple) else loss))  # the log rounds it
            return loss

    # use_cpu with bf16=True means autocast over fp32 weights; without it the weights' own bf16 is the compute dtype
    arguments = DPOConfig(
        output_dir=str(Path.cwd() / "out"), use_cpu=True, bf16=autocast, fp16=False, beta=BETA, max_length=None,
        precompute_ref_log_probs=True, precompute_ref_batch_size=batch,
        gradient_checkpointing=job["impl"] == "trl-checkpointing",
        per_device_train_batch_size=batch, gradient_accumulation_steps=PAIRS // batch, max_steps=job["steps"],
        learning_rate=LR, lr_scheduler_type="constant", warmup_steps=0, adam_beta1=BETAS[0], adam_beta2=BETAS[1],
        adam_epsilon=EPS, weight_decay=0.0, max_grad_norm=CLIP, optim="adamw_torch_fused",
        train_sampling_strategy="sequential", dataloader_pin_memory=False, logging_steps=1, report_to="none",
        save_strategy="no", disable_tqdm=True, seed=0,
    )  # fmt: skip
    began = time.perf_counter()
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.float32 if autocast else torch.bfloat16)
    tokenizer = AutoTokenizer.from_pretrained(job["model"])
    trainer = Tokenised(
        model=model,
        args=arguments,
        data_collator=Unmasked(tokenizer.pad_token_id) if job["impl"] == "trl-unmasked" else None,
        train_dataset=Dataset.from_list(examples),
        processing_class=tokenizer,
        callbacks=[Clock()],
    )
    seconds = time.perf_counter() - began
    trainer.train()
    steps = np.reshape(losses, (job["steps"], -1)).mean(1).tolist()
    tokens = np.diff(arrays["offsets"]).reshape(job["steps"], -1).sum(1).tolist()
    return measured(marks, steps, tokens, floor, peaks[-1]) | {"setup_seconds": seconds}

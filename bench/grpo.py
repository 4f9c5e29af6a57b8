"""How fast are rollouts and GRPO steps? This trainer beside transformers' `generate` and TRL's GRPOTrainer.

`generate`: 32 completions of a model in groups of 8, which end where the model ends them. `grpo`: whole optimizer steps
on the same weights, prompts, reward, learning rate, clipping and threads. Completions are drawn, so the two sides write
different tokens: rates count the tokens written, end tokens included, padding not.
"""

from __future__ import annotations

import tempfile
import time
from itertools import islice
from pathlib import Path

import numpy as np

from longtrace.trainer.config import Refusal

from . import BenchConfig, harness
from .harness import console
from .sft_throughput import SMOLLM2_135M, TINY, moment, peak_bytes

LR, GROUP = 1e-6, 8
CHAINS = "generated:chain,steps=8,rows=100"  # prompts where --data gives none

# name: (op, worker, package it needs, how)
IMPLS = {
    "longtrace": ("generate", "generate_ours", "longtrace", "slots refill, a prompt's cache is computed once a group"),
    "transformers": ("generate", "generate_transformers", "transformers", "one left-padded batch, `generate`"),
    "longtrace-grpo": ("grpo", "train_ours", "longtrace", "packed, fp32 masters, bf16 weights and compute"),
    "trl-grpo": ("grpo", "train_trl", "trl", "padded, bf16 weights, bf16 AdamW state, no recomputation"),
}


def bench(config: BenchConfig) -> None:
    """Measures, prints the table, draws grpo.png, writes the JSON record."""
    if config.quick:
        config.model, config.data, config.tokens, config.repeats, config.steps = "", None, 64, 2, 2
    config.tokens, config.steps = config.tokens or 256, config.steps or 3
    if config.steps < 2 or config.repeats < 1:
        raise Refusal("bench grpo: accepted: --steps 2 or more (the first is not timed), --repeats 1 or more")
    chosen, machine = harness.begin(config, IMPLS)
    threads = machine["threads"]
    skipped = {n: f"{IMPLS[n][2]} is not installed" for n in chosen if not harness.installed(IMPLS[n][2])}
    with tempfile.TemporaryDirectory(prefix="longtrace-bench-") as folder:
        model, what = _model(config, Path(folder))
        prompts, of = _prompts(config, model)
        what = f"{what}; {len(prompts)} prompts ({of}) x {GROUP}, up to {config.tokens} new tokens; bf16"
        console.print(f"grpo: {what}; {threads} threads", highlight=False)
        job = {"model": str(model), "prompts": prompts, "tokens": config.tokens, "steps": config.steps}
        targets = {
            name: (f"longtrace.bench.grpo:{IMPLS[name][1]}", job | {"seed": 0})
            for name in chosen
            if name not in skipped
        }
        results, failed = harness.interleaved(targets, repeats=config.repeats, threads=threads)
    rows = [_row(name, found) for name, found in results.items()]
    by_name = {row["impl"]: row for row in rows}
    ratios = {}
    for mine, other in (("longtrace", "transformers"), ("longtrace-grpo", "trl-grpo")):
        if mine in by_name and other in by_name:
            ratios |= {
                f"{key}_{mine}_vs_{other}": by_name[mine][key] / by_name[other][key]
                for key in ("tokens_per_s", "generate_per_s", "train_per_s", "peak_mb")
                if by_name[mine][key] and by_name[other][key]
            }
    columns = {"impl": "", "op": "", "tokens_per_s": "tokens/s", "generate_per_s": "generated/s",
               "train_per_s": "trained/s", "tokens_each": "tokens each", "peak_mb": "peak MB"}  # fmt: skip
    formats = {
        "tokens_per_s": ",.1f",
        "generate_per_s": ",.1f",
        "train_per_s": ",.1f",
        "tokens_each": ",.0f",
        "peak_mb": ",.0f",
    }
    if rows:
        harness.print_table("Rollouts and GRPO steps (tokens written a second)", columns, rows, formats)
    for name, value in ratios.items():
        console.print(f"{name}: {value:.2f}x", highlight=False)
    for name, why in (skipped | failed).items():
        console.print(f"skipped: {name}: {why.splitlines()[0]}", style="yellow")
    path = harness.write_record(
        "grpo", config.json, machine=machine, rows=rows, ratios=ratios, setting=what, skipped=skipped | failed
    )
    if rows:
        panels = [("tokens written a second (more is better)", rows, "tokens_per_s", ",.0f"),
                  ("peak memory above imports, MB (less is better)", rows, "peak_mb", ",.0f")]  # fmt: skip
        note = f"{what}\n{machine['cpu']}, {machine['threads']} threads, {machine['date']}"
        harness.bar_picture(path.parent / "grpo.png", "Rollouts and GRPO steps", panels, note)
    console.print(f"record in {path}, picture beside it", highlight=False)
    if failed:
        raise Refusal(f"bench grpo: {', '.join(failed)} did not finish; the record says why")


def _row(name: str, found: list[dict]) -> dict:
    def rate(tokens: str, seconds: str) -> float | None:
        rates = [t / s for r in found for t, s in zip(r[tokens], r[seconds]) if s]
        return float(np.median(rates)) if rates else None

    totals = [t / s for r in found for t, s in zip(r["written"], r["seconds"])]
    return {
        "impl": name,
        "op": IMPLS[name][0],
        "tokens_per_s": float(np.median(totals)),
        "generate_per_s": rate("written", "generate_seconds"),
        "train_per_s": rate("trained", "train_seconds"),
        "tokens_each": float(np.mean([t for r in found for t in r["written"]])) / found[0]["completions"],
        "peak_mb": harness.median(found, "peak_mb"),
        "final_loss": found[0]["losses"][-1] if found[0]["losses"] else None,
        "tokens_per_s_min": min(totals),
        "tokens_per_s_max": max(totals),
        "processes": len(found),
    }


def _model(config: BenchConfig, folder: Path) -> tuple[Path, str]:
    if config.model:
        return Path(config.model).resolve(), f"weights of {Path(config.model).resolve().name}"
    size = _random(folder / "model", TINY if config.quick else SMOLLM2_135M)
    return folder / "model", f"random weights, {size:.1f}M parameters (they hardly ever end by themselves)"


def _random(folder: Path, shape: dict) -> float:
    """Writes random bf16 weights with the demo's tokenizer, which can write any text; returns millions of parameters."""
    import torch
    from transformers import AutoModelForCausalLM, LlamaConfig

    from longtrace.trainer.demo import make_tokenizer

    tokenizer = make_tokenizer([CHAINS])
    torch.manual_seed(0)
    ends = {"bos_token_id": None, "eos_token_id": tokenizer.eos_token_id, "pad_token_id": tokenizer.pad_token_id}
    model = AutoModelForCausalLM.from_config(LlamaConfig(**shape | ends), dtype=torch.bfloat16)
    model.save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return sum(p.numel() for p in model.parameters()) / 1e6


def _prompts(config: BenchConfig, model: Path) -> tuple[list[list[int]], str]:
    from longtrace.trainer.evaluate import prompt_of
    from longtrace.trainer.model import load_tokenizer
    from longtrace.trainer.rows import read_rows

    tokenizer = load_tokenizer(str(model))
    specs = config.data or [CHAINS]
    rows = islice((row for spec in specs for row in read_rows(spec)), 4)
    texts = [tokenizer.apply_chat_template(prompt_of(r), tokenize=False, add_generation_prompt=True) for r in rows]
    return tokenizer(texts, add_special_tokens=False)["input_ids"], ", ".join(Path(spec).name for spec in specs)


# ----------------------------------------------------------------------------------------------------------------------
# The measuring processes


def _answer(job: dict, floor: int, completions: int, seconds, written, generate=(), trained=(), losses=()) -> dict:
    generate = list(generate) or [0.0] * len(seconds)
    return {
        "seconds": seconds,
        "written": written,
        "generate_seconds": generate,
        "trained": list(trained) or [0] * len(seconds),
        "train_seconds": [s - g if trained else 0.0 for s, g in zip(seconds, generate)],
        "losses": list(losses),
        "completions": completions,
        "peak_mb": (peak_bytes(job.get("device", "cpu")) - floor) / harness.MB,
    }


def _config(job: dict, **more):
    from longtrace.trainer.grpo import GRPOConfig

    longest = max(map(len, job["prompts"])) + job["tokens"]
    return GRPOConfig(
        model=job["model"], data=[], out=Path.cwd() / "out", max_tokens=longest, tokens_per_row=4 * longest,
        max_new_tokens=job["tokens"], group_size=GROUP, prompts_per_rollout=len(job["prompts"]), lr=LR,
        schedule="constant", warmup=0, betas=(0.9, 0.95), dtype="bf16", activation_checkpointing="off", rope="none",
        seed=job["seed"], scale_rewards="group_std", device=job.get("device", "cpu"), **more,
    )  # fmt: skip


def generate_ours(job: dict) -> dict:
    from longtrace.trainer.model import load_model
    from longtrace.trainer.rollout import Engine, Sampling

    floor = peak_bytes(job.get("device", "cpu"))
    model = load_model(_config(job))
    for parameter in model.hf.parameters():
        parameter.data = parameter.data.bfloat16()
    engine = Engine.of(model, GROUP * len(job["prompts"]))
    seconds, written = [], []
    for turn in range(job["steps"]):
        began = moment(job.get("device", "cpu"))
        done = engine.generate(job["prompts"], Sampling(job["tokens"]), samples=GROUP, seed=(job["seed"], turn))
        seconds.append(moment(job.get("device", "cpu")) - began)
        written.append(sum(len(c.tokens) for group in done for c in group))
    return _answer(job, floor, GROUP * len(job["prompts"]), seconds[1:], written[1:], seconds[1:])


def generate_transformers(job: dict) -> dict:
    import torch
    from transformers import AutoModelForCausalLM

    floor = peak_bytes(job.get("device", "cpu"))
    device = job.get("device", "cpu")
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16).eval().to(device)
    ends = model.generation_config.eos_token_id
    ends = ends if isinstance(ends, list) else [ends]
    width = max(map(len, job["prompts"]))
    rows = [p for p in job["prompts"] for _ in range(GROUP)]
    ids = torch.tensor([[0] * (width - len(p)) + p for p in rows], device=device)
    mask = torch.tensor([[0] * (width - len(p)) + [1] * len(p) for p in rows], device=device)
    seconds, written = [], []
    torch.manual_seed(job["seed"])
    for _ in range(job["steps"]):
        began = moment(device)
        with torch.inference_mode():
            out = model.generate(
                input_ids=ids, attention_mask=mask, max_new_tokens=job["tokens"], do_sample=True, temperature=1.0,
                top_p=1.0, top_k=0, pad_token_id=0, eos_token_id=ends,
            )  # fmt: skip
        seconds.append(moment(device) - began)
        ended = torch.isin(out[:, width:], torch.tensor(ends, device=device)).long()
        lengths = torch.where(ended.any(1), ended.argmax(1) + 1, out.shape[1] - width)
        written.append(int(lengths.sum()))
    return _answer(job, floor, len(rows), seconds[1:], written[1:], seconds[1:])


def reward(text: str) -> float:
    """Differs within a group, costs nothing, and is the same on both sides."""
    return (len(text) % 7) / 6


def train_ours(job: dict) -> dict:
    from longtrace.trainer import train
    from longtrace.trainer.experience import Prompt, RolloutSource
    from longtrace.trainer.model import load_model
    from longtrace.trainer.objectives import PolicyGradient
    from longtrace.trainer.rollout import Engine
    from longtrace.trainer.rows import Row

    floor = peak_bytes(job.get("device", "cpu"))
    config = _config(job, steps=job["steps"])
    config.out.mkdir()
    model = load_model(config)
    prompts = [Prompt(p, Row([{"content": ""}], None, "", {}), None) for p in job["prompts"]]

    def score(asked, done):
        values = np.array([reward(model.tokenizer.decode(c.tokens, skip_special_tokens=True)) for c in done])
        return values, {"length": values}

    source = RolloutSource(config, model, Engine.of(model, GROUP * len(prompts)), prompts, score)
    result = train.run(
        config, model, source, PolicyGradient(), steps=config.steps, begin=lambda: None, finish=lambda: None
    )
    rows = result.metrics
    return _answer(
        job, floor, GROUP * len(prompts), [r["dt"] for r in rows][1:], [r["generated"] for r in rows][1:],
        [r["generate_seconds"] for r in rows][1:], [r["tokens"] for r in rows][1:], [r["loss"] for r in rows],
    )  # fmt: skip


def train_trl(job: dict) -> dict:
    import torch
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer, TrainerCallback
    from trl import GRPOConfig, GRPOTrainer

    floor = peak_bytes(job.get("device", "cpu"))
    tokenizer = AutoTokenizer.from_pretrained(job["model"], padding_side="left")
    if tokenizer.pad_token is None:
        tokenizer.pad_token = tokenizer.eos_token
    texts = [tokenizer.decode(p) for p in job["prompts"]]
    marks, generate, written, trained = [], [0.0], [0], [0]

    def score(completions, completion_ids, prompts, **_):
        written[-1] += sum(map(len, completion_ids))
        trained[-1] += sum(map(len, completion_ids)) + sum(len(tokenizer(p)["input_ids"]) for p in prompts)
        return [reward(text) for text in completions]

    class Clock(TrainerCallback):
        def on_train_begin(self, args, state, control, **_):
            marks.append(time.perf_counter())

        def on_step_end(self, args, state, control, **_):
            marks.append(time.perf_counter())
            generate.append(0.0)
            written.append(0)
            trained.append(0)

    completions = GROUP * len(texts)
    arguments = GRPOConfig(
        output_dir=str(Path.cwd() / "out"), use_cpu=True, bf16=False, fp16=False, gradient_checkpointing=False,
        per_device_train_batch_size=completions, num_generations=GROUP, max_completion_length=job["tokens"],
        max_steps=job["steps"], learning_rate=LR, lr_scheduler_type="constant", warmup_steps=0, adam_beta2=0.95,
        max_grad_norm=1.0, optim="adamw_torch_fused", beta=0.0, loss_type="grpo", temperature=1.0, top_p=1.0, top_k=0,
        dataloader_pin_memory=False, logging_steps=1, report_to="none", save_strategy="no", disable_tqdm=True,
        seed=job["seed"],
    )  # fmt: skip
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16)
    own = model.generate

    def timed(*args, **kwargs):
        began = time.perf_counter()
        out = own(*args, **kwargs)
        generate[-1] += time.perf_counter() - began
        return out

    model.generate = timed
    trainer = GRPOTrainer(
        model=model, reward_funcs=score, args=arguments, train_dataset=Dataset.from_list([{"prompt": t} for t in texts]),
        processing_class=tokenizer, callbacks=[Clock()],
    )  # fmt: skip
    trainer.train()
    losses = [entry["loss"] for entry in trainer.state.log_history if "loss" in entry]
    seconds = list(np.diff(marks))
    n = len(seconds)
    return _answer(job, floor, completions, seconds[1:], written[1:n], generate[1:n], trained[1:n], losses)

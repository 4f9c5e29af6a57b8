"""The end-to-end part of `make bench-gpu`: SFT steps at 15,360 tokens on random weights of a 1.5B model's shape.

This trainer (fp32 masters), transformers' model with whole logits in a plain loop, and TRL where it is installed; layers
are recomputed in all of them. Each runs in a process of its own.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

import numpy as np

from . import BenchConfig, harness, sft_throughput
from .gpu import note

QWEN_1_5B = {  # DeepSeek-R1-Distill-Qwen-1.5B
    "vocab_size": 151936, "hidden_size": 1536, "intermediate_size": 8960, "num_hidden_layers": 28,
    "num_attention_heads": 12, "num_key_value_heads": 2, "max_position_embeddings": 131072, "rope_theta": 10000.0,
    "tie_word_embeddings": False,
}  # fmt: skip
TINY = QWEN_1_5B | {
    "vocab_size": 512, "hidden_size": 64, "intermediate_size": 128, "num_hidden_layers": 2, "num_attention_heads": 2,
    "num_key_value_heads": 1,
}  # fmt: skip

# impl → (its process, its name there, how it holds weights)
IMPLS = {
    "longtrace": ("longtrace.bench.sft_throughput:ours", "longtrace-checkpointing", "fp32 masters"),
    "transformers eager": ("longtrace.bench.gpu_sft:plain", "plain", "bf16 weights and AdamW, whole logits"),
    "TRL": ("longtrace.bench.sft_throughput:trl", "trl-checkpointing", "bf16 weights and AdamW"),
}


def sft(job: dict) -> dict[str, str]:
    """Notes milliseconds a step, tokens per second, peak memory and the last loss of each."""
    began, left = time.monotonic(), {}
    tokens, steps = (256, 3) if job["dry"] else (15_360, 5)
    with tempfile.TemporaryDirectory(prefix="longtrace-bench-") as name:
        folder = Path(name)
        size = sft_throughput.random_model(
            folder / "model", "Qwen2Config", TINY if job["dry"] else QWEN_1_5B, job["device"]
        )
        rows, _ = sft_throughput._rows(BenchConfig(name="gpu", tokens=tokens, steps=steps), folder / "model")
        np.savez(folder / "rows.npz", **rows)
        case = f"{size / 1e3:.2f}B parameters, {tokens:,} tokens"
        for impl, (target, inner, policy) in IMPLS.items():
            if impl == "TRL" and (job["dry"] or not harness.installed("trl")):
                left[impl] = "left out of a dry run" if job["dry"] else "trl is not installed"
                continue
            order = {"impl": inner, "model": str(folder / "model"), "rows": str(folder / "rows.npz"), "steps": steps,
                     "device": job["device"]}  # fmt: skip
            room = job["seconds"] - (time.monotonic() - began)
            try:
                found = harness.in_process(target, order, threads=harness.threads_here(), timeout_s=max(room, 1))
            except harness.MeasurementFailed as error:
                left[impl] = str(error)
                continue
            seconds, rates = found["seconds"], [n / s for n, s in zip(found["tokens"], found["seconds"])]
            note(
                job, impl, case, ms=1e3 * statistics.median(seconds), ms_min=1e3 * min(seconds),
                ms_max=1e3 * max(seconds), runs=len(seconds), tokens_per_s=statistics.median(rates),
                peak_mb=found["peak_mb"], final_loss=found["losses"][-1], losses=found["losses"],
                note=f"{statistics.median(rates):,.0f} tokens/s; {policy}",
            )  # fmt: skip
    return left


def plain(job: dict) -> dict:
    """transformers' model as it comes: SDPA, layers recomputed, logits whole, fused AdamW on bf16 weights."""
    import torch
    from transformers import AutoModelForCausalLM

    device = job["device"]
    floor = sft_throughput.peak_bytes(device)
    rows = np.load(job["rows"])
    model = AutoModelForCausalLM.from_pretrained(job["model"], dtype=torch.bfloat16, attn_implementation="sdpa")
    model.to(device).train()
    model.gradient_checkpointing_enable({"use_reentrant": False})
    optimizer = torch.optim.AdamW(model.parameters(), lr=sft_throughput.LR, betas=sft_throughput.BETAS,
                                  eps=sft_throughput.EPS, weight_decay=0.0, fused=True)  # fmt: skip
    marks, losses, tokens = [], [], []
    for step in range(job["steps"]):
        marks.append(sft_throughput.moment(device))
        ids, labels = (torch.from_numpy(rows[f"{name}{step}"]).long().to(device)[None] for name in ("ids", "labels"))
        logits = model(ids, use_cache=False).logits
        loss = torch.nn.functional.cross_entropy(logits[0].float(), labels[0])
        del logits
        loss.backward()
        torch.nn.utils.clip_grad_norm_(model.parameters(), sft_throughput.CLIP)
        optimizer.step()
        optimizer.zero_grad()
        losses.append(loss.item())
        tokens.append(ids.numel())
    marks.append(sft_throughput.moment(device))
    return sft_throughput.measured(marks, losses, tokens, floor, sft_throughput.peak_bytes(device))

"""The reinforcement-learning part of `make bench-gpu`: rollouts beside transformers' `generate`, and whole GRPO steps.

Random weights of SmolLM2-135M's shape, 4 prompts x 8 completions; each runs in a process of its own, the first turn
not timed.
"""

from __future__ import annotations

import statistics
import tempfile
import time
from pathlib import Path

from . import BenchConfig, grpo, harness
from .gpu import note

IMPLS = {  # (impl, what) → (its process, how)
    ("longtrace", "rollout"): ("generate_ours", "bf16; slots, a prompt's cache once a group"),
    ("transformers", "rollout"): ("generate_transformers", "bf16; one left-padded batch"),
    ("longtrace", "GRPO step"): ("train_ours", "rollout, rewards, update of fp32 masters"),
}


def reinforcement(job: dict) -> dict[str, str]:
    """Notes milliseconds, tokens written a second (of steps: trained on, beside generation) and peak memory of each."""
    began, left = time.monotonic(), {}
    tokens, steps = (8, 2) if job["dry"] else (64, 3)
    with tempfile.TemporaryDirectory(prefix="longtrace-bench-") as name:
        model, _ = grpo._model(BenchConfig(name="gpu", quick=job["dry"]), Path(name))
        prompts, _ = grpo._prompts(BenchConfig(name="gpu"), model)
        order = {"model": str(model), "prompts": prompts, "tokens": tokens, "steps": steps, "seed": 0,
                 "device": job["device"]}  # fmt: skip
        for (impl, what), (worker, how) in IMPLS.items():
            room = job["seconds"] - (time.monotonic() - began)
            try:
                found = harness.in_process(
                    f"longtrace.bench.grpo:{worker}", order, threads=harness.threads_here(1 if job["dry"] else 0),
                    timeout_s=max(room, 1),
                )  # fmt: skip
            except harness.MeasurementFailed as error:
                left[f"{impl}, {what}"] = str(error)
                continue
            seconds = found["seconds"]
            rate = statistics.median(n / s for n, s in zip(found["written"], seconds))
            text = f"{rate:,.0f} tokens/s written; {how}"
            if any(found["train_seconds"]):
                trained = statistics.median(n / s for n, s in zip(found["trained"], found["train_seconds"]))
                text = f"{trained:,.0f} tokens/s trained beside the rollout; {text}"
            note(
                job, impl, f"{what}, {found['completions']} x {tokens}", ms=1e3 * statistics.median(seconds),
                ms_min=1e3 * min(seconds), ms_max=1e3 * max(seconds), runs=len(seconds), tokens_per_s=rate,
                peak_mb=found["peak_mb"], losses=found["losses"], note=text,
            )  # fmt: skip
    return left

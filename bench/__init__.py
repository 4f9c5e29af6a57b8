"""Benchmarks: one file per question, run by `longtrace bench NAME`."""

from __future__ import annotations

import importlib
from dataclasses import dataclass
from pathlib import Path

from longtrace.trainer.config import Refusal

try:
    import tyro  # the annotations below are read by the command line alone
except ModuleNotFoundError:  # a GPU machine that has torch and little else: `make bench-gpu` does without
    tyro = None

BENCHES = {
    "sft_throughput": "tokens per second and peak memory of SFT on the CPU, this trainer and TRL side by side",
    "grpo": "rollouts beside transformers' generate, GRPO steps beside TRL's, tokens per second and memory",
    "prefer": "tokens per second and peak memory of a DPO step beside TRL's on the same pairs, and the blend of two gradients",
    "head": "time, memory and error of the vocabulary head, forward and backward, beside its peers and three bare GEMMs",
    "attention": "packed attention on the CPU, forward and backward, beside a loop of SDPA, a padded batch and a dense mask",
    "advantages": "group advantages on the CPU, equal and ragged groups, beside TRL's and verl's formulas, with errors",
    "blend": "two gradients blended on the CPU with norms and dot, beside torch's foreach ops and a copy's rate",
    "traffic": "bytes and FLOPs of the head and its peers, counted without a GPU, and the rooflines they predict",
    "compile_matrix": "registers, spills, shared memory and occupancy of every GPU kernel, compiled for parts that are not here",
    "gpu": "parity and times of everything on this GPU beside its peers (make bench-gpu)",
    "experiments/grpo_curve": "what GRPO teaches: three seeds beside permuted rewards and more fine-tuning",
    "experiments/degenerate_groups": "what leaving out groups with equal rewards saves of a GRPO step, and equal gradients",
    "experiments/grpo_chain_sum": "what GRPO teaches SmolLM2-135M about sums: paired differences of three seeds",
    "experiments/language_consistency": "GRPO with and without the language reward, working in two alphabets: consistency and accuracy",
    "experiments/length_bias": "filler of right and wrong answers under GRPO's 1/|o| and Dr. GRPO's constant, beside the push on paper",
    "experiments/bvpo_theorems": "BVPO's theorems on a transformer whose every trace is listed: bias, variance, the best alpha",
    "experiments/bvpo_training": "traces alone, empty path alone, BVPO's 0.5, alpha estimated, 4 traces: exact results at equal tokens",
    "experiments/compressed_sft": "what compressed head gradients change in fine-tuning: losses, rare tokens, updates",
}


@dataclass
class BenchConfig:
    """Time this trainer against its peers: a table, NAME.png and a JSON record."""

    name: tyro.conf.Positional[str]
    """Which one: sft_throughput, grpo, prefer, head, attention, advantages, blend, traffic, compile_matrix, gpu, experiments/grpo_curve, experiments/grpo_chain_sum, experiments/degenerate_groups, experiments/language_consistency, experiments/length_bias, experiments/bvpo_theorems, experiments/bvpo_training, experiments/compressed_sft."""
    quick: bool = False
    """Fixed tiny shapes; ends within a minute on two cores."""
    json: Path | None = None
    """Where the record goes (none = runs/bench/NAME.json); NAME.png lands beside it."""
    model: str = ""
    """Model folder (none = random weights of SmolLM2-135M's shape)."""
    data: list[str] | None = None
    """Traces, as `longtrace sft --data` takes them; of prefer pairs, as `longtrace prefer` does (none = generated tokens)."""
    tokens: int = 0
    """Tokens in a packed row (0 = 8,192; experiments 1,024). Of prefer: longest completion, the shortest a quarter of it."""
    document_tokens: int = 0
    """Length of a generated document; 0 = one document fills the row."""
    repeats: int = 3
    """Measurements per implementation, interleaved."""
    steps: int = 0
    """Optimizer steps per process (0 = 3; experiments 300); sft_throughput and prefer do not time the first."""
    threads: int = 0
    """Threads of every process (0 = the cores this one may use)."""
    seeds: list[int] | None = None
    """Of experiments/grpo_chain_sum: seeds to run (none = 0 1 2); the record keeps its other ones."""
    impls: list[str] | None = None
    """Implementations to time (none = all that are installed). Of gpu: parts."""
    dry_run: bool = False
    """Of gpu: all parts at tiny shapes on the CPU, to see that they run."""
    inputs: list[str] | None = None
    """Of head: real:T (takes --model, --data), generated:T,V,H, lengths (none = all that --model and --data allow).
    Of attention: one:T, mix:T (60 short documents and a long one), FILE.npz:T (real `lengths`).
    Of advantages: equal:GROUPSxSIZE, ragged:GROUPS. Of blend: smollm2-135m, tensors:COUNTxVALUES.
    Of compile_matrix: parts, sm_80 … gfx942."""
    baseline: bool = False
    """Of compile_matrix: keep this run's numbers as the committed baseline of its compilers."""


def bench(config: BenchConfig) -> None:
    """Runs one benchmark. Raises Refusal for an unknown name or unusable options."""
    if config.name not in BENCHES:
        raise Refusal(f"bench: found {config.name}; accepted: {', '.join(BENCHES)}")
    importlib.import_module(f"longtrace.bench.{config.name.replace('/', '.')}").bench(config)

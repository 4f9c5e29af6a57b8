"""The reference model's log-probs of every pair: computed once, before training, and kept on disk.

They are taken on the very rows the first epoch trains on, so that at step 0 the policy's are equal to them bit for bit, and the
loss is ln 2, in bf16 too (where a sum of log-probs moves by a nat with what shares its row).
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Sequence
from contextlib import nullcontext
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from longtrace import kernels as K

from .checkpoint import write_atomic
from .model import Model
from .preference import sequence_log_probs
from .source import PairBatch

console = Console()


def reference_log_probs(model: Model, rows: Sequence[PairBatch], *, budget_mb: int = 0) -> list[np.ndarray]:
    """For each row (2P,) float64: the summed log-probs of its completions under the model as it is now, adapters off.

    Read from the cache where this model has seen these rows before.
    """
    path = cache_folder() / f"{_key(model, rows)}.safetensors"
    sizes = [len(row.sizes) for row in rows]
    found = _read(path, sum(sizes))
    if found is None:
        found = _compute(model, rows, budget_mb)
        write_atomic(path, save({"log_probs": found}))
        console.print(f"reference log-probs of {sum(sizes):,} completions: {path}", markup=False, soft_wrap=True)
    else:
        console.print(
            f"reference log-probs of {sum(sizes):,} completions, computed before: {path}", markup=False, soft_wrap=True
        )
    return [part.numpy() for part in found.split(sizes)]


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/longtrace/reference, of ~/.cache where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longtrace" / "reference"


@torch.no_grad()
def _compute(model: Model, rows: Sequence[PairBatch], budget_mb: int) -> torch.Tensor:
    model.hf.eval()
    parts = []
    columns = (
        TextColumn("Reference log-probs"),
        BarColumn(),
        MofNCompleteColumn(),
        TextColumn("rows"),
        TimeRemainingColumn(),
    )
    with (
        model.hf.disable_adapter() if model.lora else nullcontext(),
        Progress(*columns, console=Console(stderr=True), transient=True) as bar,
    ):
        for row in bar.track(rows):
            row = row.to(model.device)
            parts.append(sequence_log_probs(model.hidden(row), model.head(), row, budget_mb=budget_mb).cpu())
    model.hf.train()
    return torch.cat(parts)


def _key(model: Model, rows: Sequence[PairBatch]) -> str:
    """SHA-256 (hex) of all that the values depend on: weights, configuration, rows as they are packed, and what computes them."""
    digest = hashlib.sha256()
    made_by = [K.__version__, torch.__version__, str(model.device.type), K.explain(), torch.get_num_threads()]
    digest.update(json.dumps([made_by, model.base.config.to_dict()], default=str, sort_keys=True).encode())
    for name, weight in model.base.named_parameters():
        if "lora_" not in name:
            weight = weight.detach().cpu().contiguous()
            digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
            digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)
    for row in rows:
        for values in (row.input_ids, row.cu_seqlens, row.labels):
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()


def _read(path: Path, completions: int) -> torch.Tensor | None:
    try:
        found = load_file(path)["log_probs"]
    except (OSError, SafetensorError, KeyError):  # none, or a file that is not what was written: computed anew
        return None
    return found if found.shape == (completions,) and bool(found.isfinite().all()) else None

"""The reference model's log-probs of every pair: computed once, before training, and kept on disk.

They are taken on the very rows the first epoch trains on, so that at step 0 the policy's are equal to them bit for bit, and the
loss is ln 2, in bf16 too (where a sum of log-probs moves by a nat with what shares its row).
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import tempfile
from collections.abc import Iterable, Iterator
from contextlib import nullcontext
from functools import cached_property
from itertools import islice
from pathlib import Path

import numpy as np
import torch
from rich.console import Console
from rich.progress import BarColumn, MofNCompleteColumn, Progress, TextColumn, TimeRemainingColumn
from safetensors import SafetensorError
from safetensors.torch import load_file, save

from longtrace import kernels as K

from .config import NonFinite
from .model import Model
from .preference import sequence_log_probs
from .source import PairBatch

console = Console()

ROWS = 32  # of a file: what a kill loses at most


class Reference:
    """The summed log-probs of completions under a model as it is now, adapters off, from the cache where they are in it."""

    def __init__(self, model: Model, budget_mb: int = 0):
        self.model, self.budget_mb = model, budget_mb

    def __call__(self, rows: Iterable[PairBatch], count: int, what: str) -> Iterator[tuple[PairBatch, np.ndarray]]:
        """Each row with (2P,) float64, the log-probs of its completions, `count` in all; holds ROWS rows at a time.

        Raises NonFinite where the model gives one that is not finite.
        """
        rows, found_before = iter(rows), 0
        columns = (
            TextColumn(f"Reference: {what}"),
            BarColumn(),
            MofNCompleteColumn(),
            TextColumn("completions"),
            TimeRemainingColumn(),
        )
        with Progress(*columns, console=Console(stderr=True), transient=True) as bar:
            task = bar.add_task("", total=count)
            while some := list(islice(rows, ROWS)):
                path, sizes = self.folder / f"{_digest(some)}.safetensors", [len(row.sizes) for row in some]
                values = _read(path, sum(sizes))
                if values is None:
                    values = self._compute(some, lambda n: bar.advance(task, n))
                    _write(path, values)
                else:
                    found_before += sum(sizes)
                    bar.advance(task, sum(sizes))
                yield from zip(some, (part.numpy() for part in values.split(sizes)))
        known = f", {found_before:,} of them computed before" if found_before else ""
        console.print(f"reference log-probs of {count:,} completions{known} ({what})", markup=False, soft_wrap=True)

    @cached_property
    def folder(self) -> Path:
        """Named by all that the values depend on besides the rows: weights, configuration, and what computes them."""
        model, digest = self.model, hashlib.sha256()
        device = torch.cuda.get_device_name(model.device) if model.device.type == "cuda" else "cpu"
        made_by = [
            K.__version__,
            torch.__version__,
            device,
            re.sub(r"\(?\S*/\S*", "", K.explain()),
            torch.get_num_threads(),
        ]
        config = {name: value for name, value in model.base.config.to_dict().items() if name != "_name_or_path"}
        digest.update(json.dumps([made_by, config], default=str, sort_keys=True).encode())
        for name, weight in model.base.named_parameters():
            if "lora_" not in name:
                weight = weight.detach().cpu().contiguous()
                digest.update(f"{name} {weight.dtype} {tuple(weight.shape)}".encode())
                digest.update(weight.reshape(-1).view(torch.uint8).numpy().data)
        return cache_folder() / digest.hexdigest()[:32]

    @torch.no_grad()
    def _compute(self, rows: list[PairBatch], advance) -> torch.Tensor:
        model, parts = self.model, []
        training = model.hf.training
        model.hf.eval()
        with model.hf.disable_adapter() if model.lora else nullcontext():
            for row in rows:
                moved = row.to(model.device)
                parts.append(
                    sequence_log_probs(model.hidden(moved), model.head(), moved, budget_mb=self.budget_mb).cpu()
                )
                if not bool(parts[-1].isfinite().all()):
                    raise NonFinite(
                        "the reference model's log-probs are not finite; nothing was trained. Rows of the data, counted from 0: "
                        f"{sorted(set(row.documents))[:20]}"
                    )
                advance(len(row.sizes))
        model.hf.train(training)
        return torch.cat(parts)


def cache_folder() -> Path:
    """$XDG_CACHE_HOME/longtrace/reference, of ~/.cache where that is not set."""
    return Path(os.environ.get("XDG_CACHE_HOME") or Path.home() / ".cache") / "longtrace" / "reference"


def _digest(rows: list[PairBatch]) -> str:
    digest = hashlib.sha256()
    for row in rows:
        for values in (row.input_ids, row.cu_seqlens, row.labels):
            digest.update(values.numpy().tobytes())
    return digest.hexdigest()[:32]


def _read(path: Path, completions: int) -> torch.Tensor | None:
    try:
        found = load_file(path)["log_probs"]
    except (OSError, SafetensorError, KeyError):  # none, or a file that is not what was written: computed anew
        return None
    return found if found.shape == (completions,) and bool(found.isfinite().all()) else None


def _write(path: Path, values: torch.Tensor) -> None:
    """Whole or not at all, whoever else writes it; a disk that takes nothing costs the next run a forward, not this one."""
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        handle, beside = tempfile.mkstemp(dir=path.parent, prefix=".")
        try:
            with open(handle, "wb") as file:
                file.write(save({"log_probs": values}))
            os.chmod(beside, 0o644)  # others may share the cache
            os.replace(beside, path)
        except BaseException:
            Path(beside).unlink(missing_ok=True)
            raise
    except OSError as error:
        console.print(f"reference log-probs are not kept: {path}: {error.strerror}", style="yellow", markup=False)

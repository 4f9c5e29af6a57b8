"""Where metrics go besides metrics.jsonl: TensorBoard, Weights & Biases or trackio, behind two methods."""

from __future__ import annotations

import math
import os
from pathlib import Path
from typing import Protocol

from .config import Refusal


class Tracker(Protocol):
    """What the loop needs of a tracker."""

    def log(self, metrics: dict, step: int) -> None:
        """Hands on the finite numbers among `metrics` for this step."""

    def finish(self) -> None:
        """Flushes and closes; no further `log`."""


def tracker(kind: str, run_name: str, out: Path, config: dict) -> Tracker:
    """The tracker called `kind` ("none", "tensorboard", "wandb" or "trackio"), opened for the run folder `out`.

    None of them needs a network: TensorBoard writes event files to OUT/tensorboard; wandb writes to OUT/wandb and obeys
    WANDB_MODE (offline, disabled); trackio keeps a local database. Raises Refusal when the package is not installed or
    the kind is unknown.
    """
    kinds = {"none": Nothing, "tensorboard": TensorBoard, "wandb": WeightsAndBiases, "trackio": Trackio}
    if kind not in kinds:
        raise Refusal(f"--tracker: found {kind}; accepted: {', '.join(kinds)}")
    try:
        return kinds[kind](run_name, Path(out), config)
    except ImportError as error:
        raise Refusal(
            f"--tracker {kind}: {error.name or kind} is not installed; pip install 'longtrace[trackers]', or --tracker none"
        ) from error


class Nothing:
    """No tracker: the loop asks nothing."""

    def __init__(self, run_name: str, out: Path, config: dict):
        pass

    def log(self, metrics: dict, step: int) -> None:
        pass

    def finish(self) -> None:
        pass


class TensorBoard:
    """Event files in OUT/tensorboard: `tensorboard --logdir OUT`."""

    def __init__(self, run_name: str, out: Path, config: dict):
        from torch.utils.tensorboard import SummaryWriter

        self.writer = SummaryWriter(str(out / "tensorboard"))
        self.writer.add_text("config", "\n".join(f"    {name}: {value}" for name, value in config.items()))

    def log(self, metrics: dict, step: int) -> None:
        for name, value in _numbers(metrics).items():
            self.writer.add_scalar(name, value, step)

    def finish(self) -> None:
        self.writer.close()


class WeightsAndBiases:
    """A wandb run in the project `longtrace`; WANDB_MODE, WANDB_PROJECT and WANDB_ENTITY work as usual."""

    def __init__(self, run_name: str, out: Path, config: dict):
        import wandb

        out.mkdir(parents=True, exist_ok=True)
        project = os.environ.get("WANDB_PROJECT", "longtrace")
        self.run = wandb.init(project=project, name=run_name, dir=str(out), config=_plain(config))

    def log(self, metrics: dict, step: int) -> None:
        self.run.log(_numbers(metrics), step=step)

    def finish(self) -> None:
        self.run.finish()


class Trackio:
    """A trackio run, kept on this machine: `trackio show`."""

    def __init__(self, run_name: str, out: Path, config: dict):
        import trackio

        self.run = trackio.init(project="longtrace", name=run_name, config=_plain(config))

    def log(self, metrics: dict, step: int) -> None:
        self.run.log(_numbers(metrics), step=step)

    def finish(self) -> None:
        self.run.finish()


def _numbers(metrics: dict) -> dict[str, float]:
    """The finite numbers; a tracker draws nothing else."""
    kept = {k: v for k, v in metrics.items() if isinstance(v, (int, float)) and not isinstance(v, bool)}
    return {k: v for k, v in kept.items() if math.isfinite(v)}


def _plain(config: dict) -> dict:
    """Paths and tuples as text and lists, so that any tracker can store them."""
    return {k: v if isinstance(v, (int, float, str, bool, type(None))) else str(v) for k, v in config.items()}

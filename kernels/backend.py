"""Which backend serves an op: chosen once per op, device, dtype and capability, its reason kept; LONGTRACE_BACKEND forces it.

An op lists its candidates, best first, each with why it serves or why it cannot. Plain PyTorch always serves; what comes after
it in the list has to be asked for.
"""

from __future__ import annotations

import importlib.util
import inspect
import os
from collections.abc import Callable, Hashable, Iterable, Iterator
from typing import NamedTuple

import torch

BACKENDS = {
    "reference": "plain PyTorch on any device",
    "cpu": "C++ on the CPU",
    "triton": "Triton kernels, ours or a library's, on CUDA (on the CPU in Triton's interpreter)",
    "cuda": "CUDA C++, ours or a library's",
}
FORCED = os.environ.get("LONGTRACE_BACKEND") or None


class BackendRefused(ValueError):
    """LONGTRACE_BACKEND names no backend, or one that cannot serve an op on its input."""


class Choice(NamedTuple):
    backend: str  # of BACKENDS
    name: str  # what serves: "C++ tiles", "flash_attn_3"
    why: str


class Candidate(NamedTuple):
    backend: str
    name: str
    why: str  # what to know of it, or why it cannot serve
    serves: bool = True


def forced() -> str | None:
    """What LONGTRACE_BACKEND names, None if it is not set. Raises BackendRefused for a word it does not know."""
    if FORCED not in (None, *BACKENDS):
        raise BackendRefused(f"LONGTRACE_BACKEND: found {FORCED!r}; accepted: {', '.join(BACKENDS)}")
    return FORCED


Candidates = Callable[..., Iterable[Candidate]]
_choices: dict[tuple[Hashable, ...], tuple[str, Choice]] = {}  # what for, in words, and the choice


def choose(op: str, candidates: Candidates, device: str, *what: Hashable) -> Choice:
    """The first of `candidates(device, *what)` that serves, of LONGTRACE_BACKEND's where that is set.

    `what`: all that the choice depends on besides the device's type and capability. Raises BackendRefused, in one line.
    """
    capability = torch.cuda.get_device_capability() if device == "cuda" and torch.cuda.is_initialized() else None
    key = (op, FORCED, device, capability, what)
    found = _choices.get(key)
    if found is None:
        case = _case(candidates, device, what)
        found = _choices[key] = (case, _decide(f"{op} ({case})", candidates(device, *what), device))
    return found[1]


def _decide(what: str, candidates: Iterable[Candidate], device: str) -> Choice:
    wanted = forced() if device != "meta" else None  # shapes alone: nothing is computed
    reasons = []  # of better ones, why they do not serve
    for candidate in candidates:
        if wanted not in (None, candidate.backend):
            continue
        if candidate.serves:
            told = ["forced by LONGTRACE_BACKEND"] if wanted else []
            why = "; ".join(filter(None, (*told, candidate.why, *reasons)))
            return Choice(candidate.backend, candidate.name, why or f"no kernel for {device}")
        reasons.append(candidate.why)
    why = "; ".join(reasons) or f"it has no such kernel for {device}"
    raise BackendRefused(f"LONGTRACE_BACKEND={wanted} cannot serve {what}: {why}")


def _case(candidates: Candidates, device: str, what: tuple[Hashable, ...]) -> str:
    """What a choice is made for, in words: "float32, softcap, widths (64, 64), on cuda"."""
    words = []
    for name, value in zip(list(inspect.signature(candidates).parameters)[1:], what):
        if isinstance(value, (torch.dtype, frozenset)):
            kinds = value if isinstance(value, frozenset) else {value}
            words.append(" and ".join(sorted(str(kind).removeprefix("torch.") for kind in kinds)))
        elif value is not False:
            words.append(name if value is True else f"{name} {value}")
    return ", ".join((*words, f"on {device}"))


def made() -> Iterator[tuple[str, str, Choice]]:
    """(op, what for, choice) of every choice made in this process under the LONGTRACE_BACKEND of now."""
    for (op, wanted, *_), (case, choice) in list(_choices.items()):
        if wanted == FORCED:
            yield op, case, choice


def triton_lacks(device: str) -> str:
    """Why Triton kernels cannot run on `device`; "" where they can."""
    if importlib.util.find_spec("triton") is None:
        return "triton is not installed: pip install 'longtrace[gpu]'"
    if device == "cpu":
        import triton

        return "" if triton.knobs.runtime.interpret else "Triton needs CUDA, or on the CPU TRITON_INTERPRET=1"
    return "" if device == "cuda" else f"Triton needs CUDA, this is {device}"

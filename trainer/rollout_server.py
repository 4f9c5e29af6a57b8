"""Completions from a vLLM or SGLang server: weights reach it over the disk, token ids and log-probs come back over HTTP.

Before anything is sampled the server loads the weights as they are, under a new version, and a probe compares its
log-probs with the trainer's. No completion counts unless that version wrote it.
"""

from __future__ import annotations

import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from . import checkpoint
from .model import Model
from .rollout import Completion, Engine, Sampling
from .served import ServedEngine, together
from .servers import Server

PROBES, PROBE_TOKENS = 8, 64  # sampled completions of the probe, and the longest of them
APART = 0.3  # mean |log-prob of the server - of the trainer| of the probe's tokens that cannot be rounding any more
MOVED = 0.01  # a log-prob that moved by this here moved there too

LogProbs = Callable[[list[int], list[Completion]], list[np.ndarray]]
"""Log-probs of completions' tokens after a prompt, by the trainer at the sampling temperature."""


class ServerEngine(ServedEngine):
    """`Engine` over a server that is sent the weights before every rollout. Its log-probs are those of softmax(logits /
    temperature), whatever top_k and top_p: SGLang's as they come, vLLM's (those before the temperature) at temperature 1.

    folder: where weights wait for the server, which must find it under the same path. log_probs: the trainer's, for the
    probe. The rest as of `ServedEngine`.
    """

    goes_on = "--resume auto goes on from the last whole step"

    def __init__(
        self,
        kind: Literal["vllm", "sglang"],
        url: str,
        model: Model,
        folder: Path,
        *,
        dtype: torch.dtype,
        chat_template: str,
        log_probs: LogProbs,
        slots: int = 64,
        timeout: float = 1800.0,
    ):
        rows = model.base.get_input_embeddings().weight.shape[0]
        super().__init__(
            kind, url, model.tokenizer, ends=Engine.of(model).ends, rows=rows, slots=slots, timeout=timeout
        )
        self.model = model.base
        self.folder, self.dtype, self.chat_template = Path(folder).absolute(), dtype, chat_template
        self.log_probs = log_probs
        self.run, self.loads = uuid.uuid4().hex[:8], 0  # of which a version is made, unlike any other trainer's
        self.asked: tuple[list[int], Sampling] | None = None  # the probe's prompt, and the sampling of this rollout
        self.greedy: Completion | None = None  # its greedy answer, and the trainer's log-probs of that then
        self.expected = np.zeros(0)

    def close(self) -> None:
        """Removes the weights that wait for the server."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def generate(self, prompts: Sequence[Sequence[int]], sampling: Sampling, **options) -> list[list[Completion]]:
        """As `ServedEngine.generate`, by the model's weights as they are now."""
        if prompts:
            self.asked = self.asked[0] if self.asked else list(prompts[0]), sampling
        return super().generate(prompts, sampling, **options)

    async def greet(self, server: Server) -> None:
        await server.version()  # a server of the other kind, or that cannot load weights, has none
        await super().greet(server)

    async def begin(self, server: Server) -> str:
        """The server loads the weights, and shows in the probe that it did."""
        prompt, sampling = self.asked
        version = await self._refresh(server)
        short = replace(sampling, max_new_tokens=min(PROBE_TOKENS, sampling.max_new_tokens))
        probes = [short] * PROBES + [replace(short, top_k=1)]
        done = await together(self.one(server, prompt, p, [n], version) for n, p in enumerate(probes))
        self._verify(server, prompt, done)
        return version

    async def end(self, server: Server, version: str) -> None:
        await server.confirm(version)

    async def _refresh(self, server: Server) -> str:
        """Puts the weights on the disk, whole, and has the server load them; returns their version."""
        self.loads += 1
        version = f"{self.run}-{self.loads}"
        folder = self.folder / version
        checkpoint.export_model(self.model, self.tokenizer, folder, chat_template=self.chat_template, dtype=self.dtype)
        await server.load(folder, version)
        for old in self.folder.iterdir():
            if old != folder:
                shutil.rmtree(old, ignore_errors=True)
        return version

    def _verify(self, server: Server, prompt: list[int], done: list[Completion]) -> None:
        """Whether the trainer's weights answered the probe: with its log-probs but for rounding, and the greedy answer, the
        last, not to the last bit as before the weights moved."""
        expected = self.log_probs(prompt, done)
        apart = float(np.abs(np.concatenate([c.log_probs - e for c, e in zip(done[:-1], expected)])).mean())
        if not apart <= APART:
            raise server.refusal(
                f": its log-probs are {apart:.2f} a token from the trainer's; accepted: up to {APART}. It serves another "
                "model, did not load the weights, or means other log-probs (vLLM: --logprobs-mode raw_logprobs; SGLang: "
                "no SGLANG_RETURN_ORIGINAL_LOGPROB)"
            )
        if done[-1] != self.greedy:
            self.greedy, self.expected = done[-1], expected[-1]
        elif np.abs(expected[-1] - self.expected).max() > MOVED:
            raise server.refusal(
                ": stale weights: it answers the probe as it did before the weights moved, to the last bit; it said that it "
                "had loaded them"
            )

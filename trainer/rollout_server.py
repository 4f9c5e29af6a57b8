"""Completions from a vLLM or SGLang server: weights reach it over the disk, token ids and log-probs come back over HTTP.

Before anything is sampled the server loads the weights as they are, under a new version, and a probe compares its
log-probs with the trainer's. No completion counts unless that version wrote it.
"""

from __future__ import annotations

import asyncio
import shutil
import uuid
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Literal

import numpy as np
import torch

from . import checkpoint
from .config import Refusal
from .model import Model
from .rollout import Completion, Engine, Sampling
from .servers import VLLM, Server, SGLang

TICK = 0.5  # seconds between looks at progress, and so at signals
PROBES, PROBE_TOKENS = 8, 64  # sampled completions of the probe, and the longest of them
APART = 0.3  # mean |log-prob of the server - of the trainer| of the probe's tokens that cannot be rounding any more
MOVED = 0.01  # a log-prob that moved by this here moved there too

LogProbs = Callable[[list[int], list[Completion]], list[np.ndarray]]
"""Log-probs of completions' tokens after a prompt, by the trainer at the sampling temperature."""


class ServerEngine(Engine):
    """`Engine` over a server. Its log-probs are those of softmax(logits / temperature), whatever top_k and top_p: SGLang's
    as they come, vLLM's (those before the temperature) at temperature 1.

    folder: where weights wait for the server, which must find it under the same path. slots: requests in flight.
    timeout: seconds that one request may take. log_probs: the trainer's, for the probe.
    """

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
        super().__init__(model.base, model.tokenizer, slots)
        self.kind, self.url, self.timeout = {"vllm": VLLM, "sglang": SGLang}[kind], url.rstrip("/"), timeout
        self.folder, self.dtype, self.chat_template = Path(folder).absolute(), dtype, chat_template
        self.log_probs = log_probs
        self.run, self.loads = uuid.uuid4().hex[:8], 0  # of which a version is made, unlike any other trainer's
        self.name, self.context = "", 0  # of the served model
        self.probe: list[int] = []  # the prompt that is asked after every load
        self.greedy: Completion | None = None  # its greedy answer, and the trainer's log-probs of that then
        self.expected = np.zeros(0)

    def connect(self) -> None:
        """Asks for the served model, so that a server that is not there, or is another, is told before anything else."""

        async def look() -> None:
            async with self.kind(self.url, self.timeout, 1) as server:
                await server.version()  # a server of the other kind, or that cannot load weights, has none
                self.name, self.context = await server.model()

        asyncio.run(look())

    def close(self) -> None:
        """Removes the weights that wait for the server."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        samples: int = 1,
        seed: Sequence[int] = (0,),
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """`samples` completions of each prompt (token ids), in order, by the model's weights as they are now.

        seed: integers; completion n of prompt g is asked for with a seed of its own made from (seed, g, n). progress is
        called about twice a second, and may raise. Raises Refusal in one line for whatever the server does wrong.
        """
        if not prompts:
            return []
        if not self.name:
            self.connect()
        if min(map(len, prompts)) == 0:
            raise Refusal("a prompt without tokens; accepted: at least one")
        longest = max(map(len, prompts))
        if self.context and longest + sampling.max_new_tokens > self.context:
            raise Refusal(
                f"--max-new-tokens {sampling.max_new_tokens:,}: with a prompt of {longest:,} tokens more than the server's "
                f"context; accepted: up to {self.context - longest:,} (vLLM: --max-model-len, SGLang: --context-length)"
            )
        self.probe = self.probe or list(prompts[0])
        try:
            return asyncio.run(
                self._generate(prompts, sampling, samples, seed, progress or (lambda ended, written: None))
            )
        except Refusal as refusal:
            raise Refusal(f"{refusal} (--resume auto goes on from the last whole step)") from None

    async def _generate(self, prompts, sampling, samples, seed, progress) -> list[list[Completion]]:
        ended, written = 0, 0

        async def one(server: Server, prompt, sampling, drawn_by, version) -> Completion:
            nonlocal ended, written
            number = int(np.random.SeedSequence(drawn_by).generate_state(1)[0]) >> 1
            request = server.request(self.name, prompt, sampling, number, sorted(self.ends), version)
            rows = self.model.get_input_embeddings().weight.shape[0]
            found = await server.complete(request, prompt, sampling.max_new_tokens, rows, version)
            ended, written = ended + 1, written + len(found.tokens)
            return found

        async def rollout() -> list[list[Completion]]:
            nonlocal ended, written
            async with self.kind(self.url, self.timeout, self.slots) as server:
                version = await self._refresh(server)
                short = replace(sampling, max_new_tokens=min(PROBE_TOKENS, sampling.max_new_tokens))
                probes = [short] * PROBES + [replace(short, top_k=1)]
                self._verify(server, await _all(one(server, self.probe, p, [n], version) for n, p in enumerate(probes)))
                ended = written = 0
                numbers = [(g, n) for g in range(len(prompts)) for n in range(samples)]
                done = await _all(one(server, prompts[g], sampling, [*seed, g, n], version) for g, n in numbers)
                await server.confirm(version)
                return [done[i : i + samples] for i in range(0, len(done), samples)]

        task = asyncio.ensure_future(rollout())
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=TICK)
                progress(ended, written)
        finally:
            task.cancel()
        return task.result()

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

    def _verify(self, server: Server, done: list[Completion]) -> None:
        """Whether the trainer's weights answered the probe: with its log-probs but for rounding, and the greedy answer, the
        last, not to the last bit as before the weights moved."""
        expected = self.log_probs(self.probe, done)
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


async def _all(coroutines) -> list:
    """Their results; the first to fail stops the others."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()

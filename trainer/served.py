"""Completions from a vLLM or SGLang server over HTTP: one request a completion, token ids both ways.

Here the server's own model writes; `rollout_server` sends it the training weights first.
"""

from __future__ import annotations

import asyncio
from collections.abc import Callable, Sequence
from typing import Literal

import numpy as np

from .config import Refusal
from .model import _refusing, load_tokenizer
from .rollout import Completion, Engine, Sampling
from .servers import VLLM, Server, SGLang

TICK = 0.5  # seconds between looks at progress, and so at signals


class ServedEngine(Engine):
    """`Engine` over the model that a server serves.

    tokenizer: that model's; ends: tokens that end a completion; rows: token ids it knows. slots: requests in flight.
    timeout: seconds that one request may take.
    """

    ends: set[int] = frozenset()  # of our own engine the model says them
    goes_on = "the same command goes on from the last whole batch"

    def __init__(
        self,
        kind: Literal["vllm", "sglang"],
        url: str,
        tokenizer,
        *,
        ends: set[int],
        rows: int,
        slots: int = 64,
        timeout: float = 1800.0,
    ):
        super().__init__(None, tokenizer, slots)
        self.kind, self.url, self.timeout = {"vllm": VLLM, "sglang": SGLang}[kind], url.rstrip("/"), timeout
        self.ends, self.rows = set(ends), rows
        self.name, self.context = "", 0  # of the served model; 0 = it does not say

    @classmethod
    def of_folder(cls, kind: Literal["vllm", "sglang"], url: str, source: str, *, slots: int, timeout: float):
        """With the tokenizer, end tokens and vocabulary of a model folder or hub name; its weights are not loaded."""
        from transformers import AutoConfig, GenerationConfig

        tokenizer = load_tokenizer(source)
        with _refusing(source, "model's configuration"):
            config = AutoConfig.from_pretrained(source, trust_remote_code=False)
        try:
            ends = GenerationConfig.from_pretrained(source).eos_token_id
        except OSError:  # a folder without generation_config.json
            ends = config.get_text_config().eos_token_id
        ends = set(ends if isinstance(ends, (list, tuple)) else [ends]) | {tokenizer.eos_token_id}
        rows = max(config.get_text_config().vocab_size, len(tokenizer))
        return cls(kind, url, tokenizer, ends=ends - {None}, rows=rows, slots=slots, timeout=timeout)

    def connect(self) -> None:
        """Asks for the served model, so that a server that is not there, or is another, is told before anything else."""

        async def look() -> None:
            async with self.kind(self.url, self.timeout, 1) as server:
                await self.greet(server)

        asyncio.run(look())

    async def greet(self, server: Server) -> None:
        self.name, self.context = await server.model()

    async def begin(self, server: Server) -> str | None:
        """Before the first request; returns the version of the weights that must write, None = whatever it has."""
        return None

    async def end(self, server: Server, version: str | None) -> None:
        """After the last reply."""

    def generate(
        self,
        prompts: Sequence[Sequence[int]],
        sampling: Sampling,
        *,
        samples: int = 1,
        seed: Sequence[int] = (0,),
        progress: Callable[[int, int], None] | None = None,
    ) -> list[list[Completion]]:
        """`samples` completions of each prompt (token ids), in order.

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
        try:
            return asyncio.run(
                self._generate(prompts, sampling, samples, seed, progress or (lambda ended, written: None))
            )
        except Refusal as refusal:
            raise Refusal(f"{refusal} ({self.goes_on})") from None

    async def one(self, server: Server, prompt, sampling: Sampling, seed: Sequence[int], version) -> Completion:
        """One completion, with a seed made from `seed`."""
        number = int(np.random.SeedSequence(seed).generate_state(1)[0]) >> 1
        request = server.request(self.name, prompt, sampling, number, sorted(self.ends), version)
        return await server.complete(request, prompt, sampling.max_new_tokens, self.rows, version)

    async def _generate(self, prompts, sampling, samples, seed, progress) -> list[list[Completion]]:
        ended, written = 0, 0

        async def counted(server: Server, g: int, n: int, version) -> Completion:
            nonlocal ended, written
            found = await self.one(server, prompts[g], sampling, [*seed, g, n], version)
            ended, written = ended + 1, written + len(found.tokens)
            return found

        async def rollout() -> list[list[Completion]]:
            async with self.kind(self.url, self.timeout, self.slots) as server:
                version = await self.begin(server)
                numbers = [(g, n) for g in range(len(prompts)) for n in range(samples)]
                done = await together(counted(server, g, n, version) for g, n in numbers)
                await self.end(server, version)
                return [done[i : i + samples] for i in range(0, len(done), samples)]

        task = asyncio.ensure_future(rollout())
        try:
            while not task.done():
                await asyncio.wait({task}, timeout=TICK)
                progress(ended, written)
        finally:
            task.cancel()
        return task.result()


async def together(coroutines) -> list:
    """Their results; the first to fail stops the others."""
    tasks = [asyncio.ensure_future(c) for c in coroutines]
    try:
        return await asyncio.gather(*tasks)
    finally:
        for task in tasks:
            task.cancel()

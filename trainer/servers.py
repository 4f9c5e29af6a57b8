"""What is said to a vLLM or an SGLang server, and what of its replies counts.

Token ids both ways, never text to be tokenised again. What may pass (a dead connection, 429, 5xx, an aborted completion)
is asked again, what is wrong (silence, another version of the weights, numbers that cannot be) is refused in one line.
"""

from __future__ import annotations

import asyncio
import json
import re
from collections.abc import Awaitable, Callable, Sequence
from pathlib import Path

from .config import Refusal
from .rollout import Completion, Sampling

ATTEMPTS = 5  # of a request that meets a dead connection, 408, 429 or 5xx, or whose completion is aborted
BACKOFF = 1.0  # seconds before the second attempt; twice as long before each further one
CONNECT = 10.0  # seconds to wait for a connection
UNREADABLE = (KeyError, IndexError, TypeError, ValueError, AttributeError)  # what a reply of another shape raises


class Passing(Exception):
    """What may be gone at the next attempt."""


class BadReply(Refusal):
    """The server is there and will not have this one request, or answers it with what is no JSON."""


class Silent(Refusal):
    """No answer in time."""


class Server:
    """A server spoken to over HTTP: VLLM and SGLang below know the words."""

    path: str  # that completes a prompt
    info: str  # path that tells the weights' version
    needs: str  # said when a path is not there
    patience = " (--server-timeout)"  # the option that sets the time-out

    def __init__(self, url: str, timeout: float, connections: int):
        try:
            import httpx2
        except ImportError as error:
            raise Refusal(f"{url}: needs httpx2: pip install 'longtrace[rl]' (Python 3.11 or newer)") from error
        self.url, self.timeout, self.broken = url, timeout, httpx2.RequestError
        self.turn = asyncio.Semaphore(connections)  # what waits for its turn is not timed
        self.client = httpx2.AsyncClient(
            base_url=url,
            timeout=httpx2.Timeout(None, connect=CONNECT),
            limits=httpx2.Limits(max_connections=connections),
            trust_env=False,  # a proxy of the environment is for elsewhere
        )

    async def __aenter__(self):
        return self

    async def __aexit__(self, *_) -> None:
        await self.client.aclose()

    def refusal(self, found: str, kind: type[Refusal] = Refusal) -> Refusal:
        return kind(f"{self.url}{found}")

    async def ask(self, path: str, body: dict | None = None, post: bool = True):
        """The JSON that a path answers. Raises Refusal for silence, refused requests, and what stays broken."""
        return await self._patiently(lambda: self._send(path, body, post))

    async def model(self) -> tuple[str, int]:
        """(name of the served model, longest prompt and completion together, 0 = it does not say)."""
        reply = await self.ask("/v1/models", post=False)
        try:
            card = reply["data"][0]
            return str(card["id"]), int(card.get("max_model_len") or 0)
        except UNREADABLE:
            raise self.refusal(f"/v1/models: found {one_line(json.dumps(reply))}; accepted: a list of models") from None

    async def version(self) -> str | None:
        """Of the weights it has now."""
        reply = await self.ask(self.info, post=False)
        try:
            return reply["weight_version"]
        except UNREADABLE:
            raise self.refusal(f"{self.info}: found {one_line(json.dumps(reply))}; accepted: {self.needs}") from None

    async def confirm(self, version: str) -> None:
        """Raises Refusal unless its weights are of this version."""
        if (held := await self.version()) != version:
            raise self.refusal(f"{self.info}: {_stale(held, version)}")

    async def complete(
        self, request: dict, prompt: Sequence[int], longest: int, rows: int, version: str | None
    ) -> Completion:
        """One completion, every part of the reply checked: the weights' version, ids, log-probs, how it ended.

        longest: tokens it may have; rows: ids the model knows. version: None = whatever weights it has.
        """

        async def once() -> Completion:
            reply = await self._send(self.path, request)
            try:
                tokens, log_probs, finish, wrote = self.read(reply, prompt)
            except UNREADABLE as error:
                found = f"{type(error).__name__}: {one_line(str(error))}"
                raise self.refusal(f"{self.path}: does not read ({found}): {one_line(json.dumps(reply))}") from None
            if version is not None and wrote not in (None, version):
                raise self.refusal(f"{self.path}: {_stale(wrote, version)}")
            if finish not in ("stop", "length"):
                raise Passing(f"{self.path}: a completion that ended by {finish!r}; accepted: stop, length")
            if wrong := _wrong(tokens, log_probs, longest, rows):
                raise self.refusal(f"{self.path}: {wrong}")
            return Completion(tokens, [float(x) for x in log_probs], finish == "stop")

        async with self.turn:
            return await self._patiently(once)

    async def _patiently(self, once: Callable[[], Awaitable]):
        """What `once` returns, tried again while it raises Passing."""
        found = None
        for attempt in range(ATTEMPTS):
            await asyncio.sleep(BACKOFF * 2 ** (attempt - 1) if attempt else 0)
            try:
                return await once()
            except Passing as error:
                found = error
        raise self.refusal(f"{found} ({ATTEMPTS} attempts)")

    async def _send(self, path: str, body: dict | None = None, post: bool = True):
        try:
            request = self.client.request("POST" if post else "GET", path, json=body)
            reply = await asyncio.wait_for(request, self.timeout)
        except (asyncio.TimeoutError, TimeoutError):
            raise self.refusal(f"{path}: no answer in {self.timeout:g} s{self.patience}", Silent) from None
        except self.broken as error:
            raise Passing(f"{path}: {type(error).__name__}: {one_line(str(error))}") from None
        found = f"{path}: HTTP {reply.status_code}: {one_line(reply.text)}"
        if reply.status_code in (408, 429) or reply.status_code >= 500:
            raise Passing(found)
        if reply.status_code in (400, 413, 422):
            raise self.refusal(found, BadReply)
        if reply.status_code != 200:
            raise self.refusal(found + (f"; accepted: {self.needs}" if reply.status_code in (404, 405) else ""))
        try:
            return json.loads(reply.text or "{}")
        except (ValueError, RecursionError):
            raise self.refusal(f"{path}: found {one_line(reply.text)!r}; accepted: JSON", BadReply) from None

    # ---- what each server has words of its own for ------------------------------------------------------------------

    async def load(self, folder: Path, version: str) -> None:
        """Loads the weights of a Hugging Face folder under a version, and forgets what it cached of older ones."""
        raise NotImplementedError

    def request(
        self, model: str, prompt: Sequence[int], sampling: Sampling, seed: int, ends: list[int], version: str | None
    ):
        """The body that asks for one completion."""
        raise NotImplementedError

    def read(self, reply: dict, prompt: Sequence[int]) -> tuple[list, list, str | None, str | None]:
        """(token ids, log-probs, why it ended, the weights' version or None if the reply carries none)."""
        raise NotImplementedError


class VLLM(Server):
    """vLLM in development mode. Its replies carry no version: the one asked for after the last of them stands for all,
    since a server that restarted or loaded other weights in between has lost it."""

    path, info = "/v1/completions", "/weight_info"
    needs = "vLLM 0.30 or newer (to load weights: started with VLLM_SERVER_DEV_MODE=1)"

    async def load(self, folder: Path, version: str) -> None:
        await self.ask("/pause?mode=abort")  # what a dead trainer left; if the load fails it stays paused
        await self.ask("/collective_rpc", {"method": "reload_weights", "kwargs": {"weights_path": str(folder)}})
        reset = await self.ask("/reset_prefix_cache")
        if isinstance(reset, dict) and reset.get("success") is False:
            raise self.refusal("/reset_prefix_cache: the server kept its cache, which older weights wrote")
        await self.ask("/update_weight_version", {"new_version": version})
        await self.ask("/resume")

    def request(self, model, prompt, sampling, seed, ends, version) -> dict:
        return {
            "model": model,
            "prompt": list(prompt),
            "max_tokens": sampling.max_new_tokens,
            "temperature": sampling.temperature,
            "top_p": sampling.top_p,
            "top_k": sampling.top_k,
            # left out, these would be the model folder's own
            "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
            "seed": seed,
            "stop": list(sampling.stop),
            "stop_token_ids": ends,
            "logprobs": 0,
            "return_token_ids": True,
            "skip_special_tokens": False,  # a stop string may hold one
            **({"cache_salt": version} if version else {}),  # no cached prompt of other weights
        }  # fmt: skip

    def read(self, reply, prompt) -> tuple:
        if len(reply["choices"]) != 1:
            raise ValueError(f"{len(reply['choices'])} choices where one was asked for")
        choice = reply["choices"][0]
        if (choice.get("prompt_token_ids") or list(prompt)) != list(prompt):
            raise ValueError("the prompt's token ids came back changed")
        finish = choice["finish_reason"]
        if finish not in ("stop", "length"):
            return [], [], finish, None
        return choice["token_ids"], choice["logprobs"]["token_logprobs"], finish, None


class SGLang(Server):
    """SGLang's native endpoint: its replies carry token ids beside log-probs, and the weights' version."""

    path, info = "/generate", "/model_info"
    needs = "SGLang 0.5.16 or newer"

    async def load(self, folder: Path, version: str) -> None:
        body = {"model_path": str(folder), "weight_version": version, "flush_cache": True}
        reply = await self.ask("/update_weights_from_disk", body)
        if not (isinstance(reply, dict) and reply.get("success") is True):
            raise self.refusal(f"/update_weights_from_disk: {one_line(json.dumps(reply))}")

    def request(self, model, prompt, sampling, seed, ends, version) -> dict:
        return {
            "input_ids": list(prompt),
            "return_logprob": True,
            **({"extra_key": version} if version else {}),  # no cached prompt of other weights
            "sampling_params": {
                "max_new_tokens": sampling.max_new_tokens,
                "temperature": sampling.temperature,
                "top_p": sampling.top_p,
                "top_k": sampling.top_k or -1,
                "min_p": 0.0, "repetition_penalty": 1.0, "presence_penalty": 0.0, "frequency_penalty": 0.0,
                "sampling_seed": seed,
                "stop": list(sampling.stop),
                "stop_token_ids": ends,
                "skip_special_tokens": False,
                "no_stop_trim": True,
            },
        }  # fmt: skip

    def read(self, reply, prompt) -> tuple:
        if not isinstance(reply, dict):
            raise ValueError(f"{len(reply)} completions where one was asked for")
        about = reply["meta_info"]
        version = str(about["weight_version"])
        if about["prompt_tokens"] != len(prompt):
            raise ValueError(f"a prompt of {about['prompt_tokens']} tokens where {len(prompt)} were sent")
        finish = about["finish_reason"]["type"]
        if finish not in ("stop", "length"):
            return [], [], finish, version
        drawn = about["output_token_logprobs"]  # (log-prob, token id, text) of every token, the end token included
        return [entry[1] for entry in drawn], [entry[0] for entry in drawn], finish, version


def is_address(url: str) -> bool:
    """Whether it is http(s)://HOST[:PORT] and nothing more."""
    found = re.fullmatch(r"https?://(?:[\w.-]+|\[[\da-fA-F:]+\])(?::(\d+))?/?", url)
    return bool(found) and int(found[1] or 0) <= 65535


def _wrong(tokens, log_probs, longest: int, rows: int) -> str:
    """What is wrong with a completion's numbers; empty if nothing is."""
    if not (isinstance(tokens, list) and isinstance(log_probs, list)):
        return "token ids or log-probs that are no list"
    if not 1 <= len(tokens) <= longest:
        return f"a completion of {len(tokens):,} tokens; accepted: 1 to {longest:,}"
    if len(tokens) != len(log_probs):
        return f"{len(tokens):,} token ids with {len(log_probs):,} log-probs"
    for token in tokens:
        if type(token) is not int or not 0 <= token < rows:
            return f"token id {token!r}; accepted: 0 to {rows - 1:,}"
    for value in log_probs:
        if type(value) not in (int, float) or not -1e3 < value < 0.1:  # NaN too; a rounded 0 may come out above
            return f"log-prob {value!r}; accepted: a number up to 0"
    return ""


def _stale(found, version: str) -> str:
    return f"stale weights: version {found!r} where {version!r} was loaded; the server restarted, or another trainer uses it"


def one_line(text: str, longest: int = 160) -> str:
    """A text on one line, cut."""
    text = " ".join(str(text).split())
    return text if len(text) <= longest else text[: longest - 1] + "…"

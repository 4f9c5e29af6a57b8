"""Rollouts over a real local HTTP server that speaks vLLM's and SGLang's endpoints and samples from what it loaded."""

import json
import re
import socket
import sys
import threading
import time
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from pathlib import Path
from types import SimpleNamespace

import numpy as np
import pytest
import torch

from longtrace.trainer import checkpoint, grpo, rollout_server, served, servers
from longtrace.trainer.config import Refusal, TrainConfig
from longtrace.trainer.experience import Experience, RolloutSource
from longtrace.trainer.grpo import GRPOConfig
from longtrace.trainer.model import Masters, load_model
from longtrace.trainer.rollout import Engine, Sampling
from longtrace.trainer.rollout_server import ServerEngine

CHAINS = "generated:chain,steps=2,modulus=10,rows=40"
pytest.importorskip("httpx2", reason="the server engine needs httpx2 (Python 3.11 or newer)")

KINDS = ("vllm", "sglang")
COMPLETES = {"vllm": "/v1/completions", "sglang": "/generate"}
LOADS = {"vllm": "/collective_rpc", "sglang": "/update_weights_from_disk"}


class Handler(BaseHTTPRequestHandler):
    protocol_version = "HTTP/1.1"

    def do_GET(self):
        self.answer_to(self.server, self.path, None)

    def do_POST(self):
        raw = self.rfile.read(int(self.headers.get("Content-Length") or 0))
        self.answer_to(self.server, self.path.split("?")[0], json.loads(raw) if raw else None)

    def answer_to(self, server, path, body):
        with server.guard:
            server.seen.append((path, body))
            fault = next((f for f in server.faults if f.path == path and f.skip + f.times > f.met), None)
            if fault:
                fault.met += 1
                fault = fault if fault.met > fault.skip else None
        if fault and isinstance(fault.what, str):  # no answer in HTTP
            return getattr(self, fault.what)()
        status, reply = server.model_of(path, body) if not (fault and isinstance(fault.what, tuple)) else fault.what
        if fault and callable(fault.what):
            reply = fault.what(reply)
        self.reply(status, reply if isinstance(reply, bytes) else json.dumps(reply).encode())

    def reply(self, status, data, length=None):
        self.send_response(status)
        self.send_header("Content-Type", "application/json")
        self.send_header("Content-Length", str(length or len(data)))
        self.end_headers()
        self.wfile.write(data)

    def hang(self):
        self.server.ended.wait(20)

    def half(self):
        """Half a JSON, and the connection is gone."""
        self.reply(200, b'{"choices": [{"token_ids": [5, 6', length=500)
        self.close_connection = True

    def die(self):
        self.connection.shutdown(socket.SHUT_RDWR)
        self.close_connection = True

    def log_message(self, *_):
        pass


class Served(ThreadingHTTPServer):
    """Speaks one kind's endpoints; `faults` are what it does instead."""

    daemon_threads = True
    request_queue_size = 64

    def __init__(self, kind, tmp_path):
        super().__init__(("127.0.0.1", 0), Handler)
        self.kind, self.tmp_path = kind, tmp_path
        self.guard, self.ended = threading.RLock(), threading.Event()
        self.seen, self.faults, self.loaded, self.errors = [], [], [], []
        self.version, self.paused, self.stubborn = "default", False, False

    @property
    def url(self):
        return f"http://127.0.0.1:{self.server_address[1]}"

    def fault(self, path, what, times=1, skip=0):
        """what: (status, reply) or "hang", "half", "die" instead of an answer, or a function of the reply."""
        self.faults.append(SimpleNamespace(path=path, what=what, times=times, skip=skip, met=0))

    def handle_error(self, request, client_address):
        error = sys.exc_info()[1]
        if not isinstance(error, ConnectionError):  # a client that left is no error of this server
            self.errors.append(repr(error))

    def count(self, path):
        return sum(p == path for p, _ in self.seen)

    def load(self, folder):
        if not (self.stubborn and self.loaded):
            model = load_model(TrainConfig(model=str(folder), out=self.tmp_path / "o", max_tokens=256, dtype="fp32"))
            self.engine = Engine.of(model, 1)
        self.loaded.append(str(folder))

    def model_of(self, path, body):
        """(status, reply) of a healthy server."""
        with self.guard:
            if path == "/v1/models":
                return 200, {"data": [{"id": "tiny", "max_model_len": 512}]}
            if self.kind == "vllm":
                return self.vllm(path, body)
            return self.sglang(path, body)

    def vllm(self, path, body):
        if path in ("/pause", "/resume"):
            self.paused = path == "/pause"
            return 200, {"status": path[1:]}
        if path == "/collective_rpc":
            assert self.paused and body["method"] == "reload_weights"
            self.load(body["kwargs"]["weights_path"])
            return 200, {"results": [None]}
        if path == "/reset_prefix_cache":
            return 200, {"success": True}
        if path == "/update_weight_version":
            self.version = body["new_version"]
            return 200, {"success": True, "new_version": self.version}
        if path == "/weight_info":
            return 200, {"weight_version": self.version}
        if path != "/v1/completions":
            return 404, {"detail": "Not Found"}
        assert not self.paused and body["model"] == "tiny" and body["return_token_ids"] and body["logprobs"] == 0
        done = self.sample(body["prompt"], body, body["max_tokens"], body["seed"], body["top_k"])
        finish = "stop" if done.finished else "length"
        choice = {"index": 0, "text": "", "token_ids": done.tokens, "prompt_token_ids": body["prompt"],
                  "logprobs": {"token_logprobs": done.log_probs}, "finish_reason": finish}  # fmt: skip
        return 200, {"id": "cmpl-1", "model": "tiny", "choices": [choice]}

    def sglang(self, path, body):
        if path == "/update_weights_from_disk":
            self.load(body["model_path"])
            self.version = body["weight_version"]
            return 200, {"success": True, "message": "Succeeded to update model weights."}
        if path == "/model_info":
            return 200, {"model_path": "tiny", "weight_version": self.version}
        if path != "/generate":
            return 404, {"detail": "Not Found"}
        asked = body["sampling_params"]
        assert body["return_logprob"] and asked["top_k"] != 0
        top_k = max(asked["top_k"], 0)
        done = self.sample(body["input_ids"], asked, asked["max_new_tokens"], asked["sampling_seed"], top_k)
        finish = {"type": "stop", "matched": 2} if done.finished else {"type": "length", "length": len(done.tokens)}
        about = {"id": "1", "prompt_tokens": len(body["input_ids"]), "weight_version": self.version,
                 "finish_reason": finish, "completion_tokens": len(done.tokens),
                 "output_token_logprobs": [[p, t, None] for p, t in zip(done.log_probs, done.tokens)]}  # fmt: skip
        return 200, {"text": "", "output_ids": done.tokens, "meta_info": about}

    def sample(self, prompt, asked, longest, seed, top_k):
        assert asked["stop_token_ids"] == sorted(self.engine.ends) and asked["repetition_penalty"] == 1
        sampling = Sampling(longest, asked["temperature"], asked["top_p"], top_k, tuple(asked["stop"]))
        return self.engine.generate([prompt], sampling, seed=(seed,))[0][0]


@pytest.fixture
def serve(tmp_path):
    running = []

    def start(kind):
        server = Served(kind, tmp_path)
        running.append(server)
        threading.Thread(target=server.serve_forever, kwargs={"poll_interval": 0.02}, daemon=True).start()
        return server

    yield start
    for server in running:
        server.ended.set()
        server.shutdown()
        server.server_close()
        assert server.errors == []


@pytest.fixture(autouse=True)
def quick(tmp_path, monkeypatch):
    """Short waits, and a user's reward that differs within most groups: the share of digits in what was written."""
    monkeypatch.setattr(servers, "BACKOFF", 0.01)
    monkeypatch.setattr(served, "TICK", 0.02)
    monkeypatch.setattr(rollout_server, "PROBES", 1)  # and the greedy one
    (tmp_path / "tests_server_rewards.py").write_text(
        "def digits(completions, rows):\n    return [sum(c.isdigit() for c in t) / max(len(t), 1) for t in completions]\n"
    )
    monkeypatch.chdir(tmp_path)


def config_of(served, folder, out, **changes):
    defaults = dict(
        model=str(folder), data=[CHAINS], out=out, max_tokens=160, tokens_per_row=480, max_new_tokens=6, steps=3,
        prompts_per_rollout=2, group_size=4, lr=1e-2, dtype="fp32", activation_checkpointing="off", slots=8, warmup=0,
        reward=["tests_server_rewards:digits"], engine=served.kind, server=served.url, server_timeout=10.0,
    )  # fmt: skip
    return GRPOConfig(**(defaults | changes))


def engine_of(server, folder, tmp_path, **changes):
    """(engine, its model, the trainer's log-probs of completions after a prompt)."""
    config = grpo.check(config_of(server, folder, tmp_path / "out", **changes))
    model = load_model(config)
    source = RolloutSource(config, model, None, grpo.read_prompts(config.data, model, config), None)

    def log_probs(prompt, done):
        return source.log_probs([Experience(prompt, c.tokens, 0.0, 0) for c in done])

    engine = ServerEngine(
        server.kind, server.url, model, tmp_path / "out" / "rollout-weights", dtype=grpo.DTYPES[config.dtype],
        chat_template="", log_probs=log_probs, slots=8, timeout=config.server_timeout,
    )  # fmt: skip
    return engine, model, log_probs


PROMPTS = [[7, 8, 9, 10], [20, 21], [30, 31, 32, 33, 34]]


def one_line(refused, server):
    text = str(refused.value)
    assert "\n" not in text and text.startswith(server.url) and len(text) < 500
    return text


# ---- what works -------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_over_a_server(kind, serve, tiny_model, tmp_path):
    server, out = serve(kind), tmp_path / "run"
    config = config_of(server, tiny_model(), out, eval_data=[CHAINS + ",split=test"], eval_limit=2, eval_samples=2)
    result = grpo.grpo(config)
    assert result.steps == 3 and "importance_cap: 2.0" in (config.out / "config.yaml").read_text()
    for row in result.metrics:
        assert row["ratio"] == pytest.approx(1, abs=1e-6)  # the trainer's own old log-probs
        assert row["mismatch"] == pytest.approx(1, abs=1e-3) and 0 <= row["mismatch_kl"] < 1e-6
    assert {"eval_pass@1", "eval_pass@2", "eval_cut_off"} <= result.metrics[-1].keys()
    assert len({Path(folder).name for folder in server.loaded}) == 4  # three rollouts and an evaluation
    assert not (out / "rollout-weights").exists()
    trained = load_model(TrainConfig(model=str(out), out=tmp_path / "x", max_tokens=256, dtype="fp32")).base
    for name, parameter in server.engine.model.named_parameters():  # the evaluation's weights are the last
        assert parameter.equal(dict(trained.named_parameters())[name]), name
    first, last = (load_model(TrainConfig(model=str(f), out=tmp_path / "x", max_tokens=256, dtype="fp32")).base
                   for f in (tiny_model(), out))  # fmt: skip
    assert any(not a.equal(b) for a, b in zip(first.parameters(), last.parameters()))


@pytest.mark.parametrize("kind", KINDS)
def test_log_probs_are_the_trainers_and_outcomes_are_told(kind, serve, tiny_model, tmp_path, seed):
    server = serve(kind)
    temperature = 1.0 if kind == "vllm" else 0.7
    engine, _, log_probs = engine_of(server, tiny_model(), tmp_path, temperature=temperature)
    seen = []
    sampling = Sampling(8, temperature, top_p=0.95, top_k=60, stop=(*"0123456789", "bc"))
    done = engine.generate(PROMPTS, sampling, samples=5, seed=(seed, 1), progress=lambda *told: seen.append(told))
    assert [len(group) for group in done] == [5, 5, 5]
    for prompt, group in zip(PROMPTS, done):
        for completion, expected in zip(group, log_probs(prompt, group)):
            np.testing.assert_allclose(completion.log_probs, expected, atol=1e-4)
            text = engine.tokenizer.decode(completion.tokens)
            stopped = completion.tokens[-1] in engine.ends or any(stop in text for stop in sampling.stop)
            assert completion.finished == stopped
            assert completion.finished or len(completion.tokens) == 8
    flat = [c for group in done for c in group]
    assert len({c.outcome for c in flat}) == 2
    assert seen[-1] == (15, sum(len(c.tokens) for c in flat))
    assert len({str(c.tokens) for c in flat}) > 7  # a seed of its own each
    assert engine.generate(PROMPTS[:1], sampling, samples=5, seed=(seed, 1)) == done[:1]
    assert engine.generate(PROMPTS[:1], sampling, samples=5, seed=(seed, 2)) != done[:1]
    assert engine.generate([], sampling) == []


@pytest.mark.parametrize("kind", KINDS)
def test_bf16_weights_arrive_in_bf16(kind, serve, tiny_model, tmp_path):
    server = serve(kind)
    engine, model, log_probs = engine_of(server, tiny_model(), tmp_path, dtype="bf16")
    masters = Masters(model, torch.bfloat16)  # as the loop does
    done = engine.generate(PROMPTS[:1], Sampling(6), samples=4)[0]
    assert next(server.engine.model.parameters()).dtype == torch.bfloat16
    for (name, held), sent in zip(model.base.named_parameters(), server.engine.model.parameters()):
        assert held.equal(sent) and held.equal(masters.masters[name].to(torch.bfloat16)), name
    for completion, expected in zip(done, log_probs(PROMPTS[0], done)):
        np.testing.assert_allclose(completion.log_probs, expected, atol=2e-2)


@pytest.mark.parametrize("kind", KINDS)
def test_no_more_requests_at_once_than_slots_and_no_prompt_cached_over_versions(kind, serve, tiny_model, tmp_path):
    server = serve(kind)
    engine, _, _ = engine_of(server, tiny_model(), tmp_path)
    engine.slots, now, most, guard, full = 3, 0, 0, threading.Lock(), threading.Event()
    healthy = server.model_of

    def counted(path, body):
        nonlocal now, most
        if path != COMPLETES[kind]:
            return healthy(path, body)
        with guard:
            now, most = now + 1, max(most, now + 1)
            if now == 3:
                full.set()
        if server.count(path) > 2:  # the probe is two requests
            full.wait(30)
        reply = healthy(path, body)
        with guard:
            now -= 1
        return reply

    server.model_of = counted
    for _ in range(2):
        engine.generate(PROMPTS, Sampling(2), samples=4)
    assert full.is_set() and most == 3
    salts = [body.get("cache_salt") or body.get("extra_key") for path, body in server.seen if path == COMPLETES[kind]]
    assert len(set(salts)) == 2 and None not in salts


# ---- what passes ------------------------------------------------------------------------------------------------------

ABORTED = {
    "vllm": lambda reply: {"choices": [{"token_ids": [], "logprobs": None, "finish_reason": "abort"}]},
    "sglang": lambda reply: {
        "meta_info": reply["meta_info"] | {"finish_reason": {"type": "abort", "message": "Abort in waiting queue"}}
    },
}


@pytest.mark.parametrize("kind", KINDS)
def test_what_passes_is_asked_again(kind, serve, tiny_model, tmp_path):
    server = serve(kind)
    engine, _, _ = engine_of(server, tiny_model(), tmp_path)
    expected = engine.generate(PROMPTS, Sampling(3), samples=2)
    before = server.count(COMPLETES[kind])
    for i, what in enumerate([(500, b"oh"), (503, {"error": "busy"}), (429, {}), "die", "half", ABORTED[kind]]):
        server.fault(COMPLETES[kind], what, skip=1 if i else 2)
    server.fault(LOADS[kind], (502, b"<html>bad gateway</html>"), times=2)
    assert engine.generate(PROMPTS, Sampling(3), samples=2) == expected
    assert server.count(COMPLETES[kind]) - before == 8 + 6
    assert server.count(LOADS[kind]) == 1 + 3


# ---- what is refused --------------------------------------------------------------------------------------------------


def changed(kind, **fields):
    """A reply with other token_ids, log_probs or finish_reason."""

    def change(reply):
        if kind == "vllm":
            choice = reply["choices"][0]
            choice["token_ids"] = fields.get("tokens", choice["token_ids"])
            choice["logprobs"]["token_logprobs"] = fields.get("log_probs", choice["logprobs"]["token_logprobs"])
            choice["finish_reason"] = fields.get("finish", choice["finish_reason"])
        else:
            about = reply["meta_info"]
            drawn = about["output_token_logprobs"]
            tokens = fields.get("tokens", [t for _, t, _ in drawn])
            log_probs = fields.get("log_probs", [p for p, _, _ in drawn])
            about["output_token_logprobs"] = [[p, t, None] for p, t in zip(log_probs, tokens)]
            about["finish_reason"] = {"type": fields.get("finish", about["finish_reason"]["type"])}
        return reply

    return change


def emptied(reply):
    return {"choices": []} if "choices" in reply else []


def doubled(reply):
    return {"choices": 2 * reply["choices"]} if "choices" in reply else [reply, reply]


def another_prompt(reply):
    if "choices" in reply:
        reply["choices"][0]["prompt_token_ids"] = [1, *reply["choices"][0]["prompt_token_ids"]]
    else:
        reply["meta_info"]["prompt_tokens"] += 1
    return reply


FAULTS = {
    "always 500": ((500, {"error": "CUDA error: device-side assert\ntriggered"}), 99, r"HTTP 500: .*5 attempts"),
    "always 429": ((429, {}), 99, r"HTTP 429: .*5 attempts"),
    "400": ((400, {"error": {"message": "max_tokens is too large"}}), 1, r"HTTP 400: .*too large"),
    "404": ((404, {"detail": "Not Found"}), 1, r"HTTP 404.*accepted: "),
    "hangs": ("hang", 1, r"no answer in 0\.5 s \(--server-timeout\)"),
    "always dies": ("die", 99, r"RemoteProtocolError|ReadError"),
    "always half a JSON": ("half", 99, r"RemoteProtocolError|ReadError"),
    "HTML": ((200, b"<html>\n<body>hello</body></html>"), 1, r"found '<html> <body>hello.*accepted: JSON"),
    "deep JSON": ((200, b"[" * 100_000), 1, r"accepted: JSON"),
    "a list": ((200, [1, 2]), 1, r"does not read"),
    "a number": ((200, b"3"), 1, r"does not read"),
    "nothing": ((200, b""), 1, r"does not read"),
    "no choice": (emptied, 1, r"0 \w+ where one was asked for"),
    "two choices": (doubled, 1, r"2 \w+ where one was asked for"),
    "another prompt": (another_prompt, 1, r"the prompt's token ids came back changed|a prompt of \d+ tokens where"),
    "always aborted": ("ABORTED", 99, r"ended by 'abort'.*5 attempts"),
    "empty": (dict(tokens=[], log_probs=[]), 1, r"a completion of 0 tokens"),
    "too long": (dict(tokens=[9] * 4, log_probs=[-1.0] * 4), 1, r"a completion of 4 tokens; accepted: 1 to 3"),
    "beyond the vocabulary": (dict(tokens=[9999], log_probs=[-1.0]), 1, r"token id 9999; accepted: 0 to"),
    "negative": (dict(tokens=[-1], log_probs=[-1.0]), 1, r"token id -1"),
    "text for ids": (dict(tokens=["token_id:5"], log_probs=[-1.0]), 1, r"token id 'token_id:5'"),
    "true for an id": (dict(tokens=[True], log_probs=[-1.0]), 1, r"token id True"),
    "NaN": (dict(tokens=[9], log_probs=[float("nan")]), 1, r"log-prob nan"),
    "infinite": (dict(tokens=[9], log_probs=[float("-inf")]), 1, r"log-prob -inf"),
    "no probability": (dict(tokens=[9], log_probs=[-9999.0]), 1, r"log-prob -9999"),
    "above one": (dict(tokens=[9], log_probs=[0.5]), 1, r"log-prob 0\.5"),
    "null": (dict(tokens=[9], log_probs=[None]), 1, r"log-prob None"),
}


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("name", FAULTS)
def test_what_is_wrong_is_refused_in_one_line(name, kind, serve, tiny_model, tmp_path):
    what, times, message = FAULTS[name]
    what = changed(kind, **what) if isinstance(what, dict) else ABORTED[kind] if what == "ABORTED" else what
    server = serve(kind)
    engine, _, _ = engine_of(server, tiny_model(), tmp_path, server_timeout=0.5 if name == "hangs" else 10.0)
    server.fault(COMPLETES[kind], what, times=times, skip=3)  # past the probe
    with pytest.raises(Refusal) as refused:
        engine.generate(PROMPTS, Sampling(3))
    assert re.search(message, one_line(refused, server)) and COMPLETES[kind] in str(refused.value)


def test_log_probs_of_another_number_than_ids_are_refused(serve, tiny_model, tmp_path):
    server = serve("vllm")
    engine, _, _ = engine_of(server, tiny_model(), tmp_path)
    server.fault(COMPLETES["vllm"], changed("vllm", tokens=[9, 9], log_probs=[-1.0]), skip=3)
    with pytest.raises(Refusal, match="2 token ids with 1 log-probs"):
        engine.generate(PROMPTS, Sampling(6))


@pytest.mark.parametrize(
    ("kind", "path", "what", "message"),
    [
        ("vllm", "/collective_rpc", (500, {"error": "no such folder"}), r"/collective_rpc: HTTP 500.*no such folder"),
        ("vllm", "/reset_prefix_cache", (200, {"success": False}), r"kept its cache"),
        ("vllm", "/pause", (404, {"detail": "Not Found"}), r"VLLM_SERVER_DEV_MODE=1"),
        ("sglang", "/update_weights_from_disk", (400, {"success": False, "message": "bad shape"}), r"bad shape"),
        ("sglang", "/update_weights_from_disk", (200, {"success": False, "message": "bad shape"}), r"bad shape"),
        ("sglang", "/update_weights_from_disk", (200, [1]), r"\[1\]"),
    ],
)
def test_a_load_that_fails_is_refused(kind, path, what, message, serve, tiny_model, tmp_path):
    server = serve(kind)
    engine, _, _ = engine_of(server, tiny_model(), tmp_path)
    server.fault(path, what, times=99)
    with pytest.raises(Refusal) as refused:
        engine.generate(PROMPTS, Sampling(6))
    assert re.search(message, one_line(refused, server)) and server.count(COMPLETES[kind]) == 0


def test_a_server_that_is_not_there_or_another_is_told_before_the_run(serve, tiny_model, tmp_path):
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        nobody = SimpleNamespace(kind="vllm", url=f"http://127.0.0.1:{free.getsockname()[1]}")
    out = tmp_path / "run"
    with pytest.raises(Refusal, match=r"/weight_info: ConnectError.*5 attempts"):
        grpo.grpo(config_of(nobody, tiny_model(), out))
    server = serve("sglang")
    with pytest.raises(Refusal, match=r"/weight_info: HTTP 404.*accepted: vLLM"):
        grpo.grpo(config_of(server, tiny_model(), out, engine="vllm"))
    server.fault("/v1/models", (200, {"data": []}), times=99)
    with pytest.raises(Refusal, match="accepted: a list of models"):
        grpo.grpo(config_of(server, tiny_model(), out))
    server.fault("/model_info", (200, {"model_path": "x"}))
    with pytest.raises(Refusal, match="accepted: SGLang"):
        grpo.grpo(config_of(server, tiny_model(), out))
    assert not out.exists()


# ---- stale weights ----------------------------------------------------------------------------------------------------


def test_a_reply_of_another_version_is_refused(serve, tiny_model, tmp_path):
    """SGLang says on every reply which weights wrote it: another trainer loads its own in the middle of a rollout."""
    server = serve("sglang")
    engine, _, _ = engine_of(server, tiny_model(), tmp_path)

    def another(reply):
        server.version = "another-1"
        return reply

    server.fault("/generate", another, skip=4)
    with pytest.raises(Refusal, match=r"/generate: stale weights: version 'another-1' where '\w+-1' was loaded"):
        engine.generate(PROMPTS, Sampling(3), samples=4)


def test_a_restart_in_a_rollout_is_found_after_it(serve, tiny_model, tmp_path):
    """vLLM's replies say nothing of versions, but a server that restarted has lost the one it was given."""
    server = serve("vllm")
    engine, _, _ = engine_of(server, tiny_model(), tmp_path)

    def restarted(reply):
        server.version = "default"
        return reply

    server.fault("/v1/completions", restarted, skip=4)
    with pytest.raises(Refusal, match=r"/weight_info: stale weights: version 'default' where '\w+-1' was loaded"):
        engine.generate(PROMPTS, Sampling(3), samples=4)


@pytest.mark.parametrize("kind", KINDS)
def test_a_server_that_only_says_it_loaded_is_found(kind, serve, tiny_model, tmp_path, seed):
    """Moved by too little for the log-probs to be called apart, but the greedy answer is the old one to the last bit; also
    where sampling is not seeded, as SGLang's is not by default."""
    server = serve(kind)
    engine, model, _ = engine_of(server, tiny_model(), tmp_path)
    engine.generate(PROMPTS, Sampling(6))
    server.stubborn, drawn = True, server.sample
    server.sample = lambda prompt, asked, longest, seed, top_k: drawn(prompt, asked, longest, time.time_ns(), top_k)
    engine.generate(PROMPTS, Sampling(6))  # the weights have not moved, and nothing is wrong
    draw = torch.Generator().manual_seed(seed)
    with pytest.raises(Refusal) as refused:
        for _ in range(50):  # the first such step may move no log-prob by enough to be sure; all together do
            for parameter in model.base.parameters():
                parameter.data += 1e-3 * torch.randn(parameter.shape, generator=draw)
            engine.generate(PROMPTS, Sampling(6))
    assert "stale weights" in one_line(refused, server) and "last bit" in str(refused.value)


@pytest.mark.parametrize("kind", KINDS)
def test_another_models_log_probs_are_refused(kind, serve, tiny_model, tmp_path):
    server = serve(kind)
    engine, model, _ = engine_of(server, tiny_model(), tmp_path)
    engine.generate(PROMPTS, Sampling(6))
    server.stubborn = True
    for parameter in model.base.parameters():
        parameter.data *= 5
    with pytest.raises(Refusal) as refused:
        engine.generate(PROMPTS, Sampling(6))
    assert "a token from the trainer's" in one_line(refused, server)


# ---- nothing is lost --------------------------------------------------------------------------------------------------


@pytest.mark.parametrize("kind", KINDS)
def test_a_run_whose_server_fails_goes_on_from_its_last_step(kind, serve, tiny_model, tmp_path):
    server, out = serve(kind), tmp_path / "run"
    server.fault(COMPLETES[kind], (500, {"error": "died"}), times=99, skip=2 + 8 + 5)  # in the second rollout
    with pytest.raises(Refusal, match="HTTP 500"):
        grpo.grpo(config_of(server, tiny_model(), out))
    assert checkpoint.latest(out / "checkpoints").name == "step-00000001"
    left = sorted(p.name for p in (out / "rollout-weights").iterdir())
    assert len(left) == 1  # older weights are gone
    server.faults.clear()
    result = grpo.grpo(config_of(server, tiny_model(), out, resume="auto"))
    assert [row["step"] for row in result.metrics] == [1, 2, 3] and not (out / "rollout-weights").exists()


def test_an_evaluation_that_fails_loses_no_step(serve, tiny_model, tmp_path):
    server, out = serve("sglang"), tmp_path / "run"
    changes = dict(eval_data=[CHAINS + ",split=test"], eval_limit=2, eval_samples=2, eval_every=1)
    server.fault("/generate", (500, {}), times=99, skip=2 + 8 + 3)  # in the first evaluation
    with pytest.raises(Refusal, match="HTTP 500"):
        grpo.grpo(config_of(server, tiny_model(), out, **changes))
    assert checkpoint.latest(out / "checkpoints").name == "step-00000001"
    server.faults.clear()
    result = grpo.grpo(config_of(server, tiny_model(), out, resume="auto", **changes))
    assert [row["step"] for row in result.metrics] == [1, 2, 3]
    assert all("eval_pass@1" in row for row in result.metrics), "the one that failed was made up"


def test_a_buffered_rollout_resumes_exactly(serve, tiny_model, tmp_path):
    """The second step of a rollout dealt out over two: what the server wrote is in the checkpoint."""
    server, out = serve("vllm"), tmp_path / "run"
    changes = dict(steps=2, steps_per_rollout=2, save_every=1, keep_last=2)
    whole = grpo.grpo(config_of(server, tiny_model(), out, **changes))
    checkpoint._remove(out / "checkpoints" / "step-00000002")
    asked = server.count("/v1/completions")
    again = grpo.grpo(config_of(server, tiny_model(), out, resume="auto", **changes))
    assert server.count("/v1/completions") == asked
    assert [row["loss"] for row in again.metrics] == [row["loss"] for row in whole.metrics]


def test_a_signal_stops_the_wait_for_a_hanging_server(serve, tiny_model, tmp_path):
    """Progress may raise, as it does after SIGTERM: at once, however long the server may take."""
    server = serve("vllm")
    engine, _, _ = engine_of(server, tiny_model(), tmp_path, server_timeout=600.0)
    server.fault("/v1/completions", "hang", times=99, skip=2)

    class Stopped(Exception):
        pass

    def stop(ended, written):
        if server.count("/v1/completions") > 4:
            raise Stopped

    with pytest.raises(Stopped):
        engine.generate(PROMPTS, Sampling(3), samples=4, progress=stop)


# ---- arguments --------------------------------------------------------------------------------------------------------


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"engine": "own"}, r"--server http://\S+ needs --engine"),
        ({"server": ""}, r"--engine vllm: found --server ''; accepted: http://HOST:PORT"),
        ({"server": "localhost:8000"}, r"accepted: http://HOST:PORT"),
        ({"server": "http://localhost:8000/v1"}, r"accepted: http://HOST:PORT"),
        ({"server_timeout": 0.0}, r"--server-timeout 0.0"),
        ({"server_timeout": float("nan")}, r"--server-timeout nan"),
        ({"lora_rank": 4}, r"--lora-rank with --engine vllm"),
        ({"temperature": 0.7}, r"--temperature 0.7 with --engine vllm"),
        ({"importance_cap": -1.0}, r"--importance-cap -1.0"),
    ],
)
def test_arguments_that_cannot_be_used_are_refused(changes, message, tiny_model, tmp_path):
    server = SimpleNamespace(kind="vllm", url="http://127.0.0.1:9")
    with pytest.raises(Refusal, match=message):
        grpo.grpo(config_of(server, tiny_model(), tmp_path / "out", **changes))


def test_the_importance_cap_is_on_for_a_server_and_off_for_our_own_engine(tmp_path):
    server = SimpleNamespace(kind="sglang", url="http://[::1]:30000")
    assert grpo.check(config_of(server, "m", tmp_path)).importance_cap == 2.0
    assert grpo.check(config_of(server, "m", tmp_path, engine="own", server="")).importance_cap == 0.0
    assert grpo.check(config_of(server, "m", tmp_path, importance_cap=0.0)).importance_cap == 0.0


def test_prompts_beyond_the_servers_context_are_refused(serve, tiny_model, tmp_path):
    server = serve("vllm")
    engine, _, _ = engine_of(server, tiny_model(), tmp_path)
    with pytest.raises(Refusal, match=r"--max-new-tokens 510.*accepted: up to 507"):
        engine.generate(PROMPTS, Sampling(510))
    with pytest.raises(Refusal, match="a prompt without tokens"):
        engine.generate([[5], []], Sampling(10))

"""`longtrace pairs`: which completions become a pair, what the scorer sees, and that a killed run ends in the same bytes."""

import json
import os
import subprocess
import sys
import threading
from pathlib import Path

import numpy as np
import pytest
import torch

from longtrace.trainer import pairing, pairs, prompts, samples, served, servers
from longtrace.trainer.config import Refusal
from longtrace.trainer.model import load_for_generation, load_tokenizer
from longtrace.trainer.pairs import PairsConfig
from longtrace.trainer.preferences import load_pairs
from longtrace.trainer.rewards import Completion as Scored
from longtrace.trainer.rewards import Rewards
from longtrace.trainer.rollout import Completion, Engine, Sampling
from longtrace.trainer.rows import read_rows
from longtrace.trainer.sample import SampleConfig, sample
from longtrace.trainer.samples import load_engine
from longtrace.trainer.shapes import CLOSE, OPEN

CHAINS = "generated:chain,steps=2,modulus=10,rows=6"
EMPTY = f"{OPEN}\n\n{CLOSE}\n\n"
OPENED = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
REWARDS = """
import os, signal
seen = []
left = int(os.environ.get("BATCHES", "1000"))

def length(completions, rows):
    seen.extend(completions)
    return [float(len(text)) for text in completions]

def marks(completions, rows):
    seen.extend(completions)
    return [None if "none" in text else float(text.split()[-1]) for text in completions]

def digits(completions, rows):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(c.isdigit() for c in text) / max(len(text), 1) for text in completions]
"""


def config_of(folder, out, **changes):
    defaults = dict(
        model=str(folder), data=[CHAINS], out=out, samples=4, max_new_tokens=12, batch_size=4, slots=5, dtype="fp32",
        reward=["tests_pairs_rewards:marks"],
    )  # fmt: skip
    return PairsConfig(**(defaults | changes))


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture(autouse=True)
def users(tmp_path, monkeypatch):
    """A user's rewards in the current folder; `seen` is what they were shown."""
    (tmp_path / "tests_pairs_rewards.py").write_text(REWARDS)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(servers, "BACKOFF", 0.01)
    monkeypatch.setattr(served, "TICK", 0.02)
    yield lambda: sys.modules["tests_pairs_rewards"].seen
    sys.modules.pop("tests_pairs_rewards", None)


@pytest.fixture
def written(tiny_model, monkeypatch):
    """written(fn): the engine's place is taken by one that writes fn(prompt's text, path, number), None = cut off."""

    def write(fn, template=None):
        model, tokenizer = load_for_generation(str(tiny_model()), torch.device("cpu"))
        tokenizer.chat_template = template or tokenizer.chat_template

        class Writer:
            def generate(self, prompts, sampling, *, samples, seed, progress):
                texts = [tokenizer.decode(tokens) for tokens in prompts]
                asked.extend(texts)
                progress(samples * len(prompts), 7)
                found = [[fn(t, "empty" if t.endswith(EMPTY) else "trace", n) for n in range(samples)] for t in texts]
                ids = [[tokenizer(t or "cut", add_special_tokens=False)["input_ids"] for t in group] for group in found]
                return [
                    [Completion(i, [], t is not None) for t, i in zip(*group)]
                    for group in zip(found, ids)
                ]  # fmt: skip

        asked = []
        Writer.model, Writer.tokenizer, Writer.asked = model, tokenizer, asked
        monkeypatch.setattr(pairs, "load_engine", lambda config: Writer())
        return Writer

    return write


def thought(answer, long=""):
    return f"{OPEN}\nsecret {long}\n{CLOSE}\n\n{answer}"


# ---- which become a pair ------------------------------------------------------------------------------------------------


def test_best_against_worst_of_each_path(tiny_model, tmp_path, written, users, capsys):
    """Answers end in their scores; the thought never reaches the scorer; a row is as the trainer reads it."""
    marks = {"trace": [2, 9, 5, 1], "empty": [4, 3, 8, 6]}

    def fn(text, path, n):
        return thought(f"t {marks[path][n]}", "long " * n) if path == "trace" else f"e {marks[path][n]}"

    writer = written(fn)
    card = pairs.pairs(config_of(tiny_model(), tmp_path / "out"))
    rows = lines(tmp_path / "out" / "pairs.jsonl")
    problems = [row.raw["problem"] for row in read_rows(CHAINS)]
    assert [row["prompt"] for row in rows] == problems
    for i, row in enumerate(rows):
        assert row["chosen"] == fn("", "trace", 1) and row["rejected"] == fn("", "trace", 3)
        assert row["empty_chosen"] == "e 8" and row["empty_rejected"] == "e 3"
        assert row["scores"] == {"chosen": 9, "rejected": 1, "empty_chosen": 8, "empty_rejected": 3}
        assert row["provenance"] == {
            "model": str(tiny_model()), "seed": 0, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 12,
            "problem": i, "samples": {"chosen": 1, "rejected": 3, "empty_chosen": 2, "empty_rejected": 1},
        }  # fmt: skip
        assert row["answer"] and row["steps"] == 2, "the row's own fields stay"
    assert sorted(set(users())) == sorted(f"{path[0]} {n}" for path in marks for n in marks[path])
    assert all("secret" not in text and CLOSE not in text for text in users())
    assert writer.asked[:2] == [writer.asked[0], writer.asked[0] + EMPTY], "given to the model, after its own prompt"
    assert len(writer.asked) == 12 and sum(text.endswith(EMPTY) for text in writer.asked) == 6
    assert len(lines(tmp_path / "out" / "samples.jsonl")) == 6 * 2 * 4
    assert json.loads((tmp_path / "out" / "card.json").read_text()) == card
    counts = card["counts"]
    assert (counts["rows"], counts["one_path"], counts["no_pair"]) == (6, 0, 0)
    trace, empty = counts["paths"]["trace"], counts["paths"]["empty"]
    assert trace["samples"] == trace["scored"] == 24 and trace["score_mean"] == np.mean(marks["trace"])
    assert (trace["margin_mean"], empty["margin_mean"], empty["margin_median"]) == (8, 5, 5)
    assert trace["chosen_longer"] == 0 and trace["chosen_tokens"] < trace["rejected_tokens"]
    printed = capsys.readouterr().out
    assert "prompts with a pair" in printed and "6 rows of 6 prompts: 0 without a pair" in printed


def test_thoughts_in_other_tags_reach_no_scorer(tiny_model, tmp_path, written, users):
    """On the empty path they are a thought after all; a call in channels is no answer."""
    tagged = [
        "<|begin_of_thought|>secret<|end_of_thought|>\n<|begin_of_solution|>t {}<|end_of_solution|>",
        "<|channel|>analysis<|message|>secret<|end|><|start|>assistant<|channel|>final<|message|>t {}<|return|>",
        "secret</think>t {}",
    ]
    call = "<|channel|>commentary to=python<|message|>secret"
    written(lambda text, path, n: tagged[n].format(n) if n < 3 else call)
    card = pairs.pairs(config_of(tiny_model(), tmp_path / "out", keep_one_path=True))
    assert set(users()) == {"t 0", "t 1", "t 2"}
    trace, empty = card["counts"]["paths"]["trace"], card["counts"]["paths"]["empty"]
    assert (trace["no_answer"], trace["scored"], empty["no_answer"], empty["scored"]) == (6, 18, 24, 0)


def test_margins_and_lengths_are_those_of_written_rows(tiny_model, tmp_path, written):
    """A prompt without a pair on the empty path is left out, and what its trace pair would have added is, too."""
    problems = [row.raw["problem"] for row in read_rows(CHAINS)]

    def fn(text, path, n):
        if problems[0] in text:
            return thought(f"{'long ' * 20 * n} t {100 * n}") if path == "trace" else "e 1"
        return thought(f"t {n}") if path == "trace" else f"e {n}"

    written(fn)
    out = tmp_path / "out"
    counts = pairs.pairs(config_of(tiny_model(), out))["counts"]
    found = counts["paths"]["trace"]
    assert (counts["rows"], counts["one_path"], found["pairs"], counts["paths"]["empty"]["pairs"]) == (5, 1, 6, 5)
    assert (found["margin_mean"], found["chosen_longer"]) == (3, 0)
    tokens = [row["tokens"]["chosen"] for row in lines(out / "pairs.jsonl")]
    assert found["chosen_tokens"] == np.mean(tokens)
    kept = pairs.pairs(config_of(tiny_model(), out, keep_one_path=True))["counts"]["paths"]["trace"]
    assert kept["margin_mean"] == (300 + 5 * 3) / 6 and kept["chosen_longer"] == 1 / 6


def test_what_cannot_be_compared_is_left_out_and_counted(tiny_model, tmp_path, written):
    """Trace: a tie. Empty: one with a thought, one cut off, one without a verdict, an empty one, and two that count."""
    texts = [f"{OPEN}again{CLOSE} 9", None, "none", "  ", "e 2", "e 1", "e 2"]
    written(lambda text, path, n: texts[n] if path == "empty" else thought("t 5", "x" * n) if n else "never 9 " + OPEN)
    out = tmp_path / "out"
    card = pairs.pairs(config_of(tiny_model(), out, samples=7))
    counts = card["counts"]
    assert (counts["rows"], counts["one_path"], counts["no_pair"]) == (0, 6, 0) and lines(out / "pairs.jsonl") == []
    empty, trace = counts["paths"]["empty"], counts["paths"]["trace"]
    assert {name: empty[name] / 6 for name in ("cut_off", "no_answer", "no_verdict", "scored", "duplicates")} == {
        "cut_off": 1, "no_answer": 2, "no_verdict": 1, "scored": 3, "duplicates": 1
    }  # fmt: skip
    assert (trace["ties"], trace["pairs"], trace["no_answer"], empty["pairs"]) == (6, 0, 6, 6)
    kept = pairs.pairs(config_of(tiny_model(), out, samples=7, keep_one_path=True))  # chosen again, not drawn
    assert kept["counts"]["rows"] == 6
    for row in lines(out / "pairs.jsonl"):
        assert (row["empty_chosen"], row["empty_rejected"]) == ("e 2", "e 1")
        assert not {"chosen", "rejected"} & row.keys() and row["scores"] == {"empty_chosen": 2, "empty_rejected": 1}
        assert row["provenance"]["samples"] == {"empty_chosen": 4, "empty_rejected": 5}, "of equal ones the first"


@pytest.mark.parametrize("path", ["trace", "empty"])
def test_one_path_alone(path, tiny_model, tmp_path, written):
    writer = written(lambda text, path, n: thought(f"t {n}") if path == "trace" else f"e {n}")
    card = pairs.pairs(config_of(tiny_model(), tmp_path / "out", paths=[path]))
    assert list(card["counts"]["paths"]) == [path] and card["counts"]["rows"] == 6
    assert {text.endswith(EMPTY) for text in writer.asked} == {path == "empty"}
    names = {"trace": {"chosen", "rejected"}, "empty": {"empty_chosen", "empty_rejected"}}
    for row in lines(tmp_path / "out" / "pairs.jsonl"):
        assert names[path] <= row.keys() and not (names["trace"] | names["empty"]) - names[path] & row.keys()


def test_margins_and_weights_change_without_drawing(tiny_model, tmp_path, written):
    writer = written(lambda text, path, n: thought(f"t {n}") if path == "trace" else f"e {n / 2}")
    out = tmp_path / "out"
    assert pairs.pairs(config_of(tiny_model(), out))["counts"]["rows"] == 6
    calls = len(writer.asked)
    card = pairs.pairs(config_of(tiny_model(), out, min_margin=1.6))
    assert card["counts"]["paths"]["empty"]["below_margin"] == 6 and card["counts"]["one_path"] == 6
    card = pairs.pairs(config_of(tiny_model(), out, min_margin=1.6, reward=["tests_pairs_rewards:marks=-2"]))
    assert card["counts"]["rows"] == 6 and len(writer.asked) == calls
    assert lines(out / "pairs.jsonl")[0]["scores"] == {
        "chosen": 0, "rejected": -6, "empty_chosen": 0, "empty_rejected": -3
    }  # fmt: skip
    with pytest.raises(Refusal, match="drawn with other rewards"):
        pairs.pairs(config_of(tiny_model(), out, reward=["tests_pairs_rewards:marks", "accuracy"]))
    with pytest.raises(Refusal, match=r"drawn with other paths \(\['trace', 'empty'\], now \['empty'\]\)"):
        pairs.pairs(config_of(tiny_model(), out, paths=["empty"]))
    assert pairs.pairs(config_of(tiny_model(), out, paths=["empty", "trace"]))["counts"]["rows"] == 6


def test_ties_among_the_best_are_drawn(seed):
    """Every one of the best, and of the worst, is drawn about equally often, and by the same seed the same."""
    scores = [1.0, 0.0, None, 1.0, 0.5, 0.0, 1.0]
    texts = list("abcdefg")
    found = [pairing.pick(texts, scores, 0, np.random.default_rng((seed, i))) for i in range(600)]
    assert found == [pairing.pick(texts, scores, 0, np.random.default_rng((seed, i))) for i in range(600)]
    for side, expected in ((0, [0, 3, 6]), (1, [1, 5])):
        numbers, times = np.unique([pair[side] for pair in found], return_counts=True)
        assert numbers.tolist() == expected and times.min() > 600 / len(expected) * 0.75


def test_why_there_is_no_pair():
    draw = np.random.default_rng(0)
    assert pairing.pick("ab", [1.0, None], 0, draw) == "few"
    same = f"{OPEN}a{CLOSE}b", f"{OPEN}\na\n{CLOSE}\n\nb\n"
    assert pairing.pick(same, [1.0, 0.0], 0, draw) == "few", "training reads them as equal"
    assert pairing.pick(["b", EMPTY + "b", f"{CLOSE}b"], [1.0, 0.0, 0.5], 0, draw) == "few", "an empty thought is none"
    assert pairing.pick("abc", [1.0, 1.0, None], 0, draw) == "tie"
    assert pairing.pick("ab", [1.0, 0.75], 0.3, draw) == "margin"
    assert pairing.pick("ab", [1.0, 0.75], 0.25, draw) == (0, 1)
    assert pairing.pick("ab", [0.3, 0.2], 0.1, draw) == (0, 1), "but for rounding"


def test_a_template_that_opens_the_thought(tiny_model, tmp_path, written):
    """R1's: the trace's text is whole all the same, and the empty path closes the thought that was opened."""
    writer = written(lambda text, path, n: f"secret\n{CLOSE}\n\nt {n}" if path == "trace" else f"e {n}", OPENED)
    pairs.pairs(config_of(tiny_model(), tmp_path / "out"))
    asked = writer.asked[:2]
    assert asked[0].endswith(f"{OPEN}\n") and asked[1] == asked[0].removesuffix(f"{OPEN}\n") + EMPTY
    for row in lines(tmp_path / "out" / "pairs.jsonl"):
        assert (row["chosen"], row["rejected"]) == (
            f"{OPEN}\nsecret\n{CLOSE}\n\nt 3",
            f"{OPEN}\nsecret\n{CLOSE}\n\nt 0",
        )
        assert (row["empty_chosen"], row["empty_rejected"]) == ("e 3", "e 0")


@pytest.mark.parametrize("template", [None, OPENED + "{{ '<|im_end|>' if messages[-1]['role'] == 'assistant' }}"])
def test_training_reads_the_rows_after_the_prompts_that_were_sampled(template, tiny_model, tmp_path, written):
    """Token for token, on both paths, whether or not the template opens the thought."""
    end = "<|im_end|>"  # a decoded completion does not hold it

    def fn(text, path, n):
        opened = "" if template else f"{OPEN}\n"
        return f"{opened}secret\n{CLOSE}\n\nt {n}{end}" if path == "trace" else f"e {n}{end}"

    writer = written(fn, template)
    pairs.pairs(config_of(tiny_model(), tmp_path / "out"))
    found = load_pairs(
        [str(tmp_path / "out" / "pairs.jsonl")],
        writer.tokenizer,
        paths=("trace", "empty"),
        max_tokens=400,
        progress=False,
    )
    assert len(found) == 6 and found.audit.rows_read == 6
    texts = [writer.tokenizer.decode(ids) for ids in np.split(found.tokens, found.offsets[1:-1])]
    ends = [("trace", 3), ("trace", 0), ("empty", 3), ("empty", 0)]
    assert texts == [writer.asked[2 * i + (path == "empty")] + fn("", path, n) for i in range(6) for path, n in ends]
    contexts = [
        writer.tokenizer.decode(ids[:n]) for ids, n in zip(np.split(found.tokens, found.offsets[1:-1]), found.prompts)
    ]
    assert contexts == [writer.asked[2 * i + (path == "empty")] for i in range(6) for path, _ in ends]


def test_texts_that_look_like_a_dialogue_come_back_as_they_were_sampled(tiny_model, tmp_path, written):
    """Token for token: a prompt, and answers, that begin as HH's dialogues do are one message each all the same."""
    rows = [{"prompt": "\n\nHuman: hi there\n\nAssistant:"}, {"prompt": "\n\nHuman: 1+1?"}, {"prompt": "1+1?"}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    said = "\n\nHuman: and now?\n\nAssistant: so {}<|im_end|>"
    writer = written(lambda text, path, n: said.format(n))
    pairs.pairs(config_of(tiny_model(), tmp_path / "out", data=[str(tmp_path / "rows.jsonl")]))
    found = load_pairs(
        [str(tmp_path / "out" / "pairs.jsonl")], writer.tokenizer, paths=("trace", "empty"), max_tokens=400,
        progress=False,
    )  # fmt: skip
    assert len(found) == 3 and found.audit.rows_read == 3
    tokenizer = writer.tokenizer
    for i, (ids, context) in enumerate(zip(np.split(found.tokens, found.offsets[1:-1]), found.prompts)):
        asked = tokenizer(writer.asked[i // 2], add_special_tokens=False)["input_ids"]
        answer = tokenizer(said.format(0 if i % 2 else 3).strip(), add_special_tokens=False)["input_ids"]
        assert ids[:context].tolist() == asked and ids[context:].tolist() == answer


def test_conversations_and_fields_of_the_same_name(tiny_model, tmp_path, written):
    """A system message makes the prompt a list; a preference row's own pair does not get into ours."""
    asked = [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}]
    rows = [
        {"messages": asked, "id": "a"},
        {"prompt": "1+1?", "chosen": "old", "rejected": "older", "scores": [1, 2], "path": "x", "id": "b"},
    ]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written(lambda text, path, n: thought(f"t {n}") if path == "trace" else f"e {n}")
    pairs.pairs(config_of(tiny_model(), tmp_path / "out", data=[str(tmp_path / "rows.jsonl")]))
    first, second = lines(tmp_path / "out" / "pairs.jsonl")
    assert first["prompt"] == asked and first["id"] == "a"
    assert second["prompt"] == "1+1?" and second["chosen"] == thought("t 3") and "path" not in second
    assert second["scores"]["rejected"] == 0


def test_verifiers_score_the_answer(tiny_model, tmp_path, written):
    """accuracy by a generated task; a right guess in the thought alone is worth nothing."""
    answers = {row.raw["problem"]: row.raw["answer"] for row in read_rows(CHAINS)}

    def fn(text, path, n):
        right = next(answer for problem, answer in answers.items() if problem in text)
        said = right if n == 2 else str((int(right) + 1) % 10)
        return (
            f"{OPEN}\n\\boxed{{{right}}}\n{CLOSE}\n\n\\boxed{{{said}}}, try {n}"
            if path == "trace"
            else f"\\boxed{{{said}}}{' ' * n}."
        )

    written(fn)
    card = pairs.pairs(config_of(tiny_model(), tmp_path / "out", reward=["accuracy"]))
    assert [path["score_mean"] for path in card["counts"]["paths"].values()] == [0.25, 0.25]
    for row in lines(tmp_path / "out" / "pairs.jsonl"):
        assert row["provenance"]["samples"]["chosen"] == row["provenance"]["samples"]["empty_chosen"] == 2
        assert row["rewards"]["chosen"] == {"accuracy": 1.0} and row["rewards"]["rejected"] == {"accuracy": 0.0}


def test_a_long_thought_is_no_long_answer(tiny_model):
    """The length that a reward sees is the answer's; what has no answer reaches none."""
    row, text = next(read_rows(CHAINS)), thought("fifteen letters", "long " * 50)
    written = [
        Scored(text, row, True, None, 300), Scored(text, row, False, None, 300), Scored("never", row, True, True, 9),
        Scored(f"{text}{OPEN}", row, True, None, 300), Scored(f"{CLOSE} 3", row, True, False, 4),
    ]  # fmt: skip
    marks = pairs.score_answers(load_tokenizer(str(tiny_model())), Rewards(["overlong:20:10"]), written)
    assert marks == [{"overlong:20:10": -0.5}, None, None, None, None]


# ---- our own engine -----------------------------------------------------------------------------------------------------


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="SIGKILL")
def test_a_killed_run_ends_in_the_same_bytes(tiny_model, tmp_path, seed):
    """SIGKILL while the second of two batches is scored; a half-written line besides; then the same command again."""
    options = dict(reward=["tests_pairs_rewards:digits"], seed=seed, max_new_tokens=16, stop=["a", "b", "c", "7"])
    options |= dict(keep_one_path=True)
    whole, part = tmp_path / "whole", tmp_path / "part"
    card = pairs.pairs(config_of(tiny_model(), whole, **options))
    assert card["counts"]["rows"] > 2 and card["counts"]["paths"]["trace"]["cut_off"] > 0
    program = "import sys; sys.path[:] = eval(sys.argv[1]); from longtrace.trainer import cli; sys.exit(cli.main(sys.argv[2:]))"
    path = [str(tmp_path), *(p or os.getcwd() for p in sys.path)]
    flags = f"pairs --model {tiny_model()} --data {CHAINS} --out {part} --samples 4 --max-new-tokens 16 --batch-size 4"
    flags += f" --slots 5 --dtype fp32 --reward tests_pairs_rewards:digits --seed {seed} --stop a b c 7 --keep-one-path"
    killed = subprocess.run(
        [sys.executable, "-c", program, repr(path), *flags.split()], env=os.environ | {"BATCHES": "1"}, timeout=300
    )
    assert killed.returncode == -9
    assert len(lines(part / "samples.jsonl")) == 4 * 2 * 4 and not (part / "pairs.jsonl").exists()
    with (part / "samples.jsonl").open("ab") as file:  # what a kill in the middle of a write leaves
        file.write((whole / "samples.jsonl").read_bytes().splitlines(keepends=True)[32] + b'{"prompt": "half a li')
    assert pairs.pairs(config_of(tiny_model(), part, **options)) == card
    for name in ("samples.jsonl", "pairs.jsonl", "card.json"):
        assert (part / name).read_bytes() == (whole / name).read_bytes(), name


def test_the_model_writes_after_what_training_puts_there(tiny_model, tmp_path, seed):
    """The prompts' tokens are those of the rendered text and of `empty_thought` of it; samples come from them."""
    config = config_of(
        tiny_model(), tmp_path / "out", reward=["tests_pairs_rewards:length"], seed=seed, stop=["a", "e"]
    )
    pairs.pairs(config)
    engine = load_engine(config)
    tokenizer = load_tokenizer(str(tiny_model()))
    asked = []
    for row in list(read_rows(CHAINS))[:4]:  # of the first batch
        text = tokenizer.apply_chat_template(row.messages[:1], tokenize=False, add_generation_prompt=True)
        asked += [tokenizer(t, add_special_tokens=False)["input_ids"] for t in (text, prompts.empty_thought(text))]
    done = engine.generate(asked, Sampling(12, stop=("a", "e")), samples=4, seed=(seed, 0))
    expected = [tokenizer.decode(c.tokens, skip_special_tokens=True) for group in done for c in group]
    rows = lines(tmp_path / "out" / "samples.jsonl")
    assert [row["completion"] for row in rows[:32]] == expected
    assert [row["path"] for row in rows[:16]] == [*["trace"] * 4, *["empty"] * 4] * 2


# ---- a server's model ---------------------------------------------------------------------------------------------------


@pytest.fixture
def serve(http, tiny_model):
    """serve(kind) -> (address, requests): vLLM's or SGLang's completion endpoint over a model; no weights are pushed."""

    def start(kind, fault=None):
        model, tokenizer = load_for_generation(str(tiny_model()), torch.device("cpu"))
        model.set_attn_implementation(samples.K.register_attention())
        engine, seen, guard = Engine(model, tokenizer, 1), [], threading.Lock()

        def answer(path, body):
            if path == "/v1/models":
                return {"data": [{"id": "tiny", "max_model_len": 512}]}
            if path != {"vllm": "/v1/completions", "sglang": "/generate"}[kind]:
                return 404, {"detail": "Not Found"}
            with guard:
                seen.append(body)
                if fault and len(seen) == fault[0]:
                    return fault[1]
                ask = body if kind == "vllm" else body["sampling_params"]
                prompt = body["prompt"] if kind == "vllm" else body["input_ids"]
                longest, seed = (
                    ask[k] for k in (("max_tokens", "seed") if kind == "vllm" else ("max_new_tokens", "sampling_seed"))
                )
                done = engine.generate([prompt], Sampling(longest, stop=tuple(ask["stop"])), seed=(seed,))[0][0]
            finish = "stop" if done.finished else "length"
            if kind == "vllm":
                log_probs = {"token_logprobs": done.log_probs}
                return {"choices": [{"token_ids": done.tokens, "logprobs": log_probs, "finish_reason": finish}]}
            drawn = [[p, t, None] for p, t in zip(done.log_probs, done.tokens)]
            return {"meta_info": {"prompt_tokens": len(prompt), "weight_version": "default", "finish_reason": {"type": finish},
                                  "output_token_logprobs": drawn}}  # fmt: skip

        return http(answer), seen

    return start


@pytest.mark.parametrize("kind", ["vllm", "sglang"])
def test_a_servers_own_model_writes(kind, serve, tiny_model, tmp_path, monkeypatch, seed):
    """No weights are loaded here, none are sent; a server that fails is told, and the same command goes on."""
    pytest.importorskip("httpx2", reason="the server engine needs httpx2 (Python 3.11 or newer)")
    url, seen = serve(kind)
    options = dict(engine=kind, reward=["tests_pairs_rewards:length"], stop=["a", "e", "7"], seed=seed)
    monkeypatch.setattr(samples, "load_for_generation", None)
    card = pairs.pairs(config_of(tiny_model(), tmp_path / "whole", server=url, **options))
    rows = lines(tmp_path / "whole" / "samples.jsonl")
    assert len(rows) == len(seen) == 48 and card["drawn"]["weights"] == "served as tiny"
    assert len({row["completion"] for row in rows}) > 12, "a seed of its own each"
    tokenizer = load_tokenizer(str(tiny_model()))
    sent = [tokenizer.decode(body["prompt" if kind == "vllm" else "input_ids"]) for body in seen]
    assert sum(text.endswith(EMPTY) for text in sent) == 24
    assert not any(body.keys() & {"cache_salt", "extra_key"} for body in seen)
    broken, _ = serve(kind, fault=(40, (400, {"error": "no more"})))
    with pytest.raises(Refusal, match=r"HTTP 400: .*no more.*\(the same command goes on from the last whole batch\)"):
        pairs.pairs(config_of(tiny_model(), tmp_path / "part", server=broken, **options))
    assert len(lines(tmp_path / "part" / "samples.jsonl")) == 32
    again = pairs.pairs(config_of(tiny_model(), tmp_path / "part", server=url, **options))
    assert again == card
    for name in ("samples.jsonl", "pairs.jsonl"):
        assert (tmp_path / "part" / name).read_bytes() == (tmp_path / "whole" / name).read_bytes()


def test_rejection_sampling_by_a_servers_model(serve, tiny_model, tmp_path):
    """`longtrace sample` is made of the same parts."""
    pytest.importorskip("httpx2", reason="the server engine needs httpx2 (Python 3.11 or newer)")
    url, seen = serve("vllm")
    config = SampleConfig(
        model=str(tiny_model()), data=[CHAINS], out=tmp_path / "out", samples=2, max_new_tokens=8, stop=["a", "e", "7"],
        require=["tests_pairs_rewards:length=2"], engine="vllm", server=url,
    )  # fmt: skip
    counts = sample(config)["counts"]
    assert len(seen) == counts["samples"] == 12 and 0 < counts["kept"] == len(lines(tmp_path / "out" / "kept.jsonl"))


def test_a_judge_scores_the_answers(http, tiny_model, tmp_path, written):
    pytest.importorskip("httpx2", reason="the judge needs httpx2 (Python 3.11 or newer)")
    seen = []

    def answer(path, body):
        if body is None:
            return {"data": [{"id": "judge"}]}
        material = json.loads(body["messages"][-1]["content"])
        seen.append(material)
        mark = material["answer"].split()[-1]
        said = "no idea" if mark == "3" else json.dumps({"reason": "so", "score": int(mark)})
        return {"choices": [{"message": {"content": said}}]}

    url = http(answer)
    written(lambda text, path, n: thought(f"t {n}") if path == "trace" else f"e {n}")
    card = pairs.pairs(config_of(tiny_model(), tmp_path / "out", reward=[f"judge:{url}=0.1"]))
    assert card["counts"]["paths"]["trace"]["no_verdict"] == card["counts"]["paths"]["empty"]["no_verdict"] == 6
    assert "secret" not in json.dumps(seen) and len(seen) == 6 * 2 * 4
    for row in lines(tmp_path / "out" / "pairs.jsonl"):
        assert row["provenance"]["samples"] == {"chosen": 2, "rejected": 0, "empty_chosen": 2, "empty_rejected": 0}
        assert row["scores"]["chosen"] == pytest.approx(0.2) and row["rewards"]["chosen"] == {f"judge:{url}": 2.0}


def test_a_template_that_closes_the_thought_has_one_path(tiny_model, tmp_path, written):
    closed = OPENED.replace("<think>\n", EMPTY)
    writer = written(lambda text, path, n: f"e {n}", closed)
    with pytest.raises(
        Refusal, match=r"--paths trace empty: the template closes the thought of 6 of 6 prompts itself, so"
    ):
        pairs.pairs(config_of(tiny_model(), tmp_path / "out"))
    assert not writer.asked and not (tmp_path / "out").exists()
    assert pairs.pairs(config_of(tiny_model(), tmp_path / "out", paths=["empty"]))["counts"]["rows"] == 6


# ---- refusals -----------------------------------------------------------------------------------------------------------


def test_refusals(tiny_model, tmp_path, written):
    def refused(said, **changes):
        with pytest.raises(Refusal, match=said) as caught:
            pairs.pairs(config_of(tiny_model(), tmp_path / "out", **changes))
        assert "\n" not in str(caught.value) and not (tmp_path / "out").exists()

    refused("--samples 1: accepted: 2 or more", samples=1)
    refused("--min-margin -1: accepted: 0 or more", min_margin=-1)
    refused("--min-margin nan: accepted: 0 or more", min_margin=float("nan"))
    refused("--temperature 0: --samples 4 would all be the same", temperature=0)
    refused("--paths none: accepted: trace, empty or both", paths=[])
    refused("--paths empty empty: accepted: trace, empty or both, each once", paths=["empty", "empty"])
    refused("--reward format=0.5: it reads the thought", reward=["accuracy", "format=0.5"])
    refused("--reward: found none", reward=[])
    refused("--reward taste: accepted: accuracy", reward=["taste"])
    refused("--reward judge:there: accepted: judge:http://HOST:PORT", reward=["judge:there"])
    refused("--server http://h:1 needs --engine", server="http://h:1")
    refused("--engine vllm: found --server 'here'; accepted: http://HOST:PORT", engine="vllm", server="here")
    refused("--server-timeout 0: accepted: above 0", server_timeout=0)
    refused(r"a prompt of \d+ tokens; accepted: up to 12", max_new_tokens=500)
    tokenizer, (row,) = load_tokenizer(str(tiny_model())), list(read_rows(CHAINS))[:1]
    text = tokenizer.apply_chat_template(row.messages[:1], tokenize=False, add_generation_prompt=True)
    room = len(tokenizer(text)["input_ids"])
    refused(  # the trace's prompt has room, the other has not
        rf"a prompt of {room + 6} tokens; accepted: up to {room} ", max_new_tokens=512 - room, limit=1
    )
    (tmp_path / "rows.jsonl").write_text('{"problem": "no answer"}\n')
    refused("rows.jsonl:1: nothing to check with", data=[str(tmp_path / "rows.jsonl")], reward=["accuracy"])


def test_a_folder_of_something_else_is_refused(tiny_model, tmp_path, written):
    written(lambda text, path, n: thought(f"t {n}") if path == "trace" else f"e {n}")
    out = tmp_path / "out"
    pairs.pairs(config_of(tiny_model(), out))
    with pytest.raises(Refusal, match="drawn with other samples"):
        pairs.pairs(config_of(tiny_model(), out, samples=5))
    text = (out / "samples.jsonl").read_text().splitlines(keepends=True)
    (out / "samples.jsonl").write_text("".join([*text[:9], "{broken\n", *text[10:]]))
    with pytest.raises(Refusal, match=r"samples.jsonl: lines 9 to 16: broken JSON"):
        pairs.pairs(config_of(tiny_model(), out))
    (out / "card.json").write_text('{"drawn": 3}')
    with pytest.raises(Refusal, match=r"card.json: not the card of a sampling"):
        pairs.pairs(config_of(tiny_model(), out))

"""`longtrace sample`: what is kept, and that a killed run ends in the same bytes as one that was let be."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch

from longtrace.trainer import keep, rewards, sample
from longtrace.trainer.config import Refusal, SFTConfig
from longtrace.trainer.model import load_for_generation, load_tokenizer
from longtrace.trainer.rollout import Completion
from longtrace.trainer.rows import read_rows
from longtrace.trainer.sample import SampleConfig
from longtrace.trainer.traces import load_traces
from longtrace.trainer.train import sft

CHAINS = "generated:chain,steps=2,modulus=10,rows=10"


def config_of(folder, out, **changes):
    defaults = dict(
        model=str(folder), data=[CHAINS], out=out, samples=4, max_new_tokens=12, batch_size=3, slots=5, dtype="fp32"
    )
    return SampleConfig(**(defaults | changes))


def lines(path):
    return [json.loads(line) for line in Path(path).read_text().splitlines()]


@pytest.fixture
def written(tiny_model, monkeypatch):
    """written(fn): the engine's place is taken by one that writes fn(problem's text, seed, number), None = cut off."""

    def write(fn, template=None):
        model, tokenizer = load_for_generation(str(tiny_model()), torch.device("cpu"))
        tokenizer.chat_template = template or tokenizer.chat_template

        class Writer:
            calls = 0

            def generate(self, prompts, sampling, *, samples, seed, progress):
                Writer.calls += 1
                asked = [tokenizer.decode(tokens) for tokens in prompts]
                texts = [[fn(text, (*seed, g), n) for n in range(samples)] for g, text in enumerate(asked)]
                progress(samples * len(prompts), 7)
                return [
                    [
                        Completion(tokenizer(t or "cut", add_special_tokens=False)["input_ids"], [], t is not None)
                        for t in ts
                    ]
                    for ts in texts
                ]

        Writer.model, Writer.tokenizer = model, tokenizer
        monkeypatch.setattr(sample, "load_engine", lambda config: Writer())
        return Writer

    return write


def answers_of(spec=CHAINS):
    return {row.raw["problem"]: row.raw["answer"] for row in read_rows(spec)}


def answer_in(text):
    return next(answer for problem, answer in answers_of().items() if problem in text)


def right(text, seed, number):
    """0 right with a thought, 1 right and shorter, 2 wrong, 3 cut off."""
    answer = answer_in(text)
    return [
        f"<think>\nlong, long thought\n</think>\n\nThe answer is \\boxed{{{answer}}}.",
        f"<think>\nshort\n</think>\n\n\\boxed{{{answer}}}",
        f"<think>\nshort\n</think>\n\n\\boxed{{{(int(answer) + 1) % 10}}}",
        None,
    ][number]


def test_right_ones_are_kept_and_sft_takes_them(tiny_model, tmp_path, written, capsys):
    written(right)
    card = sample.sample(config_of(tiny_model(), tmp_path / "out"))
    assert card["counts"] | {"sha256": ""} == {
        "problems": 10, "samples": 40, "cut_off": 10, "right": 20, "wrong": 10, "tokens": card["counts"]["tokens"],
        "passed": 20, "duplicates": 0, "kept": 20, "problems_kept": 10, "tokens_kept": card["counts"]["tokens_kept"],
        "pass@1": 0.5, "pass@4": 1.0, "sha256": "",
    }  # fmt: skip
    assert json.loads((tmp_path / "out" / "card.json").read_text()) == card
    rows = lines(tmp_path / "out" / "kept.jsonl")
    assert sum(row["tokens"] for row in rows) == card["counts"]["tokens_kept"]
    assert {row["provenance"]["problem"] for row in rows} == set(range(10))
    first = rows[0]
    assert first["trace"].startswith("<think>\nlong") and first["answer"] == answers_of()[first["problem"]]
    assert first["correct"] is True and first["rewards"] == {"accuracy": 1.0} and first["steps"] == 2
    assert first["provenance"] | {"model": ""} == {
        "model": "", "seed": 0, "temperature": 1.0, "top_p": 1.0, "top_k": 0, "max_new_tokens": 12, "problem": 0, "sample": 0
    }  # fmt: skip
    again = list(read_rows(str(tmp_path / "out" / "kept.jsonl")))  # checked anew from the file, by the same verifier
    assert rewards.score([rewards.Completion(r.messages[-1]["content"], r) for r in again]) == [1.0] * 20
    traces = load_traces(
        [str(tmp_path / "out" / "kept.jsonl")], load_tokenizer(str(tiny_model())), max_tokens=256, progress=False
    )
    assert traces.audit.rows_whole == 20 and traces.audit.checks["kept"].passed == 20
    done = sft(
        SFTConfig(
            model=str(tiny_model()), data=[str(tmp_path / "out" / "kept.jsonl")], out=tmp_path / "sft", max_tokens=256,
            steps=1, dtype="fp32", activation_checkpointing="off",
        )
    )  # fmt: skip
    assert done.steps == 1
    printed = capsys.readouterr().out
    assert "pass@1 50.0%" in printed and "pass@4 100.0%" in printed and "kept, of 10 problems" in printed


def test_choosing_again_draws_nothing(tiny_model, tmp_path, written):
    """Another policy on the same samples: they are not drawn again."""
    writer = written(right)
    out = tmp_path / "out"
    sample.sample(config_of(tiny_model(), out))
    assert writer.calls == 4
    before = (out / "samples.jsonl").read_bytes()
    card = sample.sample(config_of(tiny_model(), out, per_problem=1, prefer="shortest"))
    assert writer.calls == 4 and card["counts"]["kept"] == 10
    assert {row["provenance"]["sample"] for row in lines(out / "kept.jsonl")} == {1}
    sample.sample(config_of(tiny_model(), out, per_problem=1))
    drawn = [row["provenance"]["sample"] for row in lines(out / "kept.jsonl")]
    assert set(drawn) == {0, 1} and (out / "samples.jsonl").read_bytes() == before
    with pytest.raises(Refusal, match=r"drawn with other rewards \(\['accuracy'\], now \['accuracy', 'format'\]\)"):
        sample.sample(config_of(tiny_model(), out, require=["format", "accuracy"]))


def test_equal_ones_count_once(tiny_model, tmp_path, written):
    written(lambda text, seed, number: f"\\boxed{{{answer_in(text)}}}")
    card = sample.sample(config_of(tiny_model(), tmp_path / "out"))
    assert card["counts"]["duplicates"] == 30 and card["counts"]["kept"] == 10
    assert [row["provenance"]["sample"] for row in lines(tmp_path / "out" / "kept.jsonl")] == [0] * 10


def test_requirements_add_up_and_may_leave_accuracy_out(tiny_model, tmp_path, written):
    """Number 0 and 1 are right, 0 alone has the format: what is below any of the least leaves."""
    written(lambda text, seed, n: right(text, seed, n) if n != 1 else f"\\boxed{{{answer_in(text)}}}")
    both = sample.sample(config_of(tiny_model(), tmp_path / "both", require=["accuracy", "format=0.5"]))
    assert both["counts"]["right"] == 20 and both["counts"]["passed"] == 10
    (tmp_path / "plain.jsonl").write_text('{"problem": "say it"}\n')
    written(lambda text, seed, n: [None, "one word", "12 + 4", " "][n])
    plain = dict(data=[str(tmp_path / "plain.jsonl")], require=["language:zh=0.5"])
    card = sample.sample(config_of(tiny_model(), tmp_path / "plain", **plain))
    assert [row["trace"] for row in lines(tmp_path / "plain" / "kept.jsonl")] == ["12 + 4"], "the last is empty"
    assert "pass@1" not in card["counts"] and lines(tmp_path / "plain" / "kept.jsonl")[0]["correct"] is None


def test_a_template_that_opens_the_thought(tiny_model, tmp_path, written):
    """The completion begins inside the thought: it is read so, and the row has the opening tag."""
    opened = "{% for m in messages %}{{ m['content'] }}{% endfor %}{% if add_generation_prompt %}<think>\n{% endif %}"
    written(
        lambda text, seed, n: f"thought\n</think>\n\n\\boxed{{{answer_in(text)}}}" if n else answer_in(text), opened
    )
    card = sample.sample(config_of(tiny_model(), tmp_path / "out", require=["accuracy", "format"], samples=2))
    assert card["counts"]["right"] == 10 and card["counts"]["wrong"] == 10
    assert all(row["trace"].startswith("<think>\nthought\n</think>") for row in lines(tmp_path / "out" / "kept.jsonl"))


def test_conversations_stay_conversations_and_other_fields_stay(tiny_model, tmp_path, written):
    rows = [
        {"messages": [{"role": "system", "content": "be brief"}, {"role": "user", "content": "1+1?"}], "answer": 2, "id": "a"},
        {"prompt": "1+1?", "completion": "an old text", "reasoning": "old", "finish_reason": "length", "answer": "2", "id": "b"},
        {"problem": "1+1?", "tokens": 3, "correct": False, "answer": "2", "note": "half \ud83d", "id": "c"},
    ]  # fmt: skip
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    written(lambda text, seed, n: "It is\n2")
    sample.sample(config_of(tiny_model(), tmp_path / "out", data=[str(tmp_path / "rows.jsonl")], samples=1))
    kept = lines(tmp_path / "out" / "kept.jsonl")
    assert kept[0]["messages"] == [*rows[0]["messages"], {"role": "assistant", "content": "It is\n2"}]
    assert [row["id"] for row in kept] == ["a", "b", "c"] and kept[2]["note"] == "half \ud83d"
    for row in kept[1:]:
        assert (row["problem"], row["trace"], row["correct"], row["tokens"]) == ("1+1?", "It is\n2", True, 7)
        assert not row.keys() & {"prompt", "completion", "reasoning", "finish_reason"}
    again = list(read_rows(str(tmp_path / "out" / "kept.jsonl")))
    assert [row.messages[-1]["content"] for row in again] == ["It is\n2"] * 3 and all(row.finished for row in again)


KILLER = """
import os, signal
left = int(os.environ.get("BATCHES", "1000"))

def digits(completions, rows):
    global left
    left -= 1
    if left < 0:
        os.kill(os.getpid(), signal.SIGKILL)
    return [sum(c.isdigit() for c in t) / max(len(t), 1) for t in completions]
"""


@pytest.mark.skipif(not hasattr(os, "killpg"), reason="SIGKILL")
def test_a_killed_run_ends_in_the_same_bytes(tiny_model, tmp_path, monkeypatch, seed):
    """SIGKILL while the third of four batches is checked; a half-written line besides; then the same command again."""
    (tmp_path / "tests_sample_rewards.py").write_text(KILLER)
    monkeypatch.chdir(tmp_path)
    options = dict(require=["tests_sample_rewards:digits=0.05"], seed=seed, max_new_tokens=16)
    whole, part = tmp_path / "whole", tmp_path / "part"
    card = sample.sample(config_of(tiny_model(), whole, **options))
    assert 0 < card["counts"]["kept"] < 40 and card["counts"]["cut_off"] > 0
    program = "import sys; sys.path[:] = eval(sys.argv[1]); from longtrace.trainer import cli; sys.exit(cli.main(sys.argv[2:]))"
    path = [str(tmp_path), *(p or os.getcwd() for p in sys.path)]
    flags = f"sample --model {tiny_model()} --data {CHAINS} --out {part} --samples 4 --max-new-tokens 16 --batch-size 3"
    flags += f" --slots 5 --dtype fp32 --require tests_sample_rewards:digits=0.05 --seed {seed}"
    killed = subprocess.run(
        [sys.executable, "-c", program, repr(path), *flags.split()], env=os.environ | {"BATCHES": "2"}, timeout=300
    )
    assert killed.returncode == -9
    assert len(lines(part / "samples.jsonl")) == 2 * 3 * 4 and not (part / "kept.jsonl").exists()
    with (part / "samples.jsonl").open("ab") as file:  # what a kill in the middle of a write leaves
        file.write((whole / "samples.jsonl").read_bytes().splitlines(keepends=True)[24] + b'{"problem": "half a li')
    again = sample.sample(config_of(tiny_model(), part, **options))
    assert again == card
    for name in ("samples.jsonl", "kept.jsonl", "card.json"):
        assert (part / name).read_bytes() == (whole / name).read_bytes(), name


def test_samples_do_not_depend_on_the_slots(tiny_model, tmp_path, seed):
    """Nor, then, on where in a batch a completion ends: every one has a stream of its own."""
    texts = []
    for slots in (1, 40):
        sample.sample(config_of(tiny_model(), tmp_path / str(slots), slots=slots, seed=seed, require=["format"]))
        texts.append([row["trace"] for row in lines(tmp_path / str(slots) / "samples.jsonl")])
    assert texts[0] == texts[1] and len(set(texts[0])) > 30


def test_another_model_prompts_or_settings_are_refused(tiny_model, tmp_path, written):
    writer = written(right)
    out = tmp_path / "out"
    sample.sample(config_of(tiny_model(), out))
    for changes, said in (
        (dict(temperature=0.5), r"drawn with other temperature \(1.0, now 0.5\)"),
        (dict(seed=1), r"drawn with other seed \(0, now 1\)"),
        (dict(batch_size=4), "drawn with other batch-size"),
        (dict(data=[CHAINS + ",seed=1"]), "drawn with other prompts;"),
        (dict(limit=9), "drawn with other prompts;"),
    ):
        with pytest.raises(Refusal, match=said):
            sample.sample(config_of(tiny_model(), out, **changes))
    with torch.no_grad():
        next(writer.model.parameters()).add_(1e-3)
    with pytest.raises(Refusal, match="drawn with other weights;"):
        sample.sample(config_of(tiny_model(), out))


def test_refusals(tiny_model, tmp_path, written):
    def refused(said, **changes):
        with pytest.raises(Refusal, match=said) as caught:
            sample.sample(config_of(tiny_model(), tmp_path / "out", **changes))
        assert "\n" not in str(caught.value)

    refused("--samples 0: accepted: 1 or more", samples=0)
    refused("--top-p 0: accepted: above 0", top_p=0)
    refused("--temperature 0: --samples 4 would all be the same", temperature=0)
    refused("--stop: found an empty string", stop=[""])
    refused("--require: found none", require=[])
    refused("--require taste: accepted: accuracy", require=["taste"])
    refused(r"--max-new-tokens 512: accepted: below the model's context \(512\)", max_new_tokens=512)
    refused(r"a prompt of \d+ tokens; accepted: up to 12 \(the model's context", max_new_tokens=500)
    (tmp_path / "rows.jsonl").write_text('{"problem": "1+1?", "answer": "2"}\n{"problem": "no answer"}\n')
    refused("rows.jsonl:2: nothing to check with", data=[str(tmp_path / "rows.jsonl")])
    assert not (tmp_path / "out").exists(), "nothing is left where nothing was begun"
    written(lambda text, seed, n: "2")
    done = sample.sample(
        config_of(tiny_model(), tmp_path / "one", data=[str(tmp_path / "rows.jsonl")], skip_bad_rows=True)
    )
    assert done["counts"]["problems"] == 1
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "mine.txt").write_text("")
    refused("holds something other than samples")
    (tmp_path / "one" / "card.json").write_text("{")
    with pytest.raises(Refusal, match=r"card.json: not the card of a sampling"):
        sample.sample(config_of(tiny_model(), tmp_path / "one"))


def test_a_line_that_was_changed_is_named(tiny_model, tmp_path, written):
    written(right)
    sample.sample(config_of(tiny_model(), tmp_path / "out"))
    path = tmp_path / "out" / "samples.jsonl"
    text = path.read_text().splitlines(keepends=True)
    path.write_text("".join([*text[:5], "{broken\n", *text[6:]]))
    with pytest.raises(Refusal, match=r"samples.jsonl: lines 5 to 8: broken JSON"):
        sample.sample(config_of(tiny_model(), tmp_path / "out"))
    assert lines(tmp_path / "out" / "kept.jsonl"), "what was kept before stays until the new file is whole"


def test_what_is_picked(seed):
    import numpy as np

    rows = [{"trace": text, "tokens": len(text)} for text in ("aaa", "b", "aaa", "cc", "dddd")]

    def pick(most, prefer="random", passing=(0, 1, 2, 3, 4), draw=seed):
        return keep.pick(rows, list(passing), most, prefer, np.random.default_rng(draw))

    assert pick(0) == [0, 1, 3, 4] and pick(0, passing=(2, 3)) == [2, 3] and pick(3, passing=()) == []
    assert pick(1, "shortest") == [1] and pick(2, "shortest") == [1, 3] and pick(9, "shortest") == [0, 1, 3, 4]
    counts = np.bincount([pick(1, draw=i)[0] for i in range(400)], minlength=5)
    assert counts[2] == 0 and (counts[[0, 1, 3, 4]] > 60).all(), "each of the four distinct ones equally often"

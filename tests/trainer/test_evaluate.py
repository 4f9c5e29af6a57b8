"""Evaluation by generation: what counts as solved, what as cut off, and that batching and order change nothing."""

from __future__ import annotations

import json
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch

from longtrace.trainer import demo, evaluate, tasks
from longtrace.trainer.config import Refusal
from longtrace.trainer.rows import Row, read_rows

CHAINS = "generated:chain,steps=3,modulus=10,rows=12,split=test"


@pytest.fixture(scope="module")
def tokenizer():
    return demo.make_tokenizer([f"{CHAINS},style=verbose"])


class Stub:
    """A model that writes what `say(problem)` returns, with or without the end token, as `generate` would."""

    def __init__(self, tokenizer, say, ends=True, context=4096):
        self.tokenizer, self.say, self.ends = tokenizer, say, ends
        self.device = torch.device("cpu")
        self.config = SimpleNamespace(
            get_text_config=lambda: SimpleNamespace(max_position_embeddings=context) if context else None
        )
        self.generation_config = SimpleNamespace(eos_token_id=tokenizer.eos_token_id)
        self.batches = []

    def generate(self, input_ids, attention_mask, max_new_tokens, pad_token_id, eos_token_id, **options):
        self.batches.append((tuple(input_ids.shape), options))
        written = []
        for ids, mask in zip(input_ids, attention_mask):
            assert (mask.diff() >= 0).all(), "padding stands on the left"
            prompt = self.tokenizer.decode(ids[mask.bool()])
            assert prompt.startswith("<|user|>") and prompt.endswith("<|assistant|>")
            text = self.say(prompt.removeprefix("<|user|>").removesuffix("<|assistant|>"))
            tokens = self.tokenizer(text, add_special_tokens=False)["input_ids"]
            written.append([*tokens, *([eos_token_id[0]] if self.ends else [])][:max_new_tokens])
        width = max(map(len, written))
        new = torch.tensor([tokens + [pad_token_id] * (width - len(tokens)) for tokens in written])
        return torch.cat([input_ids, new], 1)


def known(rows, change=lambda row: row.raw["trace"]):
    return {row.raw["problem"]: change(row) for row in rows}.__getitem__


def test_right_wrong_and_their_interval(tokenizer):
    rows = list(read_rows(CHAINS))
    wrong = {row.raw["problem"] for row in rows[:3]}
    say = known(rows, lambda r: "\\boxed{11}" if r.raw["problem"] in wrong else r.raw["trace"])
    result = evaluate.solved_rate(Stub(tokenizer, say), tokenizer, rows, max_new_tokens=100, progress=False)
    assert result["solved_rate"] == 0.75 and result["n"] == 12 and result["cut_off"] == 0
    assert (result["ci_low"], result["ci_high"]) == evaluate.wilson(9, 12)
    assert [s["solved"] for s in result["samples"]] == [False] * 3 + [True] * 9
    assert [s["problem"] for s in result["samples"]] == [row.raw["problem"] for row in rows]
    lengths = [len(tokenizer(s["completion"], add_special_tokens=False)["input_ids"]) + 1 for s in result["samples"]]
    assert [s["tokens"] for s in result["samples"]] == lengths  # the end token counts
    assert result["mean_tokens"] == sum(lengths) / 12
    json.dumps(result)


def test_a_completion_that_reaches_the_limit_is_cut_off_not_wrong(tokenizer):
    rows = list(read_rows(CHAINS))
    result = evaluate.solved_rate(Stub(tokenizer, known(rows)), tokenizer, rows, max_new_tokens=20, progress=False)
    assert result["cut_off"] == 12 and result["solved_rate"] == 0
    # an answer that is there, but never ends, is not a finished one
    endless = Stub(tokenizer, known(rows), ends=False)
    result = evaluate.solved_rate(endless, tokenizer, rows, max_new_tokens=500, progress=False)
    assert result["cut_off"] == 12 and result["solved_rate"] == 0


def test_batches_group_by_length_and_keep_the_order(tokenizer):
    rows = [row for steps in (9, 2, 6) for row in read_rows(f"generated:chain,steps={steps},modulus=10,rows=5")]
    model = Stub(tokenizer, known(rows))
    result = evaluate.solved_rate(model, tokenizer, rows, max_new_tokens=200, batch_size=5, progress=False)
    assert result["solved_rate"] == 1
    assert [s["answer"] for s in result["samples"]] == [row.answer for row in rows]
    widths = [shape[1] for shape, _ in model.batches]
    assert [shape[0] for shape, _ in model.batches] == [5, 5, 5] and widths == sorted(widths) and len(set(widths)) == 3


def test_greedy_and_sampling_options(tokenizer):
    rows = list(read_rows(CHAINS))
    model = Stub(tokenizer, known(rows))
    for temperature in (0.0, 0.7):
        evaluate.solved_rate(
            model, tokenizer, rows, max_new_tokens=100, temperature=temperature, top_p=0.9, progress=False
        )
    assert model.batches[0][1] == {"do_sample": False}
    assert model.batches[1][1] == {"do_sample": True, "temperature": 0.7, "top_p": 0.9, "top_k": 0}


def test_a_template_that_opens_the_thought(tokenizer, tmp_path):
    template = tmp_path / "opens.jinja"
    template.write_text("<|user|>{{ messages[0]['content'] }}<|assistant|>{{ '<think>\\n' }}")
    rows = list(read_rows(CHAINS))

    class Thinking(Stub):
        def generate(self, input_ids, **options):
            for ids in input_ids:
                assert self.tokenizer.decode(ids).endswith("<think>\n")
            tokens = self.tokenizer("\\boxed{1}", add_special_tokens=False)["input_ids"] + options["eos_token_id"][:1]
            return torch.cat([input_ids, torch.tensor([tokens] * len(input_ids))], 1)

    result = evaluate.solved_rate(
        Thinking(tokenizer, None), tokenizer, rows, max_new_tokens=50, template=str(template), progress=False
    )
    assert result["solved_rate"] == 0  # the thought was opened by the prompt and never closed
    assert result["samples"][0]["completion"] == "<think>\n\\boxed{1}"


def test_the_context_is_respected(tokenizer):
    rows = list(read_rows(CHAINS))
    with pytest.raises(Refusal, match=r"--max-new-tokens 100: with a prompt of .* accepted: up to"):
        evaluate.solved_rate(Stub(tokenizer, known(rows), context=110), tokenizer, rows, max_new_tokens=100)


def test_no_rows_and_rows_without_an_answer(tokenizer):
    with pytest.raises(Refusal, match="no problems"):
        evaluate.solved_rate(None, tokenizer, [], max_new_tokens=1)
    row = Row([{"role": "user", "content": "?"}], None, "file.jsonl:3", {})
    with pytest.raises(Refusal, match=r"file.jsonl:3: answer: missing"):
        evaluate.solved_rate(None, tokenizer, [row], max_new_tokens=1)


@pytest.mark.parametrize(
    "answer,completion,right",
    [
        ("42", "<think>\nhm\n</think>\n\\boxed{42}", True),
        ("\\frac{1}{2}", "\\boxed{0.5}", True),
        ("1/2", "\\boxed{\\dfrac{1}{2}}", True),
        ("(3, \\frac{\\pi}{2})", "\\boxed{\\left( 3, \\frac{\\pi}{2} \\right)}", True),
        ("2\\sqrt{3}", "\\boxed{\\sqrt{12}}", True),
        ("42", "\\boxed{43}", False),
        ("42", "The answer is 42.", True),
        ("42", "<think>\n\\boxed{42}", False),
        ("42", "\\boxed{9^{9^{9^{9}}}}", False),
    ],
)
def test_other_rows_are_compared_by_math_verify(answer, completion, right):
    assert evaluate.is_right(Row([], answer, "", {"problem": "?"}), completion) is right


def test_the_prompt_is_what_stands_before_the_last_answer():
    system, user, assistant = ({"role": role, "content": role} for role in ("system", "user", "assistant"))
    assert evaluate.prompt_of(Row([system, user], "1", "", {})) == [system, user]
    assert evaluate.prompt_of(Row([user, assistant, user, assistant], "1", "", {})) == [user, assistant, user]


@pytest.mark.parametrize("k,n,low,high", [(0, 300, 0.0, 0.01264), (300, 300, 0.98736, 1.0), (9, 12, 0.4677, 0.9111)])
def test_wilson_interval(k, n, low, high):
    assert evaluate.wilson(k, n) == pytest.approx((low, high), abs=2e-4)
    assert evaluate.wilson(0, 0) == (0.0, 1.0)
    assert all(evaluate.wilson(m, m)[1] == 1.0 and evaluate.wilson(0, m)[0] == 0.0 for m in range(1, 500))


@pytest.fixture(scope="module")
def folder(tokenizer, tmp_path_factory):
    """A tiny random model on disk."""
    out = tmp_path_factory.mktemp("model")
    demo.make_model(tokenizer, 0).save_pretrained(out)
    tokenizer.save_pretrained(out)
    return out


def test_evaluate_a_folder_from_a_file_and_from_the_generator(folder, tmp_path):
    data = tmp_path / "problems.jsonl"
    data.write_text("".join(json.dumps({"problem": f"{i}+1?", "answer": str(i + 1)}) + "\n" for i in range(5)))
    config = evaluate.EvaluateConfig(
        model=str(folder), data=[CHAINS, str(data)], limit=15, max_new_tokens=8, out=tmp_path / "a" / "result.json"
    )
    result = evaluate.evaluate(config)
    assert result["n"] == 15 and 0 <= result["solved_rate"] <= 1 and result["mean_tokens"] <= 8
    saved = json.loads((tmp_path / "a" / "result.json").read_text())
    assert saved["samples"] == result["samples"] and saved["config"]["model"] == str(folder)
    assert saved["samples"][-1]["where"].endswith("problems.jsonl:3")
    assert evaluate.evaluate(config)["samples"] == result["samples"]


def test_batched_generation_equals_one_by_one(folder):
    model, tokenizer = evaluate.load_for_generation(str(folder), torch.device("cpu"))
    rows = [row for steps in (2, 5) for row in read_rows(f"generated:chain,steps={steps},modulus=10,rows=4")]
    together, alone = (
        evaluate.solved_rate(model.double(), tokenizer, rows, max_new_tokens=12, batch_size=size, progress=False)
        for size in (8, 1)
    )
    assert [s["completion"] for s in together["samples"]] == [s["completion"] for s in alone["samples"]]


def test_training_problems_are_pointed_out(folder, capsys):
    spec = CHAINS.replace(",split=test", "")
    evaluate.evaluate(evaluate.EvaluateConfig(model=str(folder), data=[spec], limit=2, max_new_tokens=2))
    assert "training problems" in capsys.readouterr().out.replace("\n", " ")


@pytest.mark.parametrize("name,value", [("limit", -1), ("max_new_tokens", 0), ("batch_size", 0), ("temperature", -1.0)])
def test_bad_numbers_are_refused(name, value):
    config = evaluate.EvaluateConfig(model="nowhere", data=[CHAINS])
    setattr(config, name, value)
    with pytest.raises(Refusal, match=f"--{name.replace('_', '-')}"):
        evaluate.evaluate(config)


def test_a_folder_that_is_not_there(tmp_path):
    with pytest.raises(Refusal, match="no such folder"):
        evaluate.evaluate(evaluate.EvaluateConfig(model=str(tmp_path / "none"), data=[CHAINS]))


# ---------------------------------------------------------------------------------------------------------------------
# the demo's own pieces


def test_the_demo_tokenizer_writes_any_text(tokenizer):
    row = next(tasks.rows(CHAINS))
    for text in (row["problem"], row["trace"], "Straße 12\t\n  naïve ∑ 😀", "<thinking></thin k>"):
        assert tokenizer.decode(tokenizer(text, add_special_tokens=False)["input_ids"]) == text
    pieces = tokenizer.tokenize("<think>\n12 + 30 = 42\n</think>")
    assert pieces[0] == "<think>" and pieces[-1] == "</think>" and not any(len(p) > 1 and p.isdigit() for p in pieces)


def test_the_demo_model_is_small_and_full_and_quick_specs_parse(tokenizer):
    assert 200_000 <= sum(p.numel() for p in demo.make_model(tokenizer, 0).parameters()) <= 1_000_000
    assert demo.FULL.steps_of_a_chain >= 6 and demo.FULL.held_out >= 300
    for recipe in (demo.FULL, demo.QUICK):
        train, test = (tasks.parse(recipe.data(0, split)) for split in ("train", "test"))
        assert (train.split, test.split, train.steps) == ("train", "test", test.steps)
        assert tasks.parse(recipe.data(3, style="answer")).seed == 3


def test_the_demo_replaces_only_a_demo(tmp_path):
    config = demo.DemoConfig(out=tmp_path / "runs" / "demo")
    assert demo._fresh_folder(config) == config.out and (config.out / "demo.yaml").is_file()
    (config.out / "sft").mkdir()
    demo._fresh_folder(config)
    assert not (config.out / "sft").exists()
    (tmp_path / "mine").mkdir()
    (tmp_path / "mine" / "thesis.txt").write_text("years of work")
    with pytest.raises(Refusal, match="something other than a demo"):
        demo._fresh_folder(demo.DemoConfig(out=tmp_path / "mine"))


def test_the_demo_holds_itself_to_its_bar():
    good = {"solved_rate_untrained": 0.0, "solved_rate_control": 0.1, "solved_rate_sft": 0.27, "solved_rate_rl": 0.9}
    demo._hold_to(demo.FULL, good)
    for name, value in (("sft", 0.1), ("sft", 0.5), ("rl", 0.69), ("control", 0.35), ("untrained", 0.06)):
        with pytest.raises(SystemExit) as ended:
            demo._hold_to(demo.FULL, good | {f"solved_rate_{name}": value})
        assert ended.value.code == 1
    assert Path(demo.DemoConfig().out) == Path("runs/demo")

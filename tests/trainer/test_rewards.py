"""Rewards: how answers are read, three states, format, language, length, programs, models, users' functions, sums."""

from __future__ import annotations

import json
import math
import sys
import time

import numpy as np
import pytest
import torch

from longtrace.trainer import answers, rewards, tasks
from longtrace.trainer.config import Refusal
from longtrace.trainer.languages import SCRIPTS
from longtrace.trainer.rewards import Completion, Rewards
from longtrace.trainer.rows import Row
from longtrace.trainer.verifier import Verifier


def row(answer=None, where="file.jsonl:1", messages=(), **raw):
    return Row(list(messages), answer, where, {"answer": answer, **raw})


@pytest.fixture(scope="module")
def pool():
    with Verifier(workers=1) as pool:
        yield pool


# ---------------------------------------------------------------------------------------------------------------------
# accuracy


@pytest.mark.parametrize(
    "completion,answer,thinking,verdict",
    [
        ("<think>\nhm\n</think>\n\\boxed{42}", "42", None, 1.0),
        ("\\boxed{42}", "42", None, 1.0),
        ("\\boxed{42}", "42", False, 1.0),
        ("\\boxed{42}", "42", True, 0.0),  # the prompt opened a thought and nothing closed it
        ("hm</think>\\boxed{42}", "42", True, 1.0),
        ("hm</think>\\boxed{42}", "42", None, 1.0),
        ("\\boxed{42}</think>so it is", "42", None, 0.0),
        ("<think>\\boxed{42}", "42", None, 0.0),
        ("<think>\\boxed{42}", "42", False, 1.0),  # read whole, as asked
        ("<think>\\boxed{41}</think>\\boxed{42}", "42", None, 1.0),
        ("<think>\\boxed{42}</think>\\boxed{41}", "42", None, 0.0),
        ("The answer is 3", "3", None, 1.0),
        ("The answer is $\\frac{1}{2}$.", "0.5", None, 1.0),
        ("<think>a</think><answer>\\boxed{3}</answer>", "3", None, 1.0),
        ("<think>a</think><answer>3</answer>", "3", None, 1.0),
        ("2 + 1 = 3", "3", None, 1.0),
        ("\\boxed{3}", "$\\boxed{3}$", None, 1.0),
        ("\\boxed{\\text{yes}}", "Yes", None, 1.0),
        ("", "3", None, 0.0),
    ],
)
def test_accuracy(pool, completion, answer, thinking, verdict):
    assert rewards.accuracy(completion, answer, thinking=thinking, pool=pool) == verdict
    assert rewards.accuracy(completion, answer, finished=False, thinking=thinking, pool=pool) is None


@pytest.mark.parametrize(
    "text,answer",
    [
        ("\\boxed{1} and \\boxed{2}", "2"),
        ("\\boxed{\\frac{1}{2}}", "\\frac{1}{2}"),
        ("\\boxed {3}", "3"),
        ("\\fbox{3}", "3"),
        ("\\boxed{\\boxed{3}}", "3"),
        ("\\boxed{3, \\boxed{4}}", None),
        ("\\boxed{" * 9 + "3" + "}" * 9, "3"),
        ("\\boxed{\\{1, 2\\}}", "\\{1, 2\\}"),
        ("\\boxed{}", None),
        ("\\boxed{3", None),
        ("{ \\boxed{3} } }", "3"),
        ("\\boxed{" + "9" * 1001 + "}", None),
        ("so\n\nThe answer is: **17**.", "17"),
        ("Answer: 17 apples", "17"),
        ("Answer: 17 or 18", None),
        ("The answer is 1, 2 and 3 apples", None),
        ("She has 5 + 2 = 7 apples.", "7"),
        ("There are 12 boys and 13 girls", "13"),
        ("#### 1,234", "1,234"),
        ("答案是１２", "１２"),
        ("Paris", "Paris"),
        ("The answer is Paris.", "Paris"),
        ("Is it 3?", None),
        ("The answer is not 3", None),
        ("I don’t know 3", None),
        ("   \n ", None),
        ("x^2 + 1", "x^2 + 1"),
        ("thus $x = 4$", "x = 4"),
    ],
)
def test_the_final_answer(text, answer):
    assert answers.final_answer(text) == answer


def test_generated_tasks_check_themselves():
    chain = next(tasks.rows("chain,steps=3"))
    countdown = next(tasks.rows("countdown,n=3,style=answer"))
    with Verifier(workers=1) as pool:
        batch = [
            Completion(chain["trace"], Row([], chain["answer"], "", chain)),
            Completion("\\boxed{-1}", Row([], chain["answer"], "", chain)),
            Completion(countdown["trace"], Row([], countdown["answer"], "", countdown)),
            Completion(chain["trace"], Row([], chain["answer"], "", chain), finished=False),
            Completion("so\n</think>\n" + countdown["trace"], Row([], None, "", countdown), thinking=True),
            Completion(countdown["trace"], Row([], None, "", countdown), thinking=True),
        ]
        assert rewards.score(batch, pool) == [1.0, 0.0, 1.0, None, 1.0, 0.0]
        assert pool._workers[0].process is None and pool.counts["asked"] == 0


def test_a_batch_of_all_kinds(pool):
    batch = [
        Completion("\\boxed{\\sqrt{16}}", row("4")),
        Completion("```python\nprint(input()[::-1])\n```", row(tests=[{"input": "abc", "output": "cba"}])),
        Completion("```python\nprint(input())\n```", row(tests=[{"input": "abc", "output": "cba"}])),
        Completion("```\ndef f(): return 1\n```", row(tests=["assert f() == 1"])),
        Completion("```py\ndef f(): return 1\n```", row(tests="assert f() == 2")),
        Completion("```python\nprint(7)\n```", row(tests=json.dumps({"inputs": ["", "x"], "outputs": ["7", "7\n"]}))),
        Completion("def f(): return 1", row(tests=["assert f() == 1"])),
        Completion("```python\nf = 1\n```", row(tests=["assert f"]), finished=False),
        Completion("\\boxed{4}", row("4"), finished=False),
    ]
    assert rewards.score(batch, pool) == [1.0, 1.0, 0.0, 1.0, 0.0, 1.0, 0.0, None, None]
    assert [rewards.kind_of(c.row) for c in batch] == ["math", *["code"] * 7, "math"]


def test_the_last_python_block_counts():
    text = "```python\na = 1\n```\nno:\n```\na = 2\n```\nrun it with\n```bash\npython a.py\n```\n"
    assert answers.last_code_block(text) == "a = 2\n"
    assert answers.last_code_block("```python\nprint('``` no fence')\n```") == "print('``` no fence')\n"
    assert answers.last_code_block("```python\na = 3\n") is None  # never closed
    assert answers.last_code_block("none") is None


@pytest.mark.parametrize(
    "tests", [7, [1], [{"input": "a"}], {"inputs": ["a"], "outputs": []}, [{"input": 1, "output": 2}]]
)
def test_tests_that_cannot_be_read_are_refused(tests):
    with pytest.raises(Refusal, match=r"file.jsonl:1: tests: found .* accepted: asserts"):
        rewards.score([Completion("```\n1\n```", row(tests=tests))])


def test_a_scorer_that_is_not_installed_is_refused():
    class Without:
        def check(self, jobs):
            raise ImportError("No module named 'reasoning_gym'")

    with pytest.raises(Refusal, match=r"No module named 'reasoning_gym'; accepted: pip install 'longtrace\[rl\]'"):
        rewards.score([Completion("3", row("3", metadata={"source_dataset": "chain_sum"}))], Without())


def test_a_row_without_anything_to_check_is_refused():
    with pytest.raises(Refusal, match=r"file.jsonl:1: nothing to check with"):
        rewards.score([Completion("3", row(), finished=False)])


# ---------------------------------------------------------------------------------------------------------------------
# format, language, length


@pytest.mark.parametrize(
    "text,thinking,reward",
    [
        ("<think>\na\n</think>\n\nb", None, 1.0),
        ("a\n</think>\n\nb", True, 1.0),  # the prompt wrote <think>
        ("<think>\na\n</think>\n\nb", True, 0.0),
        ("a\n</think>\n\nb", None, 0.0),
        ("<think>a</think><answer>b</answer>", None, 1.0),
        ("<think>a</think>\n<answer>\nb\n</answer>\n", None, 1.0),
        ("<think>a</think>c<answer>b</answer>", None, 0.0),
        ("<think>a</think><answer>b</answer>c", None, 0.0),
        ("<think>a</think><answer></answer>", None, 0.0),
        ("<think>a</think><answer>b", None, 0.0),
        ("<think>a</think>b</answer>", None, 0.0),
        ("<think></think>b", None, 0.0),
        ("<think>a</think>", None, 0.0),
        ("<think>a", None, 0.0),
        ("b", None, 0.0),
        ("b", True, 0.0),
        ("x<think>a</think>b", None, 0.0),
        ("</think>a<think>b", None, 0.0),
        ("<think>a</think>b<think>c</think>d", None, 0.0),
        ("  <think>a</think>b  ", None, 1.0),
        ("", None, 0.0),
    ],
)
def test_format(text, thinking, reward):
    assert rewards.format_reward(text, thinking=thinking) == reward


@pytest.mark.parametrize(
    "text,language,share",
    [
        ("we add two and two", "en", 1.0),
        ("we add два and два", "en", 3 / 5),
        ("мы складываем два и two", "ru", 4 / 5),
        ("我们计算 the sum", "zh", 2 / 4),
        ("我们计算", "en", 0.0),
        ("わたしは数学", "ja", 1.0),
        ("わたしは数学", "zh", 1 / 3),  # four kana are two words, two ideographs one
        ("안녕 하세요 hello", "ko", 2 / 3),
        ("naïve café, l’été", "fr", 1.0),
        ("στο 12 τέλος", "el", 1.0),
        ("नमस्ते दुनिया", "hi", 1.0),
        ("สวัสดีครับ", "th", 1.0),
        ("مرحبا بالعالم", "ar", 1.0),
        ("שלום olam", "he", 1 / 2),
        ("设 x 为 3，则 $f(x) = two words$", "zh", 1.0),
        ("设 `let x = 3` 为\n```python\nprint('many words here')\n```\n", "zh", 1.0),
        ("设\n```\nnever closed words", "zh", 1.0),
        ("\\frac{1}{2} \\text \\(a word\\) \\[other words\\] $$more words$$ 是", "zh", 1.0),
        ("<think>是</think> https://example.com/some/words", "zh", 1.0),
        ("是 costs from $5 to $6", "zh", 1 / 4),
        ("", "en", 1.0),
        ("12 + 3 = 15 x", "zh", 1.0),
        ("pаypal", "en", 2 / 3),  # the first a is Cyrillic
    ],
)
def test_language_consistency(text, language, share):
    assert rewards.language_consistency(text, language) == pytest.approx(share, abs=1e-12)


def test_languages():
    with pytest.raises(ValueError, match=r"found 'xx'; accepted: .*en.*zh"):
        rewards.language_consistency("a", "xx")
    assert {"en", "fr", "de", "zh", "ja", "ko", "ru", "ar", "hi", "el", "he", "th"} <= SCRIPTS.keys()


def test_language_is_linear_in_the_text():
    began = time.process_time()
    for piece in ("\\[", "\\(", "$", "$$a", "```\n", "```", "`", "<a", "我a", "a\u0301", "http://", "~~~\n````\n"):
        assert 0 <= rewards.language_consistency(piece * ((1 << 18) // len(piece)), "en") <= 1
    assert time.process_time() - began < 60  # hours, if anything were quadratic


def test_soft_overlong_is_dapos():
    """Equation 13: nothing, a line, -1; the paper's own numbers."""
    for length, value in ((0, 0), (16384, 0), (18432, -0.5), (20480, -1), (99999, -1)):
        assert rewards.soft_overlong(length, 20480, 4096) == value
    for limit, buffer in ((100, 0), (100, 101)):
        with pytest.raises(ValueError, match="accepted"):
            rewards.soft_overlong(1, limit, buffer)


# ---------------------------------------------------------------------------------------------------------------------
# reasoning_gym


def gym_rows(spec):
    pytest.importorskip("reasoning_gym")
    from longtrace.trainer.rows import read_rows

    return list(read_rows(f"reasoning_gym:{spec}"))


def test_reasoning_gym_scores_its_own_tasks(pool):
    rows = gym_rows("chain_sum,min_terms=2,max_terms=3,size=4,seed=3")
    right = rows[0].answer
    without = [[r.raw for r in gym_rows("chain_sum,size=3")] for _ in range(2)]
    assert without[0] == without[1]  # the same problems whenever they are read, or no run could be resumed
    assert [rewards.kind_of(r) for r in rows] == ["gym"] * 4
    texts = [f"\\boxed{{{right}}}", right, f"<think>so</think>The answer is {right}.", f"<answer>{right}</answer>"]
    batch = [Completion(text, rows[0]) for text in [*texts, "\\boxed{x}", "", f"<think>{right}"]]
    batch.append(Completion(f"\\boxed{{{right}}}", rows[0], finished=False))
    assert rewards.score(batch, pool)[:4] == [1.0] * 4
    scores = rewards.score(batch, pool)
    assert all(0 <= s < 1 for s in scores[4:7]) and scores[7] is None


def test_reasoning_gym_answers_of_several_lines(pool):
    (first,) = gym_rows("rotate_matrix,size=1,seed=1")
    assert "\n" in first.answer
    batch = [
        Completion(t, first)
        for t in (f"<think>a</think>\n{first.answer}\n", f"<answer>\n{first.answer}\n</answer>", "1 2")
    ]
    scores = rewards.score(batch, pool)
    assert scores[:2] == [1.0, 1.0] and scores[2] < 1


def test_reasoning_gym_rows_survive_a_file(pool, tmp_path):
    from longtrace.trainer.rows import read_rows

    (first,) = gym_rows("chain_sum,size=1,seed=1")
    (tmp_path / "gym.jsonl").write_text(json.dumps(first.raw) + "\n")
    (again,) = read_rows(str(tmp_path / "gym.jsonl"))
    assert rewards.kind_of(again) == "gym" and rewards.score([Completion(again.answer, again)], pool) == [1.0]


@pytest.mark.slow
def test_every_reasoning_gym_task_scores_its_answers(pool):
    factory = pytest.importorskip("reasoning_gym.factory")
    missed = []
    for name in sorted(factory.DATASETS):
        try:
            (first,) = gym_rows(f"{name},size=1,seed=0")
        except (Refusal, ImportError, OSError):
            continue  # needs more options or data
        (value,) = rewards.score([Completion(f"<think>a</think><answer>{first.raw['answer']}</answer>", first)], pool)
        if first.raw["answer"] is not None and value != 1.0:
            missed.append((name, value))
    assert not missed


# ---------------------------------------------------------------------------------------------------------------------
# a reward model


@pytest.fixture(scope="module")
def judge(tmp_path_factory, tiny_model):
    """A random reward model with one output, and a tokenizer with a chat template."""
    from transformers import AutoTokenizer, Qwen2Config, Qwen2ForSequenceClassification

    folder = tmp_path_factory.mktemp("judge")
    tokenizer = AutoTokenizer.from_pretrained(tiny_model("llama"))
    sizes = dict(
        hidden_size=32, intermediate_size=48, num_hidden_layers=2, num_attention_heads=4, num_key_value_heads=2
    )
    config = Qwen2Config(vocab_size=len(tokenizer) + 8, num_labels=1, **sizes)
    torch.manual_seed(0)
    Qwen2ForSequenceClassification(config).save_pretrained(folder)
    tokenizer.save_pretrained(folder)
    return folder


def test_a_reward_model_scores_conversations(judge):
    from longtrace.trainer.reward_model import RewardModel

    user = {"role": "user", "content": "2 + 2?"}
    talks = [
        [user, {"role": "assistant", "content": text}] for text in ("4", "It is four, as everybody knows.", "5", "")
    ]
    alone = RewardModel(str(judge), batch_size=1)(talks)
    assert RewardModel(str(judge), batch_size=4)(talks) == pytest.approx(alone, abs=1e-5)
    assert len(set(alone)) == 4

    # the head reads the very last token: without padding, transformers' own forward says the same
    model = RewardModel(str(judge))
    ids = model.tokenizer.apply_chat_template(talks[1], tokenize=True, return_dict=False)
    with torch.no_grad():
        hidden = model.model.model(torch.tensor([ids])).last_hidden_state[0, -1]
        assert alone[1] == pytest.approx(model.model.score(hidden).item(), abs=1e-5)

    batch = [Completion(f"<think>a</think>{t[1]['content']}", row(messages=[user])) for t in talks[:3]]
    scores = Rewards([f"model:{judge}=2"])(batch)
    assert scores.parts[f"model:{judge}"] == pytest.approx(alone[:3], abs=1e-5)
    assert scores.total == pytest.approx(2 * np.array(alone[:3]), abs=1e-5)


def test_a_thought_without_an_answer_reaches_no_reward_model(judge):
    """It has no verdict; the others are scored as they are without it."""
    user = row(messages=[{"role": "user", "content": "2 + 2?"}])
    said = [
        ("<think>secret", None), ("4", False), ("secret", True), ("<think>a</think> \n", None), ("", None),
        ("<think>a</think>b<think>secret", None), ("<think>a</think>5", None),
    ]  # fmt: skip
    scorer = Rewards([f"model:{judge}"])
    total = scorer([Completion(text, user, thinking=thinking) for text, thinking in said]).total
    alone = scorer([Completion(text, user) for text in ("4", "5")]).total
    assert np.isnan(total).tolist() == [True, False, True, True, True, True, False]
    assert total[[1, 6]] == pytest.approx(alone, abs=1e-5)
    assert np.isnan(scorer([Completion("<think>secret", user)]).total).all()


def test_models_without_one_output_are_refused(tiny_model, tmp_path):
    with pytest.raises(Refusal, match="accepted: a sequence-classification model with one"):
        Rewards([f"model:{tiny_model('llama')}"])
    with pytest.raises(Refusal, match="no such folder"):
        Rewards([f"model:{tmp_path / 'none'}"])


# ---------------------------------------------------------------------------------------------------------------------
# sums


@pytest.fixture
def users(tmp_path, monkeypatch):
    """A user's module in the current folder, which is not on sys.path."""
    (tmp_path / "users_rewards.py").write_text(
        "def brevity(completions, rows): return [1 / (1 + len(c)) for c in completions]\n"
        "def some(completions, rows): return [None if r.get('skip') else 1 for r in rows]\n"
        "def few(completions, rows): return [1]\n"
        "def words(completions, rows): return ['good'] * len(rows)\n"
        "def infinite(completions, rows): return [float('inf')] * len(rows)\n"
        "def nothing(completions, rows): return None\n"
        "constant = 3\n"
    )
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [p for p in sys.path if p])
    yield "users_rewards"
    sys.modules.pop("users_rewards", None)


def test_a_weighted_sum(pool, users):
    specs = ["accuracy", "format=0.5", "language:zh=0.2", f"{users}:some=2", "overlong:100:50"]
    batch = [
        Completion("<think>我们 add</think>\\boxed{3}", row("3"), tokens=75),
        Completion("\\boxed{3}", row("3", skip=True), tokens=10),
        Completion("<think>\\boxed{3}", row("3"), finished=False, tokens=100),
    ]
    scores = Rewards(specs, pool=pool)(batch)
    assert list(scores.parts) == ["accuracy", "format", "language:zh", f"{users}:some", "overlong:100:50"]
    table = np.stack(list(scores.parts.values()), 1)
    expected = [[1, 1, 0.5, 1, -0.5], [1, 0, 1, math.nan, 0], [math.nan, 0, 1, 1, -1]]
    np.testing.assert_array_equal(table, expected)
    np.testing.assert_allclose(scores.total, [1 + 0.5 + 0.1 + 2 - 0.5, 1 + 0.2, 0.2 + 2 - 1], rtol=1e-12)
    assert scores.cut_off.tolist() == [False, False, True] and scores.total.dtype == np.float64


def test_without_any_verdict_the_sum_is_nan(pool):
    scores = Rewards(["accuracy"], pool=pool)([Completion("3", row("3"), finished=False), Completion("3", row("3"))])
    np.testing.assert_array_equal(scores.total, [math.nan, 1.0])
    assert Rewards(["format"])([]).total.shape == (0,)


def test_users_functions(users):
    function = rewards.load(f"{users}:brevity")
    assert function(completions=["abc"], rows=[{}]) == [0.25]
    for name, why in (
        ("few", "found 1 values"),
        ("words", "good"),
        ("infinite", "2 infinite"),
        ("nothing", "NoneType"),
    ):
        with pytest.raises(Refusal, match=f"--reward {users}:{name}: .*{why}.*accepted: a list of 2 numbers"):
            Rewards([f"{users}:{name}"])([Completion("a", row("1"))] * 2)
    with pytest.raises(Refusal, match=f"{users} has no function 'missing'; it has: brevity"):
        rewards.load(f"{users}:missing")
    with pytest.raises(Refusal, match="has no function 'constant'"):
        rewards.load(f"{users}:constant")
    with pytest.raises(Refusal, match="cannot import not_there"):
        rewards.load("not_there:f")


@pytest.mark.parametrize(
    "spec,why",
    [
        ("acuracy", "accepted: accuracy, format"),
        ("format=heavy", "weight: found 'heavy'"),
        ("format=nan", "weight: found 'nan'"),
        ("language:xx", "found language 'xx'; accepted: .*en"),
        ("overlong", "accepted: overlong:LIMIT:BUFFER"),
        ("overlong:10", "accepted: overlong:LIMIT:BUFFER"),
        ("overlong:10:11", "a buffer from 1 to the limit"),
        ("model:", "accepted: accuracy"),
        ("accuracy:3", "cannot import accuracy"),
    ],
)
def test_names_that_are_no_reward(spec, why):
    with pytest.raises(Refusal, match=why):
        Rewards([spec])


def test_a_reward_twice_or_none():
    with pytest.raises(Refusal, match="found twice"):
        Rewards(["format", "format=0.5"])
    with pytest.raises(Refusal, match="found none"):
        Rewards([])

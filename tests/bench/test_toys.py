"""The toy experiments of reinforcement learning: their tasks, what is claimed on paper, and small whole runs."""

import itertools
import json

import numpy as np
import pytest

from longtrace.bench import BenchConfig, bench
from longtrace.bench.experiments import language_consistency, length_bias
from longtrace.trainer import answers, demo, rewards, tasks


def test_the_teacher_mixes_alphabets_and_errs_in_one():
    rows = list(language_consistency.rows("train", 400))
    thoughts = [answers.thought_of(row["trace"]) for row in rows]
    shares = np.array([rewards.language_consistency(thought, "en") for thought in thoughts])
    assert 0.4 < shares.mean() < 0.6 and {0, 1} < set(shares), "all in one alphabet, all in the other, and mixed"
    right = np.array([tasks.solved(row, row["trace"]) for row in rows])
    assert right[shares == 0].mean() > right[shares == 1].mean() + 0.1
    assert all(thought.strip().count("\n") == language_consistency.LINES - 1 for thought in thoughts)
    assert rows == list(language_consistency.rows("train", 400)), "the same rows every time"
    assert not {r["problem"] for r in rows} & {r["problem"] for r in language_consistency.rows("test", 100)}


def test_the_teachers_answer_follows_from_its_lines():
    for row in language_consistency.rows("train", 50):
        lines = answers.thought_of(row["trace"]).strip().split("\n")
        values = [(line.split()[1], line.split()[-1]) for line in lines]
        assert all(before[1] == after[0] for before, after in itertools.pairwise(values))
        assert answers.final_answer(row["trace"]) == values[-1][1]


def test_rewards_see_the_first_digit_alone():
    rows = list(length_bias.rows(200))
    verdicts = [length_bias.ends_low(row["problem"], row["trace"]) for row in rows]
    assert verdicts == ["\nlow" in row["trace"] for row in rows] and 70 < sum(verdicts) < 130
    padded = [row["trace"] + length_bias.FILLER["low"] * 9 for row in rows]
    assert length_bias.low(padded, rows) == [float(v) for v in verdicts]
    assert length_bias.coin(padded, rows) == length_bias.coin([row["trace"] for row in rows], rows)
    assert 70 < sum(length_bias.coin(padded, rows)) < 130
    assert length_bias.low(["", "x"], rows[:2]) == [0, 0]


def test_an_answer_has_the_tokens_that_the_paper_counts():
    rows = list(length_bias.rows(500))
    tokenizer = demo.learn_tokenizer((row[k] for row in rows for k in ("problem", "trace")), length_bias.ALONE)
    for row in rows:
        lines = sum(row["trace"].count(word) for word in length_bias.FILLER.values())
        assert len(tokenizer(row["trace"])["input_ids"]) + 1 == length_bias.TOKENS + lines, "with the end token"


def test_the_push_on_paper_is_that_of_sampled_groups(seed):
    """Groups drawn one by one, with GRPO's formulas written out, against the exact sum."""
    rng, go_on, group, tokens, longest = np.random.default_rng(seed), 0.8, 4, 6, 24
    reward = (rng.random((200_000, group)) < 0.5).astype(float)
    lines = rng.geometric(1 - go_on, reward.shape) - 1
    ended = lines < longest - tokens + 2
    lines = np.minimum(lines, longest - tokens + 2)
    score = lines * (1 - go_on) - go_on * ended
    centred = reward - reward.mean(1, keepdims=True)
    std = reward.std(1, ddof=1, keepdims=True)
    scaled = np.divide(centred, std, where=std > 0, out=np.zeros_like(centred))
    for loss, weighted in (("grpo", scaled / np.minimum(tokens + lines, longest)), ("dr_grpo", centred / longest)):
        exact = length_bias.expected_push(loss, go_on=go_on, tokens=tokens, longest=longest, group=group)
        for side, value in (("right", 1), ("wrong", 0)):
            pushes = (weighted * score * (reward == value)).mean(1)
            assert abs(pushes.mean() - exact[side]) < 5 * pushes.std() / len(pushes) ** 0.5, (loss, side)


def test_on_paper_only_the_divisor_by_length_has_a_bias():
    grpo, constant = (length_bias.expected_push(loss) for loss in ("grpo", "dr_grpo"))
    assert grpo["wrong"] > 1e-3 and grpo["right"] == pytest.approx(-grpo["wrong"], rel=1e-9)
    assert abs(constant["wrong"]) < 1e-15 and abs(constant["right"]) < 1e-15


@pytest.mark.slow
def test_language_consistency_runs(tmp_path):
    bench(BenchConfig("experiments/language_consistency", quick=True, json=tmp_path / "r.json"))
    record = json.loads((tmp_path / "r.json").read_text())
    assert [row["impl"] for row in record["rows"]] == ["cold start", *language_consistency.WEIGHTS]
    assert all(len(runs[0]) == 3 for curves in record["curves"].values() for runs in curves.values())
    assert record["checks"] == [] and (tmp_path / "language_consistency.png").stat().st_size > 20_000


@pytest.mark.slow
def test_length_bias_runs(tmp_path):
    bench(BenchConfig("experiments/length_bias", quick=True, json=tmp_path / "r.json"))
    record = json.loads((tmp_path / "r.json").read_text())
    assert [row["impl"] for row in record["rows"]] == list(length_bias.ARMS)
    first = {arm: [runs[0][0] for runs in curves.values()] for arm, curves in record["curves"].items()}
    assert first["grpo"] == first["dr_grpo"], "the first rollouts are the same"
    assert record["checks"] == [] and (tmp_path / "length_bias.png").stat().st_size > 20_000

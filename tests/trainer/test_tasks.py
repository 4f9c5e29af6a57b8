"""The generated tasks: every line true, lengths as asked, splits apart, the same rows every time."""

from __future__ import annotations

import random
import re
from itertools import islice, product

import pytest

from longtrace.trainer import task_chain, task_countdown, tasks
from longtrace.trainer.config import Refusal

TASKS = ("chain", "countdown")
STYLES = ("concise", "verbose")
LENGTHS = (50, 65, 100, 150, 400, 1500, 5000, 15_000, 32_768)


def rows(spec):
    return list(tasks.rows(spec))


def faults(row):
    return [f"{v.line!r}: {v.reason}" for v in tasks.verify_trace(row) if not v.ok]


@pytest.mark.parametrize("task,style,slips", [*product(TASKS, STYLES, [""]), ("chain", "concise", ",slips=0.3")])
def test_hundreds_of_traces_verify_line_by_line(task, style, slips):
    n = ",n=3" if task == "countdown" else ""
    for row in rows(f"{task},rows=300,style={style}{n}{slips}") + rows(f"{task},rows=40,style={style},split=test"):
        assert not faults(row), row["trace"]
        assert len(tasks.verify_trace(row)) == row["trace"].count("\n") - 2  # each line of the thought, and the answer
        assert tasks.solved(row, row["trace"])


@pytest.mark.parametrize("task,style,length", list(product(TASKS, STYLES, LENGTHS)))
def test_traces_come_in_the_length_asked_for(task, style, length):
    for row in rows(f"{task},target={length},style={style},rows={20 if length < 2000 else 2},seed=3"):
        assert row["tokens"] == tasks.approx_tokens(row["trace"])
        assert abs(row["tokens"] / length - 1) <= 0.15, (row["tokens"], length)
        assert not faults(row)


def test_a_range_of_lengths_is_covered():
    lengths = [row["tokens"] for row in rows("chain,target=100-1600,rows=200")]
    assert min(lengths) >= 85 and max(lengths) <= 1840
    shares = [sum(low <= x < 2 * low for x in lengths) / 200 for low in (100, 200, 400, 800)]
    assert all(0.12 < share < 0.4 for share in shares), shares  # log-uniform: a quarter for each doubling


@pytest.mark.parametrize(
    "spec", ["chain,modulus=10,steps=8", "chain,steps=2", "countdown,n=3", "countdown,style=answer"]
)
def test_train_and_test_problems_never_meet(spec):
    train = {row["problem"] for seed in (0, 1) for row in islice(tasks.rows(f"{spec},seed={seed},rows=2000"), 700)}
    test = {row["problem"] for seed in (0, 1) for row in islice(tasks.rows(f"{spec},seed={seed},split=test"), 700)}
    assert not train & test
    assert {tasks.split_of(p) for p in train} == {"train"} and {tasks.split_of(p) for p in test} == {"test"}


def test_one_problem_in_eight_is_a_test_problem():
    share = sum(tasks.split_of(f"problem {i}") == "test" for i in range(8000)) / 8000
    assert abs(share - 1 / 8) < 0.02


def test_a_million_distinct_chains_by_count():
    # start x (add 1..99, subtract 1..99, multiply by a unit other than 1) for each step
    units = sum(1 for b in range(2, 100) if b % 2 and b % 5)
    assert 100 * (99 + 99 + units) ** 2 > 10**6  # two steps are enough at the default modulus of 100
    assert 10 * (9 + 9 + 3) ** 4 > 10**6  # four at modulus 10
    assert len({row["problem"] for row in rows("chain,rows=3000,style=answer")}) == 3000


def test_a_million_distinct_countdowns_by_count_and_sample():
    triples = 101 * 100 * 99 // 6  # multisets of 3 numbers from 1 to 99
    rng = random.Random(0)
    goals = []
    for _ in range(300):
        state = tuple(sorted(rng.randint(1, 99) for _ in range(3)))
        ends = {end[0] for middle in task_countdown._moves(state) for end in task_countdown._moves(middle)}
        goals.append(sum(10 <= g <= 999 and g not in state for g in ends))
    mean, spread = sum(goals) / 300, (sum(g * g for g in goals) / 300 - (sum(goals) / 300) ** 2) ** 0.5
    assert triples * (mean - 4 * spread / 300**0.5) > 10**6
    drawn = [row["problem"] for row in rows("countdown,n=3,rows=3000,style=answer")]
    # 3000 draws from a million equally likely problems repeat about 4 times; far fewer problems would show
    assert len(drawn) - len(set(drawn)) <= 20


def test_rows_are_the_same_every_time_and_differ_by_seed_and_split():
    for spec in ("chain,style=verbose", "countdown,target=300", "countdown,n=3,style=verbose"):
        first = rows(f"{spec},rows=5")
        assert first == list(islice(tasks.rows(f"generated:{spec},rows=1000000000"), 5))  # and it streams
        assert first != rows(f"{spec},rows=5,seed=1")
        assert first != rows(f"{spec},rows=5,split=test")


def test_styles_write_about_the_same_problems():
    for task in ("chain", "countdown,n=3"):
        problems = [[row["problem"] for row in rows(f"{task},rows=20,style={style}")] for style in tasks.STYLES]
        assert problems[0] == problems[1] == problems[2]


def test_rows_pin_the_text():
    row = rows("chain,steps=3,rows=1,modulus=10,seed=5")[0]
    assert row["problem"].startswith("Start with ") and row["problem"].endswith("\nWhat is the result?")
    assert row["trace"].startswith("<think>\n1. ") and row["trace"].endswith(
        f"\n</think>\n\nThe answer is \\boxed{{{row['answer']}}}."
    )
    assert {k: row[k] for k in ("task", "style", "split", "steps", "modulus")} == {
        "task": "chain", "style": "concise", "split": "train", "steps": 3, "modulus": 10,
    }  # fmt: skip
    answer = rows("chain,steps=3,rows=1,modulus=10,seed=5,style=answer")[0]
    assert answer["problem"] == row["problem"] and answer["trace"] == f"The answer is \\boxed{{{row['answer']}}}."
    assert not faults(answer)


# ---------------------------------------------------------------------------------------------------------------------
# corrupted traces


@pytest.mark.parametrize("task,style", list(product(TASKS, STYLES)))
def test_any_changed_digit_is_caught(task, style):
    spec = "chain,steps=6,slips=0.3" if task == "chain" else "countdown,target=200"
    rng = random.Random(1)
    for row in rows(f"{spec},style={style},rows=30"):
        trace = row["trace"]
        for at in rng.sample([m.start() for m in re.finditer(r"\d", trace)], 10):
            digit = rng.choice([d for d in "0123456789" if d != trace[at]])
            if digit == "0" and not trace[at - 1].isdigit() and trace[at + 1].isdigit():
                continue  # a leading zero is the same number with a digit less: another test's case
            broken = row | {"trace": trace[:at] + digit + trace[at + 1 :]}
            assert faults(broken) or _repaired_slip(broken, row), (trace, at, digit)


def _repaired_slip(broken, row):
    """A slip may say any wrong value, as long as the next line repairs it."""
    verdicts = tasks.verify_trace(broken)
    changed = [i for i, (a, b) in enumerate(zip(broken["trace"].split("\n"), row["trace"].split("\n"))) if a != b]
    return verdicts[changed[0] - 1].label == -1 and "repaired" in verdicts[changed[0] - 1].reason


@pytest.mark.parametrize("task,style", list(product(TASKS, STYLES)))
def test_missing_doubled_and_swapped_lines_are_caught(task, style):
    spec = "chain,steps=6,slips=0.3" if task == "chain" else "countdown,target=250"
    for row in rows(f"{spec},style={style},rows=30"):
        lines = row["trace"].split("\n")
        last = lines.index("</think>")
        slips = {i for i, v in enumerate(tasks.verify_trace(row), 1) if v.label == -1}
        for i in range(1, last):
            without = lines[:i] + lines[i + 1 :]
            if i in slips or (
                task == "countdown" and i < last - 1 and _is_leaf(lines[i]) and _back_after(lines, i) is None
            ):
                continue  # the trace is sound without a slip, or without a leaf of the node where the goal appears
            assert faults(row | {"trace": "\n".join(without)}), (i, row["trace"])
            if i not in slips:
                assert faults(row | {"trace": "\n".join([*lines[:i], lines[i], *lines[i:]])}), (i, row["trace"])
        assert faults(row | {"trace": "\n".join([lines[0], "So far so good.", *lines[1:]])})


def _is_leaf(line):
    return not re.search(r"leav|back|Back", line)


def _back_after(lines, i):
    """The line that goes back from the node of line i, if it is ever left."""
    depth = 0
    for line in lines[i:]:
        if re.search(r"leav", line):
            depth += 1
        elif re.search(r"back|Back", line):
            if depth == 0:
                return line
            depth -= 1
    return None


def test_slips_are_labelled_and_only_repaired_ones_are_sound():
    row = rows("chain,steps=8,slips=1,rows=1,seed=2")[0]
    verdicts = tasks.verify_trace(row)
    assert [v.label for v in verdicts] == [-1, 1] * 8 + [1] and all(v.ok for v in verdicts)
    assert "repaired on the next line" in verdicts[0].reason
    lines = row["trace"].split("\n")
    unrepaired = tasks.verify_trace(row | {"trace": "\n".join(lines[:2] + lines[3:])})
    assert not unrepaired[0].ok and unrepaired[0].label == -1
    idle = rows("chain,steps=4,rows=1")[0]
    first = idle["trace"].split("\n")[1]
    again = idle["trace"].replace(first, f"{first}\nno: {first.split('. ', 1)[1]}", 1)
    assert any("repairs a line that was right" in fault for fault in faults(idle | {"trace": again}))


def test_errors_go_unnoticed_to_the_end():
    """The row keeps the right answer, the trace reaches another; as many traces are right as the share of errors says."""
    made = rows("chain,steps=8,modulus=10,errors=0.15,rows=1000")
    right = [tasks.solved(row, row["trace"]) for row in made]
    assert 0.85**8 - 0.05 < sum(right) / 1000 < 0.85**8 + 0.07  # two errors may cancel
    clean = {row["problem"]: row["answer"] for row in made}
    for row, ok in zip(made, right):
        assert ok or not all(v.ok for v in tasks.verify_trace(row))
        assert (f"\\boxed{{{clean[row['problem']]}}}" in row["trace"]) == ok
    assert "reached" not in made[0]


@pytest.mark.parametrize("modulus", [7, 10, 11, 97, 100, 1000])
def test_slips_are_wrong_under_every_modulus(modulus):
    for row in rows(f"chain,modulus={modulus},slips=1,rows=60,steps=5"):
        assert sum(v.label == -1 for v in tasks.verify_trace(row)) == 5 and not faults(row)


def test_a_dead_end_must_be_searched_to_its_end():
    row = next(r for r in tasks.rows("countdown,target=300,rows=50") if "back to" in r["trace"])
    lines = row["trace"].split("\n")
    i = next(i for i, line in enumerate(lines) if line.startswith("back to"))
    early = row | {"trace": "\n".join(lines[: i - 1] + lines[i:])}
    assert any("untried" in fault for fault in faults(early))


@pytest.mark.parametrize("task", TASKS)
def test_a_wrong_answer_or_shape_is_caught(task):
    row = rows(f"{task},rows=1,target=100")[0]
    wrong = str(int(row["answer"]) + 1) if task == "chain" else "1+1"
    boxed = f"\\boxed{{{row['answer']}}}"
    assert faults(row | {"trace": row["trace"].replace(boxed, f"\\boxed{{{wrong}}}")})
    assert faults(row | {"trace": row["trace"].replace("</think>\n", "")})
    assert faults(row | {"problem": "What is 1 + 1?"})


# ---------------------------------------------------------------------------------------------------------------------
# solved


CHAIN = {"task": "chain", "answer": "42"}
COUNTDOWN = {"task": "countdown", "numbers": [3, 7, 25, 25], "goal": 250, "answer": "(3+7)*25/25*25"}


@pytest.mark.parametrize(
    "completion,right",
    [
        ("<think>\n...\n</think>\n\nThe answer is \\boxed{42}.", True),
        ("<think>\n\\boxed{41}\n</think>\n\n\\boxed{42}", True),
        ("\\boxed{42}", True),  # no thought opened: read whole
        ("...\n</think>\n\\boxed{ 42 }", True),  # the template opened it
        ("<think>\nIt must be \\boxed{42}", False),  # unfinished thought
        ("<think>\n\\boxed{42}\n</think>\n\nSo it is 42.", False),
        ("<think></think>\\boxed{41} and \\boxed{42}", True),  # the last one counts
        ("<think></think>\\boxed{42} or \\boxed{41}", False),
        ("<think></think>\\boxed{42", False),
        ("<think></think><think>\\boxed{42}", False),
        ("\\boxed{\\boxed{42}}", True),  # the innermost, last opened
        ("\\boxed{{{{42}}}}", False),
        ("\\boxed{042}", True),
        ("\\boxed{42.0}", False),
        ("\\boxed{-42}", False),
        ("\\boxed{٤٢}", False),
        ("\\boxed{" + "4" * 1_000_000 + "}", False),
        ("\\boxed{" * 200_000, False),
        ("{" * 1_000_000 + "\\boxed{42}", True),
        ("\\boxed{" + "{" * 500_000 + "}" * 500_000 + "}", False),
        ("", False),
    ],
)  # fmt: skip
def test_solved_chain(completion, right):
    assert tasks.solved(CHAIN, completion) is right


@pytest.mark.parametrize(
    "expression,right",
    [
        ("(3+7)*25*25/25", False),  # 25 three times
        ("(3+7)*(25+25)/2", False),  # a number that was not given
        ("25*(3+7)", False),  # one is left out
        ("25*7+3*25", True),
        ("25 \\times 7 + 3 \\cdot 25 = 250", True),
        ("\\left(25×7\\right)+(3×25)", True),
        ("25*7+25*3", True),
        ("25*7 + 3*2 5", False),
        ("2" * 100_000, False),
        ("9**9**9", False),
        ("3**7**25**25", False),
        ("25//25*3*7", False),
        ("(" * 140 + "1" + ")" * 140, False),
        ("__import__('os').system('true')", False),
        ("25*7+3*25j", False),
        ("25*7+3*25 if 1 else 0", False),
        ("25/(7-7)", False),
        ("3*25+7*25)", False),
        ("3*25+7*0b11001", False),
        ("lambda: 250", False),
        ("250", False),
        ("", False),
    ],
)
def test_solved_countdown(expression, right):
    assert tasks.solved(COUNTDOWN, f"<think>\n</think>\n\nThe answer is \\boxed{{{expression}}}.") is right


def test_solved_countdown_divides_exactly():
    row = {"task": "countdown", "numbers": [1, 3, 3], "goal": 1}
    assert tasks.solved(row, "\\boxed{1/3*3}") and tasks.solved(row, "\\boxed{3/3/1}")
    assert not tasks.solved({"task": "countdown", "numbers": [3, 3, 1], "goal": 0}, "\\boxed{1/(3-3)}")


# ---------------------------------------------------------------------------------------------------------------------
# specs


@pytest.mark.parametrize(
    "spec,named",
    [
        ("sudoku", "accepted: chain, countdown"),
        ("chain,stpes=8", "accepted: rows, seed, split, style, target, steps, modulus, slips, errors"),
        ("countdown,steps=8", "accepted: rows, seed, split, style, target, n"),
        ("chain,steps", "unknown option 'steps'"),
        ("chain,", "unknown option ''"),
        ("chain,steps=many", "steps: found 'many'; accepted: a whole number from 1 to 10,000"),
        ("chain,steps=9-6", "steps: found '9-6'"),
        ("chain,steps=8,steps=9", "steps is given twice"),
        ("chain,style=loud", "accepted: concise, verbose, answer"),
        ("chain,split=dev", "accepted: train, test"),
        ("chain,slips=2", "accepted: a share from 0 to 1"),
        ("chain,modulus=2", "accepted: a whole number from 7 to 1,000"),
        ("chain,target=49", "accepted: a whole number from 50 to 32,768"),
        ("chain,target=500,steps=8", "target: found with steps"),
        ("chain,target=500,style=answer", "target: found with style=answer"),
        ("chain,slips=0.1,style=answer", "slips: found with style=answer"),
        ("countdown,n=2", "n: found '2'; accepted: a whole number from 3 to 6"),
        ("countdown,n=5", "target: missing for n=5"),
        ("chain,rows=0", "rows: found '0'"),
    ],
)  # fmt: skip
def test_refusals_name_what_is_accepted(spec, named):
    with pytest.raises(Refusal, match=re.escape(named)):
        tasks.rows(spec)


def test_a_length_out_of_reach_is_refused():
    with pytest.raises(Refusal, match="target: found 20000 with n=3"):
        rows("countdown,n=3,target=20000,rows=1")


def test_every_task_has_an_option_reader():
    from dataclasses import fields

    for kind in (task_chain.Chain, task_countdown.Countdown):
        assert {f.name for f in fields(kind)} <= tasks._READ.keys()

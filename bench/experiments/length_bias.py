"""Does GRPO lengthen wrong answers, and does Dr. GRPO not? On a task in which length is free and luck decides.

A problem asks for a digit from which a chain of operations ends low (0 to 4). Nobody can tell before working it out, so half of
the answers stay wrong; after it the policy knows, and may stall: any number of filler lines, which no reward looks at, before
it ends. On paper (`expected_push`) GRPO's 1/|o| then makes wrong answers longer and right ones shorter, and a constant divisor
does neither; and where the policy cannot know whether it was right, the two cancel. Three seeds of each say whether that is so.
"""

from __future__ import annotations

import hashlib
import math
import random
import re
import tempfile
from collections.abc import Iterator
from pathlib import Path

import numpy as np
import torch

from longtrace import kernels as K
from longtrace.trainer import grpo
from longtrace.trainer.objectives import PolicyLoss, token_weights

from .. import BenchConfig, harness
from ..harness import console
from ..head_report import _figure
from . import toy

LINES = 2  # of working
# a filler word for each verdict: with one for both, so small a policy hardly tells them apart
FILLER = {"low": "\nok", "high": "\nhm"}
GO_ON = 16 / 17  # the teacher writes another with this chance: 16 in the mean, whatever the verdict
TOKENS, LONGEST = 6 * LINES + 4, 96  # of an answer without filler (digit, lines, verdict, done, end), and at most
COLD_START, RL, SEEDS = 500, 30, (0, 1, 2)  # steps, steps, runs of each arm
PROBLEMS, LAST = 6000, 10  # LAST: steps over which the end of a run is averaged
ALONE = r"\n?\d+\. |\d|" + "|".join([*FILLER.values(), "\ndone"])  # a token each
ARMS: dict[str, tuple[PolicyLoss, str]] = {
    "grpo": ("grpo", "low"),
    "dr_grpo": ("dr_grpo", "low"),
    "grpo, blind": ("grpo", "coin"),
}
_rollouts: list[list[tuple[float, int]]] = []  # of the run under way: (reward, filler lines) of each answer


def rows(count: int) -> Iterator[dict]:
    """Problems with an answer as the teacher writes it: a digit at random, right working, a verdict, filler, the end."""
    rng = random.Random(0)
    for _ in range(count):
        operations = [(sign, rng.choice("379" if sign == "*" else "123456789")) for sign in rng.choices("+-*", k=LINES)]
        value, lines = rng.randrange(10), []
        digit = value
        for i, (sign, b) in enumerate(operations, 1):
            lines.append(f"{i}. {value} {sign} {b} = {_then(value, sign, b)}")
            value = _then(value, sign, b)
        filler = int(math.log(1 - rng.random()) / math.log(GO_ON))  # geometric: no length is any nearer the end
        verdict = "low" if value < 5 else "high"
        yield {
            "problem": "Which digit ends low?\n" + "\n".join(f"{i}. {s} {b}" for i, (s, b) in enumerate(operations, 1)),
            "trace": "\n".join([str(digit), *lines, verdict]) + FILLER[verdict] * filler + "\ndone",
        }


def _then(value: int, sign: str, b: str) -> int:
    return {"+": value + int(b), "-": value - int(b), "*": value * int(b)}[sign] % 10


def low(completions: list[str], rows: list[dict]) -> list[float]:
    """1 where the chain ends low from the digit that the completion begins with."""
    return _noted(completions, [float(ends_low(row["problem"], text)) for text, row in zip(completions, rows)])


def coin(completions: list[str], rows: list[dict]) -> list[float]:
    """1 for half of the digits, which ones is drawn for each problem: nothing that is written can tell."""
    keys = (f"{row['problem']} {text[:1]}".encode() for text, row in zip(completions, rows))
    return _noted(completions, [float(hashlib.sha256(key).digest()[0] % 2) for key in keys])


def ends_low(problem: str, text: str) -> bool:
    """Whether the problem's chain ends low from the first character of the text; False where that is no digit."""
    if not re.match("[0-9]", text):
        return False
    value = int(text[0])
    for sign, b in re.findall(r"^\d+\. (.) (\d)$", problem, re.M):
        value = _then(value, sign, b)
    return value < 5


def _noted(completions: list[str], verdicts: list[float]) -> list[float]:
    _rollouts.append([(verdict, sum(map(text.count, FILLER.values()))) for verdict, text in zip(verdicts, completions)])
    return verdicts


def expected_push(
    loss: PolicyLoss, *, go_on: float = GO_ON, tokens: int = TOKENS, longest: int = LONGEST, group: int = 8
) -> dict[str, float]:
    """The expected gradient of the first update on the log-odds of another filler line after right and after wrong working,
    a completion, towards more: an exact sum over the rewards of a group (half are right) and the lengths of an answer.

    go_on: chance of another line; tokens: of an answer without filler; longest: where it is cut off. With n lines the score is
    d log p(n) / d log-odds = n (1 - go_on) - go_on [it ended], of mean 0. The push is E[A w(n) score(n)]: given the verdict,
    advantage A and length are independent, so it is E[A] E[w score], which is 0 for a constant weight w and, times an A
    below 0, above 0 for w = 1/|o|. Right and wrong sum to 0, since a group's advantages do.
    """
    n = torch.arange(longest - tokens + 3, dtype=torch.float64)  # cut off at the last: "done" and the end have no room
    ended = (n < n[-1]).double()
    chance = go_on**n * (1 - go_on * ended)
    lengths = (tokens + n).clamp(max=longest).int().tolist()
    weight = torch.tensor(token_weights(loss, lengths, longest)[0], dtype=torch.float64)
    along = float((chance * weight * (n * (1 - go_on) - go_on * ended)).sum())
    push = {"right": 0.0, "wrong": 0.0}
    for k in range(1, group):  # right answers of the group
        rewards = torch.tensor([1.0] * k + [0.0] * (group - k), dtype=torch.float64)
        scale = "none" if loss == "dr_grpo" else "group_std"
        advantages = K.group_advantages(rewards, [0, group], scale=scale).values
        likely = math.comb(group, k) / 2**group
        push["right"] += likely * float(advantages[:k].sum()) / group * along
        push["wrong"] += likely * float(advantages[k:].sum()) / group * along
    return push


def bench(config: BenchConfig) -> None:
    """Trains, prints the checks, draws length_bias.png, writes the record. Raises Refusal if a check fails."""
    cold_start, steps = (60, 3) if config.quick else (COLD_START, config.steps or RL)
    seeds = SEEDS[:1] if config.quick else SEEDS
    torch.set_num_threads(1)  # a model this small is no faster on more
    machine = harness.machine(1)
    curves: dict[str, dict[str, list]] = {arm: {"wrong": [], "right": [], "reward": []} for arm in ARMS}
    with tempfile.TemporaryDirectory(prefix="longtrace-bench-") as name:
        folder = Path(name)
        teacher = list(rows(PROBLEMS))
        cold = toy.cold_start(folder, teacher, steps=cold_start, alone=ALONE)
        problems = toy.write_rows(folder / "problems.jsonl", ({"problem": row["problem"]} for row in teacher))
        for seed in seeds:
            for number, (arm, (loss, reward)) in enumerate(ARMS.items()):
                _rollouts.clear()
                grpo.grpo(
                    toy.grpo_config(
                        cold, problems, folder / f"{number}-{seed}", seed=seed, steps=steps, max_new_tokens=LONGEST,
                        loss=loss, reward=[f"{__name__}:{reward}"],
                    )
                )  # fmt: skip
                for key, values in _told().items():
                    curves[arm][key].append(values)
                wrong, right = (_ends(curves[arm][key])[-1] for key in ("wrong", "right"))
                console.print(f"seed {seed}, {arm}: {wrong:.1f} lines wrong, {right:.1f} right", highlight=False)
    table = [_row(arm, curves[arm]) for arm in ARMS]
    paper = {loss: expected_push(loss) for loss in ("grpo", "dr_grpo")}
    for row in table:
        row |= {f"push_{side}": value for side, value in paper[ARMS[row["impl"]][0]].items()}
        if row["impl"] == "grpo, blind":  # one state: the pushes add up
            row["push_wrong"] = row["push_right"] = row["push_wrong"] + row["push_right"]
    what = (
        f"{steps} steps of 16 problems x 8, chains of {LINES}; filler lines of the first step and of the last {LAST}; "
        f"push: on paper, the first update's on the log-odds of another line; {len(seeds)} seeds"
    )
    columns = {"impl": "", "start": "lines at first", "wrong": "then wrong", "right": "then right", "wrong_seeds": "wrong by seed",
               "right_seeds": "right by seed", "push_wrong": "push wrong", "push_right": "push right", "reward": "right answers"}  # fmt: skip
    formats = dict.fromkeys(("start", "wrong", "right"), ".1f") | dict.fromkeys(("push_wrong", "push_right"), "+.4f")
    harness.print_table("Filler lines of right and wrong answers", columns, table, formats | {"reward": ".3f"})
    checks = [] if config.quick else toy.hold(_checks(curves, paper))  # a few steps say nothing
    record = harness.write_record(
        "length_bias", config.json, machine=machine, rows=table, ratios={}, setting=what, curves=curves, paper=paper,
        checks=checks,
    )  # fmt: skip
    _picture(record.parent / "length_bias.png", curves, what)
    console.print(f"record in {record}, picture beside it", highlight=False)
    toy.refuse_failed("length_bias", checks)


def _told() -> dict[str, list[float]]:
    """Of every rollout noted: the mean filler of wrong and of right answers, and the share that are right."""
    told: dict[str, list[float]] = {"wrong": [], "right": [], "reward": []}
    for rollout in _rollouts:
        reward, filler = np.array(rollout).T
        told["wrong"].append(float(filler[reward == 0].mean()))
        told["right"].append(float(filler[reward == 1].mean()))
        told["reward"].append(float(reward.mean()))
    return told


def _ends(curves: list[list[float]]) -> list[float]:
    """Each seed's mean over its last steps."""
    return [float(np.mean(curve[-LAST:])) for curve in curves]


def _row(arm: str, found: dict[str, list]) -> dict:
    row = {"impl": arm, "start": _start(found)}
    for key in ("wrong", "right", "reward"):
        ends = _ends(found[key])
        row |= {key: float(np.mean(ends)), f"{key}_seeds": ", ".join(f"{end:.3g}" for end in ends)}
    return row


def _start(found: dict[str, list]) -> float:
    """Filler lines before the first update, right and wrong alike."""
    return float(np.mean([curve[0] for key in ("wrong", "right") for curve in found[key]]))


def _checks(curves: dict[str, dict[str, list]], paper: dict[str, dict[str, float]]) -> list[tuple[bool, str]]:
    start = {arm: _start(found) for arm, found in curves.items()}
    wrong, right = ({arm: _ends(found[key]) for arm, found in curves.items()} for key in ("wrong", "right"))
    drift = max(abs(end / start["dr_grpo"] - 1) for ends in (wrong, right) for end in ends["dr_grpo"])
    return [
        (paper["grpo"]["wrong"] > 0 > paper["grpo"]["right"] and abs(paper["dr_grpo"]["wrong"]) < 1e-12,
         "on paper grpo lengthens wrong answers and shortens right ones, and dr_grpo does neither"),
        (min(wrong["grpo"]) > 1.25 * start["grpo"], f"grpo lengthens wrong answers in every seed ({start['grpo']:.1f} to at least {min(wrong['grpo']):.1f})"),
        (max(right["grpo"]) < start["grpo"], f"grpo shortens right answers in every seed (to at most {max(right['grpo']):.1f})"),
        (max(wrong["dr_grpo"]) < min(wrong["grpo"]), f"dr_grpo's wrong answers stay shorter than grpo's in every seed (at most {max(wrong['dr_grpo']):.1f}; largest change, right or wrong, {drift:.0%})"),
    ]  # fmt: skip


def _picture(path: Path, curves: dict[str, dict[str, list]], note: str) -> None:
    figure, axes = _figure("Filler lines, which no reward looks at", note, len(ARMS), 4.2)
    titles = {"grpo": "grpo: divides by each answer's length", "dr_grpo": "dr_grpo: divides by a constant",
              "grpo, blind": "grpo, where nothing tells it that it was wrong"}  # fmt: skip
    highest = 1.05 * max(max(curve) for found in curves.values() for key in ("wrong", "right") for curve in found[key])
    for ax, (arm, found) in zip(axes, curves.items()):
        for key, colour in (("wrong", "#c0392b"), ("right", "#2f6fde")):
            toy.draw(ax, found[key], f"{key} answers", color=colour)
        ax.axhline(_start(found), color="#9aa4b2", linestyle=":", linewidth=1.2, label="before the first update")
        ax.set_ylim(0, highest)
        ax.set_title(titles[arm], loc="left", fontsize=10, color="#5d6673")
        ax.set_xlabel(f"step (means of {toy.WINDOW}; bands: lowest to highest seed)")
        ax.set_ylabel("filler lines of an answer, mean")
        ax.legend(frameon=False, fontsize=9)
    figure.savefig(path)

"""Chain arithmetic: numbered operations modulo m, one a line; on request with slips that are noticed and repaired, or with
errors that are not."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from dataclasses import dataclass

from .task_common import Options, Verdict, approx_tokens, bad, good, near, split_of, whole_trace

_SIGN: dict[str, Callable[[int, int], int]] = {"+": int.__add__, "-": int.__sub__, "*": int.__mul__}
_WORDS = {"+": "add", "-": "subtract", "*": "multiply by"}


@dataclass(frozen=True, kw_only=True)
class Chain(Options):
    """Options of `chain`: see docs/tasks.md."""

    steps: tuple[int, int] | None = None
    modulus: int = 100
    slips: float | None = None
    errors: float = 0.0

    def fault(self) -> str | None:
        """What does not fit together, as "option: found X; accepted: Y"."""
        if self.target and self.steps:
            return "target: found with steps, which sets the length too; accepted: one of them"
        for name in ("slips", "errors"):
            if getattr(self, name) and self.style == "answer":
                return f"{name}: found with style=answer, which has no trace; accepted: one of them"
        return None


def _problem(start: int, ops: list[tuple[str, int]], modulus: int) -> str:
    listed = "\n".join(f"{i}. {_WORDS[sign]} {b}" for i, (sign, b) in enumerate(ops, 1))
    return f"Start with {start}. Work modulo {modulus}.\n{listed}\nWhat is the result?"


def _draw(options: Chain, steps: int, rng: random.Random) -> tuple[int, list[tuple[str, int]], str]:
    """A problem of the asked split. Factors are coprime to the modulus: every step is a bijection, so all the steps
    matter equally and a guess is right once in `modulus` times."""
    m = options.modulus
    factors = [b for b in range(2, m) if math.gcd(b, m) == 1]
    while True:
        start = rng.randrange(m)
        ops = [(s, rng.choice(factors) if s == "*" else rng.randrange(1, m)) for s in rng.choices("+-*", k=steps)]
        problem = _problem(start, ops, m)
        if split_of(problem) == options.split:
            return start, ops, problem


def make_row(options: Chain, rng: random.Random) -> dict:
    target = options.draw_target(rng)
    low, high = options.steps or (8, 8)
    steps = rng.randint(low, high) if target is None else max(1, target // (12 if options.style == "concise" else 25))
    slips = options.slips if options.slips is not None else (0.1 if options.style == "verbose" else 0.0)
    while True:
        start, ops, problem = _draw(options, steps, rng)
        thought, value = _solve(start, ops, options.modulus, options.style, slips, options.errors, rng)
        if target is None or near(thought, str(value), target):
            break
        # Lines vary in length: step towards the target, with a little noise so that no two sizes alternate for ever.
        ratio = target / approx_tokens(whole_trace(thought, str(value)))
        steps = max(1, round(steps * ratio + rng.uniform(-0.6, 0.6)))
    return {
        "problem": problem,
        "thought": None if options.style == "answer" else thought,
        "answer": str(_result(start, ops, options.modulus)),
        "reached": str(value),
        "steps": len(ops),
        "modulus": options.modulus,
    }


def _result(start: int, ops: list[tuple[str, int]], m: int) -> int:
    for sign, b in ops:
        start = _SIGN[sign](start, b) % m
    return start


def _solve(start, ops, m, style, slips, errors, rng) -> tuple[list[str], int]:
    """The lines of a trace and the value that it ends with: the result, unless there are errors."""
    value, lines = start, []
    for i, (sign, b) in enumerate(ops, 1):
        exact = _SIGN[sign](value, b)
        if errors and rng.random() < errors:  # any other residue, all the way to the end
            exact += rng.randrange(1, m)
        slipped = rng.random() < slips
        if slipped:
            wrong = exact + rng.choice((-10, -2, -1, 1, 2, 10))
            if wrong % m == exact % m:  # modulus 10: a slip by ten would be none
                wrong = exact + 1
            lines.append(_line(i, value, sign, b, wrong, m, style, rng))
        if slipped and style == "verbose":
            lines.append(f"Wait, {value} {sign} {b} is {exact}, not {wrong}. That makes it {exact % m}.")
        elif slipped:
            lines.append(f"no: {value} {sign} {b} = {exact % m}")
        else:
            lines.append(_line(i, value, sign, b, exact, m, style, rng))
        value = exact % m
    return lines, value


def _line(i, a, sign, b, full, m, style, rng) -> str:
    r = full % m
    if style != "verbose":
        return f"{i}. {a} {sign} {b} = {r}"
    head = rng.choice(("Step {i}:", "Step {i}, {do}:", "Now step {i} says {do}."))
    tail = rng.choice((", so {r}.", ", which is {r} modulo {m}.", ", so the value is now {r}."))
    head = head.format(i=i, do=f"{_WORDS[sign]} {b}")
    return f"{head} {a} {sign} {b} = {full}" + tail.format(r=r, m=m)


_STEP = re.compile(
    r"(?:(?P<i>\d+)\.|Step (?P<i1>\d+)(?:, (?P<do1>[a-z ]+ \d+))?:|Now step (?P<i2>\d+) says (?P<do2>[a-z ]+ \d+)\.)"
    r" (?P<a>\d+) (?P<sign>[+*-]) (?P<b>\d+) = (?P<full>-?\d+)"
    r"(?:, so (?P<r>\d+)\.|, which is (?P<r1>\d+) modulo (?P<m>\d+)\.|, so the value is now (?P<r2>\d+)\.)?"
)
_REPAIR = re.compile(
    r"no: (?P<a>\d+) (?P<sign>[+*-]) (?P<b>\d+) = (?P<r>\d+)"
    r"|Wait, (?P<a1>\d+) (?P<sign1>[+*-]) (?P<b1>\d+) is (?P<full>-?\d+), not (?P<wrong>-?\d+)\."
    r" That makes it (?P<r1>\d+)\."
)


def _groups(match: re.Match) -> dict[str, str]:
    """Named groups that took part, alternatives (`r1`, `r2`) under their plain name."""
    return {name.rstrip("12"): text for name, text in match.groupdict().items() if text is not None}


def check(row: dict, thought: list[str]) -> tuple[list[Verdict], str | None]:
    head = re.match(r"Start with (\d+)\. Work modulo (\d+)\.\n", row["problem"])
    if not head:
        return [bad(row["problem"], "not a problem this task writes")], None
    value, m = int(head[1]), int(head[2])
    ops = [(s, int(b)) for w, b in re.findall(r"^\d+\. ([a-z ]+) (\d+)$", row["problem"], re.M) for s in _sign_of(w)]
    verdicts, done, slip = [], 0, None
    for line in thought:
        step, repair = _STEP.fullmatch(line), _REPAIR.fullmatch(line)
        if not step and not repair:
            verdicts.append(bad(line, "not a line this task writes"))
            continue
        if done == len(ops):
            verdicts.append(bad(line, f"all {len(ops)} steps are done"))
            continue
        sign, b = ops[done]
        exact = _SIGN[sign](value, b)
        found = _groups(step or repair)
        wrong = _fault(found, done + 1, value, sign, b, exact, m, bool(step))
        if repair and slip is None:
            verdicts.append(bad(line, "repairs a line that was right"))
        elif repair and found.get("wrong", slip) != slip:
            verdicts.append(bad(line, f"quotes {found['wrong']}, the line before said {slip}"))
        elif wrong:
            verdicts.append(bad(line, wrong))
            slip = found["full"] if step and not wrong.startswith("should") else None
        else:
            if repair:
                verdicts[-1] = Verdict(verdicts[-1].line, True, -1, f"{verdicts[-1].reason}; repaired on the next line")
            verdicts.append(good(line))
            value, done, slip = exact % m, done + 1, None
    return verdicts, str(value) if done == len(ops) else None


def _sign_of(words: str) -> list[str]:
    return [sign for sign, written in _WORDS.items() if written == words]


def _fault(found, i, value, sign, b, exact, m, step) -> str | None:
    """Why a step or repair is wrong; a reason that begins with `should` cannot be repaired by correcting the result."""
    if step and int(found["i"]) != i:
        return f"should be step {i}, found {found['i']}"
    if (int(found["a"]), found["sign"], int(found["b"])) != (value, sign, b):
        return f"should compute {value} {sign} {b}"
    if found.get("do", f"{_WORDS[sign]} {b}") != f"{_WORDS[sign]} {b}" or int(found.get("m", m)) != m:
        return f"should quote the problem: {_WORDS[sign]} {b}, modulo {m}"
    if "r" not in found:  # concise: the residue stands alone
        found = found | {"r": found["full"], "full": str(exact)}
    if int(found.get("full", exact)) != exact:
        return f"{value} {sign} {b} is {exact}, not {found['full']}"
    if int(found["r"]) != exact % m:
        return f"{exact} modulo {m} is {exact % m}, not {found['r']}"
    return None


def is_solution(row: dict, answer: str) -> bool:
    """Whether `answer`, the content of the box, is the same whole number as the row's."""
    return re.fullmatch(r"\d{1,12}", answer, re.A) is not None and int(answer) == int(row["answer"])

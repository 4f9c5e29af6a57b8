"""Countdown: reach a number from given numbers, by a depth-first search that tries, gives up and goes back."""

from __future__ import annotations

import ast
import math
import random
import re
from dataclasses import dataclass
from fractions import Fraction
from itertools import combinations, pairwise

from .config import Refusal
from .task_common import Options, Verdict, approx_tokens, bad, good, near, split_of, whole_trace


@dataclass(frozen=True, kw_only=True)
class Countdown(Options):
    """Options of `countdown`: see docs/tasks.md."""

    n: int | None = None

    def fault(self) -> str | None:
        """What does not fit together, as "option: found X; accepted: Y"."""
        if (self.n or 0) > 4 and not self.target and self.style != "answer":
            return (
                f"target: missing for n={self.n}, whose whole search runs to millions of tokens; "
                "accepted: target=50 to target=32768"
            )
        return None


_LARGEST_NUMBER, _LARGEST_GOAL = 99, 999
_REACH = {"concise": 7_000, "verbose": 11_000}
"""Targets up to which four numbers make a tree large enough; above, five are used when n is not given."""


def _moves(state: tuple[int, ...]) -> dict[tuple[int, ...], tuple[int, str, int, int]]:
    """Every state one move away, with the move: (a, sign, b, result) for a >= b, results whole and positive."""
    found: dict[tuple[int, ...], tuple[int, str, int, int]] = {}
    for i, j in combinations(range(len(state)), 2):
        b, a = sorted((state[i], state[j]))
        rest = [*state[:i], *state[i + 1 : j], *state[j + 1 :]]
        results = [("+", a + b), ("*", a * b)]
        if a > b:
            results.append(("-", a - b))
        if a % b == 0:
            results.append(("/", a // b))
        for sign, result in results:
            found.setdefault(tuple(sorted([*rest, result])), (a, sign, b, result))
    return found


def make_row(options: Countdown, rng: random.Random) -> dict:
    target = options.draw_target(rng)
    n = options.n or (4 if target is None else 3 if target < 150 else 4 if target <= _REACH[options.style] else 5)
    for _ in range(4000 if (target or 0) < 150 else 200):  # short ones are hit or miss
        path, problem = _draw(options, n, rng)
        goal = path[-1][0]
        moves = [_moves(state)[after] for state, after in pairwise(path)]
        thought = None
        if options.style != "answer":
            search = _Search(goal, options.style, rng)
            if target is None:
                moves = search.until_found(path[0])
            else:
                search.to_length(path, target - approx_tokens(whole_trace([], _expression(path[0], moves))))
            thought = search.lines
        answer = _expression(path[0], moves)
        if target is None or near(thought, answer, target):
            return {"problem": problem, "thought": thought, "answer": answer, "numbers": list(path[0]), "goal": goal}
    raise Refusal(
        f"generated:countdown: target: found {target} with n={n} and style={options.style}, whose search does not come "
        "in that length; accepted: another n, or no n"
    )


def _draw(options: Countdown, n: int, rng: random.Random) -> tuple[list[tuple[int, ...]], str]:
    """A problem of the asked split: the states of one way from the numbers to the goal, and the text."""
    while True:
        path = [tuple(sorted(rng.randint(1, _LARGEST_NUMBER) for _ in range(n)))]
        while len(path) < n:
            path.append(rng.choice(list(_moves(path[-1]))))
        goal = path[-1][0]
        if not 10 <= goal <= _LARGEST_GOAL or goal in path[0]:
            continue
        problem = (
            f"Use each of the numbers {', '.join(map(str, path[0][:-1]))} and {path[0][-1]} exactly once, "
            f"with +, -, * and /, to make {goal}."
        )
        if split_of(problem) == options.split:
            return path, problem


def _expression(numbers: tuple[int, ...], moves: list[tuple[int, str, int, int]]) -> str:
    """The moves as one expression with no more parentheses than it needs."""
    parts = [(value, str(value), 3) for value in numbers]
    for a, sign, b, result in moves:
        left = next(p for p in parts if p[0] == a)
        parts.remove(left)
        right = next(p for p in parts if p[0] == b)
        parts.remove(right)
        level = 1 if sign in "+-" else 2
        left_text = f"({left[1]})" if left[2] < level else left[1]
        right_text = f"({right[1]})" if right[2] < level + (sign in "-/") else right[1]
        parts.append((result, f"{left_text}{sign}{right_text}", level))
    return parts[0][1]


class _Search:
    """Writes a depth-first search as text. Which child a node visits first is free, and that sets the length."""

    def __init__(self, goal: int, style: str, rng: random.Random):
        self.goal, self.style, self.rng = goal, style, rng
        self.lines: list[str] = []
        self.tokens = 0
        self.taken: list[tuple[int, str, int, int]] = []

    def until_found(self, numbers: tuple[int, ...]) -> list[tuple[int, str, int, int]]:
        """Tries moves in random order until the goal appears; returns the moves that led there."""
        self._walk(numbers, math.inf)
        return self.taken[::-1]

    def to_length(self, path: list[tuple[int, ...]], budget: int) -> None:
        """Follows `path`, exhausting at every node as many wrong subtrees first as fit into `budget` tokens."""
        for depth, state in enumerate(path[:-1]):
            moves = _moves(state)
            wrong = [child for child in moves if child != path[depth + 1]]
            self.rng.shuffle(wrong)
            limit = budget - 15 * (len(path) - 1 - depth)  # what the rest of the path takes
            misses = 0
            while wrong and misses < 6:
                child, before = wrong.pop(), (len(self.lines), self.tokens)
                self._try(moves[child], child)
                too_far = child == (self.goal,) or self.tokens > limit
                if not too_far and len(child) > 1:
                    too_far = self._walk(child, limit)
                    self._back(child, state)
                if too_far:
                    del self.lines[before[0] :]
                    self.tokens = before[1]
                    misses += 1
            self._try(moves[path[depth + 1]], path[depth + 1])

    def _walk(self, state: tuple[int, ...], limit: float) -> bool:
        """Searches below `state`. True when it stopped early: the goal was found, or `limit` tokens were passed."""
        moves = list(_moves(state).items())
        self.rng.shuffle(moves)
        for child, move in moves:
            self._try(move, child)
            found = child == (self.goal,)
            if not found and self.tokens <= limit:
                found = len(child) > 1 and self._walk(child, limit)
                if len(child) > 1 and not found:
                    self._back(child, state)
            if found or self.tokens > limit:
                self.taken.append(move)
                return True
        return False

    def _write(self, line: str) -> None:
        self.lines.append(line)
        self.tokens += approx_tokens(line + "\n")

    def _try(self, move: tuple[int, str, int, int], child: tuple[int, ...]) -> None:
        a, sign, b, result = move
        kind = "inner" if len(child) > 1 else "yes" if result == self.goal else "no"
        form = self.rng.choice(_FORMS[self.style][kind])
        text = f"{a} {sign} {b} = {result}"
        self._write(form.format(eq=text, rest=", ".join(map(str, child)), goal=self.goal))

    def _back(self, child: tuple[int, ...], state: tuple[int, ...]) -> None:
        form = self.rng.choice(_FORMS[self.style]["back"])
        self._write(form.format(rest=", ".join(map(str, child)), state=", ".join(map(str, state))))


_FORMS = {
    "concise": {
        "inner": ["{eq} leaves {rest}"],
        "no": ["{eq} no"],
        "yes": ["{eq} yes"],
        "back": ["back to {state}"],
    },
    "verbose": {
        "inner": ["Try {eq}, leaving {rest}.", "{eq} leaves {rest}.", "What about {eq}? It leaves {rest}."],
        "no": ["{eq}, which is not {goal}.", "{eq}, but we want {goal}.", "{eq}. No."],
        "yes": ["{eq}. Found it.", "{eq}, and that is {goal}, as wanted."],
        "back": ["Nothing else to try with {rest}. Back to {state}.", "{rest} is a dead end. Go back to {state}."],
    },
}


def _pattern(form: str) -> str:
    """A form as a regular expression with the groups a, sign, b, r, rest, goal, state."""
    number_list = r"\d+(?:, \d+)*"
    groups = {
        "eq": r"(?P<a>\d+) (?P<sign>[+*/-]) (?P<b>\d+) = (?P<r>\d+)",
        "rest": rf"(?P<rest>{number_list})",
        "state": rf"(?P<state>{number_list})",
        "goal": r"(?P<goal>\d+)",
    }
    return "".join(groups[p[1:-1]] if p.startswith("{") else re.escape(p) for p in re.split(r"(\{\w+\})", form))


_LINES = [
    (kind, re.compile(_pattern(form))) for forms in _FORMS.values() for kind, some in forms.items() for form in some
]


def _numbers(text: str) -> tuple[int, ...]:
    return tuple(int(t) for t in re.findall(r"\d+", text))


def check(row: dict, thought: list[str]) -> tuple[list[Verdict], str | None]:
    asked = re.fullmatch(r"Use each of the numbers ([\d, and]+) exactly once, .* to make (\d+)\.", row["problem"])
    if not asked:
        return [bad(row["problem"], "not a problem this task writes")], None
    listed, goal = asked[1], int(asked[2])
    stack: list[tuple[tuple[int, ...], set]] = [(tuple(sorted(_numbers(listed))), set())]
    verdicts, found = [], False
    for line in thought:
        kind, match = next(((k, m) for k, p in _LINES if (m := p.fullmatch(line))), (None, None))
        state, tried = stack[-1]
        if found:
            verdicts.append(bad(line, "the goal was already reached"))
        elif match is None:
            verdicts.append(bad(line, "not a line this task writes"))
        elif int(match.groupdict().get("goal") or goal) != goal:
            verdicts.append(bad(line, f"the goal is {goal}"))
        elif kind == "back":
            fault = _back_fault(match, stack)
            verdicts.append(bad(line, fault) if fault else good(line))
            if not fault:
                stack.pop()
        else:
            child, fault = _try_fault(match, kind, state, tried, goal)
            verdicts.append(bad(line, fault) if fault else good(line))
            if not fault:
                tried.add(child)
                found = kind == "yes"
                if len(child) > 1:
                    stack.append((child, set()))
    return verdicts, row["answer"] if found else None


def _back_fault(match: re.Match, stack: list) -> str | None:
    if len(stack) == 1:
        return "there is nothing to go back to"
    (state, tried), (parent, _) = stack[-1], stack[-2]
    if _numbers(match.groupdict().get("rest") or ", ".join(map(str, state))) != state:
        return f"the numbers in hand are {state}"
    if _numbers(match["state"]) != parent:
        return f"the numbers before were {parent}"
    left = len(_moves(state).keys() - tried)
    return f"{left} moves from {state} are untried" if left else None


def _try_fault(match: re.Match, kind: str, state, tried, goal) -> tuple[tuple[int, ...], str | None]:
    a, sign, b, result = int(match["a"]), match["sign"], int(match["b"]), int(match["r"])
    rest = list(state)
    for number in (a, b):
        if number not in rest:
            return (), f"{number} is not among {tuple(rest)}"
        rest.remove(number)
    exact = Fraction(a, b) if sign == "/" else {"+": a + b, "-": a - b, "*": a * b}[sign]
    child = tuple(sorted([*rest, result]))
    if exact != result:
        return child, f"{a} {sign} {b} is {exact}, not {result}"
    if child not in _moves(state):
        return child, "results must be whole and positive"
    if child in tried:
        return child, "was tried before"
    if (kind == "inner") != (len(child) > 1) or (len(child) > 1 and _numbers(match["rest"]) != child):
        return child, f"it leaves {', '.join(map(str, child))}"
    if kind != "inner" and (kind == "yes") != (result == goal):
        return child, f"{result} is {'' if result == goal else 'not '}the goal"
    return child, None


def is_solution(row: dict, answer: str) -> bool:
    """Whether `answer`, the content of the box, uses exactly the row's numbers and makes its goal."""
    return value_of(answer, list(row["numbers"])) == row["goal"]


def value_of(text: str, numbers: list[int]) -> Fraction | None:
    """The value of an arithmetic expression that uses exactly `numbers`, in any order; None for anything else."""
    for latex, plain in (("\\times", "*"), ("\\cdot", "*"), ("\\div", "/"), ("×", "*"), ("÷", "/"), ("−", "-")):
        text = text.replace(latex, plain)
    text = text.replace("\\left", "").replace("\\right", "").partition("=")[0].strip()
    if not re.fullmatch(r"[0-9+\-*/() ]+", text) or "**" in text or "//" in text:
        return None
    if sorted(_numbers(text[:300])) != sorted(numbers):
        return None
    try:
        return _evaluate(ast.parse(text, mode="eval").body)
    except (SyntaxError, ValueError, ZeroDivisionError, RecursionError, MemoryError):
        return None


def _evaluate(node: ast.AST) -> Fraction:
    if isinstance(node, ast.Constant):
        return Fraction(node.value)
    if isinstance(node, ast.BinOp):
        left, right = _evaluate(node.left), _evaluate(node.right)
        for kind, compute in (
            (ast.Add, Fraction.__add__),
            (ast.Sub, Fraction.__sub__),
            (ast.Mult, Fraction.__mul__),
            (ast.Div, Fraction.__truediv__),
        ):
            if isinstance(node.op, kind):
                return compute(left, right)
    raise ValueError("only numbers, + - * / and parentheses")

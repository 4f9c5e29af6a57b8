"""Generated problems with traces in which every line can be checked: `generated:chain,...`, `generated:countdown,...`.

Any length from 50 to 32k tokens, two styles of writing, and train and test problems that can never coincide.
"""

from __future__ import annotations

import random
import re
from collections.abc import Callable, Iterator
from dataclasses import fields

from . import answers, task_chain, task_countdown
from .config import Refusal
from .task_chain import Chain
from .task_common import Verdict, approx_tokens, bad, good, split_of, whole_trace
from .task_countdown import Countdown

__all__ = ["Verdict", "approx_tokens", "final_answer", "parse", "rows", "solved", "split_of", "verify_trace"]

TASKS = {"chain": (Chain, task_chain), "countdown": (Countdown, task_countdown)}
STYLES = ("concise", "verbose", "answer")


def _integer(text: str, low: int, high: int) -> int:
    if not re.fullmatch(r"-?\d{1,12}", text) or not low <= int(text) <= high:
        raise ValueError(f"a whole number from {low} to {high:,}")
    return int(text)


def _span(text: str, low: int, high: int) -> tuple[int, int]:
    first, dash, last = text.partition("-")
    try:
        span = _integer(first, low, high), _integer(last if dash else first, low, high)
        if span[0] <= span[1]:
            return span
    except ValueError:
        pass
    raise ValueError(f"a whole number from {low} to {high:,}, or a range such as {low}-{low * 2}")


def _choice(text: str, accepted: tuple[str, ...]) -> str:
    if text not in accepted:
        raise ValueError(", ".join(accepted))
    return text


def _share(text: str) -> float:
    if not re.fullmatch(r"0|1|[01]?\.\d{1,6}", text) or not 0 <= float(text) <= 1:
        raise ValueError("a share from 0 to 1")
    return float(text)


_READ: dict[str, Callable] = {
    "rows": lambda t: _integer(t, 1, 10**9),
    "seed": lambda t: _integer(t, 0, 2**31),
    "split": lambda t: _choice(t, ("train", "test")),
    "style": lambda t: _choice(t, STYLES),
    "target": lambda t: _span(t, 50, 32_768),
    "steps": lambda t: _span(t, 1, 10_000),
    "modulus": lambda t: _integer(t, 7, 1000),
    "slips": _share,
    "errors": _share,
    "n": lambda t: _integer(t, 3, 6),
}


def parse(spec: str) -> Chain | Countdown:
    """The options of a spec such as `chain,steps=8,rows=300,split=test`; a leading `generated:` is allowed.

    Raises `Refusal` that names the accepted tasks, options or values.
    """
    name, *options = spec.removeprefix("generated:").split(",")
    if name not in TASKS:
        raise Refusal(f"generated:{name}: unknown task {name!r}; accepted: {', '.join(TASKS)}")
    kind, _ = TASKS[name]
    accepted = [f.name for f in fields(kind)]
    found = {}
    for option in options:
        key, equals, text = option.partition("=")
        if not equals or key not in accepted:
            raise Refusal(
                f"generated:{name}: unknown option {option!r}; accepted: {', '.join(accepted)} (as key=value)"
            )
        if key in found:
            raise Refusal(f"generated:{name}: {key} is given twice; accepted: once")
        try:
            found[key] = _READ[key](text)
        except ValueError as accepted_values:
            raise Refusal(f"generated:{name}: {key}: found {text!r}; accepted: {accepted_values}") from None
    options = kind(**found)
    if options.target and options.style == "answer":
        raise Refusal(f"generated:{name}: target: found with style=answer, which has no trace; accepted: one of them")
    fault = options.fault()
    if fault:
        raise Refusal(f"generated:{name}: {fault}")
    return options


def rows(spec: str) -> Iterator[dict]:
    """Yields the rows of a spec one by one, the same ones every time: row i depends on the options and i alone.

    Every row holds `problem`, `trace` (`<think>`, lines, `</think>`, `The answer is \\boxed{...}.`), `answer`, `task`,
    `style`, `split` and `tokens` (of the trace, by `approx_tokens`); `chain` adds `steps` and `modulus`, `countdown`
    adds `numbers` and `goal`. Raises `Refusal` before the first row when the spec cannot be used.
    """
    options = parse(spec)
    name, make_row = next((n, module.make_row) for n, (kind, module) in TASKS.items() if kind is type(options))

    def stream() -> Iterator[dict]:
        for index in range(options.rows):
            rng = random.Random(f"{name} {options.seed} {options.split} {index}")
            row = make_row(options, rng)
            row["trace"] = whole_trace(row.pop("thought"), row.pop("reached", row["answer"]))
            yield row | {
                "task": name,
                "style": options.style,
                "split": options.split,
                "tokens": approx_tokens(row["trace"]),
            }

    return stream()


def verify_trace(row: dict) -> list[Verdict]:
    """Checks every line of a row's trace against its problem alone: one verdict per line of the thought, then one for
    the answer. A trace is sound when all are `ok`. A trace of another shape gives a single bad verdict.
    """
    shape = re.fullmatch(r"(?:<think>\n(.*)\n</think>\n\n)?(The answer is \\boxed\{(.*)\}\.)", row["trace"], re.S)
    if not shape:
        return [bad(row["trace"][-80:], "not <think>, lines, </think> and The answer is \\boxed{...}.")]
    thought, final, answer = shape.groups()
    right = answer == row["answer"] and solved(row, row["trace"])
    if thought is None:
        return [good(final) if right else bad(final, f"the answer is {row['answer']}")]
    verdicts, reached = TASKS[row["task"]][1].check(row, thought.split("\n"))
    if reached != answer:
        last = "the lines above do not reach an answer" if reached is None else f"the lines above give {reached}"
        return [*verdicts, bad(final, last)]
    return [*verdicts, good(final) if right else bad(final, f"the answer is {row['answer']}")]


def final_answer(completion: str, thinking: bool | None = None) -> str | None:
    """The content of the last `\\boxed{...}` after the thought; None without a box, or where the thought is not closed.

    A completion that never opens a thought is read whole, unless the prompt opened one (`thinking`: answers.after_thought).
    """
    text = answers.after_thought(completion, thinking)
    answer = None if text is None else answers.last_box(text)
    return answer if answer is not None and len(answer) <= answers.LONGEST else None


def is_own(row: dict) -> bool:
    """Whether a row is one of ours, with all that `solved` reads; users' rows may have a field `task` too."""
    needed = {"chain": {"answer"}, "countdown": {"numbers", "goal"}}
    task = row.get("task")
    return isinstance(task, str) and task in TASKS and needed[task] <= row.keys() and "style" in row


def solved(row: dict, completion: str, thinking: bool | None = None) -> bool:
    """Whether the final answer of `completion` solves the row's problem; any text is safe to pass.

    `chain`: the same whole number. `countdown`: any expression that uses exactly the row's numbers and makes the goal.
    """
    answer = final_answer(completion, thinking)
    return answer is not None and len(answer) <= 300 and TASKS[row["task"]][1].is_solution(row, answer)

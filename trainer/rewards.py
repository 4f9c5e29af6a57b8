"""Rewards of completions: accuracy by what a row can be checked with, format, language, length, models, users' functions.

A verdict has three states: 1.0 right, 0.0 wrong, None cut off. See docs/rewards.md.
"""

from __future__ import annotations

import contextlib
import importlib
import json
import math
import os
import re
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import numpy as np

from . import answers, tasks, verifier
from .config import Refusal
from .languages import SCRIPTS, language_consistency
from .rows import Row
from .verifier import Verifier

if TYPE_CHECKING:
    from .judge import Asked

__all__ = [
    "Completion",
    "Rewards",
    "accuracy",
    "format_reward",
    "language_consistency",
    "load",
    "score",
    "soft_overlong",
]

NAMES = (
    "accuracy, format, language[:en], overlong:LIMIT:BUFFER, model:FOLDER_OR_HUB_NAME, judge:http://HOST:PORT or "
    "module:function"
)


@dataclass(frozen=True)
class Completion:
    """What a model wrote for a row.

    finished: False where it was cut off. thinking: True where the prompt opened the thought, None = see the text. tokens:
    its length, for length penalties.
    """

    text: str
    row: Row
    finished: bool = True
    thinking: bool | None = None
    tokens: int = 0


# ---------------------------------------------------------------------------------------------------------------------
# rewards of one completion


def accuracy(
    completion: str,
    answer: str,
    *,
    finished: bool = True,
    thinking: bool | None = None,
    pool: Verifier | None = None,
) -> float | None:
    r"""1.0 where the completion's final answer equals `answer`, 0.0 where not, None where the completion was cut off.

    The answer is read as `answers.final_answer` tells: after the thought, from `<answer>` tags, the last `\boxed{}`, or a
    plain last line. A thought that was opened and never closed is wrong, whatever it holds. thinking: None = a thought is
    there when the text has a tag, True = the prompt opened it, False = read the text whole. Equality is math-verify's, in
    `pool` (verifier.default()); an answer on which it hangs or dies is wrong.
    """
    if not finished:
        return None
    found = answers.final_answer(completion, thinking)
    if found is None:
        return 0.0
    return (pool or verifier.default()).check([("math", found, _gold(answer))])[0] or 0.0


def _gold(answer: str) -> str:
    """A reference answer without its box."""
    return (answers.last_box(answer) if "\\boxed" in answer else None) or answer


def format_reward(completion: str, *, thinking: bool | None = None) -> float:
    """1.0 for `<think>`, a thought, `</think>` and an answer, each once and in this order; else 0.0 (R1's format reward).

    Blanks may stand around. thinking=True: the prompt has written `<think>`, so the completion must not.
    """
    text = "<think>" + completion if thinking else completion
    if any(text.count(tag) != 1 for tag in ("<think>", "</think>")):
        return 0.0
    before, _, rest = text.partition("<think>")
    thought, closed, answer = rest.partition("</think>")
    whole = bool(closed and thought.strip() and answer.strip()) and not before.strip()
    tags = answer.count("<answer>"), answer.count("</answer>")
    if whole and tags != (0, 0):  # the template of R1-Zero: nothing but the tags and something in them
        answer = answer.strip()
        whole = tags == (1, 1) and answer.startswith("<answer>") and answer.endswith("</answer>")
        whole = whole and bool(answer[len("<answer>") : -len("</answer>")].strip())
    return float(whole)


def soft_overlong(length: float, limit: int, buffer: int) -> float:
    """0 up to limit - buffer tokens, then a line down to -1 at `limit`, -1 beyond. DAPO (arXiv 2503.14476), equation 13."""
    if not 0 < buffer <= limit:
        raise ValueError(f"found limit={limit}, buffer={buffer}; accepted: a buffer from 1 to the limit")
    return -min(1.0, max(0.0, (length - (limit - buffer)) / buffer))


# ---------------------------------------------------------------------------------------------------------------------
# accuracy of a batch, by what the rows hold


def kind_of(row: Row) -> str | None:
    """What checks a row: own (a generated task), gym (reasoning_gym), code (`tests`), math (`answer`); None = nothing can."""
    if tasks.is_own(row.raw):
        return "own"
    if _gym_task(row) is not None:
        return "gym"
    if row.raw.get("tests"):
        return "code"
    return "math" if row.answer is not None else None


def score(completions: Sequence[Completion], pool: Verifier | None = None) -> list[float | None]:
    """The accuracy of every completion: 1.0 right, 0.0 wrong, None cut off; reasoning_gym may give a part of 1.

    All that need another process are checked at once. Raises Refusal for a row that nothing here can check.
    """
    results: list[float | None] = [None] * len(completions)
    jobs: list[tuple[int, verifier.Job]] = []
    for i, completion in enumerate(completions):
        row, kind = completion.row, kind_of(completion.row)
        if kind is None:
            raise Refusal(f"{row.where}: nothing to check with; accepted: rows with an answer or tests")
        if not completion.finished:
            continue
        results[i] = 0.0
        if kind == "own":
            results[i] = float(tasks.solved(row.raw, completion.text, completion.thinking))
        elif kind == "gym":
            given = _gym_answer(completion)
            entry = {key: row.raw.get(key) for key in ("answer", "metadata")} | {"question": row.raw.get("problem")}
            gold = json.dumps({"task": _gym_task(row), "entry": entry}, default=str, sort_keys=True)
        elif kind == "code":
            text = answers.after_thought(completion.text, completion.thinking)
            given = None if text is None else answers.last_code_block(text)
            gold = json.dumps(_tests(row))
        else:
            given, gold = answers.final_answer(completion.text, completion.thinking), _gold(row.answer)
        if kind != "own" and given is not None and len(given) <= 100_000:
            jobs.append((i, (kind, given, gold)))
    try:
        verdicts = (pool or verifier.default()).check([job for _, job in jobs]) if jobs else []
    except ImportError as error:
        raise Refusal(
            f"accuracy: a scorer is not installed: {error}; accepted: pip install 'longtrace[rl]' for reasoning_gym rows"
        ) from error
    for (i, _), verdict in zip(jobs, verdicts):
        results[i] = verdict or 0.0
    return results


def _gym_task(row: Row) -> str | None:
    """The reasoning_gym task a row comes from."""
    metadata, task = row.raw.get("metadata"), row.raw.get("task")
    if not isinstance(metadata, dict):
        return None
    if isinstance(task, str) and row.where.startswith("reasoning_gym:"):
        return task
    source = metadata.get("source_dataset")
    return source if isinstance(source, str) else None


def _gym_answer(completion: Completion) -> str | None:
    """The answer as a reasoning_gym scorer reads it: from tags or a box as it stands, a number of a plain text, or all of it."""
    text = answers.after_thought(completion.text, completion.thinking)
    if text is None:
        return None
    if "<answer>" in text:
        return answers.in_tags(text)
    if "\\boxed" in text or answers.number(str(completion.row.raw.get("answer"))):
        return answers.final_answer(text, False)
    return text.strip()


def _tests(row: Row) -> dict[str, Any]:
    """The field `tests` as cases and source: [{"input", "output"}], {"inputs": [], "outputs": []}, asserts, or JSON of those."""
    tests = row.raw["tests"]
    if isinstance(tests, str) and tests.lstrip()[:1] in ("[", "{"):
        with contextlib.suppress(ValueError):  # source that begins with a bracket
            tests = json.loads(tests)
    if isinstance(tests, str):
        return {"cases": [], "tests": tests}
    if isinstance(tests, dict) and not tests.get("fn_name"):
        pair = tests.get("inputs"), tests.get("outputs")
        if all(isinstance(texts, list) for texts in pair) and len(pair[0]) == len(pair[1]):
            tests = [{"input": i, "output": o} for i, o in zip(*pair)]
    if isinstance(tests, list) and tests:
        if all(isinstance(test, str) for test in tests):
            return {"cases": [], "tests": "\n".join(tests)}
        if all(
            isinstance(test, dict) and all(isinstance(test.get(k), str) for k in ("input", "output")) for test in tests
        ):
            return {"cases": [{k: test[k] for k in ("input", "output")} for test in tests], "tests": ""}
    raise Refusal(
        f"{row.where}: tests: found {type(tests).__name__} {json.dumps(tests, default=str)[:60]}; accepted: asserts as text "
        'or a list of texts, [{"input": text, "output": text}], or {"inputs": [text], "outputs": [text]}'
    )


# ---------------------------------------------------------------------------------------------------------------------
# rewards by name


def load(name: str) -> Callable[..., list[float | None]]:
    """The function that `module:function` names, from the installed modules or the current folder.

    It is called as fn(completions=[text, ...], rows=[the row's fields, ...]) and returns a number, or None for no verdict,
    for each. Raises Refusal where there is no such function.
    """
    module_name, _, attribute = name.partition(":")
    sys.path.insert(0, os.getcwd())
    try:
        module = importlib.import_module(module_name)
    except ImportError as error:
        raise Refusal(f"--reward {name}: cannot import {module_name}: {error}; accepted: {NAMES}") from error
    finally:
        sys.path.remove(os.getcwd())
    function = getattr(module, attribute, None)
    if not callable(function):
        there = ", ".join(key for key, value in vars(module).items() if callable(value) and key[0] != "_") or "none"
        raise Refusal(f"--reward {name}: {module_name} has no function {attribute!r}; it has: {there}")
    return function


@dataclass(frozen=True)
class Scores:
    """The rewards of a batch of n completions.

    parts: name to (n,) float64, NaN without a verdict. total: (n,) float64, the weighted sum of the parts there are, NaN
    where there is none. cut_off: (n,) bool.
    """

    parts: dict[str, np.ndarray]
    total: np.ndarray
    cut_off: np.ndarray


class Rewards:
    """A weighted sum of rewards: Rewards(["accuracy", "format=0.5", "language:zh=0.2", "my_module:brevity=0.1"]).

    Names: accuracy, format, language[:en] (of the thought, or of all where there is none), overlong:LIMIT:BUFFER,
    model:FOLDER_OR_HUB_NAME (a reward model), judge:http://HOST:PORT (a chat model, from 0 to 10), module:function (see
    `load`); weights after "=", 1 by default. Raises Refusal for anything else.
    """

    def __init__(self, specs: Sequence[str], *, pool: Verifier | None = None, device: str = "cpu"):
        self.pool, self.device = pool or verifier.default(), device
        self.weights: dict[str, float] = {}
        self._functions: dict[str, Callable[[Sequence[Completion]], list[float | None]]] = {}
        for spec in specs:
            name, weight = _parse(spec)
            if name in self.weights:
                raise Refusal(f"--reward {name}: found twice; accepted: once")
            self.weights[name] = weight
            self._functions[name] = self._function(name)
        if not specs:
            raise Refusal(f"--reward: found none; accepted: one or more of {NAMES}")

    def _function(self, name: str) -> Callable[[Sequence[Completion]], list[float | None]]:
        kind, _, rest = name.partition(":")
        if name == "accuracy":
            return lambda batch: score(batch, self.pool)
        if name == "format":
            return lambda batch: [format_reward(c.text, thinking=c.thinking) for c in batch]
        if kind == "language":
            language = rest or "en"
            if language not in SCRIPTS:
                raise Refusal(f"--reward {name}: found language {language!r}; accepted: {', '.join(sorted(SCRIPTS))}")
            return lambda batch: [language_consistency(answers.thought_of(c.text, c.thinking), language) for c in batch]
        if kind == "overlong":
            sizes = re.fullmatch(r"(\d{1,9}):(\d{1,9})", rest)
            if not sizes or not 0 < int(sizes[2]) <= int(sizes[1]):
                raise Refusal(
                    f"--reward {name}: accepted: overlong:LIMIT:BUFFER in tokens, a buffer from 1 to the limit"
                )
            limit, buffer = int(sizes[1]), int(sizes[2])
            return lambda batch: [soft_overlong(c.tokens, limit, buffer) for c in batch]
        if kind == "model" and rest:
            from .reward_model import RewardModel

            model = RewardModel(rest, device=self.device)
            return lambda batch: _of_answers(model, _conversation, batch)
        if kind == "judge" and rest:
            from .judge import Judge

            judge = Judge(rest)
            return lambda batch: _of_answers(judge, _asked, batch)
        if rest:
            function = load(name)
            return lambda batch: function(completions=[c.text for c in batch], rows=[c.row.raw for c in batch])
        raise Refusal(f"--reward {name}: accepted: {NAMES}")

    def __call__(self, completions: Sequence[Completion]) -> Scores:
        """Scores a batch. Raises Refusal where a user's function does not return one number or None for each completion."""
        parts = {name: _column(name, f(completions), len(completions)) for name, f in self._functions.items()}
        values = np.stack([parts[name] * weight for name, weight in self.weights.items()])
        total = np.where(np.isnan(values).all(0), np.nan, np.nansum(values, 0))
        return Scores(parts, total, np.array([not c.finished for c in completions], bool))


def _parse(spec: str) -> tuple[str, float]:
    """`name=weight` or `name`; a name may hold "=" itself."""
    name, equals, weight = spec.rpartition("=")
    if not equals:
        return spec, 1.0
    try:
        value = float(weight)
    except ValueError:
        value = math.nan
    if not math.isfinite(value):
        raise Refusal(f"--reward {spec}: weight: found {weight!r}; accepted: a number, as in format=0.5")
    return name, value


def _column(name: str, values: Any, count: int) -> np.ndarray:
    """A reward's values as (count,) float64, None as NaN."""
    accepted = f"accepted: a list of {count} numbers or None, one for each completion"
    try:
        values = list(values)
        column = np.array([math.nan if value is None else float(value) for value in values], np.float64)
    except (TypeError, ValueError) as error:
        raise Refusal(f"--reward {name}: found {error}; {accepted}") from error
    if len(column) != count or np.isinf(column).any():
        raise Refusal(
            f"--reward {name}: found {len(column)} values, {int(np.isinf(column).sum())} infinite; {accepted}"
        )
    return column


def _conversation(completion: Completion) -> list[dict[str, Any]] | None:
    """The messages a reward model reads: the prompt's, and the completion without its thought; None where nothing follows it."""
    messages = completion.row.messages
    turns = [i for i, message in enumerate(messages) if message["role"] == "assistant"]
    text = (answers.after_thought(completion.text, completion.thinking) or "").strip()
    return [*messages[: turns[-1] if turns else None], {"role": "assistant", "content": text}] if text else None


def _asked(completion: Completion) -> Asked | None:
    """What a judge reads: the same, with the row's reference answer."""
    from .judge import Asked

    talk = _conversation(completion)
    return talk and Asked(talk[:-1], talk[-1]["content"], completion.row.answer)


def _of_answers(score, read: Callable, completions: Sequence[Completion]) -> list[float | None]:
    """The scores of what `read` makes of the completions; None, nobody being asked, for those that hold no answer."""
    found = [read(completion) for completion in completions]
    scores = iter(score([one for one in found if one is not None]))
    return [None if one is None else next(scores) for one in found]

"""Reads the final answer of a completion and compares answers that are plain numbers or words, without any parser.

Everything here is linear in the length of the text and safe on any input; what needs algebra goes to `verifier.py`.
"""

from __future__ import annotations

import re
from fractions import Fraction

LONGEST = 1000
"""Characters of the longest answer that is read at all."""
DEEPEST = 30
"""Brackets within brackets of the deepest answer that is read at all; parsers take exponential time over more."""

_BOX = re.compile(r"\\(?:boxed|fbox)\s*\{")
_BRACE = re.compile(r"\\(?:boxed|fbox)\s*\{|\\.|[{}]", re.DOTALL)
_ANCHOR = re.compile(r"####|\b(?:answer|result|solution)\b[*_\s]*(?:is|are|=|:|：)[*_\s:：]*|答案(?:是|为|：|:)", re.I)
_HEDGE = re.compile(
    r"\b(?:not|cannot|or|either|neither|nor|between|maybe|perhaps|possibly|might)\b|n['’]t\b|\?|？", re.I
)
_NUMBER = re.compile(r"[+-]?(?:\d{1,3}(?:,\d{3})+|\d+)(?:\.\d+)?(?:/\d+)?(?!\d)|[+-]?\.\d+")
_MATH = re.compile(r"\$([^$]+)\$|\\\(((?:[^\\]|\\(?!\)))+)\\\)")
_MARKS = " \t*_`"
_BASE = re.compile(r"[0-9A-Fa-f]_\{?([0-9]+)")
_UNIT = re.compile(
    r"(?<=[0-9.} ])(mm|cm|dm|m|km|in|ft|yd|mi|mg|g|kg|lb|oz|ms|s|min|h|ml|l|L|mL|Hz|kHz|W|kW|J|kJ|N|Pa|V|K)\b"
)
_FUNCTION = re.compile(r"(?<![\\A-Za-z])((?:arc)?(?:sin|cos|tan|cot|sec|csc)h?|log|ln|exp|max|min|gcd|det)(?![A-Za-z])")
_SUPERSCRIPT = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻", "0123456789+-")
_WRAPPED = re.compile(r"\\(?:text|textbf|mathrm|mathbf|textit)\s*\{([^{}\\]*)\}")


def after_thought(text: str, thinking: bool | None = None) -> str | None:
    """What follows the thought; None where the thought is not closed, or a second one opens after it.

    thinking: None = a thought is there when a tag is; True = the prompt opened it, so one is open from the start; False =
    there is no thought, the text is read whole. The first `</think>` ends a thought, as in the reasoning parsers of servers.
    """
    if thinking is False:
        return text
    _, closed, rest = text.partition("</think>")
    if not closed:
        return None if thinking or "<think>" in text else text
    return None if "<think>" in rest else rest


def thought_of(text: str, thinking: bool | None = None) -> str:
    """The thought, closed or not, without its tags; the whole text where there is none."""
    if thinking is False:
        return text
    before, closed, _ = text.partition("</think>")
    return before.partition("<think>")[2] if "<think>" in before else before if closed or thinking else text


def last_box(text: str) -> str | None:
    r"""The content of the last `\boxed{...}` that stands in no other box; None without one, or where a box is left open.

    A box around nothing but a box is that one; a box beside other things in a box is no answer.
    """
    while True:
        found = _find_box(text)
        if found is None:
            return None
        content = text[slice(*found)].strip()
        if len(content) > LONGEST or not _BOX.search(content):
            return content
        whole, inner = _BOX.match(content), _find_box(content)
        if not whole or inner != (whole.end(), len(content) - 1):
            return None
        text = content


def _find_box(text: str) -> tuple[int, int] | None:
    """Where the content of the last box that stands in no other starts and ends."""
    open_braces: list[int | None] = []  # where a box's content starts; None for any other brace
    boxes_open, found = 0, None
    for match in _BRACE.finditer(text):
        token = match.group()
        if token == "}":
            start = open_braces.pop() if open_braces else None
            if start is not None:
                boxes_open -= 1
                found = found if boxes_open else (start, match.start())
        elif token == "{":
            open_braces.append(None)
        elif len(token) > 2:
            open_braces.append(match.end())
            boxes_open += 1
    return None if boxes_open else found


def final_answer(completion: str, thinking: bool | None = None) -> str | None:
    r"""The answer a completion ends with, as written; None where there is none to read.

    Read after the thought (see `after_thought`), from the last `<answer>...</answer>` if there is one. There the last
    `\boxed{...}` counts, as in the evaluation of MATH and AIME; without a box, what follows "answer is", "Answer:" or
    "####" in the last line, else what follows its last "=", else its last number, else the line. A plain line that hedges
    ("not 3", "3 or 4", "3?") has no answer.
    """
    text = after_thought(completion, thinking)
    if text is None:
        return None
    tagged = in_tags(text)
    if tagged is None and "<answer>" in text:
        return None
    scope = text if tagged is None else tagged
    if "\\boxed" in scope or "\\fbox" in scope:
        answer = last_box(scope)
    else:
        answer = _plain(scope)
    return answer if answer and len(answer) <= LONGEST else None


def in_tags(text: str) -> str | None:
    """The content of the last `<answer>...</answer>`; None without one, or where another is left open behind it."""
    end = text.rfind("</answer>")
    start = text.rfind("<answer>", 0, max(end, 0))
    if start < 0 or text.find("<answer>", end) >= 0:
        return None
    return text[start + len("<answer>") : end].strip()


def _plain(text: str) -> str | None:
    """The answer of a text without a box: see `final_answer`."""
    line = text.rstrip()[-4 * LONGEST :].rpartition("\n")[2].strip(_MARKS)
    if not line or len(line) > 2 * LONGEST or _HEDGE.search(line):
        return None
    anchors = list(_ANCHOR.finditer(line))
    if anchors:
        line = line[anchors[-1].end() :]
    in_math = [inline or bracketed for inline, bracketed in _MATH.findall(line)]
    if in_math:
        return in_math[-1] if len(in_math) == 1 or not anchors else None
    if not anchors and "=" in line:
        if line.count("=") > 1 and re.search(r"[,;]|\band\b", line):
            return None  # several equations: no one answer
        line = line.rpartition("=")[2]
    line = line.lstrip(_MARKS).rstrip(_MARKS + ".。!！,;；")
    if not re.search(r"[^\W\d_]{2,}", line):  # no words: numbers, operators, single letters
        return line
    numbers = [match.group() for match in _NUMBER.finditer(ascii_digits(line))]
    if not numbers:
        return line
    return numbers[-1] if len(numbers) == 1 or not anchors else None


def last_code_block(text: str) -> str | None:
    """The last fenced code block that names Python or no language; None without one."""
    blocks = re.split(r"^[ \t]*```", text, flags=re.MULTILINE)
    for block in reversed(blocks[1 : len(blocks) - 1 : 2]):  # what stands between two fences
        language, _, code = block.partition("\n")
        if language.strip().lower() in ("", "python", "python3", "py"):
            return code
    return None


# ---------------------------------------------------------------------------------------------------------------------
# the canonical form, and what is decided by it


def ascii_digits(text: str) -> str:
    """Decimal digits of any script, full-width forms and signs as ASCII; superscripts as powers. No other look-alikes."""
    if text.isascii():
        return text

    def plain(character: str) -> str:
        code = ord(character)
        if 0xFF01 <= code <= 0xFF5E:
            return chr(code - 0xFEE0)
        if character.isdecimal():
            return str(int(character))
        return {"−": "-", "–": "-", "﹣": "-", "\u3000": " ", "\xa0": " ", "，": ","}.get(character, character)

    text = re.sub("[⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻]+", lambda m: "^{" + m.group().translate(_SUPERSCRIPT) + "}", text)
    return "".join(map(plain, text))


def canonical(answer: str) -> str:
    """One spelling for answers that differ in typesetting only: digits, `$`, brackets, functions, text boxes, spaces."""
    text = ascii_digits(answer).strip().removesuffix(".").strip()
    for opening, closing in (("$$", "$$"), ("$", "$"), ("\\(", "\\)"), ("\\[", "\\]")):
        if text.startswith(opening) and text.endswith(closing) and len(text) > len(opening + closing):
            inside = text[len(opening) : -len(closing)]
            text = text if opening in inside else inside
    text = _WRAPPED.sub(r"\1", text)
    text = re.sub(r"\\left(?![a-zA-Z])|\\right(?![a-zA-Z])|\\[!,;:]", "", text.replace("{,}", ","))
    text = _FUNCTION.sub(r"\\\1", re.sub(r"\\[dt]frac(?![a-zA-Z])", r"\\frac", text))
    return re.sub(r"\s+", " ", text).strip().removesuffix(".").strip()


def number(text: str) -> tuple[Fraction, bool] | None:
    r"""The value of a plain number and whether it has a decimal point: `-1,234.5`, `2/3`, `\frac{2}{3}`; None otherwise."""
    if len(text) > 300:
        return None
    sign = -1 if text.startswith("-") else 1
    text = text.lstrip("+-") if text[:2] not in ("--", "-+", "+-", "++") else ""
    if re.fullmatch(r"[0-9]{1,3}(,[0-9]{3})+(\.[0-9]+)?", text):
        text = text.replace(",", "")
    if re.fullmatch(r"([0-9]+\.?[0-9]*|\.[0-9]+)([eE][+-]?[0-9]{1,3})?", text):
        return sign * Fraction(text), not text.isdigit()
    ratio = re.fullmatch(r"([0-9]+) ?/ ?([0-9]+)", text) or re.fullmatch(
        r"\\frac ?\{ ?([0-9]+) ?\} ?\{ ?([0-9]+) ?\}", text
    )
    if ratio and int(ratio[2]):
        return sign * Fraction(int(ratio[1]), int(ratio[2])), False
    return None


def compare(answer: str, gold: str) -> bool | None:
    """Whether two canonical answers are the same where that needs no algebra; None where it does.

    The same text is right. Two plain numbers are compared exactly, or, where one has a decimal point, to six decimals and
    five digits (0.333333 is 1/3, 0 is not 0.0000001). A gold answer in words is compared as words: a computer algebra
    system would take them for products of letters, and "listen" for "silent". Several numbers in a chain of equations, and
    bases or units that differ, are wrong: such a system drops them.
    """
    if not answer or not gold or len(answer) > LONGEST or _depth(answer) > DEEPEST:
        return False
    if answer == gold:
        return True
    given, wanted = number(answer), number(gold)
    if given and wanted:
        distance = abs(given[0] - wanted[0])
        close = 2_000_000 * distance <= 1 and 100_000 * distance <= abs(wanted[0])
        return distance == 0 or ((given[1] or wanted[1]) and close)
    if re.fullmatch(r"\(?[A-Za-z]\)?", gold) and answer.strip("().") == gold.strip("()"):
        return True  # a choice: B, (B), B.
    if _is_words(gold):
        return _words(answer) == _words(gold)
    claimed = {value[0] for part in answer.split("=") if (value := number(part.strip()))}
    bases, units = ([pattern.findall(text) for text in (answer, gold)] for pattern in (_BASE, _UNIT))
    base_differs = bases[0] not in ([], ["10"], bases[1])
    unit_differs = bool(units[0] and units[1] and units[0] != units[1])
    return False if len(claimed) > 1 or base_differs or unit_differs else None


def _is_words(text: str) -> bool:
    """Whether an answer is prose: letters, three of them in a row, or a short word."""
    runs = re.findall(r"[^\W\d_]+", text)
    if re.search(r"[\d\\^_=+*/<>]|sqrt|lcm|abs", text):
        return False
    return any(len(run) > 2 for run in runs) or text.strip(" .").lower() in ("no", "am", "pm", "ok")


def _depth(text: str) -> int:
    """How many brackets are open at the deepest place."""
    depth = deepest = 0
    for bracket in re.findall(r"[(\[{}\])]", text):
        depth += 1 if bracket in "([{" else -1
        deepest = max(deepest, depth)
    return deepest


def _words(text: str) -> str:
    """Letters, digits and signs in lower case, with single spaces and without punctuation at the ends."""
    return re.sub(r"\s+", " ", text).strip(" .,;:!\"'“”()").casefold()

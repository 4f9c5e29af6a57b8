"""500 hostile completions with known truths, from a seeded generator: what a policy or an attacker may write for a reward."""

from __future__ import annotations

import random
from dataclasses import dataclass

RIGHT, WRONG, CUT_OFF = 1.0, 0.0, None
ANY = "any"  # the same value in a spelling so strange that refusing it is as good


@dataclass(frozen=True)
class Case:
    name: str
    text: str
    truth: float | str | None
    answer: str | None = None
    tests: list | str | None = None
    finished: bool = True
    thinking: bool | None = None


FULLWIDTH = str.maketrans("0123456789", "０１２３４５６７８９")
ARABIC = str.maketrans("0123456789", "٠١٢٣٤٥٦٧٨٩")
DEVANAGARI = str.maketrans("0123456789", "०१२३४५६७८९")
BOLD = str.maketrans("0123456789", "𝟎𝟏𝟐𝟑𝟒𝟓𝟔𝟕𝟖𝟗")
LETTERS = str.maketrans("0123456789", "ОlZЗЧSбТ8g")  # letters that look like digits
CIRCLED = str.maketrans("123456789", "①②③④⑤⑥⑦⑧⑨")

TOWERS = [
    "9**9**9",
    "9^{9^{9}}",
    "9^{9^{9^{9}}}",
    "((((9!)!)!)!)!",
    "99999999!",
    "\\binom{10^9}{5\\cdot 10^8}",
    "\\sum_{k=1}^{10^{12}} \\frac{1}{k^k}",
    "\\prod_{k=1}^{10^{9}} k",
    "\\int_0^{\\infty} e^{-x^{x^{x}}} \\sin(x^{9}) dx",
    "\\lim_{x \\to 0} \\frac{\\sin(\\tan(\\sin(x^{99})))}{x^{99}}",
    "\\sqrt[9^{9^9}]{2}",
    "10^{-10^{10^{10}}}",
    "\\log_{9^{9^{9}}}(2)",
    "2^{2^{2^{2^{2^{2}}}}} \\bmod 7",
]
INJECTIONS = [
    "__import__('os').system('touch {marker}')",
    "().__class__.__base__.__subclasses__()",
    "exec(\"open('{marker}', 'w')\")",
    'eval(\'__import__("os").mkdir("{marker}")\')',
    "\\input{/etc/passwd}",
    "\\immediate\\write18{touch {marker}}",
    "Symbol('x').func(open('{marker}','w'))",
    "lambda: open('{marker}', 'w')",
    "{{7*7}}",
    "${{{marker}}}",
    "'; DROP TABLE rewards; --",
    "1 if True else 2",
    "[x for x in range(10**9)]",
    "True",
    "None",
    "nan",
    "\\infty - \\infty",
    "\\frac{0}{0}",
    "\\frac{1}{0}",
    "*",
    "\\_",
    "\\text{the answer}",
    "42; 43",
    "anything",
]
ADD = "def add(a, b):\n    return a + b\n"
ASSERTS = ["assert add(1, 2) == 3", "assert add(-5, 5) == 0"]
CASES = [{"input": "1 2\n", "output": "3\n"}, {"input": "40 2\n", "output": "42\n"}]
READ = "a, b = map(int, input().split())\nprint(a + b)\n"

# programs that break a rule at the start, then solve the problem: right only where the rule's refusal is caught
BREAKING = {
    "fork": "import os\nif os.fork() == 0: os._exit(0)\n",
    "fork bomb": "import os\nwhile True: os.fork()\n",
    "process": "import subprocess\nsubprocess.run(['true'], check=True)\n",
    "multiprocessing": "import multiprocessing as m\np = m.get_context('fork').Process(target=print)\np.start()\n",
    "network": "import socket\nsocket.create_connection(('127.0.0.1', 80), 1)\n",
    "datagram": "import socket\nsocket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 53))\n",
    "url": "import urllib.request\nurllib.request.urlopen('http://127.0.0.1:80', timeout=1)\n",
    "local socket": "import socket\nsocket.socket(socket.AF_UNIX).connect('/var/run/docker.sock')\n",
    "kill": "import os, signal\nos.kill(os.getppid(), signal.SIGKILL)\n",
    "kill all": "import os, signal\nos.kill(-1, signal.SIGKILL)\n",
    "exec": "import os\nos.execv('/bin/sh', ['sh', '-c', 'echo 3'])\n",
    "write outside": "open('{marker}', 'w').write('x')\n",
    "delete outside": "import os\nos.rename('{victim}', '{marker}')\n",
    "truncate outside": "import os\nos.truncate('{victim}', 0)\n",
    "read outside": "open('{victim}').read()\n",
    "read the parent": "import os\nopen(f'/proc/{os.getppid()}/environ').read()\n",
    "big file": "f = open('big', 'wb')\nfor _ in range(1 << 12): f.write(bytes(1 << 20))\n",
    "memory": "x = bytearray(8 << 30)\n",
    "open files": "kept = [open('solution.py') for _ in range(10_000)]\n",
    "limits": "import resource\nresource.setrlimit(resource.RLIMIT_AS, (1 << 50, 1 << 50))\n",
    "session": "import os\nos.setsid()\n",
}
ENDLESS = {
    "loop": "while True: pass\n",
    "sleep": "import time\ntime.sleep(10**6)\n",
    "wait": "import threading\nthreading.Event().wait()\n",
    "regex": "import re\nre.match(r'(a+)+$', 'a' * 64 + 'b')\n",
    "many files": "import os, itertools\nfor i in itertools.count(): open(str(i), 'wb').write(bytes(1 << 16))\n",
    "close output": "import os, time\nos.close(1)\ntime.sleep(10**6)\n",
}
LEAVING = {
    "exit": "import sys\nsys.exit(0)\n",
    "hard exit": "import os\nos._exit(0)\n",
    "raise": "raise SystemExit(0)\n",
    "no output": "pass\n",
    "crash": "import ctypes\nctypes.string_at(0)\n",
    "abort": "import os\nos.abort()\n",
    "recursion": "import sys\nsys.setrecursionlimit(10**9)\ndef f(n): return f(n + 1)\nf(0)\n",
    "flood": "while True: print('x' * 65536)\n",
    "syntax": "def (:\n",
    "nesting": "(" * 5000 + ")" * 5000 + "\n",
    "nul": "print(3)\0\n",
    "close": "import sys\nsys.stdout.close()\n",
}


def fence(program: str) -> str:
    return f"<think>\nhm\n</think>\n\nHere it is:\n```python\n{program}```\n"


def hostile(seed: int, marker: str, victim: str, count: int = 500, heavy: bool = True) -> list[Case]:
    """`count` cases, the same for a seed. No program may make the file `marker`, or read, change or move `victim`.

    heavy: with the kinds that take the whole limit or a process of their own.
    """
    rng = random.Random(seed)
    kinds = [nested, huge, look_alikes, thoughts, several, injected, plain, words]
    kinds += [towers, programs] if heavy else []
    cases = [case for kind in kinds for case in kind(rng, every=True)]
    kinds += [programs] if heavy else []  # twice as often
    while len(cases) < count:
        cases += rng.choice(kinds)(rng)

    def placed(text: str) -> str:
        return text.replace("{marker}", marker).replace("{victim}", victim)

    return [Case(**(vars(case) | {"text": placed(case.text)})) for case in cases[:count]]


def box(content: str) -> str:
    return f"<think>\nhm\n</think>\n\nThe answer is \\boxed{{{content}}}."


def nested(rng: random.Random, every: bool = False) -> list[Case]:
    n = str(rng.randint(-999, 999))
    few, many = rng.randint(1, 3), rng.randint(100, 20_000)
    return [
        Case("few braces", box("{" * few + n + "}" * few), RIGHT, n),
        Case("many braces", box("{" * many + n + "}" * many), ANY, n),
        Case("many parentheses", box("(" * 300 + n + ")" * 300), ANY, n),
        Case("open braces", box("{" * many + n), WRONG, n),
        Case("open box", "\\boxed{" * many + n, WRONG, n),
        Case("boxes in boxes", "\\boxed{" * 50 + n + "}" * 50, ANY, n),
        Case("closing braces", "}" * many + f"\\boxed{{{n}}}", RIGHT, n),
        Case("fractions", box("\\frac{1}{" * 200 + n + "}" * 200), WRONG, str(int(n) + 1000)),
        Case("roots", box("\\sqrt{" * 150 + "2" + "}" * 150), WRONG, n),
        Case("escaped braces", box(f"\\{{ {n} \\}} \\}} \\}}"), ANY, n),
        Case("left right", box("\\left(" * 200 + n + "\\right)" * 200), ANY, n),
    ]


def towers(rng: random.Random, every: bool = False) -> list[Case]:
    made = [Case("tower", box(tower), WRONG, "31") for tower in TOWERS if every]  # once each: they take the whole limit
    a, b = rng.randint(2, 12), rng.randint(2, 4)
    power = Case("a power", box(f"{a}^{{{b}}}"), RIGHT, str(a**b))
    return [*made, power, Case("another power", box(f"{a}^{{{b}}}"), WRONG, str(a**b + 1))]


def huge(rng: random.Random, every: bool = False) -> list[Case]:
    n = str(rng.randint(10, 9999))
    filler = rng.choice(
        ["x", "9", "{", "}", "\\", "$", "\\boxed{", "<think>", "<answer>", "\n", " ", "=", "```\n", "a b "]
    )
    big = filler * ((1 << 20) // len(filler))
    unread = ANY if filler[-1].isspace() else WRONG
    return [
        Case(f"1 MB of {filler!r} thought", f"<think>{big}</think>\\boxed{{{n}}}", RIGHT, n),
        Case(f"1 MB of {filler!r} boxed", box(big), WRONG, n),
        Case(f"1 MB of {filler!r} alone", big, WRONG, n),
        Case(f"1 MB of {filler!r} before a number", big + n, unread, n),
        Case(f"1 MB of {filler!r} unfinished", f"<think>\\boxed{{{n}}}{big}", CUT_OFF, n, finished=False),
        Case("a number of 1 MB", box("7" * (1 << 20)), WRONG, n),
    ]


def look_alikes(rng: random.Random, every: bool = False) -> list[Case]:
    n = "".join(rng.choice("123456789") for _ in range(rng.randint(2, 6)))
    other = str(int(n) + rng.randint(1, 9))
    a, b = rng.randint(2, 9), rng.randint(2, 9)
    superscript = str(b).translate(str.maketrans("23456789", "²³⁴⁵⁶⁷⁸⁹"))
    return [
        Case("full-width digits", box(n.translate(FULLWIDTH)), RIGHT, n),
        Case("full-width digits of another number", box(other.translate(FULLWIDTH)), WRONG, n),
        Case("Arabic digits", box(n.translate(ARABIC)), RIGHT, n),
        Case("Devanagari digits", box(n.translate(DEVANAGARI)), RIGHT, n),
        Case("bold digits", box(n.translate(BOLD)), RIGHT, n),
        Case("a true minus", box("−" + n), RIGHT, "-" + n),
        Case("a lost minus", box("−" + n), WRONG, n),
        Case("letters for digits", box(n.translate(LETTERS)), WRONG, n),
        Case("circled digits", box(n.translate(CIRCLED)), WRONG, n),
        Case("a superscript is a power", box(f"{a}{superscript}"), RIGHT, str(a**b)),
        Case("a superscript is no digit", box(f"{a}{superscript}"), WRONG, f"{a}{b}"),
        Case("a look-alike box", f"\\bоxed{{{n}}} is {other}", WRONG, n),  # a Cyrillic o
        Case("a look-alike tag", f"<think>\\boxed{{{other}}}</thіnk>\\boxed{{{n}}}", WRONG, n),
        Case("a zero-width joiner", box("\u200d".join(n)), ANY, n),
        Case("written right to left", box("\u202e" + n[::-1]), ANY if n == n[::-1] else WRONG, n),
        Case("no text at all", "\x00\ufffd\ud800" * 9, WRONG, n),
    ]


def thoughts(rng: random.Random, every: bool = False) -> list[Case]:
    n = str(rng.randint(10, 9999))
    guess = f"so it may be \\boxed{{{n}}}. Let me check"
    return [
        Case("a guess, cut off", f"<think>{guess}", CUT_OFF, n, finished=False),
        Case("a guess in a thought that never ends", f"<think>{guess}", WRONG, n),
        Case("a guess in the prompt's thought", guess, WRONG, n, thinking=True),
        Case("a guess in the prompt's thought, cut off", guess, CUT_OFF, n, finished=False, thinking=True),
        Case("cut off behind the answer", f"<think>a</think>\\boxed{{{n}}} and", CUT_OFF, n, finished=False),
        Case("a second thought", f"<think>a</think><think>\\boxed{{{n}}}", WRONG, n),
        Case("the answer stays in the thought", f"<think>\\boxed{{{n}}}</think>It was easy!", WRONG, n),
        Case("another answer after the thought", f"<think>\\boxed{{{n}}}</think>\\boxed{{{n}1}}", WRONG, n),
        Case("the thought ends at once", f"<think></think>\\boxed{{{n}}}", RIGHT, n),
        Case("the prompt's thought ends", f"hm</think>\\boxed{{{n}}}", RIGHT, n, thinking=True),
        Case("tags in tags", f"<think>a</think><answer><answer>{n}</answer></answer>", ANY, n),
        Case("an answer in tags", f"<think>a</think><answer>{n}</answer>", RIGHT, n),
        Case("an open tag", f"<think>a</think><answer>{n}", WRONG, n),
        Case("a tag opened again", f"<think>a</think><answer>{n}</answer><answer>", WRONG, n),
    ]


def several(rng: random.Random, every: bool = False) -> list[Case]:
    n, m = (str(v) for v in rng.sample(range(10, 1000), 2))
    cases = [
        Case("the last box is right", f"\\boxed{{{m}}} no, \\boxed{{{n}}}", RIGHT, n),
        Case("the last box is wrong", f"\\boxed{{{n}}} no, \\boxed{{{m}}}", WRONG, n),
        Case("a thousand guesses", "".join(f"\\boxed{{{i}}}" for i in range(1, 1001)), WRONG, n),
        Case("a box in a box", f"\\boxed{{\\boxed{{{n}}}, {m}}}", WRONG, n),
        Case("a box behind a box", f"\\boxed{{{m}, \\boxed{{{n}}}}}", WRONG, n),
        Case("a broken box last", f"\\boxed{{{n}}} \\boxed{{", WRONG, n),
        Case("an empty box last", f"\\boxed{{{n}}} \\boxed{{}}", WRONG, n),
    ]
    inside = ["{m} or {n}", "{n} or {m}", "{m}, {n}", "\\{{{m},{n}\\}}", "{m} \\text{{ or }} {n}", "{m} \\vee {n}"]
    inside += ["x \\in \\{{{m}, {n}\\}}", "{n} and {m}", "${n}$ or ${m}$", "${n}$, ${m}$", "{n}; {m}", "{n} \\quad {m}"]
    inside += [
        "{n} \\pm 1",
        "\\approx {m} \\text{{ or }} {n}",
        "x={m}, x={n}",
        "[{n}, {m}]",
        "({n},{m})",
        "{n} \\neq {m}",
    ]
    inside += ["\\begin{{pmatrix}} {n} \\\\ {m} \\end{{pmatrix}}", "\\text{{either }} {n} \\text{{ or }} {m}"]
    return cases + [
        Case("two answers in a box", box(text.format(n=n, m=m)), WRONG, n)
        for text in (inside if every else rng.sample(inside, 4))
    ]


def injected(rng: random.Random, every: bool = False) -> list[Case]:
    n = str(rng.randint(50, 999))
    chosen = INJECTIONS if every else rng.sample(INJECTIONS, 4)
    return [Case("injection", box(text), WRONG, n) for text in chosen]


def plain(rng: random.Random, every: bool = False) -> list[Case]:
    n, m = (str(v) for v in rng.sample(range(10, 1000), 2))
    right = ["The answer is {n}", "The answer is {n}.", "the final answer is: **{n}**", "Answer: {n}", "#### {n}"]
    right += [
        "So {m} + 0 = {m}.\n{n}",
        "<answer> {n} </answer>",
        "We get $x = {n}$",
        "That makes {n} apples in all.",
        "答案是{n}",
    ]
    right += [
        "I thought {m}.\n\nThe answer is ${n}$.",
        "**Answer:** {n}",
        "= {n}",
        "1 + 1 = 2 = {n}",
        "result: \\({n}\\)",
    ]
    wrong = [
        "The answer is not {n}.",
        "The answer is {n} or {m}.",
        "Is it {n}?",
        "It cannot be {n}",
        "either {m} or {n}",
    ]
    wrong += [
        "The answer isn't {n}",
        "The answer is {m}",
        "{n}\n{m}",
        "The answer is {n}.\nNo: {m}",
        "between {m} and {n}",
    ]
    wrong += [
        "The answer is {n}, {m}",
        "x = {m} and y = {n}",
        "The answer is {m} {n}",
        "answer",
        "The answer is",
        "{n}{n}",
        "",
    ]
    wrong += [
        "The answer is {n}%{m}",
        "Maybe {n}",
        "The answer is {n}^{m}",
        "-{n}",
        "{n}.5",
        "0.{n}",
        "The answer is {n}e9",
    ]
    pick = (lambda texts: texts) if every else (lambda texts: rng.sample(texts, 3))
    return [
        *(Case("plain, right", text.format(n=n, m=m), RIGHT, n) for text in pick(right)),
        *(Case("plain, wrong", text.format(n=n, m=m), WRONG, n) for text in pick(wrong)),
    ]


def words(rng: random.Random, every: bool = False) -> list[Case]:
    """Answers that a computer algebra system may take for something else."""
    return [
        Case("an anagram", box("silent"), WRONG, "listen"),
        Case("an anagram in a text box", box("\\text{silent}"), WRONG, "\\text{listen}"),
        Case("the word", box("\\text{Listen}"), RIGHT, "listen"),
        Case("the other choice", box("C"), WRONG, "B"),
        Case("the choice", box("(B)"), RIGHT, "B"),
        Case("nearly zero", box("0"), WRONG, "0.0000001"),
        Case("rounded", box("0.333333"), RIGHT, "\\frac{1}{3}"),
        Case("rounded too far", box("0.3"), WRONG, "\\frac{1}{3}"),
        Case("the same formula", box("(x+1)^2"), RIGHT, "x^2+2x+1"),
        Case("another formula", box("(x+1)^2"), WRONG, "x^2+2x+2"),
        Case("another variable", box("y+1"), WRONG, "x+1"),
        Case("digits apart", box("1 2"), WRONG, "12"),
        Case("an interval", box("[0, 1)"), RIGHT, "[0,1)"),
        Case("an open interval", box("(0, 1)"), WRONG, "[0,1]"),
        Case("the tuple turned", box("(2, 1)"), WRONG, "(1, 2)"),
        Case("a huge near miss", box("123456789012345678901234567891"), WRONG, "123456789012345678901234567890"),
    ]


def programs(rng: random.Random, every: bool = False) -> list[Case]:
    def pick(options: dict[str, str], k: int) -> list[tuple[str, str]]:
        return list(options.items()) if every else [(name, options[name]) for name in rng.sample(sorted(options), k)]

    made = []
    for name, start in pick(BREAKING, 1):
        indented = "".join(f"    {line}\n" for line in start.splitlines())
        caught = f"try:\n{indented}except (OSError, MemoryError, ValueError):\n    pass\n"
        solution, tests = rng.choice([(ADD, ASSERTS), (READ, CASES)])
        made.append(Case(f"{name}, not caught", fence(start + solution), WRONG, tests=tests))
        made.append(Case(f"{name}, caught", fence(caught + solution), RIGHT, tests=tests))
    for name, start in pick(LEAVING, 1):
        solution, tests = rng.choice([(ADD, ASSERTS), (READ, CASES)])
        # closing the output after the tests pass would be right; in front of them nothing can be printed
        made.append(
            Case(f"leaves: {name}", fence(solution + start), ANY if name == "no output" else WRONG, tests=ASSERTS)
        )
        made.append(
            Case(f"leaves first: {name}", fence(start + solution), ANY if name == "no output" else WRONG, tests=tests)
        )
    for name, start in ENDLESS.items() if every else ():
        made.append(Case(f"endless: {name}", fence(start + ADD), WRONG, tests=ASSERTS))
    made += [
        Case("right with asserts", fence(ADD), RIGHT, tests=ASSERTS),
        Case("right with cases", fence(READ), RIGHT, tests=CASES),
        Case("wrong with asserts", fence(ADD.replace("+", "-")), WRONG, tests=ASSERTS),
        Case("wrong with cases", fence(READ.replace("+", "*")), WRONG, tests=CASES),
        Case("prints the outputs it knows", fence("print(3)\n"), WRONG, tests=CASES),
        Case("a program in the thought", f"<think>\n```python\n{ADD}```\n</think>\nDone.", WRONG, tests=ASSERTS),
        Case("a program without a fence", f"<think></think>\n{ADD}", WRONG, tests=ASSERTS),
        Case(
            "threads",
            fence("import threading\nt = threading.Thread(target=int)\nt.start()\nt.join()\n" + READ),
            RIGHT,
            tests=CASES,
        ),
        Case("a program of 1 MB", fence("x = 1\n" * 170_000 + ADD), ANY, tests=ASSERTS),
    ]
    return made if every else rng.sample(made, 3)

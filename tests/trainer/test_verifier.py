"""The pool of verifiers: order, cache, limits, kills from inside and outside, and what a resumed run finds again."""

from __future__ import annotations

import json
import os
import re
import signal
import struct
import subprocess
import sys
import textwrap
import threading
import time

import pytest

from longtrace.trainer import answers, sandbox
from longtrace.trainer.verifier import Verifier

posix = pytest.mark.skipif(os.name != "posix", reason="needs fork and resource limits")


@pytest.fixture(scope="module")
def scorers(tmp_path_factory):
    """A module of scorers on sys.path, as a user's would be."""
    folder = tmp_path_factory.mktemp("scorers")
    source = """
        import ctypes, os, sys, time
        def equal(answer, gold): return float(answer == gold)
        def loud(answer, gold): print("noise"); sys.stderr.write("noise"); os.write(1, b"noise"); return 1
        def sleep(answer, gold): time.sleep(10**6)
        def spin(answer, gold):
            while True: pass
        def stubborn(answer, gold):
            while True:
                try: time.sleep(10**6)
                except BaseException: pass
        def crash(answer, gold): ctypes.string_at(0)
        def leave(answer, gold): os._exit(0)
        def raises(answer, gold): raise RuntimeError(answer)
        def greedy(answer, gold): return float(len(bytearray(8 << 30)) > 0)
        def beyond(answer, gold): return float(answer)
        def process(answer, gold): return float(os.getppid() if answer == "keeper" else os.getpid()) / 1e9
        def once(answer, gold):
            if os.path.exists(answer): return 1.0
            open(answer, "w").close(); os._exit(1)
        def torch_free(answer, gold): return float("torch" not in sys.modules)
        def in_order(answer, gold): time.sleep(float(gold)); return float(answer)
    """
    (folder / "pool_scorers.py").write_text(textwrap.dedent(source))
    sys.path.insert(0, str(folder))
    yield lambda name, answer="", gold="": (f"pool_scorers:{name}", answer, gold)
    sys.path.remove(str(folder))


@pytest.fixture(scope="module")
def pool():
    with Verifier(workers=2, seconds=2) as pool:
        yield pool


def delta(pool, jobs):
    before = dict(pool.counts)
    verdicts = pool.check(jobs)
    return verdicts, {key: pool.counts[key] - before[key] for key in before if pool.counts[key] != before[key]}


# ---------------------------------------------------------------------------------------------------------------------
# mathematics


@pytest.mark.parametrize(
    "answer,gold,verdict",
    [
        ("42", "42", 1.0),
        ("\\frac{1}{2}", "0.5", 1.0),
        ("1/2", "\\dfrac{1}{2}", 1.0),
        ("2\\sqrt{3}", "\\sqrt{12}", 1.0),
        ("(x+1)^2", "x^2+2x+1", 1.0),
        ("(x+1)^2", "x^2+2x", 0.0),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "(3, \\frac{\\pi}{2})", 1.0),
        ("x=3", "3", 1.0),
        ("silent", "listen", 0.0),
        ("on", "no", 0.0),
        ("\\sin x", "sin x", 1.0),
        ("2+1=3", "3", 1.0),
        ("3=4", "4", 0.0),
        ("3=x=4", "4", 0.0),
        ("12_8", "12", 0.0),
        ("12_8", "12_9", 0.0),
        ("12_8", "12_{8}", 1.0),
        ("12_{10}", "12", 1.0),
        ("5\\text{ km}", "5\\text{ cm}", 0.0),
        ("5\\text{ cm}", "5", 1.0),
        ("5", "5\\text{ cm}", 1.0),
        ("1e3", "1000", 1.0),
        ("", "3", 0.0),
        ("3", "", 0.0),
        ("}{", "3", 0.0),
    ],
)
def test_mathematics(pool, answer, gold, verdict):
    assert pool.check([("math", answer, gold)]) == [verdict]


def test_numbers_and_words_are_decided_without_a_process():
    with Verifier(workers=1) as pool:
        jobs = [("math", "42", "042"), ("math", "41", "42"), ("math", "1,234", "1234"), ("math", "Paris.", "paris")]
        jobs += [("math", "9" * 5000, "9"), ("math", "$7$", "7"), ("math", "1/3", "2/6")]
        assert pool.check(jobs) == [1.0, 0.0, 1.0, 1.0, 0.0, 1.0, 1.0]
        assert pool._workers[0].process is None and pool.counts == {**dict.fromkeys(pool.counts, 0), "asked": 7}


def test_equal_jobs_are_checked_once_and_order_is_kept(pool):
    jobs = [("math", f"\\sqrt{{{n * n}}}+0", str(n)) for n in (2, 3, 2, 5, 3)] + [("math", "\\sqrt{4}+0", "3")]
    verdicts, counts = delta(pool, jobs)
    assert verdicts == [1.0] * 5 + [0.0] and counts == {"asked": 6, "cached": 2}
    verdicts, counts = delta(pool, [("math", "$\\sqrt{4}+0$.", "\\text{2}")])  # another spelling of the first
    assert verdicts == [1.0] and counts == {"asked": 1, "cached": 1}


def test_slow_answers_do_not_change_the_order(pool, scorers):
    jobs = [scorers("in_order", str(i / 10), str((5 - i) / 20)) for i in range(6)]
    assert pool.check(jobs) == [i / 10 for i in range(6)]


# ---------------------------------------------------------------------------------------------------------------------
# what goes wrong


@pytest.mark.parametrize("name", ["sleep", "spin", "stubborn"])
def test_a_scorer_that_never_ends_is_killed_and_counted(pool, scorers, name):
    verdicts, counts = delta(pool, [scorers(name), scorers("equal", name, name)])
    assert verdicts == [None, 1.0] and counts == {"asked": 2, "timed_out": 1}
    verdicts, counts = delta(pool, [scorers(name)])  # not tried again
    assert verdicts == [None] and counts == {"asked": 1, "cached": 1}


@posix
@pytest.mark.parametrize("name", ["crash", "leave"])
def test_a_scorer_that_dies_is_tried_again_once(pool, scorers, name):
    verdicts, counts = delta(pool, [scorers(name), scorers("equal", name, name)])
    assert verdicts == [None, 1.0] and counts == {"asked": 2, "crashed": 2}


@posix
def test_a_death_that_does_not_repeat_costs_nothing(pool, scorers, tmp_path):
    verdicts, counts = delta(pool, [scorers("once", str(tmp_path / "was here"))])
    assert verdicts == [1.0] and counts == {"asked": 1, "crashed": 1}


def test_a_scorer_that_raises_gives_no_verdict(pool, scorers):
    verdicts, counts = delta(pool, [scorers("raises"), scorers("beyond", "nan"), scorers("beyond", "word")])
    assert verdicts == [None, None, None] and counts == {"asked": 3, "failed": 3}


@pytest.mark.skipif(sys.platform != "linux", reason="limits address space")
def test_memory_is_limited(pool, scorers):
    verdicts, counts = delta(pool, [scorers("greedy")])
    assert verdicts == [None] and counts == {"asked": 1, "failed": 1}


def test_scores_are_held_to_0_and_1_and_noise_goes_nowhere(pool, scorers, capfd):
    assert pool.check([scorers("beyond", v) for v in ("7", "-7", "0.25", "inf")]) == [1.0, 0.0, 0.25, 1.0]
    assert pool.check([scorers("loud")]) == [1.0]
    assert capfd.readouterr() == ("", "")


def test_workers_never_load_torch(pool, scorers):
    assert pool.check([scorers("torch_free")]) == [1.0]


def test_a_kind_that_is_not_there_is_refused(pool):
    for kind, why in (("nonsense:f", "nonsense"), ("json:nothing", "no such function"), ("sums", "sums")):
        with pytest.raises(ImportError, match=why):
            pool.check([(kind, "", "")])
    assert pool.check([("math", "\\sqrt{16}", "4")]) == [1.0]


@posix
def test_workers_killed_from_outside_are_replaced(pool, scorers):
    pool.check([scorers("equal", str(i), str(i)) for i in range(4)])
    for worker in pool._workers:
        if worker.process:
            os.kill(worker.process.pid, signal.SIGKILL)
    verdicts, counts = delta(pool, [scorers("equal", f"after {i}", f"after {i}") for i in range(4)])
    assert verdicts == [1.0] * 4 and 1 <= counts["crashed"] <= 2
    (child,) = pool.check([scorers("process", "the child, not the keeper")])
    os.kill(round(1e9 * child), signal.SIGKILL)
    assert pool.check([scorers("equal", f"later {i}", f"later {i}") for i in range(4)]) == [1.0] * 4


@posix
def test_a_kill_in_the_middle_of_a_check(scorers):
    with Verifier(workers=1, seconds=20) as pool:
        assert pool.check([scorers("equal")]) == [1.0]
        timer = threading.Timer(0.3, os.killpg, (pool._workers[0].process.pid, signal.SIGKILL))
        timer.start()
        assert pool.check([scorers("in_order", "0.5", "1.5")]) == [0.5]
        timer.join()
        assert pool.counts["crashed"] == 1


@posix
def test_nothing_is_left_when_the_pool_closes(scorers):
    def alive(pid):
        try:
            os.kill(pid, 0)
        except ProcessLookupError:
            return False
        with open(f"/proc/{pid}/stat") as file:
            return file.read().rpartition(")")[2].split()[0] != "Z"

    pool = Verifier(workers=1)
    pids = [round(1e9 * value) for value in pool.check([scorers("process", "keeper"), scorers("process", "self")])]
    assert len(set(pids)) == 2 and pids[0] == pool._workers[0].process.pid
    pool.close()
    deadline = time.monotonic() + 10
    while any(map(alive, pids)) and time.monotonic() < deadline:
        time.sleep(0.01)
    assert not any(map(alive, pids))
    assert pool.check([scorers("equal", "again", "again")]) == [1.0]  # a closed pool opens when asked
    pool.close()


@posix
def test_workers_end_with_a_program_that_is_killed(scorers, tmp_path):
    """SIGKILL leaves no time to clean up: closed pipes end the keeper, and its end the child."""
    source = f"""
import sys, os
sys.path[:] = {sys.path!r}
from longtrace.trainer.verifier import Verifier
pool = Verifier(workers=1, seconds=30)
print([round(1e9 * v) for v in pool.check([("pool_scorers:process", who, "") for who in ("keeper", "self")])], flush=True)
pool.check([("pool_scorers:sleep", "", "")])
"""
    process = subprocess.Popen([sys.executable, "-c", source], stdout=subprocess.PIPE, text=True)
    keeper, child = json.loads(process.stdout.readline())
    time.sleep(0.2)  # the sleeping job is being checked
    os.kill(keeper, signal.SIGKILL)  # the child goes with it, although it would sleep for ever
    process.kill()
    process.wait()
    process.stdout.close()
    deadline = time.monotonic() + 10
    while os.path.exists(f"/proc/{child}") and time.monotonic() < deadline:
        time.sleep(0.01)
    if sys.platform == "linux":
        assert not os.path.exists(f"/proc/{child}")


def test_threads_may_share_a_pool(pool, scorers):
    found = {}

    def ask(name):
        found[name] = pool.check([scorers("equal", name, name), scorers("equal", name, "other")])

    threads = [threading.Thread(target=ask, args=(f"thread {i}",)) for i in range(4)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert list(found.values()) == [[1.0, 0.0]] * 4


# ---------------------------------------------------------------------------------------------------------------------
# the cache


def test_a_resumed_pool_has_the_verdicts(scorers):
    jobs = [scorers("equal", "a", "a"), scorers("equal", "a", "b"), scorers("leave"), scorers("raises")]
    with Verifier(workers=1) as pool:
        verdicts = pool.check(jobs)
        state = json.loads(json.dumps(pool.state_dict()))
    with Verifier(workers=1) as resumed:
        resumed.load_state_dict(state)
        assert resumed.check(jobs) == verdicts
        assert resumed._workers[0].process is None  # nothing was checked again
        assert resumed.counts["cached"] == pool.counts["cached"] + 4 and resumed.counts["crashed"] == 2 * (
            os.name == "posix"
        )


def test_the_cache_is_bounded_and_keeps_what_is_used(scorers):
    with Verifier(workers=1, cache=3) as pool:
        for name in "abc":
            pool.check([scorers("equal", name, name)])
        pool.check([scorers("equal", "a", "a"), scorers("equal", "d", "d")])  # b is the oldest now
        kept = [json.loads(key)[1] for key in pool.state_dict()["verdicts"]]
        assert kept == ["c", "a", "d"]
        many = [scorers("equal", str(i), str(i % 2)) for i in range(10)]  # more than the cache holds, in one call
        assert pool.check(many) == [float(i == i % 2) for i in range(10)]
        assert len(pool.state_dict()["verdicts"]) == 3


@pytest.mark.parametrize("bad", [{"workers": 0}, {"seconds": 0}, {"memory_mb": 1}, {"cache": 0}])
def test_bad_sizes_are_refused(bad):
    with pytest.raises(ValueError, match="accepted"):
        Verifier(**bad)


# ---------------------------------------------------------------------------------------------------------------------
# programs


ADD = "def add(a, b):\n    return a + b\n"


def code(cases=(), tests=""):
    return json.dumps({"cases": [{"input": i, "output": o} for i, o in cases], "tests": tests})


def test_programs_with_tests(pool):
    echo = "import sys\nprint(sys.stdin.read().upper())\n"
    jobs = [
        ("code", echo, code([("a\n", "A\n"), ("b", "B")])),
        ("code", echo, code([("a\n", "A\n"), ("b", "c")])),
        ("code", "print('A   ')\nprint()\n", code([("", "A")])),
        ("code", "print(' A')", code([("", "A")])),
        ("code", ADD, code(tests="assert add(1, 2) == 3")),
        ("code", ADD, code(tests="assert add(1, 2) == 4")),
        ("code", ADD, code(tests="assert add('1', 2) == 3")),
        (
            "code",
            ADD + "print('x' * 1000)\nif __name__ == '__main__':\n    input()\n",
            code(tests="assert add(1, 2) == 3"),
        ),
        ("code", "import numpy as np\nprint(int(np.arange(4).sum()))", code([("", "6")])),
    ]
    assert pool.check(jobs) == [1.0, 0.0, 1.0, 0.0, 1.0, 0.0, 0.0, 1.0, 1.0]


def test_a_program_that_never_ends_fails_and_is_counted(pool):
    verdicts, counts = delta(pool, [("code", "while True: pass", code([("", "")]))])
    assert verdicts == [0.0] and counts == {"asked": 1, "timed_out": 1}


def test_each_test_has_the_whole_limit():
    with Verifier(workers=1, seconds=2) as pool:
        slow = "import time\ntime.sleep(0.9)\nprint(1)"
        assert pool.check([("code", slow, code([("", "1")] * 3))]) == [1.0]


@pytest.mark.skipif(sys.platform != "linux", reason="the kernel's part is Linux only")
def test_what_the_sandbox_promises_holds_here():
    assert sandbox.protections() == dict.fromkeys(sandbox.PROBES, True)


def test_programs_see_neither_variables_nor_files(monkeypatch, tmp_path):
    monkeypatch.setenv("LONGTRACE_SECRET", "hidden")
    run = sandbox.run("import os\nprint(sorted(os.environ), os.listdir('.'), os.getcwd())")
    assert run.ok and "LONGTRACE_SECRET" not in run.output and "['solution.py']" in run.output
    folder = run.output.split()[-1]
    assert not os.path.exists(folder)
    leftovers = "import os\nos.makedirs('a/b')\nopen('a/b/c', 'w').write('x')\nos.chmod('a/b', 0)\nos.chmod('a', 0)"
    run = sandbox.run(leftovers + "\nprint(os.getcwd())")
    assert run.ok and not os.path.exists(run.output.strip())


@pytest.mark.skipif(
    sys.platform != "linux", reason="tests what stands in for the kernel, on a machine that can run both"
)
def test_the_audit_hook_stands_in_for_a_kernel_without_landlock(monkeypatch, tmp_path):
    source = sandbox._bootstrap().replace('if not lock_up(os.getcwd(), limits["parent"]):', "if True:")
    assert source != sandbox._bootstrap()
    monkeypatch.setattr(sandbox, "_bootstrap", lambda: source)
    held = sandbox.protections()
    assert {name for name, holds in held.items() if not holds} <= {"no reads outside", "no root rights"}
    assert sandbox.run("open('mine', 'w').write('x')\nprint(open('mine').read())").output == "x\n"


# ---------------------------------------------------------------------------------------------------------------------
# answers


@pytest.mark.parametrize(
    "text,value",
    [
        ("-1,234.5", "-2469/2"),
        (".5", "1/2"),
        ("+3", "3"),
        ("\\frac{2}{4}", "1/2"),
        ("-6/4", "-3/2"),
        ("007", "7"),
        ("1e3", "1000"),
        ("-2.5E-1", "-1/4"),
    ],
)
def test_plain_numbers(text, value):
    from fractions import Fraction

    assert answers.number(text)[0] == Fraction(value)


@pytest.mark.parametrize(
    "text", ["", "1/0", "--1", "1,23", "12,345,67", "1e5000", "e5", "1 2", "x", "٣", "²", "1_000", "0x10", "1" * 400]
)
def test_what_is_no_plain_number(text):
    assert answers.number(text) is None


def test_reading_is_linear_in_the_text():
    """A megabyte of each would take hours if anything were quadratic."""
    for piece in (
        "{",
        "}",
        "\\boxed{",
        "\\",
        "<answer>",
        "<think>",
        "</answer>",
        "```\n",
        "$",
        "\\(",
        "=",
        "1,",
        " ",
        "\n",
        "é",
    ):
        text = piece * ((1 << 20) // len(piece))
        answers.final_answer(text)
        answers.final_answer(text + "3", False)
        answers.last_code_block(text)
        answers.canonical(text[: answers.LONGEST])


# ---------------------------------------------------------------------------------------------------------------------
# the filter of system calls, for both architectures


def bootstrap():
    """The inside of the sandbox as a module."""
    from importlib.util import module_from_spec, spec_from_file_location
    from pathlib import Path

    spec = spec_from_file_location("sandbox_child", Path(sandbox.__file__).with_name("sandbox_child.py"))
    module = module_from_spec(spec)
    spec.loader.exec_module(module)
    return module


def decide(filter, architecture, number, *arguments):
    """What classic BPF returns for a system call: seccomp's data, then load, compare, jump, return."""
    data = struct.pack("=iIQ6Q", number, architecture, 0, *arguments, *[0] * (6 - len(arguments)))
    value, at = 0, 0
    while True:
        code, if_true, if_false, constant = struct.unpack_from("=HBBI", filter, 8 * at)
        at += 1
        if code == 0x06:
            return constant
        if code == 0x20:
            (value,) = struct.unpack_from("=I", data, constant)
        else:
            holds = {0x15: value == constant, 0x35: value >= constant, 0x45: bool(value & constant)}[code]
            at += if_true if holds else if_false


@pytest.mark.parametrize("machine", ["x86_64", "aarch64"])
def test_the_filter_of_system_calls(machine):
    child = bootstrap()
    filter = child.seccomp_filter(machine)
    name, clone, clone3, tgkill, prlimit = child.SPECIAL[machine]
    eperm, thread, me = child.ERRNO | 1, 0x3D0F00, os.getpid()
    column = 1 if machine == "x86_64" else 2
    denied = {int(entry.split()[column]) for entry in child.DENIED.split(",") if entry.split()[column] != "-"}
    special = {clone, clone3, tgkill, prlimit}
    for number in range(600):
        expected = eperm if number in denied else child.ALLOW
        assert number in special or decide(filter, name, number, 1, 2, 3) == expected, number
    assert len(denied) > 30 and not denied & special
    assert (
        decide(filter, name, clone, thread) == child.ALLOW and decide(filter, name, clone, 17) == eperm
    )  # SIGCHLD: a fork
    assert decide(filter, name, clone3) == child.ERRNO | 38
    assert decide(filter, name, tgkill, me, me, 6) == child.ALLOW and decide(filter, name, tgkill, 1, 1, 9) == eperm
    assert decide(filter, name, prlimit, 0, 7, 0, 99) == child.ALLOW  # reads a limit
    assert decide(filter, name, prlimit, 0, 7, 99, 0) == eperm and decide(filter, name, prlimit, 0, 7, 1 << 40) == eperm
    assert decide(filter, name ^ 1, 0) == child.KILL and decide(filter, name, 0x40000000 | 41) == child.KILL


@pytest.mark.parametrize(
    "machine,header", [("x86_64", "x86_64-linux-gnu/asm/unistd_64.h"), ("aarch64", "asm-generic/unistd.h")]
)
def test_the_numbers_of_the_calls_are_the_kernels(machine, header):
    from pathlib import Path

    path = Path("/usr/include") / header
    if not path.exists():
        pytest.skip("no kernel headers")
    numbers = dict(re.findall(r"#define __NR(?:3264)?_(\w+)\s+(\d+)", path.read_text()))
    child, column = bootstrap(), 1 if machine == "x86_64" else 2
    for entry in child.DENIED.split(","):
        words = entry.split()
        assert words[column] == numbers.get(words[0], "-"), words
    wanted = [numbers[call] for call in ("clone", "clone3", "tgkill", "prlimit64")]
    assert [str(number) for number in child.SPECIAL[machine][1:]] == wanted

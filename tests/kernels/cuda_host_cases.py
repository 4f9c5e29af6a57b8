"""Builds the CUDA sources for the host and runs cases of their kernels there, against the float64 references.

Shared by test_cuda_host.py and whatever wants the sources' status without a GPU.
"""

from __future__ import annotations

import io
import itertools
import os
import pickle
import shutil
import subprocess
import sys
from collections.abc import Callable, Iterator
from dataclasses import dataclass, field
from pathlib import Path

import torch

from longtrace.kernels import cuda
from longtrace.kernels.advantages import reference as advantages
from longtrace.kernels.blend import reference as blend

ROOT = Path(__file__).resolve().parents[2]
SOURCES = ROOT / "csrc" / "cuda"
HOST = Path(__file__).with_name("cuda_host")
KERNELS = ("advantages", "blend", "pack")
FLAGS = [
    "-x", "c++", "-std=c++17", "-O1", "-g1", "-fPIC", "-shared", "-fno-strict-aliasing", "-Wall", "-Wno-unknown-pragmas",
    "-fsanitize=address,undefined", "-fno-sanitize-recover=all", "-fno-omit-frame-pointer",
]  # fmt: skip
EPS = torch.finfo(torch.float32).eps
FAR = 2_300_000_000  # elements: past 2^31
SEEDS = 4  # orders of the threads that each case is run in


def missing() -> str:
    """Why nothing can be built for the host here; empty if it can."""
    if sys.platform != "linux" or not shutil.which("g++"):
        return "needs g++ on Linux"
    return "" if os.path.isabs(_libasan()) else "needs libasan"


def _libasan() -> str:
    return subprocess.run(["g++", "-print-file-name=libasan.so"], capture_output=True, text=True).stdout.strip()


def build(kernel: str, folder: Path, source: Path | None = None) -> Path:
    """The library of one kernel's source (or of a changed copy of it), with ASan and UBSan."""
    library = folder / f"{kernel}.so"
    command = ["g++", *FLAGS, "-I", HOST, "-I", SOURCES, source or SOURCES / f"{kernel}.cu", "-o", library]
    done = subprocess.run([str(c) for c in command], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr[-3000:]
    return library


@dataclass
class Case:
    name: str
    function: str
    buffers: dict
    arguments: list
    types: str
    check: Callable[[dict], None]
    read: dict
    shift: dict = field(default_factory=dict)
    pointers: dict = field(default_factory=dict)
    blocks: tuple[int, int] | None = None

    def spec(self, seed: int) -> dict:
        return {k: v for k, v in vars(self).items() if k not in ("name", "check")} | {"seed": seed}


def failures(library: Path, cases: list[Case], seed: int) -> list[str]:
    """What went wrong: wrong results, kernels that could not go on, sanitizers' complaints. Each case in SEEDS orders."""
    runs = [(case, seed * SEEDS + s) for case in cases for s in range(SEEDS)]
    payload = pickle.dumps((str(library), [case.spec(s) for case, s in runs]))
    environment = os.environ | {"LD_PRELOAD": _libasan(), "ASAN_OPTIONS": "detect_leaks=0"}
    command = [sys.executable, "-I", str(HOST / "run.py")]
    try:
        done = subprocess.run(command, input=payload, capture_output=True, env=environment, timeout=240)
        out, end = done.stdout, done.stderr.decode(errors="replace") if done.returncode else ""
    except subprocess.TimeoutExpired as stopped:
        out, end = stopped.stdout or b"", "runs for ever"
    if "Traceback" in end:  # run.py itself failed: nothing was learned about the kernel
        raise RuntimeError(end)
    found, at = [], 0
    stream = memoryview(out)
    for case, s in runs:
        if at >= len(stream):
            lines = [line for line in end.splitlines() if "ERROR" in line or "runtime error" in line] or [end[-500:]]
            found.append(f"{case.name} (seed {s}): died: {lines[0]}")
            break
        result, size = _next(stream[at:])
        at += size
        try:
            assert result["status"] == 0, result["error"] or result["status"]
            case.check(result)
        except AssertionError as error:
            found.append(f"{case.name} (seed {s}): {error}")
    return found


def _next(data: memoryview) -> tuple[dict, int]:
    stream = io.BytesIO(data)
    return pickle.load(stream), stream.tell()


def raw(x: torch.Tensor) -> bytes:
    return x.contiguous().view(torch.uint8).numpy().tobytes() if x.numel() else b""


def cooked(data: bytes, dtype: torch.dtype) -> torch.Tensor:
    return torch.frombuffer(bytearray(data), dtype=dtype) if data else torch.empty(0, dtype=dtype)


def check_close(name: str, ours: torch.Tensor, exact: torch.Tensor, bound: torch.Tensor) -> None:
    """|ours - exact| <= bound, and both or neither are finite."""
    ours, exact = ours.double(), exact.double()
    finite = exact.isfinite()
    assert torch.equal(ours.isfinite(), finite), (
        f"{name}: {(ours.isfinite() != finite).sum()} are finite or not, unlike"
    )
    off = ((ours - exact).abs() > bound).logical_and(finite).nonzero().flatten().tolist()
    assert not off, f"{name}[{off[0]}] is {ours[off[0]]}, not {exact[off[0]]} ({len(off)} are off)"


# ---------------------------------------------------------------------------------------------------------- advantages

SIZES = (8, 0, 1, 2, 31, 32, 33, 64, 1, 1023, 1025, 3, 0)


def advantages_cases(generator: torch.Generator) -> Iterator[Case]:
    def groups(sizes, kind):
        n = sum(sizes)
        r = torch.rand(n, generator=generator)
        if kind == "binary":
            r = r.round()
        elif kind == "alike":
            r = torch.repeat_interleave(torch.tensor([0.7, 0.0, -1.0] * len(sizes))[: len(sizes)], torch.tensor(sizes))
        elif kind == "far from zero":
            r = 1e4 + r.round() / 128
        elif kind == "unscored":
            r = torch.where(torch.rand(n, generator=generator) < 0.4, torch.nan, r.round())
            r[::17] = torch.inf
            r[: sizes[0]] = torch.nan  # a group without a score
        offsets = torch.tensor([0, *itertools.accumulate(sizes)])
        return r, offsets

    for kind in ("binary", "alike", "uniform", "unscored", "far from zero"):
        for how in itertools.product((True, False), repeat=3) if kind == "uniform" else [(True, False, True)]:
            yield _advantages_case(f"{kind} {how}", *groups(SIZES, kind), how, shift=4 * (kind == "uniform"))
    yield _advantages_case("one group", *groups((40,), "uniform"), (True, True, False))
    yield _advantages_case("no groups", torch.empty(0), torch.zeros(1, dtype=torch.int64), (True, False, True))
    yield _far_advantages_case(torch.rand(8, generator=generator))


def _advantages_case(name, rewards, offsets, how, shift=0) -> Case:
    groups = len(offsets) - 1
    exact, degenerate, counts = advantages.group_advantages(
        rewards, offsets, by_std=how[0], leave_one_out=how[1], sample=how[2]
    )
    # a few roundings of r - mean, and of the factor
    group = torch.repeat_interleave(offsets.diff())
    centred, *_ = advantages.group_advantages(rewards, offsets, by_std=False, leave_one_out=how[1], sample=how[2])
    widest = torch.zeros(groups, dtype=torch.float64).scatter_reduce_(0, group, centred.abs(), "amax")
    factor = torch.zeros(groups, dtype=torch.float64)
    factor.scatter_reduce_(0, group, (exact / centred).nan_to_num(0.0).abs(), "amax")
    bound = 8 * EPS * (widest * factor)[group]

    def check(result):
        check_close("values", cooked(result["values"], torch.float32), exact, bound)
        assert not cooked(result["values"], torch.float32)[exact == 0].any(), "zeros are exact"
        assert cooked(result["degenerate"], torch.bool).tolist() == degenerate.tolist(), "degenerate"
        found = cooked(result["counts"], torch.int64).tolist()
        assert found == counts.tolist(), f"counts {found}, not {counts.tolist()}"

    buffers = {
        "rewards": raw(rewards), "offsets": raw(offsets), "values": b"\xff" * 4 * len(rewards),
        "degenerate": b"\x02" * groups, "counts": bytes(32),
    }  # fmt: skip
    arguments = ["rewards", "offsets", groups, *map(int, how), "values", "degenerate", "counts", 0]
    read = dict.fromkeys(("values", "degenerate", "counts"))
    moved = dict.fromkeys(("rewards", "values"), shift)
    return Case(name, "longtrace_group_advantages", buffers, arguments, "ppliiipppp", check, read, moved)


def _far_advantages_case(rewards) -> Case:
    """Groups beyond 2^31 rewards, in the second block; the first, with the long group, is not run."""
    starts = [0, 1, 2, 3, FAR, FAR + 8, FAR + 8, FAR + 8, FAR + 8]
    own = _advantages_case("far", rewards, torch.tensor([0, 8]), (True, False, True))

    def check(result):
        own.check(result | {"degenerate": result["degenerate"][:1], "counts": cooked_counts(result["counts"])})

    def cooked_counts(data):  # the three groups behind are empty
        counts = cooked(data, torch.int64)
        return raw(counts - torch.tensor([0, 0, 0, 3]))

    size = 4 * (FAR + 8)
    buffers = {
        "rewards": {"size": size, "at": {4 * FAR: raw(rewards)}}, "offsets": raw(torch.tensor(starts)),
        "values": {"size": size, "at": {}}, "degenerate": bytes(8), "counts": bytes(32),
    }  # fmt: skip
    read = {"values": [(4 * FAR, 32)], "degenerate": [(4, 1)], "counts": None}
    arguments = ["rewards", "offsets", 8, 1, 0, 1, "values", "degenerate", "counts", 0]
    return Case("far", own.function, buffers, arguments, own.types, check, read, blocks=(1, 2))


# --------------------------------------------------------------------------------------------------------------- blend

CHUNK = 32768  # checked against the library's own by test_cuda_host.py
DTYPES = tuple(itertools.product((torch.float32, torch.bfloat16), repeat=2))


def blend_cases(generator: torch.Generator) -> Iterator[Case]:
    def draw(n, dtype, spoil=False):
        x = torch.randn(n, generator=generator).to(dtype)
        if spoil and n > 3:
            x[n // 2], x[n - 1] = torch.nan, torch.inf
        return x

    sizes = (0, 1, 7, 8, 9, 31, 32, 33, 0, 1023, 1025, 2048, 5000, 33, 0, 3, 1025)
    for alpha in (0.3, 1.0, 0.0, -0.5):
        some = sizes if alpha == 0.3 else sizes[-4:]
        pairs = [(draw(n, DTYPES[i % 4][0]), draw(n, DTYPES[i % 4][1])) for i, n in enumerate(some)]
        yield _blend_case(f"alpha {alpha}", pairs, alpha)
    for dtypes in DTYPES:
        pairs = [(draw(n, dtypes[0]), draw(n, dtypes[1])) for n in (1025, 40)]
        yield _blend_case(f"unaligned {dtypes}", pairs, 0.25, shift=(dtypes[0].itemsize, 3 * dtypes[1].itemsize))
    pairs = [(draw(n, torch.bfloat16, True), draw(n, torch.float32, n > 100)) for n in (9, 300, 2)]
    yield _blend_case("not finite", pairs, 0.5)
    pairs = [(draw(n, torch.bfloat16), draw(n, torch.bfloat16)) for n in (5, CHUNK + 2051)]
    yield _blend_case("two chunks", pairs, 0.6)
    yield _far_blend_case(draw(FAR % CHUNK, torch.bfloat16), draw(FAR % CHUNK, torch.bfloat16))


def _blend_case(name, pairs, alpha, shift=(0, 0)) -> Case:
    buffers, read, moved = {}, {}, {}
    rows = []
    for i, (t, e) in enumerate(pairs):
        buffers |= {f"t{i}": raw(t), f"e{i}": raw(e)}
        read[f"t{i}"] = None
        moved |= {f"t{i}": shift[0], f"e{i}": shift[1]}
        rows.append((0, 0, t.numel(), t.dtype == torch.bfloat16, e.dtype == torch.bfloat16))
    table, chunks = cuda.blend_table(rows, CHUNK)
    pointers = {"table": [(48 * i + 8 * k, f"{x}{i}") for i in range(len(pairs)) for k, x in enumerate("te")]}
    buffers |= {"table": raw(table), "partial": b"\xff" * 32 * chunks, "sums": b"\xff" * 32}
    read["sums"] = None
    check = _blend_check(pairs, alpha)
    arguments = ["table", len(pairs), chunks, alpha, 1 - alpha, "partial", "sums", 0]
    return Case(name, "longtrace_blend_gradients", buffers, arguments, "pllffppp", check, read, moved, pointers)


def _blend_check(pairs, alpha):
    exact = [t.double() for t, _ in pairs]
    wide = [e.double() for _, e in pairs]
    magnitude = [abs(alpha) * t.abs() + abs(1 - alpha) * e.abs() for t, e in zip(exact, wide)]
    roundings = 130 * EPS / 2 * torch.tensor(
        [sum((a * b).abs().nansum() for a, b in zip(*x)) for x in ((exact, exact), (wide, wide), (exact, wide))]
    )  # fmt: skip
    sums = blend.blend_gradients_(exact, wide, alpha)
    bad = sum((~t.isfinite() | ~e.isfinite()).sum() for t, e in pairs)

    def check(result):
        for i, ((t, _), out, size) in enumerate(zip(pairs, exact, magnitude)):
            own = torch.finfo(t.dtype).eps / 2 * out.abs() * 1.01 if t.dtype == torch.bfloat16 else 0.0
            check_close(f"tensor {i}", cooked(result[f"t{i}"], t.dtype), out, own + 2 * EPS * size)
        found = cooked(result["sums"], torch.float64)
        check_close("sums", found[:3], sums[:3], roundings)
        assert found[3] == bad, f"{found[3]} elements are not finite, not {bad}"

    return check


def _far_blend_case(trace, empty) -> Case:
    """The last chunk of 2.3e9 elements; the blocks of the others are not run."""
    own = _blend_case("far", [(trace, empty)], 0.3)
    table, chunks = cuda.blend_table([(0, 0, FAR, True, True)], CHUNK)
    start = 2 * (FAR - len(trace))
    buffers = own.buffers | {
        "t0": {"size": 2 * FAR, "at": {start: raw(trace)}}, "e0": {"size": 2 * FAR, "at": {start: raw(empty)}},
        "table": raw(table), "partial": bytes(32 * chunks),
    }  # fmt: skip
    arguments = ["table", 1, chunks, 0.3, 0.7, "partial", "sums", 0]
    read = {"t0": [(start, 2 * len(trace))], "sums": None}
    return Case(
        "far", own.function, buffers, arguments, own.types, own.check, read, {}, own.pointers, (chunks - 1, chunks)
    )


# ---------------------------------------------------------------------------------------------------------------- pack


def pack_cases(generator: torch.Generator) -> Iterator[Case]:
    def noise(n):
        return torch.randint(0, 255, (n,), generator=generator, dtype=torch.uint8).numpy().tobytes()

    for lengths in ((3, 0, 5, 1, 8, 0), (8,), (0,), (31, 32, 33, 7)):
        for row, gap, shift in ((2, 0, 0), (4, 4, 0), (48, 16, 0), (48, 0, 4), (1040, 0, 0), (7, 1, 1)):
            yield from _pack_cases(f"{lengths} of {row}", noise, lengths, max(lengths) + 1, row, gap, shift)
    yield from _far_pack_cases(noise)


def _pack_cases(name, noise, lengths, width, row, gap, shift) -> Iterator[Case]:
    """pack and unpack of rows with `gap` bytes between them, and more between documents."""
    row_stride = row + gap
    document_stride = width * row_stride + 2 * gap
    starts = [0, *itertools.accumulate(lengths)]
    rows, n = starts[-1], len(lengths)
    size = (n - 1) * document_stride + (width - 1) * row_stride + row
    padded, packed = noise(size), noise(rows * row)
    at = [(d, p, d * document_stride + p * row_stride) for d in range(n) for p in range(width)]
    gathered = b"".join(padded[a : a + row] for d, p, a in at if p < lengths[d])
    spread = bytearray(padded)
    for d, p, a in at:
        first = (starts[d] + p) * row
        spread[a : a + row] = packed[first : first + row] if p < lengths[d] else bytes(row)

    def equals(key, expected):
        def check(result):
            off = [i for i, (a, b) in enumerate(zip(result[key], expected, strict=True)) if a != b]
            assert not off, f"{key}: byte {off[0]} of row {off[0] // row} is wrong ({len(off)} are)"

        return check

    offsets = raw(torch.tensor(starts))
    strides = [document_stride, row_stride, row]
    moved = {"padded": shift, "packed": shift}
    buffers = {"padded": padded, "packed": bytes(rows * row), "offsets": offsets}
    arguments = ["padded", "offsets", n, rows, *strides, "packed", 0]
    check = equals("packed", gathered)
    yield Case(f"pack {name}", "longtrace_pack_rows", buffers, arguments, "pplllllpp", check, {"packed": None}, moved)
    buffers = {"padded": padded, "packed": packed, "offsets": offsets}
    arguments = ["packed", "offsets", n, width, *strides, "padded", 0]
    check = equals("padded", bytes(spread))
    yield Case(
        f"unpack {name}", "longtrace_unpack_rows", buffers, arguments, "pplllllpp", check, {"padded": None}, moved
    )


def _far_pack_cases(noise) -> Iterator[Case]:
    """Two documents of bf16 rows, 2.3e9 elements apart."""
    row, lengths, stride = 32, (2, 3), 2 * FAR
    first, second = noise(lengths[0] * row), noise(lengths[1] * row)
    size, width = stride + 3 * row, 3
    offsets = raw(torch.tensor([0, 2, 5]))
    padded = {"size": size, "at": {0: first, stride: second}}

    def packed_is(result):
        assert result["packed"] == first + second, "rows 2.3e9 elements away are wrong"

    def padded_is(result):
        assert result["padded"] == first + bytes(row) + second, "rows 2.3e9 elements away are wrong"

    buffers = {"padded": padded, "packed": bytes(5 * row), "offsets": offsets}
    arguments = ["padded", "offsets", 2, 5, stride, row, row, "packed", 0]
    yield Case("pack far", "longtrace_pack_rows", buffers, arguments, "pplllllpp", packed_is, {"packed": None})
    buffers = {"padded": {"size": size, "at": {}}, "packed": first + second, "offsets": offsets}
    arguments = ["packed", "offsets", 2, width, stride, row, row, "padded", 0]
    read = {"padded": [(0, 3 * row), (stride, 3 * row)]}
    yield Case("unpack far", "longtrace_unpack_rows", buffers, arguments, "pplllllpp", padded_is, read)


CASES = {"advantages": advantages_cases, "blend": blend_cases, "pack": pack_cases}


def cases(kernel: str, seed: int) -> list[Case]:
    return list(CASES[kernel](torch.Generator().manual_seed(seed)))

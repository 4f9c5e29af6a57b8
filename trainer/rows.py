"""Sources of rows: JSON lines, Parquet, the Hugging Face hub, generated tasks and reasoning_gym, read one row at a time."""

from __future__ import annotations

import json
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from longtrace.trainer.config import Refusal
from longtrace.trainer.shapes import to_answer, to_messages, to_tools

SOURCES = "file.jsonl, file.parquet, hub/name[:split], generated:NAME,k=v or reasoning_gym:NAME,k=v"
HUB_NAME = re.compile(r"[\w.-]+/[\w.-]+(:[\w.\-\[\]%]+){0,2}")
JSON_WORD = re.compile(r"-?\d+(\.\d+)?(e-?\d+)?|true|false|null")
FILE_SUFFIXES = {
    ".json",
    ".csv",
    ".tsv",
    ".txt",
    ".gz",
    ".zst",
    ".bz2",
    ".xz",
    ".zip",
    ".arrow",
    ".yaml",
    ".yml",
    ".npz",
}


@dataclass
class Row:
    """One row: `messages` (role, content), the reference `answer`, `where` it stands ("file.jsonl:12"), and the fields."""

    messages: list[dict[str, Any]]
    answer: str | None
    where: str
    raw: dict[str, Any]
    tools: list[dict] | None = None

    @property
    def finished(self) -> bool:
        """False where the row itself says that its text was cut off."""
        return self.raw.get("finished") is not False and self.raw.get("finish_reason") not in ("length", "max_tokens")

    @property
    def marked_wrong(self) -> bool:
        """True where the row itself says that its answer is wrong."""
        return self.raw.get("correct") is False


def read_rows(
    spec: str,
    *,
    columns: Mapping[str, str] | None = None,
    skip_bad_rows: bool = False,
    bad_rows: list[str] | None = None,
) -> Iterator[Row]:
    """The rows of one source, in order.

    columns: {old: new} renames fields before the shape is recognised. Rows without an assistant text are yielded too
    (prompts for evaluation and rollouts). A row that cannot be read raises Refusal ("file:line: field: found X; accepted: Y"),
    or with skip_bad_rows is left out and its line appended to `bad_rows`. A source that cannot be opened always raises.
    """
    for where, raw in raw_rows(spec, columns=columns):
        try:
            if isinstance(raw, Refusal):
                raise raw
            yield Row(to_messages(raw), to_answer(raw), where, raw, to_tools(raw))
        except Refusal as refusal:
            line = f"{where}: {refusal}"
            if not skip_bad_rows:
                raise Refusal(line) from None
            if bad_rows is not None:
                bad_rows.append(line)


def raw_rows(spec: str, *, columns: Mapping[str, str] | None = None) -> Iterator[tuple[str, dict[str, Any] | Refusal]]:
    """(where, fields) of every row of one source, in order, or (where, why it cannot be read), whatever its shape."""
    for where, item in _items(spec):
        try:
            yield where, item if isinstance(item, Refusal) else _rename(item, columns or {})
        except Refusal as refusal:
            yield where, refusal


def count_rows(spec: str) -> int | None:
    """How many rows a file source holds, for progress bars; None where that is not known before reading."""
    path = Path(spec)
    if path.suffix == ".parquet" and path.is_file():
        import pyarrow.parquet

        try:
            return pyarrow.parquet.ParquetFile(path).metadata.num_rows
        except (pyarrow.ArrowException, OSError):
            return None
    if path.suffix == ".jsonl" and path.is_file():
        with path.open("rb") as file:
            return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 20), b""))
    return None


def _items(spec: str) -> Iterator[tuple[str, dict | Refusal]]:
    """(where, row fields) or (where, why it cannot be read) for every row of a source."""
    kind, _, rest = spec.partition(":")
    if kind == "generated":
        from longtrace.trainer import tasks

        return _numbered(spec, tasks.rows(rest))
    if kind == "reasoning_gym":
        return _numbered(spec, _reasoning_gym(spec, rest))
    path = Path(spec)
    if path.is_dir():
        raise Refusal(f"{spec}: found a folder; accepted: {SOURCES}")
    suffix = path.suffix.lower()
    if suffix in (".jsonl", ".parquet"):
        if not path.is_file():
            raise Refusal(f"{spec}: no such file; accepted: {SOURCES}")
        return _jsonl(path) if suffix == ".jsonl" else _parquet(path)
    if path.is_file() or suffix in FILE_SUFFIXES:
        found = f"found the extension {suffix}" if suffix else "found a file without an extension"
        raise Refusal(f"{spec}: {found}; accepted: {SOURCES}")
    if HUB_NAME.fullmatch(spec):
        return _hub(spec)
    raise Refusal(f"{spec}: no such file or source; accepted: {SOURCES}")


def _jsonl(path: Path) -> Iterator[tuple[str, dict | Refusal]]:
    with path.open("rb") as file:
        empty = True
        for number, line in enumerate(file, 1):
            if number == 1:
                line = line.removeprefix(b"\xef\xbb\xbf")
            if not line.strip():
                continue
            empty = False
            yield f"{path}:{number}", _json_object(line)
    if empty:
        raise Refusal(f"{path}: the file is empty; accepted: JSON lines, one object a line")


def _json_object(line: bytes) -> dict | Refusal:
    try:
        value = json.loads(line.decode("utf-8"))
    except UnicodeDecodeError as error:
        return Refusal(f"found byte 0x{line[error.start]:02x} at {error.start + 1}, not UTF-8; accepted: UTF-8 text")
    except json.JSONDecodeError as error:
        what = error.msg.removesuffix(" at")
        return Refusal(f"broken JSON: {what} at character {error.colno:,}; accepted: one JSON object a line")
    except ValueError as error:  # a number of more digits than Python converts
        return Refusal(f"broken JSON: {error}; accepted: one JSON object a line")
    except RecursionError:
        return Refusal("broken JSON: nested too deeply; accepted: one JSON object a line")
    if not isinstance(value, dict):
        return Refusal(f"found a JSON {type(value).__name__}; accepted: one JSON object a line")
    return value


def _parquet(path: Path) -> Iterator[tuple[str, dict | Refusal]]:
    import pyarrow.parquet

    try:
        file = pyarrow.parquet.ParquetFile(path)
    except (pyarrow.ArrowException, OSError) as error:
        raise Refusal(f"{path}: not a Parquet file ({str(error).splitlines()[0]}); accepted: {SOURCES}") from None
    if file.metadata.num_rows == 0:
        raise Refusal(f"{path}: the file has no rows; accepted: Parquet with at least one")

    def rows() -> Iterator[dict]:
        try:
            for batch in file.iter_batches(batch_size=256):
                yield from batch.to_pylist()
        except (pyarrow.ArrowException, OSError) as error:
            raise Refusal(f"{path}: a damaged Parquet file ({str(error).splitlines()[0]})") from None

    return _numbered(str(path), rows())


def _hub(spec: str) -> Iterator[tuple[str, dict | Refusal]]:
    import datasets

    name, *rest = spec.split(":")
    split = rest[-1] if rest else "train"
    config = rest[0] if len(rest) == 2 else None
    try:
        rows = datasets.load_dataset(name, config, split=split)
    except (
        Exception
    ) as error:  # datasets raises a dozen kinds (network, name, config, split): all end the run the same way
        reason = next(iter(str(error).strip().splitlines()), type(error).__name__)
        raise Refusal(
            f"{spec}: cannot be loaded from the hub: {reason}; accepted: hub/name[:config][:split]"
        ) from error
    return _numbered(spec, rows)


def _reasoning_gym(spec: str, rest: str) -> Iterator[dict[str, Any]]:
    try:
        import reasoning_gym
    except ImportError:
        raise Refusal(f"{spec}: reasoning_gym is not installed; accepted: pip install 'longtrace[rl]' first") from None
    name, *pairs = rest.split(",")
    try:
        options = dict(pair.split("=", 1) for pair in pairs)
        options = {key: json.loads(value) if JSON_WORD.fullmatch(value) else value for key, value in options.items()}
        dataset = reasoning_gym.create_dataset(name, **{"seed": 0, **options})  # its own default is a random one
    except (ValueError, TypeError, AssertionError) as error:
        raise Refusal(f"{spec}: {error}; accepted: reasoning_gym:NAME,key=value,...") from None
    for i in range(len(dataset)):
        item = dataset[i]
        yield {"problem": item["question"], "answer": item["answer"], "task": name, "metadata": item["metadata"]}


def _numbered(spec: str, rows) -> Iterator[tuple[str, dict]]:
    return ((f"{spec}:{i}", row) for i, row in enumerate(rows, 1))


def _rename(raw: dict[str, Any], columns: Mapping[str, str]) -> dict[str, Any]:
    if not columns:
        return raw
    missing = [old for old in columns if old not in raw]
    if missing:
        raise Refusal(
            f"--columns {missing[0]}={columns[missing[0]]}: found fields {', '.join(raw)}; accepted: one of them"
        )
    taken = [(old, new) for old, new in columns.items() if new in raw and new not in columns]
    if taken:
        raise Refusal(
            f"--columns {taken[0][0]}={taken[0][1]}: the row has a field {taken[0][1]} already; rename that one too"
        )
    return {columns.get(key, key): value for key, value in raw.items()}

"""Sources and row shapes: everything becomes messages, and everything else is one clear line."""

from __future__ import annotations

import json
import sys
import types

import pyarrow
import pyarrow.parquet
import pytest

from longtrace.trainer.config import Refusal
from longtrace.trainer.traces import read_rows

THOUGHT = "<think>\ntwo and two\n</think>\n\nIt is \\boxed{4}."
USER = {"role": "user", "content": "2+2?"}


def write(path, *rows):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return str(path)


def only_row(tmp_path, row, **options):
    rows = list(read_rows(write(tmp_path / "file.jsonl", row), **options))
    assert len(rows) == 1
    return rows[0]


SHAPES = {
    "messages": {"messages": [USER, {"role": "assistant", "content": THOUGHT}]},
    "messages with reasoning_content": {
        "messages": [USER, {"role": "assistant", "reasoning_content": "two and two", "content": "It is \\boxed{4}."}]
    },
    "messages with reasoning": {
        "messages": [USER, {"role": "assistant", "reasoning": "\ntwo and two\n", "content": "\n\nIt is \\boxed{4}."}]
    },
    "messages with thinking": {
        "messages": [USER, {"role": "assistant", "thinking": "two and two", "content": "It is \\boxed{4}."}]
    },
    "messages in text parts": {
        "messages": [
            {"role": "user", "content": [{"type": "text", "text": "2+"}, {"type": "text", "text": "2?"}]},
            {"role": "assistant", "content": [{"type": "text", "text": THOUGHT}]},
        ]
    },
    "conversations": {"conversations": [{"from": "human", "value": "2+2?"}, {"from": "gpt", "value": THOUGHT}]},
    "conversations with roles": {"conversations": [USER, {"role": "assistant", "content": THOUGHT}]},
    "prompt and completion": {"prompt": "2+2?", "completion": THOUGHT},
    "prompt and completion as messages": {"prompt": [USER], "completion": [{"role": "assistant", "content": THOUGHT}]},
    "prompt, reasoning_content and completion": {
        "prompt": "2+2?",
        "reasoning_content": "two and two",
        "completion": "It is \\boxed{4}.",
    },
    "problem and trace": {"problem": "2+2?", "trace": THOUGHT, "answer": "4"},
    "problem, reasoning_content and answer": {
        "problem": "2+2?",
        "reasoning_content": "two and two",
        "answer": "It is \\boxed{4}.",
    },
    "a trace whose <think> stood in the prompt": {"problem": "2+2?", "trace": "two and two</think>It is \\boxed{4}."},
    "a trace with other white space": {"problem": "2+2?", "trace": " <think>two and two\n</think> It is \\boxed{4}.\n"},
    "a trace in OpenThoughts tags": {
        "problem": "2+2?",
        "trace": "<|begin_of_thought|>\n\ntwo and two\n\n<|end_of_thought|>\n\n"
        "<|begin_of_solution|>\n\nIt is \\boxed{4}.\n\n<|end_of_solution|>",
    },
    "a trace in Harmony channels": {
        "problem": "2+2?",
        "trace": "<|channel|>analysis<|message|>two and two<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is \\boxed{4}.<|return|>",
    },
    "a conversation in Harmony text": {
        "text": "<|start|>user<|message|>2+2?<|end|><|start|>assistant<|channel|>analysis<|message|>two and two<|end|>"
        "<|start|>assistant<|channel|>final<|message|>It is \\boxed{4}.<|return|>"
    },
    "messages with a channel each": {
        "messages": [
            USER,
            {"role": "assistant", "channel": "analysis", "content": "two and two"},
            {"role": "assistant", "channel": "final", "content": "It is \\boxed{4}."},
        ]
    },
    "columns that are null": {"messages": None, "prompt": None, "problem": "2+2?", "trace": THOUGHT, "answer": None},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_becomes_the_same_messages(tmp_path, shape):
    row = only_row(tmp_path, SHAPES[shape])
    assert row.messages == [USER, {"role": "assistant", "content": THOUGHT}], shape
    assert row.where.endswith("file.jsonl:1")


def test_system_tools_and_calls_pass_through(tmp_path):
    call = {"type": "function", "function": {"name": "add", "arguments": '{"a": 2, "b": 2}'}}
    row = only_row(
        tmp_path,
        {
            "system": "Be brief.",
            "tools": json.dumps([{"type": "function", "function": {"name": "add"}}]),
            "messages": [
                USER,
                {"role": "assistant", "content": None, "tool_calls": [call]},
                {"role": "tool", "content": "4", "tool_call_id": "1"},
                {"role": "assistant", "content": "4"},
            ],
        },
    )
    assert [m["role"] for m in row.messages] == ["system", "user", "assistant", "tool", "assistant"]
    assert row.messages[2]["tool_calls"][0]["function"]["arguments"] == {"a": 2, "b": 2}
    assert row.messages[3]["tool_call_id"] == "1"
    assert row.tools[0]["function"]["name"] == "add"


def test_an_empty_system_text_is_none(tmp_path):
    assert only_row(tmp_path, {"system": " ", "problem": "2+2?"}).messages == [USER]


def test_harmony_system_and_developer_become_one_system_message(tmp_path):
    text = (
        "<|start|>system<|message|>Reasoning: high<|end|><|start|>developer<|message|>Be brief.<|end|>"
        "<|start|>user<|message|>2+2?<|end|><|start|>assistant<|channel|>final<|message|>4<|return|>"
    )
    row = only_row(tmp_path, {"text": text})
    assert [(m["role"], m["content"]) for m in row.messages] == [
        ("system", "Reasoning: high\n\nBe brief."),
        ("user", "2+2?"),
        ("assistant", "4"),
    ]


def test_harmony_that_stops_in_thought_stays_open(tmp_path):
    row = only_row(tmp_path, {"problem": "2+2?", "trace": "<|channel|>analysis<|message|>two and"})
    assert row.messages[-1]["content"] == "<think>\ntwo and"


def test_rows_without_an_answer_text_are_read_for_evaluation(tmp_path):
    row = only_row(tmp_path, {"problem": "2+2?", "answer": 4})
    assert row.messages == [USER] and row.answer == "4" and row.raw == {"problem": "2+2?", "answer": 4}


def test_columns_rename_fields(tmp_path):
    raw = {"question": "2+2?", "solution": THOUGHT}
    row = only_row(tmp_path, raw, columns={"question": "problem", "solution": "trace"})
    assert row.messages == [USER, {"role": "assistant", "content": THOUGHT}]
    with pytest.raises(Refusal, match=r"file.jsonl:1: --columns query=problem: found fields question, solution"):
        only_row(tmp_path, raw, columns={"query": "problem"})
    with pytest.raises(Refusal, match=r"--columns question=solution: the row has a field solution already"):
        only_row(tmp_path, raw, columns={"question": "solution"})


def test_parquet_gives_the_same_rows(tmp_path):
    rows = [{"problem": f"{i}+{i}?", "trace": THOUGHT, "answer": str(2 * i)} for i in range(5)]
    table = pyarrow.Table.from_pylist([*rows, {"problem": "x", "trace": THOUGHT, "answer": None}])
    pyarrow.parquet.write_table(table, tmp_path / "file.parquet")
    read = list(read_rows(str(tmp_path / "file.parquet")))
    assert [row.messages[0]["content"] for row in read] == [*(row["problem"] for row in rows), "x"]
    assert read[-1].answer is None and read[-1].where.endswith("file.parquet:6")


def test_the_hub_is_asked_for_name_config_and_split(monkeypatch):
    import datasets

    asked = []

    def load_dataset(name, config, split):
        asked.append((name, config, split))
        if name == "some/missing":
            raise ConnectionError("Couldn't reach 'some/missing' on the Hub\nmore lines")
        return [{"problem": "2+2?", "trace": THOUGHT}]

    monkeypatch.setattr(datasets, "load_dataset", load_dataset)
    for spec in ("some/traces", "some/traces:test", "some/traces:main:test"):
        assert [row.where for row in read_rows(spec)] == [f"{spec}:1"]
    assert asked == [("some/traces", None, "train"), ("some/traces", None, "test"), ("some/traces", "main", "test")]
    with pytest.raises(
        Refusal, match="some/missing: cannot be loaded from the hub: Couldn't reach 'some/missing' on the Hub;"
    ):
        list(read_rows("some/missing"))


def test_reasoning_gym_rows(monkeypatch):
    module = types.ModuleType("reasoning_gym")
    asked = {}

    def create_dataset(name, **options):
        if name == "no_such_task":
            raise ValueError("Dataset 'no_such_task' not registered")
        asked.update(options, name=name)
        return [{"question": "2+2?", "answer": "4", "metadata": {}}]

    module.create_dataset = create_dataset
    monkeypatch.setitem(sys.modules, "reasoning_gym", module)
    (row,) = read_rows("reasoning_gym:chain_sum,min_terms=2,size=1,ratio=0.5,mode=plain")
    assert row.messages == [USER] and row.answer == "4"
    assert asked == {"name": "chain_sum", "seed": 0, "min_terms": 2, "size": 1, "ratio": 0.5, "mode": "plain"}
    with pytest.raises(Refusal, match="not registered"):
        list(read_rows("reasoning_gym:no_such_task"))
    monkeypatch.setitem(sys.modules, "reasoning_gym", None)
    with pytest.raises(Refusal, match="reasoning_gym is not installed"):
        list(read_rows("reasoning_gym:chain_sum"))


def test_generated_rows_are_read(tmp_path):
    rows = list(read_rows("generated:chain,steps=6,rows=3,seed=0"))
    assert len(rows) == 3
    for row in rows:
        assert row.messages[-1]["content"].startswith("<think>\n") and "</think>\n\n" in row.messages[-1]["content"]


BAD_ROWS = {
    "broken JSON": (
        b'{"problem": "2+2?", "trace": ',
        r"broken JSON: .* at character \d+; accepted: one JSON object a line",
    ),
    "a list": (b"[1, 2]", r"found a JSON list; accepted: one JSON object a line"),
    "bytes that are not UTF-8": (b'{"problem": "caf\xe9"}', r"found byte 0xe9 at 17, not UTF-8; accepted: UTF-8 text"),
    "half a surrogate pair": (rb'{"problem": "\ud800", "trace": "4"}', r"problem: found half a surrogate pair"),
    "no known field": (
        b'{"question": "2+2?", "response": "4"}',
        r"fields: found question, response; accepted: messages",
    ),
    "no field": (b"{}", r"fields: found none; accepted: messages"),
    "problem is a number": (b'{"problem": 7, "trace": "4"}', r"problem: found int 7; accepted: text"),
    "trace is a list": (b'{"problem": "2+2?", "trace": 4}', r"trace: found int 4; accepted: text"),
    "answer is a list": (
        b'{"problem": "2+2?", "trace": "4", "answer": [4]}',
        r"answer: found list \[4\]; accepted: text or a",
    ),
    "answer is half a surrogate pair": (
        rb'{"problem": "2+2?", "trace": "4", "answer": "\ud800"}',
        r"answer: found half a surrogate pair",
    ),
    "messages is text": (b'{"messages": "hi"}', r"messages: found 'hi'; accepted: a list of messages"),
    "messages is empty": (
        b'{"messages": []}',
        r"messages: found list \[\]; accepted: a list of messages, at least one",
    ),
    "a message is text": (
        b'{"messages": ["hi"]}',
        r"messages\[0\]: found 'hi'; accepted: an object with role and content",
    ),
    "an unknown role": (
        b'{"messages": [{"role": "narrator", "content": "hi"}]}',
        r"messages\[0\].role: found 'narrator'; accepted: system, developer, user",
    ),
    "no role": (b'{"messages": [{"content": "hi"}]}', r"messages\[0\].from: found fields content; accepted: system"),
    "content is a number": (
        b'{"messages": [{"role": "user", "content": 7}]}',
        r"messages\[0\].content: found int 7; accepted: text or a list of text parts",
    ),
    "content is a picture": (
        b'{"messages": [{"role": "user", "content": [{"type": "image"}]}]}',
        r"messages\[0\].content: found list .*; accepted: text or a list of text parts",
    ),
    "no content": (b'{"messages": [{"role": "user"}]}', r"messages\[0\].content: found fields role; accepted: text"),
    "a Harmony tool call": (
        b'{"problem": "2+2?", "trace": "<|channel|>commentary to=functions.add<|message|>{}<|call|>"}',
        r"channel: found a tool call .*; accepted: analysis, commentary, final",
    ),
}


@pytest.mark.parametrize("bad", BAD_ROWS)
def test_a_bad_row_is_one_clear_line(tmp_path, bad):
    line, message = BAD_ROWS[bad]
    path = tmp_path / "file.jsonl"
    good = json.dumps(SHAPES["problem and trace"]).encode()
    path.write_bytes(b"\xef\xbb\xbf" + good + b"\n\n" + line + b"\n" + good + b"\n")
    with pytest.raises(Refusal, match=f"file.jsonl:3: {message}") as refusal:
        list(read_rows(str(path)))
    assert "\n" not in str(refusal.value) and len(str(refusal.value)) < 500
    skipped: list[str] = []
    rows = list(read_rows(str(path), skip_bad_rows=True, bad_rows=skipped))
    assert [row.where[-2:] for row in rows] == [":1", ":4"]
    assert skipped == [str(refusal.value)]


def test_sources_that_cannot_be_opened(tmp_path):
    (tmp_path / "empty.jsonl").write_bytes(b"")
    (tmp_path / "blank.jsonl").write_bytes(b"\n  \n")
    (tmp_path / "notes.txt").write_text("hello")
    (tmp_path / "noname").write_text("hello")
    (tmp_path / "fake.parquet").write_text("hello")
    pyarrow.parquet.write_table(pyarrow.table({"problem": []}), tmp_path / "none.parquet")
    for name, message in {
        "empty.jsonl": "empty.jsonl: the file is empty; accepted: JSON lines",
        "blank.jsonl": "blank.jsonl: the file is empty; accepted: JSON lines",
        "missing.jsonl": "missing.jsonl: no such file; accepted: file.jsonl, file.parquet, hub/name",
        "notes.txt": "notes.txt: found the extension .txt; accepted: file.jsonl",
        "missing.csv": "missing.csv: found the extension .csv; accepted: file.jsonl",
        "noname": "noname: found a file without an extension; accepted: file.jsonl",
        "fake.parquet": "fake.parquet: not a Parquet file",
        "none.parquet": "none.parquet: the file has no rows",
        ".": "found a folder; accepted: file.jsonl",
    }.items():
        with pytest.raises(Refusal, match=message) as refusal:
            list(read_rows(str(tmp_path / name), skip_bad_rows=True))
        assert "\n" not in str(refusal.value)
    with pytest.raises(Refusal, match="traces: no such file or source"):
        list(read_rows("traces"))


def test_damaged_parquet_and_endless_numbers_are_one_line(tmp_path):
    import pyarrow
    import pyarrow.parquet

    table = pyarrow.table(
        {
            "problem": ["p" * 50] * 500,
            "trace": [f"<think>{i}</think> {i}" * 9 for i in range(500)],
            "answer": ["1"] * 500,
        }
    )
    file = tmp_path / "rows.parquet"
    pyarrow.parquet.write_table(table, file, compression="zstd")
    raw = bytearray(file.read_bytes())
    for start, what in ((8, "damaged"), (len(raw) - 40, "Parquet")):
        broken = raw.copy()
        broken[start : start + 24] = b"\xff" * 24
        file.write_bytes(broken)
        with pytest.raises(Refusal, match=what) as caught:
            list(read_rows(str(file)))
        assert "\n" not in str(caught.value)
    lines = tmp_path / "rows.jsonl"
    lines.write_text('{"problem": ' + "9" * 5000 + "}\n")
    with pytest.raises(Refusal, match=r"rows\.jsonl:1: broken JSON"):
        list(read_rows(str(lines)))

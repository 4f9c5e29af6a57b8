"""The audit: each way of losing a part of a trace is one clear line, and nothing is left out uncounted."""

from __future__ import annotations

import json

import numpy as np
import pytest

from longtrace.trainer.config import Refusal
from longtrace.trainer.prepare import byte_tokenizer
from longtrace.trainer.traces import TraceSet, audit_traces, load_traces

THOUGHT = "<think>\ntwo and two\n</think>\n\nIt is \\boxed{4}."
GOOD = {"problem": "2+2?", "trace": THOUGHT, "answer": "4"}
TURN = "<|im_start|>{{ m.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
EATS_THOUGHT = (  # the heart of R1-Distill's shipped template
    f"{{% for m in messages %}}{TURN}{{% set content = m.content %}}"
    "{% if '</think>' in content %}{% set content = content.split('</think>')[-1] %}{% endif %}"
    f"{{{{ content }}}}<|im_end|>\n{{% endfor %}}{PROMPT}"
)
NO_END = f"{{% for m in messages %}}{TURN}{{{{ m.content }}}}\n{{% endfor %}}{PROMPT}"
FORGETS = (
    f"{{% for m in messages %}}{TURN}"
    "{{ m.content if loop.last else m.content.split('</think>')[-1].strip() }}<|im_end|>\n"
    f"{{% endfor %}}{PROMPT}"
)
TRUNCATES = f"{{% for m in messages %}}{TURN}{{{{ m.content[:60] }}}}<|im_end|>\n{{% endfor %}}{PROMPT}"


def refused(file, tokenizer, *rows, max_tokens=4096, **options):
    """The one line that training stops with."""
    with pytest.raises(Refusal) as refusal:
        load_traces([file(*rows)], tokenizer, max_tokens=max_tokens, progress=False, **options)
    line = str(refusal.value)
    assert "\n" not in line and "file.jsonl" in line
    return line


def test_good_rows_go_through(file, tokenizer):
    traces = load_traces([file(GOOD, GOOD, GOOD)], tokenizer, max_tokens=4096, progress=False)
    audit = traces.audit
    assert audit.refusal() is None and audit.rows_whole == audit.documents == audit.rows_read == 3
    assert audit.tokens_dropped == 0 and audit.tokens_kept == len(traces.tokens) == traces.offsets[-1]
    assert audit.tokens_supervised == traces.loss_mask.sum() == 3 * (len(THOUGHT) + 1)
    assert all(check.passed == check.applies == 3 for check in audit.checks.values())
    assert traces.source.tolist() == [0, 1, 2] and audit.ends == {"<|im_end|>": 3}
    assert traces.tokens.dtype == np.uint32 and traces.loss_mask.dtype == bool
    assert traces.offsets.dtype == traces.source.dtype == traces.lengths.dtype == np.int64
    assert not traces.loss_mask[traces.offsets[:-1]].any()


def test_a_template_that_eats_the_thought(file, tokenizer):
    tokenizer.chat_template = EATS_THOUGHT
    for template in ("auto", "model"):
        for skip in (False, True):
            line = refused(file, tokenizer, GOOD, GOOD, template=template, skip_bad_rows=skip)
            assert "file.jsonl:1: no-thought: the template (the model's own) drops the thought (11 characters)" in line
            assert "all of the first 2 rows with one" in line
            assert "--template longtrace supplies a template that keeps it" in line and "--allow no-thought" in line
    kept = load_traces([file(GOOD)], tokenizer, max_tokens=4096, template="longtrace", progress=False)
    assert THOUGHT in tokenizer.decode(kept.tokens[kept.loss_mask])
    remains = load_traces([file(GOOD)], tokenizer, max_tokens=4096, allow=["no-thought"], progress=False)
    assert "two and two" not in tokenizer.decode(remains.tokens)


def test_a_template_that_eats_some_thoughts(file, tokenizer):
    tokenizer.chat_template = FORGETS
    assistant = {"role": "assistant", "content": THOUGHT}
    first = {"role": "assistant", "content": "<think>\nlet me see\n</think>\n\nhi"}
    user = {"role": "user", "content": "2+2?"}
    multi = {"messages": [user, first, user, assistant]}
    line = refused(file, tokenizer, GOOD, multi)
    assert "file.jsonl:2: no-thought: the template (the model's own) drops the thought" in line
    assert "1 of 2 rows; also not-a-prefix in 1" in line and "--allow no-thought not-a-prefix" in line
    line = refused(file, tokenizer, GOOD, multi, allow=["no-thought"])
    assert "file.jsonl:2: not-a-prefix: messages[1] renders differently when more turns follow" in line
    skipped = load_traces([file(GOOD, multi)], tokenizer, max_tokens=4096, skip_bad_rows=True, progress=False)
    assert skipped.audit.rows_left_out == 1 and skipped.source.tolist() == [0]
    allowed = load_traces(
        [file(multi)], tokenizer, max_tokens=4096, allow=["no-thought", "not-a-prefix"], progress=False
    )
    assert tokenizer.decode(allowed.tokens[allowed.loss_mask]) == THOUGHT + "<|im_end|>"


def test_a_missing_end_of_thought(file, tokenizer):
    cut = {"problem": "2+2?", "trace": "<think>\ntwo and two, so \\boxed{4}", "answer": "4"}
    line = refused(file, tokenizer, GOOD, cut)
    assert "file.jsonl:2: no-thought: a thought is opened and never closed: no </think> follows; 1 of 2 rows" in line
    assert "also no-answer in 1" in line and "--skip-bad-rows leaves such rows out" in line
    skipped = load_traces([file(GOOD, cut, GOOD)], tokenizer, max_tokens=4096, skip_bad_rows=True, progress=False)
    assert skipped.source.tolist() == [0, 2] and skipped.audit.rows_left_out == 1
    assert "file.jsonl:2: no-thought" in skipped.audit.first_left_out
    both = ["no-thought", "no-answer"]
    assert load_traces([file(GOOD, cut)], tokenizer, max_tokens=4096, allow=both, progress=False).audit.documents == 2


def test_an_end_token_that_is_not_learned(file, tokenizer):
    tokenizer.chat_template = NO_END
    line = refused(file, tokenizer, GOOD)
    assert "file.jsonl:1: no-eos: the template (the model's own) puts no end token after an assistant turn" in line
    assert "--template longtrace" in line and "--allow no-eos" in line
    assert load_traces([file(GOOD)], tokenizer, max_tokens=4096, allow=["no-eos"], progress=False).audit.ends == {
        "nothing": 1
    }


def test_an_end_token_inside_a_thought(file, tokenizer):
    row = {**GOOD, "trace": "<think>\nChatML ends turns with <|im_end|>, so\n</think>\n\n\\boxed{4}"}
    line = refused(file, tokenizer, GOOD, row)
    assert "file.jsonl:2: no-eos: the row's text has the end token inside an assistant turn" in line
    assert "--skip-bad-rows" in line and "--allow no-eos" in line


def test_a_template_that_drops_the_answer(file, tokenizer):
    tokenizer.chat_template = TRUNCATES
    long_answer = {**GOOD, "trace": THOUGHT + " And therefore it is four, as was to be shown."}
    line = refused(file, tokenizer, GOOD, long_answer)
    assert "file.jsonl:2: no-answer: the template (the model's own) drops the text after </think>" in line


NO_ANSWERS = {
    "nothing follows": ({**GOOD, "trace": "<think>\ntwo\n</think>\n\n"}, "nothing follows </think>"),
    "empty": ({"prompt": "2+2?", "completion": " "}, "the assistant's text is empty"),
    "another text": (
        {**GOOD, "trace": "<think>\n4\n</think>\n\nLet us begin with 2 and"},
        "neither \\boxed{} nor the row's answer '4' stands in the text after </think>",
    ),
    "a box that is cut off": ({**GOOD, "answer": "44", "trace": "<think>\n4\n</think>\n\nIt is \\boxed{44"}, ""),
    "cut off": ({**GOOD, "finished": False}, "the row says that its text was cut off (finished: false)"),
    "cut off by length": ({**GOOD, "finish_reason": "length"}, "the row says that its text was cut off"),
    "14 is not 4": ({**GOOD, "trace": "<think>\n4\n</think>\n\nIt is 14 or 4.5"}, "neither \\boxed{} nor"),
}


@pytest.mark.parametrize("case", NO_ANSWERS)
def test_a_row_without_an_answer(file, tokenizer, case):
    row, reason = NO_ANSWERS[case]
    if case == "a box that is cut off":  # the number stands there all the same
        load_traces([file(row)], tokenizer, max_tokens=4096, progress=False)
        return
    line = refused(file, tokenizer, GOOD, row)
    assert f"file.jsonl:2: no-answer: {reason}" in line and "--allow no-answer" in line


@pytest.mark.parametrize(
    ("answer", "text"),
    [
        ("4", "Therefore the result is 4."),
        ("1,000", "So there are 1000 of them."),
        ("1000", "So there are 1,000 of them."),
        ("\\text{Evelyn}", "Thus, Evelyn's average speed is the largest."),
        ("\\left( 3, \\frac{\\pi}{2} \\right)", "The point is \\((3, \\dfrac{\\pi}{2})\\)."),
        ("30^\\circ", "an angle of $30$ degrees"),
        ("10", "**Answer:** 5 loaves"),
        ("10", "The answer is five."),
        ("72", "#### 71"),
        ("\\frac{1}{2}", "\\boxed{\\frac{1}{\\sqrt{3^{2}}}}"),
        (float("nan"), "Here is the poem you asked for."),
    ],
)
def test_an_answer_is_seen_in_other_spellings_and_when_it_is_wrong(file, tokenizer, answer, text):
    row = {"problem": "?", "trace": f"<think>\nhm\n</think>\n\n{text}", "answer": answer}
    audit = load_traces([file(row)], tokenizer, max_tokens=4096, progress=False).audit
    assert audit.checks["answer"].passed == 1


def test_rows_without_a_thought_are_fine_and_counted(file, tokenizer):
    plain = {"prompt": "Say hi", "completion": "hi"}
    empty = {"prompt": "Say hi", "completion": "<think>\n\n</think>\n\nhi"}
    tagged = {"prompt": "What opens a thought?", "completion": "The tag <think> does."}
    audit = load_traces([file(GOOD, plain, empty, tagged)], tokenizer, max_tokens=4096, progress=False).audit
    assert (audit.checks["thought"].passed, audit.checks["thought"].applies) == (1, 4)
    assert (audit.checks["kept"].passed, audit.checks["kept"].applies) == (1, 1)


def test_wrong_traces_are_trained_on_and_counted(file, tokenizer):
    audit = load_traces([file(GOOD, {**GOOD, "correct": False})], tokenizer, max_tokens=4096, progress=False).audit
    assert audit.rows_whole == 2 and audit.rows_marked_wrong == 1


def test_rows_without_an_assistant_text(file, tokenizer):
    line = refused(file, tokenizer, GOOD, {"problem": "2+2?", "answer": "4"})
    assert (
        "file.jsonl:2: found no assistant text in fields problem, answer; accepted: rows with an answer to learn"
        in line
    )


def long_row(n):
    return {"problem": "?", "trace": f"<think>\n{'x' * n}\n</think>\n\n\\boxed{{4}}", "answer": "4"}


def test_an_over_long_row_is_refused(file, tokenizer):
    line = refused(file, tokenizer, GOOD, long_row(5000), long_row(6000), max_tokens=1000)
    assert "file.jsonl:2: 5,0" in line and "2 of 3 rows are over --max-tokens 1,000 (longest 6,0" in line
    assert "--on-too-long skip" in line


def test_an_over_long_row_is_skipped_and_not_checked(file, tokenizer):
    cut = {**long_row(5000), "trace": "<think>\n" + "x" * 5000}
    traces = load_traces(
        [file(long_row(10), cut, long_row(5000), GOOD)], tokenizer, max_tokens=1000, on_too_long="skip", progress=False
    )
    audit = traces.audit
    assert traces.source.tolist() == [0, 3]
    assert audit.rows_too_long == 2 and audit.rows_whole == 2 and audit.tokens_dropped == audit.tokens_too_long > 10_000
    assert audit.tokens_read == audit.tokens_kept + audit.tokens_dropped
    assert all(check.applies == 2 for check in audit.checks.values())


def test_an_over_long_row_is_split_into_even_pieces(file, tokenizer):
    whole = load_traces([file(long_row(5000))], tokenizer, max_tokens=10_000, progress=False)
    traces = load_traces([file(GOOD, long_row(5000))], tokenizer, max_tokens=1000, on_too_long="split", progress=False)
    assert traces.source.tolist() == [0] + [1] * 6
    pieces = traces.lengths[1:]
    assert pieces.max() <= 1000 and pieces.max() - pieces.min() <= 1
    start = traces.offsets[1]
    np.testing.assert_array_equal(traces.tokens[start:], whole.tokens)
    lost = np.flatnonzero(whole.loss_mask & ~traces.loss_mask[start:])
    np.testing.assert_array_equal(lost, traces.offsets[2:-1] - start)  # the first token of a piece is no target
    audit = traces.audit
    assert audit.tokens_dropped == 0 and audit.rows_too_long == 1 and audit.rows_whole == 1 and audit.documents == 7


def test_nothing_left_is_said(file, tokenizer):
    line = refused(
        file, tokenizer, long_row(5000), '{"problem":', max_tokens=1000, on_too_long="skip", skip_bad_rows=True
    )
    assert "nothing left to train on: 2 rows read, 1 unreadable, 0 refused by the audit, 1 too long" in line


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b'{"problem": "a", "trace": "b"}\n{"problem": \n', "file.jsonl:2: broken JSON: Expecting value at character"),
        (b'{"problem": "a", "trace": ["b"]}\n', "file.jsonl:1: trace: found list ['b']; accepted: text"),
        (b"", "file.jsonl: the file is empty"),
        (b'{"problem": "\xff"}\n', "file.jsonl:1: found byte 0xff at 14, not UTF-8"),
    ],
)
def test_unreadable_files_stop_at_once(tmp_path, tokenizer, content, message):
    path = tmp_path / "file.jsonl"
    path.write_bytes(content)
    with pytest.raises(Refusal) as refusal:
        load_traces([str(path)], tokenizer, max_tokens=1000, progress=False)
    assert message in str(refusal.value) and "\n" not in str(refusal.value)


def test_unreadable_rows_are_skipped_and_counted(file, tokenizer):
    traces = load_traces(
        [file(GOOD, '{"problem":', {"problem": "?"}, GOOD)],
        tokenizer,
        max_tokens=1000,
        skip_bad_rows=True,
        progress=False,
    )
    assert traces.audit.rows_unreadable == 2 and traces.audit.rows_read == 4
    assert traces.source.tolist() == [0, 3]
    assert "file.jsonl:2: broken JSON" in traces.audit.first_unreadable


def test_wrong_options(file, tokenizer):
    for options, message in (
        ({"allow": ["nothing"]}, "--allow nothing: accepted: no-thought, no-answer, no-eos, not-a-prefix"),
        ({"on_too_long": "cut"}, "--on-too-long cut: accepted: refuse, skip, split"),
        ({"max_tokens": 1}, "--max-tokens 1: accepted: 2 or more"),
    ):
        with pytest.raises(Refusal, match=message):
            load_traces([file(GOOD)], tokenizer, **({"max_tokens": 100, "progress": False} | options))
    with pytest.raises(Refusal, match="--data: no source given"):
        load_traces([], tokenizer, max_tokens=100)


def test_an_audit_reports_everything_and_refuses_nothing(file, tokenizer):
    cut = {**GOOD, "trace": "<think>\ntwo"}
    audit = audit_traces([file(GOOD, "[", cut, long_row(5000))], tokenizer, max_tokens=1000, progress=False).audit
    assert (audit.rows_read, audit.rows_unreadable, audit.rows_too_long, audit.rows_whole) == (4, 1, 1, 2)
    assert audit.found == {"no-thought": 1, "no-answer": 1}
    assert "over --max-tokens" in audit.refusal()


def test_markup_in_rows_is_printed_as_it_stands(file, tokenizer):
    from rich.console import Console

    row = {"problem": "[bold]?[/bold]", "trace": "<think>\na\n</think>\n\nb", "answer": "[red]x[/red]<b>"}
    audit = audit_traces([file(row)], tokenizer, max_tokens=1000, progress=False).audit
    console = Console(width=200, record=True, file=open("/dev/null", "w"))  # noqa: SIM115
    console.print(audit.table())
    assert "'[red]x[/red]<b>'" in console.export_text()


def test_sources_are_read_in_order_and_batches_change_nothing(file, tokenizer, tmp_path, monkeypatch):
    from longtrace.trainer import traces as module

    rows = [long_row(n) for n in range(1, 40)]
    path = file(*rows)
    other = tmp_path / "other.jsonl"
    other.write_text(json.dumps(GOOD) + "\n")
    together = load_traces([path, str(other)], tokenizer, max_tokens=1000, progress=False)
    assert together.source.tolist() == list(range(40))
    monkeypatch.setattr(module, "BATCH_ROWS", 7)
    again = load_traces([path, str(other)], tokenizer, max_tokens=1000, progress=False)
    assert again.fingerprint == together.fingerprint
    assert (
        load_traces([str(other), path], tokenizer, max_tokens=1000, progress=False).fingerprint != together.fingerprint
    )


def test_a_trace_set_is_saved_and_read_back(file, tokenizer, tmp_path):
    traces = load_traces([file(GOOD, long_row(50))], tokenizer, max_tokens=1000, progress=False)
    path = tmp_path / "traces.safetensors"
    traces.save(path)
    loaded = TraceSet.load(path)
    for name in ("tokens", "loss_mask", "offsets", "source"):
        np.testing.assert_array_equal(getattr(loaded, name), getattr(traces, name))
        assert getattr(loaded, name).dtype == getattr(traces, name).dtype
    assert loaded.audit == traces.audit and loaded.fingerprint == traces.fingerprint
    assert json.loads(json.dumps(traces.audit.as_dict()))["tokens_dropped"] == 0
    assert [p.name for p in tmp_path.glob("*.safetensors*")] == ["traces.safetensors"]
    path.write_bytes(path.read_bytes()[:-20])
    with pytest.raises(Refusal, match=r"traces.safetensors: not a saved trace set"):
        TraceSet.load(path)


REAL = {  # rows, rows with a thought, rows that pass the answer check, as counted in the files by hand
    "deepseek_reasoner_aimo3_cot": (80, 80, 55),
    "gptoss120b_aimo3_cot": (80, 80, 75),
    "r1_distill_math500": (70, 69, 70),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_traces(shared, name):
    rows, thoughts, answers = REAL[name]
    path = shared / "data" / "traces" / f"{name}.jsonl"
    audit = audit_traces([str(path)], byte_tokenizer(), max_tokens=1_000_000, progress=False).audit
    assert audit.rows_read == audit.rows_whole == rows
    assert audit.checks["thought"].passed == thoughts and audit.checks["answer"].passed == answers
    for key in ("kept", "closed", "eos", "prefix"):
        assert audit.checks[key].passed == audit.checks[key].applies, key

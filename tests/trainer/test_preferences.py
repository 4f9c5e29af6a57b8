"""Preference pairs: every shape gives the same documents, and everything malformed is one clear line."""

from __future__ import annotations

import io
import json

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
from pair_rows import BAD, BOTH, END, GOOD, PLAIN, THOUGHT, USER, asked, assistant, documents, load
from rich.console import Console

from longtrace.trainer.config import Refusal
from longtrace.trainer.model import load_tokenizer
from longtrace.trainer.preferences import PairAudit, load_pairs
from longtrace.trainer.prepare import byte_tokenizer
from longtrace.trainer.prompts import empty_thought


def dialogue(*turns):
    return "".join(f"\n\n{role}: {text}" for role, text in zip(("Human", "Assistant") * len(turns), turns))


SHAPES = {
    "text": PLAIN,
    "text with white space around": {"prompt": "2+2?", "chosen": f" {GOOD}\n", "rejected": f"\n{BAD}"},
    "problem": {"problem": "2+2?", "answer": "4", "chosen": GOOD, "rejected": BAD},
    "a prompt of messages": {"prompt": [USER], "chosen": GOOD, "rejected": BAD},
    "messages throughout": {"prompt": [USER], "chosen": [assistant(GOOD)], "rejected": [assistant(BAD)]},
    "one message a side": {"prompt": "2+2?", "chosen": assistant(GOOD), "rejected": assistant(BAD)},
    "UltraFeedback": {
        "prompt": "2+2?",
        "prompt_id": "7",
        "chosen": [USER, assistant(GOOD)],
        "rejected": [USER, assistant(BAD)],
        "messages": [USER, assistant(GOOD)],
        "score_chosen": 8.5,
        "score_rejected": 2.0,
    },
    "an implicit prompt": {"chosen": [USER, assistant(GOOD)], "rejected": [USER, assistant(BAD)]},
    "an implicit prompt of one side": {"chosen": [USER, assistant(GOOD)], "rejected": BAD},
    "HH": {"chosen": dialogue("2+2?", GOOD), "rejected": dialogue("2+2?", BAD)},
    "HH with its prompt apart": {
        "prompt": "\n\nHuman: 2+2?\n\nAssistant:",
        "chosen": f" {GOOD}",
        "rejected": f" {BAD}",
    },
    "HH beside its prompt": {"prompt": "2+2?", "chosen": dialogue("2+2?", GOOD), "rejected": dialogue("2+2?", BAD)},
    "ShareGPT": {
        "conversations": [{"from": "human", "value": "2+2?"}],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
    "text parts": {
        "chosen": [{"role": "user", "content": [{"type": "text", "text": "2+2?"}]}, assistant(GOOD)],
        "rejected": [USER, assistant([{"type": "text", "text": BAD}])],
    },
    "fields that are null": PLAIN | {"conversations": None, "empty_chosen": None, "scores": None},
}


@pytest.mark.parametrize("shape", SHAPES)
def test_every_shape_gives_the_same_documents(file, tokenizer, shape):
    pairs = load(file, tokenizer, SHAPES[shape])
    context = asked(tokenizer, [USER])
    assert documents(tokenizer, pairs) == [(context, GOOD + END), (context, BAD + END)]
    assert pairs.fingerprint == load(file, tokenizer, PLAIN).fingerprint and len(pairs) == 1
    assert pairs.tokens.dtype == np.uint32
    assert pairs.offsets.dtype == pairs.prompts.dtype == pairs.source.dtype == pairs.lengths.dtype == np.int64


TURNS = ["hi", "hello", "2+2?"]
MULTI = [{"role": role, "content": text} for role, text in zip(("user", "assistant", "user"), TURNS)]
MULTI_SHAPES = {
    "prompt": {"prompt": MULTI, "chosen": GOOD, "rejected": BAD},
    "implicit": {"chosen": [*MULTI, assistant(GOOD)], "rejected": [*MULTI, assistant(BAD)]},
    "HH": {"chosen": dialogue(*TURNS, GOOD), "rejected": dialogue(*TURNS, BAD)},
    "sides longer than the stated prompt": {
        "prompt": "hi",
        "chosen": [*MULTI, assistant(GOOD)],
        "rejected": [*MULTI, assistant(BAD)],
    },
    "ShareGPT": {
        "conversations": [{"from": f, "value": t} for f, t in zip(("human", "gpt", "human"), TURNS)],
        "chosen": {"from": "gpt", "value": GOOD},
        "rejected": {"from": "gpt", "value": BAD},
    },
}


@pytest.mark.parametrize("shape", MULTI_SHAPES)
def test_only_the_last_turn_is_a_target(file, tokenizer, shape):
    context = asked(tokenizer, MULTI)
    assert "hello<|im_end|>" in context
    pairs = load(file, tokenizer, MULTI_SHAPES[shape])
    assert documents(tokenizer, pairs) == [(context, GOOD + END), (context, BAD + END)]


SYSTEM = {"role": "system", "content": "Be brief."}


@pytest.mark.parametrize(
    "row",
    [
        PLAIN | {"system": "Be brief."},
        PLAIN | {"prompt": [SYSTEM, USER]},
        {
            "prompt": "2+2?",
            "system": "Be brief.",
            "chosen": [USER, assistant(GOOD)],
            "rejected": [USER, assistant(BAD)],
        },
        {"prompt": "2+2?", "chosen": [SYSTEM, USER, assistant(GOOD)], "rejected": [SYSTEM, USER, assistant(BAD)]},
        {"system": "Be brief.", "chosen": [USER, assistant(GOOD)], "rejected": [USER, assistant(BAD)]},
        {"system": "Be brief.", "chosen": [SYSTEM, USER, assistant(GOOD)], "rejected": [USER, assistant(BAD)]},
        {"system": "Be brief.", "chosen": [USER, assistant(GOOD)], "rejected": BAD},
        {"system": "Be brief.", "chosen": dialogue("2+2?", GOOD), "rejected": dialogue("2+2?", BAD)},
        PLAIN | {"system": "Be brief.", "prompt": dialogue("2+2?", "")},
    ],
)
def test_a_system_text_stands_once_in_the_context(file, tokenizer, row):
    context = asked(tokenizer, [SYSTEM, USER])
    assert documents(tokenizer, load(file, tokenizer, row)) == [(context, GOOD + END), (context, BAD + END)]


@pytest.mark.parametrize("shape", ["text", "a prompt of messages", "an implicit prompt", "HH", "ShareGPT"])
def test_an_empty_system_text_is_none(file, tokenizer, shape):
    row = SHAPES[shape] | {"system": " \n"}
    assert load(file, tokenizer, row).fingerprint == load(file, tokenizer, PLAIN).fingerprint


def test_an_empty_thought_in_an_empty_answer_is_none(file, tokenizer):
    row = BOTH | {"empty_chosen": "<think>\n\n</think>\n\n4.", "empty_rejected": "</think>Five."}
    paths = ("empty",)
    assert load(file, tokenizer, row, paths=paths).fingerprint == load(file, tokenizer, BOTH, paths=paths).fingerprint


def test_both_paths_stand_side_by_side(file, tokenizer):
    second = {key: value.replace("2+2", "3+3") for key, value in BOTH.items()}
    both = load(file, tokenizer, BOTH, second, paths=("trace", "empty"))
    trace, empty = (load(file, tokenizer, BOTH, second, paths=(path,)) for path in ("trace", "empty"))
    t, e = (documents(tokenizer, pairs) for pairs in (trace, empty))
    assert documents(tokenizer, both) == [*t[:2], *e[:2], *t[2:], *e[2:]]
    assert both.paths == ("trace", "empty") and len(both) == 2 and both.audit.pairs == 4
    assert len({pairs.fingerprint for pairs in (both, trace, empty)}) == 3
    assert both.audit.by_path["trace"].pairs == both.audit.by_path["empty"].pairs == 2


def test_the_empty_path_alone_has_an_implied_prompt_too(file, tokenizer):
    row = {"chosen": [USER, assistant(GOOD)], "rejected": BAD, "empty_chosen": "4.", "empty_rejected": "Five."}
    for paths in (("empty",), ("trace", "empty")):
        assert (
            load(file, tokenizer, row, paths=paths).prompts[-1]
            == load(file, tokenizer, BOTH, paths=("empty",)).prompts[0]
        )


TRACE, EMPTY, TWO = ("trace",), ("empty",), ("trace", "empty")
OTHER = {"role": "user", "content": "2+3?"}
REFUSED = {
    "broken JSON": ("{", TRACE, "broken JSON: .*accepted: one JSON object a line"),
    "no JSON object": ("[1]", TRACE, "found a JSON list; accepted: one JSON object a line"),
    "no rejected": (
        {"prompt": "a", "chosen": "b"}, TRACE,
        "rejected: found fields prompt, chosen; accepted: chosen and rejected for the trace path",
    ),
    "null rejected": (PLAIN | {"rejected": None}, TRACE, "rejected: found fields prompt, chosen, rejected; accepted"),
    "no empty path": (
        PLAIN, TWO,
        "empty_chosen: found fields .*; accepted: empty_chosen and empty_rejected for the empty path",
    ),
    "half an empty path": (PLAIN | {"empty_chosen": "4"}, EMPTY, "empty_rejected: found fields"),
    "no trace path": (
        {"prompt": "a", "empty_chosen": "b", "empty_rejected": "c"}, TWO,
        "chosen: found fields .* for the trace path",
    ),
    "no prompt": (
        {"chosen": "a", "rejected": "b"}, TRACE,
        "prompt: found fields chosen, rejected; accepted: prompt, problem, conversations, or sides that begin with the prompt",
    ),
    "no prompt, empty path": (
        {"empty_chosen": "a", "empty_rejected": "b"}, EMPTY,
        "prompt: found fields empty_chosen, empty_rejected",
    ),
    "a number": (PLAIN | {"chosen": 4}, TRACE, "chosen: found int 4; accepted: text, a message, or a list of messages"),
    "an empty list": (PLAIN | {"rejected": []}, TRACE, r"rejected: found list \[\]; accepted: text, a message"),
    "a list of texts": (
        PLAIN | {"rejected": ["a"]}, TRACE,
        r"rejected\[0\]: found 'a'; accepted: an object with role and content",
    ),
    "an unknown role": (
        PLAIN | {"chosen": [{"role": "robot", "content": "a"}]}, TRACE,
        r"chosen\[0\].role: found 'robot'",
    ),
    "a side that ends in a question": (
        PLAIN | {"chosen": [USER]}, TRACE,
        "chosen: found a last message of role user; accepted: .*ends in an assistant's",
    ),
    "a dialogue that ends in a question": (
        {"chosen": dialogue("a", "b", "c"), "rejected": dialogue("a", "b")}, TRACE,
        "chosen: found a last message of role user",
    ),
    "a prompt that ends in an answer": (
        PLAIN | {"prompt": [USER, assistant("4")]}, TRACE,
        "prompt: found a prompt that ends in a message of role assistant; accepted: one that ends in a user's or a tool's",
    ),
    "an HH prompt that ends in an answer": (
        PLAIN | {"prompt": dialogue("2+2?", "Sure,")}, TRACE,
        "prompt: found a prompt that ends in a message of role assistant",
    ),
    "two HH answers in a row": (
        {"chosen": dialogue("a", "b") + "\n\nAssistant: c", "rejected": dialogue("a", "b") + "\n\nAssistant: d"}, TRACE,
        "chosen: found a prompt that ends in a message of role assistant",
    ),
    "a prompt of a system message only": (
        PLAIN | {"prompt": [SYSTEM]}, TRACE,
        "prompt: found a prompt that ends in a message of role system",
    ),
    "a number as prompt": (PLAIN | {"prompt": 4}, TRACE, "prompt: found int 4; accepted: text or a list of messages"),
    "an empty prompt": (PLAIN | {"prompt": " "}, TRACE, "prompt: found no text; accepted: a prompt"),
    "a tool call in Harmony": (
        PLAIN | {"chosen": "<|channel|>analysis to=python<|message|>a"}, TRACE,
        "chosen.channel: found a tool call",
    ),
    "half a surrogate": (PLAIN | {"chosen": "a\ud800"}, TRACE, "chosen: found half a surrogate pair"),
    "equal answers": (
        PLAIN | {"rejected": GOOD}, TRACE,
        "rejected: found the text of chosen; accepted: two different answers",
    ),
    "answers that differ in white space": (
        PLAIN | {"rejected": f"{GOOD}\n\n"}, TRACE,
        "rejected: found the text of chosen",
    ),
    "equal messages": (PLAIN | {"rejected": [USER, assistant(GOOD)]}, TRACE, "rejected: found the text of chosen"),
    "equal empty answers": (BOTH | {"empty_rejected": "4."}, TWO, "empty_rejected: found the text of empty_chosen"),
    "equal but for an empty thought": (
        BOTH | {"empty_rejected": "<think>\n</think>\n4."}, EMPTY,
        "empty_rejected: found the text of empty_chosen",
    ),
    "an empty side": (PLAIN | {"chosen": ""}, TRACE, "chosen: found ''; accepted: an answer"),
    "a side of white space": (PLAIN | {"rejected": " \n"}, TRACE, r"rejected: found ' \\n'; accepted: an answer"),
    "an empty message": (PLAIN | {"chosen": [assistant("")]}, TRACE, "chosen: found ''; accepted: an answer"),
    "an empty HH answer": (
        {"chosen": dialogue("a", ""), "rejected": dialogue("a", "b")}, TRACE,
        "chosen: found ''; accepted: an answer",
    ),
    "nothing after a thought": (PLAIN | {"chosen": THOUGHT}, TRACE, "chosen: no-answer: nothing follows </think>"),
    "nothing after an empty thought": (
        BOTH | {"empty_chosen": "<think>\n\n</think>"}, EMPTY,
        "empty_chosen: found nothing after </think>",
    ),
    "two prompts": (
        {"chosen": [USER, assistant(GOOD)], "rejected": [OTHER, assistant(BAD)]}, TRACE,
        r"rejected: found '2\+3\?' in message 1, not '2\+2\?'; accepted: the prompt of chosen",
    ),
    "two HH prompts": (
        {"chosen": dialogue("a", "b", "c", "d"), "rejected": dialogue("a", "x", "c", "d2")}, TRACE,
        "rejected: found 'x' in message 2, not 'b'",
    ),
    "prompts of two lengths": (
        {"chosen": dialogue("a", "b", "c", "d"), "rejected": dialogue("a", "b")}, TRACE,
        "rejected: found 1 messages before the answer, not 3",
    ),
    "roles that differ": (
        {"chosen": [USER, assistant("a")], "rejected": [SYSTEM, assistant("b")]}, TRACE,
        "rejected: found message 1 of role system, not user",
    ),
    "sides of another prompt": (
        PLAIN | {"prompt": "2+3?", "chosen": [USER, assistant(GOOD)]}, TRACE,
        r"chosen: found '2\+2\?' in message 1, not '2\+3\?'; accepted: messages that begin with the prompt",
    ),
    "sides shorter than the prompt": (
        {"prompt": MULTI, "chosen": [MULTI[0], assistant("a")], "rejected": "b"}, TRACE,
        "chosen: found 1 messages before the answer, not 3",
    ),
    "one side longer than the prompt": (
        {"prompt": "hi", "chosen": [*MULTI, assistant("a")], "rejected": "b"}, TRACE,
        "rejected: found 1 messages before the answer, not 3",
    ),
    "a thought on the empty path": (
        BOTH | {"empty_chosen": THOUGHT + "4."}, EMPTY,
        r"empty_chosen: found a thought \('<think>.*; accepted: an answer without one",
    ),
    "an open thought on the empty path": (
        BOTH | {"empty_rejected": "<think>\nwell"}, TWO,
        "empty_rejected: found a thought",
    ),
    "a second thought on the empty path": (
        BOTH | {"empty_chosen": "<think>\n\n</think>\n\nso</think>4."}, EMPTY,
        "empty_chosen: found a thought",
    ),
    "an open thought": (
        PLAIN | {"chosen": "<think>\nwell"}, TRACE,
        "chosen: no-thought: a thought is opened and never closed",
    ),
    "a row that was cut off": (
        PLAIN | {"finished": False}, TRACE,
        "chosen: no-answer: the row says that its text was cut off",
    ),
    "a row that reached its length": (
        BOTH | {"finish_reason": "length"}, EMPTY,
        "empty_chosen: no-answer: the row says that its text was cut off",
    ),
    "an end token inside": (
        PLAIN | {"rejected": f"a{END}b"}, TRACE,
        "rejected: no-eos: the row's text has the end token inside",
    ),
    "a tool call on the empty path": (
        BOTH | {"empty_chosen": assistant("let me see", tool_calls=[{"function": {"name": "add", "arguments": "{}"}}])},
        EMPTY, "empty_chosen: found a tool call; accepted: text on the empty path",
    ),
    "a score in words": (
        PLAIN | {"scores": {"chosen": "high"}}, TRACE,
        "scores.chosen: found 'high'; accepted: a number",
    ),
    "a score that is none": (
        PLAIN | {"score_rejected": float("nan")}, TRACE,
        "score_rejected: found float nan; accepted: a number",
    ),
    "a true score": (
        PLAIN | {"scores": {"rejected": True}}, TRACE,
        "scores.rejected: found bool True; accepted: a number",
    ),
    "tools that are none": (PLAIN | {"tools": "{"}, TRACE, "tools: found '{'"),
}  # fmt: skip


@pytest.mark.parametrize("name", REFUSED)
def test_malformed_pairs_are_refused_by_line(file, tokenizer, name):
    row, paths, reason = REFUSED[name]
    with pytest.raises(Refusal, match=rf"file\.jsonl:3: {reason}") as refusal:
        load(file, tokenizer, BOTH, "", row, BOTH, paths=paths)
    line = str(refusal.value)
    assert "\n" not in line and line.count("--skip-bad-rows leaves such rows out") == 1
    kept = load(file, tokenizer, BOTH, "", row, BOTH, paths=paths, skip_bad_rows=True)
    assert kept.source.tolist() == [0, 2] and kept.audit.rows_read == 3
    assert kept.audit.rows_left_out == 1 and list(kept.audit.left_out.values()) == [1]
    (first,) = kept.audit.first_left_out.values()
    assert first in line and "file.jsonl:3: " in first


@pytest.mark.parametrize("scores", [[1, 0], 0.5, "high", {"helpful": "yes"}])
def test_scores_that_are_none_of_ours_are_ignored(file, tokenizer, scores):
    pairs = load(file, tokenizer, PLAIN | {"scores": scores})
    assert pairs.fingerprint == load(file, tokenizer, PLAIN).fingerprint and pairs.audit.by_path["trace"].scored == 0


def test_rows_that_other_paths_would_refuse(file, tokenizer):
    """A path that is not asked for is not looked at."""
    load(file, tokenizer, BOTH | {"empty_chosen": "", "empty_rejected": 4})
    load(file, tokenizer, BOTH | {"chosen": THOUGHT, "rejected": THOUGHT}, paths=("empty",))


def test_too_long(file, tokenizer):
    long = {"prompt": "2+2?", "chosen": "4", "rejected": "5" * 600}
    with pytest.raises(
        Refusal,
        match=r"file.jsonl:2: rejected: 6\d\d tokens; 2 of 4 rows are over --max-tokens 500 \(longest 9\d\d\); --on-too-long skip",
    ):
        load(file, tokenizer, PLAIN, long, long | {"chosen": "4" * 900}, PLAIN, max_tokens=500)
    pairs = load(file, tokenizer, PLAIN, long, PLAIN, max_tokens=500, on_too_long="skip")
    assert pairs.source.tolist() == [0, 2] and pairs.audit.rows_too_long == 1 and pairs.audit.rows_left_out == 0
    exact = int(load(file, tokenizer, long).lengths.max())
    assert len(load(file, tokenizer, long, max_tokens=exact)) == 1
    with pytest.raises(
        Refusal, match=r"no pair left to train on: 1 rows read, 0 left out, 1 too long; .*file.jsonl:1: rejected"
    ):
        load(file, tokenizer, long, max_tokens=exact - 1, on_too_long="skip")


@pytest.mark.parametrize(
    "options, reason",
    [
        ({"paths": ()}, "paths: found none"),
        ({"paths": ("empty", "trace")}, "paths: found empty, trace"),
        ({"max_tokens": 1}, "--max-tokens 1"),
        ({"on_too_long": "split"}, "--on-too-long split: accepted: refuse, skip"),
        ({"template": "model"}, "--template model"),
        ({"columns": {"good": "chosen"}}, r"file.jsonl:1: --columns good=chosen: found fields"),
    ],
)
def test_options_that_cannot_be_used(file, tokenizer, options, reason):
    with pytest.raises(Refusal, match=reason):
        load(file, tokenizer, PLAIN, **options)
    with pytest.raises(Refusal, match="--data: no source given"):
        load_pairs([], tokenizer, paths=("trace",), max_tokens=64)


def test_columns_parquet_and_many_sources(file, tokenizer, tmp_path):
    rows = [{"question": "2+2?", "win": GOOD, "lose": BAD}, {"question": "2+2?", "win": BAD, "lose": ""}]
    columns = {"question": "prompt", "win": "chosen", "lose": "rejected"}
    path = str(tmp_path / "file.parquet")
    pyarrow.parquet.write_table(pyarrow.Table.from_pylist(rows), path)
    options = {"paths": ("trace",), "columns": columns, "max_tokens": 64, "progress": False}
    with pytest.raises(Refusal, match=r"file\.parquet:2: rejected: found ''"):
        load_pairs([path], tokenizer, **options)
    pairs = load_pairs([path, file(*rows), path], tokenizer, skip_bad_rows=True, **options)
    assert pairs.source.tolist() == [0, 2, 4] and pairs.audit.rows_left_out == 3
    assert pairs.audit.by_path["trace"].repeated == 2
    assert pairs.audit.by_path["trace"].first_repeated.endswith("file.jsonl:1 has the pair of row 1 read")


def test_the_audit_counts_what_is_there(file, tokenizer):
    rows = [
        {"prompt": "a", "chosen": "yes", "rejected": "no", "scores": {"chosen": 1.0, "rejected": 0.0}},
        {"prompt": "a", "chosen": "no", "rejected": "yes", "scores": {"chosen": 3, "rejected": 3}},
        {"prompt": "a", "chosen": "yes", "rejected": "no", "score_chosen": 1.0, "score_rejected": 2.0},
        {"prompt": "b", "chosen": "yes", "rejected": "no", "scores": {"chosen": 1.0}},
        {"prompt": "b", "chosen": "one", "rejected": "two"},
        {"prompt": "b", "chosen": "", "rejected": "two"},
    ]
    pairs = load(file, tokenizer, *rows, skip_bad_rows=True)
    audit, path = pairs.audit, pairs.audit.by_path["trace"]
    assert (audit.rows_read, audit.rows_left_out, audit.prompts, audit.left_out) == (6, 1, 5, {"empty": 1})
    assert (path.pairs, path.chosen_longer, path.equal_length, path.longer_share) == (5, 3, 1, 0.7)
    assert (path.scored, path.ties, path.inverted) == (3, 1, 1)
    assert (path.margin_p50, path.margin_p10, path.margin_p90) == (0.0, -0.8, 0.8)
    assert (path.repeated, path.contradicting) == (1, 2)
    assert "file.jsonl:3 has the pair of row 1 read" in path.first_repeated
    assert "file.jsonl:2 prefers what row 1 read rejects" in path.first_contradicting
    chosen = audit.by_side["chosen"]
    assert (chosen.tokens, chosen.length_p50, chosen.length_max, chosen.thoughts) == (4 + 3 + 4 + 4 + 4, 4, 4, 0)
    assert audit.tokens_kept == len(pairs.tokens) and audit.length_max == pairs.lengths.max()
    assert (
        audit.tokens_supervised
        == (pairs.lengths - pairs.prompts).sum()
        == chosen.tokens + audit.by_side["rejected"].tokens
    )
    assert audit.by_side["prompt"].tokens == pairs.prompts[::2].sum()
    values = json.loads(json.dumps(audit.as_dict()))
    assert PairAudit.from_dict(values) == audit and values["longer_share"] == {"trace": 0.7}
    out = io.StringIO()
    Console(file=out, width=160).print(audit.table())
    for text in ("with an empty side, left out", "preferring the longer is right in 70.0 %", "1 ties, 1 with the rejected",
                 "contradict an earlier one", "1 pairs stand twice", "file.jsonl:6: chosen: found ''"):  # fmt: skip
        assert text in out.getvalue()


def test_pairs_of_other_prompts_or_paths_are_no_duplicates(file, tokenizer):
    row = {"prompt": "a", "chosen": "yes", "rejected": "no"}
    same_split = (
        {"prompt": "a", "chosen": "no", "rejected": "nono"},
        {"prompt": "a", "chosen": "nono", "rejected": "no2"},
    )
    both = {**row, "empty_chosen": "no", "empty_rejected": "yes"}  # each path is its own
    assert load(file, tokenizer, row, row | {"prompt": "b"}, *same_split).audit.by_path["trace"].repeated == 0
    for figures in load(file, tokenizer, both, paths=("trace", "empty")).audit.by_path.values():
        assert figures.repeated == figures.contradicting == 0


@pytest.mark.parametrize("name", ["byte", "character", "merging", "sentencepiece"])
def test_random_pairs_share_their_prompts_and_keep_every_character(file, seed, name, request):
    if name == "character":
        tokenizer = load_tokenizer(str(request.getfixturevalue("tiny_model")()))
    else:
        tokenizer = byte_tokenizer() if name == "byte" else request.getfixturevalue(f"{name}_tokenizer")
    rng = np.random.default_rng(seed)
    letters = list("abz019 +-=.,?\n<>_")

    def text(longest):
        body = "".join(rng.choice(letters, int(rng.integers(1, longest))))
        return f"x{body}x"  # no white space at the ends, which is not kept

    rows = []
    for i in range(60):
        sides = [f"{i % 7}{text(40 if i % 3 else 700)}", f"{(i + 1) % 7}{text(40)}"]
        traces = [f"<think>\n{text(30)}\n</think>\n\n{side}" for side in sides]
        rows.append(
            {
                "prompt": text(50),
                "chosen": traces[0],
                "rejected": traces[1],
                "empty_chosen": sides[1],
                "empty_rejected": sides[0],
            }
        )
    pairs = load(file, tokenizer, *rows, paths=("trace", "empty"))
    assert len(pairs) == 60 and len(pairs.lengths) == len(pairs.prompts) == 240
    assert (pairs.prompts >= 1).all() and (pairs.prompts < pairs.lengths).all()
    assert pairs.offsets[0] == 0 and pairs.offsets[-1] == len(pairs.tokens)
    end = tokenizer.convert_tokens_to_ids(END)
    for i, row in enumerate(rows):
        prompt = asked(tokenizer, [{"role": "user", "content": row["prompt"]}])
        for k, (side, context) in enumerate(
            zip(("chosen", "rejected", "empty_chosen", "empty_rejected"), [prompt] * 2 + [empty_thought(prompt)] * 2)
        ):
            ids = pairs.tokens[pairs.offsets[4 * i + k] : pairs.offsets[4 * i + k + 1]]
            expected = tokenizer(context, add_special_tokens=False)["input_ids"]
            assert ids[: pairs.prompts[4 * i + k]].tolist() == expected
            target = ids[pairs.prompts[4 * i + k] :]
            assert target[-1] == end and (target[:-1] != end).all()
            assert tokenizer.decode(target).replace(" ", "") == (row[side] + END).replace(" ", "")
    # a batch of one row reads as a batch of many
    alone = [load(file, tokenizer, row, paths=("trace", "empty")).tokens for row in rows[:5]]
    np.testing.assert_array_equal(np.concatenate(alone), pairs.tokens[: pairs.offsets[20]])


def test_the_fingerprint_sees_every_array(file, tokenizer):
    pairs = load(file, tokenizer, PLAIN, BOTH)
    seen = {pairs.fingerprint}
    for name in ("tokens", "offsets", "prompts", "source"):
        values = getattr(pairs, name)
        setattr(pairs, name, values + (np.arange(len(values)) == 1).astype(values.dtype))
        seen.add(pairs.fingerprint)
        setattr(pairs, name, values)
    pairs.paths = ("empty",)
    assert len(seen | {pairs.fingerprint}) == 6


REAL = {  # rows, left out (their chosen answer is empty), pairs that stand twice
    "hh_harmless_1000": (1000, 3, 0),
    "dpo_en_demo_llamafactory": (300, 0, 5),
}


@pytest.mark.slow
@pytest.mark.parametrize("name", REAL)
def test_real_pairs(shared, name):
    rows, left_out, repeated = REAL[name]
    path = shared / "data" / "prefs" / f"{name}.jsonl"
    tokenizer = byte_tokenizer()
    pairs = load_pairs([str(path)], tokenizer, paths=("trace",), max_tokens=16_384, skip_bad_rows=True, progress=False)
    audit = pairs.audit
    assert (audit.rows_read, audit.left_out) == (rows, {"empty": left_out} if left_out else {})
    assert len(pairs) == rows - left_out and audit.by_path["trace"].repeated == repeated
    raw = [json.loads(line) for line in path.read_text().splitlines()]
    for i, (a, b) in enumerate(zip(*[iter(documents(tokenizer, pairs))] * 2)):
        row = raw[pairs.source[i]]
        assert a[0] == b[0]
        for (_, target), side in zip((a, b), ("chosen", "rejected")):
            assert target == row[side].rpartition("\n\nAssistant:")[2].strip() + END
    if left_out:
        with pytest.raises(Refusal, match=rf"{name}.jsonl:87: chosen: found ''; accepted: an answer"):
            load_pairs([str(path)], tokenizer, paths=("trace",), max_tokens=16_384, progress=False)

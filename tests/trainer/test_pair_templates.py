"""Preference pairs through chat templates: what stands before and behind an answer, and what a template may not lose."""

from __future__ import annotations

from pathlib import Path

import pytest
from pair_rows import BAD, BOTH, END, GOOD, PLAIN, THOUGHT, USER, asked, assistant, documents, load

from longtrace.trainer.config import Refusal
from longtrace.trainer.prepare import byte_tokenizer
from longtrace.trainer.prompts import empty_thought

MULTI = [USER | {"content": "hi"}, {"role": "assistant", "content": "hello"}, USER]
TURN = "<|im_start|>{{ m.role }}\n"
PROMPT = "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
CHATML = f"{{% for m in messages %}}{TURN}{{{{ m.content }}}}<|im_end|>\n{{% endfor %}}{PROMPT}"
PREFILLS_THINK = CHATML.replace("assistant\n", "assistant\n<think>\n")
EATS_THOUGHT = CHATML.replace("m.content", "m.content.split('</think>')[-1].strip()")
NO_END = CHATML.replace("<|im_end|>", "")
# what Qwen3 does: earlier thoughts go, and an answer without one gets an empty one
FORGETS = CHATML.replace(
    "{{ m.content }}",
    "{% set parts = m.content.split('</think>') %}{% if m.role != 'assistant' or not loop.last %}"
    "{{ parts[-1].lstrip('\n') }}{% else %}<think>\n"
    "{{ parts[0].split('<think>')[-1].strip('\n') if parts|length > 1 else '' }}\n</think>\n\n"
    "{{ parts[-1].lstrip('\n') }}{% endif %}",
)
CLOSES_ALL = CHATML.replace("{% endfor %}", "{% endfor %}{% if not add_generation_prompt %}<|endoftext|>{% endif %}")


def test_tools_reach_the_template(file, tokenizer):
    tokenizer.chat_template = "{{ tools[0].function.name if tools }}" + CHATML
    row = PLAIN | {"tools": [{"type": "function", "function": {"name": "add"}}]}
    assert all(context.startswith("add<|im_start|>") for context, _ in documents(tokenizer, load(file, tokenizer, row)))


@pytest.mark.parametrize(
    "answer",
    [
        THOUGHT + GOOD,
        assistant(GOOD, reasoning_content="two and two"),
        "two and two</think>" + GOOD,
        "<|channel|>analysis<|message|>two and two<|end|><|start|>assistant<|channel|>final<|message|>" + GOOD,
    ],
)
@pytest.mark.parametrize("template", [CHATML, PREFILLS_THINK, FORGETS])
def test_a_trace_is_trained_in_one_form(file, tokenizer, answer, template):
    tokenizer.chat_template = template
    pairs = load(file, tokenizer, {"prompt": MULTI, "chosen": answer, "rejected": THOUGHT + BAD})
    context = asked(tokenizer, MULTI)
    opened = "<think>\n" if template == PREFILLS_THINK else ""
    assert documents(tokenizer, pairs) == [
        (context, (THOUGHT + GOOD).removeprefix(opened) + END),
        (context, (THOUGHT + BAD).removeprefix(opened) + END),
    ]
    assert pairs.audit.by_side["chosen"].thoughts == pairs.audit.by_side["rejected"].thoughts == 1


@pytest.mark.parametrize("template", [CHATML, PREFILLS_THINK, EATS_THOUGHT, FORGETS, CLOSES_ALL])
def test_the_empty_path_goes_on_where_sampling_did(file, tokenizer, template):
    tokenizer.chat_template = template
    pairs = load(file, tokenizer, BOTH | {"prompt": MULTI}, paths=("empty",))
    context = empty_thought(asked(tokenizer, MULTI))
    assert context.endswith("<|im_start|>assistant\n<think>\n\n</think>\n\n")
    end = f"{END}\n<|endoftext|>" if template == CLOSES_ALL else END
    assert documents(tokenizer, pairs) == [(context, "4." + end), (context, "Five." + end)]
    ids = tokenizer(context, add_special_tokens=False)["input_ids"]
    for start, prompt in zip(pairs.offsets, pairs.prompts):
        assert pairs.tokens[start : start + prompt].tolist() == ids


@pytest.mark.parametrize("name", ["qwen3", "phi3", "llama3", "gemma3"])
def test_templates_as_they_are_shipped(file, name):
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}_training.jinja"
    if not path.exists():
        pytest.skip(f"this TRL has no {path.name}")
    tokenizer = byte_tokenizer()
    marks = ["<|eot_id|>", "<end_of_turn>", "<|end|>"]
    tokenizer.add_special_tokens({"additional_special_tokens": marks})
    tokenizer.bos_token = "<|endoftext|>"
    pairs = load(file, tokenizer, BOTH, paths=("trace", "empty"), template=str(path))
    prompt = asked(tokenizer, [USER], str(path))
    for (context, target), answer in zip(
        documents(tokenizer, pairs), ("chosen", "rejected", "empty_chosen", "empty_rejected")
    ):
        assert context == (empty_thought(prompt) if answer.startswith("empty") else prompt)
        assert target.startswith(BOTH[answer]) and any(
            target.rstrip().endswith(mark) for mark in [END, "<|endoftext|>", *marks]
        )


@pytest.mark.parametrize(
    "template, row, reason",
    [
        (EATS_THOUGHT, BOTH, "chosen: no-thought: the template .* drops the thought"),
        (NO_END, PLAIN, "chosen: no-eos: the template .* puts no end token after an assistant turn"),
        (PREFILLS_THINK, PLAIN, "chosen: not-a-prefix: the generation prompt goes on with '<think>"),
        ("{{ raise_exception('No jokes') }}", PLAIN, "the chat template cannot render this row: No jokes"),
        (CHATML.replace("m.content", "m.content[:4]"), PLAIN, "chosen: no-answer: the template .* drops the text"),
    ],
)
def test_what_a_template_loses_is_refused(file, tokenizer, template, row, reason):
    tokenizer.chat_template = template
    with pytest.raises(Refusal, match=rf"file\.jsonl:1: {reason}"):
        load(file, tokenizer, row)
    with pytest.raises(
        Refusal, match=rf"no pair left to train on: 1 rows read, 1 left out, 0 too long; .*:1: {reason}"
    ):
        load(file, tokenizer, row, skip_bad_rows=True)


@pytest.mark.parametrize("sides", [("chosen", "rejected"), ("rejected", "chosen")])
def test_answers_that_a_template_makes_equal(file, tokenizer, sides):
    """What differs in an empty thought is the same to a template that writes one itself."""
    tokenizer.chat_template = FORGETS
    row = {"prompt": "2+2?"} | dict(zip(sides, ("<think>\n\n</think>\n\nb", "b")))
    with pytest.raises(Refusal, match=r"file\.jsonl:1: rejected: found the tokens of chosen; accepted: two different"):
        load(file, tokenizer, row)
    audit = load(file, tokenizer, row, PLAIN, skip_bad_rows=True).audit
    assert audit.left_out == {"equal": 1} and audit.prompts == 1


def test_a_template_that_closes_the_thought_has_one_path(file, tokenizer):
    tokenizer.chat_template = CHATML.replace("assistant\n", "assistant\n<think>\n\n</think>\n\n")
    with pytest.raises(
        Refusal, match=r"file\.jsonl:1: the template closes the thought itself, so both paths begin alike"
    ):
        load(file, tokenizer, BOTH, paths=("trace", "empty"))
    load(file, tokenizer, BOTH, paths=("empty",))


def test_a_prompt_may_speak_of_an_answer(file, tokenizer):
    """A template that drops the assistant's text is known whatever the prompt says."""
    row = BOTH | {"prompt": "Give me an answer, please"}
    tokenizer.chat_template = CHATML.replace("{{ m.content }}", "{{ m.content if m.role == 'user' }}")
    with pytest.raises(Refusal, match=r"file\.jsonl:1: the template drops an assistant's text"):
        load(file, tokenizer, row, paths=("empty",))
    tokenizer.chat_template = CHATML
    context = empty_thought(asked(tokenizer, [{"role": "user", "content": row["prompt"]}]))
    assert documents(tokenizer, load(file, tokenizer, row, paths=("empty",)))[0] == (context, "4." + END)


@pytest.mark.parametrize("template", [NO_END, CHATML.replace("m.content", "m.role")])
def test_what_a_template_loses_of_the_empty_path(file, tokenizer, template):
    tokenizer.chat_template = template
    with pytest.raises(Refusal, match=r"file\.jsonl:1: .*the template .*--template longtrace"):
        load(file, tokenizer, BOTH, paths=("empty",))

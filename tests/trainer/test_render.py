"""Rendering: the generation prompt's ids open the training row, and exactly the assistant's text and end token are targets."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest

from longtrace.trainer.config import Refusal
from longtrace.trainer.prepare import byte_tokenizer
from longtrace.trainer.render import MARKERS, Encoder, chat_template, render, resolve_template

THOUGHT = "<think>\ntwo and two\n</think>\n\nIt is \\boxed{4}."
SINGLE = [{"role": "user", "content": "2+2?"}, {"role": "assistant", "content": THOUGHT}]
MULTI = [
    {"role": "system", "content": "Be brief."},
    *SINGLE,
    {"role": "user", "content": "times 3?"},
    {"role": "assistant", "content": "<think>\n4 times 3\n</think>\n\n\\boxed{12}"},
]
EATS_THOUGHT = (
    "{{ bos_token }}{% for m in messages %}{% if m.role == 'user' %}<｜User｜>{{ m.content }}{% else %}<｜Assistant｜>"
    "{{ m.content.split('</think>')[-1] }}<｜end▁of▁sentence｜>{% endif %}{% endfor %}"
    "{% if add_generation_prompt %}<｜Assistant｜><think>\n{% endif %}"
)
# what Qwen3 does: thoughts of earlier turns go once another user turn follows
FORGETS_EARLIER_THOUGHTS = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n"
    "{{ m.content if loop.last or m.role != 'assistant' else m.content.split('</think>')[-1].lstrip('\n') }}<|im_end|>\n"
    "{% endfor %}{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
)
PREFILLS_THINK = (
    "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}<|im_end|>\n{% endfor %}"
    "{% if add_generation_prompt %}<|im_start|>assistant\n<think>\n{% endif %}"
)


def tokenizer_with(*marks, eos=None):
    tokenizer = byte_tokenizer()
    tokenizer.add_special_tokens({"additional_special_tokens": list(marks)})
    if eos:
        tokenizer.eos_token = eos
    return tokenizer


def encode(tokenizer, template, messages, tools=None):
    rendered = render(tokenizer, template, messages, tools)
    return rendered, Encoder(tokenizer).encode([rendered])[0]


def learned(tokenizer, encoded):
    """The runs of targets as text."""
    edges = np.flatnonzero(np.diff(np.concatenate([[0], encoded.loss_mask.astype(np.int8), [0]])))
    return [tokenizer.decode(encoded.ids[a:b]) for a, b in edges.reshape(-1, 2)]


FAMILIES = {
    "chatml": ((), "<|im_end|>"),
    "deepseek": (MARKERS["deepseek"], "<｜end▁of▁sentence｜>"),
    "llama3": (MARKERS["llama3"], "<|eot_id|>"),
    "gemma": (MARKERS["gemma"], "<end_of_turn>"),
    "plain": ((), "<|im_end|>"),
}


@pytest.mark.parametrize("family", FAMILIES)
def test_our_templates_learn_thought_answer_and_end_and_nothing_else(family):
    marks, end = FAMILIES[family]
    tokenizer = tokenizer_with(*marks)
    template = (Path(resolve_template.__code__.co_filename).parent / "templates" / f"{family}.jinja").read_text("utf-8")
    for messages in (SINGLE, MULTI):
        rendered, encoded = encode(tokenizer, template, messages)
        assert not rendered.broken and encoded.prompt_is_prefix
        assert learned(tokenizer, encoded) == [m["content"] + end for m in messages if m["role"] == "assistant"]
        assert tokenizer.decode(encoded.ids) == rendered.text
        for message in messages:
            assert message["content"] in rendered.text
        for i, message in enumerate(messages):
            if message["role"] == "assistant":
                prompt = tokenizer.apply_chat_template(
                    messages[:i], chat_template=template, add_generation_prompt=True, tokenize=False
                )
                ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
                assert encoded.ids[: len(ids)].tolist() == ids
                assert encoded.loss_mask[len(ids)] and not encoded.loss_mask[len(ids) - 1]


@pytest.mark.parametrize("family", FAMILIES)
def test_our_templates_write_tools_and_their_calls(family):
    tokenizer = tokenizer_with(*FAMILIES[family][0])
    template = (Path(resolve_template.__code__.co_filename).parent / "templates" / f"{family}.jinja").read_text("utf-8")
    tools = [{"type": "function", "function": {"name": "add", "description": "adds"}}]
    call = {"type": "function", "function": {"name": "add", "arguments": {"a": 2}}}
    messages = [
        {"role": "user", "content": "2+2?"},
        {"role": "assistant", "content": "", "tool_calls": [call]},
        {"role": "tool", "content": "four"},
        {"role": "assistant", "content": "4"},
    ]
    for system in ([], [{"role": "system", "content": "Be brief."}]):
        rendered, encoded = encode(tokenizer, template, system + messages, tools)
        assert rendered.text.count('"description": "adds"') == 1 and "four" in rendered.text
        assert not system or "Be brief." in rendered.text
        assert not rendered.broken and encoded.prompt_is_prefix
        end = FAMILIES[family][1]
        call_text = '<tool_call>\n{"name": "add", "arguments": {"a": 2}}\n</tool_call>'
        assert learned(tokenizer, encoded) == [call_text + end, "4" + end]


def test_the_vocabulary_chooses_our_template():
    assert resolve_template(byte_tokenizer(), "longtrace").name == "longtrace (chatml)"
    assert resolve_template(tokenizer_with(*MARKERS["llama3"]), "longtrace").name == "longtrace (chatml)"
    assert resolve_template(tokenizer_with(*MARKERS["deepseek"]), "longtrace").name == "longtrace (deepseek)"


def test_auto_takes_the_models_own_and_ours_where_it_has_none(tmp_path):
    tokenizer = byte_tokenizer()
    assert resolve_template(tokenizer, "auto").ours and "<|im_start|>" in chat_template(tokenizer, "auto")
    with pytest.raises(Refusal, match="--template model: the tokenizer has no chat template"):
        chat_template(tokenizer, "model")
    tokenizer.chat_template = PREFILLS_THINK
    assert chat_template(tokenizer, "auto") == chat_template(tokenizer, "model") == PREFILLS_THINK
    assert chat_template(tokenizer, "longtrace") != PREFILLS_THINK
    path = tmp_path / "mine.jinja"
    path.write_text("{% generation %}{{ messages[0].content }}{% endgeneration %}")
    assert chat_template(tokenizer, str(path)) == path.read_text()
    path.write_text("a\n{% for m in messages %}")
    with pytest.raises(Refusal, match=r"mine.jinja:2: .*; accepted: a jinja chat template"):
        chat_template(tokenizer, str(path))
    with pytest.raises(Refusal, match=r"--template .*none.jinja: cannot be read"):
        chat_template(tokenizer, str(tmp_path / "none.jinja"))
    with pytest.raises(Refusal, match=r"--template chatml: accepted: auto, model, longtrace or a \.jinja file"):
        chat_template(tokenizer, "chatml")


def test_a_prefilled_think_is_prompt_and_not_target():
    tokenizer = byte_tokenizer()
    rendered, encoded = encode(tokenizer, PREFILLS_THINK, SINGLE)
    assert not rendered.broken
    assert learned(tokenizer, encoded) == [THOUGHT.removeprefix("<think>\n") + "<|im_end|>"]


def test_a_row_without_thought_after_a_prefilled_think_is_no_prefix():
    tokenizer = byte_tokenizer()
    rendered, encoded = encode(tokenizer, PREFILLS_THINK, [SINGLE[0], {"role": "assistant", "content": "4"}])
    assert "the generation prompt goes on with '<think>\\n' where the training text has '4" in rendered.broken
    assert learned(tokenizer, encoded) == ["4<|im_end|>"]


def test_a_template_that_forgets_earlier_thoughts_is_no_prefix():
    tokenizer = byte_tokenizer()
    rendered, encoded = encode(tokenizer, FORGETS_EARLIER_THOUGHTS, MULTI)
    assert rendered.broken == "messages[2] renders differently when more turns follow"
    assert learned(tokenizer, encoded) == [MULTI[-1]["content"] + "<|im_end|>"]
    assert not encode(tokenizer, FORGETS_EARLIER_THOUGHTS, SINGLE)[0].broken


def test_a_template_without_end_token():
    tokenizer = byte_tokenizer()
    template = "{% for m in messages %}<|im_start|>{{ m.role }}\n{{ m.content }}\n{% endfor %}"
    template += "{% if add_generation_prompt %}<|im_start|>assistant\n{% endif %}"
    _, encoded = encode(tokenizer, template, SINGLE)
    assert encoded.ends == [None]


def test_a_template_that_rejects_a_row_is_a_refusal():
    with pytest.raises(Refusal, match="the chat template cannot render this row: No system role"):
        render(byte_tokenizer(), "{{ raise_exception('No system role') }}", MULTI)


def test_merges_do_not_cross_the_end_of_the_prompt(merging_tokenizer):
    """`assistant\\n` + `\\n` would merge: the model never sees the merged token at inference, so it is not trained on."""
    tokenizer = merging_tokenizer
    template = chat_template(tokenizer, "longtrace")
    messages = [SINGLE[0], {"role": "assistant", "content": "\n4"}]
    rendered, encoded = encode(tokenizer, template, messages)
    whole = tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    prompt = tokenizer.apply_chat_template(
        messages[:1], chat_template=template, add_generation_prompt=True, tokenize=False
    )
    prompt_ids = tokenizer(prompt, add_special_tokens=False)["input_ids"]
    assert whole[: len(prompt_ids)] != prompt_ids, "the fixture must merge across the boundary"
    assert encoded.ids[: len(prompt_ids)].tolist() == prompt_ids
    assert learned(tokenizer, encoded) == ["\n4<|im_end|>"]
    # as an earlier turn, the merge would also change what the model sees before the second one
    _, encoded = encode(tokenizer, template, [*messages, SINGLE[0], SINGLE[1]])
    assert not encoded.prompt_is_prefix


def test_sentencepiece_spaces_do_not_appear_inside_a_row(sentencepiece_tokenizer):
    tokenizer = sentencepiece_tokenizer
    template = chat_template(tokenizer, "longtrace")
    rendered, encoded = encode(tokenizer, template, MULTI)
    assert encoded.ids.tolist() == tokenizer(rendered.text, add_special_tokens=False)["input_ids"]
    assert encoded.prompt_is_prefix


def test_many_rows_at_once_equal_one_by_one():
    tokenizer = byte_tokenizer()
    template = chat_template(tokenizer, "longtrace")
    rows = [render(tokenizer, template, messages) for messages in (SINGLE, MULTI, SINGLE, MULTI[:3])]
    encoder = Encoder(tokenizer)
    for row, together in zip(rows, encoder.encode(rows)):
        alone = encoder.encode([row])[0]
        np.testing.assert_array_equal(together.ids, alone.ids)
        np.testing.assert_array_equal(together.loss_mask, alone.loss_mask)
        assert together.ends == alone.ends


@pytest.mark.parametrize(
    "name", ["qwen2_5", "qwen3", "llama3", "gemma3", "cohere2", "lfm2", "phi3", "qwen3_instruct_2507"]
)
def test_masks_agree_with_the_generation_blocks_of_trl(name):
    """TRL's training templates mark what they train: the same tokens, but for line breaks after the end token."""
    trl = pytest.importorskip("trl", reason="TRL is not installed")
    path = Path(trl.__file__).parent / "chat_templates" / f"{name}_training.jinja"
    if not path.exists():
        pytest.skip(f"this TRL has no {path.name}")
    tokenizer = tokenizer_with("<|eot_id|>", "<end_of_turn>", "<|END_OF_TURN_TOKEN|>", "<|end|>")
    tokenizer.bos_token = "<|endoftext|>"
    template = path.read_text("utf-8")
    theirs = tokenizer.apply_chat_template(
        SINGLE, chat_template=template, return_assistant_tokens_mask=True, return_dict=True
    )
    _, encoded = encode(tokenizer, template, SINGLE)
    assert encoded.ids.tolist() == theirs["input_ids"]
    mask = np.array(theirs["assistant_masks"], bool)
    assert not (encoded.loss_mask & ~mask).any()
    assert not tokenizer.decode(encoded.ids[mask & ~encoded.loss_mask]).strip()

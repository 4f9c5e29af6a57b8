"""Rows of preference pairs, and how tests read them: shared by the tests of shapes and of templates."""

from longtrace.trainer.preferences import load_pairs
from longtrace.trainer.render import chat_template

USER = {"role": "user", "content": "2+2?"}
GOOD, BAD = "It is 4.", "It is 5."
PLAIN = {"prompt": "2+2?", "chosen": GOOD, "rejected": BAD}
THOUGHT = "<think>\ntwo and two\n</think>\n\n"
BOTH = {
    "prompt": "2+2?",
    "chosen": THOUGHT + GOOD,
    "rejected": THOUGHT + BAD,
    "empty_chosen": "4.",
    "empty_rejected": "Five.",
}
END = "<|im_end|>"


def assistant(text, **more):
    return {"role": "assistant", "content": text, **more}


def load(file, tokenizer, *rows, paths=("trace",), **options):
    options = {"max_tokens": 4096, "progress": False} | options
    return load_pairs([file(*rows)], tokenizer, paths=paths, **options)


def documents(tokenizer, pairs):
    """(context, target) of every document, as text."""
    parts = []
    for start, end, prompt in zip(pairs.offsets, pairs.offsets[1:], pairs.prompts):
        parts.append(
            tuple(map(tokenizer.decode, (pairs.tokens[start : start + prompt], pairs.tokens[start + prompt : end])))
        )
    return parts


def asked(tokenizer, messages, template="auto"):
    return tokenizer.apply_chat_template(
        messages, chat_template=chat_template(tokenizer, template), tokenize=False, add_generation_prompt=True
    )

"""Fixtures shared by the whole suite: tiny models and a tokenizer made in code, nothing downloaded."""

import os

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")

from pathlib import Path

import pytest
import torch

torch.set_num_threads(1)

SEED = int(os.environ.get("LONGTRACE_TEST_SEED", "0"))
SHARED = Path(__file__).resolve().parents[1] / ".." / "shared"

ALPHABET = sorted(set("abcdefghijklmnopqrstuvwxyzABCDEFGHIJKLMNOPQRSTUVWXYZ0123456789 \n+-*/=().,:;?!'\\{}<>|_$^%"))


def pytest_report_header():
    return f"LONGTRACE_TEST_SEED={SEED}"


@pytest.fixture
def seed():
    torch.manual_seed(SEED)
    return SEED


@pytest.fixture
def force(monkeypatch):
    """force("reference"): what LONGTRACE_BACKEND=reference does, from here to the end of the test."""
    from longtrace.kernels import backend

    return lambda name: monkeypatch.setattr(backend, "FORCED", name)


@pytest.fixture(scope="session")
def shared():
    """The folder of real data beside the clone; tests that need it skip without it."""
    if not SHARED.exists():
        pytest.skip("the shared data folder is not beside this clone")
    return SHARED.resolve()


def character_tokenizer():
    from tokenizers import AddedToken, Regex, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    special = ["<unk>", "<|im_start|>", "<|im_end|>", "<think>", "</think>"]
    vocab = {token: i for i, token in enumerate(special + ALPHABET)}
    core = Tokenizer(models.WordLevel(vocab, unk_token="<unk>"))
    core.pre_tokenizer = pre_tokenizers.Split(Regex(r"[\s\S]"), "isolated")
    core.decoder = decoders.Fuse()
    core.add_special_tokens([AddedToken(t, special=True, normalized=False) for t in special[:3]])
    core.add_tokens([AddedToken(t, special=False, normalized=False) for t in special[3:]])
    tokenizer = PreTrainedTokenizerFast(
        tokenizer_object=core,
        unk_token="<unk>",
        eos_token="<|im_end|>",
        pad_token="<unk>",
        clean_up_tokenization_spaces=False,
    )
    tokenizer.chat_template = (
        "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\\n' + m['content'] + '<|im_end|>' + '\\n' }}{% endfor %}"
        "{% if add_generation_prompt %}{{ '<|im_start|>assistant\\n' }}{% endif %}"
    )
    return tokenizer


@pytest.fixture
def merging_tokenizer():
    """Bytes, and one merge: two line breaks."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    vocab = {letter: i for i, letter in enumerate(sorted(pre_tokenizers.ByteLevel.alphabet()))}
    vocab["ĊĊ"] = len(vocab)
    tokenizer = Tokenizer(models.BPE(vocab=vocab, merges=[("Ċ", "Ċ")]))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


@pytest.fixture
def sentencepiece_tokenizer():
    """Letters with Llama 2's habit: a space before any text that starts."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    letters = ["▁", "\n", *map(chr, range(33, 127))]
    tokenizer = Tokenizer(models.BPE(vocab={letter: i for i, letter in enumerate(letters)}, merges=[]))
    tokenizer.pre_tokenizer = pre_tokenizers.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.decoder = decoders.Metaspace(replacement="▁", prepend_scheme="first", split=False)
    tokenizer.add_special_tokens(
        [AddedToken(t, special=True, normalized=False) for t in ("<|im_start|>", "<|im_end|>")]
    )
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer, eos_token="<|im_end|>")


def tiny_config(architecture, vocab_size, **changes):
    """A transformers config of 2 small layers."""
    from transformers import Gemma3TextConfig, LlamaConfig, MistralConfig, Qwen2Config, Qwen3Config

    classes = {
        "llama": LlamaConfig,
        "mistral": MistralConfig,
        "qwen2": Qwen2Config,
        "qwen3": Qwen3Config,
        "gemma3": Gemma3TextConfig,
    }
    sizes = dict(
        vocab_size=vocab_size,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        max_position_embeddings=512,
        bos_token_id=None,
        eos_token_id=2,
        pad_token_id=0,
        tie_word_embeddings=architecture in ("qwen3", "gemma3"),
    )
    if architecture == "gemma3":
        sizes |= dict(
            sliding_window=8,
            layer_types=["sliding_attention", "full_attention"],
            query_pre_attn_scalar=8,
            final_logit_softcapping=30.0,
        )
    return classes[architecture](**(sizes | changes))


@pytest.fixture(scope="session")
def tiny_model(tmp_path_factory):
    """tiny_model("llama", **config changes) -> folder of a random model and character tokenizer."""
    from transformers import AutoModelForCausalLM

    made = {}

    def make(architecture="llama", **changes):
        key = (architecture, repr(sorted(changes.items())))
        if key not in made:
            folder = tmp_path_factory.mktemp(architecture)
            tokenizer = character_tokenizer()
            torch.manual_seed(SEED)
            AutoModelForCausalLM.from_config(tiny_config(architecture, len(tokenizer), **changes)).save_pretrained(
                folder
            )
            tokenizer.save_pretrained(folder)
            made[key] = folder
        return made[key]

    return make


@pytest.fixture(scope="session")
def chain_data(tmp_path_factory):
    """A JSONL file of 40 short generated traces."""
    import json

    from longtrace.trainer import tasks

    path = tmp_path_factory.mktemp("data") / "chains.jsonl"
    with path.open("w") as file:
        for row in tasks.rows("chain,steps=3,rows=40,seed=1"):
            file.write(json.dumps(row) + "\n")
    return path

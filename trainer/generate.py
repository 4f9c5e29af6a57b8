"""`longtrace generate`: answers a prompt with a trained folder, thought and all, as it is written."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import torch

from .config import Refusal
from .model import choose_device, load_for_generation


@dataclass(kw_only=True)
class GenerateConfig:
    """Answer a prompt with a trained folder."""

    model: str
    """Hugging Face folder or hub name."""
    prompt: str
    """The user's message; `-` reads it from standard input."""
    max_new_tokens: int = 2048
    """Longest answer, in tokens; one that is cut off is said to be."""
    temperature: float = 0.6
    """Sampling temperature (0 = greedy)."""
    top_p: float = 0.95
    """Share of the probability mass sampled from."""
    seed: int = 0
    """Seeds the sampling."""
    device: Literal["auto", "cpu", "cuda"] = "auto"
    """Where to generate."""


def generate(config: GenerateConfig) -> str:
    """Prints the answer while it is written and returns it. Raises Refusal for a folder that cannot be loaded."""
    import sys

    from transformers import TextStreamer

    prompt = sys.stdin.read().strip() if config.prompt == "-" else config.prompt
    if not prompt:
        raise Refusal("--prompt is empty")
    model, tokenizer = load_for_generation(config.model, choose_device(config.device))
    if tokenizer.chat_template:
        messages = [{"role": "user", "content": prompt}]
        inputs = tokenizer.apply_chat_template(
            messages, add_generation_prompt=True, return_tensors="pt", return_dict=True
        )
    else:
        inputs = tokenizer(prompt, return_tensors="pt")
    inputs = inputs.to(model.device)
    torch.manual_seed(config.seed)
    sampling = {"do_sample": False}
    if config.temperature:
        sampling = {"do_sample": True, "temperature": config.temperature, "top_p": config.top_p, "top_k": 0}
    output = model.generate(
        input_ids=inputs["input_ids"],
        attention_mask=inputs["attention_mask"],
        max_new_tokens=config.max_new_tokens,
        streamer=TextStreamer(tokenizer, skip_prompt=True, skip_special_tokens=False),
        **sampling,
    )
    answer = output[0, inputs["input_ids"].shape[1] :]
    stops = model.generation_config.eos_token_id
    stops = stops if isinstance(stops, list) else [stops]
    if len(answer) == config.max_new_tokens and int(answer[-1]) not in stops:
        print(f"[cut off at --max-new-tokens {config.max_new_tokens}]", file=sys.stderr)
    return tokenizer.decode(answer, skip_special_tokens=False)

"""A reward model: a transformers model with one output that scores conversations, for what no rule can check."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch

from .config import Refusal
from .model import SAFE, _refusing, load_tokenizer


class RewardModel:
    """Scores conversations with a sequence-classification head of one output, such as Skywork-Reward's.

    name: folder or hub name, loaded without its code and without pickle. batch_size: conversations scored at once.
    max_tokens: longer ones keep their end. Raises Refusal for a model without such a head or without a chat template.
    """

    def __init__(self, name: str, *, device: str = "cpu", batch_size: int = 8, max_tokens: int = 8192):
        from transformers import AutoConfig, AutoModelForSequenceClassification

        self.tokenizer = load_tokenizer(name)
        with _refusing(name, "model"):
            config = AutoConfig.from_pretrained(name, trust_remote_code=False)
        heads = [a for a in config.architectures or [] if a.endswith("ForSequenceClassification")]
        if config.num_labels != 1 or not heads:
            raise Refusal(
                f"{name}: found {', '.join(config.architectures or ['no architecture'])} with {config.num_labels} outputs; "
                "accepted: a sequence-classification model with one"
            )
        if not self.tokenizer.chat_template:
            raise Refusal(f"{name}: the tokenizer has no chat template; accepted: a reward model with one")
        with _refusing(name, "model"):
            model = AutoModelForSequenceClassification.from_pretrained(name, dtype="auto", **SAFE)
        self.model = model.to(device).eval()
        self.batch_size, self.max_tokens = batch_size, max_tokens

    @torch.inference_mode()
    def __call__(self, conversations: Sequence[list[dict[str, Any]]]) -> list[float]:
        """One score per conversation, in order; they do not depend on what shares a batch beyond rounding."""
        ids = [
            self.tokenizer.apply_chat_template(messages, tokenize=True, return_dict=False)[-self.max_tokens :]
            for messages in conversations
        ]
        # the head reads the last token that is not padding: an id that no text holds, since an end token may be a pad token
        used = set().union(*ids)
        pad = next(token for token in range(len(used) + 1) if token not in used)
        self.model.config.pad_token_id = self.model.config.get_text_config().pad_token_id = pad
        scores = [0.0] * len(ids)
        order = sorted(range(len(ids)), key=lambda i: len(ids[i]))
        for start in range(0, len(order), self.batch_size):
            batch = order[start : start + self.batch_size]
            width = len(ids[batch[-1]])
            rows = torch.tensor([ids[i] + [pad] * (width - len(ids[i])) for i in batch], device=self.model.device)
            mask = torch.tensor([[1] * len(ids[i]) + [0] * (width - len(ids[i])) for i in batch], device=rows.device)
            logits = self.model(input_ids=rows, attention_mask=mask).logits
            for i, value in zip(batch, logits[:, 0].float().tolist()):
                scores[i] = value
        return scores

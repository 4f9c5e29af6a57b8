"""Steps of DPO beside TRL's own trainer, in fp32: the same losses, and weights that moved alike."""

import numpy as np
import pytest
import torch

pytestmark = pytest.mark.slow  # importing TRL alone takes ten seconds


def test_steps_are_those_of_trl(tiny_model, tmp_path, seed):
    pytest.importorskip("trl", reason="TRL is not installed")
    from datasets import Dataset
    from transformers import AutoModelForCausalLM, AutoTokenizer
    from trl import DPOConfig, DPOTrainer

    from longtrace.trainer import train
    from longtrace.trainer.model import load_model
    from longtrace.trainer.pair_source import PairSource
    from longtrace.trainer.prefer import PreferConfig
    from longtrace.trainer.preference import Preference
    from longtrace.trainer.preferences import PairSet
    from longtrace.trainer.reference import Reference

    folder, steps, each = tiny_model(), 4, 2
    rng = np.random.default_rng(seed)
    documents, prompts = [], []
    for _ in range(steps * each):
        prompt = rng.integers(5, 60, 4)
        for _ in range(2):
            documents.append(np.concatenate([prompt, rng.integers(5, 60, rng.integers(3, 40))]))
            prompts.append(4)
    offsets = np.concatenate([[0], np.cumsum([len(d) for d in documents])])
    pairs = PairSet(
        np.concatenate(documents).astype(np.uint32), offsets, np.array(prompts), ("trace",), np.arange(8), None
    )

    config = PreferConfig(
        model=str(folder), data=[], out=tmp_path / "ours", max_tokens=200, tokens_per_row=200, steps=steps, lr=3e-3, warmup=0,
        schedule="constant", betas=(0.9, 0.95), clip=1.0, dtype="fp32", activation_checkpointing="off", device="cpu",
    )  # fmt: skip
    model = load_model(config)
    source = PairSource(pairs, np.arange(len(pairs)), tokens_per_row=200, pairs_per_step=each, seed=0)
    order = source.order.tolist()
    source.keep_reference(Reference(model)(source.first_pass(steps), 4 * steps * each // 2, "pairs"))
    objective = Preference("dpo", 0.5)
    result = train.run(config, model, source, objective, steps=steps, begin=lambda: None, finish=lambda: None)

    losses = []

    class Tokenised(DPOTrainer):
        def _prepare_dataset(self, dataset, *_):
            return dataset  # it has token ids already

        def compute_loss(self, *args, **options):
            loss = super().compute_loss(*args, **options)
            losses.append(float(loss[0] if isinstance(loss, tuple) else loss))
            return loss

    ids = [d.tolist() for d in documents]
    examples = [
        {"prompt_ids": ids[2 * i][:4], "chosen_ids": ids[2 * i][4:], "rejected_ids": ids[2 * i + 1][4:]} for i in order
    ]
    hf = AutoModelForCausalLM.from_pretrained(folder, dtype=torch.float32)
    trainer = Tokenised(
        model=hf,
        args=DPOConfig(
            output_dir=str(tmp_path / "theirs"), use_cpu=True, bf16=False, fp16=False, beta=0.5, max_length=None,
            per_device_train_batch_size=each, max_steps=steps, learning_rate=3e-3, lr_scheduler_type="constant", warmup_steps=0,
            adam_beta1=0.9, adam_beta2=0.95, adam_epsilon=1e-8, weight_decay=0.0, max_grad_norm=1.0, optim="adamw_torch_fused",
            train_sampling_strategy="sequential", dataloader_pin_memory=False, report_to="none", save_strategy="no",
            disable_tqdm=True, seed=0,
        ),
        train_dataset=Dataset.from_list(examples),
        processing_class=AutoTokenizer.from_pretrained(folder),
    )  # fmt: skip
    trainer.train()
    assert [row["loss"] for row in result.metrics] == pytest.approx(losses, rel=1e-4)
    theirs = dict(hf.named_parameters())
    for name, weight in model.hf.named_parameters():
        assert torch.allclose(weight, theirs[name], atol=2e-5), name

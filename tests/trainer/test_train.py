"""The loop's behaviour on a tiny model: learning, resume, gates, schedules, refusals, the run folder."""

import json
import math
from itertools import pairwise

import pytest
import torch
import yaml

from longtrace.trainer import checkpoint
from longtrace.trainer.config import Refusal, SFTConfig, TrainConfig
from longtrace.trainer.train import NonFinite, lr_at, sft


def config(model, data, out, **changes):
    defaults = dict(max_tokens=400, tokens_per_row=400, steps=6, lr=3e-3, dtype="fp32", warmup=2)
    return SFTConfig(model=str(model), data=[str(data)], out=out, **(defaults | changes))


def weights(out):
    return checkpoint.load(checkpoint.latest(out / "checkpoints"))[0]


def assert_equal(a, b):
    assert a.keys() == b.keys()
    for name in a:
        assert torch.equal(a[name], b[name]), name


def test_learns_and_leaves_a_whole_run_folder(tiny_model, chain_data, tmp_path):
    from transformers import AutoModelForCausalLM, AutoTokenizer

    out = tmp_path / "run"
    result = sft(config(tiny_model("llama"), chain_data, out, steps=30, eval_fraction=0.2, eval_every=10))
    losses = [row["loss"] for row in result.metrics]
    assert losses[-1] < losses[0] - 0.5, losses
    rows = [json.loads(line) for line in (out / "metrics.jsonl").read_text().splitlines()]
    assert [row["step"] for row in rows] == list(range(1, 31)) and rows == result.metrics
    assert [row["step"] for row in rows if "eval_loss" in row] == [10, 20, 30]
    assert 0.5 < rows[0]["fill"] <= 1
    assert (out / "report.html").stat().st_size > 5000
    assert yaml.safe_load((out / "config.yaml").read_text())["lr"] == 3e-3
    assert json.loads((out / "environment.json").read_text())["packages"]["torch"] == torch.__version__
    model = AutoModelForCausalLM.from_pretrained(out)
    assert "<think>" in AutoTokenizer.from_pretrained(out).apply_chat_template(
        [{"role": "user", "content": "1"}, {"role": "assistant", "content": "<think>\na\n</think>\n\nb"}],
        tokenize=False,
    )
    saved = {k.removeprefix("model."): v for k, v in weights(out).items() if k.startswith("model.")}
    for name, parameter in model.named_parameters():
        assert torch.equal(parameter, saved[name]), name


@pytest.mark.parametrize(
    "changes",
    [
        dict(dtype="bf16"),
        dict(lora_rank=4, lora_dropout=0.1),
        pytest.param(dict(optimizer="adamw8bit", steps=4), marks=pytest.mark.slow),  # torch.compile builds its step
        dict(activation_checkpointing="on", tokens_per_step=800),
    ],
    ids=lambda c: next(iter(c)),
)
def test_resume_is_bit_exact(tiny_model, chain_data, tmp_path, changes):
    model = tiny_model("llama")
    whole = sft(config(model, chain_data, tmp_path / "whole", **changes))
    sft(config(model, chain_data, tmp_path / "half", save_every=3, **changes))
    checkpoint_of_3 = tmp_path / "half" / "checkpoints" / "step-00000003"
    again = sft(config(model, chain_data, tmp_path / "half", save_every=3, resume=str(checkpoint_of_3), **changes))
    assert_equal(weights(tmp_path / "half"), weights(tmp_path / "whole"))
    assert [row["loss"] for row in again.metrics] == [row["loss"] for row in whole.metrics]


def test_resume_refuses_changed_data(tiny_model, chain_data, tmp_path):
    sft(config(tiny_model("llama"), chain_data, tmp_path / "run", steps=2))
    changed = tmp_path / "changed.jsonl"
    changed.write_text("".join(chain_data.read_text().splitlines(keepends=True)[1:]))
    with pytest.raises(Refusal, match="data changed"):
        sft(config(tiny_model("llama"), changed, tmp_path / "run", steps=4, resume="auto"))


def test_resume_refuses_other_weights(tiny_model, chain_data, tmp_path):
    sft(config(tiny_model("llama"), chain_data, tmp_path / "run", steps=2))
    with pytest.raises(Refusal, match="same --model"):
        sft(config(tiny_model("llama"), chain_data, tmp_path / "run", steps=4, resume="auto", lora_rank=2))


def test_a_used_run_folder_is_not_overwritten(tiny_model, chain_data, tmp_path):
    sft(config(tiny_model("llama"), chain_data, tmp_path / "run", steps=1))
    with pytest.raises(Refusal, match="--resume auto"):
        sft(config(tiny_model("llama"), chain_data, tmp_path / "run", steps=1))


def test_lora_trains_only_adapters_and_exports(tiny_model, chain_data, tmp_path):
    from longtrace.trainer.model import load_for_generation

    base = tiny_model("llama")
    out = tmp_path / "run"
    sft(config(base, chain_data, out, lora_rank=4, steps=4))
    assert all("lora_" in name for name in weights(out) if name.startswith("model."))
    assert (out / "adapter_model.safetensors").exists()
    merged, _ = load_for_generation(str(out), torch.device("cpu"))
    plain, _ = load_for_generation(str(base), torch.device("cpu"))
    name = "model.layers.0.self_attn.q_proj.weight"
    assert not torch.equal(merged.state_dict()[name], plain.state_dict()[name])
    assert torch.equal(merged.state_dict()["lm_head.weight"], plain.state_dict()["lm_head.weight"])


def test_non_finite_loss_stops_before_the_weights(tiny_model, chain_data, tmp_path, monkeypatch):
    from longtrace.trainer import objectives

    out = tmp_path / "run"
    honest = objectives.SFT.__call__
    calls = []

    def broken(self, hidden, head, batch):
        loss, metrics = honest(self, hidden, head, batch)
        calls.append(1)
        return (loss * float("nan") if len(calls) == 3 else loss), metrics

    monkeypatch.setattr(objectives.SFT, "__call__", broken)
    with pytest.raises(NonFinite, match=r"step 3.*weights were not touched.*as of step 2"):
        sft(config(tiny_model("llama"), chain_data, out))
    monkeypatch.undo()
    whole = tmp_path / "whole"
    sft(config(tiny_model("llama"), chain_data, whole, steps=6, save_every=2, keep_last=9))
    expected = checkpoint.load(whole / "checkpoints" / "step-00000002")[0]
    assert_equal(weights(out), expected)


def test_early_stopping(tiny_model, chain_data, tmp_path):
    result = sft(
        config(
            tiny_model("llama"),
            chain_data,
            tmp_path / "run",
            steps=40,
            lr=1.0,
            eval_fraction=0.2,
            eval_every=1,
            patience=2,
        )
    )
    evals = [row["eval_loss"] for row in result.metrics]
    assert result.steps < 40
    assert min(evals[:-2]) <= min(evals[-2:])


def test_epochs_without_steps(tiny_model, chain_data, tmp_path):
    result = sft(config(tiny_model("llama"), chain_data, tmp_path / "run", steps=0, epochs=1, tokens_per_step=1200))
    assert result.metrics[-1]["epoch"] == pytest.approx(1.0)


def test_plan_prints_and_writes_nothing(tiny_model, chain_data, tmp_path, capsys):
    assert sft(config(tiny_model("llama"), chain_data, tmp_path / "run", plan=True)) is None
    assert not (tmp_path / "run").exists()
    assert "tokens" in capsys.readouterr().out


def test_rows_and_steps_must_fit(tiny_model, chain_data, tmp_path):
    with pytest.raises(Refusal, match="not a multiple"):
        sft(config(tiny_model("llama"), chain_data, tmp_path / "run", tokens_per_step=500))
    with pytest.raises(Refusal, match="--tokens-per-row"):
        sft(config(tiny_model("llama"), chain_data, tmp_path / "run", tokens_per_row=20))


def test_missing_model_is_one_line(chain_data, tmp_path):
    with pytest.raises(Refusal, match="no such folder") as caught:
        sft(config(tmp_path / "nowhere", chain_data, tmp_path / "run"))
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("schedule", ["cosine", "linear", "constant"])
def test_schedules(schedule):
    c = TrainConfig(model="m", out="o", lr=2.0, schedule=schedule, warmup=10, min_lr_ratio=0.1)
    rates = [lr_at(step, 100, c) for step in range(100)]
    assert rates[0] == pytest.approx(0.2) and rates[9] == 2.0 and rates[10] == 2.0
    assert all(a >= b for a, b in pairwise(rates[10:]))
    middle = {"cosine": 0.2 + 1.8 * 0.5 * (1 + math.cos(math.pi * 0.5)), "linear": 0.2 + 1.8 * 0.5, "constant": 2.0}
    assert rates[55] == pytest.approx(middle[schedule])
    share = TrainConfig(model="m", out="o", lr=2.0, schedule=schedule, warmup=0.1)
    assert lr_at(4, 100, share) == pytest.approx(1.0)


@pytest.mark.parametrize("method", ["auto", "linear", "ntk", "yarn"])
def test_rope_extension_is_saved(tiny_model, chain_data, tmp_path, method):
    from transformers import AutoConfig

    model = tiny_model("llama", max_position_embeddings=128)
    sft(config(model, chain_data, tmp_path / "run", rope=method, steps=1))
    saved = AutoConfig.from_pretrained(tmp_path / "run")
    assert saved.max_position_embeddings == 400
    assert saved.rope_parameters["rope_type"] == {"auto": "yarn", "ntk": "default"}.get(method, method)
    if method == "ntk":
        assert saved.rope_parameters["rope_theta"] > AutoConfig.from_pretrained(model).rope_parameters["rope_theta"]


def test_attention_dropout_is_refused(tiny_model, chain_data, tmp_path):
    with pytest.raises(Refusal, match="attention_dropout"):
        sft(config(tiny_model("llama", attention_dropout=0.1), chain_data, tmp_path / "run"))


def test_rope_none_refuses(tiny_model, chain_data, tmp_path):
    with pytest.raises(Refusal, match="window of 128"):
        sft(config(tiny_model("llama", max_position_embeddings=128), chain_data, tmp_path / "run", rope="none"))


def test_generation_stops_where_the_trained_turns_end(tiny_model, chain_data, tmp_path):
    from transformers import GenerationConfig

    base = tiny_model("llama", eos_token_id=7)
    sft(config(base, chain_data, tmp_path / "run", steps=1))
    assert GenerationConfig.from_pretrained(tmp_path / "run").eos_token_id == [7, 2]


def test_adapters_of_an_extended_context_generate_on_it(tiny_model, chain_data, tmp_path):
    from longtrace.trainer.model import load_for_generation

    base = tiny_model("llama", max_position_embeddings=128)
    sft(config(base, chain_data, tmp_path / "run", lora_rank=2, steps=1))
    model, _ = load_for_generation(str(tmp_path / "run"), torch.device("cpu"))
    assert model.config.rope_parameters["rope_type"] == "yarn"


def test_the_model_folder_is_not_written_over(tiny_model, chain_data):
    with pytest.raises(Refusal, match="--model folder"):
        sft(config(tiny_model("llama"), chain_data, tiny_model("llama")))


def test_more_epochs_go_on_where_the_first_ended(tiny_model, chain_data, tmp_path):
    model, out = tiny_model("llama"), tmp_path / "run"
    changes = dict(steps=0, tokens_per_step=1200, schedule="constant")
    first = sft(config(model, chain_data, out, epochs=1, **changes))
    both = sft(config(model, chain_data, out, epochs=2, resume="auto", **changes))
    assert both.metrics[-1]["epoch"] == pytest.approx(2.0)
    assert both.metrics[: first.steps] == first.metrics and both.steps == 2 * first.steps


@pytest.mark.parametrize(
    ("changes", "flag"),
    [
        (dict(tokens_per_row=800), "--tokens-per-row"),
        (dict(seed=5), "--seed"),
        (dict(eval_fraction=0.2), "--eval-fraction"),
    ],
)
def test_resume_refuses_another_order_of_the_data(tiny_model, chain_data, tmp_path, changes, flag):
    sft(config(tiny_model("llama"), chain_data, tmp_path / "run", steps=2))
    kept = (tmp_path / "run" / "config.yaml").read_text()
    with pytest.raises(Refusal, match=f"{flag} differs"):
        sft(config(tiny_model("llama"), chain_data, tmp_path / "run", steps=4, resume="auto", **changes))
    assert (tmp_path / "run" / "config.yaml").read_text() == kept, "a refused resume leaves the run folder alone"


def test_an_early_stopped_run_stays_stopped(tiny_model, chain_data, tmp_path):
    changes = dict(steps=40, lr=1.0, eval_fraction=0.2, eval_every=1, patience=2)
    first = sft(config(tiny_model("llama"), chain_data, tmp_path / "run", **changes))
    assert sft(config(tiny_model("llama"), chain_data, tmp_path / "run", resume="auto", **changes)).steps == first.steps


def test_stopped_before_the_first_step_resumes(tiny_model, chain_data, tmp_path, monkeypatch):
    """SIGTERM within step 1 leaves a checkpoint of step 0, with no optimizer state yet."""
    import os
    import signal

    from longtrace.trainer import objectives

    honest, calls = objectives.SFT.__call__, []

    def interrupted(self, *arguments):
        if not calls:
            os.kill(os.getpid(), signal.SIGTERM)
        calls.append(1)
        return honest(self, *arguments)

    changes = dict(tokens_per_step=800, steps=3)
    whole = sft(config(tiny_model("llama"), chain_data, tmp_path / "whole", **changes))
    handler = signal.getsignal(signal.SIGTERM)
    monkeypatch.setattr(objectives.SFT, "__call__", interrupted)
    with pytest.raises(SystemExit) as stop:
        sft(config(tiny_model("llama"), chain_data, tmp_path / "run", **changes))
    assert stop.value.code == 143 and signal.getsignal(signal.SIGTERM) == handler
    assert checkpoint.latest(tmp_path / "run" / "checkpoints").name == "step-00000000"
    again = sft(config(tiny_model("llama"), chain_data, tmp_path / "run", resume="auto", **changes))
    assert_equal(weights(tmp_path / "run"), weights(tmp_path / "whole"))
    assert [row["loss"] for row in again.metrics] == [row["loss"] for row in whole.metrics]


def test_split_pieces_of_a_row_are_held_out_together(tiny_model, chain_data, tmp_path):
    import numpy as np

    from longtrace.trainer.model import load_tokenizer
    from longtrace.trainer.traces import load_traces
    from longtrace.trainer.train import _hold_out

    data = load_traces(
        [str(chain_data)], load_tokenizer(str(tiny_model("llama"))), max_tokens=60, on_too_long="split", progress=False
    )
    train, held = _hold_out(data, 0.25, 0)
    assert len(data.source) > 2 * len(np.unique(data.source))
    assert not set(data.source[train]) & set(data.source[held])
    assert len(np.unique(data.source[held])) == 10 and len(train) + len(held) == len(data.source)


def test_adapters_and_checkpoints_keep_the_stop_tokens(tiny_model, chain_data, tmp_path):
    from transformers import GenerationConfig

    from longtrace.trainer.export import ExportConfig, export
    from longtrace.trainer.model import load_for_generation

    run = tmp_path / "run"
    sft(config(tiny_model("llama", eos_token_id=7), chain_data, run, lora_rank=2, steps=1))
    assert load_for_generation(str(run), torch.device("cpu"))[0].generation_config.eos_token_id == [7, 2]
    export(ExportConfig(run=run, to=tmp_path / "merged"))
    export(ExportConfig(run=run, to=tmp_path / "step", checkpoint="latest"))
    for folder in ("merged", "step"):
        assert GenerationConfig.from_pretrained(tmp_path / folder).eos_token_id == [7, 2]


@pytest.mark.parametrize(
    "changes",
    [dict(clip=-1), dict(keep_last=0), dict(lr=float("nan")), dict(steps=-3), dict(seed=-1), dict(betas=(0.9, 1.0)),
     dict(epochs=float("inf")), dict(tokens_per_step=-400), dict(lora_rank=-1), dict(eval_fraction=1.5), dict(lora_dropout=0.1),
     dict(patience=1), dict(eval_fraction=1.0)],
    ids=lambda c: next(iter(c)),
)  # fmt: skip
def test_values_out_of_range_are_one_line(tiny_model, chain_data, tmp_path, changes):
    with pytest.raises(Refusal, match="--" + next(iter(changes)).replace("_", "-")) as caught:
        sft(config(tiny_model("llama"), chain_data, tmp_path / "run", **changes))
    assert "\n" not in str(caught.value)


def test_somebody_elses_model_is_not_replaced(tiny_model, chain_data, tmp_path):
    import shutil

    shutil.copytree(tiny_model("llama"), tmp_path / "other")
    with pytest.raises(Refusal, match="holds a model"):
        sft(config(tiny_model("llama"), chain_data, tmp_path / "other"))


def test_models_that_mix_documents_are_refused(chain_data, tmp_path):
    from transformers import Lfm2Config, Lfm2ForCausalLM

    from longtrace.trainer.model import Model, check_model

    sizes = dict(
        vocab_size=64,
        hidden_size=32,
        intermediate_size=48,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
    )
    leaky = Lfm2ForCausalLM(
        Lfm2Config(**sizes, layer_types=["conv", "full_attention"], attn_implementation="longtrace")
    )
    with pytest.raises(Refusal, match="see each other"):
        check_model(Model(leaky, None, "leaky", False, ""))


def test_a_head_that_is_read_wrongly_is_refused(tiny_model):
    from longtrace.trainer.config import TrainConfig
    from longtrace.trainer.model import check_model, load_model

    model = load_model(TrainConfig(model=str(tiny_model("gemma3")), out="o", max_tokens=100))
    check_model(model)
    model.base.config.final_logit_softcapping = 0.5
    honest = model.head

    def scaled():
        head = honest()
        head.logit_scale = 3.0
        return head

    model.head = scaled
    with pytest.raises(Refusal, match="its logits are not"):
        check_model(model)

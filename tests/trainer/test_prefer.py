"""`longtrace prefer` from the command's dataclass to the run folder: what it leaves, resumes to, refuses and says."""

import json
import math
import random
import re
import shutil

import pytest
import torch
from safetensors.torch import load_file

from longtrace.trainer import cli, prefer, reference
from longtrace.trainer.config import NonFinite, Refusal, to_yaml
from longtrace.trainer.prefer import PreferConfig


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    """Reference log-probs of a test go where no other finds them."""
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "longtrace" / "reference"


@pytest.fixture
def data(tmp_path, seed):
    """Sums: the chosen trace is written in a, the rejected one in b, whatever their lengths; on the empty path right and wrong."""
    draw, rows = random.Random(seed), []
    for _ in range(40):
        a, b = draw.randrange(100), draw.randrange(100)
        sizes = draw.randrange(1, 30), draw.randrange(1, 30)
        rows.append({
            "prompt": f"{a}+{b}=", "chosen": f"<think>\n{'a' * sizes[0]}\n</think>\n\n{a + b}", "empty_chosen": f"{a + b}",
            "rejected": f"<think>\n{'b' * sizes[1]}\n</think>\n\n{a + b + 1}", "empty_rejected": f"{a + b + 1}no",
        })  # fmt: skip
    path = tmp_path / "pairs.jsonl"
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    return path


def config_of(folder, out, data, **changes):
    defaults = dict(
        model=str(folder), data=[str(data)], out=out, max_tokens=200, steps=4, pairs_per_step=8, lr=1e-3, dtype="fp32",
        activation_checkpointing="off", warmup=0, schedule="constant", eval_fraction=0.25,
    )  # fmt: skip
    return PreferConfig(**(defaults | changes))


def weights(folder):
    return load_file(folder / "model.safetensors")


def same_weights(a, b):
    a, b = weights(a), weights(b)
    return a.keys() == b.keys() and all(torch.equal(a[name], b[name]) for name in a)


@pytest.mark.parametrize("alpha", ["1", "0.5", "auto"])
def test_a_run_leaves_a_model_metrics_and_a_page(alpha, tiny_model, data, tmp_path, capsys):
    out = tmp_path / "run"
    result = prefer.prefer(config_of(tiny_model(), out, data, alpha=alpha, steps=12, eval_every=6))
    assert result.steps == 12 and len(result.metrics) == 12
    assert abs(result.metrics[0]["loss"] - math.log(2)) < 1e-6
    suffixes = [""] if alpha == "1" else ["_trace", "_empty"]
    last = result.metrics[-1]
    for suffix in suffixes:
        for name in ("accuracy", "margin", "reward_chosen", "reward_rejected", "log_prob_chosen", "eval_accuracy",
                     "eval_accuracy_low", "eval_accuracy_high", "eval_by_length", "eval_margin"):  # fmt: skip
            assert math.isfinite(last[name + suffix]), name
        assert last[f"margin{suffix}"] > 0
    assert last["eval_loss"] < math.log(2) and last["eval_pairs"] == 10
    if alpha == "auto":
        assert {"alpha_estimate", "alpha_error", "grad_cosine", "grad_norm_trace", "grad_norm_empty", "grad_variance",
                "grad_variance_trace", "grad_variance_empty", "path_distance_sq"} <= last.keys()  # fmt: skip
        mean = last["alpha"] * last["loss_trace"] + (1 - last["alpha"]) * last["loss_empty"]
        assert abs(last["loss"] - mean) < 1e-9
    page = (out / "report.html").read_text()
    assert "Preference optimisation of" in page and "Implicit rewards" in page
    assert ("Two paths" in page) == (alpha != "1") and ("Cosine of the two gradients" in page) == (alpha == "auto")
    assert json.loads((out / "audit.json").read_text())["rows_read"] == 40
    printed = capsys.readouterr().out
    assert len(re.findall(r"held-out accuracy.* of 10 pairs; chance 0.5, length alone", printed)) == len(suffixes)
    assert not same_weights(tiny_model(), out)


def test_what_is_chosen_is_learned_and_length_is_not_why(tiny_model, data, tmp_path):
    result = prefer.prefer(config_of(tiny_model(), tmp_path / "run", data, steps=20, beta=0.5, eval_fraction=0.5))
    last = result.metrics[-1]
    assert last["eval_accuracy"] == 1 and last["eval_accuracy_low"] > max(0.5, last["eval_by_length"])


@pytest.mark.parametrize("options", [
    dict(alpha="1"), dict(alpha="0.3"), dict(alpha="auto"), dict(alpha="auto", blend="loss", dtype="bf16"),
    dict(alpha="1:0.2", blend="gradients", path_clip=0.5), dict(loss="simpo", alpha="0"),
], ids=str)  # fmt: skip
def test_resuming_is_exact(options, tiny_model, data, tmp_path):
    whole, parts = tmp_path / "whole", tmp_path / "parts"
    prefer.prefer(config_of(tiny_model(), whole, data, steps=7, save_every=3, **options))
    prefer.prefer(config_of(tiny_model(), parts, data, steps=7, save_every=3, keep_last=9, **options))
    first = min((parts / "checkpoints").iterdir())  # of step 3: what came after is written anew
    prefer.prefer(
        config_of(tiny_model(), parts, data, steps=7, save_every=3, keep_last=9, resume=str(first), **options)
    )
    assert same_weights(whole, parts)
    timed = ("dt", "seconds", "tok_per_sec", "mfu")
    rows = [[json.loads(line) for line in (folder / "metrics.jsonl").open()] for folder in (whole, parts)]
    assert [{k: v for k, v in row.items() if k not in timed} for row in rows[0]] == [
        {k: v for k, v in row.items() if k not in timed} for row in rows[1]
    ]


def test_the_reference_is_computed_once(tiny_model, data, tmp_path, cache, monkeypatch, capsys):
    prefer.prefer(config_of(tiny_model(), tmp_path / "a", data))
    files = sorted(cache.rglob("*.safetensors"))
    assert len(files) == 2 and "computed before" not in capsys.readouterr().out  # training and held-out pairs
    monkeypatch.setattr(reference.Reference, "_compute", None)
    prefer.prefer(config_of(tiny_model(), tmp_path / "b", data, lr=1e-4, beta=0.3))
    assert sorted(cache.rglob("*.safetensors")) == files
    assert "computed before" in capsys.readouterr().out
    for changes in (dict(model=str(tiny_model("qwen2"))), dict(dtype="bf16"), dict(seed=1)):
        with pytest.raises(TypeError):  # other weights, arithmetic or rows: asked for anew
            prefer.prefer(config_of(tiny_model(), tmp_path / "c", data, **changes))


@pytest.mark.parametrize("damage", ["torn", "nan", "short"])
def test_a_damaged_reference_is_computed_anew(damage, tiny_model, data, tmp_path, cache):
    from safetensors.torch import save_file

    prefer.prefer(config_of(tiny_model(), tmp_path / "a", data))
    kept = {path: path.read_bytes() for path in cache.rglob("*.safetensors")}
    for path, content in kept.items():
        if damage == "torn":
            path.write_bytes(content[:40])
        else:
            values = load_file(path)["log_probs"].clone()
            values[3] = math.nan
            save_file({"log_probs": values if damage == "nan" else values[:3].clone()}, path)
    prefer.prefer(config_of(tiny_model(), tmp_path / "b", data))
    assert {path: path.read_bytes() for path in cache.rglob("*.safetensors")} == kept
    assert same_weights(tmp_path / "a", tmp_path / "b")


def test_a_reference_is_found_in_parts_and_under_another_name(tiny_model, data, tmp_path, cache, monkeypatch, capsys):
    monkeypatch.setattr(reference, "ROWS", 2)
    small = dict(pairs_per_step=4, tokens_per_row=200, eval_fraction=0.0)
    prefer.prefer(config_of(tiny_model(), tmp_path / "a", data, steps=2, **small))
    files = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    shutil.copytree(tiny_model(), tmp_path / "copy")
    capsys.readouterr()
    prefer.prefer(config_of(tmp_path / "copy", tmp_path / "b", data, steps=4, **small))
    now = {path: path.stat().st_mtime_ns for path in cache.rglob("*.safetensors")}
    assert len(now) > len(files) > 1 and all(now[path] == at for path, at in files.items())
    assert re.search(r"of 32 completions, \d+ of them computed before", capsys.readouterr().out)


def test_a_cache_that_cannot_be_written_costs_nothing_now(tiny_model, data, tmp_path, monkeypatch, capsys):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "file"))
    assert prefer.prefer(config_of(tiny_model(), tmp_path / "a", data, steps=1)).steps == 1
    assert "reference log-probs are not kept" in capsys.readouterr().out


def test_a_reference_that_is_not_finite_is_said_to_be(tiny_model, data, tmp_path, cache, monkeypatch):
    monkeypatch.setattr(
        reference, "sequence_log_probs", lambda hidden, head, row, **_: torch.full((len(row.sizes),), math.nan)
    )
    with pytest.raises(NonFinite, match="the reference model's log-probs are not finite; nothing was trained"):
        prefer.prefer(config_of(tiny_model(), tmp_path / "a", data))
    assert not list(cache.rglob("*.safetensors"))


def test_running_out_of_memory_in_the_reference_names_what_to_lower(tiny_model, data, tmp_path, monkeypatch):
    def full(*_, **__):
        raise torch.OutOfMemoryError("no")

    monkeypatch.setattr(reference, "sequence_log_probs", full)
    with pytest.raises(Refusal, match="out of memory with --tokens-per-row"):
        prefer.prefer(config_of(tiny_model(), tmp_path / "a", data))


def test_a_models_own_dropout_is_off(tiny_model, data, tmp_path):
    from transformers import AutoModelForCausalLM, GPT2Config

    from longtrace.trainer.model import load_tokenizer

    tokenizer = load_tokenizer(str(tiny_model()))
    AutoModelForCausalLM.from_config(
        GPT2Config(vocab_size=len(tokenizer), n_embd=32, n_layer=2, n_head=2, n_positions=256, attn_pdrop=0.0)
    ).save_pretrained(tmp_path / "gpt2")
    tokenizer.save_pretrained(tmp_path / "gpt2")
    result = prefer.prefer(config_of(tmp_path / "gpt2", tmp_path / "a", data, steps=2))
    assert abs(result.metrics[0]["loss"] - math.log(2)) < 1e-6


@pytest.mark.parametrize(("first", "then"), [
    (dict(alpha="0.5"), dict(alpha="auto")), (dict(alpha="0.5"), dict(alpha="0.5", blend="gradients")),
    (dict(alpha="auto"), dict(alpha="0.3")), (dict(alpha="auto"), dict(alpha="auto", blend="loss", steps=9)),
], ids=str)  # fmt: skip
def test_alpha_may_change_on_resume(first, then, tiny_model, data, tmp_path):
    prefer.prefer(config_of(tiny_model(), tmp_path / "a", data, **(dict(steps=2) | first)))
    result = prefer.prefer(config_of(tiny_model(), tmp_path / "a", data, resume="auto", **(dict(steps=4) | then)))
    assert [row["step"] for row in result.metrics] == list(range(1, then.get("steps", 4) + 1))


def test_no_gradient_is_no_estimate_and_no_crash(tiny_model, data, tmp_path):
    """Labels that are wrong half of the time have no gradient where the margins are 0."""
    config = config_of(tiny_model(), tmp_path / "a", data, alpha="auto", label_smoothing=0.5, steps=3)
    result = prefer.prefer(config)
    assert "alpha_error" not in result.metrics[0] and result.metrics[0]["alpha"] == 0.5
    for line in (tmp_path / "a" / "metrics.jsonl").read_text().splitlines():
        json.loads(line, parse_constant=pytest.fail)


@pytest.mark.parametrize("alpha", ["1", "0"])
def test_one_path_of_two_trains_as_a_file_of_that_path_alone(alpha, tiny_model, data, tmp_path):
    prefer.prefer(config_of(tiny_model(), tmp_path / "both", data, alpha=alpha))
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    sides = ("chosen", "rejected") if alpha == "1" else ("empty_chosen", "empty_rejected")
    alone = tmp_path / "alone.jsonl"
    alone.write_text("".join(json.dumps({name: row[name] for name in ("prompt", *sides)}) + "\n" for row in rows))
    prefer.prefer(config_of(tiny_model(), tmp_path / "alone", alone, alpha=alpha))
    assert same_weights(tmp_path / "both", tmp_path / "alone")


def test_held_out_files_need_the_paths_that_are_trained(tiny_model, data, tmp_path):
    rows = [json.loads(line) for line in data.read_text().splitlines()]
    held = tmp_path / "held.jsonl"
    held.write_text("".join(json.dumps(row) + "\n" for row in rows[:6]))
    config = config_of(tiny_model(), tmp_path / "a", data, alpha="0.5", eval_fraction=0.0, eval_data=[str(held)])
    assert prefer.prefer(config).metrics[-1]["eval_pairs"] == 6
    held.write_text(
        "".join(json.dumps({k: row[k] for k in ("prompt", "chosen", "rejected")}) + "\n" for row in rows[:6])
    )
    with pytest.raises(Refusal, match=r"held.jsonl:1: .*empty_chosen"):
        prefer.prefer(
            config_of(tiny_model(), tmp_path / "b", data, alpha="0.5", eval_fraction=0.0, eval_data=[str(held)])
        )


def test_too_few_prompts_for_an_estimate_are_refused(tiny_model, data, tmp_path):
    data.write_text("".join(data.read_text().splitlines(keepends=True)[:2]))
    with pytest.raises(Refusal, match="--alpha auto with 2 prompts to train on: accepted: 3 or more"):
        prefer.prefer(config_of(tiny_model(), tmp_path / "a", data, alpha="auto", eval_fraction=0.0))


def test_two_buffers_under_activation_checkpointing(tiny_model, data, tmp_path):
    for how in ("off", "on"):
        prefer.prefer(
            config_of(tiny_model(), tmp_path / how, data, alpha="auto", steps=3, activation_checkpointing=how)
        )
    a, b = weights(tmp_path / "off"), weights(tmp_path / "on")
    assert all(torch.allclose(a[name], b[name], atol=1e-6) for name in a)


def test_simpo_asks_for_no_reference(tiny_model, data, tmp_path, cache):
    result = prefer.prefer(config_of(tiny_model(), tmp_path / "a", data, loss="simpo"))
    assert not cache.exists() and result.metrics[0]["loss"] != math.log(2)


def test_lora_takes_the_model_without_adapters_as_reference(tiny_model, data, tmp_path):
    pytest.importorskip("peft")
    config = config_of(tiny_model(), tmp_path / "a", data, lora_rank=2, lora_dropout=0.0, alpha="auto", steps=6)
    result = prefer.prefer(config)
    assert abs(result.metrics[0]["loss"] - math.log(2)) < 1e-6
    assert result.metrics[-1]["margin_trace"] > 0 and (tmp_path / "a" / "adapter_config.json").exists()


def test_early_stopping_goes_by_the_held_out_loss(tiny_model, data, tmp_path, capsys):
    config = config_of(tiny_model(), tmp_path / "a", data, steps=40, lr=0.3, eval_every=1, patience=2)
    result = prefer.prefer(config)
    assert result.steps < 40 and "stopped early" in capsys.readouterr().out


def test_pairs_of_a_prompt_are_held_out_together(tiny_model, tmp_path):
    from longtrace.trainer.model import load_tokenizer
    from longtrace.trainer.preferences import load_pairs

    path = tmp_path / "pairs.jsonl"
    rows = [{"prompt": f"q{i // 3}", "chosen": f"a{i}", "rejected": "no"} for i in range(30)]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    pairs = load_pairs([str(path)], load_tokenizer(str(tiny_model())), paths=("trace",), max_tokens=100, progress=False)
    trained, held = prefer.hold_out(pairs, config_of(tiny_model(), tmp_path, path, eval_fraction=0.3))
    assert len(held) == 9 and not {i // 3 for i in held} & {i // 3 for i in trained}
    assert sorted([*trained, *held]) == list(range(30))


def test_the_length_baseline_is_learned_on_the_training_pairs(tiny_model, tmp_path):
    def file(name, *chosen_lengths):
        rows = [{"prompt": f"q{i}", "chosen": "x" * n, "rejected": "y" * 5} for i, n in enumerate(chosen_lengths)]
        (tmp_path / name).write_text("".join(json.dumps(row) + "\n" for row in rows))
        return tmp_path / name

    longer, shorter = file("longer.jsonl", *[9] * 30, *[1] * 10), file("shorter.jsonl", *[1] * 15, *[9] * 5)
    for trained, held, expected in ((longer, longer, 0.75), (longer, shorter, 0.25), (shorter, longer, 0.25)):
        config = config_of(
            tiny_model(), tmp_path / "a", trained, steps=1, eval_fraction=0.0, eval_data=[str(held)], loss="simpo"
        )
        assert prefer.prefer(config).metrics[-1]["eval_by_length"] == expected
        shutil.rmtree(tmp_path / "a")
    equal = file("equal.jsonl", *[5] * 20)
    assert prefer.prefer(config_of(tiny_model(), tmp_path / "b", equal, steps=1)).metrics[-1]["eval_by_length"] == 0.5


def test_a_second_gradient_buffer_is_in_the_plan(tiny_model, data, tmp_path, monkeypatch):
    """And every backward but the first is planned to add to gradients that are there."""
    planned = []
    plain = prefer.plan.estimate
    monkeypatch.setattr(
        prefer.plan, "estimate", lambda *a, **k: planned.append((a[1], plain(*a, **k))) or planned[-1][1]
    )
    for blend in ("loss", "gradients"):
        prefer.prefer(config_of(tiny_model(), tmp_path / "a", data, alpha="0.5", blend=blend, plan=True))
    (_, loss), (config, gradients) = planned
    assert gradients.memory.gradients == 2 * loss.memory.gradients
    assert config.tokens_per_step == 16 * config.tokens_per_row  # 8 groups, 2 paths: one row each
    assert config.tokens_per_row < 200  # the longest pair of one path


def test_plan_trains_nothing(tiny_model, data, tmp_path, cache, capsys):
    assert prefer.prefer(config_of(tiny_model(), tmp_path / "a", data, plan=True, alpha="auto")) is None
    printed = " ".join(capsys.readouterr().out.split())
    assert "two sets of fp32 gradients" in printed and "BVPO with alpha auto of the gradients" in printed
    assert not (tmp_path / "a").exists() and not cache.exists()


def test_a_run_folders_config_runs_again(tiny_model, data, tmp_path):
    config = config_of(tiny_model(), tmp_path / "a", data, alpha="0.3", loss="simpo")
    prefer.prefer(config)
    read = cli.parse(
        "prefer", PreferConfig, ["--config", str(tmp_path / "a" / "config.yaml"), "--out", str(tmp_path / "b")]
    )
    assert (read.alpha, read.beta, read.gamma, read.blend) == ("0.3", 2.0, 1.0, "loss")
    prefer.prefer(read)
    assert same_weights(tmp_path / "a", tmp_path / "b")
    other = cli.parse("prefer", PreferConfig, ["--config", str(tmp_path / "a" / "config.yaml"), "--loss", "dpo"])
    assert (other.beta, other.gamma) == (None, None)  # simpo's are forgotten
    assert "tokens_per_step" not in to_yaml(config)


def test_changed_data_is_refused_on_resume(tiny_model, data, tmp_path):
    prefer.prefer(config_of(tiny_model(), tmp_path / "a", data))
    data.write_text(data.read_text().replace("a+", "b+").replace("aaa", "aab"))
    with pytest.raises(Refusal, match="the pairs changed since the checkpoint"):
        prefer.prefer(config_of(tiny_model(), tmp_path / "a", data, steps=6, resume="auto"))


@pytest.mark.parametrize(("changes", "flag"), [
    (dict(pairs_per_step=4), "--pairs-per-step"), (dict(seed=1), "--seed"), (dict(eval_fraction=0.1), "--eval-fraction"),
])  # fmt: skip
def test_another_order_of_the_pairs_is_refused_on_resume(changes, flag, tiny_model, data, tmp_path):
    prefer.prefer(config_of(tiny_model(), tmp_path / "a", data, loss="simpo", steps=1))
    with pytest.raises(Refusal, match=f"{flag} differs from the checkpoint's"):
        prefer.prefer(config_of(tiny_model(), tmp_path / "a", data, loss="simpo", steps=2, resume="auto", **changes))


@pytest.mark.parametrize(("changes", "message"), [
    (dict(alpha="1.5"), "--alpha 1.5: accepted: a number from 0 to 1"),
    (dict(alpha="auto", pairs_per_step=2), "--alpha auto with --pairs-per-step 2: accepted: 3 or more"),
    (dict(blend="gradients"), "--blend gradients with --alpha 1: there is one path"),
    (dict(alpha="0.5", path_clip=1.0), "--path-clip needs --blend gradients"),
    (dict(beta=0.0), "--beta 0.0: accepted: above 0"),
    (dict(gamma=-1.0), "--gamma -1.0: accepted: 0 or more"),
    (dict(label_smoothing=0.6), "--label-smoothing 0.6: accepted: 0 to 0.5"),
    (dict(pairs_per_step=0), "--pairs-per-step 0: accepted: 1 or more"),
    (dict(patience=2, eval_fraction=0.0), "--patience needs --eval-every and held-out pairs"),
    (dict(max_tokens=20), "--on-too-long skip"),
    (dict(tokens_per_row=40), "does not fit --tokens-per-row 40"),
    (dict(eval_fraction=1.0), "--eval-fraction 1.0 of"),
    (dict(data="nowhere.jsonl"), "nowhere.jsonl: no such file"),
], ids=lambda x: str(x)[:30])  # fmt: skip
def test_what_cannot_be_used_is_refused(changes, message, tiny_model, data, tmp_path):
    with pytest.raises(Refusal, match=re.escape(message)):
        prefer.prefer(config_of(tiny_model(), tmp_path / "run", changes.pop("data", data), **changes))
    assert not (tmp_path / "run" / "config.yaml").exists()


def test_malformed_pairs_are_refused_by_line(tiny_model, data, tmp_path, capsys):
    lines = data.read_text().splitlines()
    row = json.loads(lines[4])
    for broken, said in (
        (row | {"rejected": row["chosen"]}, "pairs.jsonl:5: "),
        ({k: v for k, v in row.items() if k != "empty_rejected"}, "empty_rejected"),
        (row | {"chosen": ""}, "pairs.jsonl:5: chosen"),
    ):
        data.write_text("\n".join([*lines[:4], json.dumps(broken), *lines[5:]]) + "\n")
        code = cli.main(["prefer", "--model", str(tiny_model()), "--data", str(data), "--out", str(tmp_path / "x"),
                         "--max-tokens", "200", "--alpha", "0.5"])  # fmt: skip
        error = capsys.readouterr().err.strip()
        assert code == 2 and said in error and "\n" not in error, error
    found = prefer.prefer(config_of(tiny_model(), tmp_path / "y", data, skip_bad_rows=True, steps=1))
    assert found.steps == 1


def test_real_pairs_of_hh_train(shared, tiny_model, tmp_path):
    path = shared / "data" / "prefs" / "hh_harmless_1000.jsonl"
    few = tmp_path / "hh.jsonl"
    few.write_text("".join(path.read_text().splitlines(keepends=True)[:12]))
    result = prefer.prefer(config_of(tiny_model(), tmp_path / "a", few, max_tokens=8192, steps=2, pairs_per_step=4))
    assert abs(result.metrics[0]["loss"] - math.log(2)) < 1e-6 and math.isfinite(result.final_loss)

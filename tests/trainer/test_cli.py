"""The command line: exit codes, YAML below flags, one line for bad input."""

import dataclasses
import importlib

import pytest

from longtrace.trainer import cli
from longtrace.trainer.config import SFTConfig, TrainConfig, to_yaml


def test_help_names_every_command(capsys):
    assert cli.main([]) == 0
    printed = capsys.readouterr().out
    assert all(name in printed for name in cli.COMMANDS)


def test_unknown_command(capsys):
    assert cli.main(["trian"]) == 2
    assert "no command 'trian'" in capsys.readouterr().err


@pytest.mark.parametrize("name", list(cli.COMMANDS))
def test_every_command_has_help(name, capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main([name, "--help"])
    assert stop.value.code == 0
    module, config_class, function, _ = cli.COMMANDS[name]
    module = importlib.import_module(module, package="longtrace.trainer")
    printed = " ".join(capsys.readouterr().out.split())
    for field in dataclasses.fields(getattr(module, config_class)):
        if "Positional" in str(field.type):
            continue
        if not field.init:  # what a command shares with others and cannot take is not shown
            assert "--" + field.name.replace("_", "-") not in printed
            continue
        assert "--" + field.name.replace("_", "-") in printed or "--no-" + field.name.replace("_", "-") in printed
    assert callable(getattr(module, function))


def test_bad_flag_exits_2(capsys):
    with pytest.raises(SystemExit) as stop:
        cli.main(["sft", "--model", "m", "--data", "d", "--out", "o", "--learning-rate", "1"])
    assert stop.value.code == 2


def test_refusal_is_one_line_and_2(capsys, tmp_path):
    assert cli.main(["sft", "--model", str(tmp_path / "none"), "--data", "x.jsonl", "--out", str(tmp_path / "o")]) == 2
    err = capsys.readouterr().err
    assert err.startswith("longtrace sft: ") and err.count("\n") == 1


def test_flags_win_over_yaml(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata: [a.jsonl]\nout: o\nlr: 0.5\ntokens-per-row: 64\n")
    config = cli.parse("sft", SFTConfig, ["--config", str(file), "--lr", "0.25", "--out", "p"])
    assert (config.lr, config.tokens_per_row, config.model, str(config.out), config.data) == (
        0.25,
        64,
        "m",
        "p",
        ["a.jsonl"],
    )


def test_yaml_may_leave_required_fields_to_flags(tmp_path):
    file = tmp_path / "c.yaml"
    file.write_text("lr: 0.5\n")
    config = cli.parse("sft", SFTConfig, ["--config", str(file), "--model", "m", "--data", "a", "b", "--out", "o"])
    assert config.lr == 0.5 and config.data == ["a", "b"]


def test_a_run_folders_config_reruns_it(tmp_path):
    config = SFTConfig(model="m", data=["a", "b"], out=tmp_path, columns=["a=b"], betas=(0.8, 0.9), allow=["no-eos"])
    file = tmp_path / "config.yaml"
    file.write_text(to_yaml(config))
    assert cli.parse("sft", SFTConfig, ["--config", str(file)]) == config


@pytest.mark.parametrize(
    ("text", "message"),
    [("lr: [", "not YAML"), ("- 1", "a mapping"), ("learning_rate: 1", "no option learning_rate")],
)
def test_broken_yaml_is_refused(tmp_path, capsys, text, message):
    file = tmp_path / "c.yaml"
    file.write_text(text)
    assert cli.main(["sft", "--config", str(file)]) == 2
    err = capsys.readouterr().err
    assert message in err and err.count("\n") == 1


def test_yaml_values_are_checked_like_flags(tmp_path, capsys):
    file = tmp_path / "c.yaml"
    file.write_text("model: m\ndata: [d]\nout: o\nlr: 1e-4\nschedule: sawtooth\n")
    with pytest.raises(SystemExit) as stop:
        cli.parse("sft", SFTConfig, ["--config", str(file)])
    assert stop.value.code == 2 and "sawtooth" in capsys.readouterr().err
    assert cli.parse("sft", SFTConfig, ["--config", str(file), "--schedule", "linear"]).lr == 1e-4


def test_missing_yaml_is_refused(tmp_path, capsys):
    assert cli.main(["sft", "--config", str(tmp_path / "no.yaml")]) == 2
    assert "No such file" in capsys.readouterr().err


def test_every_field_has_help():
    import inspect

    source = inspect.getsource(TrainConfig) + inspect.getsource(SFTConfig)
    for field in dataclasses.fields(SFTConfig):
        after = source.split(f"    {field.name}: ", 1)[1].split("\n", 1)[1].lstrip()
        assert after.startswith('"""'), field.name


def test_a_backend_that_is_refused_is_one_line_and_2(capsys, force):
    force("gpu")
    assert cli.main(["doctor"]) == 2
    err = capsys.readouterr().err
    assert err == "longtrace doctor: LONGTRACE_BACKEND: found 'gpu'; accepted: reference, cpu, triton, cuda\n"

"""`longtrace prepare`: an audit reports and exits with 0; without --audit-only it answers as training would."""

from __future__ import annotations

import json

import pytest

from longtrace.trainer.cli import main
from longtrace.trainer.config import Refusal
from longtrace.trainer.prepare import PrepareConfig, byte_tokenizer, prepare

GOOD = {"problem": "2+2?", "trace": "<think>\ntwo and $two$ 中\n</think>\n\n\\boxed{4}", "answer": "4"}
CUT = {"problem": "2+2?", "trace": "<think>\ntwo and two"}


@pytest.fixture
def file(tmp_path):
    def write(*rows):
        path = tmp_path / "file.jsonl"
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
        return path

    return write


def test_an_audit_with_findings_exits_with_0(file, capsys):
    assert main(["prepare", "--audit-only", "--data", str(file(GOOD, CUT))]) == 0
    out = " ".join(capsys.readouterr().out.split())
    assert "whole traces kept 2 100.0" in out
    assert "no-thought" in out and "Training would refuse:" in out and "lengths are in bytes" in out


def test_without_audit_only_findings_exit_with_2(file, capsys):
    assert main(["prepare", "--data", str(file(GOOD, CUT))]) == 2
    assert "no-thought: a thought is opened and never closed" in capsys.readouterr().err
    assert main(["prepare", "--data", str(file(GOOD, CUT)), "--skip-bad-rows"]) == 0
    assert main(["prepare", "--data", str(file(GOOD, CUT)), "--allow", "no-thought", "no-answer"]) == 0
    assert "Training would accept this data." in capsys.readouterr().out


def test_unreadable_data_exits_with_2_even_in_an_audit(tmp_path, capsys):
    assert main(["prepare", "--audit-only", "--data", str(tmp_path / "missing.jsonl")]) == 2
    assert "missing.jsonl: no such file; accepted:" in capsys.readouterr().err


def test_a_model_folder_brings_its_tokenizer_and_template(file, tmp_path, capsys):
    tokenizer = byte_tokenizer()
    tokenizer.chat_template = "{% for m in messages %}{{ m.content.split('</think>')[-1] }}<|im_end|>{% endfor %}"
    tokenizer.save_pretrained(tmp_path / "model")
    assert main(["prepare", "--data", str(file(GOOD)), "--model", str(tmp_path / "model")]) == 2
    assert "drops the thought" in capsys.readouterr().err
    assert (
        main(["prepare", "--data", str(file(GOOD)), "--model", str(tmp_path / "model"), "--template", "longtrace"]) == 0
    )


def test_the_picture_shows_a_row_with_a_thought(file, tmp_path, capsys):
    from matplotlib.image import imread

    plain = {"prompt": "hi", "completion": "hello"}
    picture = tmp_path / "mask.png"
    config = PrepareConfig(data=[str(file(plain, GOOD, plain))], picture=picture, audit_only=True)
    assert prepare(config).documents == 3
    assert "loss mask of" in capsys.readouterr().out
    image = imread(picture)
    assert image.shape[1] > 1500 and image.shape[0] > 400
    learned = (abs(image[..., :3] - [0xBF / 255, 0xE5 / 255, 0xD2 / 255]) < 0.01).all(-1).sum()
    assert learned > 20_000, "the strip and the tokens in the loss are green"
    with pytest.raises(Refusal, match=r"--picture .*mask.docx: .*; accepted: a .png, .svg or .pdf"):
        prepare(PrepareConfig(data=config.data, picture=tmp_path / "mask.docx"))
    with pytest.raises(Refusal, match="--picture"):
        prepare(PrepareConfig(data=config.data, picture=tmp_path / "no" / "mask.png"))


def test_pictures_of_long_and_of_many_turned_rows(tmp_path):
    from longtrace.trainer.picture import COLUMNS, MOST_LINES, _choose, _wrap

    tokens = [" word"] * 20_000 + ["end↵"] + ["x" * 500]
    lines = _wrap(tokens)
    assert [i for line in lines for i in line] == list(range(len(tokens)))
    assert all(sum(len(tokens[i]) for i in line) <= COLUMNS or len(line) == 1 for line in lines)
    for positions in ([0, 5000, 20_001], list(range(0, 20_000, 100))):
        shown = _choose(lines, positions)
        assert sum(isinstance(line, range) for line in shown) <= MOST_LINES
        assert sum(line if isinstance(line, int) else len(line) for line in shown) == len(tokens)


def test_the_byte_tokenizer_keeps_every_text():
    tokenizer = byte_tokenizer()
    text = "<|im_start|>user\n  naïve 中文 🙂\t\\boxed{4}\n\n</think><|im_end|>"
    ids = tokenizer(text)["input_ids"]
    assert tokenizer.decode(ids) == text and len(tokenizer) == 259
    assert len(ids) == len(text.encode()) - len("<|im_start|><|im_end|>") + 2

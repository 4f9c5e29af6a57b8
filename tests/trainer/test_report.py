"""Reports: complete from whatever a run folder holds, one file, nothing fetched, nothing unescaped."""

from __future__ import annotations

import json
import math
import re
from html.parser import HTMLParser

import pytest

from longtrace.trainer import report
from longtrace.trainer.config import SFTConfig, to_yaml

EVIL = "<script>alert('$x$')</script> & \"quoted\" </style>"
VOID = {"meta", "br", "use", "path", "link", "img", "hr", "input"}


class Page(HTMLParser):
    """Text, tags and whether every tag that opens is closed in order."""

    def __init__(self, html: str):
        super().__init__()
        self.open, self.tags, self.attributes, self.words = [], [], [], []
        self.feed(html)
        assert not self.open, f"left open: {self.open}"

    def handle_starttag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes
        if tag not in VOID:
            self.open.append(tag)

    def handle_startendtag(self, tag, attributes):
        self.tags.append(tag)
        self.attributes += attributes

    def handle_endtag(self, tag):
        if tag in VOID:
            return
        assert self.open and self.open[-1] == tag, f"</{tag}> closes {self.open[-1:]}"
        self.open.pop()

    def handle_data(self, data):
        self.words.append(data)

    @property
    def text(self) -> str:
        return " ".join(self.words)


def step(i: int, **more) -> dict:
    return {
        "step": i, "loss": 2.0 / i, "lr": 1e-5, "grad_norm": 1.5, "dt": 2.0 if i > 1 else 9.0,
        "tok_per_sec": 500.0 if i > 1 else 100.0, "mfu": 0.4, "tokens": 1000, "supervised": 900, "fill": 0.975,
        "epoch": i / 10, "seconds": 2.0 * i, **more,
    }  # fmt: skip


def run_folder(tmp_path, steps: int, **config):
    out = tmp_path / "run"
    out.mkdir()
    lines = [json.dumps(step(i, **({"eval_loss": 2.5 / i} if i % 10 == 0 else {}))) for i in range(1, steps + 1)]
    (out / "metrics.jsonl").write_text("".join(line + "\n" for line in lines))
    fields = {"model": "models/tiny", "data": ["a.jsonl"], "out": out, "steps": 7} | config
    (out / "config.yaml").write_text(to_yaml(SFTConfig(**fields)))
    (out / "audit.json").write_text(json.dumps({"documents": 62, "checks": {"eos_in_loss": True, "thought": "100 %"}}))
    (out / "environment.json").write_text(json.dumps({"torch": "2.13.0", "cpu": {"features": ["avx2", "amx"]}}))
    return out


@pytest.mark.parametrize("steps", [0, 1, 2, 60])
def test_a_run_of_any_length_makes_a_whole_page(tmp_path, steps):
    out = run_folder(tmp_path, steps)
    path = report.sft_report(out, lengths=[5, 10, 4000])
    page = Page(path.read_text())
    assert path == out / "report.html"
    assert "62" in page.text and "2.13.0" in page.text and "avx2, amx" in page.text and "models/tiny" in page.text
    assert ("No step has been recorded." in page.text) == (steps == 0)
    assert page.tags.count("svg") == (2 + 5 if steps else 1), "pictures: loss, lr, norm, speed, mfu, lengths, fill"
    if steps == 60:
        # headline numbers from the rows above: last loss 2/60, best eval 2.5/60, median speed without the first step
        for number in ("0.0333", "0.0417", "500", "97.5 %", "90 % supervised", "60 steps"):
            assert number in page.text, f"{number} is not in the page"


def test_the_audit_is_told_as_a_funnel_and_checks(tmp_path):
    out = run_folder(tmp_path, 2)
    checks = {
        "kept": {"name": "the thought is kept", "kind": "no-thought", "passed": 60, "applies": 60},
        "eos": {"name": "the end token is there", "kind": "no-eos", "passed": 40, "applies": 60},
    }
    audit = {
        "rows_read": 80, "tokens_read": 1000, "max_tokens": 16384, "on_too_long": "skip", "rows_too_long": 20,
        "tokens_too_long": 400, "rows_whole": 60, "tokens_kept": 600, "tokens_dropped": 400, "tokens_supervised": 540,
        "template": "longtrace", "allow": ["no-eos"], "checks": checks, "notes": [EVIL],
    }  # fmt: skip
    (out / "audit.json").write_text(json.dumps(audit))
    text = Page(report.sft_report(out).read_text()).text
    for words in (
        "over 16,384 tokens, skipped",
        "25.0 %",
        "40.0 %",
        "54.0 %",
        "no-eos, allowed",
        "Template: longtrace",
        EVIL,
    ):
        assert words in text, words


def test_columns_of_numbers_stand_right():
    html = report.table(["a", "b", "c"], [["x", 1, "5 %"], ["y", 20, ""]])
    assert html.count("<th class=n>") == 2 and html.count("<td class=n>") == 4


def test_missing_files_are_left_out(tmp_path):
    page = Page(report.sft_report(tmp_path).read_text())
    assert "No step has finished yet." in page.text
    assert "Environment" not in page.text and "Configuration" not in page.text and "Data" not in page.text


def test_half_a_line_and_odd_values_are_survived_and_said(tmp_path):
    out = run_folder(tmp_path, 0)
    odd = [step(1), step(2, loss=math.nan, mfu=None), step(3, grad_norm=math.inf), {"step": 4}]
    (out / "metrics.jsonl").write_text("\n".join(map(json.dumps, odd)) + '\n[1]\n{"step": 5, "lo')
    page = Page(report.sft_report(out).read_text())
    assert "Left out: 2 lines of metrics.jsonl that could not be read." in page.text
    assert "0.6667" in page.text, "the last finite loss is the headline"


def test_everything_a_user_provides_is_escaped(tmp_path):
    out = run_folder(tmp_path, 3, model=f"models/{EVIL}", data=[EVIL])
    (out / "audit.json").write_text(json.dumps({EVIL: EVIL, "nested": {EVIL: [EVIL] * 12}}))
    extra = report.Section(
        EVIL,
        report.bars(
            [EVIL, "b"], [0.25, 0.5], title=EVIL, intervals=[(0.2, 0.3), (0.4, 0.6)], percent=True, caption=EVIL
        )
        + report.transcript(EVIL, EVIL, f"{EVIL}</think>{EVIL}", verdict=False, detail=EVIL)
        + report.table([EVIL], [[EVIL]])
        + report.paragraph(EVIL),
        note=EVIL,
    )
    html = report.sft_report(out, extra=[extra], title=EVIL).read_text()
    page = Page(html)
    assert "script" not in page.tags and "<script" not in html
    assert page.text.count("alert('$x$')") >= 12, "the text itself must be shown, dollar signs as they are"
    assert not [name for name, _ in page.attributes if name.startswith("on")]


def test_the_page_fetches_nothing(tmp_path):
    html = report.sft_report(run_folder(tmp_path, 3), lengths=[1, 2]).read_text()
    page = Page(html)
    assert not {"script", "link", "iframe", "img", "object"} & set(page.tags)
    links = [v for k, v in page.attributes if k in ("src", "href", "xlink:href", "srcset")]
    assert all(link.startswith("#") for link in links), links
    assert "@import" not in html and not re.search(r"url\((?!#)", html)


def test_pictures_take_the_colours_of_both_themes(tmp_path):
    html = report.sft_report(run_folder(tmp_path, 60), lengths=[1, 2]).read_text()
    svg = "".join(re.findall(r"<svg.*?</svg>", html, flags=re.DOTALL))
    assert not re.findall(r"#[1-8]0[1-8]0[1-8]0\b", svg), "a placeholder colour was left"
    used = set(re.findall(r"var\(--(\w+)\)", html))
    light, dark = re.findall(r":root\{(.*?)\}", html.replace("\n", ""))
    for name in used:
        assert f"--{name}:" in light and f"--{name}:" in dark, f"{name} has no colour in one of the themes"


def test_ids_in_pictures_are_unique_and_the_page_is_repeatable(tmp_path):
    out = run_folder(tmp_path, 60)
    html = report.sft_report(out, lengths=[1, 2]).read_text()
    ids = re.findall(r'\bid="([^"]+)"', html)
    assert len(ids) == len(set(ids)), "two pictures share an id"
    assert report.sft_report(out, lengths=[1, 2]).read_text() == html


def test_a_lone_surrogate_does_not_stop_the_page(tmp_path):
    path = report.write_report(tmp_path / "x.html", title="a \ud800 b", sections=[])
    assert "a ? b" in path.read_text()
    assert [p.name for p in tmp_path.iterdir()] == ["x.html"], "a temporary file was left"


@pytest.mark.parametrize(
    ("value", "text"),
    [
        (15360, "15,360"),
        (1234.5, "1,234"),
        (0.0123, "0.0123"),
        (1e-5, "1e-05"),
        (0.0, "0"),
        (2.0, "2"),
        (math.nan, "nan"),
    ],
)
def test_numbers_are_written_short(value, text):
    assert report.number_text(value) == text


@pytest.mark.parametrize(
    ("seconds", "text"), [(4.21, "4.2 s"), (59.94, "59.9 s"), (440, "7m 20s"), (3 * 3600 + 300, "3h 05m")]
)
def test_durations_are_written_short(seconds, text):
    assert report.duration_text(seconds) == text

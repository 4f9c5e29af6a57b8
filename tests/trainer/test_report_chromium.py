"""The report as a browser draws it: something on every part of the page, both themes, no sideways scrolling."""

from __future__ import annotations

import json
import re
import shutil
import subprocess

import numpy as np
import pytest

from longtrace.trainer import report

CHROMIUM = next((p for p in map(shutil.which, ("chromium", "chromium-browser", "google-chrome")) if p), None)
pytestmark = [
    pytest.mark.slow,
    pytest.mark.skipif(CHROMIUM is None, reason="no Chromium: apt-get install chromium"),
]


def chromium(folder, *arguments: str) -> str:
    flags = [
        "--headless", "--no-sandbox", "--disable-gpu", "--disable-background-networking", "--disable-component-update",
        "--disable-dev-shm-usage", "--no-first-run", "--hide-scrollbars", f"--user-data-dir={folder / 'profile'}",
    ]  # fmt: skip
    done = subprocess.run([CHROMIUM, *flags, *arguments], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr[-2000:]
    return done.stdout


@pytest.fixture(scope="module")
def page(tmp_path_factory):
    out = tmp_path_factory.mktemp("run")
    rows = [
        {"step": i, "loss": 2 / i, "lr": 1e-5, "grad_norm": 1.0, "dt": 1.0, "tok_per_sec": 900.0, "mfu": 0.5,
         "tokens": 1000, "supervised": 900, "fill": 0.99, "eval_loss": 2.2 / i}
        for i in range(1, 50)
    ]  # fmt: skip
    (out / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (out / "environment.json").write_text(json.dumps({"a long value": "x" * 3000, "path": "/" + "y" * 400}))
    wide = report.table([f"column {i}" for i in range(30)], [list(range(30))])
    text = report.transcript("A problem", "p" * 900, "t" * 900 + " </think> " + "a" * 500, verdict=True)
    return report.sft_report(out, lengths=[100, 200, 900], extra=[report.Section("Extra", wide + text)])


@pytest.mark.parametrize("width", [1280, 600])
def test_nothing_is_wider_than_the_window(page, width, tmp_path):
    # Chromium writes the page's own measure of itself into the document it prints
    probe = tmp_path / "probe.html"
    measure = (
        "<script>addEventListener('load',()=>{const e=document.documentElement;"
        "document.title='width '+e.scrollWidth+' of '+e.clientWidth})</script>"
    )
    probe.write_text(page.read_text().replace("</body>", measure + "</body>"))
    dom = chromium(tmp_path, f"--window-size={width},900", "--dump-dom", f"file://{probe}")
    content, window = map(int, re.search(r"<title>width (\d+) of (\d+)</title>", dom).groups())
    assert content <= window, f"the page is {content} px wide in a window of {window} px"


@pytest.mark.parametrize("theme", ["light", "dark"])
def test_every_part_of_the_page_is_drawn(page, theme, tmp_path):
    from PIL import Image

    shot = tmp_path / "page.png"
    dark = ["--blink-settings=preferredColorScheme=0"] if theme == "dark" else []
    chromium(tmp_path, *dark, "--window-size=1200,2400", f"--screenshot={shot}", f"file://{page}")
    picture = Image.open(shot).convert("L")
    assert picture.size == (1200, 2400)
    background = picture.getpixel((2, 2))
    assert (background > 200) == (theme == "light"), f"background {background} in the {theme} theme"
    for top in range(0, 1800, 300):
        strip = picture.crop((100, top, 1100, top + 300))
        low, high = strip.getextrema()
        assert high - low > 100, f"nothing readable between {top} and {top + 300} px in the {theme} theme"
    curve = np.asarray(Image.open(shot).convert("RGB").crop((100, 250, 1100, 800)), dtype=int)
    coloured = int((curve[..., 2] > curve[..., 0] + 60).sum())
    assert coloured > 300, f"the loss curve is missing: {coloured} coloured pixels"

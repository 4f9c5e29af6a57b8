"""The examples of docs/kernels.md that show a session give what the page says."""

from __future__ import annotations

import doctest
from pathlib import Path

import torch

from longtrace import kernels as K

PAGE = Path(__file__).resolve().parents[2] / "docs" / "kernels.md"


def test_the_kernels_page():
    text = PAGE.read_text("utf-8").replace("```", "\n")
    found = doctest.DocTestParser().get_doctest(text, {"torch": torch, "K": K}, PAGE.name, str(PAGE), 0)
    assert len(found.examples) >= 8
    report = []
    result = doctest.DocTestRunner(verbose=False).run(found, out=report.append)
    assert not result.failed, "".join(report)

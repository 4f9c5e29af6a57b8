"""500 hostile completions: never a hang, never a crash, never a reward that is not earned; those that are right are paid."""

from __future__ import annotations

import sys

import hostile
import pytest

from longtrace.trainer import rewards, sandbox
from longtrace.trainer.rows import Row
from longtrace.trainer.verifier import Verifier


@pytest.mark.parametrize("count,heavy", [(250, False), pytest.param(500, True, marks=pytest.mark.slow)])
def test_hostile_completions(count, heavy, seed, tmp_path):
    if heavy and sys.platform != "linux":
        pytest.skip("the sandbox is the kernel's on Linux only")
    assert not heavy or all(sandbox.protections().values()), sandbox.protections()
    marker, victim = tmp_path / "marker", tmp_path / "victim"
    victim.write_text("unchanged")
    cases = hostile.hostile(seed, str(marker), str(victim), count, heavy)
    assert len(cases) == count
    assert sum(case.truth == hostile.RIGHT for case in cases) >= count / 5  # refusing everything does not pass
    batch = []
    for i, case in enumerate(cases):
        raw = {"tests": case.tests} if case.tests else {"answer": case.answer}
        row = Row([], case.answer, f"hostile:{i}", raw)
        batch.append(rewards.Completion(case.text, row, finished=case.finished, thinking=case.thinking))

    with Verifier(workers=2, seconds=3) as pool:
        scores = rewards.score(batch, pool)
        counts = dict(pool.counts)
        assert rewards.score(batch, pool) == scores  # from the cache
        assert all(pool.counts[event] == counts[event] for event in ("timed_out", "crashed", "failed"))

    told = [
        f"{case.name}: {case.text[:80]!r} for {case.answer!r}: {score}, not {case.truth}"
        for case, score in zip(cases, scores)
        if score != case.truth and not (case.truth == hostile.ANY and score in (0.0, 1.0))
    ]
    assert not told, "\n".join(told)
    assert not marker.exists() and victim.read_text() == "unchanged"
    assert counts["timed_out"] >= (len(hostile.ENDLESS) - 1) * heavy  # all but the one that fills the disk first
    assert counts["failed"] == 0, counts

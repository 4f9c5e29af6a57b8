"""The shell scripts of examples/: every command in them parses and finds what it reads; run small, they run to their ends."""

import importlib
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

from longtrace.trainer import cli, tasks
from longtrace.trainer.rows import read_rows

EXAMPLES = Path(__file__).resolve().parents[1] / "examples"
SCRIPTS = sorted(EXAMPLES.glob("*.sh"))
RECORD = """#!{python}
import json, os, sys
with open(os.environ["RECORD"], "a") as file:
    file.write(json.dumps(sys.argv[1:]) + "\\n")
"""
COMMAND = """#!{python}
import sys
sys.path[:] = {path}
from longtrace.trainer import cli
sys.exit(cli.main())
"""

pytestmark = pytest.mark.skipif(os.name == "nt", reason="shell scripts")


def run(script, folder, source, **environment):
    """Runs a script with `source` as the longtrace command."""
    command = folder / "bin" / "longtrace"
    command.parent.mkdir()
    command.write_text(source.format(python=sys.executable, path=[p or os.getcwd() for p in sys.path]))
    command.chmod(0o755)
    environment |= {"PATH": f"{command.parent}:{os.environ['PATH']}"}
    return subprocess.run(
        ["bash", script, "out"], cwd=folder, env=os.environ | environment, capture_output=True, text=True, timeout=900
    )


def test_there_are_scripts():
    assert [script.name for script in SCRIPTS] == ["r1.sh", "r1_zero.sh"]


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_every_command_parses_and_finds_its_inputs(script, tmp_path):
    text = script.read_text()
    assert "set -euo pipefail" in text and len(text.splitlines()) < 60 and os.access(script, os.X_OK)
    done = run(script, tmp_path, RECORD, RECORD=str(tmp_path / "record"))
    assert done.returncode == 0, done.stderr
    made = set()
    for name, *arguments in map(json.loads, (tmp_path / "record").read_text().splitlines()):
        module, config_class, _, _ = cli.COMMANDS[name]
        kind = getattr(importlib.import_module(module, package="longtrace.trainer"), config_class)
        config = cli.parse(name, kind, arguments)
        for source in getattr(config, "data", []):
            if source.startswith("generated:"):
                tasks.parse(source)
            else:
                assert source in made or list(read_rows(source)), source
        assert not hasattr(config, "model") or config.model in made, (name, config.model)
        made |= {str(config.out), f"{config.out}/base", f"{config.out}/kept.jsonl"}


@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_an_existing_folder_is_not_touched(script, tmp_path):
    (tmp_path / "out").mkdir()
    done = run(script, tmp_path, RECORD, RECORD=str(tmp_path / "record"))
    assert done.returncode == 2 and "out is there already" in done.stderr and not (tmp_path / "record").exists()


def test_the_facts_are_right_by_the_verifier():
    from longtrace.trainer import rewards

    rows = list(read_rows(str(EXAMPLES / "facts.jsonl")))
    assert len(rows) == len({row.raw["problem"] for row in rows}) == 64
    assert rewards.score([rewards.Completion(row.messages[-1]["content"], row) for row in rows]) == [1.0] * 64


@pytest.mark.slow
@pytest.mark.parametrize("script", SCRIPTS, ids=lambda script: script.stem)
def test_a_script_runs_to_its_end(script, tmp_path):
    done = run(script, tmp_path, COMMAND, SCALE="20")
    assert done.returncode == 0, done.stdout[-2000:] + done.stderr[-2000:]
    solved = {path.name: json.loads(path.read_text()) for path in (tmp_path / "out").glob("*.json")}
    assert solved and all(0 <= result["solved_rate"] <= 1 for result in solved.values())

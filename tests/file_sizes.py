"""Fails when a tracked source file is longer than 700 lines: a file is what a reader can hold in the head."""

import subprocess
import sys
from pathlib import Path

LIMIT = 700
SUFFIXES = {".py", ".cpp", ".h", ".cu", ".cuh"}

tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, check=True).stdout.split()
counts = {name: len(Path(name).read_text("utf-8").splitlines()) for name in tracked if Path(name).suffix in SUFFIXES}
too_long = {name: lines for name, lines in counts.items() if lines > LIMIT}
for name, lines in too_long.items():
    print(f"{name}: {lines} lines, the limit is {LIMIT}")
sys.exit(bool(too_long))

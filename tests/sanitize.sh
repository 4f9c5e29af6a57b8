#!/usr/bin/env bash
# The kernels' tests on an extension built with AddressSanitizer and UndefinedBehaviorSanitizer, in a copy under build/.
# Any finding ends the test process. Leaks are not looked for: Python and torch keep memory at exit.
set -euo pipefail
cd "$(dirname "$0")/.."
python=$PWD/.venv/bin/python copy=$PWD/build/sanitize
rm -rf "$copy" && mkdir -p "$copy/site/longtrace"
cp -r csrc kernels setup.py pyproject.toml README.md "$copy"
rm -f "$copy"/kernels/*.so
ln -s ../../kernels "$copy/site/longtrace/kernels"
export SANITIZE="-fsanitize=address,undefined -fno-sanitize-recover=undefined -fno-omit-frame-pointer"
echo "building with $SANITIZE"
(cd "$copy" && CFLAGS="$SANITIZE" CXXFLAGS="$SANITIZE" LDFLAGS="$SANITIZE" "$python" setup.py -q build_ext --inplace > build.log 2>&1 &&
  ls kernels/_C.*.so > /dev/null) || { tail -20 "$copy/build.log"; exit 1; }
export LD_PRELOAD="$(g++ -print-file-name=libasan.so) $(g++ -print-file-name=libubsan.so)"
export ASAN_OPTIONS=detect_leaks=0 UBSAN_OPTIONS=print_stacktrace=1 PYTHONPATH=$copy/site LONGTRACE_SANITIZED=$copy
"$python" -c "from longtrace.kernels import extension as e; import os; assert e.LOADED and str(e.LIBRARY.resolve()).startswith(os.environ['LONGTRACE_SANITIZED']), e.WHY; print(e.WHY)"
exec "$python" -m pytest -p no:cacheprovider -q -n 2 -m "not slow" tests/kernels/test_attention_tiles.py tests/kernels/test_attention_decode.py tests/kernels/test_linear.py \
  tests/kernels/test_layers_decode.py tests/kernels/test_head.py \
  tests/kernels/test_head_adversarial.py tests/kernels/test_head_compressed.py tests/kernels/test_layers.py tests/kernels/test_packing.py "$@"

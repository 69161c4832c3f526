#!/bin/sh
# Everything that only a GPU can tell, on a machine where all that is needed is installed already:
# builds in place, tests both backends, and runs the benchmark last. $PYTHON is the interpreter.
set -u
failed=
check() { # what, command...
    what=$1
    shift
    echo "== $what"
    "$@" || failed="$failed, $what"
}
"$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --no-index --editable . || exit 1
"$PYTHON" -c "from lapefast.doctor import diagnose; print(diagnose())"
for backend in cuda triton; do
    check "ops on $backend" "$PYTHON" -m pytest -q tests/ops/test_op_profile.py \
        tests/ops/test_op_edit.py --device cuda --backend $backend
    check "models on $backend" "$PYTHON" -m pytest -q tests/models/test_on_device.py \
        --device cuda --backend $backend
done
if command -v compute-sanitizer >/dev/null; then
    check "compute-sanitizer" compute-sanitizer --error-exitcode 9 "$PYTHON" -m pytest -q \
        tests/ops/test_op_profile.py tests/ops/test_op_edit.py \
        -k "unaligned or fused" --device cuda --backend cuda
else
    echo "compute-sanitizer is not installed here: not run"
fi
check "benchmark" "$PYTHON" -m pytest benchmarks -o python_files="bench_*.py" \
    --benchmark-quiet -q -rs --device cuda
[ -z "$failed" ] || { echo "failed: ${failed#, }"; exit 1; }

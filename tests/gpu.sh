#!/bin/sh
# Everything that only a GPU can tell, on a machine without network that has torch, triton,
# transformers, pybind11, cmake, ninja, pytest, pytest-benchmark and what these require: builds in
# place, compares, measures, then runs the tests that mostly repeat what is known of the kernels from a
# CPU. The table comes last. $PYTHON is the interpreter; all is to end within $SECONDS_LIMIT.
set -u
work=$(mktemp -d)
trap 'rm -rf "$work"' EXIT
end=$(($(date +%s) + ${SECONDS_LIMIT:-470}))
step() { # what, how many seconds at most, command...
    what=$1 most=$2 began=$(date +%s)
    shift 2
    [ $((end - began)) -ge "$most" ] || most=$((end - began))
    if [ "$most" -le 0 ]; then
        echo "== $what: not run, no time is left"
        echo "$what" >>"$work/failed"
        return
    fi
    echo "== $what"
    # An interrupt: pytest then reports what it has until there.
    timeout --signal=INT --kill-after=20 "$most" "$@" || echo "$what" >>"$work/failed"
    echo "== $what: $(($(date +%s) - began)) s of at most $most"
}
tests() { # what, how many seconds at most, arguments of pytest...
    what=$1 most=$2
    shift 2
    step "$what" "$most" "$PYTHON" -m pytest -q --device cuda "$@"
}

step "build" 240 "$PYTHON" -m pip install --quiet --no-build-isolation --no-deps --no-index --editable .
[ ! -e "$work/failed" ] || exit 1
"$PYTHON" -c "from lapefast.doctor import diagnose; print(diagnose())"
for backend in cuda triton; do
    tests "every half-precision value on $backend" 45 tests/models/test_on_device.py \
        -k exact_on_this_device --backend $backend
done
# Those that say something of a GPU. The others need libraries that may be missing there.
tests "benchmarks" 180 -o python_files="bench_*.py" --benchmark-quiet benchmarks/bench_ops.py \
    benchmarks/bench_contenders.py benchmarks/bench_pass.py benchmarks/bench_decode.py \
    benchmarks/bench_scaling.py | tee "$work/benchmarks"
for backend in cuda triton; do
    tests "ops on $backend" 75 tests/ops/test_op_profile.py tests/ops/test_op_edit.py \
        tests/ops/test_op_every_half.py --backend $backend
    tests "models on $backend" 60 tests/models/test_on_device.py -k "not exact_on_this_device" \
        --backend $backend
done
# Torch asks the driver for what it may lack, which is no error of a kernel.
sanitized="compute-sanitizer --report-api-errors no --error-exitcode 9 $PYTHON"
if ! command -v compute-sanitizer >/dev/null; then
    echo "compute-sanitizer is not installed here: not run"
elif ! timeout 40 $sanitized -c "import torch; torch.ones(9, device='cuda').add(1).sum().item()" \
    >/dev/null 2>&1; then
    echo "compute-sanitizer does not work here, not even on a kernel of torch's own: not run"
else
    step "compute-sanitizer" 60 $sanitized -m pytest -q tests/ops/test_op_profile.py \
        tests/ops/test_op_edit.py -k "unaligned or fused" --device cuda --backend cuda
fi
if [ -e "$work/failed" ]; then
    echo "failed:"
    cat "$work/failed"
fi
sed -n '/ threads, torch /,$p' "$work/benchmarks"
[ ! -e "$work/failed" ]

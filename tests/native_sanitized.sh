#!/bin/sh
# The Python tests of the native boundary and of the ops, on a native library built with the address
# and undefined-behaviour sanitizers: the CPU's kernels, then the GPU's compiled for the CPU.
set -eu
sh tests/build.sh address,undefined
# The interpreter was not built with them, so their runtime comes first; and with it the C++ library,
# in which it looks for what throws. What the interpreter never frees is no leak of ours. Output is
# caught in Python alone: a sanitizer writes past it and ends the process.
runtime="$(c++ -print-file-name=libasan.so) $(c++ -print-file-name=libstdc++.so)"
library=$(ls "$PWD"/build/address-undefined/_native*.so)
sanitized() {
    LD_PRELOAD=$runtime ASAN_OPTIONS=detect_leaks=0 python -m pytest --timeout=600 --capture=sys \
        -m "not long" "$@" --native "$library"
}
sanitized tests/properties/test_native_boundary.py tests/properties/test_op_properties.py \
    tests/ops/test_op_native.py tests/ops/test_op_profile.py tests/ops/test_op_edit.py \
    tests/ops/test_op_straight.py tests/ops/test_op_leave_one_out.py tests/ops/test_ranking.py
sanitized tests/ops/test_op_profile.py tests/ops/test_op_edit.py tests/ops/test_op_every_half.py \
    --backend cuda

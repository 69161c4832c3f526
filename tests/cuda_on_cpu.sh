#!/bin/sh
# The tests of the ops on the CUDA kernels, compiled as C++ and run on the CPU.
set -eu
sh tests/build.sh release
python -m pytest --timeout=300 -m "not long" tests/ops/test_op_profile.py \
    tests/ops/test_op_edit.py tests/ops/test_op_every_half.py \
    --backend cuda --native "$(ls "$PWD"/build/release/_native*.so)"

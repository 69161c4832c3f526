#!/bin/sh
# The tests of the ops on the CUDA kernels, compiled as C++ and run on the CPU.
set -eu
build=build/cuda-on-cpu
cmake -S . -B $build -G Ninja -DPython_EXECUTABLE="$(command -v python)" -DLAPEFAST_CUDA=ON_CPU >/dev/null
cmake --build $build --parallel "${JOBS:-2}"
python -m pytest --timeout=300 -m "not long" tests/ops/test_op_profile.py tests/ops/test_op_edit.py \
    --backend cuda --native "$(ls "$PWD"/$build/_native*.so)"

#!/bin/sh
# The CPU kernels compiled for 64-bit Arm (NEON) on a machine of another kind, and their C++ tests run
# under emulation. Where the compiler or the emulator is missing, says so and leaves that out.
set -eu
compiler=aarch64-linux-gnu-g++
if ! command -v $compiler >/dev/null; then
    echo "Arm: $compiler is not installed here (Debian: g++-aarch64-linux-gnu): not compiled, not run"
    exit 0
fi
build=build/arm
cmake -S . -B $build -G Ninja -DCMAKE_SYSTEM_NAME=Linux -DCMAKE_SYSTEM_PROCESSOR=aarch64 \
    -DCMAKE_CXX_COMPILER=$compiler -DLAPEFAST_PYTHON=OFF -DLAPEFAST_TESTS=ON -DLAPEFAST_CUDA=OFF >/dev/null
cmake --build $build --parallel "${JOBS:-2}"
if ! command -v qemu-aarch64 >/dev/null; then
    echo "Arm: compiled; qemu-aarch64 is not installed here (Debian: qemu-user): not run"
    exit 0
fi
# The libraries that the cross compiler came with.
for test in profile edit leave_one_out rank; do
    qemu-aarch64 -L /usr/aarch64-linux-gnu $build/csrc/tests/test_$test
done
echo "Arm: compiled, and the C++ tests passed under emulation"

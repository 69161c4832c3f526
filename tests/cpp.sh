#!/bin/sh
# Builds and runs the C++ tests, once per argument: "release", or sanitizers as in -fsanitize=.
set -eu
for mode in "$@"; do
    build="build/cpp-$(echo "$mode" | tr , -)"
    sanitize=$mode
    [ "$mode" = release ] && sanitize=
    # The GPU's kernels run on fibers, of which the thread sanitizer knows nothing.
    cuda=ON_CPU
    [ "$mode" = thread ] && cuda=OFF
    echo "C++ tests: $mode"
    cmake -S . -B "$build" -G Ninja -DLAPEFAST_PYTHON=OFF -DLAPEFAST_TESTS=ON \
        -DLAPEFAST_CUDA=$cuda -DLAPEFAST_SANITIZE="$sanitize" >/dev/null
    cmake --build "$build" --parallel "${JOBS:-2}"
    ctest --test-dir "$build" --output-on-failure
done

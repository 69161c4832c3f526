#!/bin/sh
# Builds the native library and its C++ tests, the CUDA kernels as C++ for the CPU: "release", or with
# sanitizers as in -fsanitize=, "address,undefined" or "thread". Each in build/, a comma as a dash.
set -eu
mode=$1
sanitize=$mode build=build/$(echo "$mode" | tr , -)
[ "$mode" = release ] && sanitize=
# The GPU's kernels run on fibers, of which the thread sanitizer knows nothing; nor does the
# interpreter serve it.
whole=ON cuda=ON_CPU
[ "$mode" = thread ] && whole=OFF cuda=OFF
cmake -S . -B "$build" -G Ninja -DPython_EXECUTABLE="$(command -v python)" \
    -DLAPEFAST_PYTHON=$whole -DLAPEFAST_TESTS=ON -DLAPEFAST_CUDA=$cuda \
    -DLAPEFAST_SANITIZE="$sanitize" >/dev/null
cmake --build "$build" --parallel "${JOBS:-2}"

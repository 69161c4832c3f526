#!/bin/sh
# Runs the C++ tests, once per argument: see build.sh for what it may be.
set -eu
for mode in "$@"; do
    echo "C++ tests: $mode"
    sh tests/build.sh "$mode"
    ctest --test-dir "build/$(echo "$mode" | tr , -)" --output-on-failure
done

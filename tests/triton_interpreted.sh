#!/bin/sh
# The tests of the ops on the Triton kernels, in Triton's interpreter.
set -eu
TRITON_INTERPRET=1 python -m pytest --timeout=300 -m "not long" tests/ops/test_op_profile.py \
    tests/ops/test_op_edit.py tests/ops/test_op_every_half.py tests/triton_kernels --backend triton

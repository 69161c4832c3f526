"""Which activations a kernel may compute in place of the model's own module."""

from __future__ import annotations

import torch

__all__ = ["FUSED"]

# (activation, dtype, device type) whose kernel equals the module's own eager forward on all 65,536
# bit patterns, contiguous and strided, for every instruction set. `tests/ops/test_op_exact.py` runs
# the comparison and fails if this set holds one entry more or less than it proves.
FUSED: frozenset[tuple[str, torch.dtype, str]] = frozenset(
    (activation, dtype, "cpu")
    for activation in ("silu", "relu", "relu_squared", "gelu_new", "quick_gelu")
    for dtype in (torch.bfloat16, torch.float16)
)

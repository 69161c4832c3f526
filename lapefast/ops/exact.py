"""Which activations a kernel may compute in place of the model's own module."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lapefast.ops.declarations import profile

__all__ = ["FUSED", "exact_dtypes", "is_exact"]

# What the CPU kernels compute as the module does: (activation, dtype, device type), on all 65,536
# bit patterns, contiguous and strided, for every instruction set. `tests/ops/test_op_exact.py` runs
# the comparison and fails if this set holds one entry more or less than it proves.
FUSED: frozenset[tuple[str, torch.dtype, str]] = frozenset(
    (activation, dtype, "cpu")
    for activation in ("silu", "relu", "relu_squared", "gelu_new", "quick_gelu")
    for dtype in (torch.bfloat16, torch.float16)
)

# The reference is the eager expression; what it is compared with is the C++ kernels all the same.
_PROVEN = ("auto", "cpu", "reference")
_HALVES = (torch.bfloat16, torch.float16)
_found: dict[tuple, frozenset[torch.dtype]] = {}


def exact_dtypes(
    activation: str, module: nn.Module, device: torch.device, backend: str
) -> frozenset[torch.dtype]:
    """The dtypes in which the kernel of that name equals ``module`` on every value.

    For the CPU kernels from `FUSED`. Elsewhere the comparison runs there, once in a process for
    each class of module: what a module's own kernels compute is a matter of device and library.
    """
    if device.type == "cpu" and backend in _PROVEN:
        return frozenset(
            dtype for name, dtype, kind in FUSED if (name, kind) == (activation, "cpu")
        )
    key = (activation, type(module), device, backend)
    if key not in _found:
        _found[key] = frozenset(
            dtype for dtype in _HALVES if is_exact(activation, module, dtype, device, backend)
        )
    return _found[key]


@torch.no_grad()
def is_exact(
    activation: str, module: nn.Module, dtype: torch.dtype, device: torch.device, backend: str
) -> bool:
    """Whether kernel and module agree bit for bit on all 65,536 values of a half dtype.

    In three layouts: contiguous, in rows apart, every third element. Every NaN is as good as
    another. What is asked is the forward of the module's class: ops may be placed on the instance
    already, and others may have hooks on it.
    """
    flags = torch.zeros(2, dtype=torch.int64, device=device)
    for gate in _every_value(dtype, device):
        made = profile(
            gate, None, activation, 0.0, None, None, None, None, None, flags, backend=backend
        )
        expected = type(module).forward(module, gate).contiguous()
        equal = made.view(torch.int16) == expected.view(torch.int16)
        if not bool((equal | (made.isnan() & expected.isnan())).all()):
            return False
    return True


def _every_value(dtype: torch.dtype, device: torch.device) -> list[Tensor]:
    contiguous = torch.arange(65536, dtype=torch.int32).to(torch.int16).view(dtype)
    contiguous = contiguous.reshape(256, 256).to(device)
    apart = contiguous.new_empty(256, 300)[:, :256].copy_(contiguous)
    spaced = contiguous.new_empty(256, 256, 3)[..., 1].copy_(contiguous)
    return [contiguous, apart, spaced]

"""The straight way to the native library, past PyTorch's dispatcher.

A decoding step calls `edit` once per layer on a few rows, where the dispatcher's way through Python
and a second check of tables that have not changed cost several times what the kernel does.
"""

from __future__ import annotations

import torch
from torch import Tensor
from torch.autograd import forward_ad

from lapefast.errors import InputError
from lapefast.ops import declarations
from lapefast.ops.backends import native

__all__ = ["edit"]

_NATIVE = frozenset(("cpu", "cuda"))
_modes = torch._C._len_torch_dispatch_stack
_transforms = torch._C._functorch.peek_interpreter_stack
_is_traced = torch._C._is_tracing


def edit(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    sets: Tensor | None,
    offsets: Tensor,
    neurons: Tensor,
    scale: Tensor,
    shift: Tensor,
    flags: Tensor,
    *,
    backend: str,
) -> Tensor:
    """`lapefast.ops.edit`, straight to the native library where nothing stands in between.

    That is where no gradient is wanted and no mode, transform or tracer watches. The library checks
    types, sizes and indices itself; what it refuses goes to the op, whose check says it better.
    """
    if backend in _NATIVE and _is_alone(gate, up):
        width = gate.shape[-1]
        size = (gate.numel() // width if width else 0, width, 0)
        try:
            return native.edit(
                size, gate, up, activation, sets, offsets, neurons, scale, shift, flags
            )
        except InputError:
            pass
    return declarations.edit(
        gate, up, activation, sets, offsets, neurons, scale, shift, flags, backend=backend
    )


def _is_alone(gate: Tensor, up: Tensor | None) -> bool:
    if type(gate) is not Tensor or (up is not None and type(up) is not Tensor):
        return False
    wants_gradient = gate.requires_grad or (up is not None and up.requires_grad)
    return not (
        (wants_gradient and torch.is_grad_enabled())
        or _modes()
        or _transforms() is not None
        or forward_ad._current_level >= 0
        or _is_traced()
    )

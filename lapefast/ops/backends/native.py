"""The ops by the native library `lapefast._native`, on whatever device its tensors are."""

from __future__ import annotations

import torch
from torch import Tensor

from lapefast.ops.checks import Size
from lapefast.ops.rows import in_rows

__all__ = [
    "ACTIVATIONS",
    "FEW_TO_EDIT",
    "edit",
    "library",
    "missing",
    "observe",
    "profile",
    "profile_",
]

try:
    from lapefast import _native as library
except ImportError as error:
    library = None
    _error = str(error)

# As in csrc/include/lapefast/kernels.h.
ACTIVATIONS = {
    "identity": 0,
    "silu": 1,
    "relu": 2,
    "relu_squared": 3,
    "gelu": 4,
    "gelu_tanh": 5,
    "gelu_new": 6,
    "quick_gelu": 7,
}
# Elements below which a second thread costs more than it saves (two cores, bfloat16 SiLU).
_ONE_THREAD_BELOW = 1 << 14
# The same for edits: less work, and in a decoding step the other threads have gone to sleep since
# the last projection. PyTorch's own limit is 1 << 15.
FEW_TO_EDIT = 1 << 17


def missing() -> str | None:
    """Why there is no native library, in one sentence; None if there is."""
    if library is not None:
        return None
    return (
        f"the native library is missing ({_error}); install lapefast with a C++ compiler "
        "at hand and without LAPEFAST_BUILD_NATIVE=0."
    )


def profile(
    size: Size | None,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    threshold: float,
    groups: Tensor | None,
    counts: Tensor | None,
    sums: Tensor | None,
    square_sums: Tensor | None,
    up_abs_sums: Tensor | None,
    flags: Tensor,
) -> Tensor:
    """See `declarations.compute_profile`."""
    # Written out, as is the rest of this way: of a small call, every name passed on costs.
    if gate.is_contiguous():
        product = torch.empty_like(gate)
    else:
        product, gate = _empty(gate), in_rows(gate)
    if up is not None and not up.is_contiguous():
        up = in_rows(up)
    small = gate.is_cpu and gate.numel() < _ONE_THREAD_BELOW
    library.profile(
        gate, up, product, ACTIVATIONS[activation], threshold,
        groups, counts, sums, square_sums, up_abs_sums, flags,
        1 if small else _resource(gate),
    )  # fmt: skip
    return product


def profile_(size: Size, gate: Tensor, up: Tensor | None, activation: str, *statistics) -> None:
    """See `declarations.compute_profile_`."""
    if up is not None:
        up = in_rows(up)
    library.profile(gate, up, gate, ACTIVATIONS[activation], *statistics, _resource(gate))


def observe(size: Size, gate: Tensor, activation: str, *statistics) -> None:
    """See `declarations.compute_observe`."""
    gate = in_rows(gate)
    library.profile(gate, None, None, ACTIVATIONS[activation], *statistics, _resource(gate))


def edit(size: Size, gate: Tensor, up: Tensor | None, activation: str, *edits) -> Tensor:
    """See `declarations.compute_edit`."""
    if gate.is_contiguous():
        product = torch.empty_like(gate)
    else:
        product, gate = _empty(gate), in_rows(gate)
    if up is not None and not up.is_contiguous():
        up = in_rows(up)
    library.edit(gate, up, product, ACTIVATIONS[activation], *edits, _resource(gate, FEW_TO_EDIT))
    return product


def _empty(gate: Tensor) -> Tensor:
    # empty_like takes half the time, but keeps strides where it can.
    return torch.empty_like(gate) if gate.is_contiguous() else gate.new_empty(gate.shape)


def _resource(gate: Tensor, few: int = _ONE_THREAD_BELOW) -> int:
    """How many threads may compute, or on a GPU the stream that torch is queueing on."""
    if gate.is_cpu:
        return 1 if gate.numel() < few else torch.get_num_threads()
    return torch._C._cuda_getCurrentRawStream(gate.device.index)

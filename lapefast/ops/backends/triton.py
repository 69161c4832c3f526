"""The ops on a GPU by Triton, and on CPU tensors in Triton's interpreter, for tests."""

from __future__ import annotations

import contextlib
import functools

import torch
from torch import Tensor

from lapefast.errors import InputError
from lapefast.ops.backends.reference import leave_one_out
from lapefast.ops.checks import Size
from lapefast.ops.rows import in_rows

__all__ = ["edit", "leave_one_out", "observe", "profile", "profile_", "why_not"]

_LARGEST_GROUP = 2**31 - 1
_OLDEST = (3, 6)  # the oldest that the tests were run with; its interpreter needs NumPy below 2.4


def why_not(device_type: str) -> str | None:
    """Why this backend cannot serve a device type; None if it can."""
    missing = _missing()
    if missing is not None:
        return missing
    import triton

    if device_type == "cpu" and not triton.knobs.runtime.interpret:
        return "Triton computes CPU tensors only in its interpreter, with TRITON_INTERPRET=1 set."
    if device_type not in ("cpu", "cuda"):
        return "it computes on GPUs that PyTorch calls cuda, which are NVIDIA's and AMD's."
    return None


def profile(size: Size, gate: Tensor, up: Tensor | None, activation: str, *statistics) -> Tensor:
    """See `declarations.compute_profile`."""
    product = gate.new_empty(gate.shape)
    _profile(size, gate, up, product, activation, *statistics)
    return product


def profile_(size: Size, gate: Tensor, up: Tensor | None, activation: str, *statistics) -> None:
    """See `declarations.compute_profile_`."""
    _profile(size, gate, up, gate, activation, *statistics)


def observe(size: Size, gate: Tensor, activation: str, *statistics) -> None:
    """See `declarations.compute_observe`."""
    _profile(size, gate, None, None, activation, *statistics)


def edit(size: Size, gate: Tensor, up: Tensor | None, activation: str, *edits) -> Tensor:
    """See `declarations.compute_edit`."""
    from lapefast.triton_kernels.edit import edit

    product = gate.new_empty(gate.shape)
    with _on_device(gate):
        edit(*_matrices(size, gate, up, product), activation, *edits)
    return product


def _profile(
    size: Size,
    gate: Tensor,
    up: Tensor | None,
    product: Tensor | None,
    activation: str,
    *statistics,
) -> None:
    from lapefast.triton_kernels.profile import profile

    # Without any statistic there is no number of groups, and none is out of range.
    given = any(statistic is not None for statistic in statistics[2:-1])
    last_group = size[2] - 1 if given else _LARGEST_GROUP
    with _on_device(gate):
        profile(*_matrices(size, gate, up, product), activation, *statistics, last_group)


def _matrices(size: Size, *tensors: Tensor | None) -> list[Tensor | None]:
    """Each as [rows, width], copied where its rows have no single stride between them."""
    # Rows and columns are counted in 32 bits, with room for a tile past the end.
    if max(size[:2]) > 2**31 - 2**16:
        raise InputError(
            f"the Triton kernels take up to 2^31 - 2^16 rows and columns, got {list(size[:2])}."
        )
    return [None if tensor is None else in_rows(tensor).view(size[:2]) for tensor in tensors]


def _on_device(tensor: Tensor) -> contextlib.AbstractContextManager:
    """Launches go to the current device, which need not be the tensor's."""
    if tensor.is_cuda and tensor.device.index != torch.cuda.current_device():
        return torch.cuda.device(tensor.device)
    return contextlib.nullcontext()


@functools.cache
def _missing() -> str | None:
    try:
        import triton
    except ImportError as error:
        return f"Triton is missing ({error}); install triton."
    found = tuple(int(part) for part in triton.__version__.split(".")[:2])
    if found < _OLDEST:
        return f"it needs Triton 3.6 or later and found {triton.__version__}; upgrade triton."
    return None

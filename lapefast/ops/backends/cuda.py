"""The ops on NVIDIA GPUs: CUDA C++, inside the native library."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from lapefast.ops.backends import native
from lapefast.ops.backends.reference import leave_one_out
from lapefast.ops.checks import Size

__all__ = ["edit", "leave_one_out", "observe", "profile", "profile_", "why_not"]

# The oldest GPUs that kernels are compiled for.
_OLDEST = (8, 0)


def why_not(device_type: str) -> str | None:
    """Why this backend cannot serve a device type; None if it can."""
    if device_type != "cuda":
        return "it computes tensors on NVIDIA GPUs only."
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs."
    if native.library is None:
        return native.missing()
    if not native.library.has_cuda:
        return "the native library was built without nvcc; install lapefast where nvcc is found."
    problem = native.library.cuda_problem()
    if problem:
        return f"{problem}."
    # Asking a GPU would wake it; where nobody uses one yet there is nothing to refuse.
    if torch.cuda.is_initialized():
        for device in range(torch.cuda.device_count()):
            if torch.cuda.get_device_capability(device) < _OLDEST:
                name = torch.cuda.get_device_name(device)
                return f"{name} is older than compute capability 8.0."
    return None


def _on_its_device(run: Callable[..., Any]) -> Callable[..., Any]:
    """Launches go to the current device, which need not be the tensor's."""

    def launched(size: Size, gate: Tensor, *arguments: Any) -> Any:
        if gate.is_cuda and gate.device.index != torch.cuda.current_device():
            with torch.cuda.device(gate.device):
                return run(size, gate, *arguments)
        return run(size, gate, *arguments)

    return launched


profile = _on_its_device(native.profile)
profile_ = _on_its_device(native.profile_)
observe = _on_its_device(native.observe)
edit = _on_its_device(native.edit)

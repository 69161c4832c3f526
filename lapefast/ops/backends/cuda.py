"""The ops on NVIDIA GPUs: CUDA C++, inside the native library."""

from __future__ import annotations

from lapefast.ops.backends import native
from lapefast.ops.backends.native import edit, observe, profile, profile_

__all__ = ["edit", "observe", "profile", "profile_", "why_not"]


def why_not(device_type: str) -> str | None:
    """Why this backend cannot serve a device type; None if it can."""
    import torch

    if device_type != "cuda":
        return "it computes tensors on NVIDIA GPUs only."
    if torch.version.hip is not None:
        return "this torch is built for AMD GPUs."
    if native.library is not None and not native.library.has_cuda:
        return "the native library was built without nvcc; install lapefast where nvcc is found."
    return native.missing()

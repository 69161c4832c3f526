"""The ops on the CPU: C++, compiled per instruction set."""

from __future__ import annotations

import torch

from lapefast.ops.backends import native
from lapefast.ops.backends.native import edit, observe, profile, profile_

__all__ = ["edit", "library_findings", "observe", "profile", "profile_", "why_not"]


def why_not(device_type: str) -> str | None:
    """Why this backend cannot serve a device type; None if it can."""
    if device_type != "cpu":
        return "it computes tensors on the CPU only."
    return native.missing()


def library_findings() -> dict[str, str]:
    """What is known of the native library: its instruction sets and its threads, in words."""
    library = native.library
    if library is None:
        return {"native library": native.missing() or ""}
    pool = (
        f"the OpenMP runtime that torch loaded, {torch.get_num_threads()} threads"
        if library.has_thread_pool()
        else "none: no OpenMP runtime was found in this process, so one thread computes"
    )
    return {
        "native library": library.__file__,
        "instruction set": f"{library.isa()} (available: {', '.join(library.available_isas())})",
        "thread pool": pool,
        "CUDA kernels": "compiled in" if library.has_cuda else "not compiled in",
    }

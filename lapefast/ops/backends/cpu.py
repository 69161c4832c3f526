"""The ops on the CPU: C++, compiled per instruction set."""

from __future__ import annotations

import torch
from torch import Tensor
from torch.nn import functional

from lapefast.ops.backends import native, reference
from lapefast.ops.backends.native import edit, observe, profile, profile_

__all__ = [
    "edit",
    "leave_one_out",
    "library_findings",
    "observe",
    "profile",
    "profile_",
    "why_not",
]


def why_not(device_type: str) -> str | None:
    """Why this backend cannot serve a device type; None if it can."""
    if device_type != "cpu":
        return "it computes tensors on the CPU only."
    return native.missing()


# Columns of an attention map that the library takes at a time, as in lapefast/kernels.h.
_MAP_UNIT = 32


def leave_one_out(
    query: Tensor, key: Tensor, logits: Tensor, factor: float, softcap: float
) -> Tensor:
    """See `declarations.compute_leave_one_out`."""
    if softcap:
        return reference.leave_one_out(query, key, logits, factor, softcap)
    padding = -key.shape[1] % _MAP_UNIT
    numbered = torch.arange(1, key.shape[1] + 1, dtype=torch.int32)
    ends = torch.where(logits > -torch.inf, numbered, 0)
    ends = ends.amax(-1) if key.shape[1] else ends.new_zeros(logits.shape[:2])
    logits = functional.pad(logits, (0, padding), value=-torch.inf).contiguous()
    scores = torch.zeros(query.shape[0], query.shape[2], dtype=torch.float64)
    native.library.leave_one_out(
        (query * factor).contiguous(),
        functional.pad(key.transpose(1, 2), (0, padding)).contiguous(),
        logits,
        logits.softmax(-1),
        ends,
        scores,
        torch.get_num_threads(),
    )
    return scores


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

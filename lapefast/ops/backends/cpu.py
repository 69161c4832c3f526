"""The ops on the CPU, computed by the native library `lapefast._native`."""

from __future__ import annotations

import torch
from torch import Tensor

from lapefast.ops.checks import Size, collapsible

__all__ = ["edit", "library_findings", "observe", "profile", "profile_", "why_not"]

try:
    from lapefast import _native
except ImportError as error:
    _native = None
    _missing = str(error)

_DTYPES = {torch.float32: 0, torch.float16: 1, torch.bfloat16: 2}
_ACTIVATIONS = {
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


def why_not(device_type: str) -> str | None:
    """Why this backend cannot serve a device type; None if it can."""
    if device_type != "cpu":
        return "it computes tensors on the CPU only."
    if _native is None:
        return (
            f"the native library is missing ({_missing}); install lapefast with a C++ compiler "
            "at hand and without LAPEFAST_BUILD_NATIVE=0."
        )
    return None


def library_findings() -> dict[str, str]:
    """What is known of the native library: its instruction sets and its threads, in words."""
    if _native is None:
        return {"native library": why_not("cpu") or ""}
    pool = (
        f"the OpenMP runtime that torch loaded, {torch.get_num_threads()} threads"
        if _native.has_thread_pool()
        else "none: no OpenMP runtime was found in this process, so one thread computes"
    )
    return {
        "native library": _native.__file__,
        "instruction set": f"{_native.isa()} (available: {', '.join(_native.available_isas())})",
        "thread pool": pool,
    }


def profile(
    size: Size,
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
    *,
    writes: str = "product",
) -> Tensor | None:
    """See `declarations.compute_profile`; `writes` says where to: "product", "gate", "nothing"."""
    rows, width, group_count = size
    groups_address = groups_size = up_address = up_stride = 0
    if groups is not None:
        groups_address, groups_size = groups.data_ptr(), groups.numel()
    counts_address = 0 if counts is None else counts.data_ptr()
    sums_address = 0 if sums is None else sums.data_ptr()
    square_sums_address = 0 if square_sums is None else square_sums.data_ptr()
    up_abs_sums_address = 0 if up_abs_sums is None else up_abs_sums.data_ptr()
    if up is not None:
        up, up_stride = _rows(up, width)
        up_address = up.data_ptr()
    product, product_address, product_stride = None, 0, 0
    if writes == "product":
        product = _empty(gate)
        product_address, product_stride = product.data_ptr(), width
    gate, gate_stride = _rows(gate, width)
    gate_address = gate.data_ptr()
    if writes == "gate":
        product_address, product_stride = gate_address, gate_stride
    _native.profile(
        _DTYPES[gate.dtype], _ACTIVATIONS[activation], rows, width,
        gate_address, gate_stride, up_address, up_stride, product_address, product_stride,
        threshold, groups_address, groups_size, group_count, counts_address, sums_address,
        square_sums_address, up_abs_sums_address, flags.data_ptr(),
        1 if rows * width < _ONE_THREAD_BELOW else torch.get_num_threads(),
    )  # fmt: skip
    return product


def profile_(size: Size, gate: Tensor, up: Tensor | None, activation: str, *statistics) -> None:
    """See `declarations.compute_profile_`."""
    profile(size, gate, up, activation, *statistics, writes="gate")


def observe(size: Size, gate: Tensor, activation: str, *statistics) -> None:
    """See `declarations.compute_observe`."""
    profile(size, gate, None, activation, *statistics, writes="nothing")


def edit(
    size: Size,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    sets: Tensor | None,
    offsets: Tensor,
    neurons: Tensor,
    scale: Tensor,
    shift: Tensor,
    flags: Tensor,
) -> Tensor:
    """See `declarations.compute_edit`."""
    rows, width, sets_count = size
    product = _empty(gate)
    gate, gate_stride = _rows(gate, width)
    up_address, up_stride = 0, 0
    if up is not None:
        up, up_stride = _rows(up, width)
        up_address = up.data_ptr()
    sets_address, sets_size = (0, 0) if sets is None else (sets.data_ptr(), sets.numel())
    _native.edit(
        _DTYPES[gate.dtype], _ACTIVATIONS[activation], rows, width,
        gate.data_ptr(), gate_stride, up_address, up_stride, product.data_ptr(), width,
        sets_address, sets_size, sets_count, offsets.data_ptr(),
        neurons.shape[0], neurons.data_ptr(), scale.data_ptr(), shift.data_ptr(),
        1 if rows * width < _ONE_THREAD_BELOW else torch.get_num_threads(),
    )  # fmt: skip
    return product


def _empty(gate: Tensor) -> Tensor:
    # empty_like takes half the time, but keeps strides where it can.
    return torch.empty_like(gate) if gate.is_contiguous() else gate.new_empty(gate.shape)


def _rows(tensor: Tensor, width: int) -> tuple[Tensor, int]:
    """The tensor, or a copy of it where its rows have no single stride, and that row stride."""
    if tensor.is_contiguous():
        return tensor, width
    stride = collapsible(tensor)
    return (tensor.contiguous(), width) if stride is None else (tensor, stride)

"""The one check of each op, used by its fake and before every backend.

A check builds no string until something is wrong; then it names the op, the argument, what was
expected and what came. It compares `is_cpu` before devices, which costs half: a check is a good
part of a small call.
"""

from __future__ import annotations

import math
from typing import NoReturn

import torch
from torch import Tensor

from lapefast.errors import InputError
from lapefast.ops.activations import ACTIVATIONS
from lapefast.ops.rows import collapsible

__all__ = ["check_edit", "check_leave_one_out", "check_statistics", "check_writable"]

_TWO = (2,)

Size = tuple[int, int, int]
"""Rows, width, and groups or edit sets (0 without any statistic)."""

_FLOATS = frozenset((torch.float32, torch.float16, torch.bfloat16))


def check_statistics(
    op: str,
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
) -> Size:
    """Check the arguments of `profile`, `profile_` or `observe`; rows, width and groups.

    Raises InputError. What the index tensors hold is checked by the backend.
    """
    rows, width = _check_inputs(op, gate, up, activation, flags)
    if threshold != threshold:
        raise InputError(f"{op}: threshold must be a number, got {threshold}.")
    if groups is not None:
        _check_row_index(op, "groups", groups, rows, gate)
    labels = None
    if counts is not None:
        labels = _check_statistic(op, "counts", counts, torch.int64, labels, width, gate)
    if sums is not None:
        labels = _check_statistic(op, "sums", sums, torch.float64, labels, width, gate)
    if square_sums is not None:
        labels = _check_statistic(
            op, "square_sums", square_sums, torch.float64, labels, width, gate
        )
    if up_abs_sums is not None:
        if up is None:
            raise InputError(f"{op}: up_abs_sums needs up, which is None; leave up_abs_sums out.")
        labels = _check_statistic(
            op, "up_abs_sums", up_abs_sums, torch.float64, labels, width, gate
        )
    return rows, width, labels or 0


def check_edit(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    sets: Tensor | None,
    offsets: Tensor,
    neurons: Tensor,
    scale: Tensor,
    shift: Tensor,
    flags: Tensor,
) -> Size:
    """Check the arguments of `edit`; rows, width and sets. Raises InputError."""
    rows, width = _check_inputs("edit", gate, up, activation, flags)
    on_cpu = gate.is_cpu
    if sets is not None:
        _check_row_index("edit", "sets", sets, rows, gate)
    if (
        offsets.dtype is not torch.int32
        or offsets.dim() != 1
        or offsets.shape[0] < 1
        or not offsets.is_contiguous()
        or offsets.is_cpu is not on_cpu
        or (not on_cpu and offsets.device != gate.device)
    ):
        _refuse("edit", "offsets", f"contiguous int32 [sets + 1] on {gate.device}", offsets)
    capacity = neurons.numel()
    for name, table, dtype in (
        ("neurons", neurons, torch.int32),
        ("scale", scale, torch.float32),
        ("shift", shift, torch.float32),
    ):
        if (
            table.dtype is not dtype
            or table.dim() != 1
            or table.shape[0] != capacity
            or not table.is_contiguous()
            or table.is_cpu is not on_cpu
            or (not on_cpu and table.device != gate.device)
        ):
            _refuse("edit", name, f"contiguous {dtype} [{capacity}] on {gate.device}", table)
    return rows, width, offsets.shape[0] - 1


def check_writable(gate: Tensor) -> None:
    """Refuse a `gate` that the product cannot be written over.

    Its last stride must be 1, its leading dimensions must collapse to one row stride, and its
    rows must not overlap.
    """
    stride = collapsible(gate)
    if stride is None or (stride < gate.shape[-1] and gate.numel() > gate.shape[-1]):
        raise InputError(
            "profile_: gate must have a last stride of 1 and rows one fixed stride apart that do "
            f"not overlap, got strides {tuple(gate.stride())} for shape {tuple(gate.shape)}; "
            "use profile."
        )


def check_leave_one_out(query: Tensor, key: Tensor, logits: Tensor, softcap: float) -> None:
    """Check the arguments of `leave_one_out`. Raises InputError."""
    op, device = "leave_one_out", query.device
    if query.dtype is not torch.float32 or query.dim() != 3:
        _refuse(op, "query", "float32 [heads, length, dimensions]", query)
    heads, length, dimensions = query.shape
    if (
        key.dtype is not torch.float32
        or key.dim() != 3
        or key.shape[2] != dimensions
        or key.shape[0] < 1
        or heads % key.shape[0]
        or key.device != device
    ):
        expected = f"float32 [a divisor of {heads}, columns, {dimensions}] on {device}"
        _refuse(op, "key", expected, key)
    columns = key.shape[1]
    if (
        logits.dtype is not torch.float32
        or logits.shape != (heads, length, columns)
        or logits.device != device
    ):
        _refuse(op, "logits", f"float32 [{heads}, {length}, {columns}] on {device}", logits)
    if not 0 <= softcap < math.inf:
        raise InputError(f"{op}: softcap must be finite and 0 or more, got {softcap}.")


def _check_inputs(
    op: str, gate: Tensor, up: Tensor | None, activation: str, flags: Tensor
) -> tuple[int, int]:
    # A plain tuple compares in a tenth of the time of a torch.Size.
    shape, dtype, on_cpu = tuple(gate.shape), gate.dtype, gate.is_cpu
    if dtype not in _FLOATS or not shape:
        _refuse(op, "gate", "float32, float16 or bfloat16 [..., width]", gate)
    if up is not None and (
        up.dtype is not dtype
        or up.shape != shape
        or up.is_cpu is not on_cpu
        or (not on_cpu and up.device != gate.device)
    ):
        _refuse(op, "up", f"{dtype} {list(shape)} on {gate.device}, as gate", up)
    if activation not in ACTIVATIONS:
        raise InputError(
            f"{op}: activation must be one of {', '.join(ACTIVATIONS)}, got {activation!r}."
        )
    if (
        flags.dtype is not torch.int64
        or flags.shape != _TWO
        or not flags.is_contiguous()
        or flags.is_cpu is not on_cpu
        or (not on_cpu and flags.device != gate.device)
    ):
        _refuse(op, "flags", f"contiguous int64 [2] on {gate.device}", flags)
    return (shape[0] if len(shape) == 2 else math.prod(shape[:-1])), shape[-1]


def _check_row_index(op: str, name: str, index: Tensor, rows: int, gate: Tensor) -> None:
    on_cpu = gate.is_cpu
    if (
        index.dtype is not torch.int32
        or (index.numel() != 1 and index.numel() != rows)
        or not index.is_contiguous()
        or index.is_cpu is not on_cpu
        or (not on_cpu and index.device != gate.device)
    ):
        expected = f"contiguous int32 with {rows} elements (one per row) or 1 on {gate.device}"
        _refuse(op, name, expected, index)


def _check_statistic(
    op: str,
    name: str,
    statistic: Tensor,
    dtype: torch.dtype,
    labels: int | None,
    width: int,
    gate: Tensor,
) -> int:
    shape, on_cpu = statistic.shape, gate.is_cpu
    if (
        statistic.dtype is not dtype
        or len(shape) != 2
        or shape[1] != width
        or (labels is not None and shape[0] != labels)
        or not statistic.is_contiguous()
        or statistic.is_cpu is not on_cpu
        or (not on_cpu and statistic.device != gate.device)
    ):
        expected = f"[{'groups' if labels is None else labels}, {width}]"
        _refuse(op, name, f"contiguous {dtype} {expected} on {gate.device}", statistic)
    return shape[0]


def _refuse(op: str, name: str, expected: str, got: Tensor) -> NoReturn:
    raise InputError(
        f"{op}: {name} must be {expected}, got {got.dtype} {list(got.shape)} with strides "
        f"{list(got.stride())} on {got.device}."
    )

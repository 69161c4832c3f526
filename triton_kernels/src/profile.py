"""The product and, in the same pass over the rows, statistics of the activations."""

from __future__ import annotations

import ctypes

import triton
import triton.language as tl
from torch import Tensor

from lapefast.triton_kernels.activations import activate, narrow, rounded, widen
from lapefast.triton_kernels.rows import (
    add,
    count_outside,
    device_of,
    launch_options,
    row_index,
    run_length,
    step_of,
    tile_of,
)

__all__ = ["profile", "profile_kernel"]

# A run's end costs an atomic per column, so runs are at least this long. Not measured on a GPU yet.
_SHORTEST_RUN = 16
# Two 16-bit counters share a register. Not measured on a GPU yet; the counters hold 32,767 rows.
_LONGEST_RUN = 1024
# Sums are float32 within a run and float64 between runs: docs/numerics.md allows 64 rows.
_LONGEST_RUN_OF_SUMS = 64


def profile(
    gate: Tensor,
    up: Tensor | None,
    product: Tensor | None,
    activation: str,
    threshold: float,
    groups: Tensor | None,
    counts: Tensor | None,
    sums: Tensor | None,
    square_sums: Tensor | None,
    up_abs_sums: Tensor | None,
    flags: Tensor,
    last_group: int,
) -> None:
    """Write `activation(gate) * up` to `product`, and add what it shows to the statistics.

    `gate`, `up` and `product` are [rows, width], float32, float16 or bfloat16, of last stride 1;
    `product` may be `gate`, and None where none is wanted. `groups` is int32 of 1 or `rows`
    elements, None for group 0. `counts` int64 and the sums float64 are contiguous
    [last_group + 1, width]; each may be None. `flags` int64 [2]: non-finite activations of rows
    that have a group, and groups out of [-1, last_group], whose rows count nowhere.
    """
    rows, width = gate.shape
    if not rows or not width:
        return
    processors, lanes = device_of(gate)
    tile = tile_of(gate.dtype, lanes)
    tiles = triton.cdiv(width, tile)
    summing = not (sums is None and square_sums is None and up_abs_sums is None)
    longest = _LONGEST_RUN_OF_SUMS if summing else _LONGEST_RUN
    run = run_length(rows, tiles, processors, _SHORTEST_RUN, longest)
    strides = [0 if matrix is None else matrix.stride(0) for matrix in (gate, up, product)]
    step = step_of(gate.dtype, width, *strides)
    profile_kernel[(tiles * triton.cdiv(rows, run),)](
        gate, up, product, groups, counts, sums, square_sums, up_abs_sums, flags,
        ctypes.c_float(threshold).value, last_group, 1 if groups is None else groups.numel(),
        rows, run, width // step, *(stride // step for stride in strides),
        ACTIVATION=activation, STEP=step, TILE=tile, **launch_options(),
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "last_group", "number", "rows", "run", "width", "gate_stride", "up_stride", "product_stride"
    ]
)  # fmt: skip
def profile_kernel(
    gate, up, product, groups, counts, sums, square_sums, up_abs_sums, flags,
    threshold, last_group, number,
    rows, run, width, gate_stride, up_stride, product_stride,
    ACTIVATION: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`width` and the strides count STEP elements; `number` is that of the elements of `groups`."""
    dtype: tl.constexpr = gate.dtype.element_ty
    width = width * STEP
    gate_stride = gate_stride.to(tl.int64) * STEP
    up_stride = up_stride.to(tl.int64) * STEP
    product_stride = product_stride.to(tl.int64) * STEP
    tiles = tl.cdiv(width, TILE)
    tile = tl.program_id(0) % tiles
    first = tl.program_id(0) // tiles * run
    stop = tl.minimum(first + run, rows)
    columns = tile * TILE + tl.arange(0, TILE)
    inside = columns < width

    count_outside(groups, number, -1, last_group, flags, TILE)

    row = first
    group = row_index(groups, row, number, last_group)
    while row < stop:
        held = group
        active_odd = tl.zeros([TILE], tl.int32)  # active, and 65,536 for each that is not finite
        total = tl.zeros([TILE], tl.float32)
        square_total = tl.zeros([TILE], tl.float32)
        up_abs_total = tl.zeros([TILE], tl.float32)
        while (row < stop) & (group == held):
            activation = tl.load(gate + row * gate_stride + columns, mask=inside)
            if up is not None:
                factor = widen(tl.load(up + row * up_stride + columns, mask=inside))
            activation = activate(widen(activation), ACTIVATION, dtype)
            made = activation
            if up is not None:
                made = rounded(activation * factor, dtype)
            if product is not None:
                place = product + row * product_stride + columns
                tl.store(place, narrow(made, dtype), mask=inside)

            active_odd += tl.where(activation > threshold, 1, 0)
            active_odd += tl.where(tl.abs(activation) < float("inf"), 0, 65536)
            if sums is not None:
                total += activation
            if square_sums is not None:
                square_total += made * made
            if up_abs_sums is not None:
                up_abs_total += tl.abs(factor)

            row += 1
            group = row_index(groups, row, number, last_group)

        if held >= 0:
            cells = held.to(tl.int64) * width + columns
            active_odd = tl.where(inside, active_odd, 0)
            add(counts, cells, active_odd & 0xFFFF)
            add(flags, 0, tl.sum(active_odd >> 16))
            add(sums, cells, tl.where(inside, total, 0.0))
            add(square_sums, cells, tl.where(inside, square_total, 0.0))
            add(up_abs_sums, cells, tl.where(inside, up_abs_total, 0.0))

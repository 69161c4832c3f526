"""The product with each row's own sparse edits applied to its activations."""

from __future__ import annotations

import triton
import triton.language as tl
from torch import Tensor

from lapefast.triton_kernels.activations import activate, narrow, rounded, widen
from lapefast.triton_kernels.rows import (
    count_outside,
    device_of,
    launch_options,
    row_index,
    run_length,
    step_of,
    tile_of,
)

__all__ = ["edit", "edit_kernel"]

# Up to this many rows, as in decoding, rows are of different requests and parallelism is scarce:
# every row is a program's own. Not measured on a GPU yet.
_FEW_ROWS = 64
# A longer run finds its columns in a set once for many rows. Not measured on a GPU yet.
_SHORTEST_RUN, _LONGEST_RUN = 8, 64


def edit(
    gate: Tensor,
    up: Tensor | None,
    product: Tensor,
    activation: str,
    sets: Tensor | None,
    offsets: Tensor,
    neurons: Tensor,
    scale: Tensor,
    shift: Tensor,
    flags: Tensor,
) -> None:
    """Write the product to `product`, activations edited: `scale * a + shift` in float32.

    Multiply, add, round once; a scale of 0 overwrites. `gate`, `up` and `product` are
    [rows, width], float32, float16 or bfloat16, of last stride 1. `sets` is int32 of 1 or `rows`
    elements, None for set 0, -1 for no edit. Set i has the entries offsets[i] to offsets[i + 1]
    of `neurons` int32, ascending, and of `scale` and `shift` float32; all are read on the device.
    `flags[1]`, int64, counts sets and used neurons that are out of range; these edit nothing.
    """
    rows, width = gate.shape
    processors, lanes = device_of(gate)
    tile = tile_of(gate.dtype, lanes)
    # At least one program, because tables are checked even where there is nothing to edit.
    tiles = max(triton.cdiv(width, tile), 1)
    shortest = 1 if rows <= _FEW_ROWS else _SHORTEST_RUN
    run = run_length(rows, tiles, processors, shortest, _LONGEST_RUN)
    strides = [0 if matrix is None else matrix.stride(0) for matrix in (gate, up, product)]
    step = step_of(gate.dtype, width, *strides)
    edit_kernel[(tiles * max(triton.cdiv(rows, run), 1),)](
        gate, up, product, sets, offsets, neurons, scale, shift, flags,
        offsets.numel() - 2, min(rows, 1 if sets is None else sets.numel()), neurons.numel(),
        rows, run, width // step, *(stride // step for stride in strides),
        ACTIVATION=activation, STEP=step, TILE=tile, **launch_options(),
    )  # fmt: skip


@triton.jit(
    do_not_specialize=[
        "last_set", "number", "capacity", "rows", "run", "width", "gate_stride", "up_stride",
        "product_stride",
    ]
)  # fmt: skip
def edit_kernel(
    gate, up, product, sets, offsets, neurons, scale, shift, flags,
    last_set, number, capacity,
    rows, run, width, gate_stride, up_stride, product_stride,
    ACTIVATION: tl.constexpr, STEP: tl.constexpr, TILE: tl.constexpr,
):  # fmt: skip
    """`width` and the strides count STEP elements; `number` is that of the elements of `sets`."""
    dtype: tl.constexpr = gate.dtype.element_ty
    width = width * STEP
    gate_stride = gate_stride.to(tl.int64) * STEP
    up_stride = up_stride.to(tl.int64) * STEP
    product_stride = product_stride.to(tl.int64) * STEP
    tiles = tl.maximum(tl.cdiv(width, TILE), 1)
    tile = tl.program_id(0) % tiles
    first = tl.program_id(0) // tiles * run
    columns = tile * TILE + tl.arange(0, TILE)
    inside = columns < width
    count_outside(sets, number, -1, last_set, flags, TILE)
    used = tl.minimum(tl.load(offsets + last_set + 1), capacity)
    count_outside(neurons, used, 0, width - 1, flags, TILE)

    held = -1  # the set that the following are of
    edited = 0  # entries of it within the tile
    scales = tl.zeros([TILE], tl.float32)
    shifts = tl.zeros([TILE], tl.float32)
    for row in range(first, tl.minimum(first + run, rows)):
        chosen = row_index(sets, row, number, last_set)
        activation = widen(tl.load(gate + row * gate_stride + columns, mask=inside))
        if up is not None:
            factor = widen(tl.load(up + row * up_stride + columns, mask=inside))
        if chosen != held:
            held = chosen
            start, size = _entries(offsets, chosen, capacity)
            start, edited = _within(neurons, start, size, tile * TILE, TILE)
            if edited > 0:
                entry = _first_not_below(neurons, start, edited, columns)
                found = entry < start + edited
                found &= tl.load(neurons + entry, mask=found, other=-1) == columns
                scales = tl.load(scale + entry, mask=found, other=1.0)
                # 1 * a + -0.0 is a, whatever a is, and needs no mask in the rows that follow. A
                # literal -0.0 loses its sign in some versions of Triton.
                shifts = tl.load(shift + entry, mask=found, other=0.0)
                shifts = tl.where(found, shifts, -1.0 * tl.zeros([TILE], tl.float32))
        activation = activate(activation, ACTIVATION, dtype)
        if edited > 0:
            moved = tl.where(scales == 0.0, shifts, activation * scales + shifts)
            activation = rounded(moved, dtype)
        if up is not None:
            activation = activation * factor
        place = product + row * product_stride + columns
        tl.store(place, narrow(activation, dtype), mask=inside)


@triton.jit
def _entries(offsets, chosen, capacity):
    """Where the entries of a set start, and how many there are; none of set -1."""
    known = chosen >= 0
    start = tl.load(offsets + chosen, mask=known, other=0)
    stop = tl.load(offsets + chosen + 1, mask=known, other=0)
    start = tl.minimum(tl.maximum(start, 0), capacity)
    return start, tl.minimum(tl.maximum(stop, 0), capacity) - start


@triton.jit
def _within(neurons, start, size, column, TILE: tl.constexpr):
    """Which of `size` entries from `start` lie within the tile from `column`: start and number."""
    edited = 0
    if size > 0:
        first = _first_not_below(neurons, start, size, column)
        edited = _first_not_below(neurons, start, size, column + TILE) - first
        start = first
    return start, edited


@triton.jit
def _first_not_below(neurons, start, size, column):
    """The first of `size` ascending entries from `start` that is not below `column`, by halving.

    For one column or a block of them; `size` is at least 1. Entries are compared and never become
    addresses, so that nothing outside is read whatever they are.
    """
    start = start + column * 0
    while size > 1:
        half = size // 2
        start = tl.where(tl.load(neurons + start + half - 1) < column, start + half, start)
        size -= half
    return start + (tl.load(neurons + start) < column).to(tl.int32)

"""How rows and columns are shared out to programs, and what a row's index tensor says.

A program owns one tile of columns, 16 bytes to a lane, and walks a run of consecutive rows. The
grid has one dimension, because the others end at 65,535.
"""

from __future__ import annotations

import functools

import torch
import triton
import triton.language as tl
from torch import Tensor

__all__ = [
    "VECTOR",
    "add",
    "count_outside",
    "device_of",
    "launch_options",
    "row_index",
    "run_length",
    "step_of",
    "tile_of",
]

VECTOR = 16  # bytes of the widest load and store that every target has
# Not measured on a GPU yet. Four warps keep a tile of bfloat16 at 1024 columns, which divides the
# widths of most models; ptxas then needs few enough registers for at least eight blocks per SM.
_WARPS = 4
# Programs per multiprocessor, not measured on a GPU yet: enough for a few waves of resident blocks,
# so that the last wave is a small part of the whole.
_PROGRAMS = 32


def tile_of(dtype: torch.dtype, lanes: int) -> int:
    """Columns of a tile, in which each lane of a block loads 16 bytes."""
    return _WARPS * lanes * (VECTOR // dtype.itemsize)


def step_of(dtype: torch.dtype, *lengths: int) -> int:
    """The unit in which a kernel is told width and strides.

    Multiplied by this constant again, they are known to be divisible by 16 bytes; then one source
    gives 16-byte access to all that is aligned, and needs no alignment for the rest.
    """
    step = VECTOR // dtype.itemsize
    return step if all(length % step == 0 for length in lengths) else 1


def run_length(rows: int, tiles: int, processors: int, shortest: int, longest: int) -> int:
    """Rows that one program walks."""
    return min(max(rows * tiles // (processors * _PROGRAMS), shortest), longest)


def launch_options(backend: str = "hip" if torch.version.hip else "cuda") -> dict[str, object]:
    """Compiler options: no contraction, and on NVIDIA no subnormals flushed within libdevice."""
    options: dict[str, object] = {"num_warps": _WARPS, "enable_fp_fusion": False}
    return options | {"enable_reflect_ftz": False} if backend == "cuda" else options


def device_of(tensor: Tensor) -> tuple[int, int]:
    """Multiprocessors and lanes of a warp; the interpreter on a CPU is one of 32 lanes."""
    return _properties(tensor.device.index) if tensor.is_cuda else (1, 32)


@functools.cache
def _properties(index: int) -> tuple[int, int]:
    properties = torch.cuda.get_device_properties(index)
    return properties.multi_processor_count, properties.warp_size


@triton.jit
def row_index(indices, row, number, last):
    """The index of a row; -1 if it is out of [-1, last].

    `indices` holds `number` elements, one for each row or one for all; None means 0 for all.
    """
    index = tl.full([], 0, tl.int32)
    if indices is not None:
        index = tl.load(indices + tl.minimum(row, number - 1))
    return tl.where((index < 0) | (index > last), -1, index)


@triton.jit
def count_outside(values, number, lowest, highest, flags, TILE: tl.constexpr):
    """Add to `flags[1]` how many of `number` int32 values are out of [lowest, highest].

    The programs of the grid share them out. None means that all are 0.
    """
    stride = tl.num_programs(0).to(tl.int64) * TILE
    for start in range(tl.program_id(0).to(tl.int64) * TILE, number, stride):
        place = start + tl.arange(0, TILE)
        value = tl.zeros([TILE], tl.int32)
        if values is not None:
            value = tl.load(values + place, mask=place < number, other=0)
        outside = (place < number) & ((value < lowest) | (value > highest))
        add(flags, 1, tl.sum(outside.to(tl.int32)))


@triton.jit
def add(statistic, cells, values):
    """Add to the cells of a statistic; to none where the value is 0, nor if there is no statistic.

    What lies outside of a row must be 0. A mask of its own would be loop-invariant, be kept in
    registers throughout, and spill.
    """
    if statistic is not None:
        # Relaxed, because nothing reads these before the kernel ends; the default fences each one.
        values = values.to(statistic.dtype.element_ty)
        tl.atomic_add(statistic + cells, values, mask=values != 0, sem="relaxed")

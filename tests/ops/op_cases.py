"""Inputs for the ops in every layout that a model may hand over, and calls on them."""

from __future__ import annotations

import mmap
from dataclasses import dataclass, field

import pytest
import torch
from torch import Tensor

from lapefast import ops

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
STATISTICS = ("counts", "sums", "square_sums", "up_abs_sums")


def named(dtype: torch.dtype) -> str:
    return str(dtype).removeprefix("torch.")


def values(*shape: int, dtype: torch.dtype, seed: int = 0) -> Tensor:
    """Normal numbers on the default device; the same ones on each."""
    generator = torch.Generator("cpu").manual_seed(seed)
    numbers = torch.randn(*shape, generator=generator, device="cpu") * 3
    return numbers.to(dtype).to(torch.get_default_device())


def reserved_zeros(*shape: int, dtype: torch.dtype) -> Tensor:
    """Zeros on the default device; on a CPU only the pages that are touched become real."""
    size = torch.Size(shape).numel() * dtype.itemsize
    if (device := torch.get_default_device()).type == "cpu":
        not_counted = 0x4000  # MAP_NORESERVE, which Python names from 3.11 on
        flags = mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS | not_counted
        return torch.frombuffer(mmap.mmap(-1, size, flags=flags), dtype=dtype).view(shape)
    if torch.cuda.mem_get_info(device)[0] < size + (1 << 30):
        pytest.skip(f"needs a GPU with {size >> 30} GiB free")
    return torch.zeros(shape, dtype=dtype)


def rows_apart(rows: int, width: int, stride: int) -> Tensor:
    """Normal numbers in bfloat16, in rows of reserved memory `stride` elements apart."""
    base = reserved_zeros((rows - 1) * stride + width, dtype=torch.bfloat16)
    return base.as_strided((rows, width), (stride, 1)).copy_(
        values(rows, width, dtype=torch.bfloat16)
    )


def _contiguous(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return values(6, 40, dtype=dtype), values(6, 40, dtype=dtype, seed=1)


def _fused(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    gate, up = values(2, 3, 80, dtype=dtype).chunk(2, dim=-1)
    return gate, up


def _strided(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Rows with no single stride between them, and a last stride of 2: both are copied.
    gate = values(4, 5, 40, dtype=dtype)[:, :3]
    up = values(4, 3, 80, dtype=dtype, seed=1)[..., ::2]
    return gate, up


def _empty(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return values(0, 40, dtype=dtype), values(0, 40, dtype=dtype)


def _no_width(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return values(3, 0, dtype=dtype), values(3, 0, dtype=dtype)


def _one_row(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return values(1, 1, 33, dtype=dtype), values(1, 1, 33, dtype=dtype, seed=1)


def _narrow(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return values(5, 3, dtype=dtype), values(5, 3, dtype=dtype, seed=1)


def _unaligned(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Every row starts at an odd element.
    gate = values(7, 131, dtype=dtype)[:, 1:]
    up = values(7, 133, dtype=dtype, seed=1)[:, 3:]
    return gate, up


def _offset(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Width and stride are whole vectors of 16 bytes, and yet no row starts at one.
    gate = values(9 * 256 + 1, dtype=dtype)[1:].view(9, 256)
    return gate, values(9, 256, dtype=dtype, seed=1)


def _vector(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    return values(70, dtype=dtype), values(70, dtype=dtype, seed=1)


def _tiles(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # More than one tile of columns, not a multiple of anything; rows handled four at a time, and
    # more of them than are summed up in float32.
    return values(71, 2181, dtype=dtype), values(71, 2181, dtype=dtype, seed=1)


def _pages(dtype: torch.dtype) -> tuple[Tensor, Tensor]:
    # Rows 4 KB apart are handled one at a time.
    return values(67, 2048, dtype=dtype), values(67, 2048, dtype=dtype, seed=1)


LAYOUTS = {
    "contiguous": _contiguous,
    "fused": _fused,
    "strided": _strided,
    "empty": _empty,
    "no width": _no_width,
    "one row": _one_row,
    "narrow": _narrow,
    "unaligned": _unaligned,
    "offset": _offset,
    "vector": _vector,
    "tiles": _tiles,
    "pages": _pages,
}


@dataclass
class Tally:
    """Statistics and flags of one run."""

    groups: int
    width: int
    names: tuple[str, ...] = STATISTICS
    counts: Tensor | None = field(default=None, init=False)
    sums: Tensor | None = field(default=None, init=False)
    square_sums: Tensor | None = field(default=None, init=False)
    up_abs_sums: Tensor | None = field(default=None, init=False)
    flags: Tensor = field(init=False)

    def __post_init__(self) -> None:
        for name in self.names:
            dtype = torch.int64 if name == "counts" else torch.float64
            setattr(self, name, torch.zeros(self.groups, self.width, dtype=dtype))
        self.flags = torch.zeros(2, dtype=torch.int64)

    def arguments(self) -> tuple[Tensor | None, ...]:
        return self.counts, self.sums, self.square_sums, self.up_abs_sums, self.flags

    def observed(self) -> tuple[Tensor | None, ...]:
        return self.counts, self.sums, self.square_sums, self.flags


def same_sums(got: Tensor, expected: Tensor) -> bool:
    """Equal; on a GPU, where the order of float64 additions is not fixed, but for rounding."""
    if got.is_cpu:
        return torch.equal(got, expected)
    # The cases add at most 9 runs of 71 activations below 16: each addition rounds by 2^-53 of at
    # most their total, 9 * 71 * 16 * 2^-53 = 1.2e-12 in the worst case.
    return torch.allclose(got, expected, rtol=0.0, atol=1.2e-12)


def row_groups(rows: int, groups: int) -> Tensor:
    """Changing at every row in the first half, in runs in the second, with -1 between."""
    half = rows // 2
    changing = torch.arange(half) % (groups + 1) - 1
    runs = (torch.arange(rows - half) // 9) % (groups + 1) - 1
    return torch.cat([changing, runs]).to(torch.int32)


def run_profile(gate, up, activation, groups, tally, *, threshold=0.0, backend="auto") -> Tensor:
    return ops.profile(gate, up, activation, threshold, groups, *tally.arguments(), backend=backend)


@dataclass
class Edits:
    """Sets as an edit table: each entry (neuron, scale, shift); `spare` entries stay unused."""

    sets: list[list[tuple[int, float, float]]]
    spare: int = 2

    def tables(self) -> tuple[Tensor, Tensor, Tensor, Tensor]:
        entries = [entry for members in self.sets for entry in members]
        entries += [(2**31 - 1, 7.0, 7.0)] * self.spare
        sizes = torch.tensor([0] + [len(members) for members in self.sets])
        neurons, scale, shift = (
            torch.tensor([entry[at] for entry in entries], dtype=dtype)
            for at, dtype in enumerate((torch.int32, torch.float32, torch.float32))
        )
        return sizes.cumsum(0).to(torch.int32), neurons, scale, shift


def edits_for(width: int) -> Edits:
    some = sorted({0, width // 3, width // 2, width - 1})
    return Edits(
        [
            [(neuron, 0.0, 0.0) for neuron in some],
            [],
            [(neuron, 1.5 - neuron % 7 / 4, neuron % 5 / 8 - 0.25) for neuron in range(width)],
            [(width // 2, 0.0, 3.3)],
        ]
    )


def run_edit(gate, up, activation, sets, tables, *, flags=None, backend="auto") -> Tensor:
    if flags is None:
        flags = torch.zeros(2, dtype=torch.int64)
    return ops.edit(gate, up, activation, sets, *tables, flags, backend=backend)

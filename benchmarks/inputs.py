"""Inputs of the ops: activations of a batch, and tables of edited neurons."""

from __future__ import annotations

from typing import NamedTuple

import torch
from torch import Tensor

EDITED = 0.01  # of a site's neurons: about what LAPE finds


def gate_and_up(rows: int, width: int, device: str) -> tuple[Tensor, Tensor]:
    """bfloat16 [rows, width] each."""
    generator = torch.Generator(device).manual_seed(0)
    gate, up = (
        torch.randn(rows, width, generator=generator, device=device).bfloat16() for _ in range(2)
    )
    return gate, up


def moved(gate: Tensor) -> int:
    """The bytes of a product: gate and up are read, and it is written."""
    return 3 * gate.nbytes


class Edits(NamedTuple):
    """The arguments of `lapefast.ops.edit` that say what is edited."""

    sets: Tensor | None
    offsets: Tensor
    neurons: Tensor
    scale: Tensor
    shift: Tensor
    flags: Tensor


def edits(rows: int, width: int, device: str, sets: int = 1, share: float = EDITED) -> Edits:
    """``share`` of the neurons, at random in each set, deactivated; rows take the sets in turn."""
    generator = torch.Generator().manual_seed(0)
    count = round(share * width)
    neurons = [
        torch.randperm(width, generator=generator)[:count].sort().values for _ in range(sets)
    ]
    nothing = torch.zeros(sets * count, device=device)
    index = torch.arange(rows, dtype=torch.int32, device=device) % sets
    return Edits(
        sets=None if sets == 1 else index,
        offsets=torch.arange(sets + 1, dtype=torch.int32, device=device) * count,
        neurons=torch.cat(neurons).to(device, torch.int32),
        scale=nothing,
        shift=nothing.clone(),
        flags=torch.zeros(2, dtype=torch.int64, device=device),
    )

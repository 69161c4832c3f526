"""What lapefast is measured against, each as its users would run it, in a file of its own.

A contender takes a copy of the model and keeps what it places in it.
"""

from __future__ import annotations

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor, nn


class Contender(NamedTuple):
    run: Callable[[Tensor], object]
    """One pass over token ids [rows, length]."""
    counts: Callable[[], list[Tensor]]
    """The active tokens of every pass so far: per layer, int64 [neurons]."""


def no_counts(model: nn.Module) -> list[Tensor]:
    """Zeros for each layer of a Llama."""
    return [
        torch.zeros(
            layer.mlp.gate_proj.out_features,
            dtype=torch.int64,
            device=layer.mlp.gate_proj.weight.device,
        )
        for layer in model.model.layers
    ]

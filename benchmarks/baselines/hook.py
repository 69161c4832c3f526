"""A plain forward hook on every activation module: the oracle of the others, too."""

from __future__ import annotations

import functools

from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from baselines import Contender, no_counts


def hook(model: nn.Module) -> Contender:
    counts, _ = hooked(model)
    return Contender(lambda ids: model(input_ids=ids), lambda: counts)


def hooked(model: nn.Module) -> tuple[list[Tensor], list[RemovableHandle]]:
    """Where the hooks count, and what takes them out."""
    counts = no_counts(model)
    handles = [
        layer.mlp.act_fn.register_forward_hook(functools.partial(_count, over_zero))
        for layer, over_zero in zip(model.model.layers, counts, strict=True)
    ]
    return counts, handles


def _count(over_zero: Tensor, module: nn.Module, given: tuple, activation: Tensor) -> None:
    over_zero += (activation > 0).sum(dim=(0, 1))

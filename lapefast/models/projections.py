"""The projection that makes up: the rows of a weight that belong to an FFN's neurons."""

from __future__ import annotations

from torch import nn

from lapefast.errors import InputError
from lapefast.models.linears import out_features
from lapefast.models.structure import FFN, TABLE

__all__ = ["up_projection"]


def up_projection(ffn: FFN) -> tuple[nn.Module, int]:
    """The projection that makes up, in a plain FFN its first, and the row of its first neuron.

    That row is not 0 where gate and up are made by one projection, the gate's rows first.

    Raises:
        InputError: it can't be told from the gate's.
    """
    if ffn.forward:
        name = ffn.forward.up or ffn.forward.gate
        return ffn.owner.get_submodule(name), 0 if ffn.forward.up else ffn.site.width
    for row in TABLE:
        if _child(ffn.owner, row.last) is ffn.last:
            first = [_child(ffn.owner, name) for name in row.first]
            # The table names the gate first.
            if None not in first and len(first) == 1 + ffn.gated:
                return first[-1], 0
    others = [child for child in ffn.owner.children() if child is not ffn.last]
    widening = [child for child in others if out_features(child) == ffn.site.width]
    if not ffn.gated and len(widening) == 1:
        return widening[0], 0
    raise InputError(
        f"{ffn.site.name} ({type(ffn.owner).__name__}) computes in its own way, and which of its "
        "weights are the up projection's can't be told from the gate's (docs/adding-a-model.md)"
    )


def _child(module: nn.Module, path: str) -> nn.Module | None:
    try:
        return module.get_submodule(path)
    except AttributeError:
        return None

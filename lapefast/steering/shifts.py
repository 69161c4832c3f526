"""Shifts of the residual stream: a vector added to what leaves a decoder layer."""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence

import torch
from torch import Tensor, nn

from lapefast.errors import InputError
from lapefast.models import fingerprint
from lapefast.models.bare import bare_model
from lapefast.models.rows import RowIndex
from lapefast.models.structure import find_ffns
from lapefast.steering.output_hooks import OutputHooks

__all__ = ["PlacedShifts", "Shift", "decoder_layers"]


class Shift:
    """What is added to the hidden state that leaves decoder layers: `h <- h + vector`.

    In float32, rounded once to the model's dtype. `lapefast.ResidualMeans.towards` makes one.

    Args:
        vectors: layer name (as `decoder_layers` gives them) -> [hidden], taken as float32.
        fingerprint: of the model that the vectors were found in, if known.

    Raises:
        InputError: there is none, or one is not finite or not a vector.
    """

    def __init__(self, vectors: Mapping[str, Tensor], fingerprint: str | None = None) -> None:
        if not isinstance(vectors, Mapping):
            raise InputError(
                f"a shift is made of a dict from layer to vector, got {type(vectors).__name__}"
            )
        if not vectors:
            raise InputError("a shift needs a vector for at least one layer, got none")
        self.vectors = {name: _checked(name, vector) for name, vector in vectors.items()}
        self.fingerprint = fingerprint

    def bind(self, model: nn.Module) -> Shift:
        """The same shift, after checking that it fits the model.

        Raises:
            InputError: a layer that the model does not have, another hidden size, or weights other
                than those that the vectors were found in.
        """
        actual = fingerprint(model)
        if self.fingerprint not in (None, actual):
            raise InputError(
                f"the shift was found in a model with fingerprint {self.fingerprint[:12]}, but "
                f"this model's is {actual[:12]}; use that model"
            )
        layers = decoder_layers(model)
        for name in self.vectors:
            if name not in layers:
                raise InputError(
                    f"the shift is for a layer {name}, which the model does not have (it has "
                    f"{', '.join(list(layers)[:2])}, ...)"
                )
        return self

    def __repr__(self) -> str:
        return f"Shift(of {len(self.vectors)} layers)"


def decoder_layers(model: nn.Module) -> dict[str, nn.Module]:
    """The decoder's layers by their path inside the bare model, in model order.

    They are the numbered modules that hold the FFNs.

    Raises:
        InputError: the FFNs do not lie in numbered layers.
    """
    bare = bare_model(model)
    found = {}
    for ffn in find_ffns(model, mixtures=True):
        numbered = re.match(r"(.*?(?:^|\.)\d+)(?:\.|$)", ffn.site.name)
        if ffn.site.stack == "decoder" and numbered:
            found[numbered[1]] = bare.get_submodule(numbered[1])
    if not found:
        raise InputError(
            f"{type(bare).__name__} has no numbered decoder layers whose hidden state could be "
            "shifted"
        )
    return found


class PlacedShifts:
    """Shifts placed in a model, by forward hooks on its decoder layers.

    Args:
        model: the model.
        shifts: one per set, None for a set without.
        rows: device -> the set of each row of the decoder's input; None adds the first everywhere.
    """

    def __init__(
        self, model: nn.Module, shifts: Sequence[Shift | None], rows: Mapping | None
    ) -> None:
        self._hooks = OutputHooks()
        for name, layer in decoder_layers(model).items():
            if not any(shift is not None and name in shift.vectors for shift in shifts):
                continue
            table = _table(name, shifts, next(layer.parameters()).device)
            index = None if rows is None else rows.index_on(table.device)
            self._hooks.place(name, layer, self._shifted, table, index)

    @property
    def missed(self) -> list[str]:
        """Layers to be shifted that have not run yet."""
        return self._hooks.missed

    def remove(self) -> None:
        """Take the hooks out. Safe to repeat."""
        self._hooks.remove()

    @staticmethod
    def _shifted(name: str, hidden: Tensor, table: Tensor, index: RowIndex | None) -> Tensor:
        if hidden.shape[-1] != table.shape[1]:
            raise InputError(
                f"the shift of layer {name} has {table.shape[1]} values, but the hidden state "
                f"has {hidden.shape[-1]}"
            )
        if index is None:
            vectors = table[0]
        else:
            vectors = table[index.tensor.long()].reshape(hidden.shape)  # -1 is the last: zeros
        return (hidden.float() + vectors).to(hidden.dtype)


def _table(name: str, shifts: Sequence[Shift | None], device: torch.device) -> Tensor:
    """The vectors of one layer, float32 [sets + 1, hidden]; the last row is zeros."""
    given = [shift.vectors.get(name) if shift is not None else None for shift in shifts]
    zeros = torch.zeros_like(next(vector for vector in given if vector is not None))
    rows = [zeros if vector is None else vector for vector in given]
    if len({len(row) for row in rows}) > 1:
        raise InputError(f"the shifts of layer {name} differ in length")
    return torch.stack([*rows, zeros]).to(device)


def _checked(name: str, vector: Tensor) -> Tensor:
    try:
        held = torch.as_tensor(vector).detach().cpu().to(torch.float32)
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(
            f"the shift of layer {name} must be numbers, got {vector!r:.60}"
        ) from error
    if held.dim() != 1:
        raise InputError(f"the shift of layer {name} must be a vector, got {list(held.shape)}")
    if not held.isfinite().all():
        raise InputError(f"the shift of layer {name} must be finite in float32, but it is not")
    return held

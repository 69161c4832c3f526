"""One edit placed in a model: every sequence runs with it until it is removed."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from lapefast.errors import InputError
from lapefast.models.placed import RowIndex, SiteEdits, SiteState
from lapefast.models.placement import Placement, chosen_backend, device_of
from lapefast.models.structure import FFN
from lapefast.neurons import Edit


def steer(model: nn.Module, edit: Edit, exact: bool = True, backend: str | None = None) -> Steering:
    """Place ``edit`` in ``model``: its neurons' activations become ``scale * a + shift``.

    Args:
        model: any model whose FFNs `lapefast.models.find_sites` finds.
        edit: made by `lapefast.deactivate`, `activate`, `scale` or `add`, and joined by ``|``. One
            that knows its sites by position only is bound to the model here.
        exact: fuse only activations proven bit-equal to the model's own; otherwise all that a
            kernel exists for.
        backend: who computes the op; None takes ``LAPEFAST_BACKEND`` or the best for the device.

    Returns:
        A context manager; leaving it, or ``remove()``, gives the model its own forwards back.

    Raises:
        InputError: where the edit does not fit the model, or it is steered already.
    """
    return Steering(model, edit, exact, backend)


class Steering:
    """See `steer`."""

    def __init__(
        self, model: nn.Module, edit: Edit, exact: bool = True, backend: str | None = None
    ) -> None:
        if not isinstance(edit, Edit):
            raise InputError(
                "steer takes one edit, made by deactivate, activate, scale or add, got "
                f"{type(edit).__name__}"
            )
        self.edit = edit.bind(model)
        self._exact, self._backend = exact, backend
        self._placement = Placement.claim(model, "steering", self, repr(self.edit))
        try:
            self._placement.fill(self._place)
            self._placement.prove()
        except BaseException:
            self.remove()
            raise

    def __enter__(self) -> Steering:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Take the edit out of the model. Safe to repeat."""
        self._placement.release("steering", "edits", self)

    def _place(self, ffn: FFN, state: SiteState) -> None:
        if ffn.site.name not in self.edit.tables:
            return
        device = device_of(ffn)
        neurons, scale, shift = self.edit.tables[ffn.site.name]

        def on_device(values: Tensor | list[int], dtype: torch.dtype) -> Tensor:
            return torch.as_tensor(values).to(device=device, dtype=dtype).contiguous()

        state.edits = SiteEdits(
            sets=RowIndex(),
            offsets=on_device([0, len(neurons)], torch.int32),
            neurons=on_device(neurons, torch.int32),
            scale=on_device(scale, torch.float32),
            shift=on_device(shift, torch.float32),
            flags=torch.zeros(2, dtype=torch.int64, device=device),
            backend=chosen_backend(self._backend, device),
            exact=self._exact,
        )

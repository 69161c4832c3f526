"""Edits of linear layers' outputs: units that are no FFN's neurons."""

from __future__ import annotations

from collections.abc import Mapping

from torch import Tensor, nn

from lapefast.models.placed import SiteEdits
from lapefast.steering.output_hooks import OutputHooks

__all__ = ["PlacedOutputs"]


class PlacedOutputs:
    """Edits placed on the outputs of linear layers, as their other readers would see them.

    The op reads the output as an activation that is made already, so an edit is the same
    arithmetic everywhere.

    Args:
        layers: site -> linear layer.
        edits: site -> its tables, on the layer's device; for the layers that are edited.
    """

    def __init__(self, layers: Mapping[str, nn.Module], edits: Mapping[str, SiteEdits]) -> None:
        self._hooks = OutputHooks()
        for site, placed in edits.items():
            self._hooks.place(site, layers[site], _edited, placed)

    @property
    def missed(self) -> list[str]:
        """Edited layers that have not run yet."""
        return self._hooks.missed

    def remove(self) -> None:
        """Take the edits out. Safe to repeat."""
        self._hooks.remove()


def _edited(site: str, output: Tensor, edits: SiteEdits) -> Tensor:
    return edits.tables.edit(output, None, "identity", edits.sets.tensor)

"""Edits of linear layers' outputs as changes of their rows."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lapefast.models.bare import bare_model
from lapefast.models.linears import find_linears
from lapefast.models.structure import find_ffns
from lapefast.neurons import Edit
from lapefast.steering.linear import calls_of, close, dense_weight, probing, refusal, summing

__all__ = ["OutputEdit", "output_edits"]


@dataclass(frozen=True)
class OutputEdit:
    """One linear layer's edit.

    Attributes:
        site: the layer's path.
        layer: the layer.
        neurons: int64 [n], the outputs that are edited, sorted.
        scale, shift: float32 [n].
        calls: what the layer was given in the probe, and what it gave, unedited; on the CPU.
    """

    site: str
    layer: nn.Module
    neurons: Tensor
    scale: Tensor
    shift: Tensor
    calls: tuple[tuple[Tensor, Tensor], ...]

    def check(self) -> None:
        """The layer as it is now gives what the edit makes of what it gave.

        Both round the edited outputs, and sum up in two orders; the others are the same bits.

        Raises:
            InputError: it does not.
        """
        weight = dense_weight(self.layer, self.site)
        info = torch.finfo(weight.dtype)
        others = torch.ones(len(weight), dtype=torch.bool)
        others[self.neurons] = False
        for given, before in self.calls:
            found = self.layer(given.to(weight.device)).cpu()
            made = before[..., self.neurons].double()
            scaled = torch.where(self.scale == 0, 0.0, self.scale * made)
            size = scaled.abs() + self.shift.abs() + before.double().abs().amax() * self.scale.abs()
            spacings = 1 + summing(weight.shape[1], info)
            follows = close(found[..., self.neurons], scaled + self.shift, spacings * size, info)
            if not follows or not torch.equal(found[..., others], before[..., others]):
                raise refusal(self.site, "its changed rows do not give what the edit gives;")


def output_edits(model: nn.Module, edit: Edit) -> list[OutputEdit]:
    """The edit of each linear layer whose outputs it changes; nothing of the model is changed.

    Args:
        model: the model, with dense weights on hand and nothing placed in it.
        edit: as `lapefast.steering.linear.effective_edit` gives it; of FFNs nothing is made.

    Raises:
        InputError: a layer is adapted, quantised, offloaded, or not reached by a probe.
    """
    ffns = {ffn.site.name for ffn in find_ffns(model, mixtures=True)}
    wanted = [site for site in edit.tables if site not in ffns]
    if not wanted:
        return []
    layers = {site: layer for site, layer in find_linears(model).items() if site in wanted}
    for site, layer in layers.items():
        dense_weight(layer, site)
    bare = bare_model(model)
    with probing(bare):
        given = calls_of(bare, layers)
        return [
            OutputEdit(
                site,
                layer,
                *edit.tables[site],
                tuple((args[0].cpu(), layer(*args).cpu()) for args, _ in given[site]),
            )
            for site, layer in layers.items()
        ]

"""Random neuron sets, with which every effect of a label's neurons is compared."""

from __future__ import annotations

import torch

from lapefast.neurons import NeuronSet

__all__ = ["random_like"]


def random_like(neurons: NeuronSet, generator: torch.Generator) -> NeuronSet:
    """As many neurons in each site, drawn from all of the site's."""
    drawn = {
        site: torch.randperm(neurons.widths[site], generator=generator)[: len(indices)]
        for site, indices in neurons.items()
    }
    return NeuronSet(drawn, None, neurons.layout)

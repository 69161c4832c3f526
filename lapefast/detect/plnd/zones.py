"""The three zones of a model's layers, in which PLND's authors see languages treated differently.

Zhao et al., NeurIPS 2024, arXiv 2402.18815: the first layers understand a language, those in the
middle reason, the last generate.
"""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Literal, get_args

from lapefast.errors import InputError
from lapefast.neurons import NeuronSets

__all__ = ["ZONES", "zones"]

ZONES = ("understanding", "reasoning", "generation")
_Part = Literal["ffn", "attention"]


def zones(
    neurons: NeuronSets,
    understanding: int,
    generation: int,
    parts: Sequence[_Part] = get_args(_Part),
) -> dict[str, NeuronSets]:
    """The neurons of each zone, so that they are deactivated (or steered, exported) by themselves.

    `lapefast.steer` gives the model back what it deactivates.

    Args:
        neurons: of any method, at sites in numbered layers. An encoder's layers are counted before
            its decoder's.
        understanding, generation: how many layers at the start and at the end these zones have;
            the others, which may be none, are for reasoning.
        parts: of ``ffn`` and ``attention``; neurons of the other are left out.

    Returns:
        "understanding", "reasoning" and "generation" -> the neurons there, under every label.

    Raises:
        InputError: the numbers don't fit the layers, or sites aren't in numbered layers.
    """
    if isinstance(parts, str) or not set(parts) <= set(get_args(_Part)) or not parts:
        raise InputError(f"parts must be some of ffn and attention, got {parts!r}")
    if not isinstance(neurons, NeuronSets):
        raise InputError(f"neurons must be NeuronSets, got {type(neurons).__name__}")
    layers = _layers(neurons.sites)
    count = max(layers.values(), default=-1) + 1
    for name, value in (("understanding", understanding), ("generation", generation)):
        if type(value) is not int or value < 0:
            raise InputError(f"{name} must be a number of layers, 0 or more, got {value!r}")
    if understanding + generation > count:
        raise InputError(
            f"understanding and generation are {understanding + generation} layers, but the "
            f"neurons lie in {count}"
        )

    def zone_of(site: str) -> str:
        layer = layers[site]
        if layer < understanding:
            return "understanding"
        return "generation" if layer >= count - generation else "reasoning"

    def part(zone: str) -> NeuronSets:
        chosen = {
            label: {
                site: indices
                for site, indices in sites.items()
                if zone_of(site) == zone and ("attention" if _attends(site) else "ffn") in parts
            }
            for label, sites in neurons.items()
        }
        about = {**neurons.metadata, "part": zone, "parts": list(parts)}
        return NeuronSets(chosen, neurons.layout, about)

    return {zone: part(zone) for zone in ZONES}


def _layers(sites: Sequence[object]) -> dict[object, int]:
    numbers = {site: _layer(site) for site in sites}
    encoder = [number for site, number in numbers.items() if str(site).startswith("encoder.")]
    before = max(encoder, default=-1) + 1
    return {
        site: number + before if str(site).startswith("decoder.") else number
        for site, number in numbers.items()
    }


def _layer(site: object) -> int:
    if isinstance(site, int):  # a published file's, which are the FFNs in their order
        return site
    numbered = re.search(r"(?:^|\.)(\d+)(?:\.|$)", str(site))
    if numbered is None:
        raise InputError(f"the site {site} is in no numbered layer, so it is in no zone")
    return int(numbered[1])


def _attends(site: object) -> bool:
    return re.search(r"attn|attention", str(site), re.IGNORECASE) is not None

"""Neuron sets beside each other: how much methods, or languages, agree."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from lapefast import display
from lapefast.errors import InputError
from lapefast.neurons.layout import Key, Layout
from lapefast.neurons.sets import NeuronSets

__all__ = ["Comparison", "compare"]


@dataclass(frozen=True, eq=False)
class Comparison:
    """The overlap of every label of one result with every label of another.

    Attributes:
        labels_a, labels_b: labels of either, in their order.
        methods: how the neurons of either were found, where their metadata says so.
        sizes_a, sizes_b: neurons of each label at the sites that both results know, int64 [a] and
            [b]; elsewhere they can't agree, so they are left out.
        common: neurons that both have, int64 [a, b].
        common_by_site: site -> the same at that site, int64 [a, b].
    """

    labels_a: list[str]
    labels_b: list[str]
    methods: tuple[str | None, str | None]
    sizes_a: Tensor
    sizes_b: Tensor
    common: Tensor
    common_by_site: dict[Key, Tensor]

    @property
    def jaccard(self) -> Tensor:
        """Neurons in common among those of either, float64 [a, b]; 0 where there are none."""
        either = self.sizes_a[:, None] + self.sizes_b - self.common
        return self.common.double() / either.clamp(min=1)

    @property
    def share_of_smaller(self) -> Tensor:
        """Neurons in common among those of the smaller set, float64 [a, b]."""
        smaller = torch.minimum(self.sizes_a[:, None], self.sizes_b)
        return self.common.double() / smaller.clamp(min=1)

    def to_pandas(self) -> Any:
        """A row per pair of labels, as a `pandas.DataFrame`."""
        import pandas

        return pandas.DataFrame(
            [
                {
                    "label_a": a,
                    "label_b": b,
                    "size_a": int(self.sizes_a[i]),
                    "size_b": int(self.sizes_b[j]),
                    "common": int(self.common[i, j]),
                    "jaccard": float(self.jaccard[i, j]),
                }
                for i, a in enumerate(self.labels_a)
                for j, b in enumerate(self.labels_b)
            ]
        )

    def _repr_html_(self) -> str:
        methods = " with ".join(method or "neurons" for method in self.methods)
        return display.table(
            f"Neurons in common, shaded by Jaccard index: {methods}",
            ["", *self.labels_b],
            [
                [label, *map(str, row)]
                for label, row in zip(self.labels_a, self.common.tolist(), strict=True)
            ],
            self.jaccard.tolist(),
        )

    def __repr__(self) -> str:
        a, b = (method or "neurons" for method in self.methods)
        return f"Comparison({a} with {b}: {len(self.labels_a)} x {len(self.labels_b)} labels)"


def compare(sets_a: NeuronSets, sets_b: NeuronSets) -> Comparison:
    """The overlap of two results, such as two methods', or of one with itself, between languages.

    Neurons are compared at the sites that both know. Where one result's sites are FFNs and the
    other's the linear layers inside of them that are as wide, an output of such a layer counts as
    the FFN's neuron of its index. Where one knows its sites by position only, as a published file
    does, they are the other's in their order.

    Raises:
        InputError: they are of different models, or look at no site in common.
    """
    for sets in (sets_a, sets_b):
        if not isinstance(sets, NeuronSets):
            raise InputError(f"compare takes two NeuronSets, got {type(sets).__name__}")
    if sets_a.layout.positional != sets_b.layout.positional:
        sets_a, sets_b = _named(sets_a, sets_b.layout), _named(sets_b, sets_a.layout)
    a, b = sets_a.layout, sets_b.layout
    known = a.fingerprint and b.fingerprint
    if (known and a.fingerprint != b.fingerprint) or any(
        a.widths.get(site, width) != width for site, width in b.widths.items()
    ):
        raise InputError(
            f"the neurons are of two models, {a.model or 'of one file'} and "
            f"{b.model or 'of the other'}; compare neurons of one model"
        )
    first, second = _aligned(sets_a, b), _aligned(sets_b, a)
    # FFN sites that one knows by itself and the other by the linear layers inside.
    sites = _known(sets_a, b) & _known(sets_b, a)
    if not sites:
        raise InputError(
            "the two results look at different sites, so they have no neuron that could be in both"
        )
    by_site = {}
    for site in sorted(sites, key=str):
        found = torch.tensor(
            [
                [len(_of(one, site) & _of(other, site)) for other in second.values()]
                for one in first.values()
            ],
            dtype=torch.int64,
        ).reshape(len(first), len(second))
        if found.any():
            by_site[site] = found
    zeros = torch.zeros(len(first), len(second), dtype=torch.int64)
    return Comparison(
        sets_a.labels,
        sets_b.labels,
        (sets_a.metadata.get("method"), sets_b.metadata.get("method")),
        _sizes(first, sites),
        _sizes(second, sites),
        sum(by_site.values(), zeros),
        by_site,
    )


_Members = dict[str, dict[Key, set[int]]]
"""Label -> site -> neurons."""


def _aligned(sets: NeuronSets, other: Layout) -> _Members:
    """The neurons, those of linear layers inside the other's FFNs as the FFNs' own."""
    moved = {site: _ffn_of(site, sets.layout.widths, other) for site in sets.sites}
    aligned: _Members = {}
    for label, neurons in sets.items():
        held: dict[Key, set[int]] = {}
        for site, indices in neurons.items():
            width = other.widths[moved[site]] if moved[site] != site else None
            own = indices % width if width else indices
            held.setdefault(moved[site], set()).update(own.tolist())
        aligned[label] = held
    return aligned


def _ffn_of(site: Key, widths: Mapping[Key, int], other: Layout) -> Key:
    """The FFN of the other layout whose gate or up a linear layer makes; else the site itself."""
    from lapefast.models.structure import TABLE

    if not isinstance(site, str) or site in other.sites or site not in widths:
        return site
    for first in {name for row in TABLE for name in row.first}:
        parent = site.removesuffix(f".{first}")
        # Gate and up may be one layer, and so twice as wide.
        if parent != site and widths[site] in (
            other.widths.get(parent),
            2 * other.widths.get(parent, 0),
        ):
            return parent
    return site


def _of(members: dict[Key, set[int]], site: Key) -> set[int]:
    return members.get(site, set())


def _known(sets: NeuronSets, other: Layout) -> set[Key]:
    """The sites of a result, as `_aligned` names them."""
    return {_ffn_of(site, sets.layout.widths, other) for site in sets.sites}


def _named(sets: NeuronSets, other: Layout) -> NeuronSets:
    """Sets known by position, under the names of another layout that has as many sites."""
    if not sets.layout.positional:
        return sets
    if len(sets.sites) != len(other.sites):
        raise InputError(
            f"one result knows its {len(sets.sites)} sites by position only, as a published file "
            f"does, and the other has {len(other.sites)}, so which is which is not known; if they "
            "are of one model, call bind(model) on the former first"
        )
    layout = sets.layout.named(other.sites)
    return NeuronSets(
        {
            label: dict(zip(other.sites, neurons.values(), strict=True))
            for label, neurons in sets.items()
        },
        layout,
        sets.metadata,
    )


def _sizes(members: _Members, sites: set[Key]) -> Tensor:
    sizes = [sum(len(_of(held, site)) for site in sites) for held in members.values()]
    return torch.tensor(sizes, dtype=torch.int64)

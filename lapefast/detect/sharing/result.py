"""What is found of neurons that labels share, and the file it is kept in."""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lapefast import display
from lapefast.detect.sharing.categories import Category
from lapefast.neurons import Layout, NeuronSets
from lapefast.neurons.documents import Document, as_text, block, require

__all__ = ["Sharing", "Spread"]

_DOCUMENT = Document(
    "lapefast sharing", 1, "sharing file", "lapefast identify --method sharing --details"
)
_CATEGORIES = [category.title for category in Category]


@dataclass(frozen=True, eq=False)
class Spread:
    """A value per site and category: its mean over examples, and its range.

    Attributes:
        labels: of the prompts.
        examples: int64 [labels], how many each is taken over.
        mean, least, largest: float64 [labels, sites, 4], categories in the order of `Category`.
    """

    labels: list[str]
    examples: Tensor
    mean: Tensor
    least: Tensor
    largest: Tensor

    def over_labels(self) -> tuple[Tensor, Tensor, Tensor]:
        """Mean, least and largest over examples and labels, float64 [sites, 4] each."""
        weights = (self.examples / self.examples.sum(dtype=torch.float64))[:, None, None]
        return (self.mean * weights).sum(0), self.least.amin(0), self.largest.amax(0)


@dataclass(eq=False)
class Sharing:
    """How neurons are shared by labels, at the last token of parallel prompts.

    Categories stand in the order of `Category`: all-shared, partial-shared, specific,
    non-activated.

    Attributes:
        labels: of the prompts.
        counts: int64 [examples, sites, 4], neurons of each category; over the categories they sum
            to the site's width.
        thresholds: of the sweep.
        sweep_counts: int64 [thresholds, sites, 4], neurons summed over examples.
        neurons: label -> the neurons that are specific to it in every example.
        persistent: category's name -> the neurons that are of that category in every example.
        contribution: share of each category among the neurons that contribute most; None where it
            was not asked for.
        effective: sum of the effective scores of each category's neurons, over the prompts that
            have an answer; None where there are none.
        metadata: how it was found, as JSON.
    """

    labels: list[str]
    counts: Tensor
    thresholds: list[float]
    sweep_counts: Tensor
    neurons: NeuronSets
    persistent: NeuronSets
    contribution: Spread | None
    effective: Spread | None
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def sites(self) -> list[str]:
        """In model order."""
        return self.neurons.sites

    @property
    def shares(self) -> Tensor:
        """Share of each category in a site's neurons, mean over examples; float64 [sites, 4]."""
        return self.counts.sum(0) / self._neurons_seen()

    @property
    def share_range(self) -> Tensor:
        """Its least and largest of an example, float64 [sites, 4, 2]."""
        ends = torch.stack([self.counts.amin(0), self.counts.amax(0)], dim=-1)
        return ends / self._widths()[..., None].double()

    @property
    def sweep(self) -> Tensor:
        """`shares` at each threshold of the sweep; float64 [thresholds, sites, 4]."""
        return self.sweep_counts / self._neurons_seen()

    def to_pandas(self) -> Any:
        """A table with a row per quantity, label, site and category.

        Columns: ``quantity`` ("share", "contribution" or "effective"), ``label`` (None for a share,
        which all labels have together), ``site``, ``category``, ``mean``, ``least``, ``largest``.
        """
        import pandas

        rows = []

        def add(quantity: str, label: str | None, *values: Tensor) -> None:
            for site, of_site in zip(self.sites, torch.stack(values, dim=-1), strict=True):
                for category, of_category in zip(_CATEGORIES, of_site.tolist(), strict=True):
                    rows.append((quantity, label, site, category, *of_category))

        add("share", None, self.shares, *self.share_range.unbind(-1))
        for quantity in ("contribution", "effective"):
            spread = getattr(self, quantity)
            if spread is not None:
                for row in zip(
                    spread.labels, spread.mean, spread.least, spread.largest, strict=True
                ):
                    add(quantity, *row)
        names = ("quantity", "label", "site", "category", "mean", "least", "largest")
        return pandas.DataFrame(rows, columns=names)

    def _repr_html_(self) -> str:
        return display.table(
            "Share of each category of neurons, mean over examples",
            ["site", *_CATEGORIES],
            [
                [str(site), *(f"{share:.1%}" for share in row)]
                for site, row in zip(self.sites, self.shares.tolist(), strict=True)
            ],
            self.shares.tolist(),
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON. Raises InputError where the file cannot be written."""
        entries = {
            "metadata": self.metadata,
            "labels": self.labels,
            "counts": self.counts.tolist(),
            "thresholds": self.thresholds,
            "sweep_counts": self.sweep_counts.tolist(),
            "contribution": _spread_as_json(self.contribution),
            "effective": _spread_as_json(self.effective),
        }
        _DOCUMENT.write(
            path,
            self.neurons.layout,
            {name: as_text(value) for name, value in entries.items()}
            | {
                "neurons": _sets_as_json(self.neurons),
                "persistent": _sets_as_json(self.persistent),
            },
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Sharing:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, cut short, damaged, of another kind or version.
        """
        return _DOCUMENT.read(path, _parsed)

    def _widths(self) -> Tensor:
        """int64 [sites, 1]."""
        return torch.tensor([self.neurons.widths[site] for site in self.sites])[:, None]

    def _neurons_seen(self) -> Tensor:
        """float64 [sites, 1], over all examples."""
        return (self._widths() * len(self.counts)).double()


def _spread_as_json(spread: Spread | None) -> dict[str, Any] | None:
    if spread is None:
        return None
    tensors = ("examples", "mean", "least", "largest")
    return {"labels": spread.labels} | {name: getattr(spread, name).tolist() for name in tensors}


def _sets_as_json(sets: NeuronSets) -> str:
    """Label -> a list of indices for each site, a line each."""
    labels = [
        f"{as_text(label)}: "
        + block("[]", [as_text(layer.tolist()) for layer in sets.layers(label)], depth=2)
        for label in sets
    ]
    return block("{}", labels, depth=1)


def _parsed(content: Mapping[str, Any], layout: Layout) -> Sharing:
    labels, thresholds = content["labels"], content["thresholds"]
    sites = len(layout.sites)
    require(len(layout.widths) == sites, "a site has no width")
    counts = torch.tensor(content["counts"], dtype=torch.int64)
    swept = torch.tensor(content["sweep_counts"], dtype=torch.int64)
    swept = swept.view(len(thresholds), sites, len(Category))
    widths = torch.tensor([layout.widths[site] for site in layout.sites])
    require(counts.dim() == 3 and bool((counts.sum(-1) == widths).all()), "counts miss neurons")
    require(bool((swept.sum(-1) == widths * len(counts)).all()), "sweep_counts miss neurons")
    require((counts >= 0).all() and (swept >= 0).all(), "counts are negative")

    def sets(name: str, names: Sequence[str], **about: str) -> NeuronSets:
        require(list(content[name]) == list(names), f"{name} are not of {', '.join(names)}")
        neurons = {
            label: dict(zip(layout.sites, layers, strict=True))
            for label, layers in content[name].items()
        }
        return NeuronSets(neurons, layout, content["metadata"] | about)

    def spread(name: str) -> Spread | None:
        given = content[name]
        if given is None:
            return None
        examples = torch.tensor(given["examples"], dtype=torch.int64)
        require(set(given["labels"]) <= set(labels), f"{name} has labels of its own")
        require(examples.shape == (len(given["labels"]),), f"{name} has other numbers of labels")
        values = [
            torch.tensor(given[one], dtype=torch.float64).view(len(examples), sites, len(Category))
            for one in ("mean", "least", "largest")
        ]
        return Spread(given["labels"], examples, *values)

    return Sharing(
        labels,
        counts,
        thresholds,
        swept,
        sets("neurons", labels),
        sets("persistent", _CATEGORIES, part="persistent"),
        spread("contribution"),
        spread("effective"),
        content["metadata"],
    )

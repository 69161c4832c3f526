"""Figures of neuron sets: where the neurons lie, and which labels share them."""

from __future__ import annotations

import re
from collections import Counter

import matplotlib.figure
import numpy as np

from lapefast.neurons import NeuronSet, NeuronSets
from lapefast.report.figures.cells import draw_cells
from lapefast.report.figures.figure import Figure, Grid, Table
from lapefast.report.figures.style import COLOURS, COLUMN, inches, lettering

__all__ = ["counts", "intersections", "members", "overlap", "overlaps"]

_NUMBERED = {"layer": 12, "site": 32}  # at most, for each cell to show its number
_MOST = 20  # intersections shown
_ROW = 0.16  # inches
_TOP = 1.1


def counts(neurons: NeuronSets, name: str = "neurons") -> Figure:
    """How many neurons each label has in each layer."""
    values = np.array([[len(layer) for layer in neurons.layers(label)] for label in neurons])
    texts = [str(count) for count in values.flat]
    word, sites = _word(neurons), [str(site) for site in neurons.sites]
    columns = sites if word == "site" else [str(layer) for layer in range(len(sites))]
    header = ["position" if word == "site" else word, "site", *neurons.labels]
    rows = [[position, site, *values[:, position].tolist()] for position, site in enumerate(sites)]

    def draw(escape: bool) -> matplotlib.figure.Figure:
        return draw_cells(
            values,
            texts,
            neurons.labels,
            columns,
            {"cmap": "Blues", "vmin": 0, "vmax": max(1, int(values.max()))},
            (word, "label", "neurons"),
            escape=escape,
            whole=columns,
            numbered=len(columns) <= _NUMBERED[word],
        )

    return Figure(
        name,
        f"Neurons per {word} and label",
        f"How many neurons belong to each label, by {word} in the order of the file.",
        Table(header, rows),
        draw,
        [Grid(neurons.labels, [f"{word} {one}" for one in columns], texts)],
    )


def overlap(neurons: NeuronSets, name: str = "overlap") -> Figure:
    """How many neurons each two labels share."""
    both, jaccard = overlaps(neurons)
    labels = neurons.labels
    texts = [str(count) for count in both.flat]
    rows = [
        [a, b, int(both[i, j]), None if np.isnan(jaccard[i, j]) else float(jaccard[i, j])]
        for i, a in enumerate(labels)
        for j, b in enumerate(labels)
        if i <= j
    ]

    def draw(escape: bool) -> matplotlib.figure.Figure:
        return draw_cells(
            jaccard,
            texts,
            labels,
            labels,
            {"cmap": "Blues", "vmin": 0, "vmax": 1},
            ("label", "label", "Jaccard index"),
            {(one, one) for one in range(len(labels))},
            escape,
        )

    apart = (
        " Of experts that are several labels' no neuron is counted, so no two labels share any."
        if (neurons.metadata.get("parameters") or {}).get("only")
        else ""
    )
    spoken = [
        f"{count} shared, Jaccard {'undefined' if np.isnan(index) else f'{index:.3f}'}"
        for count, index in zip(both.flat, jaccard.flat, strict=True)
    ]
    return Figure(
        name,
        "Neurons that two labels share",
        "Numbers: neurons that belong to both labels, and on the diagonal all of a label's. "
        "Colour: their Jaccard index, the shared ones as a share of all that belong to "
        f"either.{apart}",
        Table(["label", "other label", "shared neurons", "Jaccard index"], rows),
        draw,
        [Grid(labels, labels, spoken)],
    )


def intersections(neurons: NeuronSets, name: str = "intersections") -> Figure:
    """How many neurons belong to exactly these labels, for the largest combinations."""
    sizes = Counter(
        tuple(sorted(owners)) for owners in _owners([members(one) for one in neurons.values()])
    )
    ordered = sorted(sizes, key=lambda owners: (-sizes[owners], owners))
    largest = ordered[:_MOST]
    labels = neurons.labels
    names = [", ".join(labels[one] for one in owners) for owners in ordered]
    heights = [sizes[owners] for owners in largest]

    def draw(escape: bool) -> matplotlib.figure.Figure:
        with lettering(labels, escape=escape) as (drawn,):
            below = _ROW * len(labels) + 0.1
            width = max(COLUMN, 0.8 + inches(drawn) + 0.13 * len(largest))
            figure = matplotlib.figure.Figure((width, _TOP + below), layout="constrained")
            top, dots = figure.subplots(
                2, 1, gridspec_kw={"height_ratios": (_TOP, below)}, sharex=True
            )
            top.bar(range(len(largest)), heights, width=0.7, color=COLOURS[0])
            for place, height in enumerate(heights):
                top.text(place, height, str(height), ha="center", va="bottom", fontsize=5)
            top.margins(y=0.15)
            top.set_ylabel("neurons")
            top.spines[["top", "right"]].set_visible(False)
            top.tick_params("x", length=0, labelbottom=False)
            for place, owners in enumerate(largest):
                dots.plot([place] * len(labels), range(len(labels)), ".", color="#99999955")
                dots.plot([place] * len(owners), owners, ".-", color=COLOURS[0], linewidth=1)
            dots.set_xlim(-0.5, max(len(largest), 1) - 0.5)
            dots.set_ylim(len(labels) - 0.5, -0.5)
            dots.set_yticks(range(len(labels)), drawn)
            for place, one in enumerate(neurons.values()):
                beside = dots.get_yaxis_transform()
                dots.text(1.01, place, str(one.total), va="center", fontsize=6, transform=beside)
            dots.set_xticks([])
            dots.tick_params(length=0)
            dots.spines[:].set_visible(False)
        return figure

    hidden = f" The {len(largest)} largest of {len(ordered)}." if ordered[_MOST:] else ""
    texts = [f"{height} neurons" for height in heights]
    belongs = [
        "belongs" if one in owners else "does not belong"
        for one in range(len(labels))
        for owners in largest
    ]
    grids = [Grid([""], names[:_MOST], texts), Grid(labels, names[:_MOST], belongs)]
    return Figure(
        name,
        "Neurons by the labels that they belong to",
        "Bars: neurons that belong to the labels dotted below, and to no other. On the right: all "
        f"neurons of a label.{hidden}",
        Table(
            ["labels", "neurons"], [[one, sizes[o]] for one, o in zip(names, ordered, strict=True)]
        ),
        draw,
        grids if largest else [],
    )


def members(neurons: NeuronSet) -> set[tuple[str | int, int]]:
    """The neurons as (site, index)."""
    return {(site, index) for site, indices in neurons.items() for index in indices.tolist()}


def overlaps(neurons: NeuronSets) -> tuple[np.ndarray, np.ndarray]:
    """Shared neurons, int64, and Jaccard index, NaN of two empty sets; both [labels, labels]."""
    sets = [members(one) for one in neurons.values()]
    both = np.array([[len(a & b) for b in sets] for a in sets])
    either = np.array([[len(a | b) for b in sets] for a in sets])
    return both, np.where(either > 0, both / np.maximum(either, 1), np.nan)


def _owners(sets: list[set]) -> list[list[int]]:
    owners: dict[tuple[str | int, int], list[int]] = {}
    for position, one in enumerate(sets):
        for neuron in one:
            owners.setdefault(neuron, []).append(position)
    return list(owners.values())


def _word(neurons: NeuronSets) -> str:
    """What a site is called: a layer, where all sites differ by one number alone."""
    alike = {re.sub(r"\d+", "", str(site)) for site in neurons.sites}
    return "layer" if len(alike) == 1 else "site"

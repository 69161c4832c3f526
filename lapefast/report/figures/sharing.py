"""The figure of sharing: which share of a layer's neurons is of each category."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.figure
import numpy as np

from lapefast.report.figures.figure import Figure, Grid, Table
from lapefast.report.figures.style import COLOURS, COLUMN, HATCHES, lettering

__all__ = ["categories"]


def categories(
    names: Sequence[str],
    mean: np.ndarray,
    least: np.ndarray,
    largest: np.ndarray,
    name: str = "sharing",
) -> Figure:
    """Stacked bars of the categories' shares per layer, with their ranges over examples.

    Args:
        names: of the categories.
        mean, least, largest: [categories, layers], shares of a layer's neurons.
        name: of the figure.
    """
    layers = mean.shape[1]
    below = np.cumsum(mean, axis=0) - mean

    def draw(escape: bool) -> matplotlib.figure.Figure:
        with lettering(names, escape=escape) as (drawn,):
            width = max(COLUMN, 0.6 + 0.14 * layers)
            figure = matplotlib.figure.Figure((width, 2.3), layout="constrained")
            axes = figure.add_subplot()
            places = np.arange(layers)
            for row, category in enumerate(drawn):
                axes.bar(
                    places,
                    mean[row],
                    width=0.8,
                    bottom=below[row],
                    color=COLOURS[row % len(COLOURS)],
                    hatch=HATCHES[row % len(HATCHES)],
                    edgecolor="black",
                    linewidth=0.3,
                    label=category,
                )
                # Beside each other, since the ranges of stacked bars would cover each other.
                axes.vlines(
                    places + 0.6 * ((row + 1) / (len(drawn) + 1) - 0.5),
                    below[row] + least[row],
                    below[row] + largest[row],
                    color="black",
                    linewidth=0.6,
                )
            axes.set_xlim(-0.5, layers - 0.5)
            axes.set_ylim(0)
            axes.set_xticks(places[:: max(1, layers // 8)])
            axes.set_xlabel("layer")
            axes.set_ylabel("share of neurons")
            axes.spines[["top", "right"]].set_visible(False)
            figure.legend(loc="outside upper center", ncols=2, frameon=False)
        return figure

    rows = [
        [layer, category, *(float(values[row, layer]) for values in (mean, least, largest))]
        for layer in range(layers)
        for row, category in enumerate(names)
    ]
    spoken = [
        ", ".join(
            f"{category} {mean[row, layer]:.1%} ({least[row, layer]:.1%} to "
            f"{largest[row, layer]:.1%})"
            for row, category in enumerate(names)
        )
        for layer in range(layers)
    ]
    return Figure(
        name,
        "Sharing per layer",
        "Mean share of a layer's neurons in each category. Lines: the range over examples, from "
        "the foot of the category's bar.",
        Table(["layer", "category", "mean", "least", "largest"], rows),
        draw,
        [Grid([""], [f"layer {layer}" for layer in range(layers)], spoken)],
    )

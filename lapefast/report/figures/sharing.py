"""The figure of sharing: which share of a layer's neurons is of each category."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.figure
import numpy as np
from matplotlib.ticker import MaxNLocator

from lapefast.report.figures.figure import Figure, Grid, Table
from lapefast.report.figures.style import COLOURS, COLUMN, lettering

__all__ = ["categories"]

_PANEL = 0.75  # inches


def categories(
    names: Sequence[str],
    mean: np.ndarray,
    least: np.ndarray,
    largest: np.ndarray,
    name: str = "sharing",
) -> Figure:
    """A panel per category: its share per layer, with the range over examples.

    Args:
        names: of the categories.
        mean, least, largest: [categories, layers], shares of a layer's neurons.
        name: of the figure.
    """
    layers = mean.shape[1]

    def draw(escape: bool) -> matplotlib.figure.Figure:
        with lettering(names, escape=escape) as (drawn,):
            height = 0.35 + _PANEL * len(names)
            figure = matplotlib.figure.Figure((COLUMN, height), layout="constrained")
            panels = figure.subplots(len(names), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
            edges = np.arange(layers + 1) - 0.5
            for row, (axes, category) in enumerate(zip(panels, drawn, strict=True)):
                colour = COLOURS[row % len(COLOURS)]
                axes.stairs(
                    largest[row], edges, baseline=least[row], fill=True, color=colour, alpha=0.35
                )
                axes.stairs(mean[row], edges, baseline=None, color=colour, linewidth=1.2)
                axes.set_title(category, loc="left", fontsize=7, pad=2)
                axes.spines[["top", "right"]].set_visible(False)
            panels[-1].set_xlim(-0.5, layers - 0.5)
            panels[-1].set_ylim(0, 1)
            panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
            panels[-1].set_xlabel("layer")
            figure.supylabel("share of neurons", fontsize=7)
        return figure

    rows = [
        [layer, category, *(float(values[row, layer]) for values in (mean, least, largest))]
        for layer in range(layers)
        for row, category in enumerate(names)
    ]
    columns = [f"layer {layer}" for layer in range(layers)]
    grids = [
        Grid(
            [category],
            columns,
            [
                f"{mean[row, layer]:.1%} ({least[row, layer]:.1%} to {largest[row, layer]:.1%})"
                for layer in range(layers)
            ],
        )
        for row, category in enumerate(names)
    ]
    return Figure(
        name,
        "Sharing per layer",
        "The share of a layer's neurons in each category. Line: the mean over examples; band: from "
        "the least to the largest of an example.",
        Table(["layer", "category", "mean", "least", "largest"], rows),
        draw,
        grids,
    )

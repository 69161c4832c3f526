"""The figures of sharing: which share of the neurons is of each category."""

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
    title: str = "Sharing per layer",
    caption: str = "The share of a layer's neurons in each category. Line: the mean over examples; "
    "band: from the least to the largest of an example.",
    along: str = "layer",
    columns: Sequence[str] | None = None,
) -> Figure:
    """A panel per category: its share in each column, with its range.

    Args:
        names: of the categories.
        mean, least, largest: [categories, columns], shares of neurons.
        name, title, caption: of the figure.
        along: what the columns are.
        columns: their names; None numbers them from 0.
    """
    count = mean.shape[1]
    numbered = columns is None
    columns = [str(column) for column in range(count)] if columns is None else list(columns)

    def draw(escape: bool) -> matplotlib.figure.Figure:
        with lettering(names, escape=escape) as (drawn,):
            height = 0.35 + _PANEL * len(names)
            figure = matplotlib.figure.Figure((COLUMN, height), layout="constrained")
            panels = figure.subplots(len(names), 1, sharex=True, sharey=True, squeeze=False)[:, 0]
            edges = np.arange(count + 1) - 0.5
            for row, (axes, category) in enumerate(zip(panels, drawn, strict=True)):
                colour = COLOURS[row % len(COLOURS)]
                axes.stairs(
                    largest[row], edges, baseline=least[row], fill=True, color=colour, alpha=0.35
                )
                axes.stairs(mean[row], edges, baseline=None, color=colour, linewidth=1.2)
                axes.set_title(category, loc="left", fontsize=7, pad=2)
                axes.spines[["top", "right"]].set_visible(False)
            panels[-1].set_xlim(-0.5, count - 0.5)
            panels[-1].set_ylim(0, 1)
            if numbered:
                panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
            else:
                panels[-1].set_xticks(range(count), columns)
            panels[-1].set_xlabel(along)
            figure.supylabel("share of neurons", fontsize=7)
        return figure

    rows = [
        [
            at if numbered else columns[at],
            category,
            *(float(values[row, at]) for values in (mean, least, largest)),
        ]
        for at in range(count)
        for row, category in enumerate(names)
    ]
    grids = [
        Grid(
            [category],
            [f"{along} {column}" for column in columns],
            [
                f"{mean[row, at]:.1%} ({least[row, at]:.1%} to {largest[row, at]:.1%})"
                for at in range(count)
            ],
        )
        for row, category in enumerate(names)
    ]
    header = [along, "category", "mean", "least", "largest"]
    return Figure(name, title, caption, Table(header, rows), draw, grids)

"""Figures of experts: how often each label's tokens choose them, and how alike labels are."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import matplotlib.figure
import numpy as np
from matplotlib.ticker import MaxNLocator

from lapefast.report.figures.cells import draw_cells
from lapefast.report.figures.figure import Figure, Grid, Table, readable
from lapefast.report.figures.style import COLUMN, lettering

__all__ = ["frequencies", "similarities"]

# Inches, of a label's panel: a layer's height, its own at least and at most, its name's, its width.
_LAYER, _LOWEST, _HIGHEST, _NAME, _WIDE = 0.05, 0.45, 1.0, 0.2, 1.25
_ALONE, _HIGH = 4, 7  # labels that stand below each other, at most: all of them, and of a column


def frequencies(labels: Sequence[str], frequency: np.ndarray, name: str = "experts") -> Figure:
    """Heat maps of how often each expert is chosen.

    Args:
        labels: of the first dimension.
        frequency: [labels, layers, experts], share of the label's tokens that chose an expert.
        name: of the figure.
    """
    layers, experts = frequency.shape[1:]
    top = float(frequency.max()) or 1.0

    def draw(escape: bool) -> matplotlib.figure.Figure:
        with lettering(labels, escape=escape) as (drawn,):
            several = len(labels) > _ALONE
            columns = max(2, math.ceil(len(labels) / _HIGH)) if several else 1
            rows = math.ceil(len(labels) / columns)
            panel = min(_HIGHEST, max(_LOWEST, _LAYER * layers))
            size = (max(COLUMN, 0.8 + _WIDE * columns), 0.5 + rows * (panel + _NAME))
            figure = matplotlib.figure.Figure(size, layout="constrained")
            panels = figure.subplots(rows, columns, squeeze=False).flatten()
            for number, (label, values) in enumerate(zip(drawn, frequency, strict=True)):
                axes = panels[number]
                image = axes.imshow(
                    values,
                    aspect="auto",
                    interpolation="none",
                    cmap="viridis",
                    vmin=0,
                    vmax=top,
                )
                axes.set_title(label, fontsize=7, pad=2)
                axes.set_yticks([0, layers - 1] if layers > 1 else [0])
                axes.xaxis.set_major_locator(MaxNLocator(3, integer=True))
                lowest, first = number + columns >= len(labels), number % columns == 0
                axes.tick_params(length=0, labelbottom=lowest, labelleft=first)
                axes.spines[:].set_visible(False)
            for axes in panels[len(labels) :]:
                axes.remove()
            figure.supxlabel("expert", fontsize=7)
            figure.supylabel("layer", fontsize=7)
            shown = list(panels[: len(labels)])
            bar = figure.colorbar(
                image, ax=shown, label="frequency", pad=0.02, fraction=0.05, aspect=40
            )
            bar.outline.set_visible(False)
        return figure

    rows = [
        [label, layer, *frequency[row, layer].tolist()]
        for row, label in enumerate(labels)
        for layer in range(layers)
    ]
    columns = [f"expert {expert}" for expert in range(experts)]
    grids = [
        Grid(
            [f"{label}, layer {layer}" for layer in range(layers)],
            columns,
            [f"{value:.4g}" for value in frequency[row].flat],
        )
        for row, label in enumerate(labels)
    ]
    return Figure(
        name,
        "Frequency of experts",
        "The share of each label's tokens that choose an expert; layers from top to bottom.",
        Table(["label", "layer", *columns], rows),
        draw,
        grids,
    )


def similarities(
    labels: Sequence[str],
    values: np.ndarray,
    title: str,
    caption: str,
    name: str,
    families: Mapping[str, str | None] | None = None,
) -> Figure:
    """How alike labels are by their experts: [labels, labels], 1 of a label and itself.

    ``families``, where given, stand beside the labels: label -> its language's family, if known.
    """
    families = families or {}
    texts = [readable(value, ".2f") for value in values.flat]
    known = [f"{families[one]}: {one}" if families.get(one) else one for one in labels]
    header = ["label", "other label", title]
    rows = [
        [a, b, float(values[i, j])]
        for i, a in enumerate(labels)
        for j, b in enumerate(labels)
        if i <= j
    ]
    if any(families.values()):
        header += ["family", "other family"]
        rows = [[*row, families[row[0]], families[row[1]]] for row in rows]

    def draw(escape: bool) -> matplotlib.figure.Figure:
        least = min(0.0, float(np.nanmin(values)))
        return draw_cells(
            values,
            texts,
            known,
            labels,
            {"cmap": "cividis", "vmin": least, "vmax": max(1.0, float(np.nanmax(values)))},
            ("label", "label", title),
            escape=escape,
            whole=set(known) - set(labels),
        )

    spoken = [readable(value, ".4g") for value in values.flat]
    return Figure(name, title, caption, Table(header, rows), draw, [Grid(known, labels, spoken)])

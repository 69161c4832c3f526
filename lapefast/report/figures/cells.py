"""Heat maps: values in rows and columns, each cell with its number where there is room."""

from __future__ import annotations

from collections.abc import Sequence, Set
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lapefast.report.figures.style import COLUMN, inches, lettering

__all__ = ["draw_cells"]

_ROW = 0.23  # inches
_LOWEST = 1.4  # what the names of the axes need
_BESIDE = 1.0  # for the colour bar and the name of the axis
_NUMBERED = 12  # columns whose cells show their numbers
_DARK = "#111111"  # of numbers on light cells, whatever the page's colour is


def draw_cells(
    values: np.ndarray,
    texts: Sequence[str],
    rows: Sequence[str],
    columns: Sequence[str],
    colours: dict[str, Any],
    titles: tuple[str, str, str],
    marked: Set[tuple[int, int]] = frozenset(),
    escape: bool = True,
) -> Figure:
    """A heat map.

    Args:
        values: [rows, columns]; NaN is a value that there is not.
        texts: the cells' numbers, row by row.
        rows, columns: their names.
        colours: `cmap`, `vmin` and `vmax`.
        titles: of the columns' axis, of the rows' and of the colour bar.
        marked: (row, column) of cells whose number is bold.
        escape: see `lettering`.
    """
    with lettering(rows, columns, escape=escape) as (rows, columns):
        numbered = len(columns) <= _NUMBERED
        step = 1 if numbered else max(1, len(columns) // 8)
        beside = _BESIDE + inches(rows)
        width = max(COLUMN, beside + (inches(texts) * len(columns) if numbered else COLUMN / 2))
        upright = inches(columns) > step * (width - beside) / len(columns)
        height = max(_LOWEST, 0.55 + _ROW * len(rows)) + (inches(columns) if upright else 0)
        figure = Figure((width, height), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(
            np.ma.masked_invalid(values), aspect="auto", interpolation="none", **colours
        )
        image.set_cmap(image.cmap.with_extremes(bad="#bbbbbb"))
        if numbered:
            _write_numbers(axes, image, values, texts, marked)
        axes.set_xticks(range(0, len(columns), step), columns[::step])
        axes.tick_params("x", rotation=90 if upright else 0)
        axes.set_yticks(range(len(rows)), rows)
        axes.tick_params(length=0)
        axes.spines[:].set_visible(False)
        axes.set_xlabel(titles[0])
        axes.set_ylabel(titles[1])
        bar = figure.colorbar(image, ax=axes, label=titles[2], fraction=0.05, pad=0.02)
        bar.outline.set_visible(False)
    return figure


def _write_numbers(
    axes: Axes,
    image,
    values: np.ndarray,
    texts: Sequence[str],
    marked: Set[tuple[int, int]],
) -> None:
    for (place, value), text in zip(np.ndenumerate(values), texts, strict=True):
        red, green, blue, _ = image.cmap(image.norm(value))
        dark = 0.299 * red + 0.587 * green + 0.114 * blue < 0.5
        axes.text(
            place[1],
            place[0],
            text,
            ha="center",
            va="center",
            fontsize=6,
            color="white" if dark else _DARK,
            fontweight="bold" if place in marked else "normal",
        )

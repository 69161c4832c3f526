"""Heat maps: values in rows and columns, each cell with its number."""

from __future__ import annotations

from collections.abc import Collection, Sequence, Set
from typing import Any

import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lapefast.report.figures.style import COLUMN, inches, lettering

__all__ = ["draw_cells"]

_ROW = 0.23  # inches
_BESIDE = 1.0  # for the colour bar and the name of the axis
_FEW = 12  # columns whose numbers need not be small
_SMALL = 0.8  # of the width of numbers
_UPRIGHT = 0.13  # inches, a name that stands upright
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
    whole: Collection[str] = (),
    numbered: bool = True,
) -> Figure:
    """A heat map.

    Args:
        values: [rows, columns]; NaN is a value that there is not.
        texts: the cells' numbers, row by row.
        rows, columns: their names.
        colours: `cmap`, `vmin` and `vmax`.
        titles: of the columns' axis, of the rows' and of the colour bar.
        marked: (row, column) of cells whose number is bold.
        escape, whole: see `lettering`.
        numbered: whether cells show their numbers; else not every column is named either.
    """
    with lettering(rows, columns, escape=escape, whole=whole) as (rows, columns):
        few = len(columns) <= _FEW
        step = 1 if numbered else max(1, len(columns) // 8)
        beside = _BESIDE + inches(rows)
        cell = max(_UPRIGHT, inches(texts) * (1 if few else _SMALL))
        width = max(COLUMN, beside + (cell * len(columns) if numbered else COLUMN / 2))
        upright = inches(columns) > step * (width - beside) / len(columns)
        # The rows, or the names of the axis and the colour bar beside them.
        height = 0.55 + max(_ROW * len(rows), inches(titles[1:]))
        height += inches(columns) if upright else 0
        figure = Figure((width, height), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(
            np.ma.masked_invalid(values), aspect="auto", interpolation="none", **colours
        )
        image.set_cmap(image.cmap.with_extremes(bad="#bbbbbb"))
        if numbered:
            _write_numbers(axes, image, values, texts, marked, 6 if few else 5)
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
    size: int,
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
            fontsize=size,
            color="white" if dark else _DARK,
            fontweight="bold" if place in marked else "normal",
        )

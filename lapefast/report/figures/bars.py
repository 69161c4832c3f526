"""Bars: a few values of each of some groups, side by side."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np
from matplotlib.figure import Figure

from lapefast.report.figures.figure import readable
from lapefast.report.figures.style import COLOURS, COLUMN, HATCHES, inches, lettering

__all__ = ["draw_bars"]

_WIDTH = 0.8  # of a group
_BAR = 0.09  # inches, at least
_BESIDE = 0.5  # for the axis
_FEW = 8  # bars that carry their numbers


def draw_bars(
    groups: Sequence[str],
    series: Mapping[str, np.ndarray],
    ranges: Mapping[str, np.ndarray],
    titles: tuple[str, str],
    form: str = ".3g",
    escape: bool = True,
) -> Figure:
    """Bars from 0, in groups.

    Args:
        groups: their names.
        series: name -> values, float [groups]; what is not finite is left out.
        ranges: name -> float [groups, 2], least and largest, drawn as a line; not of every series.
        titles: of the groups' axis and of the values'.
        form: of the numbers on the bars, where they are few.
        escape: see `lettering`.
    """
    with lettering(groups, list(series), escape=escape) as (drawn, names):
        width = max(COLUMN, _BESIDE + _BAR / _WIDTH * len(groups) * len(series))
        upright = inches(drawn) > (width - _BESIDE) / len(groups)
        figure = Figure((width, 1.9 + (inches(drawn) if upright else 0)), layout="constrained")
        axes = figure.add_subplot()
        bar = _WIDTH / len(series)
        for row, (name, values) in enumerate(series.items()):
            places = np.arange(len(groups)) + (row + 0.5) * bar - _WIDTH / 2
            ends = ranges.get(name, np.stack([values, values], axis=-1))
            axes.bar(
                places,
                np.where(np.isfinite(values), values, np.nan),
                bar,
                color=COLOURS[row],
                hatch=HATCHES[row],
                edgecolor="black",
                linewidth=0.5,
                label=names[row],
            )
            axes.vlines(places, *ends.T, color="black", linewidth=1.2)
            if len(groups) * len(series) <= _FEW:
                for place, value, (_, top) in zip(places, values, ends, strict=True):
                    text = readable(value, form)
                    axes.text(place, top, text, ha="center", va="bottom", fontsize=6)
        axes.set_xlim(-0.5, len(groups) - 0.5)
        axes.margins(y=0.15)
        axes.set_xticks(range(len(groups)), drawn)
        axes.tick_params("x", rotation=90 if upright else 0, length=0)
        axes.set_xlabel(titles[0])
        axes.set_ylabel(titles[1])
        axes.spines[["top", "right"]].set_visible(False)
        if len(series) > 1:
            figure.legend(loc="outside upper center", ncols=len(series), frameon=False)
    return figure

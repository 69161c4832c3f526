"""The figures of sharing: which share of the neurons is of each category, and what they do."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Literal

import matplotlib.figure
import numpy as np
from matplotlib.ticker import MaxNLocator

from lapefast.evaluate import CategoryDeactivation
from lapefast.report.figures.bars import draw_bars
from lapefast.report.figures.figure import Figure, Grid, Table, readable
from lapefast.report.figures.style import COLOURS, COLUMN, lettering

__all__ = ["categories", "deactivations"]

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
    amount: str | None = None,
) -> Figure:
    """A panel per category: its share in each column, with its range.

    Args:
        names: of the categories.
        mean, least, largest: [categories, columns], shares of neurons.
        name, title, caption: of the figure.
        along: what the columns are.
        columns: their names; None numbers them from 0.
        amount: what the values are, where they are no shares, and so may be any numbers.
    """
    form = ".1%" if amount is None else ".3g"
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
                if amount is not None:
                    axes.axhline(0, color="black", linewidth=0.5)
            panels[-1].set_xlim(-0.5, count - 0.5)
            if amount is None:
                panels[-1].set_ylim(0, 1)
            if numbered:
                panels[-1].xaxis.set_major_locator(MaxNLocator(integer=True))
            else:
                panels[-1].set_xticks(range(count), columns)
            panels[-1].set_xlabel(along)
            figure.supylabel(amount or "share of neurons", fontsize=7)
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
                "{} ({} to {})".format(
                    *(readable(of[row, at], form) for of in (mean, least, largest))
                )
                for at in range(count)
            ],
        )
        for row, category in enumerate(names)
    ]
    header = [along, "category", "mean", "least", "largest"]
    return Figure(name, title, caption, Table(header, rows), draw, grids)


def deactivations(
    found: CategoryDeactivation, quantity: Literal["accuracy", "nll"], name: str
) -> Figure:
    """What becomes of the answers without the neurons of each category, beside random sets."""
    share = quantity == "accuracy"
    names = list(dict.fromkeys(row.category for row in found.rows))
    means, ends = np.full((2, len(names)), np.nan), np.full((len(names), 2), np.nan)
    for at, category in enumerate(names):
        rows = [row for row in found.rows if row.category == category]
        weights = [row.answers if share else row.tokens for row in rows]
        means[0, at] = np.average([getattr(row, quantity) for row in rows], weights=weights)
        random = np.array([getattr(row, f"random_{quantity}") for row in rows])
        if random.size:
            of_sets = np.average(random, axis=0, weights=weights)
            means[1, at], ends[at] = of_sets.mean(), (of_sets.min(), of_sets.max())
    amount = "% right" if share else "nats per token"

    def draw(escape: bool) -> matplotlib.figure.Figure:
        scale = 100 if share else 1
        series = {"its neurons": scale * means[0], "random neurons": scale * means[1]}
        ranges = {"random neurons": scale * ends}
        return draw_bars(names, series, ranges, ("without", f"answers, {amount}"), escape=escape)

    form = ".1%" if share else ".4g"
    spoken = [
        readable(own, form)
        + (
            ""
            if np.isnan(random)
            else ", random {} to {}".format(*(readable(e, form) for e in end))
        )
        for own, random, end in zip(*means, ends, strict=True)
    ]
    header = ["without", "label", "answers", "tokens", "neurons", quantity]
    header += [f"random, {which}" for which in ("least", "largest")]
    table = [
        [
            row.category,
            row.label,
            row.answers,
            row.tokens,
            row.neurons,
            getattr(row, quantity),
            *(of(getattr(row, f"random_{quantity}"), default=None) for of in (min, max)),
        ]
        for row in found.rows
    ]
    what = (
        "Share of all labels' answers whose first token is the most likely one"
        if share
        else "Mean of \u2212ln p per token of all labels' answers"
    )
    return Figure(
        name,
        f"Answers without each category: {'accuracy' if share else 'likelihood'}",
        f"{what}, with the neurons of a category deactivated example by example, and with random "
        "neurons, as many in each layer; the line is the range over random sets. The table holds "
        "each label.",
        Table(header, table),
        draw,
        [Grid([""], [f"without {one}" for one in names], spoken)],
    )

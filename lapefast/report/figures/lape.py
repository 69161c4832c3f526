"""Figures of LAPE: the distributions that it cuts, and where."""

from __future__ import annotations

import math
from collections.abc import Mapping

import matplotlib.figure
import numpy as np

from lapefast.detect.lape import Criteria
from lapefast.report.figures.figure import Figure, Grid, Table
from lapefast.report.figures.style import COLOURS, COLUMN, HATCHES, lettering

__all__ = ["entropies", "probabilities"]

_BINS = 40


def entropies(found: Criteria, name: str = "entropy") -> Figure:
    """How the entropies of neurons are distributed, and the highest that was selected."""
    active = ~np.isnan(found.entropy)
    bins = np.linspace(0, math.log(len(found.probabilities)), _BINS + 1)
    silent = int((~active).sum())
    never = f" Not shown: {silent} neurons that are never active." if silent else ""
    lines = {} if found.cut is None else {f"highest selected: {found.cut:.3f}": found.cut}
    # A last bit may lift an entropy over that of equal shares, which is the last bin's end.
    values = np.minimum(found.entropy, bins[-1])
    return _histogram(
        name,
        "Entropy of neurons",
        "How many neurons have which entropy of their activation probabilities over the labels, "
        f"in nats. Low entropy: active for few labels. Qualified: some probability is above the "
        f"filter bar.{never}",
        {"active": values[active], "qualified": values[active & found.qualifies]},
        bins,
        ("entropy (nats)", "neurons"),
        lines,
    )


def probabilities(found: Criteria, name: str = "probability") -> Figure:
    """How activation probabilities are distributed, and the bars that they must pass."""
    if found.least == found.bar:
        lines = {f"filter and label bar: {found.bar:.3f}": found.bar}
    else:
        lines = {
            f"filter bar: {found.least:.3f}": found.least,
            f"label bar: {found.bar:.3f}": found.bar,
        }
    return _histogram(
        name,
        "Activation probability",
        "How many pairs of a neuron and a label have which probability of being active at a "
        "token. A neuron qualifies with a probability above the filter bar, and belongs to every "
        "label for which it is above the label bar.",
        {"neurons and labels": found.probabilities.ravel()},
        np.linspace(0, 1, _BINS + 1),
        ("probability", "pairs"),
        lines,
    )


def _histogram(
    name: str,
    title: str,
    caption: str,
    series: Mapping[str, np.ndarray],
    bins: np.ndarray,
    titles: tuple[str, str],
    lines: Mapping[str, float],
) -> Figure:
    counts = {key: np.histogram(values, bins)[0] for key, values in series.items()}

    def draw(escape: bool) -> matplotlib.figure.Figure:
        with lettering(escape=escape):
            figure = matplotlib.figure.Figure((COLUMN, 2.1), layout="constrained")
            axes = figure.add_subplot()
            for place, (key, heights) in enumerate(counts.items()):
                axes.stairs(
                    heights,
                    bins,
                    fill=True,
                    facecolor=COLOURS[-3 if len(counts) > 1 and not place else 0],
                    hatch=HATCHES[place],
                    label=key,
                )
            for style, (text, value) in zip(("--", ":"), lines.items(), strict=False):
                axes.axvline(value, color="black", linestyle=style, linewidth=1, label=text)
            axes.set_xlim(bins[0], bins[-1])
            if any(heights.any() for heights in counts.values()):
                axes.set_yscale("log")
                axes.set_ylim(0.5)
            axes.set_xlabel(titles[0])
            axes.set_ylabel(titles[1])
            axes.yaxis.set_major_formatter("{x:,.15g}")  # without mathematics, such as powers
            axes.spines[["top", "right"]].set_visible(False)
            figure.legend(loc="outside upper center", ncols=2, frameon=False)
        return figure

    edges = list(zip(bins[:-1].tolist(), bins[1:].tolist(), strict=True))
    rows = [
        [*edge, *(int(heights[place]) for heights in counts.values())]
        for place, edge in enumerate(edges)
    ]
    spoken = [
        ", ".join(f"{key} {heights[place]}" for key, heights in counts.items())
        for place in range(len(edges))
    ]
    names = [f"{titles[0]} {start:.3f} to {end:.3f}" for start, end in edges]
    drawn = " ".join(f"Line: {text}." for text in lines)
    return Figure(
        name,
        title,
        f"{caption} {drawn}".strip(),
        Table(["from", "to", *counts], rows),
        draw,
        [Grid([""], names, spoken)],
    )

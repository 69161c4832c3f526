"""The figure of texts that a model writes from nothing."""

from __future__ import annotations

import matplotlib.figure
import numpy as np

from lapefast.evaluate import SampledLanguages
from lapefast.report.figures.bars import draw_bars
from lapefast.report.figures.figure import Figure, Grid, Table

__all__ = ["languages"]


def languages(sampled: SampledLanguages, name: str = "sampled") -> Figure:
    """How often texts from an empty prompt are in each label's language, before and after."""
    found = sampled.rows
    labels = [row.label for row in found]
    series = {"before": [row.before for row in found], "after": [row.after for row in found]}
    ranges = {}
    if all(row.random for row in found):
        series["random"] = [row.random_mean for row in found]
        ranges["random"] = [(min(row.random), max(row.random)) for row in found]

    def draw(escape: bool) -> matplotlib.figure.Figure:
        return draw_bars(
            labels,
            {key: 100 * np.array(values) for key, values in series.items()},
            {key: 100 * np.array(values) for key, values in ranges.items()},
            ("label", "% in the label's language"),
            escape=escape,
        )

    rows = [
        [
            row.label,
            row.language,
            row.before,
            row.after,
            row.random_mean,
            min(row.random, default=None),
            max(row.random, default=None),
        ]
        for row in found
    ]
    header = ["label", "language", "before", "after", "random", "random, least", "random, largest"]
    spoken = [
        f"before {row.before:.1%}, after {row.after:.1%}"
        + (f", random {min(row.random):.1%} to {max(row.random):.1%}" if row.random else "")
        for row in found
    ]
    return Figure(
        name,
        "Languages of texts from an empty prompt",
        "Share of sampled texts in a label's language, of the unedited model (before), with the "
        "label's neurons set to their values (after), and with random neurons in their place; "
        "the line on random is the range over its sets.",
        Table(header, rows),
        draw,
        [Grid([""], labels, spoken)],
    )

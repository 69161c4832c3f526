"""The figure of stability: how the overlap with far more text grows with the tokens."""

from __future__ import annotations

import matplotlib.figure

from lapefast.evaluate.stability import Stability
from lapefast.report.figures.figure import Figure, Grid, Table
from lapefast.report.figures.style import COLOURS, COLUMN, lettering

__all__ = ["overlaps"]

_PANEL = 0.85  # inches


def overlaps(found: Stability, name: str = "stability") -> Figure:
    """A panel per label: the expected overlap at each number of tokens, with its interval."""
    tokens, expected = found.tokens.T.tolist(), found.expected.T.tolist()
    interval = found.interval.transpose(0, 1).tolist()
    places = range(len(found.tokens))

    def draw(escape: bool) -> matplotlib.figure.Figure:
        with lettering(found.labels, escape=escape) as (drawn,):
            height = 0.35 + _PANEL * len(drawn)
            figure = matplotlib.figure.Figure((COLUMN, height), layout="constrained")
            panels = figure.subplots(len(drawn), 1, sharey=True, squeeze=False)[:, 0]
            for row, (axes, label) in enumerate(zip(panels, drawn, strict=True)):
                colour = COLOURS[row % len(COLOURS)]
                axes.fill_between(
                    places, *zip(*interval[row], strict=True), color=colour, alpha=0.35, linewidth=0
                )
                axes.plot(places, expected[row], color=colour, linewidth=1.2, marker=".")
                axes.set_title(label, loc="left", fontsize=7, pad=2)
                axes.set_xticks(places, [f"{one:,}" for one in tokens[row]])
                axes.set_xlim(-0.5, len(places) - 0.5)
                axes.spines[["top", "right"]].set_visible(False)
            panels[-1].set_ylim(top=1)
            panels[-1].set_xlabel("tokens")
            figure.supylabel("overlap with far more text (Jaccard)", fontsize=7)
        return figure

    rows = [
        [label, tokens[row][at], expected[row][at], *interval[row][at]]
        for row, label in enumerate(found.labels)
        for at in places
    ]
    grids = [
        Grid(
            [label],
            [f"{one:,} tokens" for one in tokens[row]],
            [
                f"{mean:.3f} ({least:.3f} to {largest:.3f})"
                for mean, (least, largest) in zip(expected[row], interval[row], strict=True)
            ],
        )
        for row, label in enumerate(found.labels)
    ]
    return Figure(
        name,
        "Stability of the selection",
        "The overlap (Jaccard index) of each label's neurons, as so many tokens select them, with "
        "those that far more text of the same kind would select. Line: as expected; band: 3 "
        "standard deviations either way, above whose lower end it lies in at least 9 of 10 cases.",
        Table(["label", "tokens", "expected", "least", "largest"], rows),
        draw,
        grids,
    )

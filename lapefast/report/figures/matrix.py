"""The figure of a perplexity matrix."""

from __future__ import annotations

import matplotlib.figure
import numpy as np

from lapefast.evaluate.matrix import PerplexityMatrix
from lapefast.report.figures.cells import draw_cells
from lapefast.report.figures.figure import Figure, Grid, Table, readable

__all__ = ["changes"]


def changes(matrix: PerplexityMatrix, name: str = "matrix") -> Figure:
    """How the perplexity of each label's text changes without each label's neurons."""
    values = matrix.changes().numpy()
    bound = max(float(np.abs(values).max()), 1e-12)
    texts = [readable(value, "+.2f") for value in values.flat]
    edited, columns = matrix.rows[1:], matrix.columns

    def draw(escape: bool) -> matplotlib.figure.Figure:
        # Red over white to blue: readers of every colour vision tell more from less.
        return draw_cells(
            values,
            texts,
            edited,
            columns,
            {"cmap": "RdBu_r", "vmin": -bound, "vmax": bound},
            ("text", "without neurons of", "change of perplexity"),
            {(row, columns.index(label)) for row, label in enumerate(edited) if label in columns},
            escape,
        )

    perplexity, random = matrix.perplexity.tolist(), matrix.random_changes().tolist()
    rows = [
        [
            label,
            text,
            perplexity[0][column],
            perplexity[1 + row][column],
            float(values[row, column]),
            *random[row][column],
        ]
        for row, label in enumerate(edited)
        for column, text in enumerate(columns)
    ]
    spoken = [
        "{}, random sets {} to {}".format(*(readable(value, "+.4g") for value in row[4:]))
        for row in rows
    ]
    header = ["without neurons of", "text", "perplexity, unedited", "perplexity, edited"]
    header += ["change", "least change by a random set", "largest change by a random set"]
    return Figure(
        name,
        "Change of perplexity",
        "How the perplexity of each label's text (columns) changes when the neurons of a label "
        "(rows) are deactivated. Bold: a label's own text. The table holds the least and the "
        "largest change by random sets of equal size per layer.",
        Table(header, rows),
        draw,
        [Grid([f"without {row}" for row in edited], [f"text {one}" for one in columns], spoken)],
    )

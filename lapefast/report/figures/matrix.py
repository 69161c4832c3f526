"""Figures of a perplexity matrix: of neurons deactivated, or of experts pruned."""

from __future__ import annotations

from dataclasses import dataclass

import matplotlib.figure
import numpy as np

from lapefast.evaluate.matrix import PerplexityMatrix
from lapefast.report.figures.bars import draw_bars
from lapefast.report.figures.cells import draw_cells
from lapefast.report.figures.figure import Figure, Grid, Table, readable

__all__ = ["changes", "own_texts"]


def changes(matrix: PerplexityMatrix, name: str = "matrix") -> Figure:
    """How the perplexity of each label's text changes without each label's neurons.

    Of a matrix of `lapefast.evaluate.pruning_matrix`: with experts pruned for each label.
    """
    words = _words(matrix)
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
            ("text", words.axis, "change of perplexity"),
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
    header = [words.axis, "text", "perplexity, unedited", "perplexity, edited"]
    header += ["change", "least change by a random set", "largest change by a random set"]
    return Figure(
        name,
        words.title,
        f"How the perplexity of each label's text (columns) changes when {words.done}. Bold: a "
        "label's own text. The table holds the least and the largest change by random "
        f"{words.random}.",
        Table(header, rows),
        draw,
        [
            Grid(
                [f"{words.row} {row}" for row in edited], [f"text {one}" for one in columns], spoken
            )
        ],
    )


def own_texts(pruned: PerplexityMatrix, name: str = "pruning-own") -> Figure | None:
    """The perplexity of each label's own text with experts pruned for it, beside the baselines.

    None where no label has a text of its own.
    """
    labels = [label for label in pruned.rows[1:] if label in pruned.columns]
    if not labels:
        return None
    rows, columns = (
        [one.index(label) for label in labels] for one in (pruned.rows, pruned.columns)
    )
    perplexity = pruned.perplexity.numpy()
    series = {
        "unpruned": perplexity[0, columns],
        "pruned": perplexity[rows, columns],
        "random experts": pruned.random_nll.exp().numpy()[rows, columns],
    }
    ends = pruned.random_range.exp().numpy()[rows, columns]

    def draw(escape: bool) -> matplotlib.figure.Figure:
        titles = ("text, and label pruned for", "perplexity")
        return draw_bars(labels, series, {"random experts": ends}, titles, escape=escape)

    table = [
        [label, *(float(values[at]) for values in series.values()), *ends[at].tolist()]
        for at, label in enumerate(labels)
    ]
    spoken = [
        "unpruned {}, pruned {}, random {}, {} to {}".format(*(readable(one, ".4g") for one in row))
        for _, *row in table
    ]
    return Figure(
        name,
        "Pruned for a label: its own text",
        "Perplexity of a label's text in the unpruned model, without the experts that are pruned "
        "for the label, and without as many random experts in each layer; the line is the range "
        "over random choices.",
        Table(["label", *series, "random, least", "random, largest"], table),
        draw,
        [Grid([""], labels, spoken)],
    )


@dataclass(frozen=True)
class _Words:
    """What was done: of the rows' axis, of the figure, in its caption, and of a spoken row."""

    axis: str
    title: str
    done: str
    random: str
    row: str


def _words(matrix: PerplexityMatrix) -> _Words:
    form = matrix.metadata.get("pruning")
    if form is None:
        return _Words(
            "without neurons of",
            "Change of perplexity",
            "the neurons of a label (rows) are deactivated",
            "sets of equal size per layer",
            "without",
        )
    by = {"layers": ", layer by layer in proportion to how active the layer is"}.get(form, "")
    return _Words(
        "pruned for",
        "Change of perplexity by pruning",
        f"{matrix.metadata['rate']:.0%} of the experts are pruned: those that a label (rows) uses "
        f"least{by}",
        "experts, as many in each layer",
        "pruned for",
    )

"""Figures for a paper's column: PNG to look at, SVG to edit."""

from __future__ import annotations

import os
from collections.abc import Sequence
from pathlib import Path
from unicodedata import east_asian_width

import matplotlib
import numpy as np
from matplotlib.axes import Axes
from matplotlib.figure import Figure

from lapefast.evaluate.matrix import PerplexityMatrix
from lapefast.files import write_atomically
from lapefast.neurons import NeuronSets
from lapefast.report.fonts import drawable

__all__ = ["COLUMN", "STYLE", "draw_matrix", "draw_neurons", "write"]

COLUMN = 3.35  # inches, a column of a two-column paper; labels or numbers may need more
_ROW = 0.23
_LOWEST = 1.4  # what the names of the axes need
_CHARACTER = 0.065  # inches, of the labels' 7 points; the numbers' 6 points take less
_BESIDE = 1.0  # inches, for the colour bar and the name of the axis
_LONGEST = 16  # characters shown of a label
_NUMBERED = 12  # columns whose cells show their numbers
STYLE = {
    "font.size": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "svg.fonttype": "none",
    "svg.hashsalt": "lapefast",
    "text.parse_math": False,
}


def draw_matrix(matrix: PerplexityMatrix, path: str | os.PathLike[str]) -> list[Path]:
    """Draws how the perplexity of each label's text changes without each label's neurons.

    Args:
        matrix: the measured matrix.
        path: where to write; its suffix is replaced by .png and .svg.

    Returns:
        The files written.

    Raises:
        InputError: a file cannot be written.
    """
    changes = matrix.changes().numpy()
    bound = max(float(np.abs(changes).max()), 1e-12)
    # Red over white to blue: readers of every colour vision tell more from less.
    return _draw_cells(
        changes,
        [f"{value:+.2f}" if bound < 10 else f"{value:+.0f}" for value in changes.flat],
        matrix.rows[1:],
        matrix.columns,
        path,
        colours={"cmap": "RdBu_r", "vmin": -bound, "vmax": bound},
        titles=("text", "without neurons of", "change of perplexity"),
        marked={
            (row, matrix.columns.index(label))
            for row, label in enumerate(matrix.rows[1:])
            if label in matrix.columns
        },
    )


def draw_neurons(neurons: NeuronSets, path: str | os.PathLike[str]) -> list[Path]:
    """Draws how many neurons each label has in each layer. Arguments as of `draw_matrix`."""
    counts = np.array([[len(layer) for layer in neurons.layers(label)] for label in neurons])
    return _draw_cells(
        counts,
        [str(count) for count in counts.flat],
        neurons.labels,
        [str(layer) for layer in range(counts.shape[1])],
        path,
        colours={"cmap": "Blues", "vmin": 0, "vmax": max(1, counts.max())},
        titles=("layer", "label", "neurons"),
    )


def _draw_cells(
    values: np.ndarray,
    texts: Sequence[str],
    rows: Sequence[str],
    columns: Sequence[str],
    path: str | os.PathLike[str],
    colours: dict,
    titles: tuple[str, str, str],
    marked: set[tuple[int, int]] = frozenset(),
) -> list[Path]:
    families, (rows, columns) = drawable(rows, columns)
    rows, columns = _shortened(rows), _shortened(columns)
    numbered = len(columns) <= _NUMBERED
    step = 1 if numbered else max(1, len(columns) // 8)
    beside = _BESIDE + _inches(rows)
    width = max(COLUMN, beside + (_inches(texts) * len(columns) if numbered else COLUMN / 2))
    upright = _inches(columns) > step * (width - beside) / len(columns)
    height = max(_LOWEST, 0.55 + _ROW * len(rows)) + (_inches(columns) if upright else 0)
    with matplotlib.rc_context({**STYLE, "font.family": families}):
        figure = Figure((width, height), layout="constrained")
        axes = figure.add_subplot()
        image = axes.imshow(values, aspect="auto", interpolation="nearest", **colours)
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
        return [write(figure, Path(path).with_suffix(suffix)) for suffix in (".png", ".svg")]


def _shortened(names: Sequence[str]) -> list[str]:
    return [name if len(name) <= _LONGEST else f"{name[: _LONGEST - 1]}…" for name in names]


def _inches(texts: Sequence[str]) -> float:
    """How wide the longest is; a Chinese character is as wide as two others."""
    widths = [sum(1 + (east_asian_width(one) in "WF") for one in text) for text in texts]
    return _CHARACTER * max(widths, default=0)


def _write_numbers(
    axes: Axes,
    image,
    values: np.ndarray,
    texts: Sequence[str],
    marked: set[tuple[int, int]],
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
            color="white" if dark else "black",
            fontweight="bold" if place in marked else "normal",
        )


def write(figure: Figure, path: Path) -> Path:
    kind = path.suffix[1:]
    # Without a date the same figure gives the same file.
    metadata = {"Date": None} if kind == "svg" else None
    with write_atomically(path) as temporary, open(temporary, "wb") as file:
        figure.savefig(file, format=kind, dpi=300, metadata=metadata)
    return path

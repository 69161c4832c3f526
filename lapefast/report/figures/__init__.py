"""Figures: one family per file, each with its data, drawn for a paper's column."""

from __future__ import annotations

import os
from pathlib import Path

from lapefast.evaluate.matrix import PerplexityMatrix
from lapefast.evaluate.stability import Stability
from lapefast.neurons import NeuronSets
from lapefast.report.figures.drawing import Drawing
from lapefast.report.figures.figure import Figure, Grid, Table
from lapefast.report.figures.matrix import changes
from lapefast.report.figures.neurons import counts
from lapefast.report.figures.stability import overlaps
from lapefast.report.figures.style import COLUMN, styled

__all__ = [
    "COLUMN",
    "Drawing",
    "Figure",
    "Grid",
    "Table",
    "draw_matrix",
    "draw_neurons",
    "draw_stability",
    "styled",
]


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
    return _write(changes(matrix), path)


def draw_neurons(neurons: NeuronSets, path: str | os.PathLike[str]) -> list[Path]:
    """Draws how many neurons each label has in each layer. Arguments as of `draw_matrix`."""
    return _write(counts(neurons), path)


def draw_stability(found: Stability, path: str | os.PathLike[str]) -> list[Path]:
    """Draws each label's overlap with far more text against tokens. See `draw_matrix`."""
    return _write(overlaps(found), path)


def _write(figure: Figure, path: str | os.PathLike[str]) -> list[Path]:
    return [figure.on_paper.write(Path(path).with_suffix(suffix)) for suffix in (".png", ".svg")]

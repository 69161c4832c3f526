"""A figure: what is drawn, what it shows as numbers, and what it is called."""

from __future__ import annotations

import csv
import functools
import io
import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path

import matplotlib.figure
from matplotlib.text import Text

from lapefast.files import write_atomically
from lapefast.report.figures.drawing import Drawing
from lapefast.report.fonts import all_drawable

__all__ = ["Figure", "Grid", "Table", "readable", "shown"]

Cell = str | int | float | None
"""None is a value that there is not."""


@dataclass(frozen=True)
class Table:
    """Rows under a header."""

    header: Sequence[str]
    rows: Sequence[Sequence[Cell]]


@dataclass(frozen=True)
class Grid:
    """Equal cells that fill the box of an axes, and the value of each.

    Attributes:
        rows: names of the rows from the top; one that is empty is not spoken.
        columns: names of the columns from the left.
        values: row by row.
    """

    rows: Sequence[str]
    columns: Sequence[str]
    values: Sequence[str]


@dataclass(frozen=True)
class Figure:
    """One figure of a report.

    Attributes:
        name: of its files, without a suffix.
        title, caption: in words.
        table: the same data as numbers.
        draw: makes the drawing; told whether characters that no installed font has are escaped.
        grids: of the drawing's first axes, in their order.
    """

    name: str
    title: str
    caption: str
    table: Table
    draw: Callable[[bool], matplotlib.figure.Figure]
    grids: Sequence[Grid]

    @functools.cached_property
    def in_browser(self) -> Drawing:
        """The drawing for a page: no character is escaped."""
        return Drawing(self.draw(False))

    @functools.cached_property
    def on_paper(self) -> Drawing:
        """The drawing for files of its own; the page's own where nothing is escaped."""
        texts = self.in_browser.figure.findobj(Text)
        lines = [line for text in texts for line in text.get_text().splitlines()]
        return self.in_browser if all_drawable(lines) else Drawing(self.draw(True))

    def save(self, directory: Path) -> list[Path]:
        """Write it as PNG, SVG and CSV; the files written. InputError where that cannot be."""
        path = directory / f"{self.name}.csv"
        text = io.StringIO()
        writer = csv.writer(text, lineterminator="\n")
        writer.writerows([self.table.header, *self.table.rows])
        with write_atomically(path) as temporary:
            temporary.write_text(text.getvalue(), "utf-8", newline="\n")
        pictures = [self.on_paper.write(path.with_suffix(suffix)) for suffix in (".png", ".svg")]
        return [*pictures, path]


def shown(value: Cell) -> str:
    """A cell as people read it: at most four significant digits."""
    if value is None:
        return ""
    if isinstance(value, float):
        if math.isnan(value):
            return "NaN"
        return readable(value, ".4g") if math.isfinite(value) else "∞" if value > 0 else "\u2212∞"
    return str(value)


def readable(value: float, form: str) -> str:
    """A number with a minus sign for a hyphen, and no sign where nothing but zeros is left."""
    text = format(value, form)
    return (text if float(text.rstrip("%")) else text.lstrip("+-")).replace("-", "\u2212")

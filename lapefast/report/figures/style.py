"""How figures look: sized for a paper's column, in colours that every colour vision tells apart."""

from __future__ import annotations

import warnings
from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from unicodedata import east_asian_width

import matplotlib
from matplotlib.figure import Figure

from lapefast.display import shortened
from lapefast.files import write_atomically
from lapefast.report.fonts import drawable

__all__ = [
    "COLOURS",
    "COLUMN",
    "DPI",
    "HATCHES",
    "STYLE",
    "inches",
    "lay_out",
    "lettering",
    "write",
]

COLUMN = 3.35  # inches, a column of a two-column paper; labels or numbers may need more
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
"""Okabe and Ito's palette, without black: that is the text's."""
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "++++")
STYLE = {
    "font.size": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    # Figures say their layout themselves.
    "figure.autolayout": False,
    "figure.constrained_layout.use": False,
    "hatch.linewidth": 0.4,
    "svg.fonttype": "none",
    "svg.hashsalt": "lapefast",
    "text.parse_math": False,
}
DPI = 300
_LONGEST = 16  # characters shown of a label
_CHARACTER = 0.065  # inches, of the labels' 7 points; the numbers' 6 points take less


@contextmanager
def lettering(
    *names: Sequence[str], escape: bool = True, whole: Collection[str] = ()
) -> Iterator[list[list[str]]]:
    """The style in which to draw, and the names as they are drawn: long ones are shortened.

    Args:
        names: the labels that the figure shows.
        escape: characters that no installed font has are escaped; a browser may have one.
        whole: names that are not shortened.
    """
    families, drawn = drawable(*names, escape=escape)
    with matplotlib.rc_context({**STYLE, "font.family": families}):
        short = [shortened(some, _LONGEST) for some in drawn]
        yield [
            [two if one in whole else three for one, two, three in zip(*forms, strict=True)]
            for forms in zip(names, drawn, short, strict=True)
        ]


def inches(texts: Sequence[str]) -> float:
    """How wide the longest is; a Chinese character is as wide as two others."""
    widths = [sum(1 + (east_asian_width(one) in "WF") for one in text) for text in texts]
    return _CHARACTER * max(widths, default=0)


def lay_out(figure: Figure) -> Figure:
    """Give the drawing's parts their places, once for all forms in which it is written."""
    figure.set_dpi(DPI)
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # What no installed font has is escaped, or left to a browser, which has fonts of its own.
        warnings.filterwarnings("ignore", "Glyph")
        figure.get_layout_engine().execute(figure)
        figure.set_layout_engine(None)  # with any, saving draws twice
    return figure


def write(figure: Figure, path: Path) -> Path:
    """Write the figure as the path's suffix says; the same figure gives the same bytes."""
    kind = path.suffix[1:]
    # Without a date the same figure gives the same file.
    metadata = {"Date": None} if kind == "svg" else None
    with (
        write_atomically(path) as temporary,
        open(temporary, "wb") as file,
        matplotlib.rc_context(STYLE),
    ):
        figure.savefig(file, format=kind, dpi=DPI, metadata=metadata)
    return path

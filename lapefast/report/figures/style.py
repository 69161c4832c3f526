"""How figures look: sized for a paper's column, in colours that every colour vision tells apart."""

from __future__ import annotations

from collections.abc import Collection, Iterator, Sequence
from contextlib import contextmanager
from typing import Any
from unicodedata import east_asian_width

import matplotlib.style

from lapefast.display import shortened
from lapefast.report.fonts import drawable

__all__ = [
    "COLOURS",
    "COLUMN",
    "HATCHES",
    "inches",
    "lettering",
    "styled",
]

COLUMN = 3.35  # inches, a column of a two-column paper; labels or numbers may need more
COLOURS = ("#0072b2", "#e69f00", "#009e73", "#cc79a7", "#56b4e9", "#d55e00", "#f0e442")
"""Okabe and Ito's palette, without black: that is the text's."""
HATCHES = ("", "////", "....", "\\\\\\\\", "xxxx", "----", "++++")
_STYLE = {
    "font.size": 7,
    "axes.labelsize": 7,
    "xtick.labelsize": 7,
    "ytick.labelsize": 7,
    "legend.fontsize": 7,
    "axes.linewidth": 0.6,
    "hatch.linewidth": 0.4,
    "svg.fonttype": "none",
    "svg.hashsalt": "lapefast",
    "text.parse_math": False,
}
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
    with styled(**{"font.family": families}):
        short = [shortened(some, _LONGEST) for some in drawn]
        yield [
            [two if one in whole else three for one, two, three in zip(*forms, strict=True)]
            for forms in zip(names, drawn, short, strict=True)
        ]


@contextmanager
def styled(**more: Any) -> Iterator[None]:
    """The style, whatever the user's own is, and more settings of matplotlib."""
    with matplotlib.style.context(["default", {**_STYLE, **more}]):
        yield


def inches(texts: Sequence[str]) -> float:
    """How wide the longest is; a Chinese character is as wide as two others."""
    widths = [sum(1 + (east_asian_width(one) in "WF") for one in text) for text in texts]
    return _CHARACTER * max(widths, default=0)

"""A drawing as SVG within a page: no name that another one has, and the page's text colour."""

from __future__ import annotations

import io
import re
import warnings
from xml.etree import ElementTree

import matplotlib
from matplotlib.figure import Figure

from lapefast.report.figures import STYLE
from lapefast.report.figures.style import DPI

__all__ = ["inline"]

_TEXT_COLOUR = "#000000"  # matplotlib's, of text and axes
_REFERENCE = re.compile(r"url\(#")


def inline(figure: Figure, name: str, described: str) -> str:
    """The figure as an `svg` element.

    Args:
        figure: a drawing, laid out.
        name: distinct within the page; ids begin with it.
        described: says what the figure shows to those who do not see it.
    """
    file = io.BytesIO()
    nothing = dict.fromkeys(("Date", "Creator", "Format", "Type"))
    with matplotlib.rc_context(STYLE), warnings.catch_warnings():
        # The browser has fonts of its own.
        warnings.filterwarnings("ignore", "Glyph")
        figure.savefig(file, format="svg", dpi=DPI, transparent=True, metadata=nothing)
    root = ElementTree.fromstring(file.getvalue())
    for parent in root.iter():
        for style in [one for one in parent if one.tag.endswith("}style")]:
            parent.remove(style)  # it would hold in the whole page
        parent.tag = _bare(parent.tag)
        parent.attrib = {_bare(key): value for key, value in parent.attrib.items()}
        for key, value in parent.attrib.items():
            parent.attrib[key] = _adapted(key, value, name)
    for key in ("width", "height", "version"):
        root.attrib.pop(key, None)
    root.attrib |= {"role": "img", "aria-label": described}
    return ElementTree.tostring(root, encoding="unicode")


def _bare(name: str) -> str:
    """Without the namespace, which a page implies."""
    return name.rpartition("}")[2]


def _adapted(key: str, value: str, name: str) -> str:
    if key == "id":
        return f"{name}-{value}"
    if key == "href" and value.startswith("#"):
        return f"#{name}-{value[1:]}"
    if key in ("style", "fill", "stroke"):
        value = value.replace(_TEXT_COLOUR, "currentColor")
    return _REFERENCE.sub(f"url(#{name}-", value)

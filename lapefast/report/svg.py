"""A drawing as SVG within a page: no name that another one has, and the page's text colour."""

from __future__ import annotations

import re
from xml.etree import ElementTree

from lapefast.report.figures import Drawing

__all__ = ["inline"]

_TEXT_COLOUR = "#000000"  # matplotlib's, of text and axes
_REFERENCE = re.compile(r"url\(#")


def inline(drawing: Drawing, name: str, described: str) -> str:
    """The drawing as an `svg` element.

    Args:
        drawing: of a figure.
        name: distinct within the page; ids begin with it.
        described: says what the figure shows to those who do not see it.
    """
    root = ElementTree.fromstring(drawing.svg)
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

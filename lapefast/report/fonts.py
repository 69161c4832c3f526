"""Fonts that can draw what labels are written in."""

from __future__ import annotations

import functools
import logging
import unicodedata
from collections.abc import Iterable, Sequence

from matplotlib import font_manager

__all__ = ["all_drawable", "drawable"]

_log = logging.getLogger(__name__)
_DEFAULT = "DejaVu Sans"


def drawable(*names: Sequence[str], escape: bool = True) -> tuple[list[str], list[list[str]]]:
    """Font families that together draw the names, and the names as they can be drawn.

    A name with a character that no installed font has is written in ASCII, escaped, if `escape`;
    one with a control character, or another that no XML may hold, in any case.
    """
    every = {character for some in names for name in some for character in name}
    forbidden = {one for one in every if unicodedata.category(one) in ("Cc", "Cs", "Cn")}
    families, missing = _families(every - forbidden)
    if not escape:
        missing = set()
    if missing:
        _log.warning("No installed font draws %s; escapes stand for it", "".join(sorted(missing)))
    return families, [[_escaped(name, missing | forbidden) for name in some] for some in names]


def all_drawable(texts: Iterable[str]) -> bool:
    """Whether the installed fonts have every character."""
    _, missing = _families({character for text in texts for character in text})
    return not missing


def _families(characters: set[str]) -> tuple[list[str], set[str]]:
    """Font families that draw the characters, and those characters that none draws."""
    families = [_DEFAULT]
    missing = characters - _characters(_DEFAULT)
    for family in _files() if missing else ():
        if missing & _characters(family):
            families.append(family)
            missing -= _characters(family)
        if not missing:
            break
    return families, missing


@functools.cache
def _files() -> dict[str, str]:
    """Family -> file of its upright regular face."""
    return {
        font.name: font.fname
        for font in sorted(font_manager.fontManager.ttflist, key=lambda font: font.name)
        # The fonts of last resort draw a box for every character there is.
        if font.style == "normal" and font.weight == 400 and "Last Resort" not in font.name
    }


@functools.cache
def _characters(family: str) -> frozenset[str]:
    return frozenset(map(chr, font_manager.get_font(_files()[family]).get_charmap()))


def _escaped(name: str, missing: set[str]) -> str:
    if missing.isdisjoint(name):
        return name
    return name.encode("unicode_escape").decode()

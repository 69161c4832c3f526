"""A drawing, laid out once, and drawn once as SVG for the page and a file."""

from __future__ import annotations

import functools
import io
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from matplotlib.figure import Figure

from lapefast.files import write_atomically
from lapefast.report.figures.style import styled

__all__ = ["Drawing"]

_DPI = 300
_COMPRESSION = 3  # a third of the time to encode that zlib's usual 6 takes, an eighth more bytes
_FIRST = " <defs>"  # of an SVG's content
_PAPER = ' <rect width="100%" height="100%" fill="#ffffff"/>\n'


@dataclass(frozen=True, eq=False)
class Drawing:
    """What matplotlib drew; its parts have their places.

    Args:
        figure: its layout engine, if it has one, is run and taken away.
    """

    figure: Figure

    def __post_init__(self) -> None:
        self.figure.set_dpi(_DPI)
        engine = self.figure.get_layout_engine()
        if engine is not None:
            with _quiet():
                engine.execute(self.figure)
                self.figure.set_layout_engine(None)  # with any, saving draws twice

    @functools.cached_property
    def svg(self) -> str:
        """As SVG, without a background; the same drawing gives the same text."""
        return self._bytes("svg", transparent=True).decode()

    def write(self, path: Path) -> Path:
        """Write it as the path's suffix says, .png or .svg; the same drawing gives the same bytes.

        Raises InputError where the file cannot be written.
        """
        if path.suffix == ".svg":
            content = self.svg.replace(_FIRST, _PAPER + _FIRST, 1).encode()
        else:
            content = self._bytes("png", pil_kwargs={"compress_level": _COMPRESSION})
        with write_atomically(path) as temporary:
            temporary.write_bytes(content)
        return path

    def _bytes(self, kind: str, **options: Any) -> bytes:
        file = io.BytesIO()
        # Who made it and when is not for a file that is the same whenever it is made.
        nothing = ("Date", "Creator", "Format", "Type") if kind == "svg" else ("Software",)
        with _quiet():
            self.figure.savefig(
                file, format=kind, dpi=_DPI, metadata=dict.fromkeys(nothing), **options
            )
        return file.getvalue()


@contextmanager
def _quiet() -> Iterator[None]:
    with styled(), warnings.catch_warnings():
        # What no installed font has is escaped, or left to a browser, which has fonts of its own.
        warnings.filterwarnings("ignore", "Glyph")
        yield

"""Small tables as HTML, as a notebook shows an object: cells are shaded by their value."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["table"]

# Okabe and Ito's blue and orange, told apart by every colour vision.
_BLUE, _ORANGE = "0,114,178", "230,159,0"


def table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    shades: Sequence[Sequence[float]] | None = None,
) -> str:
    """An HTML table; all text is escaped.

    Args:
        caption: above it.
        header: names of the columns.
        rows: their cells.
        shades: of each row's last cells, -1 (orange) over 0 (none) to 1 (blue).
    """
    head = "".join(f'<th scope="col" dir="auto">{escape(name)}</th>' for name in header)
    lines = [f"<table><caption>{escape(caption)}</caption><thead><tr>{head}</tr></thead><tbody>"]
    for row, shaded in zip(rows, shades or [()] * len(rows), strict=True):
        plain = len(row) - len(shaded)
        styles = [""] * plain + [_style(shade) for shade in shaded]
        cells = (
            f'<td dir="auto"{style}>{escape(cell)}</td>'
            for cell, style in zip(row, styles, strict=True)
        )
        lines.append(f"<tr>{''.join(cells)}</tr>")
    return "\n".join([*lines, "</tbody></table>"])


def _style(shade: float) -> str:
    strength = min(abs(shade), 1) * 0.6  # dark and light text alike stay readable on it
    return f' style="background: rgba({_BLUE if shade >= 0 else _ORANGE},{strength:.2f})"'

"""Small charts and tables as HTML, as a notebook shows an object."""

from __future__ import annotations

from collections.abc import Sequence
from html import escape

__all__ = ["shortened", "table"]

# Okabe and Ito's blue and orange, told apart by every colour vision.
_BLUE, _ORANGE = "0,114,178", "230,159,0"
# Of charts, in pixels: room for names on the left and above, for cells, for a line of text and for
# a letter, of which Chinese takes two.
_LEFT, _HEAD, _ACROSS, _DOWN, _LINE, _LETTER = 96, 16, 288, 320, 12, 6


def table(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    shades: Sequence[Sequence[float]] | None = None,
) -> str:
    """An HTML table, and a chart of the values that its cells are shaded by; text is escaped.

    Args:
        caption: above them.
        header: names of the columns.
        rows: their cells, the first of which names the row.
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
    return "\n".join([*_chart(caption, header, rows, shades or ()), *lines, "</tbody></table>"])


def shortened(names: Sequence[str], most: int) -> list[str]:
    """The names in at most so many characters; different ones stay different.

    A long name keeps its beginning; where that makes two names alike, its end as well; where that
    does too, it ends in its number among the names.
    """
    numbers = {name: str(number) for number, name in enumerate(dict.fromkeys(names), 1)}
    short: dict[str, str] = {}
    for end in (lambda name: "", lambda name: name[-(most // 2) :], numbers.__getitem__):
        for name in numbers:
            kept = max(0, most - 1 - len(end(name)))
            short[name] = name if len(name) <= most else f"{name[:kept]}…{end(name)}"
        if len(set(short.values())) == len(short):
            break
    return [short[name] for name in names]


def _chart(
    caption: str,
    header: Sequence[str],
    rows: Sequence[Sequence[str]],
    shades: Sequence[Sequence[float]],
) -> list[str]:
    """The lines of an `svg`: a bar for each row where one column is shaded, else a heat map.

    The longest bar and the darkest cell are of the largest value.
    """
    if not any(shades):
        return []
    count = len(shades[0])
    bars, most = count == 1, max(abs(shade) for row in shades for shade in row) or 1
    wide = _ACROSS if bars else max(4, min(72, _ACROSS // count))
    high = max(4, min(16, _DOWN // len(rows)))
    top = 0 if bars else _HEAD
    elements, names = [], shortened([row[0] for row in rows], _LEFT // _LETTER)
    for number, (row, shaded) in enumerate(zip(rows, shades, strict=True)):
        y = top + number * high
        if number % -(-_LINE // high) == 0:  # names must not overlap
            elements.append(_name(names[number], _LEFT - 4, y + high / 2, "end"))
        cells = zip(header[-count:], row[-count:], shaded, strict=True)
        for column, (title, text, shade) in enumerate(cells):
            share = abs(shade) / most
            width, strength = (wide * share, 1) if bars else (wide, share)
            elements.append(
                f'<rect x="{_LEFT + column * wide}" y="{y}" width="{width:g}" height="{high - 1}" '
                f'fill="rgb({_BLUE if shade >= 0 else _ORANGE})" '
                f'fill-opacity="{strength:.2f}">'
                f"<title>{escape(f'{row[0]}, {title}: {text}')}</title></rect>"
            )
    step = -(-2 * _LINE // wide)
    titles = shortened(header[-count:], step * wide // _LETTER)
    for column in () if bars else range(0, count, step):
        x = _LEFT + (column + 0.5) * wide
        elements.append(_name(titles[column], x, _HEAD / 2, "middle"))
    size = f"{_LEFT + count * wide} {top + high * len(rows)}"
    across, down = size.split()
    return [
        f'<svg role="img" aria-label="{escape(caption)}" viewBox="0 0 {size}" width="{across}" '
        f'height="{down}" font-size="10" font-family="sans-serif" fill="currentColor">',
        *elements,
        "</svg>",
    ]


def _name(text: str, x: float, y: float, anchor: str) -> str:
    """The text around a place."""
    return (
        f'<text x="{x:g}" y="{y:g}" text-anchor="{anchor}" dominant-baseline="central" '
        f'style="unicode-bidi: isolate">{escape(text)}</text>'
    )


def _style(shade: float) -> str:
    strength = min(abs(shade), 1) * 0.6  # dark and light text alike stay readable on it
    return f' style="background: rgba({_BLUE if shade >= 0 else _ORANGE},{strength:.2f})"'

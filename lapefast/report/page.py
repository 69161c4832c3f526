"""The page: one HTML file that needs nothing else and asks no network for anything."""

from __future__ import annotations

import base64
import hashlib
import os
import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from jinja2 import Environment, FileSystemLoader, StrictUndefined
from markupsafe import Markup
from tqdm.auto import tqdm

from lapefast import __version__
from lapefast.files import write_atomically
from lapefast.report.figures import Figure
from lapefast.report.figures.figure import Cell, Table, shown
from lapefast.report.sections import Inputs, Section, sections
from lapefast.report.svg import inline

__all__ = ["write_report"]

_FOLDER = Path(__file__).parent
_POINTS = 72  # per inch


def write_report(
    path: str | os.PathLike[str],
    inputs: Inputs,
    title: str | None = None,
    date: str | None = None,
    figures: str | os.PathLike[str] | None = None,
    progress: bool = True,
) -> list[Path]:
    """Write a report as one HTML file; the same inputs give the same bytes.

    Args:
        path: the file.
        inputs: what to report.
        title: of the page; by default the model's name.
        date: said on the page, if given.
        figures: a directory for each figure as PNG, SVG and CSV, made if it does not exist.
        progress: show a bar.

    Returns:
        The files written, the page first.

    Raises:
        InputError: nothing was given, it is of two models, or a file cannot be written.
    """
    made = sections(inputs)
    title = title or f"Language-specific neurons of {inputs.model() or 'a model'}"
    drawings = sum(len(section.figures) for section in made) * (1 if figures is None else 2)
    with tqdm(total=drawings, desc="drawing", unit="figure", disable=not progress, delay=1) as bar:
        text = _render(title, date, made, bar)
        with write_atomically(path) as temporary:
            temporary.write_text(text, "utf-8", newline="\n")
        written = [Path(path)]
        if figures is not None:
            Path(figures).mkdir(parents=True, exist_ok=True)
            for section in made:
                for figure in section.figures:
                    written += figure.save(Path(figures))
                    bar.update()
    return written


@dataclass(frozen=True)
class _Drawn:
    """A figure as the template takes it; width in points, data as `script.js` reads it."""

    figure: Figure
    svg: Markup
    width: float
    data: list[dict[str, Any]]


def _render(title: str, date: str | None, made: Sequence[Section], bar: tqdm) -> str:
    environment = Environment(
        loader=FileSystemLoader(_FOLDER),
        autoescape=True,
        undefined=StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    environment.filters |= {"shown": shown, "numeric": _numeric, "arguments": _arguments}
    script = (_FOLDER / "script.js").read_text("utf-8")
    digest = base64.b64encode(hashlib.sha256(script.encode()).digest()).decode()
    return environment.get_template("template.html").render(
        title=title,
        date=date,
        version=__version__,
        style=Markup((_FOLDER / "style.css").read_text("utf-8")),
        script=Markup(script),
        digest=digest,
        sections=[(one, [_drawn(figure, bar) for figure in one.figures]) for one in made],
    )


def _drawn(figure: Figure, bar: tqdm) -> _Drawn:
    drawing = figure.in_browser
    svg = Markup(inline(drawing, figure.name, f"{figure.title}. {figure.caption}"))
    data = []
    for axes, grid in zip(drawing.figure.axes, figure.grids, strict=False):
        place = axes.get_position()
        box = [place.x0, 1 - place.y1, place.width, place.height]
        data.append(
            {
                "box": [round(value, 5) for value in box],
                "rows": list(grid.rows),
                "columns": list(grid.columns),
                "values": list(grid.values),
            }
        )
    bar.update()
    return _Drawn(figure, svg, drawing.figure.get_figwidth() * _POINTS, data)


def _arguments(command: str) -> list[str]:
    """The command's words, each as a shell takes it; a comment as it is."""
    if command.startswith("#"):
        return [command]
    return [shlex.quote(one) for one in shlex.split(command)]


def _numeric(table: Table, column: int) -> bool:
    """Whether a column is of numbers."""
    cells: list[Cell] = [row[column] for row in table.rows]
    return any(isinstance(one, (int, float)) for one in cells)

"""Draws the scaling curves of a results file, beside it.

python benchmarks/figures.py benchmarks/results/cpu.json
"""

from __future__ import annotations

import json
import sys
from collections import defaultdict
from pathlib import Path

from matplotlib.axes import Axes
from matplotlib.figure import Figure
from matplotlib.ticker import LogLocator, NullLocator
from reporting import quartiles

from lapefast.report.figures import COLUMN, Drawing, styled

_COLUMNS = 3
_TICKS = 4
_COLOURS = ("#0072b2", "#d55e00", "#009e73", "#cc79a7")  # told apart by every colour vision

Series = dict[str, dict[float, list[float]]]
"""Contender -> x -> the seconds of each round."""


def draw(results: Path) -> list[Path]:
    """Writes figures/<name>.png and .svg beside ``results``; the files written."""
    held = json.loads(results.read_text("utf-8"))
    curves: dict[str, Series] = defaultdict(lambda: defaultdict(dict))
    for bench in held["benches"].values():
        if bench["point"]:
            for contender, seconds in bench["seconds"].items():
                curves[bench["point"]["curve"]][contender][bench["point"]["x"]] = seconds
    if not curves:
        sys.exit(f"{results} holds no curves; run benchmarks/bench_scaling.py first")
    about, rows = held["about"], -(-len(curves) // _COLUMNS)
    folder = results.parent / "figures"
    folder.mkdir(exist_ok=True)
    with styled():
        figure = Figure((2 * COLUMN, rows * 0.6 * COLUMN), layout="constrained")
        panels = figure.subplots(rows, _COLUMNS, squeeze=False).flat
        for axes, (curve, series) in zip(panels, curves.items(), strict=False):
            _draw_curve(axes, curve, series)
        for axes in list(figure.axes)[len(curves) :]:
            axes.remove()
        named = {}
        for axes in figure.axes:
            lines, names = axes.get_legend_handles_labels()
            named |= dict(zip(names, lines, strict=True))
        figure.legend(named.values(), named, loc="outside lower center", ncols=4, frameon=False)
        changed = ", with uncommitted changes" if about["dirty"] else ""
        figure.suptitle(
            f"{about['device']}, {about['threads']} threads, "
            f"commit {(about['commit'] or 'unknown')[:10]}{changed}",
            fontsize=7,
        )
        drawing = Drawing(figure)
    return [drawing.write(folder / f"{results.stem}-scaling{end}") for end in (".png", ".svg")]


def _draw_curve(axes: Axes, curve: str, series: Series) -> None:
    """Medians as lines, quartiles as bands."""
    for colour, (contender, points) in zip(_COLOURS, series.items(), strict=False):
        xs = sorted(points)
        low, middle, high = zip(*(quartiles(points[x]) for x in xs), strict=True)
        milliseconds = [[1e3 * value for value in values] for values in (low, middle, high)]
        axes.plot(xs, milliseconds[1], ".-", color=colour, label=contender, linewidth=1)
        axes.fill_between(
            xs, milliseconds[0], milliseconds[2], color=colour, alpha=0.2, linewidth=0
        )
    axes.set_xscale("log")
    axes.set_yscale("log")
    axes.set_xticks(xs[:: -(-len(xs) // _TICKS)])
    low, high = axes.get_ylim()
    axes.yaxis.set_major_locator(LogLocator(subs=(1,) if high > 100 * low else (1, 2, 5)))
    for axis in (axes.xaxis, axes.yaxis):
        axis.set_major_formatter("{x:g}")  # the style leaves no mathematics, such as powers
        axis.set_minor_locator(NullLocator())
    axes.set_xlabel(curve)
    axes.set_ylabel("ms")
    axes.spines[["top", "right"]].set_visible(False)


if __name__ == "__main__":
    if len(sys.argv) != 2:
        sys.exit(__doc__)
    for path in draw(Path(sys.argv[1])):
        print(path)

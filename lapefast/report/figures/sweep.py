"""Figures of a sweep: how often steering gets to the target's language."""

from __future__ import annotations

from collections.abc import Sequence

import matplotlib.figure
import numpy as np

from lapefast.evaluate.sweep import PairSummary, mean_of_pairs
from lapefast.report.figures.bars import draw_bars
from lapefast.report.figures.cells import draw_cells
from lapefast.report.figures.figure import Cell, Figure, Grid, Table

__all__ = ["kinds", "rates"]


def rates(pairs: Sequence[PairSummary], name: str = "sweep") -> Figure:
    """The share of edited answers in the target's language, of each pair."""
    sources = list(dict.fromkeys(pair.source for pair in pairs))
    targets = list(dict.fromkeys(pair.target for pair in pairs))
    values = np.full((len(sources), len(targets)), np.nan)
    spoken = ["not measured"] * values.size
    for pair in pairs:
        row, column = sources.index(pair.source), targets.index(pair.target)
        values[row, column] = pair.edited.share
        spoken[row * len(targets) + column] = _spoken(pair)
    texts = ["–" if np.isnan(value) else f"{value:.0%}" for value in values.flat]

    def draw(escape: bool) -> matplotlib.figure.Figure:
        return draw_cells(
            100 * values,
            texts,
            sources,
            targets,
            {"cmap": "cividis", "vmin": 0, "vmax": 100},
            ("steered to", "prompt", "% in target's language"),
            escape=escape,
        )

    return Figure(
        name,
        "Steering rates",
        "Share of answers in the target's language when the neurons of the prompt's language are "
        "deactivated and the target's activated; on the diagonal, activated only. The table holds "
        "the unedited model and random sets of equal size per layer too.",
        _table(pairs),
        draw,
        [Grid([f"prompt {one}" for one in sources], [f"to {one}" for one in targets], spoken)],
    )


def kinds(pairs: Sequence[PairSummary], name: str = "sweep-kinds") -> Figure | None:
    """Mean shares over the pairs of two labels, by what was done; None without such a pair."""
    mean = mean_of_pairs(pairs)
    if mean is None:
        return None
    shares = {"unedited": mean.unedited.share, "edited": mean.edited.share}
    if mean.random:
        shares["random"] = mean.random_mean.share
    if mean.diffmean:
        shares["diffmean"] = mean.diffmean.share
    ranges = {kind: (share, share) for kind, share in shares.items()}
    ranges |= {"random": mean.random_range} if mean.random else {}

    def draw(escape: bool) -> matplotlib.figure.Figure:
        return draw_bars(
            list(shares),
            {"mean": 100 * np.array(list(shares.values()))},
            {"mean": 100 * np.array(list(ranges.values()))},
            ("", "% in target's language"),
            ".1f",
            escape,
        )

    rows = [[kind, share, *ranges[kind]] for kind, share in shares.items()]
    spoken = [
        f"{share:.1%}, range {least:.1%} to {largest:.1%}" for _, share, least, largest in rows
    ]
    return Figure(
        name,
        "Steering rates, mean over pairs",
        "Mean share of answers in the target's language over all pairs of two labels; the line on "
        "random is the range over its sets.",
        Table(["kind", "share", "least set", "largest set"], rows),
        draw,
        [Grid([""], list(shares), spoken)],
    )


def _spoken(pair: PairSummary) -> str:
    parts = [f"edited {pair.edited.share:.1%}", f"unedited {pair.unedited.share:.1%}"]
    if pair.random:
        parts.append("random {:.1%} to {:.1%}".format(*pair.random_range))
    if pair.diffmean:
        parts.append(f"diffmean {pair.diffmean.share:.1%}")
    return ", ".join(parts)


def _table(pairs: Sequence[PairSummary]) -> Table:
    header = ["source", "target", "unedited", "edited", "random", "random, least"]
    header += ["random, largest", "diffmean"]
    header += [f"perplexity, {kind}" for kind in ("unedited", "edited", "random", "diffmean")]

    def cells(pair: PairSummary) -> list[Cell]:
        outcomes = [pair.unedited, pair.edited, pair.random_mean, pair.diffmean]
        shares = [None if one is None else one.share for one in outcomes]
        shares[3:3] = pair.random_range or (None, None)
        perplexities = [None if one is None else one.perplexity for one in outcomes]
        return [pair.source, pair.target, *shares, *perplexities]

    rows = [cells(pair) for pair in pairs]
    kept = [one for one in range(len(header)) if any(row[one] is not None for row in rows)]
    return Table([header[one] for one in kept], [[row[one] for one in kept] for row in rows])

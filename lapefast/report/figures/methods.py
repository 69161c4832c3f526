"""The figure that compares the neurons that several methods found."""

from __future__ import annotations

from collections.abc import Mapping
from itertools import combinations

import matplotlib.figure
import numpy as np

from lapefast.errors import InputError
from lapefast.neurons import NeuronSets, compare
from lapefast.report.figures.cells import draw_cells
from lapefast.report.figures.figure import Figure, Grid, Table

__all__ = ["methods"]


def methods(found: Mapping[str, NeuronSets], name: str = "methods") -> Figure:
    """The Jaccard index of each two methods' neurons, label by label.

    Neurons are compared where both methods look, at the sites that both know; the index is not
    defined where there is none, or no neuron of either.
    """
    labels = list(dict.fromkeys(label for sets in found.values() for label in sets.labels))
    pairs = list(combinations(found, 2))
    values = np.full((len(pairs), len(labels)), np.nan)
    spoken = ["not comparable"] * values.size
    rows = []
    for row, (a, b) in enumerate(pairs):
        try:
            compared = compare(found[a], found[b])
        except InputError:  # they look at different sites
            continue
        for column, label in enumerate(labels):
            if label not in found[a] or label not in found[b]:
                continue
            i, j = found[a].labels.index(label), found[b].labels.index(label)
            mine, theirs, both = (
                int(one)
                for one in (compared.sizes_a[i], compared.sizes_b[j], compared.common[i, j])
            )
            either = mine + theirs - both
            index = both / either if either else None
            rows.append([label, a, b, mine, theirs, both, index])
            if index is not None:
                values[row, column] = index
                spoken[row * len(labels) + column] = (
                    f"{mine} and {theirs} neurons, {both} shared, Jaccard {index:.3f}"
                )
    texts = ["–" if np.isnan(value) else f"{value:.2f}" for value in values.flat]
    names = [f"{a} × {b}" for a, b in pairs]
    largest = float(np.nanmax(values, initial=0)) or 1.0

    def draw(escape: bool) -> matplotlib.figure.Figure:
        return draw_cells(
            values,
            texts,
            names,
            labels,
            {"cmap": "cividis", "vmin": 0, "vmax": largest},
            ("label", "methods", "Jaccard index"),
            escape=escape,
            whole=names,
        )

    header = ["label", "method", "other method", "neurons", "other's neurons", "shared"]
    return Figure(
        name,
        "Method against method",
        "Jaccard index of the neurons that two methods find for a label: the shared ones as a "
        "share of all that either finds, among the sites where both look. Colours reach from 0 to "
        "the largest.",
        Table([*header, "Jaccard index"], rows),
        draw,
        [Grid(names, labels, spoken)],
    )

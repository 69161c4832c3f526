"""Tables that commands print."""

from __future__ import annotations

import json
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lapefast.evaluate import PerplexityMatrix
from lapefast.neurons import NeuronSets
from lapefast.profiles import Profile

__all__ = [
    "console",
    "matrix_table",
    "metadata_table",
    "neuron_table",
    "profile_table",
    "table_of",
]

console = Console(soft_wrap=False, highlight=False, markup=False, emoji=False)


def table_of(content: Profile | NeuronSets | PerplexityMatrix) -> Table:
    """The table of whatever a file held."""
    if isinstance(content, Profile):
        return profile_table(content)
    return neuron_table(content) if isinstance(content, NeuronSets) else matrix_table(content)


def profile_table(profile: Profile) -> Table:
    """Tokens per label, and the share of neurons active at a token."""
    table = _table(f"Profile: {len(profile.sites)} sites, {_neurons(profile):,} neurons")
    table.add_column("label")
    table.add_column("tokens", justify="right")
    table.add_column("active at a token", justify="right")
    for label, tokens in zip(profile.labels, profile.tokens.tolist(), strict=True):
        table.add_row(label, f"{tokens:,}", _share(profile, label))
    return table


def neuron_table(neurons: NeuronSets) -> Table:
    """Neurons per layer and label."""
    table = _table("Neurons per layer and label")
    table.add_column("layer", justify="right")
    for label in neurons.labels:
        table.add_column(label, justify="right")
    layers = [[len(layer) for layer in neurons.layers(label)] for label in neurons.labels]
    for layer in range(len(neurons.sites)):
        table.add_row(str(layer), *(str(counts[layer]) for counts in layers))
    table.add_section()
    table.add_row("all", *(str(sum(counts)) for counts in layers), style="bold")
    return table


def matrix_table(matrix: PerplexityMatrix) -> Table:
    """Change of each text's perplexity, the diagonal marked, beside that of random sets."""
    table = _table(
        "Change of perplexity (columns: text) without a label's neurons (rows); * marks the "
        "label's own text"
    )
    table.add_column("")
    for label in matrix.columns:
        table.add_column(label, justify="right")
    table.add_column("random, own text", justify="right")
    table.add_row("perplexity", *(f"{value:.2f}" for value in matrix.perplexity[0].tolist()), "")
    table.add_section()
    ranges = matrix.random_changes()
    for row, values in enumerate(matrix.changes().tolist()):
        label = matrix.rows[row + 1]
        cells = [
            f"{value:+.3f}{'*' if column == label else ' '}"
            for column, value in zip(matrix.columns, values, strict=True)
        ]
        least, largest = (
            ranges[row, matrix.columns.index(label)].tolist()
            if label in matrix.columns
            else (None, None)
        )
        table.add_row(label, *cells, "" if least is None else f"{least:+.3f} to {largest:+.3f}")
    return table


def metadata_table(metadata: Mapping[str, Any]) -> Table:
    """What a file says of itself."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in metadata.items():
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            for one in value:
                table.add_row(name, _brief(one))
        else:
            table.add_row(name, value if isinstance(value, str) else _brief(value))
    return table


def _brief(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _table(title: str) -> Table:
    return Table(title=title, title_justify="left", box=box.SIMPLE_HEAD, title_style="bold")


def _neurons(profile: Profile) -> int:
    return sum(site.width for site in profile.site_info)


def _share(profile: Profile, label: str) -> str:
    if "counts" not in profile.statistics:
        return ""
    probabilities = profile.probabilities(label).values()
    return f"{sum(float(one.sum()) for one in probabilities) / _neurons(profile):.1%}"

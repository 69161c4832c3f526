"""Tables that commands print."""

from __future__ import annotations

import json
import re
import sys
from collections.abc import Mapping
from typing import Any

from rich import box
from rich.console import Console
from rich.table import Table

from lapefast.detect import Category, Experts, Sharing
from lapefast.evaluate import (
    CategoryDeactivation,
    PerplexityMatrix,
    SampledLanguages,
    Stability,
    Sweep,
)
from lapefast.evaluate.language import languages_in_question
from lapefast.evaluate.sweep import PairSummary, mean_of_pairs
from lapefast.neurons import NeuronSets
from lapefast.profiles import Profile

__all__ = ["console", "show", "show_metadata"]

# What reads a pipe or a file has no width of its own.
console = Console(
    width=None if sys.stdout.isatty() else 200, highlight=False, markup=False, emoji=False
)


def show(content: Any) -> None:
    """Print what was found, as a table; of what has none, what it says of itself."""
    for kind, shown in (
        (Profile, _show_profile),
        (NeuronSets, _show_neurons),
        (Sweep, _show_sweep),
        (PerplexityMatrix, _show_matrix),
        (SampledLanguages, _show_sampled),
        (CategoryDeactivation, _show_deactivation),
        (Stability, _show_stability),
        (Sharing, _show_sharing),
        (Experts, _show_experts),
    ):
        if isinstance(content, kind):
            shown(content)
            return
    console.print(repr(content))


def _show_profile(profile: Profile) -> None:
    console.print(f"Profile of {len(profile.sites)} sites, {_neurons(profile):,} neurons")
    table = _table("label", "tokens", "active at a token")
    for label, tokens in zip(profile.labels, profile.tokens.tolist(), strict=True):
        table.add_row(label, f"{tokens:,}", _share(profile, label))
    console.print(table)


def _show_neurons(neurons: NeuronSets) -> None:
    # Sites that are linear layers are told by their names: a layer has several.
    named = any(re.search(r"_?(proj|attn|dense|fc\d)[^.]*$", str(site)) for site in neurons.sites)
    console.print(f"Neurons per {'site' if named else 'layer'} and label")
    table = _table("site" if named else "layer", *neurons.labels)
    layers = [[len(layer) for layer in neurons.layers(label)] for label in neurons.labels]
    for layer, site in enumerate(neurons.sites):
        counts = [of_label[layer] for of_label in layers]
        if any(counts) or not named:
            table.add_row(str(site) if named else str(layer), *map(str, counts))
    table.add_section()
    table.add_row("all", *(str(sum(counts)) for counts in layers), style="bold")
    console.print(table)


def _show_sharing(sharing: Sharing) -> None:
    console.print("Share of each category of neurons, mean over examples")
    table = _table("site", *(category.title for category in Category))
    for site, shares in zip(sharing.sites, sharing.shares.tolist(), strict=True):
        table.add_row(str(site), *(f"{share:.1%}" for share in shares))
    console.print(table)


def _show_experts(experts: Experts) -> None:
    console.print("Cosine similarity of the labels' frequencies of experts")
    order = experts.order()
    rows = [experts.labels.index(label) for label in order]
    table = _table("", *order)
    for label, values in zip(order, experts.similarity()[rows][:, rows].tolist(), strict=True):
        table.add_row(label, *(f"{value:.2f}" for value in values))
    console.print(table)


def _show_sampled(sampled: SampledLanguages) -> None:
    codes = [row.language for row in sampled.rows]
    console.print(
        "Share of texts from an empty prompt in the label's language. "
        + languages_in_question(sampled.metadata, codes)
    )
    table = _table("label", "before", "after", "random", "of sets")
    for row in sampled.rows:
        random = []
        if row.random:
            least, largest = min(row.random), max(row.random)
            random = [f"{row.random_mean:.0%}", f"{least:.0%} to {largest:.0%}"]
        table.add_row(row.label, f"{row.before:.0%}", f"{row.after:.0%}", *random)
    console.print(table)


def _show_deactivation(found: CategoryDeactivation) -> None:
    console.print("Answers without a category's neurons; random: mean over sets of equal size")
    table = _table("without", "label", "neurons", "right", "random", "nll", "nll random")
    for row in found.rows:
        numbers = [f"{row.neurons:,.0f}"]
        for value, random, form in (
            (row.accuracy, row.random_accuracy, ".0%"),
            (row.nll, row.random_nll, ".2f"),
        ):
            mean = format(sum(random) / len(random), form) if random else ""
            numbers += [format(value, form), mean]
        table.add_row(row.category, row.label, *numbers)
    console.print(table)


def _show_matrix(matrix: PerplexityMatrix) -> None:
    pruned = matrix.of_experts
    done = "experts are pruned for a label" if pruned else "a label's neurons are deactivated"
    console.print(
        f"Change of perplexity of each text (columns) when {done} "
        "(rows).\n* marks the label's own text; random: the largest change of that text by "
        f"{matrix.metadata.get('random_sets', 'the')} random sets of equal size per layer."
    )
    table = _table("", *matrix.columns, "random")
    table.add_row("none", *(f"{value:.2f} " for value in matrix.perplexity[0].tolist()), "")
    table.add_section()
    largest = matrix.random_changes()[..., 1].tolist()
    for label, changes, random in zip(
        matrix.rows[1:], matrix.changes().tolist(), largest, strict=True
    ):
        cells = [
            f"{change:+.2f}{'*' if column == label else ' '}"
            for column, change in zip(matrix.columns, changes, strict=True)
        ]
        own = label in matrix.columns
        table.add_row(label, *cells, f"{random[matrix.columns.index(label)]:+.2f}" if own else "")
    console.print(table)


def _show_stability(found: Stability) -> None:
    console.print(
        "Overlap (Jaccard) of each label's neurons with those that far more text would select;\n"
        "at least: what it reaches in 9 of 10 cases or more."
    )
    table = _table("label", "tokens", "expected", "at least", "neurons")
    counts = list(found.tokens.unbind())
    for place, tokens in enumerate(counts):
        table.add_section()
        last = place == len(counts) - 1
        for column, label in enumerate(found.labels):
            table.add_row(
                label,
                f"{int(tokens[column]):,}",
                f"{float(found.expected[place, column]):.3f}",
                f"{float(found.interval[place, column, 0]):.3f}",
                f"{int(found.neurons[column]):,}" if last else "",
                style="bold" if last else None,
            )
    console.print(table)


def _show_sweep(sweep: Sweep) -> None:
    pairs = sweep.summary()
    random = any(pair.random for pair in pairs)
    shifted = any(pair.diffmean for pair in pairs)
    console.print(
        "Share of answers in the target's language, and their perplexity under the unedited model. "
        "Overlap: neurons of both, which are activated. "
        + languages_in_question(sweep.metadata, sweep.codes.values())
    )
    kinds = ["unedited", "edited"]
    kinds += ["random", "of sets"] if random else []
    kinds += ["diffmean"] if shifted else []
    named = [f"ppl {kind}" for kind in kinds if kind != "of sets"]
    table = _table("source", "target", "overlap", *kinds, *named)
    for pair in pairs:
        table.add_row(*_pair_cells(pair))
    mean = mean_of_pairs(pairs)
    if mean is not None:
        table.add_section()
        table.add_row(*_pair_cells(mean), style="bold")
    console.print(table)


def _pair_cells(pair: PairSummary) -> list[str]:
    outcomes = [pair.unedited, pair.edited]
    shares = [f"{one.share:.0%}" for one in outcomes]
    if pair.random:
        outcomes.append(pair.random_mean)
        least, largest = pair.random_range
        shares += [f"{pair.random_mean.share:.0%}", f"{least:.0%} to {largest:.0%}"]
    if pair.diffmean:
        outcomes.append(pair.diffmean)
        shares.append(f"{pair.diffmean.share:.0%}")
    perplexities = [f"{one.perplexity:.2f}" for one in outcomes]
    return [pair.source, pair.target, str(pair.overlap), *shares, *perplexities]


def show_metadata(metadata: Mapping[str, Any]) -> None:
    """Print what a file says of itself."""
    table = Table(box=None, show_header=False, pad_edge=False)
    table.add_column(style="bold", no_wrap=True)
    table.add_column(overflow="fold")
    for name, value in metadata.items():
        if isinstance(value, list) and any(isinstance(one, dict) for one in value):
            for one in value:
                table.add_row(name, _brief(one))
        else:
            table.add_row(name, value if isinstance(value, str) else _brief(value))
    console.print(table)


def _brief(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False)


def _table(first: str, *numbers: str) -> Table:
    table = Table(box=box.SIMPLE_HEAD)
    table.add_column(first)
    for name in numbers:
        table.add_column(name, justify="right", overflow="fold")
    return table


def _neurons(profile: Profile) -> int:
    return sum(site.neurons for site in profile.site_info)


def _share(profile: Profile, label: str) -> str:
    if "counts" not in profile.statistics:
        return ""
    probabilities = profile.probabilities(label).values()
    return f"{sum(float(one.sum()) for one in probabilities) / _neurons(profile):.1%}"

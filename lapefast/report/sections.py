"""The sections of a report: what was given, as tables and figures. What was not given is absent."""

from __future__ import annotations

import json
import re
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from typing import TYPE_CHECKING, Any

from lapefast.detect.lape import criteria, lape
from lapefast.errors import InputError
from lapefast.evaluate.language import languages_in_question
from lapefast.evaluate.stability import in_every_shard, stability
from lapefast.report.commands import commands, public_name
from lapefast.report.figures import experts as expert_figures
from lapefast.report.figures import lape as lape_figures
from lapefast.report.figures import matrix as matrix_figures
from lapefast.report.figures import neurons as neuron_figures
from lapefast.report.figures import sampling as sampling_figures
from lapefast.report.figures import sharing as sharing_figures
from lapefast.report.figures import stability as stability_figures
from lapefast.report.figures import sweep as sweep_figures
from lapefast.report.figures.figure import Figure, Table
from lapefast.report.figures.methods import methods

if TYPE_CHECKING:
    from lapefast.detect import Sharing
    from lapefast.detect.experts import Experts
    from lapefast.evaluate import (
        CategoryDeactivation,
        PerplexityMatrix,
        SampledLanguages,
        Sweep,
    )
    from lapefast.neurons import NeuronSets
    from lapefast.profiles import Profile

__all__ = ["Inputs", "Section", "sections"]

_RATES = ("top_rate", "filter_rate", "activation_bar_ratio", "form", "over")


@dataclass(frozen=True)
class Inputs:
    """What a report is made of; all but something may be left out.

    Attributes:
        profile: counts of the labels' texts.
        neurons: name -> neuron sets; several are compared.
        matrix: the perplexity matrix.
        sweep: steering of each label to each.
        sampled: texts from an empty prompt.
        experts: how often each label's tokens choose each.
        pruning: the perplexity matrix of experts pruned.
        sharing: categories of neurons by how many labels share them.
        deactivation: what becomes of answers without each category.
        files: what each came from, for the commands: a name of `described`, or another method's
            name with " in full" -> base name.
    """

    profile: Profile | None = None
    neurons: Mapping[str, NeuronSets] = field(default_factory=dict)
    matrix: PerplexityMatrix | None = None
    sweep: Sweep | None = None
    sampled: SampledLanguages | None = None
    experts: Experts | None = None
    pruning: PerplexityMatrix | None = None
    sharing: Sharing | None = None
    deactivation: CategoryDeactivation | None = None
    files: Mapping[str, str] = field(default_factory=dict)

    def model(self) -> str | None:
        """The model's name, where one of them knows it."""
        names = [one.get("model") for one in self.described().values()]
        names += [one.layout.model for one in self.neurons.values()]
        return next((public_name(name) for name in names if name), None)

    def described(self) -> dict[str, Mapping[str, Any]]:
        """Name -> metadata, of those that have some."""
        known = {"profile": self.profile, **self.neurons, "matrix": self.matrix}
        known |= {"sweep": self.sweep, "sampled": self.sampled}
        known |= {"experts in full": self.experts, "pruning": self.pruning}
        known |= {"sharing in full": self.sharing, "deactivation": self.deactivation}
        return {name: one.metadata for name, one in known.items() if one is not None}


@dataclass(frozen=True)
class Section:
    """A part of the page.

    Attributes:
        title: its heading.
        text: a sentence under it.
        tables: caption -> table.
        figures: in order.
        commands: to copy.
    """

    title: str
    text: str = ""
    tables: Mapping[str, Table] = field(default_factory=dict)
    figures: Sequence[Figure] = ()
    commands: Sequence[str] = ()


def sections(inputs: Inputs) -> list[Section]:
    """All sections that the inputs allow.

    Raises:
        InputError: nothing was given, or what was given is of two models.
    """
    _check(inputs)
    return [section for section in _sections(inputs) if section is not None]


def _sections(inputs: Inputs) -> Iterator[Section | None]:
    yield _measured(inputs)
    suffixes = _suffixes(inputs.neurons)
    for name, neurons in inputs.neurons.items():
        yield _neurons(name, neurons, suffixes[name])
    if len(inputs.neurons) > 1:
        yield Section("Methods compared", figures=[methods(inputs.neurons)])
    yield from _distributions(inputs)
    if inputs.matrix is not None:
        yield Section("Perplexity", figures=[matrix_figures.changes(inputs.matrix)])
    if inputs.sweep is not None:
        pairs = inputs.sweep.summary()
        yield Section(
            "Steering",
            languages_in_question(inputs.sweep.metadata, inputs.sweep.codes.values()),
            figures=_drawn(sweep_figures.rates(pairs), sweep_figures.kinds(pairs)),
        )
    if inputs.sampled is not None:
        yield Section(
            "Texts from nothing",
            languages_in_question(
                inputs.sampled.metadata, [row.language for row in inputs.sampled.rows]
            ),
            figures=[sampling_figures.languages(inputs.sampled)],
        )
    if inputs.experts is not None:
        yield _experts(inputs.experts)
    if inputs.pruning is not None:
        pruned = matrix_figures.changes(inputs.pruning, "pruning")
        own = matrix_figures.own_texts(inputs.pruning)
        yield Section("Pruning of experts", figures=_drawn(pruned, own))
    if inputs.sharing is not None:
        yield _sharing(inputs.sharing)
    if inputs.deactivation is not None:
        figures = [
            sharing_figures.deactivations(inputs.deactivation, quantity, f"deactivation-{quantity}")
            for quantity in ("accuracy", "nll")
        ]
        yield Section("Categories deactivated", figures=figures)


def _drawn(*figures: Figure | None) -> list[Figure]:
    return [one for one in figures if one is not None]


def _measured(inputs: Inputs) -> Section:
    tables = {}
    texts = _texts(inputs)
    if texts.rows:
        tables["Texts"] = texts
    settings = [
        [name, setting, _brief(value)]
        for name, metadata in inputs.described().items()
        for setting, value in _flat(metadata)
        if setting not in ("corpora", "notes") and value not in (None, {}, [])
    ]
    settings += [
        [name, "note", str(note)]
        for name, metadata in inputs.described().items()
        for note in metadata.get("notes") or ()
    ]
    if settings:
        tables["Settings and versions"] = Table(["of", "setting", "value"], settings)
    return Section(
        "What was measured", tables=tables, commands=commands(inputs.described(), inputs.files)
    )


def _texts(inputs: Inputs) -> Table:
    """What each input was measured on, label by label; columns that would be empty are left out."""
    rows, described = [], inputs.described()
    for name, metadata in described.items():
        corpora = metadata.get("corpora") or ()
        method, full, _ = name.partition(" in full")
        if full and corpora == described.get(method, {}).get("corpora"):
            continue  # they stand there already, with the neurons
        tokens: dict[str, int] = {}
        if name == "profile":
            tokens = dict(zip(inputs.profile.labels, inputs.profile.tokens.tolist(), strict=True))
        elif name in ("matrix", "pruning"):
            matrix = getattr(inputs, name)
            tokens = dict(zip(matrix.columns, matrix.tokens, strict=True))
        prompts = metadata.get("prompts") or {}
        done = {"cut": "cut", "drop": "dropped"}.get(metadata.get("longer"), "")
        for label in dict.fromkeys([*tokens, *prompts, *(one["label"] for one in corpora)]):
            own = [one for one in corpora if one["label"] == label]
            documents, longer, empty = (
                sum(one[key] for one in own) if own and all(key in one for one in own) else None
                for key in ("documents", "longer", "empty")
            )
            sources = [public_name(one["source"]) for one in own if one.get("source") is not None]
            if label in prompts and metadata.get("prompts_source"):
                sources.append(metadata["prompts_source"])
            rows.append(
                [
                    name,
                    label,
                    tokens.get(label),
                    prompts.get(label),
                    documents,
                    empty,
                    None if longer is None else f"{longer} {done}".strip(),
                    ", ".join(dict.fromkeys(sources)) or None,
                ]
            )
    header = ["of", "label", "tokens", "prompts", "documents", "empty texts"]
    header += ["longer documents", "corpora"]
    kept = [place for place in range(8) if any(row[place] is not None for row in rows)]
    return Table([header[one] for one in kept], [[row[one] for one in kept] for row in rows])


def _neurons(name: str, neurons: NeuronSets, suffix: str) -> Section:
    title = f"Neurons: {name}" if suffix else "Neurons"
    if not any(one.total for one in neurons.values()):
        return Section(title, "No neuron belongs to any label here.")
    figures = [neuron_figures.counts(neurons, f"neurons{suffix}")]
    if len(neurons) > 1:
        figures += [
            neuron_figures.overlap(neurons, f"overlap{suffix}"),
            neuron_figures.intersections(neurons, f"intersections{suffix}"),
        ]
    return Section(title, figures=figures)


def _suffixes(names: Iterable[str]) -> dict[str, str]:
    """Name -> what the names of its figures end with, fit for files; nothing for a single one."""
    names = list(names)
    suffixes = dict.fromkeys(names, "")
    for number, name in enumerate(names if len(names) > 1 else (), 1):
        suffix = "-" + (re.sub("[^a-z0-9.]+", "-", name.lower()).strip("-.")[:40] or str(number))
        while suffix in suffixes.values():
            suffix += f"-{number}"
        suffixes[name] = suffix
    return suffixes


def _distributions(inputs: Inputs) -> Iterator[Section]:
    """What LAPE cut, of each neuron file that it made; its published constants without any."""
    profile = inputs.profile
    if profile is None or "counts" not in profile.statistics or len(profile.labels) < 2:
        return
    made = {
        name: one.metadata.get("parameters")
        for name, one in inputs.neurons.items()
        if one.metadata.get("method") == "lape"
    }
    by = "LAPE" if made else "LAPE, with its published constants"
    made = made or {"": {}}
    suffixes = _suffixes(made)
    for name, parameters in made.items():
        if not isinstance(parameters, dict):
            raise InputError(f"the neurons {name} lack LAPE's parameters; identify them again")
        rates = {key: parameters[key] for key in _RATES if key in parameters}
        found = criteria(profile, **rates)
        suffix = suffixes[name]
        figures = [
            lape_figures.entropies(found, f"entropy{suffix}"),
            lape_figures.probabilities(found, f"probability{suffix}"),
        ]
        if in_every_shard(profile):
            stable = stability(profile, partial(lape, **rates))
            figures.append(stability_figures.overlaps(stable, f"stability{suffix}"))
        yield Section(
            f"Distributions and thresholds of {by}" + (f": {name}" if suffix else ""),
            figures=figures,
        )


def _experts(experts: Experts) -> Section:
    if len(experts.labels) == 1:
        frequency = expert_figures.frequencies(experts.labels, experts.frequency.numpy())
        return Section("Experts", figures=[frequency])
    # Labels whose experts are alike stand together.
    order = experts.order()
    rows = [experts.labels.index(label) for label in order]
    similarity, jaccard = (
        one.numpy()[rows][:, rows] for one in (experts.similarity(), experts.jaccard())
    )
    figures = [
        expert_figures.frequencies(order, experts.frequency.numpy()[rows]),
        expert_figures.similarities(
            order,
            similarity,
            "Similarity of labels",
            "Cosine similarity of two labels' frequencies of experts; similar labels stand "
            "together, beside the families of their languages where these are known.",
            "experts-similarity",
            experts.families(),
        ),
        expert_figures.similarities(
            order,
            jaccard,
            "Jaccard index of experts",
            "Experts that two labels choose most often, whether other labels choose them too or "
            "not: the shared ones as a share of all that either chooses most often.",
            "experts-jaccard",
        ),
    ]
    return Section("Experts", figures=figures)


def _sharing(sharing: Sharing) -> Section:
    from lapefast.detect import Category

    least, largest = sharing.share_range.unbind(-1)
    names = [category.title for category in Category]
    values = [one.numpy().T for one in (sharing.shares, least, largest)]
    figures = [sharing_figures.categories(names, *values)]
    if len(sharing.thresholds) > 1:
        swept = sharing.sweep.numpy()  # [thresholds, layers, categories]
        figures.append(
            sharing_figures.categories(
                names,
                *(of.T for of in (swept.mean(1), swept.min(1), swept.max(1))),
                "sharing-thresholds",
                "Sharing by threshold",
                "The same where a neuron counts as active above other thresholds. Line: the mean "
                "over layers; band: from the least to the largest layer.",
                "threshold",
                [f"{threshold:g}" for threshold in sharing.thresholds],
            )
        )
    if sharing.contribution is not None:
        figures.append(
            sharing_figures.categories(
                names,
                *(of.numpy().T for of in sharing.contribution.over_labels()),
                "sharing-contribution",
                "Categories of the neurons that contribute most",
                "The share of each category among the neurons of a layer that contribute most to "
                "the residual stream. Line: the mean over prompts; band: from the least to the "
                "largest of a prompt.",
            )
        )
    if sharing.effective is not None:
        figures.append(
            sharing_figures.categories(
                names,
                *(of.numpy().T for of in sharing.effective.over_labels()),
                "sharing-effective",
                "Effective scores of each category",
                "How far the neurons of a category push the residual stream of a prompt's last "
                "token towards its answer: the sum of their effective scores in a layer. Line: the "
                "mean over prompts; band: from the least to the largest of a prompt.",
                amount="sum of effective scores",
            )
        )
    return Section("Sharing", figures=figures)


def _check(inputs: Inputs) -> None:
    if not inputs.described():
        raise InputError("a report needs something to report; give a profile or neurons, say")
    for name, of_experts in (("matrix", False), ("pruning", True)):
        matrix = getattr(inputs, name)
        if matrix is not None and matrix.of_experts != of_experts:
            raise InputError(
                "a matrix of neurons deactivated is a report's matrix, and one of experts pruned "
                "its pruning; they were given the other way"
            )
    prints = {name: one.get("fingerprint") for name, one in inputs.described().items()}
    prints |= {name: one.fingerprint for name, one in inputs.neurons.items()}
    known = {name: value for name, value in prints.items() if value}
    for name, value in known.items():
        first, other = next(iter(known.items()))
        if value != other:
            raise InputError(
                f"a report is of one model, but {first} and {name} are of two (their fingerprints "
                "differ); make one report for each"
            )


def _flat(metadata: Mapping[str, Any], before: str = "") -> Iterator[tuple[str, Any]]:
    """Settings within settings by the names of both."""
    for key, value in metadata.items():
        if isinstance(value, dict) and value:
            yield from _flat(value, f"{before}{key}: ")
        else:
            yield f"{before}{key}", value


def _brief(value: Any) -> str:
    return public_name(value) if isinstance(value, str) else json.dumps(value, ensure_ascii=False)

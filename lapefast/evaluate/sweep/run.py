"""The run of a sweep."""

from __future__ import annotations

import os
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from torch import nn

from lapefast.errors import InputError
from lapefast.evaluate.language import LanguageIdentifier
from lapefast.evaluate.likelihood import TokenLikelihood
from lapefast.evaluate.prompts import read_prompts
from lapefast.evaluate.sweep.plan import Plan, Steers
from lapefast.evaluate.sweep.result import Sweep
from lapefast.neurons import NeuronSets
from lapefast.profiles import Profile
from lapefast.profiling.about import about_run
from lapefast.steering.diffmean import ResidualMeans
from lapefast.steering.sequences import Where

__all__ = ["sweep"]

Prompts = Mapping[str, Sequence[str]] | str | os.PathLike[str]


def sweep(
    model: nn.Module,
    neurons: NeuronSets,
    profile: Profile,
    prompts: Prompts,
    tokenizer: Any,
    *,
    means: ResidualMeans | None = None,
    pairs: Iterable[tuple[str, str]] | None = None,
    max_new_tokens: int = 32,
    batch_size: int = 128,
    where: Where = "all",
    random_sets: int = 5,
    strength: float = 1.0,
    shift_layers: Sequence[int | str] | None = None,
    languages: Mapping[str, str] | None = None,
    restrict: bool = True,
    seed: int = 0,
    progress: bool = True,
) -> Sweep:
    """Steer prompts of each source label to each target label, and tell the answers' languages.

    For each pair the source's neurons are deactivated and the target's set to their means over the
    target's text; where a neuron is both's, it is activated. Of a label and itself, it is activated
    only. The same is done with random sets of equal size per layer and, if residual means are
    given, with DiffMean. Decoding is greedy; all pairs share batches, whose sequences have an edit
    each.

    Args:
        model: a causal language model with its head.
        neurons: the neuron sets; published ones are bound to the model.
        profile: with sums, for the targets' means.
        prompts: label -> texts in that label's language; or a file of JSON lines with the fields
            ``label`` and ``prompt``.
        tokenizer: the model's.
        means: for DiffMean, made by `lapefast.residual_means`.
        pairs: (source, target), distinct; None takes all pairs of the neurons' labels.
        max_new_tokens: per prompt.
        batch_size: sequences per batch.
        where: at which positions edits hold; see `lapefast.steer`.
        random_sets: how many; each label has its own, used wherever the label is.
        strength, shift_layers: of DiffMean; see `ResidualMeans.towards`.
        languages: label -> code of its language, where it is not the label itself.
        restrict: tell languages apart among the pairs' alone; see `LanguageIdentifier`.
        seed: of the random sets.
        progress: show bars.

    Raises:
        InputError: the model continues no text, neurons, profile or means do not fit it, a label
            has no neurons, prompts or known language, or a likelihood is not finite.
    """
    if type(random_sets) is not int or random_sets < 0:
        raise InputError(f"random_sets must be an integer of at least 0, got {random_sets!r}")
    neurons = neurons.bind(model)
    chosen = _pairs(neurons, pairs)
    labels = list(dict.fromkeys(label for pair in chosen for label in pair))
    texts = _texts(prompts, list(dict.fromkeys(source for source, _ in chosen)))
    if profile.fingerprint not in (None, neurons.fingerprint):
        raise InputError(
            "the profile is of another model than the one given (their fingerprints differ); "
            "profile this one"
        )
    identifier = LanguageIdentifier(labels, languages, restrict)
    likelihood = TokenLikelihood(model)
    plan = Plan(tokenizer)
    steers = Steers(neurons, profile, labels, random_sets, seed)
    for source in texts:
        plan.add(source, None, "unedited", None, texts[source], None)
    for source, target in chosen:
        edit = steers.edit(source, target)
        plan.add(source, target, "edited", None, texts[source], edit)
        for index in range(random_sets):
            edit = steers.edit(source, target, index)
            plan.add(source, target, "random", index, texts[source], edit)
        if means is not None:
            shift = steers.shift(means, target, shift_layers, strength)
            plan.add(source, target, "diffmean", None, texts[source], shift)
    rows = plan.run(
        model,
        likelihood,
        identifier,
        progress,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        where=where,
    )
    return Sweep(
        chosen,
        rows,
        {pair: steers.overlap(*pair) for pair in chosen},
        identifier.codes,
        {
            **about_run(model, tokenizer),
            "neurons_method": neurons.metadata.get("method"),
            "neurons": {label: neurons[label].total for label in labels},
            "pairs": None if pairs is None else [list(pair) for pair in chosen],
            "prompts": {source: len(given) for source, given in texts.items()},
            "prompts_source": None if isinstance(prompts, Mapping) else Path(prompts).name,
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "where": where,
            "random_sets": random_sets,
            "languages": dict(languages or {}),
            "restrict": identifier.restricted,
            "seed": seed,
            **({} if means is None else _about_shift(means, shift_layers, strength)),
        },
    )


def _about_shift(
    means: ResidualMeans, layers: Sequence[int | str] | None, strength: float
) -> dict[str, Any]:
    """The settings of DiffMean, and the texts that its means are of."""
    texts = {name: means.metadata.get(name) for name in ("corpora", "seq_len")}
    return {"strength": strength, "shift_layers": layers and list(layers), **texts}


def _pairs(neurons: NeuronSets, pairs: Iterable[tuple[str, str]] | None) -> list[tuple[str, str]]:
    if pairs is None:
        chosen = [(source, target) for source in neurons.labels for target in neurons.labels]
    else:
        chosen = [tuple(pair) for pair in pairs]
        if not all(len(pair) == 2 for pair in chosen) or len(set(chosen)) < len(chosen):
            raise InputError(f"pairs must be distinct pairs of labels, got {chosen}")
    if not chosen:
        raise InputError("a sweep needs at least one pair of labels, got none")
    for label in dict.fromkeys(label for pair in chosen for label in pair):
        if label not in neurons:
            raise InputError(
                f"there are no neurons of label {label!r}; there are some of "
                f"{', '.join(neurons.labels)}"
            )
        if not neurons[label].total:
            raise InputError(
                f"the label {label!r} has no neurons, so nothing would be edited; leave it out of "
                "the pairs, or find neurons with a larger top_rate"
            )
    return chosen


def _texts(prompts: Prompts, sources: Sequence[str]) -> dict[str, list[str]]:
    given = prompts if isinstance(prompts, Mapping) else read_prompts(prompts)
    texts = {}
    for source in sources:
        found = given.get(source, ())
        if isinstance(found, str) or not all(isinstance(one, str) and one for one in found):
            raise InputError(
                f"prompts of label {source!r} must be a list of texts that say something"
            )
        if not len(found):
            raise InputError(f"there are no prompts of label {source!r}; give some in its language")
        texts[source] = list(found)
    return texts

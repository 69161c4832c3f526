"""How often texts that a model makes up are in a language, before and after neurons are set.

Kojima et al., NAACL 2024, arXiv 2404.02431, section 4: the model writes from nothing.
"""

from __future__ import annotations

import os
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field
from typing import Any

import torch
from torch import nn

from lapefast.errors import InputError
from lapefast.evaluate.language import LanguageIdentifier
from lapefast.evaluate.random_sets import random_like
from lapefast.evaluate.result_file import ResultFile
from lapefast.models.bare import unwrap
from lapefast.models.inputs import input_device
from lapefast.neurons import Edit, NeuronSet, NeuronSets, activate
from lapefast.profiling.about import about_run
from lapefast.steering.continuations import check_temperature, continuations, generating

__all__ = ["SampledLanguage", "SampledLanguages", "sampled_languages"]

_FILE = ResultFile("sampling file", "lapefast sampled languages")


@dataclass(frozen=True)
class SampledLanguage:
    """One label.

    Attributes:
        label, language: the label, and its language's code.
        before, after: share of texts identified as that language, 0 to 1, of the unedited model
            and with the label's neurons set to their values.
        random: the share of each random set: as many neurons per site, given the same values.
        texts: what the edited model wrote.
    """

    label: str
    language: str
    before: float
    after: float
    random: list[float]
    texts: list[str]

    @property
    def random_mean(self) -> float | None:
        """Mean over the random sets; None without any."""
        return statistics.fmean(self.random) if self.random else None


@dataclass(frozen=True)
class SampledLanguages:
    """What `sampled_languages` found: a row per label, and how it was found."""

    rows: list[SampledLanguage]
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON. Raises InputError where the file cannot be written."""
        _FILE.write(path, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> SampledLanguages:
        """Read what `save` wrote. Raises InputError for anything else."""
        return _FILE.read(
            path,
            lambda content: cls(
                [SampledLanguage(**row) for row in content["rows"]], content["metadata"]
            ),
        )

    def to_pandas(self) -> Any:
        """A row per label, as a `pandas.DataFrame`; random: mean, least and largest."""
        import pandas

        return pandas.DataFrame(
            [
                {
                    "label": row.label,
                    "language": row.language,
                    "before": row.before,
                    "after": row.after,
                    "random": row.random_mean,
                    "random_least": min(row.random, default=None),
                    "random_largest": max(row.random, default=None),
                }
                for row in self.rows
            ]
        )


def sampled_languages(
    model: nn.Module,
    tokenizer: Any,
    neurons: NeuronSets,
    values: Mapping[str, Mapping[str, Any]] | None = None,
    samples: int = 100,
    max_new_tokens: int = 64,
    temperature: float = 0.8,
    random_sets: int = 5,
    seed: int = 0,
    batch_size: int = 128,
    languages: Mapping[str, str] | None = None,
    restrict: bool = False,
    progress: bool = True,
) -> SampledLanguages:
    """Sample texts from an empty prompt and identify them, with and without neurons set.

    Args:
        model: a causal language model.
        tokenizer: the model's; an empty text must give a token to begin with.
        neurons: of any method; each label's are set in turn, at every position.
        values: label -> site -> one value per neuron. None asks ``neurons.medians(label)``, which
            `lapefast.detect.average_precision` gives.
        samples: texts per label.
        max_new_tokens: tokens per text.
        temperature: of the sampling, over the whole distribution.
        random_sets: how many random sets each label's is compared with.
        seed: of samples and random sets; before and after are drawn alike.
        batch_size: texts per batch. Another one draws other texts.
        languages: label -> code of its language, for labels that are none.
        restrict: whether texts can be in the labels' languages only; see
            `lapefast.evaluate.language.LanguageIdentifier`.
        progress: show a bar.

    Raises:
        InputError: the neurons do not fit the model or have no values, an empty prompt has no
            token, or an argument is out of range.
    """
    for name, value, least in (("samples", samples, 1), ("random_sets", random_sets, 0)):
        if type(value) is not int or value < least:
            raise InputError(f"{name} must be an integer of at least {least}, got {value!r}")
    check_temperature(temperature)
    if not isinstance(neurons, NeuronSets):
        raise InputError(f"neurons must be NeuronSets, got {type(neurons).__name__}")
    identify = LanguageIdentifier(neurons.labels, languages, restrict)
    prompt = _beginning(model, tokenizer)
    generator = torch.Generator().manual_seed(seed)

    device = input_device(model)
    drawing = [device] if device.type == "cuda" else []

    def write(edit: Edit | None) -> list[str]:
        with torch.random.fork_rng(drawing):
            torch.manual_seed(seed)
            tokens = continuations(
                model,
                [(prompt, edit)] * samples,
                max_new_tokens=max_new_tokens,
                batch_size=batch_size,
                progress=bar,
                do_sample=True,
                temperature=float(temperature),
                top_k=0,
                top_p=1.0,
            )
        return tokenizer.batch_decode(tokens, skip_special_tokens=True)

    def share(texts: Sequence[str], label: str) -> float:
        return sum(identify(text) == identify.codes[label] for text in texts) / len(texts)

    with generating(samples * (1 + len(neurons) * (1 + random_sets)), progress) as bar:
        unedited, rows = write(None), []
        for label, found in neurons.items():
            table = _values(neurons, values, label)
            if not found.total:
                raise InputError(f"label {label!r} has no neurons to set; leave it out")
            texts = write(activate(found, table))
            random = [
                share(write(_shuffled(found, table, generator)), label) for _ in range(random_sets)
            ]
            rows.append(
                SampledLanguage(
                    label,
                    identify.codes[label],
                    share(unedited, label),
                    share(texts, label),
                    random,
                    texts,
                )
            )
    return SampledLanguages(
        rows,
        {
            **about_run(model, tokenizer),
            "neurons_method": neurons.metadata.get("method"),
            "neurons": {label: neurons[label].total for label in neurons},
            "values": "medians" if values is None else "given",
            "samples": samples,
            "max_new_tokens": max_new_tokens,
            "temperature": temperature,
            "random_sets": random_sets,
            "seed": seed,
            "batch_size": batch_size,
            "languages": dict(languages or {}),
            "restrict": identify.restricted,
        },
    )


def _values(neurons: NeuronSets, values: Mapping | None, label: str) -> Mapping[str, Any]:
    if values is not None:
        if label not in values:
            raise InputError(f"there are no values for label {label!r}; give some for every label")
        return values[label]
    medians = getattr(neurons, "medians", None)
    if medians is None:
        raise InputError(
            "these neurons know no values to be set to; give some, such as "
            "values={label: profile.means(label)}"
        )
    return medians(label)


def _shuffled(found: NeuronSet, values: Mapping[str, Any], generator: torch.Generator) -> Edit:
    """Random neurons, as many in each site, given the values of the label's in random order."""
    drawn = random_like(found, generator)
    tables = {}
    for site, indices in drawn.items():
        own = torch.as_tensor(values[site]).flatten()[found[site]]
        table = torch.zeros(found.widths[site], dtype=own.dtype)
        table[indices] = own[torch.randperm(len(own), generator=generator)]
        tables[site] = table
    return activate(drawn, tables)


def _beginning(model: nn.Module, tokenizer: Any) -> list[int]:
    """The tokens of an empty prompt: the tokenizer's own, or the one that begins a text."""
    ids = list(tokenizer("")["input_ids"])
    if ids:
        return ids
    config = getattr(unwrap(model), "config", None)
    known = (
        getattr(tokenizer, "bos_token_id", None),
        getattr(config, "bos_token_id", None),
        getattr(tokenizer, "eos_token_id", None),
    )
    first = next((one for one in known if one is not None), None)
    if first is None:
        raise InputError(
            f"{type(tokenizer).__name__} has no token that begins a text, so nothing can be "
            "written from an empty prompt"
        )
    return [first]

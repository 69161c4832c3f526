"""The sweep: steering from every language to every other, and how often it gets there.

Tang et al., ACL 2024, arXiv 2402.16438, section 4.4: the neurons of the language that a prompt is
in are deactivated and those of another one activated, and the language of the answer is looked at.
"""

from __future__ import annotations

import json
import math
import os
from collections import defaultdict
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, field, fields
from typing import Any

import torch
from torch import nn

from lapefast import __version__, display
from lapefast.errors import InputError
from lapefast.evaluate.language import LanguageIdentifier
from lapefast.evaluate.likelihood import TokenLikelihood
from lapefast.evaluate.prompts import read_prompts
from lapefast.evaluate.random_sets import random_like
from lapefast.files import write_atomically
from lapefast.neurons import Edit, NeuronSet, NeuronSets, activate, deactivate
from lapefast.profiles import Profile
from lapefast.steering.continuations import continuations
from lapefast.steering.diffmean import ResidualMeans
from lapefast.steering.sequences import Where
from lapefast.steering.shifts import Shift

__all__ = ["Outcome", "PairSummary", "Sweep", "SweepRow", "mean_of_pairs", "sweep"]

Prompts = Mapping[str, Sequence[str]] | str | os.PathLike[str]
_Ids = tuple[int, ...]


@dataclass(frozen=True)
class SweepRow:
    """One generation.

    Attributes:
        source: label of the prompt's language.
        target: label that was steered to; None for the unedited model.
        kind: "unedited"; "edited": the source's neurons deactivated and the target's activated;
            "random": the same with random sets of equal size per layer; "diffmean": the residual
            stream shifted towards the target.
        set: index of the random set; None for the other kinds.
        prompt, text: given and generated.
        tokens: ids of the generated tokens, the one that ends a text included.
        language: code of the text's language; None where it has no letter to tell it by.
        nll: mean of -ln p per generated token under the unedited model, given the prompt, in nats.
    """

    source: str
    target: str | None
    kind: str
    set: int | None
    prompt: str
    text: str
    tokens: list[int]
    language: str | None
    nll: float


@dataclass(frozen=True)
class Outcome:
    """Of one kind of generations of a pair.

    Attributes:
        share: of the texts, how many are in the target's language, 0 to 1.
        perplexity: of the generated tokens under the unedited model.
    """

    share: float
    perplexity: float


@dataclass(frozen=True)
class PairSummary:
    """One pair: what became of the source's prompts.

    Attributes:
        overlap: neurons of the source that are also the target's, and so are activated; for a
            label and itself, where nothing is deactivated, 0.
        random: one per random set.
        diffmean: None where no residual means were given.
    """

    source: str
    target: str
    overlap: int
    unedited: Outcome
    edited: Outcome
    random: list[Outcome]
    diffmean: Outcome | None

    @property
    def random_mean(self) -> Outcome | None:
        """Means over the random sets; None without any."""
        if not self.random:
            return None
        count = len(self.random)
        return Outcome(
            sum(one.share for one in self.random) / count,
            sum(one.perplexity for one in self.random) / count,
        )

    @property
    def random_range(self) -> tuple[float, float] | None:
        """The least and the largest share of a random set; None without any."""
        shares = [one.share for one in self.random]
        return (min(shares), max(shares)) if shares else None


@dataclass
class Sweep:
    """What `sweep` found.

    Attributes:
        pairs: (source, target), in order.
        rows: every generation.
        overlaps: pair -> neurons of both, where the target's activation holds.
        codes: label -> code of its language.
        metadata: JSON-able settings.
    """

    pairs: list[tuple[str, str]]
    rows: list[SweepRow]
    overlaps: dict[tuple[str, str], int]
    codes: dict[str, str]
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write every generation as one line of JSON. Raises InputError where it cannot."""
        lines = [json.dumps(asdict(row), ensure_ascii=False) + "\n" for row in self.rows]
        with write_atomically(path) as temporary:
            temporary.write_text("".join(lines), "utf-8", newline="\n")

    def summary(self) -> list[PairSummary]:
        """Share of texts in the target's language, and perplexities, of each pair."""
        rows = defaultdict(list)
        for row in self.rows:
            rows[row.source, row.target, row.kind, row.set].append(row)

        def outcome(source: str, target: str, kind: str, index: int | None = None) -> Outcome:
            given = rows[source, None if kind == "unedited" else target, kind, index]
            code = self.codes[target]
            tokens = sum(len(row.tokens) for row in given)
            nll = sum(row.nll * len(row.tokens) for row in given) / tokens
            return Outcome(sum(row.language == code for row in given) / len(given), _exp(nll))

        return [
            PairSummary(
                *pair,
                self.overlaps[pair],
                outcome(*pair, "unedited"),
                outcome(*pair, "edited"),
                [outcome(*pair, "random", index) for index in range(self.metadata["random_sets"])],
                outcome(*pair, "diffmean") if (*pair, "diffmean", None) in rows else None,
            )
            for pair in self.pairs
        ]

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row per generation; its columns are `SweepRow`'s."""
        import pandas

        names = [one.name for one in fields(SweepRow)]
        return pandas.DataFrame([asdict(row) for row in self.rows], columns=names)

    def _repr_html_(self) -> str:
        shares = {(pair.source, pair.target): pair.edited.share for pair in self.summary()}
        sources, targets = (list(dict.fromkeys(side)) for side in zip(*self.pairs, strict=True))
        rows = [[shares.get((source, target)) for target in targets] for source in sources]
        return display.table(
            "Share of answers in the language steered to (columns), by the prompt's (rows)",
            ["", *targets],
            [
                [source, *("" if share is None else f"{share:.0%}" for share in row)]
                for source, row in zip(sources, rows, strict=True)
            ],
            [[share or 0.0 for share in row] for row in rows],
        )


def mean_of_pairs(pairs: Sequence[PairSummary]) -> PairSummary | None:
    """Means over the pairs of two different labels; None without any."""
    pairs = [pair for pair in pairs if pair.source != pair.target]
    if not pairs:
        return None

    def mean(outcomes: Sequence[Outcome]) -> Outcome:
        return Outcome(
            sum(one.share for one in outcomes) / len(outcomes),
            sum(one.perplexity for one in outcomes) / len(outcomes),
        )

    return PairSummary(
        "mean",
        "others",
        round(sum(pair.overlap for pair in pairs) / len(pairs)),
        mean([pair.unedited for pair in pairs]),
        mean([pair.edited for pair in pairs]),
        [mean(sets) for sets in zip(*(pair.random for pair in pairs), strict=True)],
        mean([pair.diffmean for pair in pairs]) if pairs[0].diffmean else None,
    )


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
    plan = _Plan(tokenizer)
    steers = _Steers(neurons, profile, labels, random_sets, seed)
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
            "model": neurons.layout.model,
            "fingerprint": neurons.fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."),
            "neurons": {label: neurons[label].total for label in labels},
            "prompts": {source: len(given) for source, given in texts.items()},
            "max_new_tokens": max_new_tokens,
            "batch_size": batch_size,
            "where": where,
            "random_sets": random_sets,
            "strength": strength,
            "shift_layers": None if shift_layers is None else list(shift_layers),
            "restrict": restrict,
            "seed": seed,
            "threads": torch.get_num_threads(),
            "lapefast": __version__,
            "torch": torch.__version__,
        },
    )


class _Steers:
    """The edits and shifts of a sweep; what is equal is one object, and so placed once a batch."""

    def __init__(
        self, neurons: NeuronSets, profile: Profile, labels: Sequence[str], random: int, seed: int
    ) -> None:
        self._profile, self._neurons = profile, neurons
        self._means: dict[str, dict[str, torch.Tensor]] = {}
        self._known: dict[Any, Edit] = {}
        self._shifts: dict[str, Shift] = {}
        generator = torch.Generator().manual_seed(seed)
        self._random = {
            label: [random_like(neurons[label], generator) for _ in range(random)]
            for label in labels
        }

    def edit(self, source: str, target: str, index: int | None = None) -> Edit:
        """The pair's edit, of its own neurons or of a random set."""
        activated = activate(self._set(target, index), self._of(target))
        if source == target:
            edit = activated
        else:
            edit = deactivate(self._set(source, index)) | activated
        key = tuple(
            (site, *(column.numpy().tobytes() for column in table))
            for site, table in edit.tables.items()
        )
        return self._known.setdefault(key, edit)

    def overlap(self, source: str, target: str) -> int:
        if source == target:
            return 0
        off, on = deactivate(self._set(source, None)), activate(self._set(target, None), 0.0)
        return off.overlap(on)

    def shift(
        self,
        means: ResidualMeans,
        target: str,
        layers: Sequence[int | str] | None,
        strength: float,
    ) -> Shift:
        if target not in self._shifts:
            self._shifts[target] = means.towards(target, layers, strength)
        return self._shifts[target]

    def _set(self, label: str, index: int | None) -> NeuronSet:
        return self._neurons[label] if index is None else self._random[label][index]

    def _of(self, label: str) -> dict[str, torch.Tensor]:
        if label not in self._means:
            self._means[label] = self._profile.means(label)
        return self._means[label]


class _Plan:
    """Rows to be filled; those of one prompt and one edit are generated once."""

    def __init__(self, tokenizer: Any) -> None:
        self._tokenizer = tokenizer
        self._rows: list[tuple[dict[str, Any], tuple[_Ids, int]]] = []
        self._requests: dict[tuple[_Ids, int], tuple[_Ids, Edit | Shift | None]] = {}
        self._ids: dict[str, _Ids] = {}

    def add(
        self,
        source: str,
        target: str | None,
        kind: str,
        index: int | None,
        prompts: Sequence[str],
        edit: Edit | Shift | None,
    ) -> None:
        for prompt in prompts:
            if prompt not in self._ids:
                self._ids[prompt] = tuple(self._tokenizer(prompt).input_ids)
            key = (self._ids[prompt], id(edit))
            self._requests.setdefault(key, (key[0], edit))
            about = {"source": source, "target": target, "kind": kind, "set": index}
            self._rows.append(({**about, "prompt": prompt}, key))

    def run(
        self,
        model: nn.Module,
        likelihood: TokenLikelihood,
        identifier: LanguageIdentifier,
        progress: bool,
        **options: Any,
    ) -> list[SweepRow]:
        generated = continuations(
            model, list(self._requests.values()), progress=progress, **options
        )
        found = dict(zip(self._requests, generated, strict=True))
        losses = _losses(
            likelihood,
            {(ids, tuple(found[ids, edit])) for ids, edit in found},
            options["batch_size"],
        )
        rows = []
        for about, key in self._rows:
            tokens = found[key]
            text = self._tokenizer.decode(tokens, skip_special_tokens=True)
            nll = losses[key[0], tuple(tokens)]
            if not math.isfinite(nll):
                raise InputError(
                    f"the likelihood of what was generated from a prompt of label "
                    f"{about['source']!r} is not finite (NaN or infinite); check the model's "
                    "weights or use a wider dtype"
                )
            rows.append(
                SweepRow(**about, text=text, tokens=tokens, language=identifier(text), nll=nll)
            )
        return rows


def _losses(
    likelihood: TokenLikelihood, texts: set[tuple[_Ids, _Ids]], batch_size: int
) -> dict[tuple[_Ids, _Ids], float]:
    """(prompt, generated) -> the mean of -ln p of the generated tokens."""
    # Sorted by length, and then by content: sums must not depend on the order of a set.
    order = sorted(texts, key=lambda text: (len(text[0]) + len(text[1]), text))
    losses = {}
    for start in range(0, len(order), batch_size):
        batch = order[start : start + batch_size]
        length = max(len(prompt) + len(new) for prompt, new in batch)
        rows = torch.zeros(len(batch), length, dtype=torch.int64)
        counted = torch.zeros(len(batch), length, dtype=torch.bool)
        for row, (prompt, new) in enumerate(batch):
            end = len(prompt) + len(new)
            rows[row, :end] = torch.tensor(prompt + new)
            rows[row, end:] = rows[row, 0]
            counted[row, len(prompt) : end] = True
        sums = likelihood.of_each(rows, counted).tolist()
        losses |= {text: total / len(text[1]) for text, total in zip(batch, sums, strict=True)}
    return losses


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


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf

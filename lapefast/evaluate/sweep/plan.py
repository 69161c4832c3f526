"""What is generated in a sweep: each prompt under each edit, once."""

from __future__ import annotations

import math
from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from lapefast.errors import InputError
from lapefast.evaluate.language import LanguageIdentifier
from lapefast.evaluate.likelihood import TokenLikelihood
from lapefast.evaluate.random_sets import random_like
from lapefast.evaluate.sweep.result import SweepRow
from lapefast.neurons import Edit, NeuronSet, NeuronSets, activate, deactivate
from lapefast.profiles import Profile
from lapefast.steering.continuations import continuations
from lapefast.steering.diffmean import ResidualMeans
from lapefast.steering.shifts import Shift

__all__ = ["Plan", "Steers"]

_Ids = tuple[int, ...]


class Steers:
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


class Plan:
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

"""How far a selection of neurons would be the same after far more text of the same kind.

With more text, what was counted in n tokens moves by about as much as it did on the way from a
random half of them to the whole: a half's mean varies around the whole's by s^2 (2/n - 1/n), and
the whole's around the truth by s^2 / n, which is as much. So the overlap of what half of the shards
select with what all of them do is distributed as the overlap of the latter with what far more text
would select, however the neurons of a row depend on each other. No rate of convergence is taken for
granted, only that rows are independent: where one text fills many rows, such as a book, each shard
has its share of it, and the selection looks more stable than it is.
"""

from __future__ import annotations

import logging
import os
import threading
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor

from lapefast import __version__, display
from lapefast.detect.lape import lape
from lapefast.errors import InputError
from lapefast.neurons import NeuronSet, NeuronSets
from lapefast.neurons.documents import Document, as_text, require
from lapefast.neurons.layout import Layout
from lapefast.profiles import SHARDS, Profile

__all__ = ["Select", "Stability", "UntilStable", "in_every_shard", "stability"]

Select = Callable[[Profile], NeuronSets]
"""A detector that needs no more than a profile's counts, such as `lapefast.detect.lape`."""

_RESAMPLES = 20
_SIZES = (1, 2, 4, SHARDS)  # shards, doubling
_DOCUMENT = Document("lapefast stability", 1, "stability file", "lapefast stability")

_WIDTH = 3
"""Standard deviations from the expected overlap to either end of the interval. By Cantelli's
inequality any random quantity lies above its mean less 3 of them in at least 9 of 10 cases."""


@dataclass(frozen=True, eq=False)
class Stability:
    """The overlap of each label's neurons with those that far more text would select.

    Overlap is the Jaccard index: neurons in common among those of either, 1 where neither has any.

    Attributes:
        labels: in the profile's order.
        tokens: tokens of each label, int64 [counts, labels], doubling: a quarter of those of the
            profile, half of them, all of them.
        neurons: how many all tokens select, int64 [labels].
        overlaps: float64 [resamples, counts, labels], each distributed as the overlap of the
            selection from so many tokens with that from far more.
        layout: the sites of the model.
        metadata: method, parameters, resamples and seed, as JSON.
    """

    labels: list[str]
    tokens: Tensor
    neurons: Tensor
    overlaps: Tensor
    layout: Layout
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def expected(self) -> Tensor:
        """The mean overlap, float64 [counts, labels]."""
        return self.overlaps.mean(0)

    @property
    def interval(self) -> Tensor:
        """Where the overlap lies, float64 [counts, labels, 2]: 3 standard deviations either way.

        Of a few neurons all resamples may happen to choose the same. With half the tokens overlaps
        vary more, so theirs is the deviation where it is larger.
        """
        deviation = self.overlaps.std(0)
        margin = _WIDTH * torch.cat([deviation[:1], deviation[1:].maximum(deviation[:-1])])
        ends = torch.stack([self.expected - margin, self.expected + margin], dim=-1)
        return ends.clamp(0, 1)

    @property
    def announced(self) -> dict[str, float]:
        """Label -> the overlap that all tokens reach in at least 9 of 10 cases: its lower end."""
        return dict(zip(self.labels, self.interval[-1, :, 0].tolist(), strict=True))

    def stable(self, target: float) -> list[str]:
        """The labels whose announced overlap is at least ``target``."""
        return [label for label, overlap in self.announced.items() if overlap >= target]

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row per number of tokens and label.

        Columns: ``label``, ``tokens``, ``expected``, ``least``, ``largest`` (of the interval).
        """
        import pandas

        expected, interval = self.expected.tolist(), self.interval.tolist()
        rows = [
            (label, tokens, expected[count][column], *interval[count][column])
            for count, of_labels in enumerate(self.tokens.tolist())
            for column, (label, tokens) in enumerate(zip(self.labels, of_labels, strict=True))
        ]
        return pandas.DataFrame(rows, columns=["label", "tokens", "expected", "least", "largest"])

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON. Raises InputError where the file cannot be written."""
        entries = {
            "metadata": self.metadata,
            "labels": self.labels,
            "tokens": self.tokens.tolist(),
            "neurons": self.neurons.tolist(),
            "overlaps": self.overlaps.tolist(),
        }
        _DOCUMENT.write(
            path, self.layout, {name: as_text(value) for name, value in entries.items()}
        )

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Stability:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, cut short, damaged, of another kind or version.
        """
        return _DOCUMENT.read(path, _parsed)

    def _repr_html_(self) -> str:
        columns = (self.tokens[-1], self.neurons, self.expected[-1], self.interval[-1])
        return display.table(
            "Overlap of each label's neurons with those of far more text",
            ["label", "tokens", "neurons", "expected", "at least"],
            [
                [label, f"{tokens:,}", f"{neurons:,}", f"{mean:.3f}", f"{ends[0]:.3f}"]
                for label, tokens, neurons, mean, ends in zip(
                    self.labels, *(column.tolist() for column in columns), strict=True
                )
            ],
            torch.stack([self.expected[-1], self.interval[-1, :, 0]], dim=-1).tolist(),
        )

    def __repr__(self) -> str:
        announced = ", ".join(f"{label}: {one:.3f}" for label, one in self.announced.items())
        return f"Stability(overlap of at least {announced})"


def stability(
    profile: Profile, select: Select = lape, resamples: int = _RESAMPLES, seed: int = 0
) -> Stability:
    """How far the neurons that a profile selects are those that far more text would select.

    Shards of every label are drawn one after the other, and neurons are selected from the first 1,
    2, 4 and all 8 of them.

    Args:
        profile: with ``shard_counts``, and text of each label in every shard: 8 rows or more.
        select: from a profile of some of its shards, which holds counts alone;
            `functools.partial(lapefast.detect.lape, top_rate=0.05)`, for instance.
        resamples: how often shards are drawn, at least 2; each takes 3 selections.
        seed: of the draws.

    Raises:
        InputError: the profile has no shard counts, or a label too few rows, or ``select`` refuses
            the profile.
    """
    if type(resamples) is not int or resamples < 2:
        raise InputError(f"resamples must be an integer of at least 2, got {resamples!r}")
    _ = profile.shard_counts  # says what is missing
    if not in_every_shard(profile):
        fewest = min(
            zip(profile.labels, profile.tokens.tolist(), strict=True), key=lambda one: one[1]
        )
        raise InputError(
            f"stability needs {SHARDS} rows of every label, one for each shard, but some label has "
            f"fewer (the least text, {fewest[1]} tokens, is of {fewest[0]!r}); add text or use a "
            "shorter seq_len"
        )
    generator = torch.Generator().manual_seed(seed)
    found = select(profile)
    whole, overlaps = _members(found), []
    with _quiet:  # the selection from all shards has said what there is to say
        for _ in range(resamples):
            order = torch.stack(
                [torch.randperm(SHARDS, generator=generator) for _ in profile.labels]
            )
            nested = [_members(select(profile.of_shards(order[:, :n]))) for n in _SIZES[:-1]]
            nested.append(whole)
            overlaps.append(
                [
                    [_jaccard(half[label], double[label]) for label in profile.labels]
                    for half, double in zip(nested[:-1], nested[1:], strict=True)
                ]
            )
    return Stability(
        profile.labels,
        torch.stack([profile.tokens * size // SHARDS for size in _SIZES[1:]]),
        torch.tensor([found[label].total for label in profile.labels]),
        torch.tensor(overlaps, dtype=torch.float64),
        found.layout,
        {
            "method": found.metadata.get("method"),
            "parameters": found.metadata.get("parameters"),
            "resamples": resamples,
            "seed": seed,
            "lapefast": __version__,
        },
    )


def in_every_shard(profile: Profile) -> bool:
    """Whether a profile holds shards, and text of every label in each: what `stability` needs."""
    if not profile.shard_tokens:
        return False
    return all(bool(profile.shard_tokens[stack].all()) for stack in profile.stack_tokens)


class UntilStable:
    """Whether every label's neurons are stable: what `lapefast.profile` takes as ``until``.

    Args:
        target: the overlap that has to be announced for each label, over 0 and at most 1.
        select: see `stability`.

    Attributes:
        stability: as it was found last; None before there were rows for it.

    Raises:
        InputError: the target is out of range.
    """

    def __init__(self, target: float, select: Select = lape) -> None:
        if not 0 < target <= 1:
            raise InputError(f"the overlap to reach must be over 0 and at most 1, got {target}")
        self.target = target
        self.stability: Stability | None = None
        self._select = select

    def __call__(self, profile: Profile) -> bool:
        _ = profile.shard_counts  # says what is missing
        if not in_every_shard(profile):
            return False
        self.stability = stability(profile, self._select)
        return self.reached

    @property
    def settings(self) -> dict[str, Any]:
        """What tells it from another, as JSON."""
        select = self._select
        function = getattr(select, "func", select)
        name = getattr(function, "__qualname__", type(function).__qualname__)
        return {"overlap": self.target, "select": name, **getattr(select, "keywords", {})}

    @property
    def reached(self) -> bool:
        """Whether every label was there when asked last; not where nothing was selected at all."""
        found = self.stability
        if found is None or not found.neurons.any():
            return False
        return found.stable(self.target) == found.labels

    @property
    def metadata(self) -> dict[str, Any]:
        """What a profile says of it, as JSON."""
        announced = None if self.stability is None else self.stability.announced
        return {
            "until_stable": {
                "overlap": self.target,
                "reached": self.reached,
                "announced": announced,
                "method": self.stability and self.stability.metadata["method"],
                "parameters": self.stability and self.stability.metadata["parameters"],
            }
        }


def _members(neurons: NeuronSets) -> dict[str, set[tuple[Any, int]]]:
    def of(one: NeuronSet) -> Iterator[tuple[Any, int]]:
        return ((site, index) for site, indices in one.items() for index in indices.tolist())

    return {label: set(of(one)) for label, one in neurons.items()}


def _jaccard(a: set, b: set) -> float:
    return len(a & b) / len(a | b) if a or b else 1.0


class _Quiet:
    """Without the detectors' warnings, in every thread as long as one is within."""

    def __init__(self) -> None:
        self._log, self._lock = logging.getLogger("lapefast.detect"), threading.Lock()
        self._within = 0

    def __enter__(self) -> None:
        with self._lock:
            if not self._within:
                self._before = self._log.level
                self._log.setLevel(logging.ERROR)
            self._within += 1

    def __exit__(self, *exception: object) -> None:
        with self._lock:
            self._within -= 1
            if not self._within:
                self._log.setLevel(self._before)


_quiet = _Quiet()


def _parsed(content: Mapping[str, Any], layout: Layout) -> Stability:
    labels = content["labels"]
    tokens = torch.tensor(content["tokens"], dtype=torch.int64)
    neurons = torch.tensor(content["neurons"], dtype=torch.int64)
    overlaps = torch.tensor(content["overlaps"], dtype=torch.float64)
    require(bool(labels) and neurons.shape == (len(labels),), "labels are missing")
    require(tokens.dim() == 2, "tokens are missing")
    require(overlaps.dim() == 3 and overlaps.shape[1:] == tokens.shape, "overlaps are missing")
    require(tokens.shape[1] == len(labels), "tokens are of other labels")
    require(bool(((overlaps >= 0) & (overlaps <= 1)).all()), "an overlap is not between 0 and 1")
    return Stability(labels, tokens, neurons, overlaps, layout, content["metadata"])

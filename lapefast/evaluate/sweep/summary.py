"""What became of each pair of a sweep."""

from __future__ import annotations

import math
from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from typing import TYPE_CHECKING

if TYPE_CHECKING:
    from lapefast.evaluate.sweep.result import Sweep

__all__ = ["Outcome", "PairSummary", "mean_of_pairs", "summarised"]


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


def summarised(sweep: Sweep) -> list[PairSummary]:
    """Share of texts in the target's language, and perplexities, of each pair."""
    rows = defaultdict(list)
    for row in sweep.rows:
        rows[row.source, row.target, row.kind, row.set].append(row)

    def outcome(source: str, target: str, kind: str, index: int | None = None) -> Outcome:
        given = rows[source, None if kind == "unedited" else target, kind, index]
        code = sweep.codes[target]
        tokens = sum(len(row.tokens) for row in given)
        nll = sum(row.nll * len(row.tokens) for row in given) / tokens
        return Outcome(sum(row.language == code for row in given) / len(given), _exp(nll))

    return [
        PairSummary(
            *pair,
            sweep.overlaps[pair],
            outcome(*pair, "unedited"),
            outcome(*pair, "edited"),
            [outcome(*pair, "random", index) for index in range(sweep.metadata["random_sets"])],
            outcome(*pair, "diffmean") if (*pair, "diffmean", None) in rows else None,
        )
        for pair in sweep.pairs
    ]


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


def _exp(value: float) -> float:
    return math.exp(value) if value < 700 else math.inf

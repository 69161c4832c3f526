"""Whether the overlap that `lapefast.evaluate.stability` announces is met with far more text.

    python benchmarks/stability.py synthetic    # known probabilities
    python benchmarks/stability.py demo         # the demo model on fresh text

Some minutes each.

A trial is a profile of some text. Its announced overlaps are met if each label's neurons have at
least that overlap with those that the known probabilities, or all the rest of the text, select.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from functools import partial

import numpy as np
import torch

import lapefast as lf
from lapefast.evaluate.stability import Select, Stability
from lapefast.models.sites import Site
from lapefast.profiles import SHARDS

_TOPICS = 8
_EXACT = 10**12  # tokens that say a probability to the last digit that matters


@dataclass(frozen=True)
class Case:
    """A made-up model and text.

    Attributes:
        labels, neurons: how many.
        length: tokens of a row.
        rows: rows of a label.
        specific: share of the neurons that are active for one label most of all.
    """

    labels: int
    neurons: int
    length: int
    rows: int
    specific: float


CASES = [
    Case(3, 2000, 128, 16, 0.02),
    Case(4, 5000, 64, 64, 0.01),
    Case(5, 8000, 256, 64, 0.05),
    Case(7, 20000, 128, 32, 0.01),
    Case(7, 20000, 512, 256, 0.02),
    Case(3, 20000, 1024, 1024, 0.02),
]

# The overlap at which a pass stops by itself, and how many rows it reads at most.
UNTIL = [(CASES[1], 0.8, 2**13), (CASES[5], 0.95, 2**13), (CASES[5], 0.98, 2**17)]


@dataclass(frozen=True)
class Trial:
    """What was announced, and what came true: label -> overlap."""

    stability: Stability
    actual: Mapping[str, float]

    @property
    def met(self) -> list[bool]:
        """Of each label."""
        return [self.actual[label] >= one for label, one in self.stability.announced.items()]


class Language:
    """Known probabilities, and text whose rows differ: each is of one of some topics.

    A topic moves every neuron's rate; over the topics, which are as frequent as each other, its
    mean is the known probability.
    """

    def __init__(self, case: Case, seed: int) -> None:
        self.case, self.generator = case, np.random.default_rng(seed)
        draw = self.generator
        spread = draw.choice([0.05, 0.2, 0.6], case.neurons)
        rates = draw.beta(1, 5, case.neurons) * np.exp(
            spread * draw.normal(size=(case.labels, case.neurons))
        )
        specific = np.flatnonzero(draw.random(case.neurons) < case.specific)
        rates[:, specific] *= draw.uniform(0.02, 0.5, len(specific))
        own = draw.integers(0, case.labels, len(specific))
        rates[own, specific] = draw.uniform(0.2, 2, len(specific))
        self.rates = 0.25 * (1 - np.exp(-rates))  # a topic may take a rate to 4 times its mean
        factors = draw.uniform(0.25, 1.75, (case.labels, _TOPICS, case.neurons))
        self.topics = self.rates[:, None] * factors / factors.mean(1, keepdims=True)

    def known(self) -> lf.Profile:
        """The probabilities, as counts of very many tokens."""
        counts = torch.from_numpy(np.round(self.rates * _EXACT).astype(np.int64))
        return self._profile(counts, torch.full((self.case.labels,), _EXACT))

    def read(self, rows: int) -> lf.Profile:
        """So many rows more of each label, dealt to the shards."""
        case = self.case
        counts = torch.zeros(case.labels, SHARDS, case.neurons, dtype=torch.int32)
        dealt = np.bincount(np.arange(rows) % SHARDS, minlength=SHARDS)
        for label in range(case.labels):
            for shard, held in enumerate(dealt):
                of_topic = self.generator.multinomial(held, [1 / _TOPICS] * _TOPICS)
                active = self.generator.binomial(
                    of_topic[:, None] * case.length, self.topics[label]
                )
                counts[label, shard] = torch.from_numpy(active.sum(0))
        tokens = torch.from_numpy(dealt * case.length).expand(case.labels, SHARDS).contiguous()
        return self._profile(counts.sum(1), tokens.sum(1), counts, tokens)

    def _profile(self, counts, tokens, shard_counts=None, shard_tokens=None) -> lf.Profile:
        labels = [f"label {label}" for label in range(self.case.labels)]
        statistics = {"counts": {"ffn": counts}}
        if shard_counts is not None:
            statistics["shard_counts"] = {"ffn": shard_counts}
            shard_tokens = {"decoder": shard_tokens}
        sites = [Site("ffn", self.case.neurons, "SiLU")]
        return lf.Profile(labels, sites, {"decoder": tokens}, statistics, shard_tokens=shard_tokens)


def synthetic(case: Case, seed: int) -> Trial:
    """One trial of a profile of the case's rows."""
    language = Language(case, seed)
    return trial(language.read(case.rows), language.known())


def stopped(case: Case, seed: int, target: float, most: int) -> tuple[Trial, int] | None:
    """A trial of the text at which a pass stops by itself, and its rows; None: not in so many."""
    language, rows = Language(case, seed), SHARDS
    until = lf.evaluate.UntilStable(target)
    profile = language.read(rows)
    while not until(profile):
        if rows >= most:
            return None
        profile += language.read(rows)
        rows *= 2
    return trial(profile, language.known()), rows


def demo(portions: int = 48, rows: int = 16) -> Iterator[tuple[str, list[Trial]]]:
    """Trials of the demo model by tokens per label: each portion of a text against all others."""
    from lapefast.demo import TOP_RATE, load
    from lapefast.demo.text import compose

    made, length = load(progress=False), 128
    texts = {}
    for label in made.train:
        # Fresh text of one source: what one text repeats (names, amounts), another may not.
        documents = compose(label, 45 * portions * rows // 4, 7)
        ids = [token for one in documents for token in made.tokenizer(one)["input_ids"]]
        ids = ids[: portions * rows * length]
        texts[label] = torch.tensor(ids).view(portions, rows, length)
    parts = [
        lf.profile(
            made.model,
            {label: of[portion] for label, of in texts.items()},
            batch_size=8,
            statistics=("counts", "shard_counts"),
            progress=False,
        )
        for portion in range(portions)
    ]
    select = partial(lf.detect.lape, top_rate=TOP_RATE)
    for size in (1, 2, 4):
        joined = [_sum(parts[at : at + size]) for at in range(0, portions, size)]
        yield (
            f"{size * rows * length:,}",
            [
                trial(one, _sum([*joined[:at], *joined[at + 1 :]]), select)
                for at, one in enumerate(joined[:12])
            ],
        )


def trial(profile: lf.Profile, more: lf.Profile, select: Select = lf.detect.lape) -> Trial:
    """The stability of one profile, and the overlap of its neurons with the other's."""
    compared = lf.compare(select(profile), select(more))
    # Where neither has any neuron they agree, which a comparison of methods does not count.
    agree = compared.jaccard.diagonal().where(compared.sizes_a + compared.sizes_b > 0, 1.0)
    actual = dict(zip(profile.labels, agree.tolist(), strict=True))
    return Trial(lf.evaluate.stability(profile, select), actual)


def row(what: str, trials: Sequence[Trial], target: float | None = None) -> str:
    """A row of the table: means over trials and labels, and how many met what was announced.

    With a target: how many met that, at which the pass stopped.
    """
    of_trials = [
        each.met if target is None else [one >= target for one in each.actual.values()]
        for each in trials
    ]
    met = sum(of_trials, [])
    values = [
        np.mean([[*each.actual.values()] for each in trials]),
        np.mean([each.stability.expected[-1].tolist() for each in trials]),
        np.mean([[*each.stability.announced.values()] for each in trials]),
    ]
    cells = [what, *(f"{one:.3f}" for one in values), f"{sum(met)} of {len(met)}"]
    cells.append(f"{sum(map(all, of_trials))} of {len(trials)}")
    return f"| {' | '.join(cells)} |"


def _sum(profiles: Sequence[lf.Profile]) -> lf.Profile:
    total, *others = profiles
    for one in others:
        total += one
    return total


def main(what: str, count: int = 10) -> None:
    """Print the tables."""
    print(
        "| text | overlap | expected | announced | labels that met it | trials all of whose did |"
    )
    print("|---|---|---|---|---|---|", flush=True)
    if what == "demo":
        for tokens, trials in demo():
            print(row(f"{tokens} tokens", trials), flush=True)
        return
    for case in CASES:
        name = f"{case.labels} labels, {case.neurons:,} neurons, {case.rows} rows of {case.length}"
        print(row(name, [synthetic(case, seed) for seed in range(count)]), flush=True)
    for case, target, most in UNTIL:
        runs = [stopped(case, seed, target, most) for seed in range(count)]
        ended = [one for one in runs if one is not None]
        rows = sorted(rows for _, rows in ended)
        name = f"until {target}: {case.labels} labels, {case.neurons:,} neurons, rows of "
        name += f"{case.length}; {len(ended)} of {count} stopped, at {rows[0]} to {rows[-1]} rows"
        print(row(name, [one for one, _ in ended], target), flush=True)


if __name__ == "__main__":
    main(*sys.argv[1:])

"""Inputs of reports, made of random numbers."""

from __future__ import annotations

import math
from dataclasses import replace

import pytest
import torch
from report_inputs import FINGERPRINT, LABELS, LAYERS, TOKENS, WIDTH

from lapefast.detect import Experts, Sharing, lape
from lapefast.evaluate import CategoryDeactivation, PerplexityMatrix, SampledLanguages
from lapefast.evaluate.categories import CategoryRow
from lapefast.evaluate.sampling import SampledLanguage
from lapefast.evaluate.sweep import PairSummary, Sweep, SweepRow
from lapefast.models.sites import Site
from lapefast.neurons import NeuronSets
from lapefast.profiles import Profile


@pytest.fixture
def profile() -> Profile:
    generator = torch.Generator().manual_seed(0)
    sites = [Site(f"layers.{layer}.mlp", WIDTH, "SiLU") for layer in range(LAYERS)]
    counts = {
        site.name: torch.randint(0, TOKENS + 1, (len(LABELS), WIDTH), generator=generator)
        for site in sites
    }
    counts["layers.0.mlp"][:, 0] = 0
    corpora = [
        {"label": label, "source": f"/home/me/{row}.txt", "rows": [0, 10], "tokens": TOKENS}
        for row, label in enumerate(LABELS)
    ]
    return Profile(
        LABELS,
        sites,
        {"decoder": torch.full((len(LABELS),), TOKENS)},
        {"counts": counts},
        {
            "model": "some/model",
            "fingerprint": FINGERPRINT,
            "threshold": 0.0,
            "corpora": corpora,
            "versions": {"lapefast": "0.1.0"},
        },
    )


@pytest.fixture
def neurons(profile):
    return lape(profile, top_rate=0.2, filter_rate=0.5, activation_bar_ratio=0.6)


@pytest.fixture
def matrix() -> PerplexityMatrix:
    generator = torch.Generator().manual_seed(1)
    shape = (len(LABELS) + 1, len(LABELS))
    nll = 2 + torch.rand(shape, dtype=torch.float64, generator=generator)
    ranges = torch.stack([nll - 0.1, nll + 0.1], dim=-1)
    return PerplexityMatrix(
        ["none", *LABELS], LABELS, nll, nll, ranges, [9] * 4, {"fingerprint": FINGERPRINT}
    )


@pytest.fixture
def sweep() -> Sweep:
    """Eight prompts of each label: a share of 1 / 8 unedited, and (1 + row + column) / 8 edited."""
    codes = dict(zip(LABELS, ("en", "zh", "ar", "fr"), strict=True))

    def rows(source, target, kind, index, languages, perplexity):
        about = source, target, kind, index, "p", "t", [1, 2]
        return [SweepRow(*about, language, math.log(perplexity)) for language in languages]

    def reached(target, count):
        return [codes[target]] * count + [None] * (8 - count)

    found, pairs = [], [(source, target) for source in LABELS for target in LABELS]
    for source in LABELS:
        languages = [*codes.values(), *[None] * 4]
        found += rows(source, None, "unedited", None, languages, 3.0)
    for source, target in pairs:
        count = 1 + LABELS.index(source) + LABELS.index(target)
        found += rows(source, target, "edited", None, reached(target, count), 4.5)
        found += rows(source, target, "random", 0, reached(target, 2), 3.5)
        found += rows(source, target, "random", 1, reached(target, 3), 3.25)
    metadata = {"random_sets": 2, "fingerprint": FINGERPRINT, "prompts": dict.fromkeys(LABELS, 8)}
    return Sweep(pairs, found, dict.fromkeys(pairs, 0), codes, metadata)


@pytest.fixture
def pairs(sweep) -> list[PairSummary]:
    return sweep.summary()


@pytest.fixture
def sampled() -> SampledLanguages:
    rows = [
        SampledLanguage(label, "en", 0.125, (1 + row) / 8, [0.25, 0.375], ["t"] * 8)
        for row, label in enumerate(LABELS)
    ]
    return SampledLanguages(rows, {"fingerprint": FINGERPRINT})


@pytest.fixture
def pruning(matrix) -> PerplexityMatrix:
    return replace(matrix, metadata={**matrix.metadata, "pruning": "frequency", "rate": 0.25})


@pytest.fixture
def deactivation() -> CategoryDeactivation:
    rows = [
        CategoryRow(name, label, 4, 8, at * 2.5, 1.0 + at, 1 / (1 + at), random, random)
        for label in LABELS
        for at, (name, random) in enumerate([("none", []), ("specific", [0.25, 0.75])])
    ]
    return CategoryDeactivation(rows, {"fingerprint": FINGERPRINT})


@pytest.fixture
def experts(profile) -> Experts:
    generator = torch.Generator().manual_seed(0)
    return Experts(
        LABELS,
        {site: torch.arange(40) % 8 for site in profile.sites},
        torch.randint(0, 100, (4, 3, 8), generator=generator),
        torch.full((4, 3), 100),
    )


@pytest.fixture
def sharing(neurons) -> Sharing:
    counts = torch.randint(0, 14, (5, 3, 4), generator=torch.Generator().manual_seed(1))
    counts[..., 3] = 40 - counts[..., :3].sum(-1)
    return Sharing(
        LABELS,
        counts,
        [0.0],
        counts.sum(0)[None],
        neurons,
        NeuronSets({}, neurons.layout),
        None,
        None,
    )

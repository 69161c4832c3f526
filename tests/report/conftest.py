"""Inputs of reports, made of random numbers."""

from __future__ import annotations

import pytest
import torch
from report_inputs import FINGERPRINT, LABELS, LAYERS, TOKENS, WIDTH

from lapefast.detect import Experts, Sharing, lape
from lapefast.evaluate import PerplexityMatrix
from lapefast.evaluate.sweep import Outcome, PairSummary
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
def pairs() -> list[PairSummary]:
    return [
        PairSummary(
            source,
            target,
            0,
            Outcome(0.125, 3.0),
            Outcome((1 + row + column) / 8, 4.5),
            [Outcome(0.25, 3.5), Outcome(0.375, 3.25)],
            None,
        )
        for row, source in enumerate(LABELS)
        for column, target in enumerate(LABELS)
    ]


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

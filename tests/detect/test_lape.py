from __future__ import annotations

import logging

import numpy as np
import pytest
import torch

from lapefast.detect import lape
from lapefast.errors import InputError
from lapefast.models.sites import Site
from lapefast.profiles import Profile

LABELS = ["en", "zh", "fr", "es", "vi", "id", "ja"]


def make(counts, tokens, **metadata):
    """A profile from one integer array [labels, width] per site."""
    sites = [Site(f"layers.{layer}.mlp", c.shape[1], "SiLU") for layer, c in enumerate(counts)]
    by_site = {s.name: torch.as_tensor(c).long() for s, c in zip(sites, counts, strict=True)}
    labels = LABELS[: len(tokens)]
    return Profile(labels, sites, {"decoder": torch.tensor(tokens)}, {"counts": by_site}, metadata)


def found(neurons):
    return {label: [layer.tolist() for layer in neurons.layers(label)] for label in neurons}


def union(neurons):
    return {
        (site, index)
        for one in neurons.values()
        for site, indices in one.items()
        for index in indices.tolist()
    }


def by_definition(profile, top_rate, filter_rate, activation_bar_ratio):
    """The paper's selection by plain loops and full sorts, float64."""
    tokens = profile.tokens.tolist()
    neurons = [
        (layer, index, [count / n for count, n in zip(column, tokens, strict=True)])
        for layer, site in enumerate(profile.sites)
        for index, column in enumerate(profile.counts[site].T.tolist())
    ]
    values = sorted(p for *_, probabilities in neurons for p in probabilities)
    v = values[round(filter_rate * len(values)) - 1]
    bar = values[round(activation_bar_ratio * len(values)) - 1]
    scored = []
    for layer, index, probabilities in neurons:
        if any(p > v for p in probabilities):
            total = entropy = 0.0
            for p in probabilities:
                total += p
            for p in probabilities:
                entropy -= p / total * float(np.log(p / total)) if p > 0 else 0.0
            scored.append((entropy, layer, index, probabilities))
    kept = sorted(scored)[: round(top_rate * len(neurons))]
    return {
        label: [
            sorted(index for _, at, index, p in kept if at == layer and p[row] > bar)
            for layer in range(len(profile.sites))
        ]
        for row, label in enumerate(profile.labels)
    }


def as_released(profile, top_rate, filter_rate, activation_bar_ratio):
    """The released selection, step by step on [layers, neurons, labels]; equal widths only."""
    over_zero = profile.published_counts().to(torch.int32)
    n = profile.tokens
    layers, width, labels = over_zero.shape
    probabilities = over_zero / n
    assert probabilities.dtype == torch.float32
    normed = probabilities / probabilities.sum(dim=-1, keepdim=True)
    normed[torch.isnan(normed)] = 0
    log_probabilities = torch.where(normed > 0, normed.log(), 0)
    entropy = -torch.sum(normed * log_probabilities, dim=-1)
    assert not torch.isnan(entropy).any()
    flat = probabilities.flatten()
    v = flat.kthvalue(round(len(flat) * filter_rate)).values.item()
    entropy[(probabilities > v).sum(dim=-1) == 0] = torch.inf
    index = entropy.flatten().topk(round(entropy.numel() * top_rate), largest=False).indices
    row, column = index // width, index % width
    bar = flat.kthvalue(round(len(flat) * activation_bar_ratio)).values.item()
    member = probabilities[row, column].T > bar
    result = {}
    for label in range(labels):
        rows, columns = row[member[label]].tolist(), column[member[label]].tolist()
        chosen = sorted(zip(rows, columns, strict=True))
        result[profile.labels[label]] = [[c for r, c in chosen if r == la] for la in range(layers)]
    return result


def random_profile(seed):
    """Ragged or equal widths; few or many ties; zeros; small counts or counts above 2^24."""
    generator = np.random.default_rng(seed)
    labels = int(generator.integers(2, 8))
    widths = generator.integers(1, 60, generator.integers(1, 6))
    if seed % 2:
        widths[:] = widths[0]
    scale = [3, 50, 10_000, 2**27][seed % 4]
    tokens = (
        np.full(labels, scale) if seed % 3 == 0 else generator.integers(scale, 2 * scale, labels)
    )
    counts = []
    for width in widths:
        share = generator.random((labels, width)) ** 3 * (generator.random((labels, width)) < 0.7)
        share[:, generator.random(width) < 0.2] = 0
        share[:, generator.random(width) < 0.2] = share[:, :1]
        counts.append((share * tokens[:, None]).astype(np.int64))
    return make(counts, tokens.tolist())


@pytest.mark.parametrize("seed", range(60))
def test_the_papers_form_is_the_definition(seed):
    profile = random_profile(seed)
    for rates in [(0.01, 0.95, 0.95), (0.2, 0.5, 0.8), (0.5, 0.6, 0.4), (1.0, 0.9, 1.0)]:
        assert found(lape(profile, *rates)) == by_definition(profile, *rates), rates


@pytest.mark.parametrize("seed", range(1, 60, 2))
def test_the_released_form_is_the_released_codes_selection(seed):
    profile = random_profile(seed)
    for rates in [(0.01, 0.95, 0.95), (0.2, 0.5, 0.8), (0.5, 0.6, 0.4), (1.0, 0.9, 1.0)]:
        expected = as_released(profile, *rates)
        assert found(lape(profile, *rates, form="released")) == expected, rates


def test_the_released_form_holds_on_widths_that_split_over_threads():
    # Above torch's grain of 32,768 elements a reduction is shared out between threads.
    generator = np.random.default_rng(0)
    tokens = [2**25 + 7 * k for k in range(7)]
    counts = [(generator.random((7, 11_008)) ** 4 * tokens[0]).astype(np.int64) for _ in range(4)]
    profile = make(counts, tokens)
    expected = as_released(profile, 0.01, 0.95, 0.95)
    assert found(lape(profile, form="released")) == expected


def test_float32_makes_ties_that_float64_does_not():
    counts = np.full((2, 100), 3 * 2**24)
    counts[1] = 0
    counts[0, 40] += 1
    profile = make([counts], [2**26, 2**26])
    rates = {"top_rate": 0.01, "filter_rate": 0.995, "activation_bar_ratio": 0.995}
    assert found(lape(profile, **rates)) == {"en": [[40]], "zh": [[]]}
    assert found(lape(profile, **rates, form="released")) == {"en": [[]], "zh": [[]]}


@pytest.mark.parametrize("width", [1, 7, 8, 33, 1000])
def test_ties_are_broken_by_layer_and_then_index_at_any_width(width):
    column = np.array([[61], [47], [13]])
    profile = make([np.repeat(column, width, axis=1)] * 3 + [np.zeros((3, 5 * width))], [97] * 3)
    neurons = lape(profile, top_rate=0.15, filter_rate=0.7, activation_bar_ratio=0.7)
    asked = round(0.15 * 8 * width)
    flat = [layer * width + index for layer in range(3) for index in found(neurons)["en"][layer]]
    assert flat == list(range(asked))


def test_the_union_over_labels_is_exactly_the_share_asked_for():
    generator = np.random.default_rng(1)
    counts = [generator.integers(0, 10**6, (7, 11_008)) for _ in range(32)]
    neurons = lape(make(counts, [10**6] * 7))
    assert len(union(neurons)) == 3523
    assert neurons.metadata["notes"] == []


def test_a_neuron_that_is_never_active_is_never_chosen():
    counts = np.zeros((2, 200), dtype=np.int64)
    counts[0, 7] = 5
    counts[1, 9] = 5
    neurons = lape(make([counts], [10, 10]), top_rate=0.5)
    assert found(neurons) == {"en": [[7]], "zh": [[9]]}


def test_fewer_neurons_than_asked_for_is_said(caplog):
    counts = np.zeros((2, 200), dtype=np.int64)
    counts[0, 7] = 5
    with caplog.at_level(logging.WARNING, logger="lapefast"):
        neurons = lape(make([counts], [10, 10]))
    note = "2 neurons were asked for (top_rate 0.01), but only 1 are active often enough"
    assert neurons.metadata["notes"][0].startswith(note)
    assert note in caplog.text
    assert len(union(neurons)) == 1


@pytest.mark.parametrize("form", ["paper", "released"])
def test_labels_without_neurons_keep_their_place_the_last_one_too(form):
    counts = np.zeros((4, 300), dtype=np.int64)
    counts[1, :3] = 9
    neurons = lape(make([counts, counts * 0], [10] * 4), form=form)
    assert neurons.labels == ["en", "zh", "fr", "es"]
    assert found(neurons)["zh"] == [[0, 1, 2], []]
    for label in ("en", "fr", "es"):
        assert found(neurons)[label] == [[], []]
        assert all(layer.dtype == torch.int64 for layer in neurons.layers(label))


def test_a_neuron_belongs_to_every_label_above_the_bar():
    counts = np.zeros((3, 100), dtype=np.int64)
    counts[:2, 0] = 9
    neurons = lape(make([counts], [10] * 3))
    assert found(neurons) == {"en": [[0]], "zh": [[0]], "fr": [[]]}


def test_the_result_knows_its_model_and_how_it_was_made():
    profile = random_profile(4)
    profile.metadata.update(model="org/model", fingerprint="f" * 64)
    neurons = lape(profile, top_rate=0.1, form="released")
    assert neurons.sites == profile.sites
    assert neurons.widths == {site.name: site.width for site in profile.site_info}
    assert neurons.fingerprint == "f" * 64
    assert neurons.layout.model == "org/model"
    assert neurons.metadata["method"] == "lape"
    assert neurons.metadata["parameters"] == {
        "form": "released",
        "top_rate": 0.1,
        "filter_rate": 0.95,
        "activation_bar_ratio": 0.95,
    }


def test_each_site_is_measured_by_the_tokens_that_passed_it():
    sites = [Site("enc", 10, "ReLU", "encoder"), Site("dec", 10, "ReLU", "decoder")]
    counts = {site.name: torch.zeros(2, 10, dtype=torch.int64) for site in sites}
    counts["enc"][0, 0], counts["dec"][0, 0] = 50, 9
    tokens = {"encoder": torch.tensor([100, 100]), "decoder": torch.tensor([10, 10])}
    profile = Profile(["en", "zh"], sites, tokens, {"counts": counts})
    neurons = lape(profile, top_rate=0.05, filter_rate=0.975, activation_bar_ratio=0.975)
    assert found(neurons)["en"] == [[], [0]]


def test_one_label_is_refused():
    with pytest.raises(InputError, match="needs at least two, but the profile has only 'en'"):
        lape(make([np.ones((1, 10))], [10]))


def test_a_label_without_tokens_is_refused():
    counts = np.zeros((2, 10))
    with pytest.raises(InputError, match="no tokens of label 'zh'"):
        lape(make([counts], [10, 0]))


def test_a_profile_without_counts_is_refused():
    sums = {"sums": {"a": torch.ones(2, 3, dtype=torch.float64)}}
    tokens = {"decoder": torch.tensor([5, 5])}
    with pytest.raises(InputError, match="no counts"):
        lape(Profile(["en", "zh"], [Site("a", 3, "SiLU")], tokens, sums))


@pytest.mark.parametrize("name", ["top_rate", "filter_rate", "activation_bar_ratio"])
@pytest.mark.parametrize("rate", [0.0, -0.1, 1.1, float("nan")])
def test_a_rate_out_of_range_is_refused(name, rate):
    with pytest.raises(InputError, match=f"{name} must be over 0 and at most 1"):
        lape(random_profile(0), **{name: rate})


@pytest.mark.parametrize("name", ["filter_rate", "activation_bar_ratio"])
def test_a_rate_too_small_to_name_a_value_is_refused(name):
    with pytest.raises(InputError, match=f"{name} 0.001 of 20 probabilities is none of them"):
        lape(make([np.ones((2, 10))], [10, 10]), **{name: 0.001})


def test_an_unknown_form_is_refused():
    with pytest.raises(InputError, match="'paper' or 'released', got 'other'"):
        lape(random_profile(0), form="other")

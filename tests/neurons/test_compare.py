"""Overlap of methods and languages, against Python's own sets."""

from __future__ import annotations

import pytest
import torch

import lapefast as lf
from lapefast.errors import InputError
from lapefast.neurons import Layout, NeuronSets

LAYOUT = Layout(("layers.0.mlp", "layers.1.mlp"), {"layers.0.mlp": 16, "layers.1.mlp": 20}, "f")


def random_sets(seed, labels=("en", "zh", "ja"), layout=LAYOUT):
    generator = torch.Generator().manual_seed(seed)
    neurons = {
        label: {
            site: torch.randperm(layout.widths[site], generator=generator)[: seed % 3 + 4]
            for site in layout.sites
        }
        for label in labels
    }
    return NeuronSets(neurons, layout, {"method": f"method {seed}"})


def pairs(neurons):
    return {(site, int(i)) for site, indices in neurons.items() for i in indices}


def test_every_pair_is_counted():
    a, b = random_sets(0), random_sets(1, ("fr", "en"))
    found = lf.compare(a, b)
    for i, one in enumerate(a):
        for j, other in enumerate(b):
            first, second = pairs(a[one]), pairs(b[other])
            assert int(found.common[i, j]) == len(first & second)
            assert float(found.jaccard[i, j]) == len(first & second) / len(first | second)
            smaller = min(len(first), len(second))
            assert float(found.share_of_smaller[i, j]) == len(first & second) / smaller
    assert (found.labels_a, found.labels_b) == (a.labels, b.labels)
    assert found.methods == ("method 0", "method 1")
    assert torch.equal(sum(found.common_by_site.values()), found.common)
    table = found.to_pandas()
    assert len(table) == 6
    assert table["common"].sum() == int(found.common.sum())


def test_a_result_with_itself_shows_how_languages_overlap():
    sets = random_sets(2)
    found = lf.compare(sets, sets)
    assert torch.equal(found.common.diagonal(), found.sizes_a)
    assert torch.equal(found.common, found.common.T)
    assert bool((found.jaccard.diagonal() == 1).all())


def test_empty_sets_overlap_with_nothing():
    empty = NeuronSets({"en": {}, "zh": {}}, LAYOUT)
    found = lf.compare(empty, random_sets(0))
    assert not found.common.any()
    assert not found.jaccard.any()
    assert not lf.compare(empty, empty).jaccard.any()


def test_outputs_inside_an_ffn_count_as_its_neurons():
    linear = Layout(
        ("layers.0.mlp.gate_proj", "layers.1.mlp.gate_up_proj", "layers.0.mlp.down_proj"),
        {
            "layers.0.mlp.gate_proj": 16,
            "layers.1.mlp.gate_up_proj": 40,
            "layers.0.mlp.down_proj": 8,
        },
        "f",
    )
    units = NeuronSets({"en": {linear.sites[0]: [3, 4], linear.sites[1]: [1, 25]}}, linear)
    ffns = NeuronSets({"en": {"layers.0.mlp": [4, 5], "layers.1.mlp": [5, 7]}}, LAYOUT)
    for found in (lf.compare(units, ffns), lf.compare(ffns, units)):
        assert found.common.tolist() == [[2]]
        assert found.sizes_a.tolist() == found.sizes_b.tolist() == [4]


def test_what_leaves_an_ffn_is_no_neuron_of_it_however_wide():
    linear = Layout(("layers.0.mlp.down_proj",), {"layers.0.mlp.down_proj": 16}, "f")
    left = NeuronSets({"en": {"layers.0.mlp.down_proj": [4]}}, linear)
    with pytest.raises(InputError, match="different sites"):
        lf.compare(left, random_sets(0))


def test_ffns_whose_layers_lie_in_modules_of_their_own_are_aligned():
    ffns = Layout(("encoder.layer.0",), {"encoder.layer.0": 16}, "f")
    path = "encoder.layer.0.intermediate.dense"
    units = NeuronSets({"en": {path: [4, 5]}}, Layout((path,), {path: 16}, "f"))
    found = lf.compare(units, NeuronSets({"en": {"encoder.layer.0": [5]}}, ffns))
    assert found.common.tolist() == [[1]]


def test_neurons_are_compared_where_both_look():
    wider = Layout((*LAYOUT.sites, "other"), {**LAYOUT.widths, "other": 9}, "f")
    more = NeuronSets({"en": {"layers.0.mlp": [4, 5], "other": [1, 2, 3]}}, wider)
    found = lf.compare(more, NeuronSets({"en": {"layers.0.mlp": [5]}}, LAYOUT))
    assert (found.sizes_a.tolist(), found.sizes_b.tolist()) == ([2], [1])
    assert found.common.tolist() == [[1]]


def test_a_published_file_s_sites_are_the_other_s_in_their_order():
    published = NeuronSets({"en": {0: [4, 5], 1: [7]}}, Layout((0, 1)))
    named = NeuronSets({"en": {"layers.0.mlp": [5], "layers.1.mlp": [7]}}, LAYOUT)
    for found in (lf.compare(published, named), lf.compare(named, published)):
        assert found.common.tolist() == [[2]]
        assert set(found.common_by_site) == set(LAYOUT.sites)


def test_results_of_two_models_are_refused():
    sets = random_sets(0)
    other = NeuronSets({"en": {}}, Layout(LAYOUT.sites, LAYOUT.widths, "g", "another"))
    with pytest.raises(InputError, match="two models"):
        lf.compare(sets, other)
    with pytest.raises(InputError, match="two models"):
        lf.compare(sets, NeuronSets({"en": {}}, Layout(LAYOUT.sites, {"layers.0.mlp": 17})))
    with pytest.raises(InputError, match="one result knows its 3 sites by position only"):
        lf.compare(sets, NeuronSets({"en": {}}, Layout((0, 1, 2))))
    with pytest.raises(InputError, match="got dict"):
        lf.compare(sets, {"en": {}})

from __future__ import annotations

import numpy as np
import pytest
import torch

from lapefast.errors import InputError
from lapefast.neurons import Layout, NeuronSet, NeuronSets

LAYOUT = Layout(("a", "b"), {"a": 4, "b": 6}, "f" * 64, "some/model")


@pytest.fixture
def model(monkeypatch):
    """Stands for a model with sites a and b; what finds sites in real ones is tested elsewhere."""
    import lapefast.models

    sites = {"a": 4, "b": 6}
    monkeypatch.setattr(lapefast.models, "known_sites", lambda model, named: sites)
    monkeypatch.setattr(lapefast.models, "find_sites", lambda model: [])
    monkeypatch.setattr(lapefast.models, "fingerprint", lambda model: "f" * 64, raising=False)
    return torch.nn.Module()


@pytest.mark.parametrize(
    "indices",
    [
        [3, 0, 3, 1],
        (3, 1, 0),
        np.array([3, 1, 0]),
        torch.tensor([3, 1, 0], dtype=torch.int32),
        torch.tensor([0, 1, 3]),
    ],
    ids=["list", "tuple", "array", "int32", "int64"],
)
def test_indices_become_sorted_int64_without_repetitions(indices):
    neurons = NeuronSet({"a": indices}, "en", LAYOUT)
    assert neurons["a"].dtype == torch.int64
    assert neurons["a"].tolist() == [0, 1, 3]


def test_every_site_of_the_layout_has_a_place_in_order():
    neurons = NeuronSet({"b": [5]}, "en", LAYOUT)
    assert list(neurons) == ["a", "b"]
    assert neurons["a"].dtype == torch.int64
    assert neurons["a"].tolist() == []
    assert neurons.total == 1


@pytest.mark.parametrize(
    ("indices", "message"),
    [
        ([4], "site a must be below its width 4, got 4"),
        ([-1], "site a must not be negative, got -1"),
        ([0.5], "site a must be a one-dimensional list or tensor of integers"),
        ([[1]], "site a must be a one-dimensional"),
        ([True], "site a must be a one-dimensional"),
        (["x"], "site a must be integers"),
        ([2**70], "site a must be integers"),
        (3, "site a must be a one-dimensional"),
    ],
)
def test_indices_that_cannot_be_neurons_are_refused_by_site(indices, message):
    with pytest.raises(InputError, match=message):
        NeuronSet({"a": indices}, "en", LAYOUT)


@pytest.mark.parametrize("label", [1, "\ud800", "a\udfff"])
def test_a_label_that_no_file_can_hold_is_refused(label):
    with pytest.raises(InputError, match="must be strings without lone surrogates, got"):
        NeuronSets({label: {"a": [1]}}, LAYOUT)


def test_a_site_that_the_layout_lacks_is_refused():
    with pytest.raises(InputError, match="no site c"):
        NeuronSet({"c": [1]}, "en", LAYOUT)


def test_labels_without_neurons_keep_their_place():
    neurons = NeuronSets({"en": {}, "zh": {"a": [1]}, "ja": {}}, LAYOUT)
    assert neurons.labels == list(neurons) == ["en", "zh", "ja"]
    assert [layer.tolist() for layer in neurons.layers("ja")] == [[], []]
    assert [layer.tolist() for layer in neurons.layers("zh")] == [[1], []]
    assert neurons.fingerprint == "f" * 64
    assert neurons.widths == {"a": 4, "b": 6}
    assert neurons.sites == ["a", "b"]


def test_sets_are_equal_when_their_neurons_are():
    def make(index):
        return NeuronSets({"en": {"a": [index]}}, LAYOUT)

    assert make(1) == make(1)
    assert make(1) != make(2)
    assert make(1)["en"] != NeuronSet({"a": [1]})


def test_sets_known_by_position_take_the_names_of_a_model(model):
    neurons = NeuronSets({"en": {0: [3], 1: [5]}}, Layout((0, 1)))
    bound = neurons.bind(model)
    assert list(bound["en"]) == ["a", "b"]
    assert bound["en"]["b"].tolist() == [5]
    assert bound.widths == {"a": 4, "b": 6}
    assert bound.fingerprint == "f" * 64
    assert neurons["en"].bind(model) == bound["en"]
    assert bound.bind(model) == bound


def test_a_set_that_names_some_sites_gets_all_of_the_model(model):
    bound = NeuronSet({"b": [1]}).bind(model)
    assert {site: indices.tolist() for site, indices in bound.items()} == {"a": [], "b": [1]}


@pytest.mark.parametrize(
    ("layout", "neurons", "message"),
    [
        (Layout((0, 1, 2)), {}, "lie in 3 sites, but the model has 2"),
        (Layout((0, 1)), {0: [4]}, "site a must be below its width 4, got 4"),
        (Layout((0, 1), {0: 5, 1: 6}), {}, "site a of width 5, but the model's has 4"),
        (Layout(("a", "c")), {}, r"site c, which the model does not have \(it has a, b\)"),
        (Layout(("a",), {"a": 8}, None, "x/y"), {}, "found in, x/y"),
        (Layout(("a",), {}, "0" * 64, "x/y"), {}, "x/y with fingerprint 000000000000, but"),
    ],
)
def test_sets_that_do_not_fit_the_model_are_refused(model, layout, neurons, message):
    with pytest.raises(InputError, match=message):
        NeuronSet(neurons, "en", layout).bind(model)


def test_another_models_weights_are_taken_when_asked_for(model):
    neurons = NeuronSet({"a": [1]}, "en", Layout(("a", "b"), {}, "0" * 64))
    assert neurons.bind(model, check_fingerprint=False).fingerprint == "f" * 64


def test_a_layout_is_either_named_or_positional():
    for sites in [("a", 1), (1, 2), ("a", "a")]:
        with pytest.raises(InputError, match="sites must be named"):
            Layout(sites)

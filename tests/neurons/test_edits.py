from __future__ import annotations

import math

import pytest
import torch

import lapefast.models
from lapefast.errors import InputError
from lapefast.neurons import Layout, NeuronSet, NeuronSets, activate, add, deactivate, scale

LAYOUT = Layout(("a", "b"), {"a": 4, "b": 6}, "f" * 64, "some/model")
EN = NeuronSet({"a": [1, 3], "b": [0]}, "en", LAYOUT)
VALUES = {"a": torch.tensor([0.0, 0.1, 0.2, 0.3], dtype=torch.float64), "b": torch.ones(6)}


def table(edit, site):
    return tuple(column.tolist() for column in edit.tables[site])


def test_each_edit_is_a_scale_and_a_shift():
    assert table(deactivate(EN), "a") == ([1, 3], [0.0, 0.0], [0.0, 0.0])
    assert table(activate(EN, 2.0), "a") == ([1, 3], [0.0, 0.0], [2.0, 2.0])
    assert table(scale(EN, 3), "a") == ([1, 3], [3.0, 3.0], [0.0, 0.0])
    assert table(add(EN, 2.0, strength=1.5), "a") == ([1, 3], [1.0, 1.0], [3.0, 3.0])


def test_tables_have_the_dtypes_that_the_op_takes():
    neurons, scales, shifts = activate(EN, VALUES).tables["a"]
    assert (neurons.dtype, scales.dtype, shifts.dtype) == (
        torch.int64,
        torch.float32,
        torch.float32,
    )


def test_values_are_taken_at_the_neurons_and_rounded_once():
    shifts = add(EN, VALUES, strength=3.0).tables["a"][2]
    assert shifts.tolist() == torch.tensor([0.1 * 3.0, 0.3 * 3.0]).tolist()


def test_only_sites_with_neurons_have_a_table():
    edit = deactivate(NeuronSet({"b": [2]}, "en", LAYOUT))
    assert list(edit.tables) == ["b"]
    assert edit.total == 1


def test_a_plain_dict_of_indices_will_do():
    assert table(deactivate({"x": [5, 2]}), "x")[0] == [2, 5]
    with pytest.raises(InputError, match="site x must not be negative"):
        deactivate({"x": [-1]})
    for sets in ({0: [1]}, [1, 2], torch.tensor([1])):
        with pytest.raises(InputError, match="from site name to indices"):
            deactivate(sets)


def test_sets_of_several_labels_are_edited_as_their_union():
    sets = NeuronSets({"en": {"a": [1]}, "zh": {"a": [0, 1]}}, LAYOUT)
    assert table(deactivate(sets), "a")[0] == [0, 1]


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        (NeuronSet({}, "en", LAYOUT), "no neurons to edit: the label en has none"),
        (NeuronSets({}, LAYOUT), "no neurons to edit: none are given"),
        ({"a": []}, "no neurons to edit: none are given"),
    ],
)
def test_an_edit_of_no_neurons_is_refused(neurons, message):
    for make in (deactivate, lambda sets: activate(sets, VALUES), lambda sets: scale(sets, 2.0)):
        with pytest.raises(InputError, match=message):
            make(neurons)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: add(EN, 1.0, strength="x"), "strength must be real numbers"),
        (lambda: add(EN, 1.0, strength=None), "strength must be real numbers"),
        (lambda: add(EN, 1.0, strength=[1.0, 2.0]), "strength must be one number"),
        (lambda: activate(EN, 10**400), "number or a dict"),
        (lambda: activate(EN, {**VALUES, "a": ["x"] * 4}), "values of site a must be real numbers"),
        (lambda: activate(EN, {**VALUES, "a": None}), "values of site a must be real numbers"),
        (lambda: activate(EN, {**VALUES, "a": torch.ones(4) * 1j}), "must be real numbers"),
        (lambda: deactivate(EN).overlap(None), "overlaps with another edit, got NoneType"),
    ],
)
def test_what_is_no_number_is_refused(make, message):
    with pytest.raises(InputError, match=message):
        make()


@pytest.mark.parametrize("bad", [math.nan, math.inf, -math.inf, 1e39])
def test_values_that_are_not_finite_in_float32_are_refused(bad):
    with pytest.raises(InputError, match="finite in float32, but that of neuron 1 of a"):
        activate(EN, bad)
    values = {**VALUES, "a": torch.tensor([0.0, bad, 0.0, 0.0], dtype=torch.float64)}
    with pytest.raises(InputError, match="neuron 1 of a"):
        add(EN, values)
    with pytest.raises(InputError, match="neuron 1 of a"):
        scale(EN, bad)


def test_a_value_at_another_neuron_does_not_matter():
    values = {**VALUES, "a": torch.tensor([math.nan, 1.0, 0.0, 1.0])}
    assert table(activate(EN, values), "a")[2] == [1.0, 1.0]


@pytest.mark.parametrize(
    ("values", "message"),
    [
        ({"a": torch.ones(4)}, "no values for site b"),
        ({"a": torch.ones(3), "b": torch.ones(6)}, r"\[4\], got \[3\]"),
        ({"a": torch.ones(5), "b": torch.ones(6)}, r"\[4\], got \[5\]"),
        ({"a": torch.ones(1, 4), "b": torch.ones(6)}, r"\[4\], got \[1, 4\]"),
        ("many", "number or a dict"),
        (None, "number or a dict"),
    ],
)
def test_values_of_the_wrong_form_are_refused(values, message):
    with pytest.raises(InputError, match=message):
        activate(EN, values)


def test_where_both_touch_a_neuron_the_right_hand_edit_holds():
    zh = NeuronSet({"a": [0, 3]}, "zh", LAYOUT)
    edit = deactivate(EN) | activate(zh, 2.0)
    assert table(edit, "a") == ([0, 1, 3], [0.0, 0.0, 0.0], [2.0, 0.0, 2.0])
    assert table(edit, "b") == ([0], [0.0], [0.0])
    assert table(activate(zh, 2.0) | deactivate(EN), "a")[2] == [2.0, 0.0, 0.0]
    assert deactivate(EN).overlap(activate(zh, 2.0)) == 1
    assert edit.fingerprint == "f" * 64
    assert edit.widths == {"a": 4, "b": 6}


def test_combining_leaves_the_parts_as_they_were():
    left, right = deactivate(EN), activate(NeuronSet({"a": [0]}, "zh", LAYOUT), 2.0)
    _ = left | right
    assert table(left, "a") == ([1, 3], [0.0, 0.0], [0.0, 0.0])
    assert table(right, "a") == ([0], [0.0], [2.0])


@pytest.mark.parametrize(
    ("layout", "message"),
    [
        (Layout(("a", "b"), {}, "0" * 64, "x/y"), "two models, some/model and x/y"),
        (Layout(("a", "b"), {"a": 5}), "site a has width 4 in one edit and 5 in the other"),
        (Layout((0, 1)), "call bind"),
    ],
)
def test_edits_for_models_that_differ_do_not_combine(layout, message):
    other = deactivate(NeuronSet({layout.sites[0]: [0]}, "zh", layout))
    for combine in (lambda: deactivate(EN) | other, lambda: deactivate(EN).overlap(other)):
        with pytest.raises(InputError, match=message):
            combine()


def test_edits_of_models_of_different_depth_do_not_combine():
    with pytest.raises(InputError, match="2 and 3 sites"):
        deactivate(NeuronSet({0: [1]}, "en", Layout((0, 1)))) | deactivate(
            NeuronSet({0: [1]}, "en", Layout((0, 1, 2)))
        )


def test_neurons_known_by_position_take_the_sites_of_named_values():
    edit = activate(NeuronSet({0: [1], 1: [0]}, "en", Layout((0, 1))), VALUES)
    assert list(edit.tables) == ["a", "b"]
    assert table(edit, "a")[2] == torch.tensor([0.1]).tolist()
    with pytest.raises(InputError, match="3 sites by position, but there are values for 2"):
        activate(NeuronSet({0: [1]}, "en", Layout((0, 1, 2))), VALUES)


def test_binding_an_edit_names_its_sites_and_checks_its_indices(monkeypatch):
    sites = {"a": 4, "b": 6}
    monkeypatch.setattr(lapefast.models, "known_sites", lambda model, named: sites)
    monkeypatch.setattr(lapefast.models, "find_sites", lambda model: [])
    monkeypatch.setattr(lapefast.models, "fingerprint", lambda model: "f" * 64, raising=False)
    model = torch.nn.Module()
    bound = activate(NeuronSet({1: [5]}, "en", Layout((0, 1))), 2.0).bind(model)
    assert table(bound, "b") == ([5], [0.0], [2.0])
    assert bound.widths == {"a": 4, "b": 6}
    assert bound.fingerprint == "f" * 64
    with pytest.raises(InputError, match="site a must be below its width 4, got 4"):
        deactivate({"a": [4]}).bind(model)
    with pytest.raises(InputError, match="fingerprint"):
        deactivate(NeuronSet({"a": [1]}, "en", Layout(("a",), {}, "0" * 64))).bind(model)

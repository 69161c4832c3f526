from __future__ import annotations

import plain
import pytest
import torch
from families import by_name, shared

import lapefast as lf
from lapefast import models
from lapefast.errors import InputError
from lapefast.neurons import NeuronSets, load_edits
from lapefast.neurons.layout import Layout


def named():
    sites = by_name("llama").sites
    unbound = NeuronSets({"en": {0: [1, 2], 1: [3]}}, Layout((0, 1)))
    return {
        "no-en": lf.deactivate(unbound["en"]),
        "more": lf.add(dict.fromkeys(sites, [4]), 0.1) | lf.scale({"layers.1.mlp": [5]}, 3.0),
    }


def test_edits_come_back_bound_to_the_model(tmp_path):
    model = shared("llama")
    before = plain.attributes(model)
    lf.export.edits(model, named(), tmp_path / "edits.json", server="more")
    plain.assert_untouched(before, model)
    loaded = load_edits(tmp_path / "edits.json")
    assert loaded.server == "more"
    assert list(loaded.edits) == ["no-en", "more"]
    for name, edit in named().items():
        bound = edit.bind(model)
        assert loaded.edits[name].fingerprint == models.fingerprint(model)
        assert loaded.edits[name].tables.keys() == bound.tables.keys()
        for site, table in bound.tables.items():
            assert all(map(torch.equal, loaded.edits[name].tables[site], table))


@pytest.mark.parametrize(
    ("edits", "server", "message"),
    [
        ({}, None, "at least one edit"),
        (None, None, "{name: edit}"),
        ({"a": {"layers.0.mlp": [1]}}, None, "{name: edit}"),
        (lf.deactivate({"layers.0.mlp": [1]}), None, "{name: edit}"),
        ({"a": lf.deactivate({"layers.7.mlp": [1]})}, None, "layers.7.mlp"),
        ({"a": lf.deactivate({"layers.0.self_attn.q_proj": [1]})}, None, "servers edit neurons"),
        ({"a": lf.deactivate({"layers.0.mlp": [1]})}, "b", "none of the file's"),
        ({"none": lf.deactivate({"layers.0.mlp": [1]})}, None, "other than 'none'"),
    ],
)
def test_what_can_not_be_written_is_refused_and_no_file_left(edits, server, message, tmp_path):
    with pytest.raises(InputError, match=message):
        lf.export.edits(shared("llama"), edits, tmp_path / "edits.json", server)
    assert list(tmp_path.iterdir()) == []


def test_edits_for_another_model_are_refused(tmp_path):
    edit = lf.deactivate({"layers.0.mlp": [1]}).bind(shared("llama"))
    other = by_name("llama").build()
    with torch.no_grad():
        other.model.layers[0].mlp.down_proj.weight.mul_(2)
    with pytest.raises(InputError, match="fingerprint"):
        lf.export.edits(other, {"a": edit}, tmp_path / "edits.json")

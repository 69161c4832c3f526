"""Edit files come back as they were written, and broken ones are refused."""

from __future__ import annotations

import json

import pytest
import torch

from lapefast.errors import InputError
from lapefast.neurons import Layout, NeuronSet, activate, deactivate, load_edits, save_edits, scale

LAYOUT = Layout(("a", "b"), {"a": 4, "b": 6}, "f" * 64, "some/model")
OFF = deactivate(NeuronSet({"a": [1, 3], "b": [0]}, "en", LAYOUT))
ON = OFF | activate(NeuronSet({"a": [3]}, "zh", LAYOUT), 0.1)


@pytest.fixture
def file(tmp_path):
    path = tmp_path / "edits.json"
    save_edits(path, {"off": OFF, "on": ON}, server="off")
    return path


def test_edits_come_back_bit_for_bit(file):
    found = load_edits(file)
    assert found.server == "off"
    assert found.layout == LAYOUT
    for name, edit in (("off", OFF), ("on", ON)):
        assert found.edits[name].tables.keys() == edit.tables.keys()
        for site, table in edit.tables.items():
            assert all(map(torch.equal, found.edits[name].tables[site], table))


@pytest.mark.parametrize(
    ("edits", "server", "message"),
    [
        ({}, None, "at least one edit"),
        ({"x": "no edit"}, None, "at least one edit"),
        ({"none": OFF}, None, "other than 'none'"),
        ({" ": OFF}, None, "other than 'none'"),
        ({"\ud800": OFF}, None, "strings without lone surrogates"),
        ({"x": OFF}, "y", "none of the file's: x"),
        ({"x": OFF}, ["x"], "none of the file's: x"),
        ({"x": scale({"a": [1]}, 2.0)}, None, "not bound to a model"),
    ],
)
def test_what_can_not_be_served_is_not_written(edits, server, message, tmp_path):
    with pytest.raises(InputError, match=message):
        save_edits(tmp_path / "edits.json", edits, server)
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda c: c.update(format="lapefast neurons"), "not a edit file|not an edit file"),
        (lambda c: c.update(version=2), "version 2"),
        (lambda c: c.update(edits={}), "no edits"),
        (lambda c: c.update(server="x"), "server edit 'x'"),
        (lambda c: c["edits"].update(none=c["edits"].pop("on")), "the name none"),
        (lambda c: c["edits"].update(on={}), "holds no neurons"),
        (lambda c: c["edits"]["on"].update(a=[[], [], []]), "holds no neurons"),
        (lambda c: c["edits"]["on"].update(c=[[0], [1], [1]]), "no such site"),
        (lambda c: c["edits"]["on"].update(a=[[4], [1], [1]]), "below its width 4"),
        (lambda c: c["edits"]["on"].update(a=[[3, 1], [1, 1], [1, 1]]), "do not ascend"),
        (lambda c: c["edits"]["on"].update(a=[[1], [True], [1]]), "other than numbers"),
        (lambda c: c["edits"]["on"].update(a=[[1], [[]], [1]]), "other than numbers"),
        (lambda c: c["edits"]["on"].update(a=[[1], [1e39], [1]]), "not finite"),
        (lambda c: c["edits"]["on"].update(a=[[1], [1, 2], [1]]), "differ in length"),
        (lambda c: c["sites"][0].update(width=10**30), "broken|too large|below"),
    ],
)
def test_a_broken_file_is_refused_with_its_name(change, message, file):
    content = json.loads(file.read_text())
    change(content)
    file.write_text(json.dumps(content))
    with pytest.raises(InputError, match=message):
        load_edits(file)


def test_a_file_that_is_cut_short_is_refused(file):
    file.write_text(file.read_text()[:-20])
    with pytest.raises(InputError, match="cut short or damaged"):
        load_edits(file)

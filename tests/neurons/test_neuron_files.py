from __future__ import annotations

import json
import os

import pytest
import torch

from lapefast.errors import InputError
from lapefast.neurons import Layout, NeuronSets

LAYOUT = Layout(("layers.0.mlp", "layers.1.mlp"), {"layers.0.mlp": 4, "layers.1.mlp": 6}, "f" * 64)


@pytest.fixture
def neurons():
    return NeuronSets(
        {"en": {"layers.0.mlp": [1, 3]}, "中文": {"layers.1.mlp": [5]}, "ja": {}},
        LAYOUT,
        {"method": "lape", "parameters": {"top_rate": 0.01}},
    )


def published(*labels):
    return [[torch.tensor(layer, dtype=torch.int64) for layer in layers] for layers in labels]


def test_json_gives_back_what_was_saved_and_the_same_bytes(tmp_path, neurons):
    neurons.save(tmp_path / "a.json")
    loaded = NeuronSets.load(tmp_path / "a.json")
    assert loaded == neurons
    assert loaded.labels == ["en", "中文", "ja"]
    assert loaded.layout == neurons.layout
    assert loaded.metadata == neurons.metadata
    loaded.save(tmp_path / "b.json")
    assert (tmp_path / "a.json").read_bytes() == (tmp_path / "b.json").read_bytes()


def test_json_has_one_line_per_site_of_each_label(tmp_path, neurons):
    neurons.save(tmp_path / "a.json")
    lines = (tmp_path / "a.json").read_text(encoding="utf-8").splitlines()
    assert '      "layers.0.mlp": [1, 3],' in lines
    assert '    "中文": {' in lines
    assert '    {"name": "layers.1.mlp", "width": 6}' in lines


def test_some_labels_of_a_json_file_are_taken_when_asked_for(tmp_path, neurons):
    neurons.save(tmp_path / "a.json")
    assert NeuronSets.load(tmp_path / "a.json", labels=["ja", "en"]).labels == ["ja", "en"]
    with pytest.raises(InputError, match=r"has no label 'de'; its labels are en, 中文, ja"):
        NeuronSets.load(tmp_path / "a.json", labels=["de"])


def test_sets_known_by_position_survive_json(tmp_path):
    neurons = NeuronSets({"en": {0: [7], 1: []}}, Layout((0, 1)))
    neurons.save(tmp_path / "a.json")
    loaded = NeuronSets.load(tmp_path / "a.json")
    assert loaded == neurons
    assert loaded.layout == Layout((0, 1))


def test_a_json_file_cut_short_anywhere_is_refused(tmp_path, neurons):
    neurons.save(tmp_path / "a.json")
    data = (tmp_path / "a.json").read_bytes().rstrip()
    for length in range(len(data)):
        (tmp_path / "a.json").write_bytes(data[:length])
        with pytest.raises(InputError, match="cut short"):
            NeuronSets.load(tmp_path / "a.json")


@pytest.mark.parametrize(
    ("path", "value", "message"),
    [
        (["version"], 2, "format version 2, but this lapefast reads version 1"),
        (["format"], "other", "is JSON but not a neuron file"),
        (["labels"], ["en", "ja"], "labels are not those of its neurons"),
        (["labels"], None, "labels are not those"),
        (["sites"], [], "the sites of label en"),
        (["sites"], [1], "is broken"),
        (["sites", 1, "name"], "layers.0.mlp", "listed twice"),
        (["sites", 0, "width"], -4, "width of site layers.0.mlp is -4"),
        (["sites", 0, "width"], 3, "layers.0.mlp must be below its width 3, got 3"),
        (["fingerprint"], 5, "fingerprint is not a string"),
        (["metadata"], [], "metadata is not an object"),
        (["neurons"], [], "neurons are not an object"),
        (["neurons", "en"], [], "is broken"),
        (["neurons", "en", "layers.0.mlp"], [1.5], "layers.0.mlp are not integers"),
        (["neurons", "en", "layers.0.mlp"], [True], "layers.0.mlp are not integers"),
        (["neurons", "en", "layers.0.mlp"], "1", "layers.0.mlp are not integers"),
        (["neurons", "en", "layers.0.mlp"], [-1], "must not be negative"),
        (["neurons", "en", "layers.0.mlp"], [10**30], "must be integers"),
        (["neurons", "en", "layers.9.mlp"], [1], "the sites of label en"),
    ],
)
def test_an_inconsistent_json_file_is_refused(tmp_path, neurons, path, value, message):
    neurons.save(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    place = content
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=message):
        NeuronSets.load(tmp_path / "a.json")


@pytest.mark.parametrize("key", ["labels", "sites", "neurons", "metadata", "fingerprint", "model"])
def test_a_json_file_without_an_entry_is_refused(tmp_path, neurons, key):
    neurons.save(tmp_path / "a.json")
    content = json.loads((tmp_path / "a.json").read_text(encoding="utf-8"))
    del content[key]
    (tmp_path / "a.json").write_text(json.dumps(content), encoding="utf-8")
    with pytest.raises(InputError, match=f"'{key}' is missing"):
        NeuronSets.load(tmp_path / "a.json")


@pytest.mark.parametrize(
    "data", [b'{"a":' * 100_000, b'{"a": \xff}', b"{]"], ids=["deep", "bytes", "brackets"]
)
def test_text_that_is_not_json_is_refused(tmp_path, data):
    (tmp_path / "a.json").write_bytes(data)
    with pytest.raises(InputError, match="not valid JSON"):
        NeuronSets.load(tmp_path / "a.json")


@pytest.mark.parametrize("zipped", [True, False], ids=["zip", "legacy"])
def test_published_files_get_the_published_labels_in_order(tmp_path, zipped):
    content = published(*[[[index], []] for index in range(6)])
    torch.save(content, tmp_path / "x", _use_new_zipfile_serialization=zipped)
    neurons = NeuronSets.load(tmp_path / "x")
    assert neurons.labels == ["en", "zh", "fr", "es", "vi", "id"]
    assert [layer.tolist() for layer in neurons.layers("vi")] == [[4], []]
    assert neurons["vi"][0].tolist() == [4]


def test_published_files_take_other_labels(tmp_path):
    torch.save(published([[1]], [[2]]), tmp_path / "x.pth")
    assert NeuronSets.load(tmp_path / "x.pth", labels=["de", "sv"])["sv"][0].tolist() == [2]
    for labels in (["de"], ["de", "de"], ["de", "sv", "da"]):
        with pytest.raises(InputError, match="holds 2 labels, but"):
            NeuronSets.load(tmp_path / "x.pth", labels=labels)


def test_more_labels_than_were_published_must_be_named(tmp_path):
    torch.save(published(*[[[1]]] * 8), tmp_path / "x.pth")
    with pytest.raises(InputError, match="8 labels without names"):
        NeuronSets.load(tmp_path / "x.pth")


def test_saving_as_pth_writes_the_published_form(tmp_path, neurons):
    neurons.save(tmp_path / "x.pth")
    content = torch.load(tmp_path / "x.pth", weights_only=True)
    assert [[layer.tolist() for layer in layers] for layers in content] == [
        [[1, 3], []],
        [[], [5]],
        [[], []],
    ]
    assert all(layer.dtype == torch.int64 for layers in content for layer in layers)
    loaded = NeuronSets.load(tmp_path / "x.pth", labels=neurons.labels)
    assert [layer.tolist() for layer in loaded.layers("中文")] == [[], [5]]


def test_without_a_suffix_the_content_says_what_a_file_is(tmp_path, neurons):
    neurons.save(tmp_path / "llama-70b")
    assert NeuronSets.load(tmp_path / "llama-70b") == neurons
    neurons.save(tmp_path / "x.pth")
    (tmp_path / "x.pth").rename(tmp_path / "llama-70b")
    loaded = NeuronSets.load(tmp_path / "llama-70b", labels=neurons.labels)
    assert loaded.metadata["method"] == "published file"


def test_published_indices_may_be_int32_unsorted_or_empty_of_any_type(tmp_path):
    layers = [torch.tensor([5, 2], dtype=torch.int32), torch.tensor([]), [3, 1]]
    torch.save([layers], tmp_path / "x.pth")
    loaded = NeuronSets.load(tmp_path / "x.pth").layers("en")
    assert [layer.tolist() for layer in loaded] == [[2, 5], [], [1, 3]]
    assert all(layer.dtype == torch.int64 for layer in loaded)


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ({"n": 1}, "must hold a list over labels"),
        ([torch.tensor([1])], "must hold a list over labels"),
        ([], "equally many layers"),
        ([[]], "equally many layers"),
        ([[torch.tensor([1])], []], "equally many layers"),
        ([[torch.tensor([1.5])]], "one-dimensional list or tensor of integers"),
        ([[torch.tensor([[1]])]], "one-dimensional list or tensor of integers"),
        ([[torch.tensor([-1])]], "must not be negative"),
        ([[{"a": 1}]], "must be integers"),
        ([["text"]], "tensors, lists, dicts and numbers alone"),
    ],
)
def test_other_content_in_a_published_file_is_refused(tmp_path, content, message):
    torch.save(content, tmp_path / "x.pth")
    with pytest.raises(InputError, match=message):
        NeuronSets.load(tmp_path / "x.pth")


def test_a_missing_file_and_a_file_of_another_kind_are_refused(tmp_path):
    with pytest.raises(InputError, match="cannot read the neuron file"):
        NeuronSets.load(tmp_path / "absent.json")
    (tmp_path / "text").write_text("neither")
    with pytest.raises(InputError, match="not JSON, so taken for a published one"):
        NeuronSets.load(tmp_path / "text")
    (tmp_path / "sealed").write_bytes(b"12345678{")
    with pytest.raises(InputError, match="safetensors file, which holds what a method measured"):
        NeuronSets.load(tmp_path / "sealed")


@pytest.mark.parametrize("name", ["x.json", "x.pth"])
def test_a_full_disk_leaves_no_file(tmp_path, neurons, name, monkeypatch):
    def full(descriptor):
        raise OSError(28, "No space left on device")

    monkeypatch.setattr(os, "fsync", full)
    with pytest.raises(InputError, match="no space left on device"):
        neurons.save(tmp_path / name)
    assert os.listdir(tmp_path) == []

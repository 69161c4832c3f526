"""The five methods by the command line, and what is refused of them."""

from __future__ import annotations

import json

import pytest
import torch
from safetensors.torch import save_file

import lapefast as lf
from lapefast import demo

SMALL = {
    "plnd": ["--top-ffn", "20", "--top-attention", "4"],
    "average-precision": ["--top", "9", "--bottom", "9"],
    "experts": ["--experts", "8", "--high", "0.2", "--only"],
}
TEXTS = ["--corpus", "en=x", "--corpus", "zh=x"]
AVERAGE_PRECISION = ["--method", "average-precision", *TEXTS]
EXPERTS = ["--method", "experts", *TEXTS]
PLND = ["--method", "plnd", *TEXTS]


@pytest.fixture
def corpora(made):
    return [f"--corpus={label}={made.valid[label]}" for label in ("en", "zh", "ja")]


@pytest.mark.parametrize("method", SMALL)
def test_a_method_that_reads_texts_gives_what_the_library_gives(
    lapefast, made, corpora, tmp_path, method
):
    out, details = tmp_path / "n.json", tmp_path / "d.safetensors"
    more = ["--details", details] if method != "plnd" else []
    options = [*SMALL[method], "--max-documents", "6", "--threads", "1", "--batch-size", "4"]
    arguments = [made.directory, "--method", method, *corpora, *options, *more, "-o", out]
    result = lapefast("identify", *arguments)
    assert result.code == 0, result.err
    texts = {label: made.valid[label] for label in ("en", "zh", "ja")}
    given = {"max_documents": 6, "batch_size": 4, "progress": False}
    torch.set_num_threads(1)
    if method == "plnd":
        top = {"ffn": 20, "query_key": 4, "value": 4}
        expected = lf.detect.plnd(made.model, made.tokenizer, texts, top=top, **given)
    elif method == "average-precision":
        expected = lf.detect.average_precision(made.model, made.tokenizer, texts, 9, 9, **given)
    else:
        found = lf.detect.experts(made.model, texts, made.tokenizer, 8, **given)
        expected = found.neuron_sets(top=0.2, only=True)
    loaded = lf.NeuronSets.load(out)
    assert all(loaded[label] == expected[label] for label in texts)
    assert loaded.metadata["method"] == method
    for file in (out, *more[1:]):
        assert lapefast("info", file).code == 0
    with lf.steer(made.model, lf.deactivate(loaded)):
        pass


def test_sharing_reads_parallel_examples(lapefast, made, tmp_path):
    examples, out, details = (tmp_path / name for name in ("e.jsonl", "n.json", "s.json"))
    lines = [
        {label: [one[label][0][:9], one[label][1][:9]] for label in ("en", "zh", "ja")}
        for one in demo.examples(6)
    ]
    examples.write_text("\n".join(json.dumps(one) for one in lines))
    given = ["--method", "sharing", "--examples", examples, "-o", out, "--details", details]
    result = lapefast("identify", made.directory, *given)
    assert result.code == 0, result.err
    found = lf.detect.Sharing.load(details)
    assert found.labels == ["en", "zh", "ja"]
    assert lf.NeuronSets.load(out).metadata["method"] == "sharing"
    shown = lapefast("info", details)
    assert shown.code == 0
    assert "all-shared" in shown.out


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["--top", "5"], "--top is an option of average-precision, not of lape"),
        (["--corpus", "en=x.txt"], "LAPE reads a profile and no text"),
        (["--seq-len", "9"], "LAPE reads a profile and no text"),
        (["--dtype", "float32"], "LAPE loads no model"),
        (["--details", "d.json"], "measures nothing beside its neurons"),
        ([*PLND, "--details", "d.json"], "read mean_scores of what lapefast.detect.plnd returns"),
        (["--method", "plnd", "--top-rate", "0.1"], "--top-rate is an option of lape"),
        (["--method", "sharing", "--experts", "4"], "--experts is an option of experts"),
        (["--method", "sharing"], "give them by --examples"),
        (["--method", "experts"], "give them by --corpus"),
        (["--method", "experts", "--corpus", "en=x", "--details", "n.json"], "are one file"),
        (["--method", "sharing", "--examples", "e", "--seq-len", "9"], "sharing reads --examples"),
        (["--method", "sharing", "--examples", "e"], "cannot read the example file e"),
        (["--method", "sharing", "--examples", "/dev/null"], "at least two, got none"),
        (["--method", "sharing", "--examples", "e", "--threshold", "nan"], "a finite number"),
        ([*EXPERTS, "--share", "1.5"], "share must be over 0"),
        ([*EXPERTS, "--high", "0"], "high must be over 0"),
        ([*EXPERTS, "--form", "released"], "experts has one form"),
        (["--method", "average-precision", "--corpus", "en=x"], "at least two labels"),
        ([*AVERAGE_PRECISION, "--top", "0", "--bottom", "0"], "both 0"),
        ([*AVERAGE_PRECISION, "--details", "d.json"], "must end in .safetensors"),
        (["--method", "plnd", "--corpus", "en=x"], "at least two"),
        ([*PLND, "--kinds", "ffn,up"], "kinds must be some of"),
        ([*PLND, "--top-ffn", "9"], "give both --top-ffn and --top-attention"),
        (
            [*PLND, "--top-ffn", "9", "--top-attention", "9", "--score-threshold", "1"],
            "one of them",
        ),
    ],
)
def test_what_a_method_does_not_take_is_refused_before_the_model_is_loaded(
    lapefast, tmp_path, monkeypatch, arguments, said
):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr("lapefast.engines.transformers.load_tokenizer", None)
    result = lapefast("identify", "some-model", "-o", "n.json", *arguments)
    assert result.code == 2
    assert said in result.err
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(
    ("source", "arguments", "said"),
    [
        ("file", ["--method", "plnd", "--corpus", "en=x"], "PLND runs a model, but file is a file"),
        (".", [], "LAPE reads a profile, but . is a directory"),
    ],
)
def test_a_model_is_told_from_a_profile(lapefast, tmp_path, monkeypatch, source, arguments, said):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("text")
    result = lapefast("identify", source, "-o", "n.json", *arguments)
    assert result.code == 2
    assert said in result.err


def test_the_file_that_is_read_is_not_written(lapefast, tmp_path):
    (tmp_path / "p.safetensors").write_bytes(b"a profile")
    result = lapefast("identify", tmp_path / "p.safetensors", "-o", tmp_path / "p.safetensors")
    assert result.code == 2
    assert "it is read, too; give another name" in result.err
    assert (tmp_path / "p.safetensors").read_bytes() == b"a profile"


def test_what_a_method_measured_is_no_neuron_file(lapefast, tmp_path):
    save_file({"a": torch.zeros(1)}, tmp_path / "d.safetensors")
    given = ("--neurons", tmp_path / "d.safetensors", "-o", tmp_path / "r.html")
    result = lapefast("report", *given)
    assert result.code == 2
    assert "is a safetensors file" in result.err

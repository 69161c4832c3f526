"""The commands on the page are commands: the command line takes every option of them."""

from __future__ import annotations

import shlex

import pytest
import typer

from lapefast.cli import app
from lapefast.report.commands import commands

ABOUT = {
    "model": "/models/some model",
    "dtype": "float32",
    "threads": 2,
    "special_tokens": False,
    "max_documents": 7,
    "seq_len": 64,
    "batch_size": 8,
    "corpora": [{"label": "en", "source": "/data/en.txt"}, {"label": "zh", "source": "zh.txt"}],
}
PARAMETERS = {
    "plnd": {
        "form": "released",
        "kinds": ["ffn", "query_key"],
        "top": {"ffn": 3, "query_key": 2},
    },
    "average-precision": {"top": 5, "bottom": 6},
    "sharing": {"threshold": 0.25, "values": "product", "form": "paper", "top": 800},
    "experts": {"experts": 16, "share": 0.2, "seed": 3, "top": 0.3, "only": True},
}


@pytest.mark.parametrize("method", PARAMETERS)
def test_every_method_s_command_is_taken(method):
    metadata = {**ABOUT, "method": method, "parameters": PARAMETERS[method]}
    measured = {f"{method} in full": "d.json"} if method in ("experts", "sharing") else {}
    (line,) = commands({"found": metadata}, {"found": "n.json", **measured})
    program, command, *arguments = shlex.split(line)
    assert (program, command) == ("lapefast", "identify")
    parsed = typer.main.get_command(app).commands["identify"].make_context("identify", arguments)
    given = parsed.params
    assert given["source"] == "some model"
    assert str(given["output"]) == "n.json"
    assert (str(given["details"]) == "d.json") == bool(measured)
    assert given["method"] == method
    assert given["corpus"] == ["en=en.txt", "zh=zh.txt"]
    assert (given["seq_len"], given["batch_size"], given["threads"]) == (64, 8, 2)
    assert (given["max_documents"], given["special_tokens"]) == (7, False)
    if method == "plnd":
        assert (given["top_ffn"], given["top_attention"]) == (3, 2)
        assert (given["kinds"], given["form"]) == ("ffn,query_key", "released")
    if method == "average-precision":
        assert (given["top"], given["bottom"]) == (5, 6)
    if method == "sharing":
        assert (given["threshold"], given["values"]) == (0.25, "product")
    if method == "experts":
        assert (given["experts"], given["share"], given["seed"]) == (16, 0.2, 3)
        assert (given["high"], given["only"]) == (0.3, True)


def test_a_sweep_and_a_threshold_have_theirs():
    plnd = {**ABOUT, "method": "plnd", "parameters": {"kinds": ["ffn"], "threshold": {"ffn": 0.5}}}
    lines = commands(
        {"profile": ABOUT, "plnd": plnd},
        {"profile": "p.safetensors", "plnd": "n.json", "sweep": "s.jsonl"},
    )
    assert lines[-1] == (
        "lapefast sweep 'some model' --neurons n.json --profile p.safetensors -o s.jsonl"
    )
    assert "--score-threshold=0.5" in lines[1]


def test_a_matrix_is_of_the_neurons_that_it_was_made_of_or_of_none_that_is_named():
    sets = {name: {**ABOUT, "method": name} for name in ("lape", "plnd")}
    matrix = {**ABOUT, "neurons_method": "lape", "seq_len": {"en": 64}}
    files = {"lape": "a.json", "plnd": "b.json", "matrix": "m.json"}
    assert "--neurons a.json" in commands({**sets, "matrix": matrix}, files)[-1]
    del matrix["neurons_method"]
    assert "--neurons NEURONS" in commands({**sets, "matrix": matrix}, files)[-1]

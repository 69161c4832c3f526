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
    "experts": {"experts": 16, "share": 0.2, "seed": 3, "top": None},
}


@pytest.mark.parametrize("method", PARAMETERS)
def test_every_method_s_command_is_taken(method):
    metadata = {**ABOUT, "method": method, "parameters": PARAMETERS[method]}
    (line,) = commands({"found": metadata}, {"found": "n.json", method: "d.json"})
    program, command, *arguments = shlex.split(line)
    assert (program, command) == ("lapefast", "identify")
    parsed = typer.main.get_command(app).commands["identify"].make_context("identify", arguments)
    given = parsed.params
    assert given["source"] == "some model"
    assert str(given["output"]) == "n.json"
    assert str(given["details"]) == "d.json"
    assert given["method"] == method
    assert given["corpus"] == ["en=en.txt", "zh=zh.txt"]
    assert (given["seq_len"], given["batch_size"], given["threads"]) == (64, 8, 2)
    if method == "plnd":
        assert (given["top_ffn"], given["top_attention"]) == (3, 2)
        assert (given["kinds"], given["form"]) == ("ffn,query_key", "released")
    if method == "average-precision":
        assert (given["top"], given["bottom"]) == (5, 6)
    if method == "sharing":
        assert (given["threshold"], given["values"]) == (0.25, "product")
    if method == "experts":
        assert (given["experts"], given["share"], given["seed"]) == (16, 0.2, 3)


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

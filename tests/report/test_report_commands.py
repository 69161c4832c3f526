"""The commands on the page are commands: the command line takes every option of them."""

from __future__ import annotations

import inspect
import shlex

import pytest
import typer

import lapefast as lf
from lapefast.cli import app
from lapefast.report.commands import BUILT_IN, commands

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


def parsed(line: str) -> dict:
    """What the command line makes of a command."""
    program, command, *arguments = shlex.split(line)
    assert program == "lapefast"
    return typer.main.get_command(app).commands[command].make_context(command, arguments).params


def test_a_threshold_of_plnd_has_its_option():
    plnd = {**ABOUT, "method": "plnd", "parameters": {"kinds": ["ffn"], "threshold": {"ffn": 0.5}}}
    (line,) = commands({"plnd": plnd}, {"plnd": "n.json"})
    assert parsed(line)["score_threshold"] == 0.5


@pytest.mark.parametrize(
    ("method", "settings", "named"),
    [
        ("plnd", {"top": {"ffn": 3, "query_key": 2, "value": 1}}, "top"),
        ("plnd", {"threshold": {"ffn": 0.5, "value": 0.25}}, "threshold"),
        ("average-precision", {"longer": "cut", "max_documents": None}, "longer, max_documents"),
        ("sharing", {"attribution": False, "top": 10}, "attribution, top"),
        ("experts", {"form": "absolute", "threshold": 0.5}, "form, threshold"),
    ],
)
def test_what_the_command_line_cannot_make_is_said_and_no_command(method, settings, named):
    metadata = {**ABOUT, "method": method, "parameters": settings, **settings}
    other = {**ABOUT, "method": "experts", "parameters": {"form": "identity", "threshold": None}}
    command, line = commands({"n": metadata, "e": other}, {"n": "n.json", "e": "e.json"})
    assert parsed(command)["method"] == "experts"
    assert line == (
        f"# 'n.json' was made in Python: the command line has no option for its {named}"
    )


def test_sharing_s_usual_settings_are_those_of_the_command_line():
    usual = inspect.signature(lf.detect.sharing).parameters
    settings = {name: usual[name].default for name in ("attribution", "top")}
    settings["thresholds"] = list(usual["thresholds"].default)
    metadata = {**ABOUT, "method": "sharing", "parameters": settings}
    (line,) = commands({"sharing": metadata}, {"sharing": "n.json"})
    assert parsed(line)["method"] == "sharing"


@pytest.mark.parametrize("method", ["lape", *PARAMETERS])
def test_a_part_of_a_method_s_neurons_has_no_command(method):
    metadata = {**ABOUT, "method": method, "part": "top"}
    files = {"profile": "p.safetensors", "n": "n.json"}
    (line,) = commands({"n": metadata}, files)
    assert line == "# 'n.json' was made in Python: it is the part 'top' of a method's neurons"


def test_details_stand_with_the_neurons_that_were_found_with_them():
    found = [
        {**ABOUT, "method": "sharing", "parameters": {"threshold": threshold}, "notes": []}
        for threshold in (0.0, 0.3)
    ]
    described = {"a": found[0], "b": found[1], "sharing in full": found[1]}
    files = {"a": "a.json", "b": "b.json", "sharing in full": "d.json"}
    details = [str(parsed(line)["details"]) for line in commands(described, files)]
    assert details == ["None", "d.json"]


def test_what_was_in_memory_or_is_in_no_file_that_is_known_has_a_word_in_its_place():
    corpora = [{"label": "en", "source": "<list of 3>"}, {"label": "a,b", "source": None}]
    plnd = {**ABOUT, "method": "plnd", "corpora": corpora, "parameters": {"kinds": ["ffn"]}}
    sampled = {**ABOUT, "neurons_method": "average-precision", "neurons": {"a,b": 1}}
    made = {"plnd": plnd, "sampled": sampled}
    identify, sample = map(parsed, commands(made, {"plnd": "n.json", "sampled": "s.json"}))
    assert identify["corpus"] == ["en=SOURCE", "a,b=SOURCE"]
    assert (str(sample["neurons"]), sample["labels"]) == ("DETAILS", "LABELS")


SWEEP = {
    "model": "/models/tiny",
    "dtype": "float32",
    "threads": 2,
    "neurons_method": "lape",
    "neurons": {"en": 3, "chinese": 4},
    "pairs": None,
    "prompts": {"en": 2, "chinese": 2},
    "prompts_source": "p.jsonl",
    "max_new_tokens": 9,
    "batch_size": 5,
    "where": "generated",
    "random_sets": 3,
    "languages": {"chinese": "zh"},
    "restrict": False,
    "seed": 7,
}


def test_a_sweep_s_command_is_whole():
    described = {"lape": {"method": "lape"}, "sweep": SWEEP}
    files = {"profile": "p.safetensors", "lape": "n.json", "sweep": "s.jsonl"}
    given = parsed(commands(described, files)[-1])
    assert given["model"] == "tiny"
    paths = [str(given[one]) for one in ("neurons", "profile", "prompts", "output")]
    assert paths == ["n.json", "p.safetensors", "p.jsonl", "s.jsonl"]
    assert (given["labels"], given["language"]) == ("en,chinese", ["chinese=zh"])
    assert not given["pair"]
    names = ("max_new_tokens", "batch_size", "where", "random_sets", "seed", "threads", "dtype")
    assert {name: given[name] for name in names} == {name: SWEEP[name] for name in names}
    assert given["any_language"]
    assert not given["corpus"]
    shifted = {
        "pairs": [["en", "chinese"]],
        "prompts_source": BUILT_IN,
        "corpora": [{"label": "en", "source": "e.txt", "capped": True, "tokens": 64}],
        "seq_len": 32,
        "strength": 2.0,
        "shift_layers": [1, 2],
    }
    given = parsed(commands({"sweep": SWEEP | shifted}, files)[-1])
    assert (given["pair"], given["labels"], given["prompts"]) == (["en=chinese"], None, None)
    assert (given["corpus"], given["seq_len"], given["max_tokens"]) == (["en=e.txt"], 32, 64)
    assert (given["strength"], given["shift_layer"]) == (2.0, [1, 2])


def test_a_sweep_without_settings_is_of_the_model_of_the_others():
    described = {"profile": ABOUT, "sweep": {"random_sets": 5}}
    (_, line) = commands(described, {"profile": "p.safetensors", "sweep": "s.jsonl"})
    given = parsed(line)
    assert (given["model"], str(given["prompts"])) == ("some model", "PROMPTS")


def test_every_evaluation_s_command_is_taken():
    about = {**ABOUT, "random_sets": 4, "seed": 3}
    described = {
        "sampled": {
            **about,
            "neurons_method": "average-precision",
            "neurons": {"en": 1},
            "values": "medians",
            "samples": 8,
            "max_new_tokens": 6,
            "temperature": 0.5,
            "restrict": True,
        },
        "pruning": {**about, "pruning": "layers", "rate": 0.3, "experts": {"en": [1], "zh": [2]}},
        "deactivation": {**about, "threshold": 0.1, "values": "product", "examples_source": "e"},
    }
    files = {
        "average-precision in full": "a.safetensors",
        "experts in full": "e.safetensors",
        **{name: f"{name}.json" for name in described},
    }
    sampled, pruning, deactivation = map(parsed, commands(described, files))
    assert (str(sampled["neurons"]), sampled["profile"]) == ("a.safetensors", None)
    assert (sampled["samples"], sampled["temperature"], sampled["max_new_tokens"]) == (8, 0.5, 6)
    assert (sampled["labels"], sampled["any_language"]) == ("en", False)
    assert (str(pruning["experts"]), pruning["rate"]) == ("e.safetensors", 0.3)
    assert (pruning["form"], pruning["labels"]) == ("layers", "en,zh")
    assert pruning["corpus"] == ["en=en.txt", "zh=zh.txt"]
    assert (str(deactivation["examples"]), deactivation["threshold"]) == ("e", 0.1)
    assert deactivation["values"] == "product"
    for given, name in zip((sampled, pruning, deactivation), described, strict=True):
        assert str(given["output"]) == f"{name}.json"
        assert (given["random_sets"], given["seed"], given["threads"]) == (4, 3, 2)


def test_a_matrix_is_of_the_neurons_that_it_was_made_of_or_of_none_that_is_named():
    sets = {name: {**ABOUT, "method": name} for name in ("lape", "plnd")}
    matrix = {**ABOUT, "neurons_method": "lape", "seq_len": {"en": 64}}
    files = {"lape": "a.json", "plnd": "b.json", "matrix": "m.json"}
    assert "--neurons a.json" in commands({**sets, "matrix": matrix}, files)[-1]
    del matrix["neurons_method"]
    assert "--neurons NEURONS" in commands({**sets, "matrix": matrix}, files)[-1]

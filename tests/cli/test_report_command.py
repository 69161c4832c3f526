"""`lapefast report`."""

from __future__ import annotations

import re

import pytest

import lapefast as lf
from lapefast.evaluate import perplexity_matrix
from lapefast.evaluate.sweep import Sweep, SweepRow

LABELS = ("en", "zh")


@pytest.fixture(scope="module")
def files(made, tmp_path_factory):
    """A profile, two neuron files and a matrix."""
    directory = tmp_path_factory.mktemp("report")
    train = {label: made.train[label] for label in LABELS}
    profile = lf.profile(
        made.model, train, made.tokenizer, seq_len=32, max_tokens=1024, progress=False
    )
    profile.save(directory / "p.safetensors")
    rates = {"filter_rate": 0.8, "activation_bar_ratio": 0.8}
    for name, top_rate in (("n", 0.2), ("m", 0.3)):
        neurons = lf.detect.lape(profile, top_rate=top_rate, **rates)
        neurons.save(directory / f"{name}.json")
    matrix = perplexity_matrix(
        made.model,
        neurons,
        train,
        made.tokenizer,
        seq_len=32,
        max_tokens=256,
        random_sets=1,
        progress=False,
    )
    matrix.save(directory / "matrix.json")
    return directory


def headings(path) -> list[str]:
    return re.findall("<h2><bdi>(.*?)</bdi></h2>", path.read_text("utf-8"))


def test_report_writes_a_page_and_its_figures(lapefast, files, tmp_path):
    given = ["--profile", files / "p.safetensors", "--matrix", files / "matrix.json"]
    given += ["--neurons", files / "n.json", "--neurons", files / "m.json"]
    page, figures = tmp_path / "report.html", tmp_path / "new" / "figures"
    result = lapefast("report", *given, "-o", page, "--figures", figures, "--title", "My report")
    assert result.code == 0
    assert f"wrote {page}" in result.out
    assert headings(page) == [
        "What was measured",
        "Neurons: n.json",
        "Neurons: m.json",
        "Methods compared",
        "Distributions and thresholds of LAPE: n.json",
        "Distributions and thresholds of LAPE: m.json",
        "Perplexity",
    ]
    assert "<title>My report</title>" in page.read_text("utf-8")
    assert (figures / "methods.csv").read_text("utf-8").startswith("label,method,other method")
    names = {path.suffix for path in figures.iterdir()}
    assert names == {".png", ".svg", ".csv"}
    assert len(list(figures.iterdir())) == 3 * (3 + 3 + 1 + 2 + 2 + 1)


def test_two_files_of_one_name_are_told_apart(lapefast, files, tmp_path):
    page = tmp_path / "report.html"
    given = ["--neurons", files / "n.json"] * 2
    assert lapefast("report", *given, "-o", page).code == 0
    assert headings(page)[1:3] == ["Neurons: n.json", "Neurons: n.json (2)"]


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        ([], "give a profile or neurons"),
        (["--profile", "nowhere"], "cannot read the profile nowhere"),
        (["--neurons", "{p}"], "is not what --neurons takes but what --profile does"),
        (["--matrix", "{p}"], "give it by --profile"),
        (["--sweep", "{n}"], "give it by --neurons"),
        (["--pruning", "{m}"], "is not what --pruning takes but what --matrix does"),
        (["--experts", "{p}"], "give it by --profile"),
        (["--sharing", "{other}"], "not a sharing file"),
        (["--matrix", "{cut}"], "the matrix file {cut} is not one of lapefast's, or is cut short"),
        (["--neurons", "{n}", "--language", "en"], "--language must be LABEL=CODE"),
        (["--neurons", "{n}", "--language", "english=en"], "give one by --sweep"),
        (["--neurons", "{n}", "--figures", "{n}"], "give a directory"),
    ],
)
def test_bad_input_is_one_sentence_and_writes_nothing(lapefast, files, tmp_path, arguments, said):
    paths = {"p": files / "p.safetensors", "n": files / "n.json", "m": files / "matrix.json"}
    paths |= {"other": files / "other", "cut": files / "cut"}
    paths["other"].write_text("{}")
    paths["cut"].write_bytes(paths["m"].read_bytes()[:-9])
    given = [one.format(**paths) for one in arguments]
    result = lapefast("report", *given, "-o", tmp_path / "report.html")
    assert result.code == 2
    assert said.format(**paths) in result.err
    assert len(result.err.strip().splitlines()) == 1
    assert not list(tmp_path.iterdir())


def test_a_language_of_a_label_that_a_sweep_lacks_is_refused(lapefast, tmp_path):
    kinds = (("unedited", None), ("edited", "zh"))
    rows = [SweepRow("en", to, kind, None, "p", "t", [1], "en", 1.0) for kind, to in kinds]
    pair, codes = ("en", "zh"), {"en": "en", "zh": "zh"}
    Sweep([pair], rows, {pair: 0}, codes, {"random_sets": 0}).save(tmp_path / "s")
    given = ["--sweep", tmp_path / "s", "--language", "fr=fr", "-o", tmp_path / "report.html"]
    result = lapefast("report", *given)
    assert result.code == 2
    assert "--language says what 'fr' is, but the labels are en, zh" in result.err


def test_a_page_that_could_not_be_written_is_refused_first(lapefast, tmp_path):
    result = lapefast("report", "--profile", "nowhere", "-o", tmp_path / "no" / "report.html")
    assert result.code == 2
    assert "does not exist" in result.err


@pytest.mark.parametrize("width", [None, 80])
def test_help_shows_an_example_and_is_whole(lapefast, monkeypatch, width):
    if width:
        monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", width)
    result = lapefast("report", "--help")
    assert "Example: lapefast report" in " ".join(result.out.split())
    assert "…" not in result.out

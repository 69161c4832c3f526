"""`prune`, `categories` and `sample`, and the report that shows what they wrote."""

from __future__ import annotations

import json
import re

import pytest

import lapefast as lf
from lapefast import demo
from lapefast.cli import main
from lapefast.evaluate import CategoryDeactivation, PerplexityMatrix, SampledLanguages

LABELS = ("en", "zh")
RUN = ["--threads", 1, "--batch-size", 8]


@pytest.fixture(scope="module")
def files(made, tmp_path_factory):
    """What the commands wrote, each of what another wrote."""
    directory = tmp_path_factory.mktemp("evaluations")
    corpora = [f"--corpus={label}={made.valid[label]}" for label in LABELS]
    lines = [
        {label: [one[label][0][:9], one[label][1][:9]] for label in LABELS}
        for one in demo.examples(6)[:3]
    ]
    (directory / "e.jsonl").write_text("\n".join(json.dumps(one) for one in lines))
    identify = ["identify", made.directory, *corpora, *RUN, "--max-documents", 6]
    precise = ["--method", "average-precision", "--top", 9, "--bottom", 9]
    experts = ["--method", "experts", "--experts", 8]
    for name, command in {
        "a.json": [*identify, *precise, "--details", directory / "a.safetensors"],
        "n.json": [*identify, *experts, "--details", directory / "x.safetensors"],
        "p.json": [
            *("prune", made.directory, "--experts", directory / "x.safetensors", *corpora, *RUN),
            *("--labels", "zh", "--rate", 0.25, "--form", "layers", "--seq-len", 32),
            *("--max-tokens", 64, "--random-sets", 2),
        ],
        "s.json": [
            *("sample", made.directory, "--neurons", directory / "a.safetensors", *RUN),
            *("--samples", 3, "--max-new-tokens", 4, "--random-sets", 1),
        ],
        "c.json": [
            *("categories", made.directory, "--examples", directory / "e.jsonl", *RUN),
            *("--threshold", 0.01, "--random-sets", 1),
        ],
    }.items():
        with pytest.raises(SystemExit) as exit_:
            main([str(one) for one in [*command, "-o", directory / name]])
        assert exit_.value.code == 0
    return directory


def test_prune_writes_what_the_library_measures(made, files):
    found = PerplexityMatrix.load(files / "p.json")
    expected = lf.evaluate.pruning_matrix(
        made.model,
        lf.detect.Experts.load(files / "x.safetensors"),
        {label: made.valid[label] for label in LABELS},
        made.tokenizer,
        0.25,
        "layers",
        ["zh"],
        seq_len=32,
        max_tokens=64,
        batch_size=8,
        random_sets=2,
        progress=False,
    )
    assert found.rows == ["none", "zh"]
    assert found.nll.tolist() == expected.nll.tolist()
    assert found.random_range.tolist() == expected.random_range.tolist()


def test_sample_writes_what_the_library_samples(made, files):
    found = SampledLanguages.load(files / "s.json")
    expected = lf.evaluate.sampled_languages(
        made.model,
        made.tokenizer,
        lf.detect.AveragePrecisionNeurons.load(files / "a.safetensors"),
        samples=3,
        max_new_tokens=4,
        random_sets=1,
        batch_size=8,
        restrict=True,
        progress=False,
    )
    assert found.rows == expected.rows
    assert found.metadata["neurons_method"] == "average-precision"
    assert found.metadata["values"] == "medians"


def test_sample_takes_the_means_of_a_profile(lapefast, made, files, tmp_path):
    texts = {label: made.valid[label] for label in LABELS}
    profile = lf.profile(made.model, texts, made.tokenizer, seq_len=32, progress=False)
    profile.save(tmp_path / "profile")
    command = ["sample", made.directory, "--neurons", files / "n.json", "--samples", 2, *RUN]
    command += ["--max-new-tokens", 2, "--random-sets", 0, "-o", tmp_path / "s.json"]
    result = lapefast(*command, "--profile", tmp_path / "profile", "--labels", "zh")
    assert result.code == 0, result.err
    found = SampledLanguages.load(tmp_path / "s.json")
    assert [(row.label, row.random) for row in found.rows] == [("zh", [])]
    assert found.metadata["values"] == "given"
    refused = lapefast(*command)
    assert refused.code == 2
    assert "average-precision" in refused.err


def test_categories_writes_what_the_library_measures(made, files):
    found = CategoryDeactivation.load(files / "c.json")
    expected = lf.evaluate.category_deactivation(
        made.model,
        made.tokenizer,
        files / "e.jsonl",
        0.01,
        random_sets=1,
        batch_size=8,
        progress=False,
    )
    assert found.rows == expected.rows
    assert found.metadata["examples_source"] == "e.jsonl"


@pytest.mark.parametrize(
    ("name", "said"), [("p.json", "pruned"), ("s.json", "before"), ("c.json", "specific")]
)
def test_info_says_what_was_measured(lapefast, files, name, said):
    result = lapefast("info", files / name)
    assert result.code == 0
    assert said in result.out


def test_the_report_draws_them(lapefast, files, tmp_path):
    page = tmp_path / "report.html"
    given = ["--pruning", files / "p.json", "--sampled", files / "s.json"]
    given += ["--categories", files / "c.json", "--experts", files / "x.safetensors"]
    result = lapefast("report", *given, "-o", page, "--figures", tmp_path / "figures")
    assert result.code == 0, result.err
    text = page.read_text("utf-8")
    titles = ["Texts from nothing", "Experts", "Pruning of experts", "Categories deactivated"]
    assert re.findall("<h2><bdi>(.*?)</bdi></h2>", text)[1:] == titles
    commands = [re.sub("<.*?>", "", one) for one in re.findall("<code>(.*?)</code>", text)]
    assert [one.split()[1] for one in commands] == ["sample", "prune", "categories"]
    assert "--experts x.safetensors --rate=0.25 --form=layers --labels=zh" in commands[1]
    names = {one.stem for one in (tmp_path / "figures").glob("*.csv")}
    assert {"sampled", "pruning", "pruning-own", "deactivation-nll", "experts"} <= names


@pytest.mark.parametrize(
    ("arguments", "said"),
    [
        (["prune", "--experts", "{x}", "--corpus", "en=t", "--rate", "1"], "rate must be over 0"),
        (["prune", "--experts", "{x}", "--corpus", "en=t", "--labels", "fr"], "label 'fr'"),
        (["categories"], "give them by --examples"),
        (["categories", "--examples", "{x}"], "example file"),
        (["sample", "--neurons", "{x}"], "average-precision"),
        (["sample", "--neurons", "{a}", "--labels", "fr"], "no label 'fr'"),
        (["sample", "--neurons", "{n}"], "give a profile by --profile"),
        *(
            (["sample", "--neurons", "{a}", "--temperature", one], "--temperature must be from 0.0")
            for one in ("0", "1e-300", "inf", "nan")
        ),
        *(
            (["sample", "--neurons", "{a}", *languages], said)
            for languages, said in (
                (["--language", "en=klingon"], "no language that can be identified; the codes are"),
                (["--language", "fr=fr"], "says what 'fr' is, but the labels are en, zh"),
                (["--language", "en=en", "--language", "en=fr"], "is en and that it is fr"),
            )
        ),
        (["prune", "--experts", "{x}", "--corpus", "en=t", "--labels", ""], "label ''"),
        (["report", "--matrix", "{p}"], "not what --matrix takes but what --pruning does"),
        (["report", "--sampled", "{p}"], "give it by --pruning"),
        (["report", "--categories", "{s}"], "give it by --sampled"),
        (["report", "--neurons", "{x}"], "give it by --experts"),
        (["report", "--experts", "{a}"], "it is not an experts file"),
    ],
)
def test_bad_options_are_refused_before_a_model_is_loaded(
    lapefast, files, tmp_path, monkeypatch, arguments, said
):
    monkeypatch.setattr("lapefast.engines.transformers.load_model", None)
    paths = {one.stem: one for one in files.iterdir()}
    paths |= {one.stem: one for one in files.glob("*.safetensors")}
    command, *options = [one.format(**paths) for one in arguments]
    model = [] if command == "report" else ["some-model"]
    result = lapefast(command, *model, *options, "-o", tmp_path / "out")
    assert result.code == 2
    assert said in result.err
    assert not list(tmp_path.iterdir())

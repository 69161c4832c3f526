"""The commands, one after the other, on a tiny model."""

from __future__ import annotations

import subprocess
import sys

import pytest
import torch

import lapefast as lf
from lapefast.cli import main
from lapefast.evaluate import PerplexityMatrix

COMMANDS = ["profile", "identify", "evaluate", "generate", "sweep", "export", "report"]
COMMANDS += ["stability", "prune", "categories", "sample", "merge", "info", "demo", "doctor"]
LAPE = ["--top-rate", 0.2, "--filter-rate", 0.8, "--activation-bar-ratio", 0.8]
TEXT = ["--seq-len", 32, "--max-tokens", 1024, "--threads", 1]


@pytest.fixture(scope="module")
def files(made, tmp_path_factory):
    """A profile, its neurons and a matrix, made by the commands."""
    directory = tmp_path_factory.mktemp("files")
    corpora = [f"--corpus={label}={made.train[label]}" for label in ("en", "zh", "fr")]
    profile = ["profile", made.directory, *corpora, *TEXT, "-o", directory / "profile.safetensors"]
    identify = ["identify", directory / "profile.safetensors", *LAPE, "-o", directory / "n.json"]
    evaluate = ["evaluate", made.directory, "--neurons", directory / "n.json", *corpora, *TEXT]
    evaluate += ["--random-sets", 2, "-o", directory / "matrix.json"]
    for command in (profile, identify, evaluate):
        with pytest.raises(SystemExit) as exit_:
            main([str(argument) for argument in command])
        assert exit_.value.code == 0
    return directory


def test_profile_writes_what_the_library_counts(made, files):
    saved = lf.Profile.load(files / "profile.safetensors")
    train = {label: made.train[label] for label in ("en", "zh", "fr")}
    threads = torch.get_num_threads()
    torch.set_num_threads(1)
    expected = lf.profile(
        made.model, train, made.tokenizer, seq_len=32, max_tokens=1024, progress=False
    )
    torch.set_num_threads(threads)
    assert saved.labels == ["en", "zh", "fr"]
    assert all(torch.equal(saved.counts[site], expected.counts[site]) for site in expected.sites)


def test_identify_writes_what_the_library_finds(files):
    profile = lf.Profile.load(files / "profile.safetensors")
    expected = lf.detect.lape(profile, top_rate=0.2, filter_rate=0.8, activation_bar_ratio=0.8)
    saved = lf.NeuronSets.load(files / "n.json")
    assert sum(one.total for one in saved.values()) > 0
    assert dict(saved) == dict(expected)


def test_evaluate_writes_a_matrix(files):
    matrix = PerplexityMatrix.load(files / "matrix.json")
    assert matrix.rows == ["none", "en", "zh", "fr"]
    assert matrix.columns == ["en", "zh", "fr"]
    assert matrix.metadata["random_sets"] == 2


def test_identify_prints_neurons_per_layer_and_label(lapefast, files, tmp_path):
    result = lapefast("identify", files / "profile.safetensors", "-o", tmp_path / "n.pth")
    assert result.code == 0
    assert "layer" in result.out
    sets = lf.NeuronSets.load(tmp_path / "n.pth", ["en", "zh", "fr"])
    assert sets.labels == ["en", "zh", "fr"]


def test_merge_adds_profiles(lapefast, made, files, tmp_path):
    for label in ("vi", "id"):
        corpus = f"{label}={made.train[label]}"
        one = tmp_path / f"{label}.safetensors"
        assert lapefast("profile", made.directory, "--corpus", corpus, *TEXT, "-o", one).code == 0
    both = tmp_path / "both.safetensors"
    parts = [tmp_path / "vi.safetensors", tmp_path / "id.safetensors"]
    assert lapefast("merge", *parts, files / "profile.safetensors", "-o", both).code == 0
    assert lf.Profile.load(both).labels == ["vi", "id", "en", "zh", "fr"]


def test_parts_are_merged_and_a_run_that_ended_is_read_from_its_state(lapefast, made, tmp_path):
    def profile(output, *options):
        text = ["--corpus", f"en={made.train['en']}", *TEXT, "--batch-size", 3, "--threads", 1]
        result = lapefast("profile", made.directory, *text, "-o", tmp_path / output, *options)
        assert result.code == 0, result.err
        return lf.Profile.load(tmp_path / output)

    state = ["--resume", tmp_path / "run", "--token-cache", tmp_path / "tokens"]
    whole = profile("whole", *state)
    assert profile("again", *state).metadata == whole.metadata
    assert (tmp_path / "again").read_bytes() == (tmp_path / "whole").read_bytes()
    for part in (1, 2):
        profile(f"part-{part}", "--part", f"{part}/2")
    parts = [tmp_path / "part-2", tmp_path / "part-1"]
    assert lapefast("merge", *parts, "-o", tmp_path / "both").code == 0
    both = lf.Profile.load(tmp_path / "both")
    assert both.tokens.tolist() == whole.tokens.tolist()
    assert all(torch.equal(both.counts[site], whole.counts[site]) for site in whole.sites)


@pytest.mark.parametrize("part", ["3", "0/2", "3/2", "1/2/3", "a/b"])
def test_a_part_that_is_none_is_refused(lapefast, made, tmp_path, part):
    corpus = f"en={made.train['en']}"
    options = ["--corpus", corpus, "--part", part, "-o", tmp_path / "p"]
    result = lapefast("profile", made.directory, *options)
    assert result.code == 2
    assert f"--part must be I/N with 1 <= I <= N, such as 3/8, got '{part}'" in result.err


@pytest.mark.parametrize(
    ("name", "said"),
    [("profile.safetensors", "1,024"), ("n.json", "layer"), ("matrix.json", "random")],
)
def test_info_says_what_a_file_holds(lapefast, files, name, said):
    result = lapefast("info", files / name)
    assert result.code == 0
    assert said in result.out


def test_info_reads_published_files(lapefast, files, tmp_path):
    lf.NeuronSets.load(files / "n.json").save(tmp_path / "n.pth")
    result = lapefast("info", tmp_path / "n.pth")
    assert result.code == 0
    assert "layer" in result.out


@pytest.mark.parametrize("command", COMMANDS)
def test_help_shows_an_example(lapefast, command):
    result = lapefast(command, "--help")
    assert result.code == 0
    assert f"Example: lapefast {command}" in " ".join(result.out.split())


@pytest.mark.parametrize("command", COMMANDS)
def test_help_is_whole_at_80_columns(lapefast, monkeypatch, command):
    monkeypatch.setattr("typer.rich_utils.MAX_WIDTH", 80)
    assert "…" not in lapefast(command, "--help").out


def test_help_lists_the_commands_that_there_are(lapefast):
    out = lapefast("--help").out
    assert all(command in out for command in COMMANDS)
    assert "steer" not in out


def test_help_does_not_import_torch():
    code = (
        "import sys\n"
        "from lapefast.cli import main\n"
        "try:\n    main(['--help'])\n"
        "except SystemExit:\n    pass\n"
        "assert not {'torch', 'transformers', 'numpy', 'matplotlib'} & set(sys.modules)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, capture_output=True, timeout=60)


def test_the_version_is_printed(lapefast):
    assert lapefast("--version").out.strip() == lf.__version__


def test_doctor_says_who_serves_the_cpu(lapefast):
    result = lapefast("doctor")
    assert result.code == 0
    assert "device cpu: served by backend" in result.out


def test_doctor_heeds_the_backend_that_is_asked_for(lapefast, monkeypatch):
    monkeypatch.setenv("LAPEFAST_BACKEND", "reference")
    assert "device cpu: served by backend reference" in lapefast("doctor").out


@pytest.mark.parametrize("option", [("--seed", "-1"), ("--seed", 2**32), ("--threads", 100_000)])
def test_numbers_that_no_library_takes_are_refused(lapefast, tmp_path, option):
    result = lapefast("profile", "model", "--corpus", "en=x", "-o", tmp_path / "p", *option)
    assert result.code == 2
    assert f"Invalid value for '{option[0]}'" in result.err

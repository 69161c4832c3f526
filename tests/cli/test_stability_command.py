"""`lapefast stability`, and `lapefast profile --until-stable`."""

from __future__ import annotations

import re

import pytest

import lapefast as lf
from lapefast.evaluate import Stability

RATES = ["--top-rate", 0.2, "--filter-rate", 0.8, "--activation-bar-ratio", 0.8]


@pytest.fixture
def profile(lapefast, made, tmp_path):
    """Runs `lapefast profile` on text of two labels: what it said, and the profile's path."""

    def run(*options, labels=("en", "zh"), part="train"):
        path = tmp_path / "p.safetensors"
        corpora = [f"--corpus={label}={getattr(made, part)[label]}" for label in labels]
        size = ["--seq-len", 16, "--batch-size", 8, "--threads", 1]
        return lapefast("profile", made.directory, *corpora, *size, *options, "-o", path), path

    return run


def test_it_says_writes_and_draws_what_the_library_finds(lapefast, profile, tmp_path):
    _, path = profile("--statistics", "counts,shard_counts", "--max-tokens", 1024)
    files = [tmp_path / name for name in ("s.json", "s.png", "s.svg")]
    result = lapefast("stability", path, *RATES, "-o", files[0], "--figure", files[1])
    assert result.code == 0
    found = lf.evaluate.stability(
        lf.Profile.load(path),
        lambda one: lf.detect.lape(one, top_rate=0.2, filter_rate=0.8, activation_bar_ratio=0.8),
    )
    assert Stability.load(files[0]).announced == found.announced
    for label, overlap in found.announced.items():
        last = [line for line in result.out.splitlines() if line.split()[:2] == [label, "1,024"]]
        assert last[0].split()[3] == f"{overlap:.3f}"
    assert all(file.stat().st_size for file in files)
    assert all(file.name in result.out for file in files)
    assert lapefast("info", files[0]).out.count("1,024") == 2


def test_a_profile_without_shards_is_told_how_to_get_them(lapefast, profile, tmp_path):
    _, path = profile("--max-tokens", 512)
    result = lapefast("stability", path, "-o", tmp_path / "s.json")
    assert result.code == 2
    assert "include 'shard_counts'" in result.err


def test_a_pass_stops_once_all_labels_are_stable(profile):
    # So low an overlap is reached, if any, as soon as there is a row for each shard.
    result, path = profile("--until-stable", 0.01, *RATES)
    saved = lf.Profile.load(path)
    said = saved.metadata["until_stable"]
    assert result.code == 0
    assert said["reached"] is True
    assert said["parameters"]["top_rate"] == 0.2
    assert list(saved.statistics) == ["counts", "sums", "shard_counts"]
    tokens = saved.tokens.tolist()
    assert tokens[0] == tokens[1]
    assert tokens[0] / 128 in (1, 2, 4, 8, 16)  # batches, doubling
    overlap = said["announced"]["zh"]
    assert "stable: an overlap of at least 0.01 with far more text" in result.out
    assert f"zh {overlap:.3f} at {tokens[1]:,} tokens" in result.out


def test_a_text_that_ends_before_says_so_and_where_each_label_is(profile):
    result, path = profile("--until-stable", 1, *RATES, "--max-tokens", 1024)
    saved = lf.Profile.load(path)
    said = saved.metadata["until_stable"]
    assert result.code == 0
    assert (said["reached"], said["overlap"]) == (False, 1.0)
    assert saved.tokens.tolist() == [1024, 1024]
    assert "the text or --max-tokens ended before an overlap of 1.0 was reached" in result.out
    assert f"en {said['announced']['en']:.3f} at 1,024 tokens" in result.out


def test_a_text_of_too_few_rows_says_so(profile):
    result, path = profile("--until-stable", 0.9, "--max-tokens", 64)
    assert result.code == 0
    assert (
        "the text or --max-tokens ended before every label had a row for each shard" in result.out
    )
    assert lf.Profile.load(path).metadata["until_stable"]["announced"] is None


@pytest.mark.parametrize(
    ("options", "labels", "message"),
    [
        (["--until-stable", 0.9], ["en"], "give the --corpus of two or more"),
        (["--until-stable", 1.5], ["en", "zh"], "must be over 0 and at most 1, got 1.5"),
        (["--until-stable", 0.9, "--top-rate", 2], ["en", "zh"], "top_rate must be over 0 and at"),
        (["--top-rate", 0.2], ["en", "zh"], "LAPE's options are for --until-stable"),
    ],
)
def test_what_can_not_be_meant_is_refused(profile, options, labels, message):
    result, path = profile(*options, labels=labels)
    assert result.code == 2
    assert message in result.err
    assert not path.exists()


@pytest.mark.parametrize(
    ("output", "message"),
    [
        ("s.svg", "-o .*s.svg is a file of --figure"),
        ("p.safetensors", "it is read, too; give another name"),
    ],
)
def test_nothing_is_written_over_by_its_own_command(lapefast, tmp_path, output, message):
    (tmp_path / "p.safetensors").write_bytes(b"kept")
    result = lapefast(
        "stability", tmp_path / "p.safetensors", "-o", tmp_path / output,
        "--figure", tmp_path / "s.png",
    )  # fmt: skip
    assert result.code == 2
    assert re.search(message, result.err.replace("\n", ""))
    assert (tmp_path / "p.safetensors").read_bytes() == b"kept"

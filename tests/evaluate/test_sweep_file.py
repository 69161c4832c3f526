"""The file of a sweep, without the run that makes it."""

from __future__ import annotations

import json
import math

import pytest

from lapefast.errors import InputError
from lapefast.evaluate.sweep import Sweep, SweepRow


@pytest.fixture
def found() -> Sweep:
    kinds = [("unedited", None, "en"), ("edited", "zh", "zh"), ("random", "zh", "en")]
    rows = [
        SweepRow(
            "en", target, kind, 0 if kind == "random" else None, "p", "t", [1, 2], language, 1.0
        )
        for kind, target, language in kinds
    ]
    pair = ("en", "zh")
    metadata = {"random_sets": 1, "seed": 3}
    return Sweep([pair], rows, {pair: 7}, {"en": "en", "zh": "zh"}, metadata)


@pytest.fixture
def path(found, tmp_path):
    found.save(tmp_path / "sweep.jsonl")
    return tmp_path / "sweep.jsonl"


def rewritten(path, change):
    lines = path.read_text().splitlines()
    path.write_text("\n".join(change(lines)))
    return path


def test_a_sweep_is_read_as_it_was_written(path, found):
    assert Sweep.load(path) == found
    (pair,) = Sweep.load(path, {"zh": "fr"}).summary()
    assert (pair.edited.share, pair.overlap) == (0, 7)


def test_a_file_without_settings_is_read_and_summed_up(path, found):
    loaded = Sweep.load(rewritten(path, lambda lines: lines[1:]))
    assert (loaded.rows, loaded.metadata) == (found.rows, {"random_sets": 1})
    (pair,) = loaded.summary()
    assert (pair.source, pair.target, pair.overlap) == ("en", "zh", 0)
    assert (pair.unedited.share, pair.edited.share, pair.random[0].share) == (0, 1, 0)
    assert pair.edited.perplexity == pytest.approx(math.e, rel=1e-15)
    (pair,) = Sweep.load(path, {"zh": "fr"}).summary()
    assert pair.edited.share == 0
    with pytest.raises(InputError, match="'nothing' of label 'zh' is of no language"):
        Sweep.load(path, {"zh": "nothing"})


@pytest.mark.parametrize(
    ("change", "said"),
    [
        (lambda lines: [], "not a sweep file"),
        (lambda lines: ["{"], "not a sweep file"),
        (lambda lines: ["[]"], "not a sweep file"),
        (lambda lines: ['{"a": 1}'], "not a sweep file"),
        (lambda lines: lines[1:2], "not a sweep file"),  # unedited alone
        (lambda lines: [*lines[:-1], lines[-1][:-9]], "not a sweep file"),
        (lambda lines: [lines[0].replace("overlaps", "over"), *lines[1:]], "not a sweep file"),
        (lambda lines: [json.dumps(json.loads(lines[0]) | {"pairs": []})], "not a sweep file"),
        (lambda lines: lines[:-1], "lacks generations"),
        (lambda lines: lines[:1], "lacks generations"),
        (lambda lines: lines[2:3], "lacks generations"),
    ],
)
def test_what_is_no_whole_sweep_is_refused(path, change, said):
    with pytest.raises(InputError, match=said):
        Sweep.load(rewritten(path, change))


def test_a_file_of_another_version_is_refused(path):
    about = json.loads(path.read_text().splitlines()[0]) | {"version": 2}
    with pytest.raises(InputError, match="of version 1, got .* of version 2"):
        Sweep.load(rewritten(path, lambda lines: [json.dumps(about), *lines[1:]]))

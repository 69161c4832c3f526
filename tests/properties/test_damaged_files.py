"""A damaged file gives one sentence, or is one that can be read: no other error, no large
allocation. Of a file sealed by a checksum, what is read is what was written."""

from __future__ import annotations

import bz2
import contextlib
import gzip
import json
import lzma
import math
import resource
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow
import pyarrow.parquet
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

import lapefast as lf
from lapefast.corpus import Corpus
from lapefast.errors import InputError
from lapefast.evaluate import PerplexityMatrix
from lapefast.evaluate.categories import CategoryDeactivation, CategoryRow
from lapefast.evaluate.prompts import read_prompts
from lapefast.evaluate.sweep import Sweep, SweepRow
from lapefast.models.sites import Site
from lapefast.neurons.edit_files import load_edits, save_edits
from lapefast.neurons.layout import Layout
from lapefast.neurons.sets import NeuronSets
from lapefast.profiles import Profile
from lapefast.steering.diffmean import ResidualMeans

SITES = [Site("layers.0.mlp", 4, "SiLU"), Site("layers.1.mlp", 4, "SiLU")]
LAYOUT = Layout(tuple(site.name for site in SITES), {site.name: 4 for site in SITES}, "f" * 64, "m")
SETS = {"en": {"layers.0.mlp": [0, 3], "layers.1.mlp": []}, "zh": {"layers.0.mlp": [1]}}
TEXTS = ["one text", "деньги", "another, a little longer", "語"]
LINES = "\n".join(TEXTS).encode()
LIMIT = 1 << 28  # bytes that reading may need beside what the process has


def profile() -> Profile:
    counts = {site.name: torch.arange(8).reshape(2, 4) for site in SITES}
    sums = {name: values / 7 for name, values in counts.items()}
    sums = {name: values.double() for name, values in sums.items()}
    about = {"fingerprint": "f", "corpora": [{"label": "en", "source": "x", "rows": [0, 3]}]}
    tokens = {"decoder": torch.tensor([9, 20])}
    return Profile(["en", "zh"], SITES, tokens, {"counts": counts, "sums": sums}, about)


def means() -> ResidualMeans:
    values = torch.arange(12, dtype=torch.float64).reshape(2, 2, 3)
    return ResidualMeans(["en", "zh"], ["layers.0", "layers.1"], values, torch.tensor([5, 6]))


def matrix() -> PerplexityMatrix:
    values = torch.tensor([[1.0, 2.0], [3.0, 4.5]], dtype=torch.float64)
    ranges = torch.stack([values, values], -1)
    return PerplexityMatrix(["none", "en"], ["en", "zh"], values, values, ranges, [7, 8], {"a": 1})


def deactivation() -> CategoryDeactivation:
    return CategoryDeactivation([CategoryRow("none", "en", 3, 5, 0.0, 1.5, 0.5, [], [])], {"a": 1})


def sweep() -> Sweep:
    rows = [
        SweepRow("en", target, kind, None, "p", "t", [1, 2], "en", 0.5)
        for target, kind in [(None, "unedited"), ("fr", "edited")]
    ]
    about = {"random_sets": 0}
    return Sweep([("en", "fr")], rows, {("en", "fr"): 0}, {"en": "en", "fr": "fr"}, about)


def sets() -> NeuronSets:
    return NeuronSets(SETS, LAYOUT, {"method": "lape"})


def write_edits(path: Path) -> None:
    save_edits(path, {"quiet": lf.deactivate(sets()["en"]), "loud": lf.scale(sets()["zh"], 2.5)})


def write_parquet(path: Path) -> None:
    pyarrow.parquet.write_table(pyarrow.table({"text": TEXTS * 3}), path, compression="zstd")


def corpus(path: Path) -> list[list[int]]:
    """The documents of a corpus; characters are tokens."""

    def tokenizer(texts, **_):
        return {"input_ids": [list(map(ord, text)) for text in texts]}

    is_array = path.suffix in (".npy", ".pt")
    read = Corpus("en", path, None if is_array else tokenizer)
    return [document.tolist() for document in read.documents()]


def counts(path: Path) -> Profile:
    return Profile.from_published({"en": path})


def published(path: Path) -> NeuronSets:
    return NeuronSets.load(path, ["a", "b"])


def saved(make: Callable[[], Any]) -> Callable[[Path], None]:
    return lambda path: make().save(path)


def holding(data: bytes) -> Callable[[Path], None]:
    return lambda path: path.write_bytes(data)


JSON_LINES = "\n".join(json.dumps({"text": text}) for text in TEXTS).encode()
PROMPTS = "\n".join(json.dumps({"label": "en", "prompt": text}) for text in TEXTS).encode()
INDICES = [[torch.tensor([0, 2]), torch.tensor([1])], [torch.tensor([3]), torch.tensor([0])]]
COUNTS = {"n": 9, "over_zero": torch.arange(8, dtype=torch.int32).reshape(2, 4)}
ZSTD = bytes(pyarrow.compress(LINES, "zstd", asbytes=True))
SEALED = ("p.safetensors", "r.safetensors")

# File name -> what writes it, and what reads it.
FILES: dict[str, tuple[Callable[[Path], Any], Callable[[Path], Any]]] = {
    "p.safetensors": (saved(profile), Profile.load),
    "r.safetensors": (saved(means), ResidualMeans.load),
    "neurons.json": (saved(sets), NeuronSets.load),
    "neurons.pth": (lambda path: torch.save(INDICES, path), published),
    "counts": (lambda path: torch.save(COUNTS, path), counts),
    "edits.json": (write_edits, load_edits),
    "matrix.json": (saved(matrix), PerplexityMatrix.load),
    "deactivation.json": (saved(deactivation), CategoryDeactivation.load),
    "sweep.jsonl": (saved(sweep), Sweep.load),
    "prompts.jsonl": (holding(PROMPTS), read_prompts),
    "corpus.txt": (holding(LINES), corpus),
    "corpus.jsonl": (holding(JSON_LINES), corpus),
    "corpus.npy": (lambda path: np.save(path, np.arange(9)), corpus),
    "corpus.pt": (lambda path: torch.save(torch.arange(9), path), corpus),
    "corpus.parquet": (write_parquet, corpus),
    "corpus.txt.gz": (holding(gzip.compress(LINES, mtime=0)), corpus),
    "corpus.txt.bz2": (holding(bz2.compress(LINES)), corpus),
    "corpus.txt.xz": (holding(lzma.compress(LINES)), corpus),
    "corpus.txt.zst": (holding(ZSTD), corpus),
}


@contextlib.contextmanager
def little_memory():
    """No more than `LIMIT` bytes of address space beside what is there."""
    pages = int(Path("/proc/self/statm").read_text().split()[0])
    soft, hard = resource.getrlimit(resource.RLIMIT_AS)
    resource.setrlimit(resource.RLIMIT_AS, (pages * resource.getpagesize() + LIMIT, hard))
    try:
        yield
    finally:
        resource.setrlimit(resource.RLIMIT_AS, (soft, hard))


def outcome(read: Callable[[Path], Any], path: Path) -> Any:
    """What was read, or None where it was refused in one sentence."""
    try:
        with little_memory():
            return read(path)
    except InputError as error:
        sentence = str(error)
    assert 0 < len(sentence) < 1500
    return None


@st.composite
def damaged(draw, data: bytes) -> bytes:
    """The bytes with up to three changes, or bytes that have nothing to do with them."""
    if draw(st.integers(0, 9)) == 0:
        return draw(st.binary(max_size=64))
    for _ in range(draw(st.integers(1, 3))):
        at = draw(st.integers(0, max(len(data) - 1, 0)))
        end = min(len(data), at + draw(st.sampled_from([1, 2, 8, 40])))
        match draw(st.sampled_from(["flip", "replace", "cut", "leave out", "insert", "repeat"])):
            case "flip" if data:
                flipped = data[at] ^ (1 << draw(st.integers(0, 7)))
                data = data[:at] + bytes([flipped]) + data[at + 1 :]
            case "replace":
                data = data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[end:]
            case "cut":
                data = data[:at]
            case "leave out":
                data = data[:at] + data[end:]
            case "insert":
                data = data[:at] + draw(st.binary(min_size=1, max_size=8)) + data[at:]
            case "repeat":
                data = data[:end] + data[at:]
    return data


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    made = tmp_path_factory.mktemp("files")
    for name, (write, read) in FILES.items():
        write(made / name)
        assert outcome(read, made / name) is not None, name
    return made


@pytest.mark.parametrize("name", FILES)
@given(st.data())
def test_a_damaged_file_is_refused_in_one_sentence_or_read(name, folder, data):
    intact, read = folder / name, FILES[name][1]
    path = folder / f"damaged.{name}"
    path.write_bytes(data.draw(damaged(intact.read_bytes())))
    found = outcome(read, path)
    if name in SEALED and found is not None:
        again = folder / f"again.{name}"
        found.save(again)
        assert again.read_bytes() == intact.read_bytes()


ANYTHING = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=4)
    | st.sampled_from([2**63, -(2**63) - 1, math.inf, "layers.0.mlp", "en", 1e308]),
    lambda inner: st.lists(inner, max_size=3)
    | st.dictionaries(st.text(max_size=3), inner, max_size=2),
    max_leaves=5,
)  # fmt: skip


@st.composite
def rewritten(draw, content: Any) -> Any:
    """The JSON with one part replaced by something else, left out or given twice."""
    if isinstance(content, (dict, list)) and content and draw(st.integers(0, 4)):
        keys = [*content] if isinstance(content, dict) else range(len(content))
        key = draw(st.sampled_from(list(keys)))
        changed = content.copy()
        if draw(st.integers(0, 5)):
            changed[key] = draw(rewritten(content[key]))
        elif isinstance(content, list) and draw(st.booleans()):
            changed.append(content[key])
        else:
            del changed[key]
        return changed
    return draw(ANYTHING)


@pytest.mark.parametrize("name", [name for name in FILES if ".json" in name])
@given(st.data())
def test_json_of_another_structure_is_refused_in_one_sentence_or_read(name, folder, data):
    text = (folder / name).read_text("utf-8")
    parts = text.splitlines() if name.endswith("jsonl") else [text]
    at = data.draw(st.integers(0, len(parts) - 1))
    parts[at] = json.dumps(data.draw(rewritten(json.loads(parts[at]))))
    path = folder / f"rewritten.{name}"
    path.write_text("\n".join(parts), "utf-8")
    outcome(FILES[name][1], path)


@pytest.mark.parametrize("name", [name for name in FILES if ".json" in name])
def test_json_that_is_nested_too_deep_is_refused(name, folder):
    path = folder / f"deep.{name}"
    path.write_text('{"format":' * 100_000, "utf-8")
    assert outcome(FILES[name][1], path) is None


@given(st.data())
def test_a_sealed_profile_that_says_something_else_is_refused_in_one_sentence_or_read(folder, data):
    from lapefast.profiles import storage

    made = profile()
    about = {
        "labels": made.labels,
        "sites": [vars(site) for site in made.site_info],
        "statistics": list(made.statistics),
        "metadata": made.metadata,
    }
    path = folder / "told.safetensors"
    storage._FILE.write(path, storage._tensors(made), data.draw(rewritten(about)))
    found = outcome(Profile.load, path)
    assert found is None or found.sites

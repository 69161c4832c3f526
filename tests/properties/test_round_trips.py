"""What is written is what is read; profiles add up in any order; a corpus is its tokens."""

from __future__ import annotations

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st

from lapefast.corpus.packing import CorpusReport, Stream, pack
from lapefast.corpus.pieces import Piece
from lapefast.corpus.tokens import Tokenisation
from lapefast.errors import InputError
from lapefast.models.sites import Site
from lapefast.neurons.edit_files import load_edits, save_edits
from lapefast.neurons.edits import Edit
from lapefast.neurons.layout import Layout
from lapefast.neurons.sets import NeuronSets
from lapefast.profiles import STATISTICS, Profile

# JSON and UTF-8 hold no half of a surrogate pair.
NAMES = st.text(st.characters(exclude_categories=["Cs"]), min_size=1, max_size=6)
# Of shards, tests/profiles.
WHOLE = tuple(name for name in STATISTICS if name != "shard_counts")
LABELS = st.lists(NAMES, min_size=1, max_size=3, unique=True)
WIDTHS = st.dictionaries(NAMES.map("layers.{}".format), st.integers(1, 9), min_size=1, max_size=3)


@st.composite
def profiles(draw, widths, statistics=WHOLE):
    """A profile of the sites, in which no text is known again."""
    labels = draw(st.lists(st.sampled_from(["en", "zh", "fr", "日本"]), min_size=1, unique=True))
    generator = torch.Generator().manual_seed(draw(st.integers(0, 2**32)))
    tokens = torch.randint(1, 10**12, (len(labels),), generator=generator)

    def values(name, width):
        shares = torch.rand(len(labels), width, generator=generator, dtype=torch.float64)
        if name == "counts":
            return (shares * tokens[:, None]).long()
        return (shares - 0.5) * 10.0 ** draw(st.integers(-20, 20))

    sites = [Site(name, width, "SiLU") for name, width in widths.items()]
    kept = {name: {s.name: values(name, s.width) for s in sites} for name in statistics}
    return Profile(labels, sites, {"decoder": tokens}, kept, {"model": "m", "fingerprint": "f"})


def same_but_for_rounding(found: Profile, expected: Profile) -> None:
    """Counts and tokens are equal; sums to 1e-12 of what is added up."""
    rows = [found.labels.index(label) for label in expected.labels]
    assert len(rows) == len(found.labels)
    assert torch.equal(found.tokens[rows], expected.tokens)
    for name, values in expected.statistics.items():
        for site, tensor in values.items():
            got = found.statistics[name][site][rows]
            if name == "counts":
                assert torch.equal(got, tensor)
            else:
                # Terms are below 0.5 * 10^20 at most, and may cancel.
                torch.testing.assert_close(got, tensor, rtol=1e-12, atol=1e-12 * 1e20)


@given(st.data(), WIDTHS, st.sets(st.sampled_from(WHOLE), min_size=1))
def test_a_profile_is_read_as_it_was_written(tmp_path, data, widths, statistics):
    profile = data.draw(profiles(widths, sorted(statistics)))
    profile.save(tmp_path / "profile")
    read = Profile.load(tmp_path / "profile")
    assert read.labels == profile.labels
    assert read.site_info == profile.site_info
    assert read.metadata == profile.metadata
    assert torch.equal(read.tokens, profile.tokens)
    for name, values in profile.statistics.items():
        assert all(torch.equal(read.statistics[name][site], values[site]) for site in values)


@given(st.data(), WIDTHS)
def test_profiles_add_up_in_any_order_and_grouping(data, widths):
    a, b, c = (data.draw(profiles(widths)) for _ in range(3))
    same_but_for_rounding(b + a, a + b)
    same_but_for_rounding((a + b) + c, a + (b + c))


@st.composite
def layouts(draw):
    widths = draw(WIDTHS)
    return Layout(tuple(widths), widths, draw(NAMES), draw(st.none() | NAMES))


def members(width):
    return st.sets(st.sampled_from(range(width))).map(sorted)


@given(st.data(), layouts(), LABELS)
def test_neuron_sets_are_read_as_they_were_written(tmp_path, data, layout, labels):
    chosen = st.fixed_dictionaries({site: members(width) for site, width in layout.widths.items()})
    sets = NeuronSets({label: data.draw(chosen) for label in labels}, layout, {"method": labels})
    sets.save(tmp_path / "neurons.json")
    read = NeuronSets.load(tmp_path / "neurons.json")
    assert (read.labels, read.layout, read.metadata) == (labels, layout, {"method": labels})
    sets.save(tmp_path / "neurons.pth")
    published = NeuronSets.load(tmp_path / "neurons.pth", labels)
    for label in labels:
        for mine, theirs, bare in zip(
            sets.layers(label), read.layers(label), published.layers(label), strict=True
        ):
            assert torch.equal(mine, theirs)
            assert torch.equal(mine, bare)


@given(st.data(), layouts(), st.lists(NAMES.map("edit {}".format), min_size=1, unique=True))
def test_edits_are_read_as_they_were_written(tmp_path, data, layout, names):
    number = st.floats(width=32, allow_nan=False, allow_infinity=False)

    def table(neurons):
        values = st.lists(number, min_size=len(neurons), max_size=len(neurons))
        scale, shift = (torch.tensor(data.draw(values), dtype=torch.float32) for _ in range(2))
        return torch.tensor(neurons), scale, shift

    edits = {}
    for name in names:
        sites = data.draw(st.sets(st.sampled_from(layout.sites), min_size=1))
        chosen = {site: data.draw(members(layout.widths[site])) or [0] for site in sorted(sites)}
        edits[name] = Edit({site: table(neurons) for site, neurons in chosen.items()}, layout)
    save_edits(tmp_path / "edits", edits, names[0])
    read = load_edits(tmp_path / "edits")
    assert (read.server, list(read.edits), read.layout) == (names[0], names, layout)
    for name, edit in edits.items():
        assert read.edits[name].tables.keys() == edit.tables.keys()
        for site, columns in edit.tables.items():
            for mine, theirs in zip(columns, read.edits[name].tables[site], strict=True):
                assert torch.equal(mine, theirs)


class Words:
    """A fast tokenizer in small: a run of letters is a token, and so is every other character."""

    is_fast = True

    def __init__(self, special: bool) -> None:
        self.special = special

    def __call__(self, texts, add_special_tokens, return_offsets_mapping=False, **_):
        ids, offsets = [], []
        for text in texts:
            spans, start = [], 0
            for at in range(len(text) + 1):
                ends = at == len(text) or not text[at].isalpha() or not text[start].isalpha()
                if at > start and ends:
                    spans.append((start, at))
                    start = at
            tokens = [sum(ord(c) << i for i, c in enumerate(text[b:e])) for b, e in spans]
            around = ([1], [2]) if self.special and add_special_tokens else ([], [])
            ids.append(around[0] + tokens + around[1])
            offsets.append([(0, 0)] * len(around[0]) + spans + [(0, 0)] * len(around[1]))
        found = {"input_ids": ids}
        return {**found, "offset_mapping": offsets} if return_offsets_mapping else found


@pytest.mark.parametrize("special", [True, False])
@given(
    # No word is longer than the windows' context: see `Tokenisation`.
    st.lists(st.lists(st.text("ab.", max_size=5), max_size=30).map(" ".join), max_size=6),
    st.lists(st.integers(1, 9), min_size=1, max_size=3),
    st.integers(1, 4),
    st.integers(33, 70),
    st.integers(1, 12),
    st.integers(0, 3),
    st.none() | st.integers(1, 9),
)
def test_rows_are_the_documents_tokens_whatever_the_pieces_and_windows(
    special, documents, cuts, batch, window, seq_len, start, max_rows
):
    tokenizer = Words(special)

    def pieces():
        for document in documents:
            at = turn = 0
            while True:
                size = cuts[turn % len(cuts)]
                last = at + size >= len(document)
                yield Piece(document[at : at + size], last)
                if last:
                    break
                at, turn = at + size, turn + 1

    kept = [document for document in documents if document.strip()]
    ids = [token for ids in tokenizer(kept, True)["input_ids"] for token in ids]
    count = len(ids) // seq_len if max_rows is None else min(len(ids) // seq_len, max_rows)
    expected = torch.tensor(ids[: count * seq_len], dtype=torch.int64).reshape(count, seq_len)
    if not count:
        return  # refused: tests/corpus
    tokenisation = Tokenisation(tokenizer, True, batch=batch, window=window, context=8)
    stream = Stream(tokenisation.tokens(pieces()))
    empty = CorpusReport("en", "texts", "", seq_len, (start, start), 0, 0, 0, False)
    if start > count and max_rows != count:
        with pytest.raises(InputError, match=f"only {count} rows"):
            list(pack(stream, empty, max_rows, None))
        return
    made, reports = zip(*pack(stream, empty, max_rows, None), strict=True)
    parts, report = [rows for rows in made if rows is not None], reports[-1]
    assert np.array_equal(np.concatenate(parts) if parts else expected[start:], expected[start:])
    if not report.capped:
        assert report.documents == len(kept)
        assert report.empty == len(documents) - len(kept)
        assert report.dropped == len(ids) - count * seq_len

from __future__ import annotations

import pytest
import torch
from families import VOCABULARY, shared

import lapefast as lf
from lapefast.errors import InputError

ROWS = torch.arange(40 * 6).reshape(40, 6) * 29 % (VOCABULARY - 10) + 5
CORPORA = {"en": ROWS, "zh": ROWS.flip(0) + 1, "fr": ROWS[3:11] + 2}
STATISTICS = ("counts", "shard_counts")


@pytest.fixture
def llama():
    return shared("llama")


def profiled(model, corpora=CORPORA, **options):
    options = {"batch_size": 2, "statistics": STATISTICS, **options}
    return lf.profile(model, corpora, progress=False, **options)


class Asked:
    """Says yes at a number of tokens of the first label, and keeps what it was asked about."""

    metadata = {"until": "asked"}

    def __init__(self, tokens):
        self.enough, self.tokens = tokens, []

    def __call__(self, profile):
        self.tokens.append(profile.tokens.tolist())
        return self.tokens[-1][0] >= self.enough


def test_labels_are_read_in_turn_and_asked_about_at_doubling_counts(llama):
    until = Asked(96)
    profile = profiled(llama, until=until)
    # 12 tokens a batch; the text of fr ends after 4 of them and stays.
    assert until.tokens == [[12] * 3, [24] * 3, [48] * 3, [96, 96, 48]]
    assert profile.tokens.tolist() == [96, 96, 48]
    assert profile.metadata["until"] == "asked"


def test_what_was_read_is_what_the_same_text_alone_gives(llama):
    profile = profiled(llama, until=Asked(96))
    read = {label: rows[:16] for label, rows in CORPORA.items()}
    alone = profiled(llama, read)
    assert torch.equal(profile.shard_tokens["decoder"], alone.shard_tokens["decoder"])
    for site in alone.sites:
        assert torch.equal(profile.shard_counts[site], alone.shard_counts[site])


def test_the_texts_end_is_asked_about_too(llama):
    until = Asked(10**9)
    profile = profiled(llama, until=until)
    whole = profiled(llama)
    assert until.tokens[-1] == profile.tokens.tolist() == [240, 240, 48]
    assert len(until.tokens) == 6  # after 1, 2, 4, 8, 16 batches, and at the end
    for site in whole.sites:
        assert torch.equal(profile.shard_counts[site], whole.shard_counts[site])
    assert profile.metadata["corpora"] == whole.metadata["corpora"]


def test_the_corpora_say_no_more_than_was_read(llama):
    en, zh, fr = profiled(llama, until=Asked(96)).metadata["corpora"]
    assert (en["rows"], en["tokens"], en["dropped"], en["capped"]) == ([0, 16], 96, 0, True)
    assert zh["rows"] == [0, 16]
    assert (fr["rows"], fr["tokens"], fr["capped"]) == ([0, 8], 48, False)
    assert "documents" not in en
    assert "documents" in fr


def test_a_pass_that_stopped_leaves_nothing_running(llama):
    read = []

    def text():
        for row in ROWS.repeat(500, 1):
            read.append(row)
            yield row.tolist()

    profiled(llama, {"en": text(), "zh": ROWS}, seq_len=6, until=Asked(48))
    so_far = len(read)
    # A thread that still reads would have read on, through 20,000 rows.
    assert so_far < 20_000
    profiled(llama, {"zh": ROWS})
    assert len(read) == so_far


def test_the_profile_asked_about_is_a_copy(llama):
    held = []

    def until(profile):
        held.append((profile, {site: of.clone() for site, of in profile.counts.items()}))
        return len(held) == 3

    profile = profiled(llama, until=until)
    for asked, counts in held:
        assert all(torch.equal(asked.counts[site], of) for site, of in counts.items())
    assert held[-1][0].tokens.tolist() == profile.tokens.tolist()


def test_activations_that_are_not_finite_end_the_pass_when_it_is_asked(llama):
    model = type(llama)(llama.config)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0, 0] = float("nan")
    with pytest.raises(InputError, match="layers.1.mlp: .* not finite"):
        profiled(model, until=lambda profile: False)

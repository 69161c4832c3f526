from __future__ import annotations

import math

import pytest
import torch

from lapefast.errors import InputError
from lapefast.models.sites import Site
from lapefast.profiles import Profile

SITES = [Site("layers.0.mlp", 3, "SiLU"), Site("layers.1.mlp", 5, "SiLU")]
SETTINGS = {"model": "some/model", "fingerprint": "f" * 64, "dtype": "bfloat16"}
SETTINGS |= {"threshold": 0.0, "edited": False}


def make(tokens, seed=0, sites=SITES, statistics=("counts", "sums"), **metadata):
    """A profile of random statistics with the given tokens per label."""
    generator = torch.Generator().manual_seed(seed)
    per_label = torch.tensor(list(tokens.values()))
    values = {name: {} for name in statistics}
    for site in sites:
        share = torch.rand(len(tokens), site.width, generator=generator, dtype=torch.float64)
        for name in statistics:
            scaled = share * per_label[:, None]
            values[name][site.name] = scaled.long() if name == "counts" else scaled
    stacks = {site.stack: per_label for site in sites}
    return Profile(list(tokens), sites, stacks, values, {**SETTINGS, **metadata})


def corpus(label, start, stop, source="wiki.txt", **more):
    return {"label": label, "source": source, "rows": [start, stop], **more}


def assert_same(a, b):
    assert a.labels == b.labels
    assert a.tokens.tolist() == b.tokens.tolist()
    assert a.statistics.keys() == b.statistics.keys()
    for name, values in a.statistics.items():
        for site in a.sites:
            assert torch.equal(values[site], b.statistics[name][site]), (name, site)


def test_what_was_given_can_be_read():
    profile = make({"en": 10, "zh": 20})
    assert profile.labels == ["en", "zh"]
    assert profile.sites == ["layers.0.mlp", "layers.1.mlp"]
    assert profile.site_info == SITES
    assert profile.tokens.tolist() == [10, 20]
    assert profile.counts["layers.1.mlp"].shape == (2, 5)
    assert profile.fingerprint == "f" * 64
    assert not profile.positional


def test_probabilities_and_means_are_float64_per_token():
    profile = make({"en": 10, "zh": 7})
    site = "layers.1.mlp"
    probabilities, means = profile.probabilities("zh"), profile.means("zh")
    assert list(probabilities) == list(means) == profile.sites
    assert probabilities[site].dtype == means[site].dtype == torch.float64
    assert probabilities[site].tolist() == [c / 7 for c in profile.counts[site][1].tolist()]
    assert means[site].tolist() == [s / 7 for s in profile.sums[site][1].tolist()]


def test_means_and_probabilities_need_their_statistic_their_label_and_tokens():
    profile = make({"en": 10, "zh": 0}, statistics=("counts",))
    with pytest.raises(InputError, match=r"holds counts but no sums; profile .* include 'sums'"):
        profile.means("en")
    with pytest.raises(InputError, match="no up_abs_sums"):
        _ = profile.up_abs_sums
    with pytest.raises(InputError, match="no label 'fr'; its labels are en, zh"):
        profile.probabilities("fr")
    with pytest.raises(InputError, match="no tokens of label 'zh'"):
        profile.probabilities("zh")


def test_a_site_sees_the_tokens_of_its_stack_at_each_call():
    sites = [Site("enc", 2, "ReLU", "encoder"), Site("dec", 2, "ReLU", "decoder", calls=3)]
    counts = {site.name: torch.zeros(1, 2, dtype=torch.int64) for site in sites}
    counts["dec"][0, 0] = 12
    tokens = {"decoder": torch.tensor([4]), "encoder": torch.tensor([9])}
    profile = Profile(["en"], sites, tokens, {"counts": counts})
    assert profile.tokens.tolist() == [9]
    assert profile.site_tokens("enc").tolist() == [9]
    assert profile.site_tokens("dec").tolist() == [12]
    assert profile.probabilities("en")["dec"].tolist() == [1.0, 0.0]


def test_published_counts_are_layers_by_neurons_by_labels():
    profile = make({"en": 10, "zh": 20}, sites=[Site("a", 3, "SiLU"), Site("b", 3, "SiLU")])
    counts = profile.published_counts()
    assert counts.shape == (2, 3, 2)
    assert counts.dtype == torch.int64
    assert counts[1, 2, 0] == profile.counts["b"][0, 2]


def test_published_counts_are_refused_where_widths_differ():
    with pytest.raises(InputError, match="widths from 3 to 5"):
        make({"en": 10}).published_counts()


def good():
    return {
        "labels": ["en", "zh"],
        "sites": [Site("a", 3, "SiLU")],
        "tokens": {"decoder": torch.tensor([4, 5])},
        "statistics": {
            "counts": {"a": torch.ones(2, 3, dtype=torch.int64)},
            "sums": {"a": torch.ones(2, 3, dtype=torch.float64)},
        },
    }


def test_the_example_that_the_next_test_breaks_is_right():
    assert Profile(**good()).labels == ["en", "zh"]


@pytest.mark.parametrize(
    ("argument", "value", "message"),
    [
        ("labels", [], "needs labels"),
        ("labels", ["en", "en"], "must be distinct"),
        ("labels", ["en", 1], "labels that are strings"),
        ("labels", ["en", "\udc80"], "strings without lone surrogates"),
        ("sites", [], "needs sites"),
        ("sites", [Site("a", 3, "SiLU")] * 2, "distinct names"),
        ("sites", [Site("a", 4, "SiLU")], r"counts of site a must be .* \[2, 4\], got .* \[2, 3\]"),
        ("sites", [Site("b", 3, "SiLU")], "must hold the profile's sites"),
        ("tokens", {"encoder": torch.tensor([4, 5])}, "tokens of the stacks"),
        ("tokens", {"decoder": torch.tensor([4])}, r"int64 \[labels\] = \[2\]"),
        ("tokens", {"decoder": torch.tensor([4.0, 5.0])}, "int64"),
        ("tokens", {"decoder": torch.tensor([4, -5])}, "must not be negative"),
        ("tokens", {"decoder": torch.tensor([0, 5])}, "must not exceed the label's tokens"),
        ("statistics", {"counts": {}}, "must hold the profile's sites"),
        ("statistics", {"other": {"a": torch.ones(2, 3)}}, "'other' was given"),
        ("statistics", {"counts": {"a": torch.ones(2, 3)}}, "must be torch.int64"),
        ("statistics", {"sums": {"a": torch.ones(2, 3)}}, "must be torch.float64"),
        (
            "statistics",
            {"counts": {"a": -torch.ones(2, 3, dtype=torch.int64)}},
            "must not be negative",
        ),
        (
            "statistics",
            {"sums": {"a": torch.full((2, 3), math.nan, dtype=torch.float64)}},
            "must be finite",
        ),
    ],
)
def test_what_cannot_be_a_profile_is_refused(argument, value, message):
    with pytest.raises(InputError, match=message):
        Profile(**{**good(), argument: value})


def test_adding_adds_a_label_in_both_and_takes_the_others_over_in_order():
    a, b = make({"en": 10, "zh": 20}, seed=1), make({"fr": 5, "en": 7}, seed=2)
    total = a + b
    assert total.labels == ["en", "zh", "fr"]
    assert total.tokens.tolist() == [17, 20, 5]
    for site in total.sites:
        expected = torch.stack(
            [a.counts[site][0] + b.counts[site][1], a.counts[site][1], b.counts[site][0]]
        )
        assert torch.equal(total.counts[site], expected)
        assert torch.equal(total.sums[site][0], a.sums[site][0] + b.sums[site][1])


def test_adding_leaves_the_parts_as_they_were():
    a, b = make({"en": 10}, seed=1), make({"en": 7}, seed=2)
    _ = a + b
    assert_same(a, make({"en": 10}, seed=1))
    assert_same(b, make({"en": 7}, seed=2))


def test_adding_counts_is_associative_and_commutative():
    a, b, c = (
        make(tokens, seed, statistics=("counts",), batch_size=seed)
        for seed, tokens in enumerate([{"en": 10, "zh": 20}, {"zh": 3, "fr": 4}, {"fr": 9}])
    )
    assert_same((a + b) + c, a + (b + c))
    assert ((a + b) + c).metadata == (a + (b + c)).metadata
    swapped, straight = b + a, a + b
    assert sorted(swapped.labels) == sorted(straight.labels)
    for label in straight.labels:
        x, y = straight.probabilities(label), swapped.probabilities(label)
        assert all(torch.equal(x[site], y[site]) for site in straight.sites)


def test_adding_keeps_the_corpora_and_each_runs_settings():
    a = make({"en": 10}, corpora=[corpus("en", 0, 5)], batch_size=4, seq_len=128)
    b = make({"en": 10}, corpora=[corpus("en", 5, 9)], batch_size=8, seq_len=128)
    total = a + b
    assert [entry["rows"] for entry in total.metadata["corpora"]] == [[0, 5], [5, 9]]
    assert [run["batch_size"] for run in total.metadata["runs"]] == [4, 8]
    assert {key: total.metadata[key] for key in SETTINGS} == SETTINGS


def test_what_is_unknown_on_one_side_agrees_with_anything():
    total = make({"en": 1}, fingerprint=None, dtype=None, edited=None) + make({"en": 1})
    assert total.fingerprint == "f" * 64
    assert total.metadata["dtype"] == "bfloat16"


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ({"fingerprint": "0" * 64}, "models that differ .*fingerprint ffffffffffff.*000000000000"),
        ({"dtype": "float32"}, "profiles with dtype bfloat16 and float32"),
        ({"edited": True}, "profiles with edited False and True"),
        ({"threshold": 0.1}, "profiles with threshold 0.0 and 0.1"),
        ({"statistics": ("counts",)}, "profiles of counts, sums and of counts"),
        ({"sites": SITES[:1]}, "one has 2 sites and the other 1"),
        ({"sites": [SITES[0], Site("layers.1.mlp", 6, "SiLU")]}, "models that differ"),
        ({"sites": [SITES[0], Site("layers.2.mlp", 5, "SiLU")]}, "models that differ"),
    ],
)
def test_profiles_that_differ_do_not_add(other, message):
    with pytest.raises(InputError, match=message):
        make({"en": 10}) + make({"zh": 10}, **other)


@pytest.mark.parametrize(
    ("other", "shared"),
    [
        (corpus("en", 0, 10), True),
        (corpus("en", 9, 20), True),
        (corpus("en", 3, 4), True),
        (corpus("en", 10, 20), False),
        (corpus("en", 5, 5), False),
        (corpus("en", 0, 10, source="other.txt"), False),
        (corpus("zh", 0, 10), False),
        (corpus("en", 4, 5, seq_len=256), True),
        (corpus("en", 5, 6, seq_len=256), False),
    ],
)
def test_text_that_would_be_counted_twice_is_refused(other, shared):
    a = make({"en": 10}, corpora=[corpus("en", 0, 10)], seq_len=128)
    b = make({other["label"]: 10}, corpora=[other], seq_len=128)
    if shared:
        with pytest.raises(InputError, match=r"rows .* of wiki.txt would be counted twice"):
            a + b
    else:
        assert len((a + b).metadata["corpora"]) == 2


@pytest.mark.parametrize(
    ("identity", "source", "shared"),
    [
        ("1", "other.txt", True),
        ("2", "wiki.txt", False),
        (None, "wiki.txt", True),
    ],
)
def test_text_is_known_by_its_identity_before_its_name(identity, source, shared):
    a = make({"en": 10}, corpora=[corpus("en", 0, 10, identity="1")])
    b = make({"en": 10}, corpora=[corpus("en", 0, 10, source, identity=identity)])
    if shared:
        with pytest.raises(InputError, match="counted twice"):
            a + b
    else:
        assert (a + b).tokens.tolist() == [20]


def test_text_of_unknown_source_is_never_taken_for_the_same():
    a = make({"en": 10}, corpora=[corpus("en", 0, 10, source=None)])
    assert (a + a).tokens.tolist() == [20]


def test_a_sum_still_knows_the_text_of_its_parts():
    a = make({"en": 10}, corpora=[corpus("en", 0, 10)])
    b = make({"en": 10}, corpora=[corpus("en", 10, 20)])
    with pytest.raises(InputError, match="counted twice"):
        (a + b) + b


def test_only_profiles_add():
    with pytest.raises(TypeError):
        make({"en": 1}) + 1

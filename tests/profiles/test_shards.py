from __future__ import annotations

import pytest
import torch

from lapefast.errors import InputError
from lapefast.models.sites import Site
from lapefast.profiles import SHARDS, Profile

LIMIT = torch.iinfo(torch.int32).max
SITES = [Site("enc", 3, "ReLU", "encoder"), Site("dec", 2, "ReLU", "decoder", calls=2)]


def parts(labels=("en", "zh"), seed=0):
    """Arguments of a profile whose shards differ in tokens."""
    generator = torch.Generator().manual_seed(seed)
    shard_tokens = {
        stack: torch.randint(50, 100, (len(labels), SHARDS), generator=generator)
        for stack in ("encoder", "decoder")
    }
    shard_counts = {
        site.name: torch.randint(
            0, 50, (len(labels), SHARDS, site.width), generator=generator, dtype=torch.int32
        )
        for site in SITES
    }
    counts = {site: of.sum(1) for site, of in shard_counts.items()}
    return {
        "labels": list(labels),
        "sites": SITES,
        "tokens": {stack: of.sum(1) for stack, of in shard_tokens.items()},
        "statistics": {"counts": counts, "shard_counts": shard_counts},
        "shard_tokens": shard_tokens,
    }


def assert_same_shards(a, b):
    assert a.shard_tokens.keys() == b.shard_tokens.keys() == {"encoder", "decoder"}
    assert all(torch.equal(of, b.shard_tokens[stack]) for stack, of in a.shard_tokens.items())
    for site in a.sites:
        assert a.shard_counts[site].dtype == b.shard_counts[site].dtype == torch.int32
        assert torch.equal(a.shard_counts[site], b.shard_counts[site])


def test_a_loaded_profile_has_the_saved_ones_shards(tmp_path):
    profile = Profile(**parts())
    profile.save(tmp_path / "p")
    loaded = Profile.load(tmp_path / "p")
    assert_same_shards(profile, loaded)
    assert torch.equal(loaded.shard_tokens["decoder"], parts()["shard_tokens"]["decoder"])
    loaded.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "p").read_bytes()


def test_shards_add_shard_by_shard():
    a, b = Profile(**parts()), Profile(**parts(("zh", "fr"), seed=1))
    total = a + b
    assert total.labels == ["en", "zh", "fr"]
    for site in total.sites:
        mine, theirs = a.shard_counts[site], b.shard_counts[site]
        expected = torch.stack([mine[0], mine[1] + theirs[0], theirs[1]])
        assert torch.equal(total.shard_counts[site], expected)
        assert torch.equal(total.counts[site], expected.sum(1))
    for stack, of in total.shard_tokens.items():
        assert torch.equal(of[1], a.shard_tokens[stack][1] + b.shard_tokens[stack][0])
        assert torch.equal(of.sum(1), total.stack_tokens[stack])


def test_a_profile_without_shards_does_not_add_to_one_with_them():
    given = parts()
    del given["shard_tokens"], given["statistics"]["shard_counts"]
    with pytest.raises(InputError, match="profiles of counts, shard_counts and of counts cannot"):
        Profile(**parts()) + Profile(**given)


def test_a_sum_that_int32_can_not_say_is_refused():
    site = Site("a", 1, "SiLU")
    shards = torch.full((1, SHARDS, 1), LIMIT - 5, dtype=torch.int32)
    tokens = torch.full((1, SHARDS), LIMIT)
    large = Profile(
        ["en"],
        [site],
        {"decoder": tokens.sum(1)},
        {"counts": {"a": shards.sum(1)}, "shard_counts": {"a": shards}},
        shard_tokens={"decoder": tokens},
    )
    with pytest.raises(InputError, match=f"active at {2 * (LIMIT - 5)} tokens of one shard"):
        large + large


def test_some_shards_are_a_profile_of_their_tokens():
    profile = Profile(**parts())
    chosen = torch.tensor([[7, 0, 3], [1, 2, 4]])
    some = profile.of_shards(chosen)
    assert list(some.statistics) == ["counts"]
    for site in some.sites:
        for row in range(2):
            expected = profile.shard_counts[site][row, chosen[row]].sum(0)
            assert torch.equal(some.counts[site][row], expected)
    tokens = profile.shard_tokens["decoder"]
    expected = [int(tokens[row, chosen[row]].sum()) for row in range(2)]
    assert some.stack_tokens["decoder"].tolist() == expected
    assert some.site_tokens("dec").tolist() == [2 * one for one in expected]


def test_all_shards_are_the_whole():
    profile = Profile(**parts())
    every = torch.arange(SHARDS).expand(2, SHARDS)
    whole = profile.of_shards(every)
    assert whole.tokens.tolist() == profile.tokens.tolist()
    assert all(torch.equal(whole.counts[site], profile.counts[site]) for site in profile.sites)


def test_a_table_has_a_column_per_statistic_of_a_neuron():
    table = Profile(**parts()).to_pandas()
    assert list(table.columns) == ["label", "site", "neuron", "counts"]


def broken(change):
    given = parts()
    change(given)
    return given


def _no_tokens(given):
    del given["shard_tokens"]


def _no_counts(given):
    del given["statistics"]["counts"]


def _tokens_alone(given):
    del given["statistics"]["shard_counts"]


def _one_token_more(given):
    given["shard_tokens"]["encoder"][0, 0] += 1


def _one_count_more(given):
    given["statistics"]["shard_counts"]["dec"][1, 2, 0] += 1


def _negative(given):
    counts = given["statistics"]["shard_counts"]["dec"]
    counts[0, 0, 0], counts[0, 1, 0] = -1, counts[0, :2, 0].sum() + 1


def _above_the_shards_tokens(given):
    counts, tokens = given["statistics"]["shard_counts"]["enc"], given["shard_tokens"]["encoder"]
    moved = int(tokens[0, 0]) + 1 - int(counts[0, 0, 0])
    counts[0, 0, 0] += moved
    counts[0, 1, 0], counts[0, 2, 0] = 0, 0
    given["statistics"]["counts"]["enc"] = counts.sum(1)


def _fewer_shards(given):
    given["shard_tokens"]["encoder"] = given["shard_tokens"]["encoder"][:, 1:]


def _other_type(given):
    counts = given["statistics"]["shard_counts"]
    counts["enc"] = counts["enc"].long()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (_no_tokens, "shard_tokens of every stack and mixture must be given together"),
        (_tokens_alone, "shard_tokens of every stack and mixture must be given together"),
        (_no_counts, "shard_counts need counts beside them"),
        (_one_token_more, "shard_tokens of encoder must add up to the label's tokens"),
        (_fewer_shards, r"int64 \[labels, shards\] = \[2, 8\], got torch.int64 \[2, 7\]"),
        (_one_count_more, "shard_counts of site dec must add up to its counts"),
        (_negative, "shard_counts of site dec must lie between 0 and the shard's tokens"),
        (_above_the_shards_tokens, "shard_counts of site enc must lie between 0 and"),
        (_other_type, r"torch.int32 \[labels, shards, width\] = \[2, 8, 3\], got torch.int64"),
    ],
)
def test_shards_that_are_not_the_profiles_are_refused(change, message):
    with pytest.raises(InputError, match=message):
        Profile(**broken(change))


def test_asking_a_profile_without_shards_says_how_to_get_them():
    given = parts()
    _tokens_alone(given)
    _no_tokens(given)
    with pytest.raises(InputError, match="no shard_counts; profile .* include 'shard_counts'"):
        Profile(**given).of_shards(torch.zeros(2, 1, dtype=torch.int64))

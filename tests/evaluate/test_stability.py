from __future__ import annotations

import json
import logging
import threading
from functools import partial

import pytest
import torch

import lapefast as lf
from lapefast.errors import InputError
from lapefast.evaluate import Stability, UntilStable, stability
from lapefast.models.sites import Site
from lapefast.neurons import NeuronSets
from lapefast.neurons.layout import Layout
from lapefast.profiles import SHARDS, Profile

WIDTH, LENGTH = 400, 50
SITES = [Site("a", WIDTH // 4, "SiLU"), Site("b", 3 * WIDTH // 4, "SiLU")]
LABELS = ["en", "zh", "fr"]
LAPE = partial(lf.detect.lape, top_rate=0.1, filter_rate=0.8, activation_bar_ratio=0.8)


def counted(rows=4, seed=0, labels=LABELS, noise=True):
    """A profile of so many rows per shard; without noise all shards are the same."""
    generator = torch.Generator().manual_seed(seed)
    rates = torch.rand(len(labels), 1, WIDTH, generator=torch.Generator().manual_seed(99))
    tokens = rows * LENGTH
    mean = (rates * tokens).expand(-1, SHARDS, -1)
    counts = torch.binomial(torch.full_like(mean, tokens), mean / tokens, generator=generator)
    shards = (counts if noise else mean.round()).int().split([site.width for site in SITES], -1)
    shard_counts = {site.name: of for site, of in zip(SITES, shards, strict=True)}
    return Profile(
        labels,
        SITES,
        {"decoder": torch.full((len(labels),), SHARDS * tokens)},
        {"counts": {name: of.sum(1) for name, of in shard_counts.items()},
         "shard_counts": shard_counts},
        {"fingerprint": "f" * 64, "model": "some/model"},
        shard_tokens={"decoder": torch.full((len(labels), SHARDS), tokens)},
    )  # fmt: skip


def test_a_selection_is_seen_at_doubling_numbers_of_tokens():
    profile = counted()
    found = stability(profile, LAPE)
    whole = SHARDS * 4 * LENGTH
    assert found.labels == LABELS
    assert found.tokens.tolist() == [[whole // 4] * 3, [whole // 2] * 3, [whole] * 3]
    assert found.overlaps.shape == (20, 3, 3)
    assert found.neurons.tolist() == [one.total for one in LAPE(profile).values()]
    assert found.metadata["method"] == "lape"
    assert found.metadata["parameters"]["top_rate"] == 0.1


def test_an_overlap_is_that_of_neurons_of_half_of_the_shards_with_all():
    profile = counted()
    asked = []

    def select(one):
        asked.append(one)
        return LAPE(one)

    found = stability(profile, select, resamples=2)
    assert asked[0] is profile
    assert [one.tokens[0] // (4 * LENGTH) for one in asked[1:]] == [1, 2, 4, 1, 2, 4]
    chain = [*asked[4:7], profile]
    for place, (half, double) in enumerate(zip(chain[:-1], chain[1:], strict=True)):
        expected = lf.compare(LAPE(half), LAPE(double)).jaccard.diagonal()
        assert found.overlaps[1, place].tolist() == expected.tolist()
        # Nested: what a shard counted, the larger selection saw too.
        assert all(bool((half.counts[s] <= double.counts[s]).all()) for s in profile.sites)


def test_labels_draw_their_shards_apart():
    drawn = []
    stability(counted(), lambda one: (drawn.append(one), LAPE(one))[1], resamples=2)
    profile, one = counted(), drawn[1]
    shard = [
        next(s for s in range(SHARDS) if torch.equal(profile.shard_counts["b"][row, s].long(),
                                                     one.counts["b"][row]))
        for row in range(3)
    ]  # fmt: skip
    assert len(set(shard)) > 1


def test_shards_that_are_the_same_select_the_same():
    found = stability(counted(noise=False), LAPE)
    assert found.expected.tolist() == [[1.0] * 3] * 3
    assert found.announced == dict.fromkeys(LABELS, 1.0)
    assert found.stable(1.0) == LABELS


def test_more_text_is_more_stable():
    expected = [stability(counted(rows), LAPE).expected[-1].mean() for rows in (1, 8, 64)]
    assert expected[0] < expected[1] < expected[2]
    found = stability(counted(16), LAPE).expected.mean(1)
    assert found[0] < found[1] < found[2]


def test_what_is_announced_is_three_standard_deviations_below_what_is_expected():
    overlaps = torch.tensor([[[0.8, 1.0, 0.1]], [[0.9, 1.0, 0.9]], [[1.0, 1.0, 0.2]]])
    found = Stability(LABELS, torch.ones(1, 3).long(), torch.ones(3).long(), overlaps.double(),
                      Layout(("a",)))  # fmt: skip
    assert found.expected[0].tolist() == pytest.approx([0.9, 1.0, 0.4])
    assert found.interval[0, 0].tolist() == pytest.approx([0.6, 1.0])  # no more than all
    assert found.announced == pytest.approx({"en": 0.6, "zh": 1.0, "fr": 0.0})
    assert found.stable(0.6001) == ["zh"]
    assert found.stable(0.5999) == ["en", "zh"]


def test_the_deviation_is_no_smaller_than_with_half_the_tokens():
    overlaps = torch.tensor([[[0.4], [0.8], [1.0]], [[0.6], [1.0], [1.0]], [[0.8], [1.0], [1.0]]])
    found = Stability(["en"], torch.ones(3, 1).long(), torch.ones(1).long(), overlaps.double(),
                      Layout(("a",)))  # fmt: skip
    # 0.2 with the fewest tokens; then 0.115, below that; then 0, below 0.115.
    least = found.interval[:, 0, 0].tolist()
    assert least == pytest.approx([0.0, 2.8 / 3 - 3 * 0.2, 1 - 3 * 0.2 / 3**0.5], abs=1e-6)


def test_labels_without_neurons_agree():
    layout = Layout(("a", "b"), {site.name: site.width for site in SITES})
    nothing = NeuronSets({label: {} for label in LABELS}, layout)
    found = stability(counted(), lambda profile: nothing)
    assert found.neurons.tolist() == [0, 0, 0]
    assert found.announced == dict.fromkeys(LABELS, 1.0)


def test_the_same_seed_draws_the_same():
    one, same, other = (stability(counted(), LAPE, seed=seed).overlaps for seed in (1, 1, 2))
    assert torch.equal(one, same)
    assert not torch.equal(one, other)


def test_a_saved_result_says_the_same(tmp_path):
    found = stability(counted(), LAPE)
    found.save(tmp_path / "s.json")
    loaded = Stability.load(tmp_path / "s.json")
    assert loaded.labels == found.labels
    assert torch.equal(loaded.tokens, found.tokens)
    assert torch.equal(loaded.neurons, found.neurons)
    assert torch.equal(loaded.overlaps, found.overlaps)
    assert loaded.metadata == found.metadata
    assert loaded.layout == found.layout
    assert loaded.layout.fingerprint == "f" * 64


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"overlaps": [[[2.0] * 3] * 3]}, "an overlap is not between 0 and 1"),
        ({"overlaps": [[[1.0] * 2] * 3]}, "overlaps are missing"),
        ({"labels": ["en"]}, "labels are missing"),
        ({"labels": [], "neurons": []}, "labels are missing"),
        ({"tokens": [1, 2]}, "tokens are missing"),
        ({"format": "something"}, "not a stability file; give one made by `lapefast stability`"),
        ({"version": 2}, "version 2"),
    ],
)
def test_a_file_that_is_not_one_is_refused(tmp_path, change, message):
    path = tmp_path / "s.json"
    stability(counted(), LAPE).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | change))
    with pytest.raises(InputError, match=message):
        Stability.load(path)


def test_it_shows_itself_and_is_a_table():
    found = stability(counted(), LAPE)
    shown = found._repr_html_()
    assert f"{found.expected[-1, 0]:.3f}" in shown
    assert f"{found.announced['fr']:.3f}" in shown
    assert f"zh: {found.announced['zh']:.3f}" in repr(found)
    table = found.to_pandas()
    assert list(table.columns) == ["label", "tokens", "expected", "least", "largest"]
    assert len(table) == 9
    last = table[(table.label == "zh") & (table.tokens == SHARDS * 4 * LENGTH)]
    assert last.least.item() == found.announced["zh"]


def test_a_warning_of_the_detector_is_said_once(caplog):
    few = partial(lf.detect.lape, top_rate=1.0, filter_rate=0.99)
    with caplog.at_level(logging.WARNING, "lapefast"):
        stability(counted(), few)
    assert len(caplog.records) == 1
    assert logging.getLogger("lapefast.detect").level == logging.NOTSET


def test_the_warning_comes_back_after_threads_that_ask_at_once():
    first_in, second_in, first_out = (threading.Event() for _ in range(3))

    def ask(entered, waited_for):
        def select(profile):
            if list(profile.statistics) == ["counts"]:  # some of the shards, without warnings
                entered.set()
                assert waited_for.wait(60)
            return LAPE(profile)

        stability(counted(), select)

    # The first to enter leaves first.
    second = threading.Thread(target=lambda: first_in.wait(60) and ask(second_in, first_out))
    second.start()
    ask(first_in, second_in)
    first_out.set()
    second.join()
    assert logging.getLogger("lapefast.detect").level == logging.NOTSET


def test_nothing_selected_is_not_stable():
    until = UntilStable(0.5, partial(lf.detect.lape, top_rate=0.0001))
    assert not until(counted())
    assert until.stability.neurons.tolist() == [0, 0, 0]


def test_the_warning_comes_back_after_an_error():
    def select(profile):
        if list(profile.statistics) == ["counts"]:
            raise ValueError("no more")
        return LAPE(profile)

    with pytest.raises(ValueError, match="no more"):
        stability(counted(), select)
    assert logging.getLogger("lapefast.detect").level == logging.NOTSET


def without_shards():
    profile = counted()
    statistics = {"counts": profile.counts}
    return Profile(LABELS, SITES, profile.stack_tokens, statistics)


def of_few_rows():
    profile = counted()
    profile.shard_tokens["decoder"][1, 7] = 0
    return profile


@pytest.mark.parametrize(
    ("profile", "options", "message"),
    [
        (without_shards(), {}, "no shard_counts; profile .* include 'shard_counts'"),
        (of_few_rows(), {}, "8 rows of every label, one for each shard"),
        (counted(labels=["en"]), {}, "needs at least two"),
        (counted(), {"resamples": 1}, "resamples must be an integer of at least 2, got 1"),
        (counted(), {"resamples": 2.0}, "resamples must be an integer"),
    ],
)
def test_what_has_no_stability_is_refused(profile, options, message):
    with pytest.raises(InputError, match=message):
        stability(profile, LAPE, **options)


def test_until_stable_says_yes_once_every_label_is_there():
    until = UntilStable(0.9, LAPE)
    assert until.reached is False
    assert until.metadata["until_stable"] == {
        "overlap": 0.9,
        "reached": False,
        "announced": None,
        "method": None,
        "parameters": None,
    }
    assert until(of_few_rows()) is False
    assert until.stability is None
    assert until(counted(1)) is False
    assert min(until.stability.announced.values()) < 0.9
    assert until(counted(noise=False)) is True
    said = until.metadata["until_stable"]
    assert said["reached"] is True
    assert said["announced"] == dict.fromkeys(LABELS, 1.0)
    assert said["parameters"]["top_rate"] == 0.1


def test_one_label_that_is_not_there_is_enough_to_go_on():
    # Of en and fr all shards are the same, of zh they are not.
    noisy, profile = counted(1), counted(1, noise=False)
    for site in profile.sites:
        profile.shard_counts[site][1] = noisy.shard_counts[site][1]
        profile.counts[site][1] = noisy.counts[site][1]
    until = UntilStable(0.95, LAPE)
    assert until(profile) is False
    assert "zh" not in until.stability.stable(0.95)


def test_until_stable_needs_shards_and_a_share():
    with pytest.raises(InputError, match="no shard_counts"):
        UntilStable(0.9, LAPE)(without_shards())
    for target in (0, 1.01, -1, float("nan")):
        with pytest.raises(InputError, match="must be over 0 and at most 1"):
            UntilStable(target)

"""Profiles of mixtures: counts [labels, experts, neurons] and the tokens routed to each expert."""

from __future__ import annotations

import pytest
import torch

import lapefast as lf
from lapefast.errors import InputError
from lapefast.models.sites import Site
from lapefast.profiles import Profile

DENSE, EXPERTS = "layers.0.mlp", "layers.1.mlp.experts"
SITES = [Site(DENSE, 2, "SiLU"), Site(EXPERTS, 3, "SiLU", experts=4)]


def make(tokens, seed=0, **metadata):
    """Random statistics; the last expert sees no token of the first label."""
    generator = torch.Generator().manual_seed(seed)
    per_label = torch.tensor(list(tokens.values()))
    routed = (torch.rand(len(tokens), 4, generator=generator) * per_label[:, None]).long()
    routed[0, -1] = 0
    shares = [torch.rand(len(tokens), *site.shape, generator=generator) for site in SITES]
    seen = per_label[:, None], routed[..., None]
    counts = {s.name: (p * n).long() for s, p, n in zip(SITES, shares, seen, strict=True)}
    sums = {s.name: (p * n).double() for s, p, n in zip(SITES, shares, seen, strict=True)}
    statistics = {"counts": counts, "sums": sums}
    stacks = {"decoder": per_label}
    return Profile(list(tokens), SITES, stacks, statistics, metadata, {EXPERTS: routed})


def test_probabilities_and_means_are_of_tokens_routed_there_or_of_all_by_name():
    profile = make({"en": 30, "zh": 20})
    for name, of in (("counts", profile.probabilities), ("sums", profile.means)):
        values = getattr(profile, name)[EXPERTS][1]
        routed = of("zh")[EXPERTS]
        assert torch.equal(routed, of("zh", over="routed")[EXPERTS])
        assert routed.shape == (4, 3)
        assert routed.dtype == torch.float64
        for expert in range(4):
            for neuron in range(3):
                value = float(values[expert, neuron])
                assert routed[expert, neuron] == value / int(profile.routed[EXPERTS][1, expert])
                assert of("zh", over="all")[EXPERTS][expert, neuron] == value / 20
        assert torch.equal(of("zh")[DENSE], of("zh", over="all")[DENSE])
    with pytest.raises(InputError, match="over must be one of routed, all, got 'some'"):
        profile.probabilities("en", over="some")


def test_an_expert_that_no_token_reached_has_probability_0():
    profile = make({"en": 30, "zh": 20})
    assert profile.probabilities("en")[EXPERTS][-1].tolist() == [0, 0, 0]
    assert profile.means("en")[EXPERTS][-1].tolist() == [0, 0, 0]


def test_a_file_holds_counts_and_routed_tokens(tmp_path):
    profile = make({"en": 30, "zh": 20}, experts_implementation="grouped_mm")
    profile.save(tmp_path / "p")
    loaded = Profile.load(tmp_path / "p")
    assert loaded.site_info == SITES
    assert torch.equal(loaded.routed[EXPERTS], profile.routed[EXPERTS])
    assert loaded.routed[EXPERTS].dtype == torch.int64
    assert torch.equal(loaded.counts[EXPERTS], profile.counts[EXPERTS])
    assert loaded.counts[EXPERTS].shape == (2, 4, 3)
    assert loaded.metadata == profile.metadata


def test_profiles_add_up_with_their_routed_tokens():
    a, b = make({"en": 30, "zh": 20}), make({"zh": 10, "fr": 9}, seed=1)
    added = a + b
    assert added.labels == ["en", "zh", "fr"]
    for of in (lambda p: p.counts, lambda p: p.sums, lambda p: p.routed):
        mine, theirs = of(a)[EXPERTS], of(b)[EXPERTS]
        expected = torch.stack([mine[0], mine[1] + theirs[0], theirs[1]])
        assert torch.equal(of(added)[EXPERTS], expected)


@pytest.mark.parametrize(
    ("routed", "message"),
    [
        (None, r"must hold the profile's mixtures, \['layers.1.mlp.experts'\], got \[\]"),
        (torch.zeros(1, 3).long(), r"must be int64 \[labels, experts\] = \[1, 4\]"),
        (torch.zeros(1, 4), "must be int64"),
        (torch.full((1, 4), 9), "between 0 and the label's tokens"),
        (torch.full((1, 4), 2), "counts of site layers.1.mlp.experts must not exceed"),
    ],
)
def test_routed_tokens_that_do_not_fit_are_refused(routed, message):
    counts = {DENSE: torch.zeros(1, 2).long(), EXPERTS: torch.full((1, 4, 3), 3)}
    given = {} if routed is None else {EXPERTS: routed}
    tokens = {"decoder": torch.tensor([5])}
    with pytest.raises(InputError, match=message):
        Profile(["en"], SITES, tokens, {"counts": counts}, {}, given)


def test_a_data_frame_says_expert_and_neuron():
    profile = make({"en": 30, "zh": 20})
    frame = profile.to_pandas()
    columns = ["label", "site", "expert", "neuron", "routed", "counts", "sums"]
    assert list(frame.columns) == columns
    assert len(frame) == 2 * (2 + 12)
    row = frame.query(f"label == 'zh' and site == '{EXPERTS}' and expert == 2 and neuron == 1")
    assert row["counts"].item() == int(profile.counts[EXPERTS][1, 2, 1])
    assert row["routed"].item() == int(profile.routed[EXPERTS][1, 2])
    dense = frame[frame["site"] == DENSE]
    assert dense["expert"].isna().all()
    assert dense["routed"].tolist() == [30, 30, 20, 20]


def test_published_files_hold_no_mixtures(tmp_path):
    profile = make({"en": 30, "zh": 20})
    with pytest.raises(InputError, match=r"dense layers only, .*\(layers.1.mlp.experts\)"):
        profile.save_published(tmp_path)


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("over", ["routed", "all"])
def test_lape_chooses_among_all_experts_neurons_by_the_share_that_is_named(form, over):
    profile = make({"en": 300, "zh": 200, "fr": 100})
    rates = {"top_rate": 0.5, "filter_rate": 0.4, "activation_bar_ratio": 0.7}
    found = lf.detect.lape(profile, **rates, form=form, over=over)
    # The same as a dense model whose probabilities are given as counts of 10^6 tokens.
    shares = [profile.probabilities(label, over) for label in profile.labels]
    dense = [Site(site.name, site.neurons, "SiLU") for site in SITES]
    counts = {
        site.name: torch.stack(
            [(one[site.name].flatten() * 10**6).round().long() for one in shares]
        )
        for site in dense
    }
    tokens = {"decoder": torch.full((3,), 10**6)}
    expected = lf.detect.lape(Profile(profile.labels, dense, tokens, {"counts": counts}), **rates)
    assert {label: found.layers(label)[1].tolist() for label in found} == {
        label: expected.layers(label)[1].tolist() for label in found
    }
    assert any(len(found[label][EXPERTS]) for label in found)
    assert found.metadata["parameters"]["over"] == over
    assert found.widths == {DENSE: 2, EXPERTS: 12}


def test_a_neuron_whose_expert_sees_few_tokens_belongs_to_a_label_by_the_share_of_those_alone():
    site = Site("experts", 2, "SiLU", experts=2)
    counts = torch.tensor([[[8, 50], [4, 0]], [[2, 50], [45, 1]]])
    routed = torch.tensor([[100, 4], [100, 90]])
    tokens = {"decoder": torch.tensor([100, 100])}
    statistics = {"counts": {"experts": counts}}
    profile = Profile(["a", "b"], [site], tokens, statistics, {}, {"experts": routed})
    rates = {"top_rate": 1.0, "filter_rate": 0.25, "activation_bar_ratio": 0.75}
    # Routed: .08 .5 1 0 and .02 .5 .5 .01; all: .08 .5 .04 0 and .02 .5 .45 .01. Over the 6th:
    found = {
        over: [
            one["experts"].tolist() for one in lf.detect.lape(profile, **rates, over=over).values()
        ]
        for over in ("routed", "all")
    }
    assert found == {"routed": [[2], []], "all": [[1], [1]]}
    assert [one["experts"].tolist() for one in lf.detect.lape(profile, **rates).values()] == [
        [2],
        [],
    ]
    with pytest.raises(InputError, match="over must be one of"):
        lf.detect.lape(profile, over="some")


def test_neuron_sets_of_experts_are_flat_and_say_their_expert(tmp_path):
    profile = make({"en": 300, "zh": 200})
    neurons = lf.detect.lape(profile, top_rate=0.6, filter_rate=0.3, activation_bar_ratio=0.3)
    neurons.save(tmp_path / "n.json")
    loaded = lf.NeuronSets.load(tmp_path / "n.json")
    assert loaded.layout == neurons.layout
    assert loaded.layout.experts == {EXPERTS: 4}
    for sets in (neurons, loaded):
        frame = sets.to_pandas()
        assert list(frame.columns) == ["label", "site", "expert", "neuron"]
        for label in sets:
            own = frame[(frame["label"] == label) & (frame["site"] == EXPERTS)]
            flat = (own["expert"] * 3 + own["neuron"]).tolist()
            assert flat == sets[label][EXPERTS].tolist()
            dense = frame[(frame["label"] == label) & (frame["site"] == DENSE)]
            assert dense["expert"].isna().all()
            assert dense["neuron"].tolist() == sets[label][DENSE].tolist()


def test_means_of_experts_are_values_of_edits_in_their_shape_or_flat():
    profile = make({"en": 300, "zh": 200})
    neurons = lf.detect.lape(profile, top_rate=0.6, filter_rate=0.3, activation_bar_ratio=0.3)
    means = profile.means("en")
    edit = lf.activate(neurons["zh"], means)
    flat = lf.activate(neurons["zh"], {site: one.flatten() for site, one in means.items()})
    plain = lf.activate({EXPERTS: [5, 10]}, means)
    indices, _, shift = edit.tables[EXPERTS]
    assert shift.tolist() == means[EXPERTS].flatten()[indices].float().tolist()
    assert torch.equal(shift, flat.tables[EXPERTS][2])
    assert plain.tables[EXPERTS][2].tolist() == means[EXPERTS].float().flatten()[[5, 10]].tolist()
    with pytest.raises(InputError, match=r"one per neuron, \[12\], got \[3, 4\]"):
        lf.activate(
            neurons["zh"], {site: one.mT if one.dim() == 2 else one for site, one in means.items()}
        )

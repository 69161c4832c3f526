"""The pass over a corpus, and what is done with its profile, on mixtures of experts."""

from __future__ import annotations

from functools import partial

import mixtures
import pytest
import torch
from families import VOCABULARY
from mixtures import by_name, needs_5

import lapefast as lf
from lapefast.detect import experts, plnd
from lapefast.errors import InputError
from lapefast.models.inputs import forward_inputs
from lapefast.models.taps import watching_products

pytestmark = needs_5

ROWS = torch.arange(5 * 12).reshape(5, 12) * 31 % (VOCABULARY - 10) + 5
CORPORA = {"en": ROWS, "zh": ROWS.flip(0)[:3] + 1}


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "DeepseekV3ForCausalLM"])
@pytest.mark.parametrize("implementation", mixtures.IMPLEMENTATIONS)
@torch.no_grad()
def test_the_pass_counts_what_plain_loops_count_on_the_same_batches(name, implementation):
    mixture = by_name(name)
    model = mixture.build(torch.bfloat16, implementation)
    counts, routed = {}, {}
    for index, rows in enumerate(CORPORA.values()):
        for batch in rows.split(2):
            with mixtures.watched(model) as calls:
                model.model(**forward_inputs(model.model, batch))
            for site, seen in calls.items():
                groups = torch.full_like(batch, index)
                active, tokens = mixtures.counts(seen, groups, 2, mixture.experts)
                counts[site] = counts.get(site, 0) + active
                routed[site] = routed.get(site, 0) + tokens
    profile = lf.profile(model, CORPORA, batch_size=2, progress=False)
    for site in counts:
        assert torch.equal(profile.counts[site], counts[site])
        assert torch.equal(profile.routed[site], routed[site])
    assert profile.routed.keys() == counts.keys()
    assert len(profile.sites) == len(counts) + len(mixture.dense)
    assert profile.metadata["experts_implementation"] == implementation


@pytest.mark.parametrize("implementation", mixtures.IMPLEMENTATIONS)
def test_a_run_that_failed_within_a_forward_pass_goes_on_from_its_saved_state(
    tmp_path, implementation
):
    model = by_name("MixtralForCausalLM").build(torch.float32, implementation)
    whole = lf.profile(model, CORPORA, batch_size=2, progress=False)
    passes = []

    def fail(module, args):
        passes.append(1)
        if len(passes) == 4:  # the probe's, and those of two batches, came before
            raise RuntimeError("a failure behind the first layer")

    hook = model.model.layers[1].register_forward_pre_hook(fail)
    with pytest.raises(RuntimeError, match="behind the first layer"):
        lf.profile(model, CORPORA, batch_size=2, progress=False, resume=tmp_path)
    hook.remove()
    again = lf.profile(model, CORPORA, batch_size=2, progress=False, resume=tmp_path)
    for site in whole.sites:
        assert torch.equal(again.counts[site], whole.counts[site])
        assert torch.equal(again.routed[site], whole.routed[site])


def test_another_implementation_after_a_stop_is_said(tmp_path, caplog):
    model = by_name("MixtralForCausalLM").build()
    lf.profile(model, CORPORA, batch_size=2, progress=False, resume=tmp_path)
    model.set_experts_implementation("grouped_mm")
    profile = lf.profile(model, CORPORA, batch_size=2, progress=False, resume=tmp_path)
    assert "experts_implementation: eager before the stop and grouped_mm now" in caplog.text
    (change,) = profile.metadata["changes"]
    assert change["experts_implementation"] == ["eager", "grouped_mm"]


def test_a_matrix_is_made_of_experts_neurons():
    model = by_name("Qwen2MoeForCausalLM").build()
    profile = lf.profile(model, CORPORA, progress=False)
    neurons = lf.detect.lape(profile, top_rate=0.5, filter_rate=0.5, activation_bar_ratio=0.5)
    matrix = lf.evaluate.perplexity_matrix(model, neurons, CORPORA, progress=False)
    assert matrix.rows == ["none", "en", "zh"]
    edit = lf.deactivate(neurons["en"]) | lf.activate(neurons["zh"], profile.means("zh"))
    with lf.steer(model, edit):
        model(ROWS)


def test_folds_masks_and_edit_files_take_the_dense_sites_and_refuse_experts_by_name(tmp_path):
    model = by_name("Qwen2MoeForCausalLM").build()
    dense = lf.deactivate({"layers.1.mlp.shared_expert": [1, 2]})
    routed = lf.deactivate({"layers.1.mlp.experts": [1, 30]})
    with lf.steer(model, dense):
        expected = model(ROWS).logits
    with lf.fold(model, dense):
        # A product of 0 and a weight of 0 add the same.
        assert torch.equal(model(ROWS).logits, expected)
    lf.export.edits(model, {"one": dense}, tmp_path / "edits.json")
    with lf.train.neuron_mask(model, {"layers.1.mlp.shared_expert": [1, 2]}):
        pass
    with pytest.raises(InputError, match=r"layers.1.mlp.experts: a mixture .* use lf.steer"):
        lf.fold(model, routed)
    with pytest.raises(InputError, match=r"layers.1.mlp.experts, a mixture of experts"):
        lf.export.edits(model, {"one": routed}, tmp_path / "edits.json")
    with pytest.raises(InputError, match=r"layers.1.mlp.experts is a mixture .* can't be masked"):
        lf.train.neuron_mask(model, {"layers.1.mlp.experts": [1]})


def test_published_count_files_are_not_of_a_mixture(tmp_path):
    torch.save({"n": 5, "over_zero": torch.zeros(2, mixtures.WIDTH).int()}, tmp_path / "en")
    with pytest.raises(InputError, match="layers.0.mlp.experts is a mixture of experts"):
        lf.Profile.from_published({"en": tmp_path / "en"}, by_name("MixtralForCausalLM").build())


def test_detectors_that_read_dense_ffns_refuse_a_mixture_by_name():
    model = by_name("MixtralForCausalLM").build()
    documents = {"en": [ROWS[0]], "zh": [ROWS[1]]}
    message = r"layers.0.mlp.experts \(MixtralExperts\) is a mixture .* dense FFNs only"
    for run in (
        lambda: plnd(model, None, documents, ("ffn",), top=2, progress=False),
        lambda: experts(model, documents, None, 2, progress=False),
        lambda: watching_products(model, print).__enter__(),
    ):
        with pytest.raises(InputError, match=message):
            run()


def test_shards_of_a_mixture_add_up_and_are_counted_as_rows_of_their_own(tmp_path):
    model = by_name("DeepseekV3ForCausalLM").build(torch.float32, "eager")
    generator = torch.Generator().manual_seed(3)
    rows = torch.randint(5, VOCABULARY, (19, 12), generator=generator)
    corpora = {"en": rows, "zh": rows.flip(0)[:9] + 0}
    statistics = ("counts", "sums", "shard_counts")
    options = {"batch_size": 1, "progress": False}
    profile = lf.profile(model, corpora, statistics=statistics, **options)
    plainly = lf.profile(model, corpora, **options)
    for site in plainly.sites:
        assert torch.equal(profile.counts[site], plainly.counts[site])
    assert profile.routed.keys() == plainly.routed.keys()
    for shard in range(8):
        alone = lf.profile(
            model,
            {label: of[shard::8] for label, of in corpora.items() if shard < len(of)},
            **options,
        )
        chosen = profile.of_shards(torch.full((2, 1), shard))
        for site in alone.sites:
            assert torch.equal(chosen.counts[site], alone.counts[site])
        for site, routed in alone.routed.items():
            assert torch.equal(profile.shard_tokens[site][:, shard], routed)
    profile.save(tmp_path / "p")
    loaded = lf.Profile.load(tmp_path / "p")
    for name, tokens in profile.shard_tokens.items():
        assert torch.equal(loaded.shard_tokens[name], tokens)
    both = profile + lf.profile(model, {"fr": rows}, statistics=statistics, **options)
    assert both.labels == ["en", "zh", "fr"]


def test_an_expert_that_a_shard_never_uses_hinders_no_stability():
    model = by_name("Qwen3MoeForCausalLM").build(torch.float32, "eager")
    corpora = {"en": ROWS.repeat(2, 1)[:9, :2], "zh": ROWS.repeat(2, 1)[:9, 4:6]}
    statistics = ("counts", "shard_counts")
    profile = lf.profile(model, corpora, statistics=statistics, batch_size=4, progress=False)
    assert any(not profile.shard_tokens[site].all() for site in profile.routed)
    select = partial(lf.detect.lape, top_rate=0.2, filter_rate=0.5, activation_bar_ratio=0.5)
    assert lf.evaluate.stability(profile, select).labels == ["en", "zh"]

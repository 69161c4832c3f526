"""Mixtures of experts, against plain loops over experts and tokens."""

from __future__ import annotations

import copy
import pickle

import accelerate
import mixtures
import plain
import pytest
import torch
from mixtures import IDS, IMPLEMENTATIONS, MIXTURES, WIDTH, Mixture, by_name, needs_5

import lapefast as lf
from lapefast import models
from lapefast.errors import InputError
from lapefast.models import routing

pytestmark = needs_5

# Two labels within a row, padding on the left and on the right.
GROUPS = torch.tensor([[-1, -1] + 6 * [0], 4 * [0] + 4 * [1], 5 * [1] + 3 * [-1]])
MASK = torch.tensor([[0, 0] + 6 * [1], 8 * [1], 5 * [1] + 3 * [0]])
LABELS = ["a", "b"]


@pytest.fixture(params=MIXTURES, ids=str)
def mixture(request) -> Mixture:
    return request.param


@pytest.fixture(params=IMPLEMENTATIONS)
def implementation(request) -> str:
    return request.param


@pytest.fixture(params=[torch.float32, torch.bfloat16], ids=["float32", "bfloat16"])
def dtype(request) -> torch.dtype:
    return request.param


@pytest.fixture
def mixtral():
    return by_name("MixtralForCausalLM").build()


def test_a_mixture_is_one_site_beside_shared_experts_and_leading_dense_layers(mixture):
    model = mixture.build()
    sites = models.find_sites(model)
    dense = {site.name: site.width for site in sites if not site.experts}
    assert dense == mixture.dense
    for site in sites:
        if site.experts:
            assert site.name in mixtures.experts_of(model)
            assert (site.experts, site.width) == (mixture.experts, WIDTH)
            assert site.shape == (mixture.experts, WIDTH)
            assert site.neurons == mixture.experts * WIDTH
    assert len(sites) == len(mixtures.experts_of(model)) + len(dense)


@torch.no_grad()
def test_outputs_counts_and_routed_tokens_equal_those_of_a_plain_loop(
    mixture, dtype, implementation
):
    model = mixture.build(dtype, implementation)
    before = plain.attributes(model)
    with mixtures.watched(model) as calls:
        expected = model(IDS, attention_mask=MASK)

    with lf.record(model, LABELS) as recorder:
        recorder.set(groups=GROUPS)
        assert plain.same(model(IDS, attention_mask=MASK), expected)
    profile = recorder.profile()

    assert recorder.unproven == []
    assert profile.metadata["experts_implementation"] == implementation
    assert profile.routed.keys() == calls.keys()
    for site, seen in calls.items():
        active, routed = mixtures.counts(seen, GROUPS, 2, mixture.experts)
        assert torch.equal(profile.counts[site], active)
        assert torch.equal(profile.routed[site], routed)
        ranks = len(seen[0].routed) // GROUPS.numel()
        tokens = [int((GROUPS == label).sum()) for label in range(2)]
        assert routed.sum(1).tolist() == [ranks * number for number in tokens]
        assert ranks > 0
    plain.assert_untouched(before, model)
    assert plain.same(model(IDS, attention_mask=MASK), expected)


@torch.no_grad()
def test_tokens_that_pass_by_the_experts_are_routed_to_none(implementation):
    """transformers computes them at the first expert, with weight 0."""
    model = by_name("ZayaForCausalLM").build(torch.float32, implementation)
    first, second = (layer.mlp for layer in model.model.layers[:2])
    with mixtures.watched(model) as calls:
        model(IDS)
        # So that of the second layer's tokens some choose the skip and some do not.
        first.gate.balancing_biases[-1], second.gate.balancing_biases[-1] = 1.0, 0.0
        for seen in calls.values():
            seen.clear()
        expected = model(IDS)
    with lf.record(model, LABELS) as recorder:
        recorder.set(groups=GROUPS)
        assert plain.same(model(IDS), expected)
    profile = recorder.profile()
    assert not profile.routed["layers.0.mlp.experts"].any()
    assert not profile.counts["layers.0.mlp.experts"].any()
    for site, seen in calls.items():
        active, routed = mixtures.counts(seen, GROUPS, 2, 4)
        assert torch.equal(profile.counts[site], active)
        assert torch.equal(profile.routed[site], routed)
    some = len(calls["layers.1.mlp.experts"][0].routed)
    assert 0 < some < IDS.numel()


@torch.no_grad()
def test_dense_sites_of_a_mixture_count_as_those_of_a_dense_model(implementation):
    mixture = by_name("DeepseekV3ForCausalLM")
    model = mixture.build(torch.bfloat16, implementation)
    bare = model.model
    activations = {site: bare.get_submodule(site).act_fn for site in mixture.dense}
    with plain.hooked(activations) as seen:
        model(IDS)
    with lf.record(model, LABELS) as recorder:
        recorder.set(groups=GROUPS)
        model(IDS)
    profile = recorder.profile()
    for site, calls in seen.items():
        assert torch.equal(profile.counts[site], plain.counts(calls, GROUPS, 2))


@pytest.mark.parametrize("threshold", [0.0, 0.01])
@torch.no_grad()
def test_sums_and_thresholds_are_of_the_rows_routed_there(implementation, threshold):
    mixture = by_name("GptOssForCausalLM")
    model = mixture.build(torch.float32, implementation)
    with mixtures.watched(model) as calls:
        model(IDS)
    with lf.record(model, LABELS, ("counts", "sums"), threshold) as recorder:
        recorder.set(label="b", mask=MASK)
        model(IDS)
    profile = recorder.profile()
    groups = torch.where(MASK > 0, 1, -1)
    for site, seen in calls.items():
        active, _ = mixtures.counts(seen, groups, 2, mixture.experts, threshold)
        assert torch.equal(profile.counts[site], active)
        sums = torch.zeros(2, mixture.experts, WIDTH, dtype=torch.float64)
        for activation, owners in zip(seen[0].activations, seen[0].owners, strict=True):
            for row, (expert, token) in zip(activation, owners, strict=True):
                if groups.flatten()[token] >= 0:
                    sums[1, expert] += row.double()
        # float32 over at most 24 rows: each addition is off by half a spacing of the sum so far.
        largest = max(float(one.abs().max()) for one in seen[0].activations)
        assert (profile.sums[site] - sums).abs().max() <= 24 * 24 * largest * 2**-24


@torch.no_grad()
def test_statistics_add_up_over_passes_and_over_implementations(mixtral):
    site = "layers.0.mlp.experts"
    total = 0
    for name in IMPLEMENTATIONS:
        mixtral.set_experts_implementation(name)
        with mixtures.watched(mixtral) as calls:
            mixtral(IDS)
        total += mixtures.counts(calls[site], torch.zeros(24).long(), 1, 4)[0]
    with lf.record(mixtral, ["a"]) as recorder:
        recorder.set(label="a")
        for name in IMPLEMENTATIONS:
            mixtral.set_experts_implementation(name)
            mixtral(IDS)
        profile = recorder.profile()
    assert torch.equal(profile.counts[site], total)
    assert profile.metadata["experts_implementation"] == "batched_mm+eager+grouped_mm"
    assert int(profile.routed[site].sum()) == 3 * 2 * 24


def edits_of(model, mixture) -> list[lf.Edit | None]:
    """Three edits that differ, of some neurons of some experts; the second is none."""
    sites = list(mixtures.experts_of(model))
    total = mixture.experts * WIDTH
    return [
        lf.deactivate(dict.fromkeys(sites, range(0, total, 2))),
        None,
        lf.activate({sites[-1]: range(1, total, 3)}, 5.0)
        | lf.scale({sites[-1]: [0, WIDTH, 2 * WIDTH - 1]}, -3.0)
        | lf.add({sites[-1]: [total - 1]}, 0.5),
    ]


def plainly(edits, length):
    """A change that edits each row by hand, of the sequence that its token is of."""

    def change(site, activation, owners):
        changed = activation.clone()
        for row, (expert, token) in enumerate(owners):
            edit = edits[token // length] if len(edits) > 1 else edits[0]
            if edit is None or site not in edit.tables:
                continue
            for flat, scale, shift in zip(
                *(one.tolist() for one in edit.tables[site]), strict=True
            ):
                if flat // WIDTH == expert:
                    own = activation[row, flat % WIDTH].float()
                    moved = shift if scale == 0 else scale * own + shift
                    changed[row, flat % WIDTH] = moved
        return changed

    return change


@torch.no_grad()
def test_edits_of_experts_neurons_equal_those_of_a_plain_loop(mixture, dtype, implementation):
    model = mixture.build(dtype, implementation)
    before = plain.attributes(model)
    untouched = model(IDS)
    edits = edits_of(model, mixture)
    for given in (edits, edits[2:]):
        with mixtures.watched(model, plainly(given, IDS.shape[1])):
            expected = model(IDS)
        assert not plain.same(expected, untouched)
        with lf.steer(model, given if len(given) > 1 else given[0]):
            assert plain.same(model(IDS), expected)
    plain.assert_untouched(before, model)
    assert plain.same(model(IDS), untouched)


@torch.no_grad()
def test_a_recorder_sees_edited_activations(mixtral, implementation):
    mixtral.set_experts_implementation(implementation)
    edits = edits_of(mixtral, by_name("MixtralForCausalLM"))
    with mixtures.watched(mixtral, plainly(edits, 8)) as calls:
        expected = mixtral(IDS)
    with lf.record(mixtral, LABELS) as recorder, lf.steer(mixtral, edits):
        recorder.set(groups=GROUPS)
        assert plain.same(mixtral(IDS), expected)
    profile = recorder.profile()
    assert profile.metadata["edited"]
    for site, seen in calls.items():
        assert torch.equal(profile.counts[site], mixtures.counts(seen, GROUPS, 2, 4)[0])


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
def test_an_edit_per_sequence_holds_while_the_model_generates(name, implementation):
    mixture = by_name(name)
    model = mixture.build(torch.float32, implementation)
    edits = edits_of(model, mixture)
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def change(site, activation, owners):
        rows = 1 + max(token for _, token in owners)
        return plainly(edits, 8 if rows > 3 else 1)(site, activation, owners)

    plainly_made = model.generate(IDS, **options)
    with mixtures.watched(model, change):
        expected = model.generate(IDS, **options)
    with lf.steer(model, edits):
        assert torch.equal(model.generate(IDS, **options), expected)
    assert not torch.equal(expected, plainly_made)


@pytest.mark.parametrize("where", ["prompt", "generated"])
def test_an_edit_holds_where_it_is_asked_for(mixtral, implementation, where):
    mixtral.set_experts_implementation(implementation)
    edit = edits_of(mixtral, by_name("MixtralForCausalLM"))[2]
    options = {"max_new_tokens": 4, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}

    def change(site, activation, owners):
        prompt = max(token for _, token in owners) > 2
        return plainly([edit if prompt == (where == "prompt") else None], 8)(
            site, activation, owners
        )

    with mixtures.watched(mixtral, change):
        expected = mixtral.generate(IDS, **options)
    with lf.steer(mixtral, edit, where=where):
        assert torch.equal(mixtral.generate(IDS, **options), expected)


@torch.no_grad()
def test_experts_and_tokens_that_are_all_alike_are_no_reason_to_refuse(
    mixtral, dtype, implementation
):
    """As in a model whose experts are copies of one FFN, at the token that begins every text."""
    mixtral.to(dtype).set_experts_implementation(implementation)
    for experts in mixtures.experts_of(mixtral).values():
        experts.gate_up_proj.copy_(experts.gate_up_proj[:1].expand_as(experts.gate_up_proj))
    ids = IDS.clone()
    ids[:, 0] = 1
    with lf.record(mixtral, LABELS) as recorder:
        recorder.set(groups=GROUPS)
        mixtral(ids)
    assert recorder.unproven == []


@torch.no_grad()
def test_padding_is_edited_as_its_sequence_and_counts_nowhere(mixtral):
    with lf.record(mixtral, ["a"]) as recorder:
        recorder.set(label="a", mask=torch.zeros(3, 8))
        mixtral(IDS)
        recorder.set(label="a", mask=MASK)
        mixtral(IDS, attention_mask=MASK)
    profile = recorder.profile()
    assert profile.tokens.tolist() == [int(MASK.sum())]
    assert int(profile.routed["layers.0.mlp.experts"].sum()) == 2 * int(MASK.sum())


def test_gradients_flow_through_a_recorded_mixture_as_without(mixtral, implementation):
    mixtral.set_experts_implementation(implementation)
    weight = mixtral.model.layers[0].mlp.experts.gate_up_proj
    mixtral(IDS, labels=IDS).loss.backward()
    expected, weight.grad = weight.grad.clone(), None
    with lf.record(mixtral, ["a"]) as recorder:
        recorder.set(label="a")
        mixtral(IDS, labels=IDS).loss.backward()
    assert torch.equal(weight.grad, expected)
    assert int(recorder.profile().routed["layers.0.mlp.experts"].sum()) == 48


def test_what_is_recomputed_for_the_backward_pass_is_not_counted_again(mixtral):
    mixtral.gradient_checkpointing_enable({"use_reentrant": False})
    mixtral.train()
    with lf.record(mixtral, ["a"]) as recorder:
        recorder.set(label="a")
        mixtral(IDS, labels=IDS, use_cache=False).loss.backward()
    profile = recorder.profile()
    site = "layers.0.mlp.experts"
    assert int(profile.routed[site].sum()) == 48
    assert (profile.counts[site] <= profile.routed[site][..., None]).all()


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
@torch.no_grad()
def test_a_copy_of_a_placed_mixture_is_an_ordinary_one(name):
    model = by_name(name).build()
    expected = model(IDS)
    with lf.record(model, ["a"]) as recorder:
        for made in (copy.deepcopy(model), pickle.loads(pickle.dumps(model))):
            assert plain.same(made(IDS), expected)  # nobody said what these tokens are
            assert not any("_lapefast" in key for m in made.modules() for key in vars(m))
            assert not any(m._forward_hooks or m._forward_pre_hooks for m in made.modules())
        recorder.set(label="a")
        model(IDS)
    assert int(recorder.profile().tokens) == 24


@pytest.mark.parametrize("implementation", ["batched_mm", "grouped_mm"])
@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
@torch.no_grad()
def test_a_mixture_compiles_to_one_graph_that_counts_and_edits(name, implementation):
    mixture = by_name(name)
    model = mixture.build(torch.bfloat16, implementation)
    edits = edits_of(model, mixture)
    with lf.record(model.model, LABELS) as recorder, lf.steer(model.model, edits):
        recorder.set(groups=GROUPS)
        expected = model.model(IDS)
        once = recorder.profile()
        compiled = torch.compile(model.model, backend="aot_eager", fullgraph=True)
        assert plain.same(compiled(IDS), expected)
    twice = recorder.profile()
    for site in mixtures.experts_of(model):
        assert torch.equal(twice.counts[site], 2 * once.counts[site])
        assert torch.equal(twice.routed[site], 2 * once.routed[site])


@pytest.mark.parametrize("name", ["MixtralForCausalLM", "GptOssForCausalLM"])
@torch.no_grad()
def test_a_mixture_whose_weights_are_kept_off_the_device_is_counted_alike(name, tmp_path):
    model = by_name(name).build(torch.float32, "grouped_mm")
    expected, known = model(IDS), models.fingerprint(model)
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        model(IDS)
    counted = recorder.profile()
    accelerate.disk_offload(model, tmp_path, execution_device="cpu")
    assert models.fingerprint(model) == known
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        assert plain.same(model(IDS), expected)
    for site, counts in recorder.profile().counts.items():
        assert torch.equal(counts, counted.counts[site])


@torch.no_grad()
def test_rows_in_an_order_other_than_was_thought_are_refused(mixtral, monkeypatch):
    mixtral.set_experts_implementation("batched_mm")
    reversed_ranks = lambda chosen, experts: [  # noqa: E731
        (routing._by_token(chosen.flip(1), experts)[0][0], routing._by_token(chosen, experts)[0][1])
    ]
    monkeypatch.setitem(routing._ORDERS, "batched_mm", reversed_ranks)
    with pytest.raises(InputError, match=r"layers.0.mlp.experts: the rows .* in another order"):
        lf.record(mixtral, ["a"])


@pytest.mark.parametrize("order", ["batched_mm", "grouped_mm"])
@torch.no_grad()
def test_rows_of_another_implementation_than_the_named_one_are_refused(mixtral, monkeypatch, order):
    mixtral.set_experts_implementation("eager")
    monkeypatch.setitem(routing._ORDERS, "eager", routing._ORDERS[order])
    with pytest.raises(InputError, match=r"layers.0.mlp.experts.* that were not routed so"):
        lf.record(mixtral, ["a"])


@torch.no_grad()
def test_each_implementation_is_proven_when_it_first_runs(mixtral, monkeypatch):
    with lf.record(mixtral, ["a"]) as recorder:
        recorder.set(label="a")
        mixtral(IDS)
        mixtral.set_experts_implementation("grouped_mm")
        monkeypatch.setitem(routing._ORDERS, "grouped_mm", routing._by_token)
        with pytest.raises(InputError, match="in another order"):
            mixtral(IDS)


@torch.no_grad()
def test_an_implementation_whose_rows_are_not_known_is_refused_by_name(mixtral):
    mixtral.config._experts_implementation = "sonicmoe"
    with pytest.raises(InputError, match=r"runs its experts by sonicmoe.*eager, batched_mm"):
        lf.record(mixtral, ["a"])


@torch.no_grad()
def test_experts_that_do_not_apply_their_gate_are_an_error(mixtral):
    experts = mixtral.model.layers[0].mlp.experts
    experts._apply_gate = lambda gate_up: gate_up.chunk(2, dim=-1)[1]
    mixtral.set_experts_implementation("batched_mm")
    with pytest.raises(InputError, match=r"layers.0.mlp.experts runs without applying its gate"):
        lf.record(mixtral, ["a"])


@torch.no_grad()
def test_experts_that_activate_more_than_the_gate_are_refused(mixtral):
    experts = mixtral.model.layers[0].mlp.experts
    experts._apply_gate = lambda gate_up: experts.act_fn(*gate_up.chunk(2, dim=-1))
    mixtral.set_experts_implementation("batched_mm")
    with pytest.raises(InputError, match=r"layers.0.mlp.experts gives its activation module more"):
        lf.record(mixtral, ["a"])


@torch.no_grad()
def test_an_activation_of_rows_that_nobody_routed_is_refused(mixtral):
    with lf.record(mixtral, ["a"]) as recorder:
        recorder.set(label="a")
        mixtral(IDS)
        with pytest.raises(InputError, match="applied its gate to rows that were not routed$"):
            mixtral.model.layers[0].mlp.experts.act_fn(torch.zeros(1, WIDTH))


@torch.no_grad()
def test_a_token_that_goes_to_one_expert_twice_is_refused(mixtral):
    def first_alone(module, given, output):
        logits, weights, chosen = output
        return logits, weights, chosen[:, :1].repeat(1, 2)

    mixtral.model.layers[1].mlp.gate.register_forward_hook(first_alone)
    with pytest.raises(InputError, match=r"layers.1.mlp.experts routes a token to an expert twice"):
        lf.record(mixtral, ["a"])


@torch.no_grad()
def test_experts_that_see_other_tokens_than_the_models_are_refused(mixtral):
    mixtral.model.layers[0].mlp.experts.register_forward_pre_hook(
        lambda module, given: tuple(one[:5] for one in given)
    )
    with pytest.raises(InputError, match=r"experts saw 5 tokens where the model's input has 24"):
        lf.record(mixtral, ["a"])


def test_experts_that_are_split_over_processes_are_refused(mixtral):
    mixtral.model.layers[1].mlp.experts._is_expert_parallel = True
    with pytest.raises(InputError, match=r"layers.1.mlp.experts .* can't handle"):
        models.find_sites(mixtral)


def test_a_gate_that_is_not_gpt_oss_own_is_refused(monkeypatch):
    model = by_name("GptOssForCausalLM").build()
    cls = type(model.model.layers[0].mlp.experts)

    def gate(self, gate_up):
        return gate_up[..., ::2] * torch.sigmoid(gate_up[..., 1::2])

    monkeypatch.setattr(cls, "_apply_gate", gate)
    with pytest.raises(InputError, match="calls its activation as a function"):
        models.find_sites(model)


def test_products_of_experts_are_not_recorded(mixtral):
    with pytest.raises(InputError, match="square_sums can't be recorded at layers.0.mlp.experts"):
        lf.record(mixtral, ["a"], ("square_sums",))


@torch.no_grad()
def test_a_fingerprint_tells_experts_and_their_last_projections(mixtral):
    known = models.fingerprint(mixtral)
    assert known == models.fingerprint(mixtral.model) == models.fingerprint(mixtral.bfloat16())
    mixtral.model.layers[1].mlp.experts.down_proj.mul_(2)
    assert models.fingerprint(mixtral) != known

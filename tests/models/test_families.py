from __future__ import annotations

import copy

import plain
import pytest
import torch
from families import FAMILIES, MODERN, VOCABULARY, Family, by_name, shared

import lapefast as lf
from lapefast import models, ops
from lapefast.errors import InputError
from lapefast.models import placed

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
# Two labels and padding on the left and on the right; the second row is mixed.
GROUPS = torch.tensor([[-1, -1] + 6 * [0], 4 * [0] + 4 * [1], 5 * [1] + 3 * [-1]])


@pytest.fixture(params=FAMILIES, ids=str)
def family(request) -> Family:
    return request.param


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request) -> torch.dtype:
    return request.param


def set_groups(recorder, family, model):
    if model.config.is_encoder_decoder:
        recorder.set(groups=GROUPS, decoder_groups=GROUPS[:, :5])
        return {site: GROUPS[:, :5] if site.startswith("decoder") else GROUPS
                for site in family.sites}  # fmt: skip
    recorder.set(groups=GROUPS)
    return dict.fromkeys(family.sites, GROUPS)


def test_sites_are_found_where_the_family_has_them(family):
    model = shared(family.name)
    found = models.find_sites(model)
    assert [site.name for site in found] == list(family.sites)
    assert models.bare_model(model) is family.bare_of(model)
    names = {site: type(module).__name__ for site, module in family.activations(model).items()}
    assert {site.name: site.activation for site in found} == names


@torch.no_grad()
def test_outputs_and_counts_equal_those_of_a_plain_hook_on_the_eager_model(family, dtype):
    model = shared(family.name, dtype)
    before = plain.attributes(model)
    with plain.hooked(family.activations(model)) as seen:
        expected = family.call(model)
    largest = max(float(one.abs().max()) for calls in seen.values() for one in calls)
    assert 400 < largest < float("inf")
    assert all(tensor.isfinite().all() for tensor in plain.tensors(expected))

    with lf.record(model, ["a", "b"]) as recorder:
        groups = set_groups(recorder, family, model)
        assert plain.same(family.call(model), expected)
    profile = recorder.profile()

    assert profile.sites == list(family.sites)
    for site, activations in seen.items():
        assert len(activations) == family.calls
        counted = plain.counts(activations, groups[site], 2)
        assert torch.equal(profile.counts[site], counted), site
        tokens = torch.stack([(groups[site] == label).sum() for label in range(2)])
        assert torch.equal(profile.site_tokens(site), tokens * family.calls)
    assert recorder.unproven == []
    plain.assert_untouched(before, model)
    assert plain.same(family.call(model), expected)


@torch.no_grad()
def test_what_is_proven_is_fused_and_what_is_a_known_forward_is_replaced(
    family, dtype, monkeypatch
):
    model = shared(family.name, dtype)
    fused = (family.kernel, dtype, "cpu") in ops.FUSED
    called = []
    for name in ("profile", "profile_", "observe"):
        op = getattr(placed.ops, name)
        monkeypatch.setattr(
            placed.ops,
            name,
            lambda gate, *rest, op=op, name=name, **options: (
                called.append((name, rest[0] if name == "observe" else rest[1])),
                op(gate, *rest, **options),
            )[1],
        )
    owners = [family.activations(model)[site] for site in family.sites]
    with lf.record(model, ["a"], statistics=("counts", "sums")) as recorder:
        recorder.set(label="a")
        called.clear()
        family.call(model)
        assert set(recorder.how.values()) == {"fused" if fused else "given"}
        assert all(("forward" in vars(owner)) != family.replaced for owner in owners)
    kernel = family.kernel if fused else "identity"
    op = "profile" if fused else "observe"
    if family.replaced:
        # Written over the gate where that is a tensor of its own, which a half of one is too.
        op = called[0][0]
        assert op in ("profile", "profile_")
    assert called == [(op, kernel)] * (len(family.sites) * family.calls)


@pytest.mark.parametrize("name", ["llama", "mistral", "qwen2", "phi3", "glm4", "cohere", "granite"])
@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_the_gated_families_in_half_precision_are_fused(name, dtype):
    model = shared(name, dtype)
    with lf.record(model, ["a"]) as recorder:
        assert set(recorder.how.values()) == {"fused"}
        for site in by_name(name).sites:
            assert "forward" in vars(models.bare_model(model).get_submodule(site))


def test_a_bare_model_and_its_causal_form_have_the_same_sites_and_fingerprint(family):
    model = shared(family.name)
    bare = family.bare_of(model)
    assert models.find_sites(bare) == models.find_sites(model)
    assert models.fingerprint(bare) == models.fingerprint(model)
    assert models.fingerprint(copy.deepcopy(model)) == models.fingerprint(model)


SEPARATE = {
    "JetMoeForCausalLM": {"num_local_experts": 4, "kv_channels": 8},
}


@pytest.mark.parametrize("name", SEPARATE)
def test_experts_that_run_in_a_way_of_their_own_are_refused_by_name(name):
    options = {**MODERN, **SEPARATE[name], "vocab_size": VOCABULARY}
    model = Family(name, name, options, {}, bare="").build()
    with pytest.raises(InputError, match="is a mixture of experts that lapefast can't handle"):
        models.find_sites(model)

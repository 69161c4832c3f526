from __future__ import annotations

from types import SimpleNamespace

import plain
import pytest
import torch
from families import IDS, VOCABULARY, by_name, shared
from torch import nn

import lapefast as lf
from lapefast import models, ops
from lapefast.errors import InputError
from lapefast.models import placed_forwards
from lapefast.neurons import NeuronSets
from lapefast.neurons.layout import Layout

DTYPES = (torch.float32, torch.bfloat16, torch.float16)
NEURONS = [0, 3, 20, 31, 32, 50, 51]
OTHERS = [3, 4, 32]


@pytest.fixture(params=["llama", "phi3", "gemma", "gpt2", "opt", "bert", "t5-v1.1", "bitnet",
                        "falcon-h1", "zamba2"])  # fmt: skip
def family(request):
    return by_name(request.param)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def dtype(request):
    return request.param


@pytest.fixture
def llama():
    return shared("llama")


@torch.no_grad()
def by_hook(family, model, change, sites=None):
    """The output of the eager model with ``change(activation)`` made by a plain hook."""

    def at(site, output):
        output = output.clone()
        if sites is None or site in sites:
            change(output)
        return output

    with plain.hooked(family.activations(model), at):
        return family.call(model)


@torch.no_grad()
def steered(family, model, edit):
    before = plain.attributes(model)
    unsteered = family.call(model)
    with lf.steer(model, edit):
        output = family.call(model)
        again = family.call(model)
    assert plain.same(output, again)
    plain.assert_untouched(before, model)
    assert plain.same(family.call(model), unsteered)
    assert not plain.same(output, unsteered)
    return output


def everywhere(family, neurons=NEURONS):
    return dict.fromkeys(family.sites, neurons)


def test_deactivating_equals_a_hook_that_writes_zeros(family, dtype):
    model = shared(family.name, dtype)

    def change(activation):
        activation[..., NEURONS] = 0

    output = steered(family, model, lf.deactivate(everywhere(family)))
    assert plain.same(output, by_hook(family, model, change))


def test_activating_equals_a_hook_that_writes_the_values(family, dtype):
    model = shared(family.name, dtype)
    values = torch.linspace(-3, 7, 52, dtype=torch.float64)

    def change(activation):
        activation[..., NEURONS] = values[NEURONS].float().to(dtype)

    edit = lf.activate(everywhere(family), dict.fromkeys(family.sites, values))
    assert plain.same(steered(family, model, edit), by_hook(family, model, change))


def test_adding_equals_a_hook_that_adds_in_float32(family, dtype):
    model = shared(family.name, dtype)
    values = torch.linspace(-3, 7, 52)

    def change(activation):
        activation[..., NEURONS] += values[NEURONS] * 0.5

    edit = lf.add(everywhere(family), dict.fromkeys(family.sites, values), strength=0.5)
    assert plain.same(steered(family, model, edit), by_hook(family, model, change))


def test_scaling_equals_a_hook_that_multiplies(family, dtype):
    model = shared(family.name, dtype)

    def change(activation):
        activation[..., NEURONS] = (activation[..., NEURONS].float() * 1.7).to(dtype)

    output = steered(family, model, lf.scale(everywhere(family), 1.7))
    assert plain.same(output, by_hook(family, model, change))


def test_an_edit_of_one_site_leaves_the_others_alone(family, dtype):
    model = shared(family.name, dtype)
    site = list(family.sites)[-1]

    def change(activation):
        activation[..., NEURONS] = 0

    output = steered(family, model, lf.deactivate({site: NEURONS}))
    assert plain.same(output, by_hook(family, model, change, {site}))


def test_in_a_join_the_right_hand_edit_holds(family):
    model = shared(family.name, torch.bfloat16)

    def change(activation):
        activation[..., NEURONS] = 0
        activation[..., OTHERS] = 2.5

    edit = lf.deactivate(everywhere(family)) | lf.activate(everywhere(family, OTHERS), 2.5)
    assert plain.same(steered(family, model, edit), by_hook(family, model, change))


@torch.no_grad()
def test_what_is_deactivated_is_zero_even_where_it_was_not_finite():
    model = by_name("llama").build(torch.bfloat16)
    model.model.layers[0].mlp.gate_proj.weight[3] = float("inf")
    assert not model(IDS).logits.isfinite().all()
    with lf.steer(model, lf.deactivate({"layers.0.mlp": [3]})):
        assert model(IDS).logits.isfinite().all()


def test_neurons_known_by_position_are_bound_to_the_model(llama):
    unbound = NeuronSets({"en": {0: NEURONS, 1: OTHERS}}, Layout((0, 1)))
    family = by_name("llama")

    def change(activation):
        activation[..., NEURONS] = 0

    def other(activation):
        activation[..., OTHERS] = 0

    names = list(family.sites)

    def at(site, output):
        output = output.clone()
        (change if site == names[0] else other)(output)
        return output

    with torch.no_grad(), plain.hooked(family.activations(llama), at):
        expected = llama(IDS)
    assert plain.same(steered(family, llama, lf.deactivate(unbound["en"])), expected)


@pytest.mark.parametrize(
    ("neurons", "message"),
    [
        ({"layers.0.mlp": [52]}, "layers.0.mlp"),
        ({"layers.7.mlp": [0]}, "layers.7.mlp"),
    ],
)
def test_an_edit_that_does_not_fit_is_refused_and_the_model_kept(llama, neurons, message):
    before = plain.attributes(llama)
    with pytest.raises(InputError, match=message):
        lf.steer(llama, lf.deactivate(neurons))
    plain.assert_untouched(before, llama)


def test_an_edit_for_another_number_of_sites_is_refused(llama):
    unbound = NeuronSets({"en": {0: [1], 1: [1], 2: [1]}}, Layout((0, 1, 2)))
    with pytest.raises(InputError, match="3"):
        lf.steer(llama, lf.deactivate(unbound["en"]))


def test_neurons_of_a_model_of_other_weights_are_refused(llama):
    sites = tuple(by_name("llama").sites)
    layout = Layout(sites, dict.fromkeys(sites, 52), models.fingerprint(shared("mistral")))
    neurons = NeuronSets({"en": {sites[0]: [1]}}, layout)
    other = by_name("llama").build()
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.down_proj.weight.mul_(2)
    with lf.steer(llama, lf.deactivate(neurons["en"])):  # the same weights as the mistral's
        pass
    with pytest.raises(InputError, match="(?i)fingerprint|weights"):
        lf.steer(other, lf.deactivate(neurons["en"]))


@pytest.mark.parametrize("given", [None, {"layers.0.mlp": [1]}, "en"])
def test_what_is_no_edit_is_refused(llama, given):
    with pytest.raises(InputError, match="deactivate, activate, scale or add"):
        lf.steer(llama, given)


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5-v1.1", "phi3"])
@torch.no_grad()
def test_generation_runs_with_the_edit(name):
    family, model = by_name(name), shared(name, torch.float32)
    options = {"max_new_tokens": 6, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    sites = everywhere(family, list(range(0, 52, 2)))

    def at(site, output):
        output = output.clone()
        output[..., ::2] = 0
        return output

    with plain.hooked(family.activations(model), at):
        expected = model.generate(IDS, **options)
    plain_text = model.generate(IDS, **options)
    with lf.steer(model, lf.deactivate(sites)):
        assert torch.equal(model.generate(IDS, **options), expected)
    assert torch.equal(model.generate(IDS, **options), plain_text)
    assert int(expected.max()) < VOCABULARY


def _hooked(projection):
    projection.register_forward_hook(lambda module, args, output: output * 2)


def _hooked_before(projection):
    projection.register_forward_pre_hook(lambda module, args: (args[0] + 1,))


def _with_a_forward_of_its_own(projection):
    forward = projection.forward
    projection.forward = lambda x: forward(x) - 1


def _parametrised(projection):
    nn.utils.parametrizations.weight_norm(projection)
    projection.parametrizations.weight.original0.data *= 2


def _with_a_weight_that_is_no_parameter(projection):
    weight = projection.weight.detach() * 3
    del projection.weight
    projection.weight = weight


def _with_a_bias_that_is_no_parameter(projection):
    del projection.bias
    projection.bias = torch.linspace(-1, 1, projection.out_features, dtype=projection.weight.dtype)


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "down_proj"])
@pytest.mark.parametrize(
    "changed",
    [
        _hooked, _hooked_before, _with_a_forward_of_its_own, _parametrised,
        _with_a_weight_that_is_no_parameter, _with_a_bias_that_is_no_parameter,
    ],
)  # fmt: skip
@torch.no_grad()
def test_what_others_make_of_a_projection_holds_while_steered(part, changed, dtype):
    family = by_name("llama")
    model = family.build(dtype)
    before = family.call(model)
    for site in family.sites:
        changed(model.model.get_submodule(f"{site}.{part}"))
    assert not plain.same(family.call(model), before)

    def silenced(activation):
        activation[..., NEURONS] = 0

    edit = lf.deactivate(everywhere(family))
    assert plain.same(steered(family, model, edit), by_hook(family, model, silenced))


@torch.no_grad()
def test_plain_projections_are_called_by_their_function(monkeypatch, dtype):
    model, calls = by_name("llama").build(dtype), []

    def linear(x, weight, bias):
        calls.append(weight)
        return nn.functional.linear(x, weight, bias)

    monkeypatch.setattr(placed_forwards, "functional", SimpleNamespace(linear=linear))
    with lf.steer(model, lf.deactivate(everywhere(by_name("llama")))):
        calls.clear()
        model(IDS)
        expected = [
            one.weight
            for layer in model.model.layers
            for one in (layer.mlp.gate_proj, layer.mlp.up_proj, layer.mlp.down_proj)
        ]
        assert len(calls) == len(expected)
        assert all(mine is other for mine, other in zip(calls, expected, strict=True))
        forward = nn.Linear.forward
        monkeypatch.setattr(nn.Linear, "forward", lambda self, x: forward(self, x) * 2)
        calls.clear()
        model(IDS)
        assert not calls


@torch.no_grad()
def test_calls_of_activations_are_heard_by_who_replaced_them(monkeypatch):
    model, heard = by_name("llama").build(torch.float32), []
    activations = [layer.mlp.act_fn for layer in model.model.layers]
    real = nn.Module._call_impl

    def call(self, *given, **options):
        heard.append(self)
        return real(self, *given, **options)

    def compiled(x):
        heard.append(activations[0])
        return activations[0].forward(x)

    with lf.steer(model, lf.deactivate(everywhere(by_name("llama")))):
        expected = model(IDS).logits
        with monkeypatch.context() as patch:
            patch.setattr(nn.Module, "_call_impl", call)
            assert torch.equal(model(IDS).logits, expected)
        assert heard  # other modules, but no activation
        assert not {*map(id, activations)} & {*map(id, heard)}
        heard.clear()
        activations[0]._compiled_call_impl = compiled  # as `module.compile()` leaves it
        assert torch.equal(model(IDS).logits, expected)
        assert [*map(id, heard)] == [id(activations[0])]
        activations[0]._compiled_call_impl = None
        heard.clear()
        monkeypatch.setattr(nn.Module, "__call__", call)
        assert torch.equal(model(IDS).logits, expected)
        assert {*map(id, activations)} <= {*map(id, heard)}


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_gradients_flow_through_an_edit_as_through_a_hook(dtype):
    family = by_name("llama")
    model = family.build(dtype)

    def gradients():
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters()]

    def at(site, output):
        kept = torch.ones(52, dtype=dtype)
        kept[NEURONS] = 0
        return output * kept

    with plain.hooked(family.activations(model), at):
        expected = gradients()
    with lf.steer(model, lf.deactivate(everywhere(family))):
        found = gradients()
    assert all(map(torch.equal, expected, found))


@torch.no_grad()
def test_backends_edit_the_same(family, dtype):
    model = shared(family.name, dtype)
    edit = lf.scale(everywhere(family), 0.3) | lf.add(everywhere(family, OTHERS), 1.5)
    outputs = []
    for backend in ("cpu", "reference"):
        with lf.steer(model, edit, backend=backend):
            outputs.append(family.call(model))
    assert plain.same(*outputs)


@torch.no_grad()
def test_edited_activations_are_counted_under_the_edit(family):
    model = shared(family.name, torch.bfloat16)
    edit = lf.add(everywhere(family), 0.4) | lf.scale(everywhere(family, OTHERS), -1.0)

    def change(activation):
        kept = activation.clone()
        activation[..., NEURONS] += torch.full((len(NEURONS),), 0.4)  # in float32
        activation[..., OTHERS] = -kept[..., OTHERS] + 0.0  # as scale * a + shift: -0 becomes 0

    def at(site, output):
        output = output.clone()
        change(output)
        return output

    with plain.hooked(family.activations(model), at) as seen:
        expected = family.call(model)
    with lf.steer(model, edit), lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        assert plain.same(family.call(model), expected)
    for site, counted in recorder.profile().counts.items():
        rows = sum(len(one.reshape(-1, 52)) for one in seen[site])
        groups = torch.zeros(rows // len(seen[site]), dtype=torch.int64)
        assert torch.equal(counted, plain.counts(seen[site], groups, 1)), site


@torch.no_grad()
def test_a_float32_activation_is_edited_where_it_lies(monkeypatch):
    model, taken = by_name("llama").build(), []
    place = ops.EditTables.edit_

    def noted(*arguments):
        taken.append(place(*arguments))
        return taken[-1]

    sites = [site.name for site in models.find_sites(model)]
    with lf.steer(model, lf.deactivate(dict.fromkeys(sites, [0, 3]))):
        monkeypatch.setattr(ops.EditTables, "edit_", noted)
        model(IDS)
    native = ops.backend_for("auto", "cpu").__name__.endswith("backends.cpu")
    assert taken == [native] * len(sites)

from __future__ import annotations

import contextlib
import copy
from dataclasses import replace

import plain
import pytest
import torch
from families import FAMILIES, IDS, VERSION_4, by_name, gated, shared
from torch import nn

import lapefast as lf
from lapefast.errors import InputError
from lapefast.models.structure import find_ffns
from lapefast.neurons import Edit, NeuronSets
from lapefast.neurons.layout import Layout
from lapefast.steering.preimage import preimages

NEURONS = [0, 3, 20, 31, 32, 50, 51]
OTHERS = [3, 4, 32]
HALVES = (torch.bfloat16, torch.float16)
PLAIN = ["gpt2", "opt", "bloom", "falcon", "bert", "albert", "nemotron", "t5", "bart", "phi"]
FOLDED = [*PLAIN, "llama", "gemma", "phi3", "t5-v1.1", "falcon-h1", "gemma3n", "zamba2",
          "modernbert"]  # fmt: skip


def everywhere(name, neurons=NEURONS):
    return dict.fromkeys(by_name(name).sites, neurons)


def edits(name):
    """Kind -> edit of every site, of the kinds that the family's FFNs can fold."""
    values = dict.fromkeys(by_name(name).sites, torch.linspace(-2, 3, 52))
    found = {
        "deactivate": lf.deactivate(everywhere(name)),
        "scale": lf.scale(everywhere(name), 1.7) | lf.scale(everywhere(name, OTHERS), -0.3),
    }
    if name in PLAIN:
        found["activate"] = lf.activate(everywhere(name), values)
        found["add"] = lf.add(everywhere(name), values, strength=0.5)
        both = Edit(found["scale"].tables, found["scale"].layout)
        tables = {
            site: (neurons, scale, found["add"].tables[site][2][:1].expand(len(neurons)).clone())
            for site, (neurons, scale, _) in both.tables.items()
        }
        found["scale and add"] = Edit(tables, both.layout)
    return found


def built(name, dtype=torch.float32):
    """A model with biases that are not 0, as they are when a model is made."""
    model = by_name(name).build(dtype)
    generator = torch.Generator().manual_seed(1)
    for path, parameter in model.named_parameters():
        if path.endswith("bias"):
            parameter.data.copy_(torch.randn(parameter.shape, generator=generator) * 0.1)
    return model


def mlp_biased(activation="silu", dtype=torch.float32):
    family = gated("llama", "LlamaForCausalLM", mlp_bias=True, hidden_act=activation)
    # So that squares stay within float16.
    model = replace(family, gate_scale=100).build(dtype)
    torch.manual_seed(3)
    for layer in model.model.layers:
        nn.init.normal_(layer.mlp.gate_proj.bias)
        nn.init.normal_(layer.mlp.down_proj.bias)
    return model


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def distance(first, second):
    pairs = zip(plain.tensors(first), plain.tensors(second), strict=True)
    return max(float((a - b).double().norm() / b.double().norm()) for a, b in pairs)


@contextlib.contextmanager
def left_as_it_was(model):
    """Whatever happens inside, the model is afterwards what it was, bit for bit."""
    before, attributes = state(model), plain.attributes(model)
    try:
        yield
    finally:
        plain.assert_untouched(attributes, model)
        assert before.keys() == model.state_dict().keys()
        assert all(torch.equal(before[name], now) for name, now in model.state_dict().items())


@torch.no_grad()
def steered_and_folded(family, model, edit):
    with lf.steer(model, edit):
        steered = family.call(model)
    with left_as_it_was(model), lf.fold(model, edit):
        folded = family.call(model)
    return steered, folded


# What is folded computes as what is steered.


@pytest.mark.parametrize("name", FOLDED)
@torch.no_grad()
def test_in_float32_a_fold_agrees_with_steering_within_1e_5(name):
    model = built(name)
    unedited = by_name(name).call(model)
    for kind, edit in edits(name).items():
        steered, folded = steered_and_folded(by_name(name), model, edit)
        assert distance(folded, steered) < 1e-5, kind
        assert distance(unedited, steered) > 1e-4, kind


@pytest.mark.parametrize("family", FAMILIES, ids=str)
def test_folding_a_deactivation_is_steering_bit_for_bit_or_refused(family):
    # Zero times a weight and a product times zero are the same terms of the same sum.
    model = family.build(torch.bfloat16)
    edit = lf.deactivate(dict.fromkeys(family.sites, NEURONS))
    if family.name == "bitnet":
        with left_as_it_was(model), pytest.raises(InputError, match=r"layers\.0\.mlp.*lf\.steer"):
            lf.fold(model, edit)
        return
    steered, folded = steered_and_folded(family, model, edit)
    assert all(map(torch.equal, plain.tensors(folded), plain.tensors(steered)))


@pytest.mark.parametrize("dtype", HALVES)
@pytest.mark.parametrize("name", FOLDED)
@torch.no_grad()
def test_in_half_precision_a_fold_is_one_rounding_of_each_weight_away(name, dtype):
    model, family = built(name, dtype), by_name(name)
    ffn = find_ffns(model)[0]
    site, last = ffn.site.name, ffn.last
    weight = last.weight.double().abs()
    weight = weight.T if type(last).__name__ == "Conv1D" else weight
    bias = 0 if last.bias is None else last.bias.double().abs()

    def first_call():
        """What enters and leaves the last projection, where every run has the same input."""
        seen = []
        hook = last.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
        family.call(model)
        hook.remove()
        return seen[0][0].double(), seen[0][1].double()

    for kind, edit in edits(name).items():
        if name != "zamba2":  # whose two FFNs share their weights
            edit = Edit({site: edit.tables[site]}, edit.layout)
        neurons, scale, shift = edit.tables[site]
        entered, _ = first_call()
        with lf.steer(model, edit):
            _, steered = first_call()
        with lf.fold(model, edit):
            _, folded = first_call()
        kept = entered.abs()
        kept[..., neurons] *= scale.abs()
        kept[..., neurons] += shift.abs()
        terms = kept @ weight.T + bias
        changed = kept[..., neurons] @ weight[:, neurons].T
        info = torch.finfo(dtype)
        # By half a spacing each, of what they concern: the edited activation, the product with it,
        # the product without it, the weight; a shift's share in the bias, and the bias; an output
        # on either side, before and (Falcon's) after its bias is added.
        bound = info.eps * (2 * changed + bias + steered.abs() + folded.abs() + terms.mul(
            name == "falcon"))  # fmt: skip
        # Sums in float32, in any order; and what is below the normal numbers.
        bound += 52 * torch.finfo(torch.float32).eps * terms
        bound += 52 * info.eps * info.smallest_normal * (1 + kept.amax())
        assert ((folded - steered).abs() <= bound).all(), kind


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5", "opt"])
@torch.no_grad()
def test_tokens_are_those_of_steering(name):
    model = built(name)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    for edit in edits(name).values():
        with lf.steer(model, edit):
            expected = model.generate(IDS, **options)
        with lf.fold(model, edit):
            assert torch.equal(model.generate(IDS, **options), expected)


@pytest.mark.parametrize("name", ["falcon", "nemotron", "t5"])
@torch.no_grad()
def test_a_plain_ffn_without_a_bias_has_one_while_folded(name):
    model = built(name)
    last = find_ffns(model)[0].last
    assert last.bias is None
    with left_as_it_was(model), lf.fold(model, edits(name)["activate"]):
        assert last.bias is not None
        assert last.bias.requires_grad == last.weight.requires_grad
    assert last.bias is None


def test_what_is_neither_scaled_nor_shifted_is_left_out():
    model = shared("llama")
    edit = lf.scale({"layers.0.mlp": NEURONS}, {"layers.0.mlp": torch.ones(52).index_fill(
        0, torch.tensor([20]), 3.0)})  # fmt: skip
    before = state(model)
    with lf.fold(model, edit):
        changed = model.model.layers[0].mlp.down_proj.weight != before[
            "model.layers.0.mlp.down_proj.weight"]  # fmt: skip
        assert changed.any(0).nonzero().flatten().tolist() == [20]


@torch.no_grad()
def test_neurons_known_by_position_are_bound_to_the_model():
    model = shared("llama")
    unbound = NeuronSets({"en": {0: NEURONS, 1: OTHERS}}, Layout((0, 1)))
    named = {"layers.0.mlp": NEURONS, "layers.1.mlp": OTHERS}
    with lf.fold(model, lf.deactivate(named)):
        expected = model(IDS)
    with lf.fold(model, lf.deactivate(unbound["en"])):
        assert plain.same(model(IDS), expected)


@torch.no_grad()
def test_a_model_in_training_mode_keeps_its_flags():
    model = by_name("bert").build().train()
    with left_as_it_was(model), lf.fold(model, edits("bert")["add"]):
        assert all(module.training for module in model.modules())


# A gate with a bias.


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize("activation", ["silu", "gelu", "gelu_new", "relu", "relu2", "quick_gelu"])
@torch.no_grad()
def test_a_gate_with_a_bias_is_set_to_the_value(activation, dtype):
    model = mlp_biased(activation, dtype)
    values = torch.linspace(0.01, 9, 52)
    if activation in ("silu", "gelu", "quick_gelu"):
        values[3], values[20] = -0.05, -1e-3
    edit = lf.activate(everywhere("llama"), dict.fromkeys(everywhere("llama"), values))
    edit = edit | lf.deactivate(everywhere("llama", [50])) | lf.scale(everywhere("llama", [7]), 2)
    activations = {"first": model.model.layers[0].mlp.act_fn}
    with left_as_it_was(model), lf.fold(model, edit):
        with plain.hooked(activations) as seen:
            model(IDS)
        chosen = [neuron for neuron in NEURONS if neuron != 50]
        found = seen["first"][0].reshape(-1, 52)[:, chosen].float()
        assert (found == found[0]).all()
        wanted = values[chosen]
        assert ((found[0] - wanted).abs() <= 2 * torch.finfo(dtype).eps * wanted.abs()).all()
    steered, folded = steered_and_folded(by_name("llama"), model, edit)
    # Two layers; each value within 2 spacings, products and weights within as many again.
    assert distance(folded, steered) < max(1e-5, 8 * torch.finfo(dtype).eps)


@pytest.mark.parametrize(
    ("activation", "value"), [("silu", -5.0), ("silu", -0.3), ("relu", -1e-3), ("gelu", -0.2)]
)
def test_a_value_that_no_gate_reaches_is_refused_with_its_neuron(activation, value):
    model = mlp_biased(activation)
    edit = lf.activate({"layers.1.mlp": [5, 31]}, {"layers.1.mlp": torch.tensor(
        [1.0] * 31 + [value] * 21)})  # fmt: skip
    with left_as_it_was(model), pytest.raises(InputError, match=r"layers\.1\.mlp.*neuron 31") as e:
        lf.fold(model, edit)
    assert "lf.steer" in str(e.value)


@pytest.mark.parametrize("dtype", [torch.float32, *HALVES])
@pytest.mark.parametrize(
    "activation", [nn.SiLU(), nn.GELU(), nn.GELU("tanh"), nn.ReLU(), nn.Tanh(), nn.Sigmoid()]
)
def test_what_an_activation_returns_it_is_made_to_return_again(activation, dtype):
    inputs = torch.cat([torch.linspace(-1, -0.01, 40), torch.linspace(0.01, 3, 60)])
    values = activation(inputs.to(dtype)).float()
    values = values[values != 0]
    found, reached = preimages(activation, values, dtype, torch.device("cpu"))
    assert reached.all()
    assert found.dtype is dtype
    misses = (activation(found).float() - values).abs()
    assert (misses <= 2 * torch.finfo(dtype).eps * values.abs()).all()


# What is refused, and the model left as it was.


class Rounded(nn.Linear):
    """Rounds its weight when it runs, as BitLinear does."""

    def forward(self, x):
        return nn.functional.linear(x, self.weight.sign() * self.weight.abs().mean(), self.bias)


class Clamped(nn.Module):
    def __init__(self, mlp):
        super().__init__()
        self.gate_proj, self.up_proj, self.down_proj = mlp.gate_proj, mlp.up_proj, mlp.down_proj
        self.act_fn = mlp.act_fn

    def forward(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x)).clamp(max=20.0) * self.up_proj(x))


def replaced(change):
    def make():
        model = by_name("llama").build()
        change(model.model.layers[1].mlp)
        return model

    return make


def put_down(make):
    def change(mlp):
        mlp.down_proj = make(mlp.down_proj)

    return change


def rounding(linear):
    new = Rounded(linear.in_features, linear.out_features, bias=False)
    new.weight = linear.weight
    return new


def packed(linear):
    new = nn.Linear(linear.in_features, linear.out_features, bias=False)
    new.weight = nn.Parameter(linear.weight.detach().to(torch.int8), requires_grad=False)
    return new


def clamped():
    model = by_name("llama").build()
    model.model.layers[1].mlp = Clamped(model.model.layers[1].mlp)
    return model


def adapted():
    peft = pytest.importorskip("peft", reason="PEFT is not installed; the extra export lifts it")
    return peft.get_peft_model(
        by_name("llama").build(), peft.LoraConfig(r=2, target_modules=["down_proj"])
    )


def offloaded():
    accelerate = pytest.importorskip(
        "accelerate", reason="accelerate is not installed; the extra test lifts it"
    )
    model = by_name("llama").build()
    accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    return model


def nearly_full():
    model = by_name("llama").build(torch.float16)
    model.model.layers[1].mlp.down_proj.weight.data[5, 3] = 60000
    return model


def second_site(edit=lf.deactivate):
    return lambda: edit({"layers.1.mlp": NEURONS})


def scaled_up():
    return lf.scale({"layers.1.mlp": NEURONS}, 40.0)


@pytest.mark.parametrize(
    ("make", "edit", "message"),
    [
        (by_name("llama").build, lambda: lf.add(everywhere("llama"), 1.0), "adding"),
        (by_name("llama").build, lambda: lf.activate(everywhere("llama"), 1.0), "bias"),
        (by_name("phi3").build, lambda: lf.activate(everywhere("phi3"), 1.0), "bias"),
        (mlp_biased, lambda: lf.add(everywhere("llama"), 1.0), "adding"),
        (by_name("bitnet").build, lambda: lf.deactivate({"layers.1.mlp": [5]}), "something"),
        (by_name("bitnet").build, second_site(lambda sets: lf.scale(sets, 2.0)), "something"),
        (clamped, scaled_up, "something"),
        (replaced(put_down(rounding)), second_site(), "Rounded does more"),
        (replaced(put_down(packed)), second_site(), "quantised"),
        (offloaded, second_site(), "offloaded"),
        (adapted, second_site(), "merge it first"),
        (nearly_full, lambda: lf.scale({"layers.1.mlp": [3]}, 2.0), "range of torch.float16"),
    ],
)  # fmt: skip
def test_what_is_no_change_of_weights_is_refused_with_its_site(make, edit, message):
    model = make()
    meta = any(parameter.is_meta for parameter in model.parameters())
    # Offloading itself puts other parameters on a module at every forward pass.
    guard = contextlib.nullcontext() if meta else left_as_it_was(model)
    edit = edit()
    with guard, pytest.raises(InputError, match=message) as error:
        lf.fold(model, edit)
    assert "lf.steer" in str(error.value)
    assert next(reversed(edit.tables)) in str(error.value) or "layers.0" in str(error.value)


@pytest.mark.parametrize("edit", [None, [lf.deactivate({"layers.0.mlp": [1]})], "en"])
def test_what_is_no_edit_is_refused(edit):
    model = shared("llama")
    with left_as_it_was(model), pytest.raises(InputError, match="deactivate, activate, scale"):
        lf.fold(model, edit)


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (lambda: lf.deactivate({"layers.7.mlp": [0]}), "layers.7.mlp"),
        (lambda: lf.deactivate({"layers.0.mlp": [52]}), "52"),
        (lambda: lf.deactivate({"layers.0.mlp": []}), "no neuron"),
        (lambda: lf.scale({"layers.0.mlp": [3]}, 1.0), "no neuron"),
    ],
)
def test_an_edit_that_does_not_fit_or_does_nothing_is_refused(edit, message):
    model = shared("llama")
    with left_as_it_was(model), pytest.raises(InputError, match=message):
        lf.fold(model, edit())


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
def test_values_that_are_not_finite_are_refused(value):
    model = shared("gpt2")
    edit = lf.add(everywhere("gpt2"), 1.0)
    edit.tables["h.1.mlp"][2][2] = value
    with left_as_it_was(model), pytest.raises(InputError, match=r"h\.1\.mlp.*not finite"):
        lf.fold(model, edit)


def test_an_edit_for_a_model_of_other_weights_is_refused():
    edit = lf.deactivate(everywhere("llama")).bind(shared("llama"))
    other = by_name("llama").build()
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.down_proj.weight.mul_(2)
    with left_as_it_was(other), pytest.raises(InputError, match="fingerprint"):
        lf.fold(other, edit)


def test_a_model_in_which_something_is_placed_is_refused():
    model, edit = shared("llama"), lf.deactivate(everywhere("llama"))
    placed = [lambda: lf.steer(model, edit), lambda: lf.record(model, ["a"])]
    for place in placed:
        with place(), pytest.raises(InputError, match="remove it first"):
            lf.fold(model, edit)
    with lf.fold(model, edit):
        pass


def test_a_second_fold_is_refused_and_names_the_first():
    model = shared("llama")
    with left_as_it_was(model), lf.fold(model, lf.deactivate({"layers.0.mlp": [1, 2]})):
        with pytest.raises(InputError, match=r"Edit\(2 neurons in 1 sites\).*undo it first"):
            lf.fold(model.model, lf.deactivate({"layers.1.mlp": [3]}))


@torch.no_grad()
def test_a_fold_whose_handle_is_gone_is_what_the_model_is():
    model = by_name("llama").build()
    lf.fold(model, lf.deactivate(everywhere("llama", [1])))
    edit = lf.deactivate(everywhere("llama", [1, 2]))
    with lf.steer(shared("llama"), edit):
        expected = shared("llama")(IDS)
    with lf.fold(model, lf.deactivate(everywhere("llama", [2]))):
        assert plain.same(model(IDS), expected)


@pytest.mark.skipif(VERSION_4, reason="there the two are one module; later versions lift it")
def test_weights_that_two_ffns_share_are_folded_once_and_alike():
    family, model = by_name("zamba2"), by_name("zamba2").build()
    first, second = find_ffns(model)
    assert first.last.weight is second.last.weight
    steered, folded = steered_and_folded(family, model, lf.scale(everywhere("zamba2"), 3.0))
    assert distance(folded, steered) < 1e-5
    one = lf.scale({first.site.name: NEURONS}, 3.0)
    two = lf.scale({first.site.name: NEURONS}, 3.0) | lf.scale({second.site.name: NEURONS}, 2.0)
    other = lf.scale({first.site.name: [1]}, 3.0) | lf.scale({second.site.name: [2]}, 3.0)
    for edit in (one, two, other):
        with left_as_it_was(model), pytest.raises(InputError, match="another module's too"):
            lf.fold(model, edit)


def test_a_model_that_does_not_run_on_bare_tokens_is_refused():
    model = by_name("llama").build()

    def refuse(*args, **options):
        raise RuntimeError("pixel values are missing")

    model.model.forward = refuse
    with left_as_it_was(model), pytest.raises(InputError, match=r"probe of bare token ids.*steer"):
        lf.fold(model, lf.deactivate(everywhere("llama")))


def test_a_site_that_the_probe_does_not_reach_is_refused():
    model = by_name("llama").build()
    model.model.config.num_hidden_layers = 1
    if len(model.model.layers[: model.model.config.num_hidden_layers]) != 1:
        pytest.skip("this version runs every layer; transformers 5 does not")
    with left_as_it_was(model), pytest.raises(InputError, match=r"layers\.1\.mlp.*does not reach"):
        lf.fold(model, lf.deactivate(everywhere("llama")))


# Undoing.


def test_undoing_is_safe_to_repeat():
    model = shared("gpt2")
    with left_as_it_was(model):
        handle = lf.fold(model, edits("gpt2")["add"])
        handle.undo()
        handle.undo()


@pytest.mark.parametrize("name", ["gpt2", "t5"])
@pytest.mark.parametrize("error", [KeyboardInterrupt, RuntimeError])
@pytest.mark.parametrize("at", [1, 2, 3])
def test_whatever_fails_in_between_nothing_stays_folded(name, error, at, monkeypatch):
    from lapefast.steering.fold import Fold

    model, make, made = by_name(name).build(), Fold._make, []

    def failing(self, change):
        make(self, change)
        made.append(change)
        if len(made) == at:
            raise error

    monkeypatch.setattr(Fold, "_make", failing)
    with left_as_it_was(model), pytest.raises(error):
        lf.fold(model, edits(name)["scale and add"])
    monkeypatch.undo()
    with left_as_it_was(model), lf.fold(model, edits(name)["add"]):
        pass


def test_a_fold_that_does_not_give_what_the_edit_gives_is_undone(monkeypatch):
    from lapefast.steering.fold import Fold, _Change

    model, make = shared("gpt2"), Fold._make

    def wrong(self, change):
        make(self, _Change(**{**vars(change), "values": change.values * 2 + 1}))

    monkeypatch.setattr(Fold, "_make", wrong)
    with left_as_it_was(model), pytest.raises(InputError, match=r"h\.0\.mlp.*lf\.steer"):
        lf.fold(model, edits("gpt2")["add"])


def test_parameters_that_were_replaced_are_left_and_named():
    model = by_name("gpt2").build()
    before = state(model)
    handle = lf.fold(model, lf.scale(everywhere("gpt2"), 2.0))
    new = nn.Parameter(torch.ones_like(model.transformer.h[1].mlp.c_proj.weight))
    model.transformer.h[1].mlp.c_proj.weight = new
    with pytest.raises(InputError, match=r"h\.1\.mlp.*replaced"):
        handle.undo()
    assert model.transformer.h[1].mlp.c_proj.weight is new
    now = model.state_dict()
    assert torch.equal(now["transformer.h.0.mlp.c_proj.weight"],
                       before["transformer.h.0.mlp.c_proj.weight"])  # fmt: skip
    handle.undo()


@torch.no_grad()
def test_a_copy_of_a_folded_model_is_an_ordinary_model_of_its_weights():
    model = by_name("llama").build()
    with lf.fold(model, lf.deactivate(everywhere("llama"))):
        expected = model(IDS)
        twin = copy.deepcopy(model)
    assert plain.same(twin(IDS), expected)
    with lf.fold(twin, lf.scale(everywhere("llama", [7]), 2.0)):
        pass

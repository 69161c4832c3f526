"""Edits of linear layers' outputs as weights: folded, and as checkpoints and adapters."""

from __future__ import annotations

import pytest
import torch
from families import IDS, by_name

import lapefast as lf
from lapefast.errors import InputError
from lapefast.models import find_linears, known_sites

FAMILIES = ["llama", "gpt2", "phi3", "opt"]


def sites_of(model):
    return [path for path in find_linears(model) if "attn" in path][:2]


def edits_of(model, biased):
    """Deactivated, scaled, activated and added to, as far as the layers can take it."""
    edit = lf.deactivate({site: [0, 3] for site in sites_of(model)})
    edit |= lf.scale({sites_of(model)[0]: [1, 2]}, 1.75)
    if biased:
        values = {
            site: torch.linspace(-1, 1, known_sites(model, [site])[site])
            for site in sites_of(model)
        }
        edit |= lf.activate({sites_of(model)[1]: [4, 5]}, values)
        edit |= lf.add({sites_of(model)[1]: [6]}, 0.5)
    return edit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_a_folded_model_computes_what_the_steered_one_does(name, dtype):
    model = by_name(name).build().to(dtype)
    edit = edits_of(model, biased=True)
    weights = {key: one.clone() for key, one in model.state_dict().items()}
    with lf.steer(model, edit):
        expected = model(IDS).logits
    with lf.fold(model, edit):
        found = model(IDS).logits
        with pytest.raises(InputError, match="folded"):
            lf.fold(model, edit)
    # One rounding of each changed weight, which later layers carry on.
    loose = {"rtol": 1e-5, "atol": 1e-6} if dtype is torch.float32 else {"rtol": 0.1, "atol": 0.02}
    torch.testing.assert_close(found, expected, **loose)
    after = model.state_dict()
    assert after.keys() == weights.keys()
    assert all(torch.equal(after[key], one) for key, one in weights.items())


@torch.no_grad()
def test_neurons_and_outputs_are_folded_together(tmp_path):
    from transformers import AutoModelForCausalLM

    model = by_name("llama").build()
    edit = lf.deactivate({"layers.1.mlp": [0, 5]}) | edits_of(model, biased=False)
    with lf.steer(model, edit):
        expected = model(IDS).logits
    with lf.fold(model, edit):
        torch.testing.assert_close(model(IDS).logits, expected, rtol=1e-5, atol=1e-6)
    lf.export.checkpoint(model, edit, tmp_path / "model")
    loaded = AutoModelForCausalLM.from_pretrained(tmp_path / "model")
    torch.testing.assert_close(loaded(IDS).logits, expected, rtol=1e-5, atol=1e-6)


@torch.no_grad()
def test_an_adapter_scales_outputs(tmp_path):
    from peft import PeftModel

    for name in ("llama", "mistral"):
        model = by_name(name).build()
        edit = lf.deactivate({"layers.1.mlp": [0, 5]}) | edits_of(model, biased=False)
        with lf.steer(model, edit):
            expected = model(IDS).logits
        lf.export.lora(model, edit, tmp_path / name)
        adapted = PeftModel.from_pretrained(by_name(name).build(), tmp_path / name)
        torch.testing.assert_close(adapted(IDS).logits, expected, rtol=1e-4, atol=1e-5)


def test_what_an_adapter_can_not_do_is_refused(tmp_path):
    model = by_name("opt").build()
    site = sites_of(model)[0]
    torch.nn.init.ones_(find_linears(model)[site].bias)
    with pytest.raises(InputError, match="leaves the bias"):
        lf.export.lora(model, lf.deactivate({site: [0]}), tmp_path / "a")
    with pytest.raises(InputError, match="activated or added"):
        lf.export.lora(model, lf.activate({site: [0]}, 1.0), tmp_path / "b")
    llama = by_name("llama").build()
    both = lf.deactivate({"layers.1.mlp": [0]}) | lf.deactivate({"layers.1.mlp.down_proj": [0]})
    with pytest.raises(InputError, match="no one adapter"):
        lf.export.lora(llama, both, tmp_path / "c")
    assert not list(tmp_path.iterdir())


def test_a_checkpoint_has_no_place_for_a_bias_that_its_layer_lacks(tmp_path):
    model = by_name("llama").build()
    edit = lf.activate({"layers.0.self_attn.q_proj": [0]}, 1.0)
    if model.model.layers[0].self_attn.q_proj.bias is None:
        with pytest.raises(InputError, match="does not load"):
            lf.export.checkpoint(model, edit, tmp_path / "model")
        assert model.model.layers[0].self_attn.q_proj.bias is None


def test_neurons_and_outputs_of_one_ffn_are_not_folded_at_once():
    model = by_name("llama").build()
    for layer in ("gate_proj", "down_proj"):
        edit = lf.deactivate({"layers.0.mlp": [1, 2]})
        edit |= lf.deactivate({f"layers.0.mlp.{layer}": [5]})
        with pytest.raises(InputError, match="can't be folded at once"):
            lf.fold(model, edit)
    opt = by_name("opt").build()  # whose layer is the module of FFN and attention
    ffns = [site.name for site in lf.models.find_sites(opt)]
    attention = next(path for path in find_linears(opt) if path.endswith("self_attn.q_proj"))
    with pytest.raises(InputError, match="can't be folded at once"):
        lf.fold(opt, lf.deactivate({ffns[0]: [1]}) | lf.deactivate({attention: [5]}))
    with lf.fold(opt, lf.deactivate({ffns[1]: [1]}) | lf.deactivate({attention: [5]})):
        pass

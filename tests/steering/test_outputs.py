"""Edits of linear layers' outputs, which are units as an FFN's neurons are."""

from __future__ import annotations

import copy

import pytest
import torch
from families import by_name

import lapefast as lf
from lapefast.errors import InputError
from lapefast.models import find_linears
from lapefast.steering import Shift

IDS = torch.arange(3 * 8).reshape(3, 8) * 31 % 97
FAMILIES = ["llama", "gpt2", "phi3", "t5-v1.1", "opt"]


def by_hand(model, site, units, values):
    """A plain hook that overwrites units of one layer's output, per sequence or for all."""

    def overwrite(module, given, output):
        output = output.clone()
        for row in range(len(output)):
            chosen = values if not isinstance(values, list) else values[row]
            if chosen is not None:
                output[row][..., units] = chosen
        return output

    return find_linears(model)[site].register_forward_hook(overwrite)


def run(model):
    inputs = {"input_ids": IDS}
    if getattr(model.config, "is_encoder_decoder", False):
        inputs["decoder_input_ids"] = IDS
    return model(**inputs).logits


@pytest.mark.parametrize("name", FAMILIES)
@torch.no_grad()
def test_every_linear_layer_s_outputs_can_be_overwritten(name):
    model = by_name(name).build()
    for site in find_linears(model):
        units, values = torch.tensor([0, 3]), torch.tensor([0.5, -2.0])
        hook = by_hand(model, site, units, values)
        expected = run(model)
        hook.remove()
        table = torch.zeros(model_width(model, site))
        table[units] = values
        with lf.steer(model, lf.activate({site: units}, {site: table})):
            assert torch.equal(run(model), expected), site
        assert not torch.equal(run(model), expected), site


@torch.no_grad()
def test_each_sequence_has_its_own():
    model = by_name("llama").build()
    site = "layers.0.self_attn.q_proj"
    hook = by_hand(model, site, [1, 2], [0.25, None, -1.0])
    expected = run(model)
    hook.remove()
    edits = [lf.activate({site: [1, 2]}, 0.25), None, lf.activate({site: [1, 2]}, -1.0)]
    with lf.steer(model, edits):
        assert torch.equal(run(model), expected)


@torch.no_grad()
def test_ffn_and_linear_sites_are_edited_together():
    model = by_name("llama").build()
    ffn, linear = "layers.1.mlp", "layers.0.self_attn.o_proj"
    with lf.steer(model, lf.deactivate({ffn: [0, 5]})):
        hook = by_hand(model, linear, [4], 0.0)
        expected = run(model)
        hook.remove()
    with lf.steer(model, lf.deactivate({ffn: [0, 5]}) | lf.deactivate({linear: [4]})):
        assert torch.equal(run(model), expected)


@torch.no_grad()
def test_the_model_and_its_copies_come_out_as_they_were():
    model = by_name("llama").build()
    before, expected = {n: dict(m.__dict__) for n, m in model.named_modules()}, run(model)
    steering = lf.steer(model, lf.deactivate({"layers.0.self_attn.v_proj": [0]}))
    assert torch.equal(run(copy.deepcopy(model)), expected)
    assert not torch.equal(run(model), expected)
    steering.remove()
    assert torch.equal(run(model), expected)
    assert {n: m.__dict__ for n, m in model.named_modules()} == before


@torch.no_grad()
def test_where_limits_them_as_it_limits_neurons():
    model = by_name("llama").build()
    edit = lf.activate({"layers.1.self_attn.o_proj": [0, 1, 2, 3]}, 8.0)
    options = {"do_sample": False, "max_new_tokens": 6, "pad_token_id": 0}
    texts = {}
    for where in ("all", "prompt", "generated"):
        with lf.steer(model, edit, where=where):
            texts[where] = model.generate(IDS, **options)
    plain = model.generate(IDS, **options)
    assert not torch.equal(texts["all"], plain)
    # Of new positions only: the first new token comes from the prompt's last position, unedited.
    assert torch.equal(texts["generated"][:, 8], plain[:, 8])
    assert torch.equal(texts["prompt"][:, 8], texts["all"][:, 8])


def test_a_layer_that_is_not_there_or_too_narrow_is_refused():
    model = by_name("llama").build()
    with pytest.raises(InputError, match="no_proj"):
        lf.steer(model, lf.deactivate({"layers.0.self_attn.no_proj": [0]}))
    with pytest.raises(InputError, match="below its width"):
        lf.steer(model, lf.deactivate({"layers.0.self_attn.q_proj": [1 << 20]}))


def model_width(model, site):
    return lf.models.known_sites(model, [site])[site]


@pytest.mark.parametrize(
    ("edit", "what"),
    [
        (
            lf.deactivate({"layers.1.self_attn.v_proj": [0]}),
            r"a linear layer that is to be edited \(layers.1.self_attn.v_proj\)",
        ),
        (
            Shift({"layers.1": torch.ones(32)}),
            r"a decoder layer that is to be shifted \(layers.1\)",
        ),
    ],
    ids=["output", "shift"],
)
def test_what_does_not_run_cannot_be_steered(edit, what):
    model = by_name("llama").build()
    model.config.num_hidden_layers = 1  # the second layer is there, and left out
    with pytest.raises(InputError, match=f"{what} did not run in a forward pass"):
        lf.steer(model, edit)
    model(IDS)

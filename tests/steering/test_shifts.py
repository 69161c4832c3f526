"""Shifts of the residual stream, against hooks that add the same vectors."""

from __future__ import annotations

import contextlib
import copy
import pickle

import plain
import pytest
import torch
from families import IDS, by_name, shared
from test_sequences import apply, edits_of, generated

import lapefast as lf
from lapefast import models
from lapefast.errors import InputError
from lapefast.steering import Shift
from lapefast.steering.shifts import decoder_layers

HIDDEN = 32


def shift_of(model, *indices, scale=3.0) -> Shift:
    names = list(decoder_layers(model))
    generator = torch.Generator().manual_seed(7)
    return Shift(
        {names[i]: scale * torch.randn(HIDDEN, generator=generator) for i in indices},
        models.fingerprint(model),
    )


@contextlib.contextmanager
def by_hand(model, shifts, prompt=True, generated=True):
    """Hooks on the layers; sequence r has ``shifts[r // (sequences / shifts)]``."""

    def hook(name):
        def run(module, given, output):
            hidden = output[0] if isinstance(output, tuple) else output
            moved = hidden.clone()
            each = len(hidden) // len(shifts)
            for row in range(len(hidden)):
                shift = shifts[row // each]
                if shift is not None and name in shift.vectors:
                    if prompt if hidden.shape[1] > 1 else generated:
                        added = hidden[row].float() + shift.vectors[name]
                        moved[row] = added.to(hidden.dtype)
            return (moved, *output[1:]) if isinstance(output, tuple) else moved

        return run

    handles = [
        layer.register_forward_hook(hook(name)) for name, layer in decoder_layers(model).items()
    ]
    try:
        yield
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "gemma2", "opt", "falcon"])
@torch.no_grad()
def test_each_sequence_has_its_own_shift(name, dtype):
    model = shared(name, dtype)
    before = plain.attributes(model)
    shifts = [shift_of(model, 0, 1), None, shift_of(model, 1)]
    with by_hand(model, shifts):
        expected = model(IDS)
    with lf.steer(model, shifts):
        assert plain.same(model(IDS), expected)
    with by_hand(model, shifts[:1]):
        expected = model(IDS)
    with lf.steer(model, shifts[0]):
        assert plain.same(model(IDS), expected)
    plain.assert_untouched(before, model)


@pytest.mark.parametrize(
    ("where", "parts"),
    [("all", (True, True)), ("prompt", (True, False)), ("generated", (False, True))],
)
@pytest.mark.parametrize("options", [{}, {"num_beams": 2}])
def test_generating_shifts_where_it_is_asked_to(where, parts, options):
    model = shared("llama")
    shifts = [shift_of(model, 0), None, shift_of(model, 1)]
    with by_hand(model, shifts, *parts):
        expected = generated(model, **options)
    with lf.steer(model, shifts, where=where):
        assert torch.equal(generated(model, **options), expected)


@torch.no_grad()
def test_edits_and_shifts_stand_side_by_side():
    family, model = by_name("llama"), shared("llama")
    shift, edit = shift_of(model, 0), edits_of(family)[2]

    def change(site, output):
        return torch.stack([output[0], apply(edit, site, output[1]), output[2]])

    with plain.hooked(family.activations(model), change), by_hand(model, [shift, None, None]):
        expected = model(IDS).logits
    with lf.steer(model, [shift, edit, None]):
        assert torch.equal(model(IDS).logits, expected)


def test_encoder_decoders_are_shifted_in_the_decoder():
    model = shared("t5-v1.1")
    assert all(name.startswith("decoder.") for name in decoder_layers(model))
    shifts = [shift_of(model, 0), None, shift_of(model, 1)]
    with by_hand(model, shifts):
        expected = model(IDS, decoder_input_ids=IDS)
    with lf.steer(model, shifts):
        assert plain.same(model(IDS, decoder_input_ids=IDS), expected)


@pytest.mark.parametrize(
    ("vectors", "message"),
    [
        ({}, "at least one layer"),
        ([torch.zeros(HIDDEN)], "made of a dict from layer to vector, got list"),
        ({"layers.0": ["much"]}, r"must be numbers, got \['much'\]"),
        ({"layers.0": torch.full((HIDDEN,), float("nan"))}, "must be finite"),
        ({"layers.0": torch.zeros(2, HIDDEN)}, "must be a vector"),
        ({"layers.9": torch.zeros(HIDDEN)}, "layers.9"),
        ({"layers.0": torch.zeros(7)}, "7 values, but the hidden state has 32"),
    ],
)
def test_shifts_that_do_not_fit_are_refused_and_the_model_kept(vectors, message):
    model = shared("llama")
    before = plain.attributes(model)
    with pytest.raises(InputError, match=message):
        lf.steer(model, Shift(vectors))
    plain.assert_untouched(before, model)


def test_shifts_of_several_lengths_for_one_layer_are_refused_and_the_model_kept():
    model = shared("llama")
    before = plain.attributes(model)
    with pytest.raises(InputError, match="the shifts of layer layers.0 differ in length"):
        lf.steer(model, [Shift({"layers.0": torch.ones(size)}) for size in (HIDDEN, HIDDEN - 1)])
    plain.assert_untouched(before, model)


def test_a_shift_of_another_model_is_refused():
    other = by_name("llama").build()
    with torch.no_grad():
        for layer in other.model.layers:
            layer.mlp.down_proj.weight.mul_(2)
    with pytest.raises(InputError, match="fingerprint"):
        lf.steer(other, shift_of(shared("llama"), 0))


@torch.no_grad()
def test_a_copy_made_while_shifted_is_unshifted():
    model = by_name("llama").build()
    expected = model(IDS).logits
    with lf.steer(model, shift_of(model, 0, 1)):
        copies = copy.deepcopy(model), pickle.loads(pickle.dumps(model))
        assert not torch.equal(model(IDS).logits, expected)
    for one in copies:
        assert torch.equal(one(IDS).logits, expected)
        assert not any(name.startswith("_lapefast") for m in one.modules() for name in vars(m))


def test_shifts_run_compiled():
    torch._dynamo.reset()
    model = by_name("llama").build()
    with torch.no_grad(), lf.steer(model, [shift_of(model, 0), None, shift_of(model, 1)]):
        expected = model(IDS, use_cache=False).logits
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert torch.equal(compiled(IDS, use_cache=False).logits, expected)
    torch._dynamo.reset()

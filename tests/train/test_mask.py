"""Training chosen neurons alone: everything else stays bit for bit the same."""

from __future__ import annotations

import copy

import pytest
import torch
from families import IDS, by_name

import lapefast as lf
from lapefast.errors import InputError
from lapefast.models import find_linears, find_sites

OPTIMISERS = {
    "sgd": lambda p: torch.optim.SGD(p, lr=0.1, momentum=0.9, weight_decay=0.1),
    "adamw": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5),
    "adamw foreach": lambda p: torch.optim.AdamW(p, lr=0.01, weight_decay=0.5, foreach=True),
    "rmsprop": lambda p: torch.optim.RMSprop(p, lr=0.01, momentum=0.5, weight_decay=0.1),
}


def chosen_of(model):
    """Some FFN neurons of the last FFN and some outputs of a layer of the attention."""
    site = find_sites(model)[-1].name
    linears = [path for path in find_linears(model) if "attn" in path or "attention" in path]
    return {site: torch.tensor([1, 4]), linears[0]: torch.tensor([0, 3])}


def loss_of(model):
    return model(input_ids=IDS, labels=IDS).loss


def snapshot(model):
    return {name: one.detach().clone() for name, one in model.named_parameters()}


def changed(model, before):
    """Parameter -> where it changed, for those that did."""
    found = {name: one.detach() != before[name] for name, one in model.named_parameters()}
    return {name: where for name, where in found.items() if where.any()}


def test_gradients_that_were_there_before_move_nothing():
    model = by_name("llama").build()
    optimiser = torch.optim.AdamW(model.parameters(), weight_decay=0.1)
    loss_of(model).backward()
    optimiser.step()
    before = snapshot(model)
    with lf.train.neuron_mask(model, chosen_of(model)) as mask:
        optimiser.step()
        loss_of(model).backward()
        optimiser.step()
    moved = changed(model, before)
    assert sum(int(where.sum()) for where in moved.values()) <= mask.trained
    assert len(moved) == len(mask.parameters)


@pytest.mark.parametrize("make", OPTIMISERS.values(), ids=OPTIMISERS)
def test_only_the_chosen_rows_and_columns_change(make):
    model = by_name("llama").build()
    neurons, before = chosen_of(model), snapshot(model)
    optimiser = make(model.parameters())
    with lf.train.neuron_mask(model, neurons) as mask:
        for _ in range(3):
            optimiser.zero_grad()
            loss_of(model).backward()
            torch.nn.utils.clip_grad_norm_(model.parameters(), 1.0)
            optimiser.step()
    moved = changed(model, before)
    site, linear = neurons
    expected = {
        f"model.{site}.up_proj.weight": (0, neurons[site]),
        f"model.{site}.down_proj.weight": (1, neurons[site]),
        f"model.{linear}.weight": (0, neurons[linear]),
    }
    assert set(moved) == set(expected)
    for name, (dim, indices) in expected.items():
        allowed = torch.zeros_like(moved[name]).index_fill_(dim, indices, True)
        assert not (moved[name] & ~allowed).any()
        assert moved[name][allowed].float().mean() > 0.9  # and these are trained
    assert mask.trained == sum(
        before[name].shape[1 - dim] * len(indices) for name, (dim, indices) in expected.items()
    )


@pytest.mark.parametrize("name", ["gpt2", "phi3", "opt", "mistral"])
def test_every_layout_of_weights_is_masked(name):
    model = by_name(name).build()
    neurons, before = chosen_of(model), snapshot(model)
    optimiser = OPTIMISERS["adamw"](model.parameters())
    with lf.train.neuron_mask(model, neurons) as mask:
        loss_of(model).backward()
        optimiser.step()
    moved = changed(model, before)
    assert 0 < sum(int(where.sum()) for where in moved.values()) <= mask.trained
    # An FFN neuron that was not chosen gives what it gave: its column of down and row of up.
    assert all(name.endswith("weight") for name in moved)


def test_clipping_sees_the_chosen_gradients_alone():
    model = by_name("llama").build()
    with lf.train.neuron_mask(model, chosen_of(model)) as mask:
        loss_of(model).backward()
        norm = torch.nn.utils.clip_grad_norm_(model.parameters(), 1e9)
        own = torch.stack([one.grad.norm() for one in mask.parameters]).norm()
        nonzero = sum(int((one.grad != 0).sum()) for one in mask.parameters)
    torch.testing.assert_close(norm, own)
    assert 0 < nonzero <= mask.trained


def test_everything_takes_gradients_again_afterwards():
    model = by_name("llama").build()
    model.model.embed_tokens.weight.requires_grad_(False)
    flags = {name: one.requires_grad for name, one in model.named_parameters()}
    mask = lf.train.neuron_mask(model, chosen_of(model))
    assert sum(one.requires_grad for one in model.parameters()) == 3
    mask.remove()
    mask.remove()
    assert {name: one.requires_grad for name, one in model.named_parameters()} == flags
    optimiser = OPTIMISERS["sgd"](model.parameters())
    before = snapshot(model)
    loss_of(model).backward()
    optimiser.step()
    assert len(changed(model, before)) > 3


def test_the_trainer_trains_only_them(tmp_path):
    from transformers import Trainer, TrainingArguments

    model = by_name("llama").build()
    neurons, before = chosen_of(model), snapshot(model)
    data = [{"input_ids": row, "labels": row} for row in IDS]
    options = TrainingArguments(
        str(tmp_path), max_steps=3, learning_rate=1e-2, weight_decay=0.3, report_to=[],
        save_strategy="no", use_cpu=True, disable_tqdm=True,
    )  # fmt: skip
    with lf.train.neuron_mask(model, neurons) as mask:
        Trainer(model, options, train_dataset=data).train()
    moved = changed(model, before)
    assert len(moved) == 3
    assert 0 < sum(int(where.sum()) for where in moved.values()) <= mask.trained


def test_what_does_not_fit_is_refused():
    model = by_name("llama").build()
    with pytest.raises(InputError, match="no_such"):
        lf.train.neuron_mask(model, {"no_such": [0]})
    with pytest.raises(InputError):
        lf.train.neuron_mask(model, {})
    with pytest.raises(InputError, match=r"from site name to indices, .* got the keys \[0\]"):
        lf.train.neuron_mask(model, {0: [1]})
    assert all(one.requires_grad for one in model.parameters())
    tied = by_name("llama").build()
    tied.model.layers[0].mlp.down_proj.weight = tied.model.layers[1].mlp.down_proj.weight
    with pytest.raises(InputError, match="share weights"):
        lf.train.neuron_mask(tied, {"layers.1.mlp": [0]})


def test_a_second_mask_is_refused_and_the_first_holds():
    model = by_name("llama").build()
    with lf.train.neuron_mask(model, chosen_of(model)) as mask:
        with pytest.raises(InputError, match="a neuron mask already"):
            lf.train.neuron_mask(model, {"layers.0.mlp": [3]})
        assert sum(one.requires_grad for one in model.parameters()) == len(mask.parameters)
    with lf.train.neuron_mask(model, {"layers.0.mlp": [3]}):
        pass
    assert all(one.requires_grad for one in model.parameters())
    assert not any("lapefast" in name or name == "__deepcopy__" for name in model.__dict__)


def test_a_copy_is_trained_as_the_model_would_be(tmp_path):
    model = by_name("llama").build()
    model.model.embed_tokens.weight.requires_grad_(False)
    with lf.train.neuron_mask(model, chosen_of(model)):
        copies = [copy.deepcopy(model), copy.deepcopy(torch.nn.ModuleList([model]))[0]]
        torch.save(model, tmp_path / "model.pt")
    for made in copies:
        frozen = [name for name, one in made.named_parameters() if not one.requires_grad]
        assert frozen == ["model.embed_tokens.weight"]
        before, optimiser = snapshot(made), torch.optim.SGD(made.parameters(), lr=0.1)
        loss_of(made).backward()
        optimiser.step()
        assert len(changed(made, before)) > 3
    assert "__deepcopy__" not in torch.load(tmp_path / "model.pt", weights_only=False).__dict__


def test_another_model_s_optimiser_is_left_alone():
    model, other = by_name("llama").build(), by_name("llama").build()
    before = snapshot(other)
    optimiser = torch.optim.SGD(other.parameters(), lr=0.1)
    with lf.train.neuron_mask(model, chosen_of(model)):
        loss_of(other).backward()
        optimiser.step()
    assert len(changed(other, before)) > 3


def test_a_model_that_changes_its_dtype_stays_masked():
    model = by_name("llama").build()
    with lf.train.neuron_mask(model, chosen_of(model)) as mask:
        model.double()
        before = snapshot(model)
        optimiser = torch.optim.AdamW(model.parameters(), lr=0.01, weight_decay=0.5)
        loss_of(model).backward()
        optimiser.step()
    moved = changed(model, before)
    assert 0 < sum(int(where.sum()) for where in moved.values()) <= mask.trained

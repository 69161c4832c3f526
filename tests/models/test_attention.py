"""Queries, keys and values as they meet in attention, and the projections they come from."""

from __future__ import annotations

import mixtures
import pytest
import torch
import transformers
from families import IDS, by_name
from mixtures import needs_5
from torch import nn
from transformers import AttentionInterface

from lapefast.errors import InputError
from lapefast.models.attention import projections_of, watching_attention
from lapefast.models.linears import find_linears

NAMES = [
    "llama", "mistral", "qwen2", "qwen3", "gemma2", "phi3", "gpt2", "gpt-neox", "opt",
    "gpt-bigcode",
]  # fmt: skip


if int(transformers.__version__.partition(".")[0]) >= 5:  # before, it did not look attention up
    NAMES.append("bert")


def watched(model, ids=IDS):
    """The model's calls of attention, the outputs of its linear layers, and its own output."""
    calls, outputs = [], {}
    hooks = [
        layer.register_forward_hook(
            lambda _module, _given, output, path=path: outputs.__setitem__(path, output)
        )
        for path, layer in find_linears(model).items()
    ]
    with torch.no_grad(), watching_attention(model, calls.append):
        result = model(ids)[0]
    for hook in hooks:
        hook.remove()
    return calls, outputs, result


@pytest.mark.parametrize("name", NAMES)
def test_the_model_computes_what_it_computed(name):
    model = by_name(name).build()
    with torch.no_grad():
        before = model(IDS)[0]
    calls, _, result = watched(model)
    assert torch.equal(result, before)
    assert len(calls) == model.config.num_hidden_layers
    with torch.no_grad():
        assert torch.equal(model(IDS)[0], before)
    assert len(calls) == model.config.num_hidden_layers  # watched no longer


@pytest.mark.parametrize("name", NAMES)
def test_scores_values_and_output_belong_together(name):
    model = by_name(name).build()
    for call in watched(model)[0]:
        served = call.query.shape[1] // call.key.shape[1]
        length = IDS.shape[1]
        for row in range(len(IDS)):
            scores = call.scores(row, length, slice(0, call.key.shape[1]))
            if call.softcap:
                capped = call.softcap * torch.tanh(scores / call.softcap)
                scores = capped.masked_fill(scores == -torch.inf, -torch.inf)
            value = call.value[row].repeat_interleave(served, 0)
            made = (scores.softmax(-1) @ value).transpose(0, 1).flatten(1)
            # Two ways to the same sums of float32.
            torch.testing.assert_close(made, call.output[row], rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("name", NAMES)
def test_every_unit_is_the_output_of_its_projection(name):
    model = by_name(name).build()
    calls, outputs, _ = watched(model)
    for call in calls:
        made = projections_of(call, outputs)
        served = call.query.shape[1] // call.key.shape[1]
        value = call.value.repeat_interleave(served, 1).transpose(1, 2).flatten(2)
        path, rows = made.value
        assert torch.equal(outputs[path][..., rows], value)
        if name in ("gpt2", "gpt-neox", "bert", "llama", "mistral", "phi3", "qwen2"):
            # A rotary embedding turns nothing at the first position.
            for found, (path, rows) in (
                (call.query, made.query),
                (call.key.repeat_interleave(served, 1), made.key),
            ):
                first = found.transpose(1, 2).flatten(2)[:, 0]
                assert torch.equal(outputs[path][:, 0, rows], first)


def test_padding_and_sliding_windows_are_masked():
    model = by_name("mistral").build()
    model.config.sliding_window = 3
    for layer in model.model.layers:
        layer.self_attn.sliding_window = 3
    calls = []
    with torch.no_grad(), watching_attention(model, calls.append):
        model(IDS, attention_mask=torch.ones_like(IDS))
    scores = calls[0].scores(0, IDS.shape[1], slice(0, calls[0].key.shape[1]))
    seen = (scores > -torch.inf).sum(-1)
    assert seen[0].tolist() == [min(column + 1, 3) for column in range(IDS.shape[1])]


def test_another_model_runs_as_ever_meanwhile():
    model, other = by_name("llama").build(), by_name("llama").build()
    calls = []
    with torch.no_grad(), watching_attention(model, calls.append):
        other(IDS)
        assert not calls
        model(IDS)
    assert calls


def test_an_eager_attention_is_watched_too():
    model = by_name("llama").build()
    model.set_attn_implementation("eager")
    calls, _, _ = watched(model)
    if not calls and transformers.__version__.startswith("4."):
        pytest.skip(
            "transformers 4 calls an eager attention without looking it up; transformers 5 does"
        )
    assert len(calls) == model.config.num_hidden_layers


def test_a_layout_that_is_not_known_is_refused():
    calls, outputs, _ = watched(by_name("codegen").build())
    if calls:
        with pytest.raises(InputError, match="can't be told"):
            projections_of(calls[0], outputs)


def test_models_are_watched_at_once_and_end_in_any_order():
    models = [by_name("llama").build() for _ in range(2)]
    seen = [[], []]
    table = dict(AttentionInterface._global_mapping)
    watches = [watching_attention(m, s.append) for m, s in zip(models, seen, strict=True)]
    with torch.no_grad():
        watches[0].__enter__()
        watches[1].__enter__()
        models[0](IDS)
        watches[0].__exit__(None, None, None)
        models[0](IDS)
        models[1](IDS)
        watches[1].__exit__(None, None, None)
        models[1](IDS)
    layers = models[0].config.num_hidden_layers
    assert [len(one) for one in seen] == [layers, layers]
    assert dict(AttentionInterface._global_mapping) == table


@needs_5
def test_an_attention_with_sinks_is_refused_by_name():
    model = mixtures.by_name("GptOssForCausalLM").build()
    with pytest.raises(InputError, match=r"layers\.0\.self_attn has sinks, .* leave the kinds"):
        watched(model)


def test_an_eager_attention_of_its_own_is_refused():
    class Own(nn.Module):
        def forward(self, hidden_states, **_):
            rows = hidden_states[:, None]
            attend = AttentionInterface._global_mapping["eager"]  # as while it is watched
            return attend(self, rows, rows, rows)

    model = by_name("llama").build()
    model.set_attn_implementation("eager")
    model.model.layers[0].self_attn = Own()
    with pytest.raises(InputError, match='Own has an eager attention of its own.*="sdpa"'):
        watched(model)


def test_a_model_without_linear_layers_is_refused():
    with pytest.raises(InputError, match="Embedding has no linear layers"):
        find_linears(nn.Embedding(3, 3))

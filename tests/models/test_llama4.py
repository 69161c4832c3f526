"""Llama 4's mixtures: every expert takes all tokens, and zeros for those not routed to it."""

from __future__ import annotations

import types
from contextlib import contextmanager
from dataclasses import dataclass, field

import plain
import psutil
import pytest
import torch
import transformers
from families import VOCABULARY
from mixtures import IDS
from torch import Tensor, nn

import lapefast as lf
from lapefast import models
from lapefast.errors import InputError
from lapefast.profiling import batches

WIDTH, EXPERTS = 24, 4
SITE = "layers.0.feed_forward.experts"
EDITED = [(0, 3), (1, 5), (2, 7)]  # expert, neuron
# Two labels within a row, padding on the left and on the right.
GROUPS = torch.tensor([[-1, -1] + 6 * [0], 4 * [0] + 4 * [1], 5 * [1] + 3 * [-1]])


@pytest.fixture(params=[1, 2], ids=["top1", "top2"])
def chosen(request) -> int:
    return request.param


def build(chosen: int = 1, dtype: torch.dtype = torch.float32, experts: int = EXPERTS) -> nn.Module:
    config = transformers.Llama4TextConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        intermediate_size=WIDTH,
        intermediate_size_mlp=40,
        num_hidden_layers=2,
        num_attention_heads=4,
        num_key_value_heads=2,
        head_dim=8,
        num_local_experts=experts,
        num_experts_per_tok=chosen,
        interleave_moe_layer_step=1,
        max_position_embeddings=64,
        attention_chunk_size=32,
        pad_token_id=0,
        bos_token_id=1,
        eos_token_id=2,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.Llama4ForCausalLM(config).eval()
        for parameter in model.parameters():
            if parameter.dim() > 1:  # experts are not initialised by themselves
                nn.init.normal_(parameter, std=0.2)
    return model.to(dtype)


@dataclass
class Seen:
    """What one mixture was given and activated: [experts, tokens] and [experts, tokens, width]."""

    routed: Tensor | None = None
    activation: Tensor | None = None
    hooks: list = field(default_factory=list)


@contextmanager
def watched(model: nn.Module, value: float | None = None):
    """Site -> what its experts saw; `value` is given to the neurons of `EDITED` at routed rows."""
    seen: dict[str, Seen] = {}
    for name, module in model.model.named_modules():
        if not name.endswith("experts"):
            continue
        one = seen[name] = Seen()

        def before(module: nn.Module, args: tuple, one=one) -> None:
            one.routed = (args[0] != 0).any(dim=-1).view(EXPERTS, -1)

        def behind(module: nn.Module, args: tuple, output: Tensor, one=one, name=name):
            one.activation = output.clone()
            if value is not None and name == SITE:
                for expert, neuron in EDITED:
                    one.activation[expert, one.routed[expert], neuron] = value
            return one.activation.clone()

        one.hooks = [
            module.register_forward_pre_hook(before),
            module.act_fn.register_forward_hook(behind),
        ]
    try:
        yield seen
    finally:
        for hook in [hook for one in seen.values() for hook in one.hooks]:
            hook.remove()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_outputs_counts_sums_and_routed_tokens_equal_those_of_plain_hooks(chosen, dtype):
    model = build(chosen, dtype)
    before = plain.attributes(model)
    with watched(model) as seen:
        expected = model(IDS).logits
    with lf.record(model, ["a", "b"], ("counts", "sums")) as recorder:
        recorder.set(groups=GROUPS)
        assert torch.equal(model(IDS).logits, expected)
    profile = recorder.profile()

    assert recorder.unproven == []
    assert profile.routed.keys() == seen.keys()
    assert profile.metadata["experts_implementation"] == "blocks"
    for site, one in seen.items():
        assert int(one.routed.sum()) == chosen * IDS.numel()
        for label in range(2):
            for expert in range(EXPERTS):
                rows = one.routed[expert] & (GROUPS.flatten() == label)
                active = one.activation[expert, rows].float()
                assert int(profile.routed[site][label, expert]) == int(rows.sum())
                assert torch.equal(profile.counts[site][label, expert], (active > 0).sum(0))
                # float32 over at most 24 rows: each addition is off by half a spacing of the sum.
                slack = 24 * 24 * float(one.activation.abs().max()) * 2**-24
                sums = active.double().sum(0)
                assert (profile.sums[site][label, expert] - sums).abs().max() <= slack
    plain.assert_untouched(before, model)


@torch.no_grad()
def test_an_edit_reaches_the_rows_routed_to_its_expert_alone(chosen):
    model = build(chosen)
    unedited = model(IDS).logits
    with watched(model, value=1.0) as seen:
        expected = model(IDS).logits
    assert not torch.equal(expected, unedited)
    assert not seen[SITE].routed.all()
    edit = lf.activate({SITE: [expert * WIDTH + neuron for expert, neuron in EDITED]}, 1.0)
    with lf.steer(model, edit):
        assert torch.equal(model(IDS).logits, expected)
    with lf.steer(model, [edit, None, edit]):
        mixed = model(IDS).logits
    assert torch.equal(mixed[1], unedited[1])
    assert not torch.equal(mixed[0], unedited[0])
    assert torch.equal(model(IDS).logits, unedited)


def test_the_pass_finds_neurons_per_expert():
    model = build()
    assert models.find_sites(model)[0].shape == (EXPERTS, WIDTH)
    texts = {"a": [IDS[0].tolist() * 60], "b": [IDS[1].tolist() * 60]}
    profile = lf.profile(model, texts, seq_len=32, batch_size=4, progress=False)
    routed = profile.routed[SITE]
    assert routed.sum(1).tolist() == profile.tokens.tolist()
    neurons = lf.detect.lape(profile, top_rate=0.2, filter_rate=0.5, activation_bar_ratio=0.5)
    assert sum(neurons[label].total for label in "ab") > 0


def test_the_batch_is_chosen_for_all_experts_since_all_compute(monkeypatch):
    memory = types.SimpleNamespace(available=2**23)
    monkeypatch.setattr(psutil, "virtual_memory", lambda: memory)
    few, many = (batches.fitting_batch_size(build(experts=count), 8) for count in (8, 64))
    # A quarter of the memory, for six values of every neuron of all experts.
    assert few == 2**21 // (6 * 8 * WIDTH * 4) // 8
    assert many == 2**21 // (6 * 64 * WIDTH * 4) // 8


def test_another_forward_of_the_same_names_is_refused():
    model = build()
    experts = model.model.layers[1].feed_forward.experts

    class Other(type(experts)):
        def forward(self, hidden_states: Tensor) -> Tensor:
            return super().forward(hidden_states.flip(0)).flip(0)

    experts.__class__ = Other
    with pytest.raises(
        InputError, match=r"layers.1.feed_forward.experts \(Other\) is a mixture of"
    ):
        lf.record(model, ["a"])

"""Dense FFNs that clamp gate and up, and call their activation as functions: MiniMax M3's."""

from __future__ import annotations

import functools
import types

import plain
import pytest
import torch
from families import IDS
from torch import Tensor, nn

import lapefast as lf
from lapefast import models
from lapefast.errors import InputError

WIDTH = 20
EDITED = {"ffns.0": [0, 3], "ffns.1": [19]}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


class Block(nn.Module):
    """Written as transformers writes it."""

    def __init__(self) -> None:
        super().__init__()
        self.gate_up_proj, self.down_proj = nn.Linear(8, 2 * WIDTH), nn.Linear(WIDTH, 8)
        self.swiglu_alpha, self.swiglu_limit = 1.702, 0.4

    def forward(self, hidden_states: torch.Tensor) -> torch.Tensor:
        gate_up = self.gate_up_proj(hidden_states)
        gate, up = gate_up.chunk(2, dim=-1)
        gate = gate.clamp(max=self.swiglu_limit)
        up = up.clamp(min=-self.swiglu_limit, max=self.swiglu_limit)
        glu = gate * torch.sigmoid(gate * self.swiglu_alpha)
        return self.down_proj((up + 1.0) * glu)


class UpNotClamped(Block):
    def forward(self, x):
        gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
        gate = gate.clamp(max=self.swiglu_limit)
        return self.down_proj((up + 1) * (gate * torch.sigmoid(gate * self.swiglu_alpha)))


class Doubled(Block):
    def forward(self, x):
        return 2 * super().forward(x)


class WithAGateMethod(Block):
    """Its forward does more than the method says."""

    def _apply_gate(self, gate_up: torch.Tensor) -> torch.Tensor:
        gate, up = gate_up.chunk(2, dim=-1)
        gate = gate.clamp(max=self.swiglu_limit)
        up = up.clamp(min=-self.swiglu_limit, max=self.swiglu_limit)
        glu = gate * torch.sigmoid(gate * self.swiglu_alpha)
        return (up + 1.0) * glu

    def forward(self, x):
        return self.down_proj(nn.functional.dropout(self._apply_gate(self.gate_up_proj(x))))


class Wrapped(Block):
    """A forward around another one, whose source it passes off as its own."""

    @functools.wraps(Block.forward)
    def _around(self, x):
        return 2 * Block.forward(self, x)

    forward = _around


def of_another_torch(torch) -> type[nn.Module]:
    """A block that finds its functions in what its maker calls torch."""

    class Closed(Block):
        def forward(self, x):
            gate, up = self.gate_up_proj(x).chunk(2, dim=-1)
            gate = gate.clamp(max=self.swiglu_limit)
            up = up.clamp(min=-self.swiglu_limit, max=self.swiglu_limit)
            return self.down_proj((up + 1) * (gate * torch.sigmoid(gate * self.swiglu_alpha)))

    return Closed


ANOTHER = of_another_torch(types.SimpleNamespace(sigmoid=torch.tanh))


class Stack(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        torch.manual_seed(0)
        self.embedding = nn.Embedding(97, 8)
        self.ffns = nn.ModuleList([block(), block()])

    def forward(self, input_ids):
        hidden = self.embedding(input_ids)
        for ffn in self.ffns:
            hidden = hidden + ffn(hidden)
        return hidden


def eager(model: Stack, edited: dict[str, list[int]] | None = None) -> tuple[Tensor, list[Tensor]]:
    """The output and the activations of every FFN, by the same arithmetic step by step."""
    hidden, activations = model.embedding(IDS), []
    for index, ffn in enumerate(model.ffns):
        gate, up = ffn.gate_up_proj(hidden).chunk(2, dim=-1)
        gate, up = gate.clamp(max=0.4), up.clamp(-0.4, 0.4)
        activation = gate * torch.sigmoid(gate * 1.702)
        if edited:
            activation[..., edited[f"ffns.{index}"]] = 0
        activations.append(activation)
        hidden = hidden + ffn.down_proj((up + 1) * activation)
    return hidden, activations


@pytest.mark.parametrize("dtype", DTYPES, ids=lambda one: str(one).removeprefix("torch."))
@torch.no_grad()
def test_counts_outputs_and_edits_equal_those_made_step_by_step(dtype):
    model = Stack(Block).to(dtype)
    expected, activations = eager(model)
    assert plain.same(model(IDS), expected)
    before = plain.attributes(model)
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        assert plain.same(model(IDS), expected)
        assert recorder.unproven == []
    for site, activation in zip(EDITED, activations, strict=True):
        counts = plain.counts([activation], torch.zeros_like(IDS), 1)
        assert torch.equal(recorder.profile().counts[site], counts)
        assert 0 < int(counts.sum()) < IDS.numel() * WIDTH
    with lf.steer(model, lf.deactivate(EDITED)):
        edited = model(IDS)
    assert plain.same(edited, eager(model, EDITED)[0])
    assert not plain.same(edited, expected)
    plain.assert_untouched(before, model)
    assert plain.same(model(IDS), expected)


@torch.no_grad()
def test_such_a_forward_compiles_whole():
    model = Stack(Block)
    expected, activations = eager(model)
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        model(IDS)
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert plain.same(compiled(IDS), expected)
    counts = plain.counts([activations[0]], torch.zeros_like(IDS), 1)
    assert torch.equal(recorder.profile().counts["ffns.0"], 2 * counts)


def test_gradients_are_those_of_the_unpatched_model():
    model = Stack(Block)

    def gradients():
        model.zero_grad()
        model(IDS).square().sum().backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        found = gradients()
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_sums_of_the_product_are_refused_by_name():
    with pytest.raises(InputError, match="ffns.0"):
        lf.record(Stack(Block), ["a"], statistics=("square_sums",))


@pytest.mark.parametrize("block", [UpNotClamped, Doubled, WithAGateMethod, Wrapped, ANOTHER])
def test_a_forward_that_is_not_all_known_is_refused_by_name(block):
    with pytest.raises(InputError, match=rf"the FFN ffns.0 \({block.__name__}\) calls its act"):
        models.find_sites(Stack(block))


@torch.no_grad()
def test_the_input_may_be_named():
    model = Stack(Block)
    hidden = model.embedding(IDS)
    expected = model.ffns[0](hidden)
    with lf.steer(model, lf.deactivate(EDITED)):
        edited = model.ffns[0](hidden)
        assert torch.equal(model.ffns[0](hidden_states=hidden), edited)
        with pytest.raises(TypeError, match="hidden_states"):
            model.ffns[0](x=hidden)
        with pytest.raises(TypeError, match="too many positional arguments"):
            model.ffns[0](hidden, hidden)
    assert not torch.equal(edited, expected)


def test_one_that_peft_trains_whole_is_refused_by_name():
    peft = pytest.importorskip("peft", reason="PEFT is not installed; the extra export lifts it")
    config = peft.LoraConfig(target_modules=["embedding"], modules_to_save=["ffns.0"])
    model = peft.get_peft_model(Stack(Block), config)
    with pytest.raises(InputError, match=r"ffns.0 .* PEFT trains it whole.*merge the adapter"):
        lf.record(model, ["a"])


def test_a_forward_that_was_replaced_is_refused():
    model = Stack(Block)
    model.ffns[1].forward = lambda x: x
    before = plain.attributes(model)
    with pytest.raises(InputError, match=r"ffns.1 .* a forward that is not its class's"):
        lf.record(model, ["a"])
    plain.assert_untouched(before, model)

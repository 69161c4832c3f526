"""FFNs whose forward calls its activation as a function of torch: Lfm2's, and small ones."""

from __future__ import annotations

import copy
import types

import plain
import pytest
import torch
from families import IDS, MODERN
from torch import nn
from torch.nn import functional
from transformers.models.lfm2 import modeling_lfm2 as lfm2

import lapefast as lf
from lapefast import models
from lapefast.errors import InputError

SITES = ("layers.0.feed_forward", "layers.1.feed_forward")
EDITED = {SITES[0]: [0, 3], SITES[1]: [51]}
DTYPES = (torch.float32, torch.bfloat16, torch.float16)


@pytest.fixture(params=DTYPES, ids=lambda dtype: str(dtype).removeprefix("torch."))
def model(request):
    torch.manual_seed(0)
    config = {**MODERN, "block_auto_adjust_ff_dim": False}
    kinds = ["conv", "full_attention"]
    model = lfm2.Lfm2ForCausalLM(lfm2.Lfm2Config(**config, layer_types=kinds)).eval()
    with torch.no_grad():
        for site in SITES:
            model.model.get_submodule(site).w1.weight[::2] *= 300
    return model.to(request.param)


@torch.no_grad()
def eager(model, monkeypatch, change=lambda site, activation: activation):
    """The model's output and its activations, seen where its own code calls the function."""
    seen = {site: [] for site in SITES}

    def silu(gate):
        site = SITES[len(seen[SITES[0]]) > len(seen[SITES[1]])]  # the layers take turns
        seen[site].append(change(site, functional.silu(gate)))
        return seen[site][-1]

    with monkeypatch.context() as patch:
        patch.setattr(lfm2, "F", types.SimpleNamespace(**(vars(functional) | {"silu": silu})))
        return model(IDS), seen


@torch.no_grad()
def test_counts_and_outputs_equal_those_of_the_eager_model(model, monkeypatch):
    expected, seen = eager(model, monkeypatch)
    before = plain.attributes(model)
    groups = torch.zeros_like(IDS)
    with lf.record(model, ["a"], statistics=("counts", "up_abs_sums", "square_sums")) as recorder:
        recorder.set(label="a")
        assert plain.same(model(IDS), expected)
        half = model.dtype is not torch.float32
        assert set(recorder.how.values()) == {"fused" if half else "given"}
        assert recorder.unproven == []
    profile = recorder.profile()
    assert profile.sites == list(SITES)
    for site in SITES:
        assert torch.equal(profile.counts[site], plain.counts(seen[site], groups, 1)), site
        assert 0 < int(profile.counts[site].sum()) < IDS.numel() * 52
    plain.assert_untouched(before, model)
    assert plain.same(model(IDS), expected)


@torch.no_grad()
def test_edits_equal_those_made_in_the_eager_model(model, monkeypatch):
    def deactivated(site, activation):
        activation = activation.clone()
        activation[..., EDITED[site]] = 0
        return activation

    expected, _ = eager(model, monkeypatch, deactivated)
    with lf.steer(model, lf.deactivate(EDITED)):
        assert plain.same(model(IDS), expected)
        copied = copy.deepcopy(model)
    unedited, _ = eager(model, monkeypatch)
    assert not plain.same(expected, unedited)
    assert plain.same(model(IDS), unedited)
    assert plain.same(copied(IDS), unedited)


@torch.no_grad()
def test_a_pass_counts_what_it_records_in_a_loop(model):
    rows = IDS.reshape(-1, 8)
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        model(rows)
    profile = lf.profile(model, {"a": rows}, batch_size=len(rows), progress=False)
    for site in SITES:
        assert torch.equal(profile.counts[site], recorder.profile().counts[site])


def test_gradients_are_those_of_the_unpatched_model(model):
    def gradients():
        model.zero_grad()
        model(IDS, labels=IDS).loss.backward()
        return [parameter.grad.clone() for parameter in model.parameters()]

    expected = gradients()
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        found = gradients()
    assert all(torch.equal(one, other) for one, other in zip(expected, found, strict=True))


def test_a_forward_that_was_replaced_is_refused(model):
    ffn = model.model.layers[0].feed_forward
    ffn.forward = types.MethodType(lambda self, x: self.w2(self.w1(x) * self.w3(x)), ffn)
    before = plain.attributes(model)
    with pytest.raises(InputError, match="a forward that is not its class's") as raised:
        lf.record(model, ["a"])
    assert SITES[0] in str(raised.value)
    plain.assert_untouched(before, model)


class Block(nn.Module):
    """An FFN of w1, w3 and w2."""

    def __init__(self) -> None:
        super().__init__()
        self.w1, self.w3, self.w2 = nn.Linear(8, 20), nn.Linear(8, 20), nn.Linear(20, 8)

    def forward(self, x):
        return self.w2(self.w3(x) * nn.functional.relu(self.w1(x)))


class WithOptions(Block):
    def forward(self, x):
        return self.w2(functional.gelu(self.w1(x), approximate="tanh") * self.w3(x))


class Unknown(Block):
    def forward(self, x):
        return self.w2(functional.mish(self.w1(x)) * self.w3(x))


class Clamped(Block):
    def forward(self, x):
        return self.w2(functional.silu(self.w1(x)).clamp(max=1) * self.w3(x))


class Counting(Block):
    def __init__(self) -> None:
        super().__init__()
        self.register_buffer("calls", torch.zeros(()))

    def forward(self, x):
        _ = self.calls.add_(1)
        return self.w2(functional.silu(self.w1(x)) * self.w3(x))


class Stack(nn.Module):
    def __init__(self, block: type[nn.Module]) -> None:
        super().__init__()
        self.embedding = nn.Embedding(97, 8)
        self.ffn = block()

    def forward(self, input_ids):
        return self.ffn(self.embedding(input_ids))


@torch.no_grad()
def test_a_function_is_known_by_what_it_is_and_not_by_how_it_is_called():
    model = Stack(Block)
    activation = functional.relu(model.ffn.w1(model.embedding(IDS)))
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        model(IDS)
    expected = plain.counts([activation], torch.zeros_like(IDS), 1)
    assert torch.equal(recorder.profile().counts["ffn"], expected)
    assert [site.activation for site in models.find_sites(model)] == ["ReLU"]


def in_closure(functional) -> type[nn.Module]:
    """A block whose forward finds its function by a name of the function that made its class."""

    class Closed(Block):
        def forward(self, x):
            return self.w2(functional.silu(self.w1(x)) * self.w3(x))

    return Closed


def test_a_function_is_looked_up_where_the_forward_finds_it():
    assert models.find_sites(Stack(in_closure(functional)))[0].activation == "SiLU"
    other = types.SimpleNamespace(silu=torch.tanh)
    with pytest.raises(InputError, match="the FFN ffn \\(Closed\\) calls its activation as a func"):
        models.find_sites(Stack(in_closure(other)))


@torch.no_grad()
def test_such_a_forward_compiles_whole():
    model = Stack(Block)
    expected = model(IDS)
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        model(IDS)
        counted = recorder.profile().counts["ffn"].clone()
        recorder.set(label="a")
        compiled = torch.compile(model, fullgraph=True, backend="aot_eager")
        assert plain.same(compiled(IDS), expected)
        assert torch.equal(recorder.profile().counts["ffn"], 2 * counted)


@pytest.mark.parametrize("block", [WithOptions, Unknown, Clamped, Counting])
def test_a_function_that_is_not_known_or_not_all_is_refused_by_name(block):
    with pytest.raises(InputError, match=f"the FFN ffn \\({block.__name__}\\) calls its act"):
        lf.record(Stack(block), ["a"])

"""Models that are no family's: FFNs as users and research code write them."""

from __future__ import annotations

import logging

import plain
import pytest
import torch
import transformers
from families import IDS, VOCABULARY
from torch import Tensor, nn
from torch.nn import functional

import lapefast as lf
from lapefast import models
from lapefast.errors import InputError
from lapefast.models.structure import find_ffns

HIDDEN, WIDTH = 16, 24
GROUPS = torch.tensor([[-1, -1] + 6 * [0], 4 * [0] + 4 * [1], 5 * [1] + 3 * [-1]])


class Reader(nn.Module):
    """Two layers of the FFNs that `make` makes, between an embedding and nothing."""

    def __init__(self, make) -> None:
        super().__init__()
        self.embed = nn.Embedding(VOCABULARY, HIDDEN)
        self.layers = nn.ModuleList(make() for _ in range(2))

    def run(self, hidden: Tensor) -> Tensor:
        for layer in self.layers:
            hidden = hidden + layer(hidden)
        return hidden

    def forward(self, input_ids: Tensor) -> Tensor:
        return self.run(self.embed(input_ids))


class Unnamed(Reader):
    """Calls its token ids otherwise, as nanoGPT does."""

    def forward(self, idx: Tensor) -> Tensor:
        return self.run(self.embed(idx))


class Embedded(Reader):
    """Does not run on token ids alone."""

    def forward(self, input_ids: Tensor, scale: Tensor) -> Tensor:
        return self.run(self.embed(input_ids) * scale)


def build(make, reader=Reader, dtype: torch.dtype = torch.float32) -> nn.Module:
    with torch.random.fork_rng():
        torch.manual_seed(0)
        return reader(make).eval().to(dtype)


class Gelu(nn.Module):
    """nanoGPT's, whose activation has a name of its own."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_proj = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)
        self.gelu, self.dropout = nn.GELU(), nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.gelu(self.c_fc(x))))


class InPlace(nn.Module):
    """Reads on from what the activation wrote over."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(HIDDEN, WIDTH), nn.Linear(WIDTH, HIDDEN)
        self.act = nn.SiLU(inplace=True)

    def forward(self, x: Tensor) -> Tensor:
        x = self.fc1(x)
        self.act(x)
        return self.fc2(x)


class Qwen1(nn.Module):
    """The first Qwen's, by names and a function that no table holds."""

    def __init__(self) -> None:
        super().__init__()
        self.v1, self.v2 = nn.Linear(HIDDEN, WIDTH), nn.Linear(HIDDEN, WIDTH)
        self.c_out = nn.Linear(WIDTH, HIDDEN)

    def forward(self, hidden_states: Tensor) -> Tensor:
        a1 = self.v1(hidden_states)
        a2 = self.v2(hidden_states)
        intermediate = a1 * functional.silu(a2)
        return self.c_out(intermediate)


class Jais(nn.Module):
    """Gated by names that a plain FFN has, and one more."""

    def __init__(self) -> None:
        super().__init__()
        self.c_fc, self.c_fc2 = nn.Linear(HIDDEN, WIDTH), nn.Linear(HIDDEN, WIDTH)
        self.c_proj, self.act = nn.Linear(WIDTH, HIDDEN), nn.SiLU()
        self.dropout = nn.Dropout(0.1)

    def forward(self, x: Tensor) -> Tensor:
        return self.dropout(self.c_proj(self.act(self.c_fc2(x)) * self.c_fc(x)))


def encoder_layer() -> nn.Module:
    return nn.TransformerEncoderLayer(HIDDEN, 2, WIDTH, activation=nn.GELU(), batch_first=True)


MADE = {
    "gelu": (Gelu, "gelu"),
    "in place": (InPlace, "act"),
    "jais": (Jais, "act"),
    "torch's encoder layer": (encoder_layer, "activation"),
}


def activations(model: nn.Module, name: str) -> dict[str, nn.Module]:
    return {f"layers.{i}": getattr(layer, name) for i, layer in enumerate(model.layers)}


def assert_counted(model: nn.Module, acting: dict[str, nn.Module]):
    """Counts and output are those of a run with plain hooks, whose output is returned.

    Without a hook torch's encoder layer takes another way, whose results differ.
    """
    with plain.hooked(acting) as seen:
        expected = model(IDS)
    with lf.record(model, ["a", "b"]) as recorder:
        recorder.set(groups=GROUPS)
        assert plain.same(model(IDS), expected)
    found = recorder.profile().counts
    assert found.keys() == seen.keys()
    for site, counted in found.items():
        assert torch.equal(counted, plain.counts(seen[site], GROUPS, 2))
        assert counted.any()
    return expected


@pytest.mark.parametrize("reader", [Reader, Unnamed])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_counts_outputs_and_edits_equal_those_of_plain_hooks(name, dtype, reader):
    make, attribute = MADE[name]
    model = build(make, reader, dtype)
    before = plain.attributes(model)
    expected = assert_counted(model, activations(model, attribute))

    def without(site: str, output: Tensor) -> Tensor:
        output[..., ::2] = 0  # in place, where the activation wrote in place, too
        return output

    edit = lf.deactivate({f"layers.{layer}": range(0, WIDTH, 2) for layer in range(2)})
    with plain.hooked(activations(model, attribute), without):
        edited = model(IDS)
    assert not plain.same(edited, expected)
    with lf.steer(model, edit):
        assert plain.same(model(IDS), edited)
    plain.assert_untouched(before, model)


@pytest.mark.parametrize("name", MADE)
@torch.no_grad()
def test_a_profile_reads_models_that_call_their_token_ids_otherwise(name):
    make, attribute = MADE[name]
    model = build(make, Unnamed)
    with plain.hooked(activations(model, attribute)) as seen:
        model(IDS)
    profile = lf.profile(model, {"a": IDS}, batch_size=3, progress=False)
    for site, counted in profile.counts.items():
        assert torch.equal(counted, plain.counts(seen[site], torch.zeros_like(IDS), 1))


@torch.no_grad()
def test_a_gated_forward_is_found_whatever_its_parts_are_called():
    model = build(Qwen1)
    assert [site.width for site in models.find_sites(model)] == [WIDTH, WIDTH]
    hidden, expected = model.embed(IDS), []
    for layer in model.layers:
        gate = functional.silu(layer.v2(hidden))
        expected.append(plain.counts([gate], torch.zeros_like(IDS), 1))
        hidden = hidden + layer.c_out(layer.v1(hidden) * gate)
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        assert plain.same(model(IDS), hidden)
    for counted, own in zip(recorder.profile().counts.values(), expected, strict=True):
        assert torch.equal(counted, own)


def test_what_writes_in_place_is_called_and_said_to_be():
    with lf.record(build(InPlace, dtype=torch.bfloat16), ["a"]) as recorder:
        assert set(recorder.how.values()) == {"given"}
    with lf.record(build(Jais, dtype=torch.bfloat16), ["a"]) as recorder:
        assert set(recorder.how.values()) == {"fused"}


def test_a_second_projection_beside_a_plain_ffns_makes_it_gated():
    model = build(Jais)
    assert [ffn.gated for ffn in find_ffns(model)] == [True, True]
    with pytest.raises(InputError, match=r"square_sums can't be recorded at layers.0"):
        lf.record(model, ["a"], statistics=("counts", "square_sums"))


@torch.no_grad()
def test_mobileberts_layers_hold_more_ffns_than_their_own():
    config = transformers.MobileBertConfig(
        vocab_size=VOCABULARY,
        hidden_size=32,
        embedding_size=16,
        intermediate_size=WIDTH,
        num_hidden_layers=2,
        num_attention_heads=4,
        intra_bottleneck_size=16,
        num_feedforward_networks=3,
    )
    with torch.random.fork_rng():
        torch.manual_seed(0)
        model = transformers.MobileBertModel(config).eval()
    sites = [
        f"encoder.layer.{layer}{ffn}" for layer in range(2) for ffn in ("", ".ffn.0", ".ffn.1")
    ]
    assert sorted(site.name for site in models.find_sites(model)) == sorted(sites)
    acting = {site: model.get_submodule(site).intermediate.intermediate_act_fn for site in sites}
    assert_counted(model, acting)


class TimeFirst(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        batch, length, hidden = x.shape
        flat = x.transpose(0, 1).reshape(-1, hidden)
        made = self.fc2(self.act(self.fc1(flat)))
        return made.view(length, batch, hidden).transpose(0, 1)


class LastFirst(InPlace):
    """The sequences of a batch in reverse."""

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x.flip(0)))).flip(0)


class Pooled(InPlace):
    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x.mean(1)))).unsqueeze(1).expand_as(x)


class SwiGLU(nn.Module):
    def forward(self, x: Tensor) -> Tensor:
        gate, up = x.chunk(2, dim=-1)
        return functional.silu(gate) * up


class GatedActivation(nn.Module):
    """Its activation module gives the product."""

    def __init__(self) -> None:
        super().__init__()
        self.fc1, self.fc2 = nn.Linear(HIDDEN, 2 * WIDTH), nn.Linear(WIDTH, HIDDEN)
        self.act = SwiGLU()

    def forward(self, x: Tensor) -> Tensor:
        return self.fc2(self.act(self.fc1(x)))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (TimeFirst, r"layers.0 saw other rows .* another order than the tokens"),
        (LastFirst, r"layers.0 saw other rows .* another order than the tokens"),
        (Pooled, r"layers.0 saw \d rows where the model's input has \d+ tokens"),
        (GatedActivation, r"layers.0: its activation module \(SwiGLU\) takes more than the gate"),
    ],
)
@torch.no_grad()
def test_what_would_be_counted_wrongly_is_refused_by_name(make, message):
    model = build(make)
    before = plain.attributes(model)
    with pytest.raises(InputError, match=message):
        lf.record(model, ["a"])
    with pytest.raises(InputError, match=message):
        lf.steer(model, lf.deactivate({"layers.0": [0]}))
    plain.assert_untouched(before, model)


@torch.no_grad()
def test_without_a_probe_the_first_input_shows_rows_that_are_no_tokens():
    model = build(Pooled, Embedded)
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        with pytest.raises(InputError, match=r"layers.0 saw 3 rows where .* has 24 tokens"):
            model(IDS, torch.ones(()))


@torch.no_grad()
def test_a_model_that_does_not_run_on_token_ids_is_recorded_and_not_profiled():
    model = build(InPlace, Embedded)
    with pytest.raises(InputError, match=r"token ids alone, so no text can pass .*scale"):
        lf.profile(model, {"a": IDS}, progress=False)
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        model(IDS, torch.ones(()))
    assert recorder.profile().tokens.tolist() == [IDS.numel()]


def test_an_edit_that_tokens_alone_do_not_reach_is_told(caplog):
    model = build(Gelu)
    model.layers.append(Gelu())
    model.run = lambda hidden: model.layers[1](model.layers[0](hidden))
    with caplog.at_level(logging.WARNING), lf.steer(model, lf.deactivate({"layers.0": [0]})):
        assert not caplog.records
    with caplog.at_level(logging.WARNING):
        edit = lf.deactivate({"layers.0": [0], "layers.2": [0]})
        with lf.steer(model, edit):
            assert "layers.2" in caplog.text
    assert "layers.0" not in caplog.text


def test_models_without_weights_are_refused():
    with torch.device("meta"):
        model = Reader(Gelu)
    with pytest.raises(InputError, match=r"layers.0 has no weights: they are on the meta device"):
        lf.record(model, ["a"])


def test_models_that_torch_jit_compiled_are_refused():
    traced = torch.jit.trace(build(Gelu), IDS)
    with pytest.raises(InputError, match="compiled by torch.jit"):
        lf.record(traced, ["a"])


def test_wide_models_are_refused_by_steering_as_by_recording():
    model = build(Gelu, dtype=torch.float64)
    with pytest.raises(InputError, match=r"layers.0 computes in torch.float64"):
        lf.steer(model, lf.deactivate({"layers.0": [0]}))

"""Residual means and the shifts made of them, against the hidden states that the model returns."""

from __future__ import annotations

import copy

import plain
import pytest
import torch
from families import shared

import lapefast as lf
from lapefast import models
from lapefast.errors import InputError
from lapefast.models.bare import bare_model
from lapefast.steering.shifts import decoder_layers

# A float64 sum of n values is off by at most n * 2^-53 of the sum of their magnitudes; for the 120
# tokens here and means far from zero that is within 1e-12.
RELATIVE = 1e-12


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(3)
    return {
        label: torch.randint(0, 50, (rows, 8), generator=generator)
        for label, rows in (("en", 15), ("zh", 7), ("fr", 2))
    }


@pytest.fixture
def means(texts):
    return lf.residual_means(shared("llama"), texts, batch_size=4, progress=False)


def leaving(model, rows: torch.Tensor) -> torch.Tensor:
    """What leaves each decoder layer, float64 [layers, tokens, hidden], batches of 4."""
    caught = {name: [] for name in decoder_layers(model)}
    hooks = [
        layer.register_forward_hook(
            lambda module, given, output, name=name: caught[name].append(
                (output[0] if isinstance(output, tuple) else output).double().flatten(0, 1)
            )
        )
        for name, layer in decoder_layers(model).items()
    ]
    bare = bare_model(model)
    with torch.no_grad():
        for batch in rows.split(4):
            extra = {"decoder_input_ids": shifted(batch)} if hasattr(bare, "encoder") else {}
            bare(input_ids=batch, use_cache=False, **extra)
    for hook in hooks:
        hook.remove()
    return torch.stack([torch.cat(values) for values in caught.values()])


def shifted(ids: torch.Tensor) -> torch.Tensor:
    return torch.cat([torch.zeros_like(ids[:, :1]), ids[:, :-1]], dim=1)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5-v1.1"])
def test_they_are_the_means_of_what_leaves_each_layer(name, dtype, texts):
    model = shared(name, dtype)
    before = plain.attributes(model)
    found = lf.residual_means(model, texts, batch_size=4, progress=False)
    plain.assert_untouched(before, model)
    assert found.labels == ["en", "zh", "fr"]
    assert found.layers == list(decoder_layers(model))
    assert found.fingerprint == models.fingerprint(model)
    assert found.tokens.tolist() == [120, 56, 16]
    for label, rows in texts.items():
        hidden = leaving(model, rows)
        slack = RELATIVE * hidden.abs().mean(1)
        assert ((found.means[label] - hidden.mean(1)).abs() <= slack).all()


def test_at_most_so_many_tokens_are_read(texts):
    found = lf.residual_means(shared("llama"), texts, max_tokens=16, progress=False)
    assert found.tokens.tolist() == [16, 16, 16]


def test_a_shift_is_the_target_less_the_mean_of_the_other_means(means):
    shift = means.towards("zh", layers=[0, "layers.1"], strength=2.0)
    assert list(shift.vectors) == ["layers.0", "layers.1"]
    assert shift.fingerprint == means.fingerprint
    others = (means.means["en"] + means.means["fr"]) / 2
    for layer, vector in enumerate(shift.vectors.values()):
        expected = 2.0 * (means.means["zh"][layer] - others[layer])
        # Rounded to float32 once, half a unit in the last place; cancellation of float64 means.
        slack = expected.abs() * 2**-24 + RELATIVE * others[layer].abs()
        assert ((vector.double() - expected).abs() <= slack).all()


def test_layers_count_from_the_end_too_and_the_middle_one_is_the_default(means):
    assert len(means.layers) == 2
    assert list(means.towards("en", layers=[-1]).vectors) == ["layers.1"]
    assert list(means.towards("en").vectors) == ["layers.1"]


@torch.no_grad()
def test_a_shifted_model_adds_the_difference_once(means, texts):
    model = shared("llama")
    plainly = leaving(model, texts["en"])
    with lf.steer(model, means.towards("fr", layers=[0])):
        moved = leaving(model, texts["en"])
    added = (means.means["fr"] - (means.means["en"] + means.means["zh"]) / 2)[0]
    # One float32 addition: half a unit in the last place of the result.
    slack = moved[0].abs() * 2**-23 + added.abs() * 2**-23
    assert ((moved[0] - plainly[0] - added).abs() <= slack).all()


@pytest.mark.parametrize(
    ("ask", "message"),
    [
        (lambda means: means.towards("xx"), "no residual means of label 'xx'"),
        (lambda means: means.towards("en", layers=[2]), "no layer 2"),
        (lambda means: means.towards("en", layers=["layers.9"]), "no layer 'layers.9'"),
        (lambda means: means.towards("en", layers=[True]), "no layer True"),
        (lambda means: means.towards("en", layers=[]), "at least one layer"),
        (lambda means: means.towards("en", strength=float("inf")), "finite"),
    ],
)
def test_what_cannot_be_asked_is_refused(means, ask, message):
    with pytest.raises(InputError, match=message):
        ask(means)


def test_one_label_alone_has_no_direction(texts):
    alone = lf.residual_means(shared("llama"), {"en": texts["en"]}, progress=False)
    with pytest.raises(InputError, match="at least two labels"):
        alone.towards("en")


def test_hidden_states_that_are_not_finite_are_named(texts):
    model = copy.deepcopy(shared("llama"))
    with torch.no_grad():
        model.model.layers[1].mlp.down_proj.weight[3] = float("nan")
    with pytest.raises(InputError, match=r"'en' leaving layer layers\.1 is not finite"):
        lf.residual_means(model, texts, progress=False)


def test_a_layer_that_does_not_run_has_no_mean(texts):
    model = copy.deepcopy(shared("llama"))
    model.config.num_hidden_layers = 1
    with pytest.raises(InputError, match=r"decoder layer layers\.1 did not run"):
        lf.residual_means(model, texts, progress=False)


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({"labels": ["en", "en"]}, r"distinct names as labels, got \['en', 'en'\]"),
        ({"layers": ["layers.0", ""]}, "distinct names as layers"),
        ({"means": torch.zeros(2, 2, 4)}, r"float64 \[labels, layers, hidden\] = \[2, 2, hidden\]"),
        ({"tokens": torch.tensor([3, 0])}, r"int64 \[labels\] = \[2\] of at least 1"),
    ],
)
def test_means_that_do_not_fit_their_names_are_refused(given, message):
    means = {
        "labels": ["en", "zh"],
        "layers": ["layers.0", "layers.1"],
        "means": torch.zeros(2, 2, 4, dtype=torch.float64),
        "tokens": torch.tensor([3, 1]),
    }
    lf.ResidualMeans(**means)
    with pytest.raises(InputError, match=message):
        lf.ResidualMeans(**{**means, **given})


def test_an_encoder_has_no_decoder_layers(texts):
    with pytest.raises(InputError, match="no numbered decoder layers"):
        lf.residual_means(shared("bert"), texts, progress=False)


def test_saved_means_are_read_again(means, tmp_path):
    means.save(tmp_path / "means")
    again = lf.ResidualMeans.load(tmp_path / "means")
    assert (again.labels, again.layers) == (means.labels, means.layers)
    assert all(torch.equal(again.means[label], means.means[label]) for label in means.labels)
    assert torch.equal(again.tokens, means.tokens)
    assert (again.fingerprint, again.metadata) == (means.fingerprint, means.metadata)
    again.save(tmp_path / "again")
    assert (tmp_path / "again").read_bytes() == (tmp_path / "means").read_bytes()


@pytest.mark.parametrize("at", [0, 20, 300, -1])
def test_a_flipped_bit_anywhere_is_found(means, tmp_path, at):
    path = tmp_path / "means"
    means.save(path)
    data = bytearray(path.read_bytes())
    data[at] ^= 1
    path.write_bytes(data)
    with pytest.raises(InputError, match="cannot load .*damaged"):
        lf.ResidualMeans.load(path)


@pytest.mark.parametrize("content", [b"", b"{}", b"12345678{"])
def test_what_is_no_such_file_is_refused(tmp_path, content):
    (tmp_path / "means").write_bytes(content)
    with pytest.raises(InputError, match="not a residual means file"):
        lf.ResidualMeans.load(tmp_path / "means")
    with pytest.raises(InputError, match="no such file"):
        lf.ResidualMeans.load(tmp_path / "absent")


def test_a_profile_is_no_residual_means_file(texts, tmp_path):
    lf.profile(shared("llama"), texts, progress=False).save(tmp_path / "profile")
    with pytest.raises(InputError, match="not a residual means file"):
        lf.ResidualMeans.load(tmp_path / "profile")

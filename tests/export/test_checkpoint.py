from __future__ import annotations

import json
import os

import plain
import pytest
import torch
import transformers
from families import IDS, by_name, shared
from tokenizers import Tokenizer, models

import lapefast as lf
from lapefast.errors import InputError
from lapefast.export.checkpoint import checkpoint

NEURONS = [0, 3, 20, 31, 32, 50, 51]


def everywhere(name, neurons=NEURONS):
    return dict.fromkeys(by_name(name).sites, neurons)


def state(model):
    return {name: tensor.clone() for name, tensor in model.state_dict().items()}


def assert_kept(model, before, attributes):
    plain.assert_untouched(attributes, model)
    now = model.state_dict()
    assert now.keys() == before.keys()
    assert all(torch.equal(before[name], now[name]) for name in now)


@pytest.fixture
def guarded():
    """A model that must be, bit for bit, what it was when the test ends."""
    held = []

    def guard(model):
        held.append((model, state(model), plain.attributes(model)))
        return model

    yield guard
    for model, before, attributes in held:
        assert_kept(model, before, attributes)


def edit_of(name):
    edit = lf.deactivate(everywhere(name)) | lf.scale(everywhere(name, [4, 7]), 1.7)
    if name in ("gpt2", "opt", "bert", "bart"):
        edit = edit | lf.activate(everywhere(name, [8]), 1.5) | lf.add(everywhere(name, [9]), 0.5)
    return edit


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize(
    "name", ["llama", "gemma", "phi3", "gpt2", "opt", "bert", "bart", "t5-v1.1", "zamba2"]
)
@torch.no_grad()
def test_what_is_loaded_computes_as_what_is_folded(name, dtype, tmp_path, guarded):
    family, model = by_name(name), guarded(by_name(name).build(dtype))
    edit = edit_of(name)
    with lf.fold(model, edit):
        folded, weights = family.call(model), state(model)
    lf.export.checkpoint(model, edit, tmp_path / "edited")
    loaded = type(model).from_pretrained(tmp_path / "edited", dtype=dtype).eval()
    for path, weight in loaded.state_dict().items():
        assert torch.equal(weight, weights[path].to(weight.dtype)), path
        # The table keeps T5's last projections in float32, loading in bfloat16 does not.
        parent, _, leaf = path.rpartition(".")
        if weight.dtype is not weights[path].dtype:
            loaded.get_submodule(parent)._parameters[leaf].data = weights[path]
    # Frequencies of positions are no part of a checkpoint; the table rounds them, too.
    for path, buffer in model.named_buffers():
        loaded.get_buffer(path).data = buffer
    assert plain.same(family.call(loaded), folded)


@torch.no_grad()
def test_tokens_generated_from_it_are_those_of_steering(tmp_path):
    model = shared("llama")
    model.generation_config.pad_token_id = 0
    edit = edit_of("llama")
    lf.export.checkpoint(model, edit, tmp_path / "edited")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None}
    with lf.steer(model, edit):
        expected = model.generate(IDS, **options)
    assert torch.equal(loaded.generate(IDS, **options), expected)


def test_generation_config_and_tokenizer_are_saved_beside_it(tmp_path, guarded):
    model = guarded(by_name("llama").build())
    model.generation_config.max_new_tokens = 77
    vocabulary = {f"w{i}": i for i in range(97)}
    tokenizer = transformers.PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="w0"))
    )
    (tmp_path / "edited").mkdir()  # an empty directory will do
    lf.export.checkpoint(model, edit_of("llama"), tmp_path / "edited", tokenizer)
    assert os.listdir(tmp_path) == ["edited"]
    assert {"config.json", "generation_config.json", "model.safetensors", "tokenizer.json"} <= set(
        os.listdir(tmp_path / "edited")
    )
    generation = json.loads((tmp_path / "edited" / "generation_config.json").read_text())
    assert generation["max_new_tokens"] == 77
    loaded = transformers.AutoTokenizer.from_pretrained(tmp_path / "edited")
    assert loaded("w7").input_ids == [7]


def test_a_compiled_model_is_saved_as_what_it_wraps(tmp_path):
    model = shared("llama")
    checkpoint(torch.compile(model), edit_of("llama"), tmp_path / "edited")
    loaded = transformers.AutoModelForCausalLM.from_pretrained(tmp_path / "edited")
    assert loaded.state_dict().keys() == model.state_dict().keys()


def test_an_edit_that_the_architecture_has_no_bias_for_is_refused(tmp_path, guarded):
    model = guarded(by_name("t5").build())
    edit = lf.activate(everywhere("t5"), 1.0)
    with lf.fold(model, edit):
        pass
    with pytest.raises(InputError, match=r"wo\.bias.*T5ForConditionalGeneration.*lf\.steer"):
        lf.export.checkpoint(model, edit, tmp_path / "edited")
    assert os.listdir(tmp_path) == []


@pytest.mark.parametrize(
    ("name", "edit", "message"),
    [
        ("bitnet", lf.deactivate, "something between"),
        ("llama", lambda sets: lf.add(sets, 1.0), "lf.steer"),
        ("llama", lambda sets: sets, "deactivate, activate, scale or add"),
        ("llama", lambda sets: lf.deactivate({"layers.9.mlp": [1]}), "layers.9.mlp"),
    ],
)
def test_what_can_not_be_folded_leaves_no_directory(name, edit, message, tmp_path, guarded):
    model = guarded(by_name(name).build())
    with pytest.raises(InputError, match=message):
        lf.export.checkpoint(model, edit(everywhere(name)), tmp_path / "edited")
    assert os.listdir(tmp_path) == []


def test_a_model_with_an_adapter_is_refused(tmp_path):
    peft = pytest.importorskip("peft", reason="PEFT is not installed; the extra export lifts it")
    model = by_name("llama").build()
    adapted = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    for one in (adapted, model):
        with pytest.raises(InputError, match="merge it first"):
            lf.export.checkpoint(one, edit_of("llama"), tmp_path / "edited")


def test_what_has_no_checkpoint_is_refused(tmp_path):
    with pytest.raises(InputError, match="Hugging Face model.*Linear"):
        lf.export.checkpoint(torch.nn.Linear(2, 2), edit_of("llama"), tmp_path / "edited")


def test_a_path_that_is_taken_is_refused_and_kept(tmp_path, guarded):
    model = guarded(by_name("llama").build())
    (tmp_path / "file").write_text("mine")
    (tmp_path / "full").mkdir()
    (tmp_path / "full" / "mine").write_text("mine")
    for name in ("file", "full"):
        with pytest.raises(InputError, match=rf"{name}.*empty directory"):
            lf.export.checkpoint(model, edit_of("llama"), tmp_path / name)
    with pytest.raises(InputError, match="does not exist; create it first"):
        lf.export.checkpoint(model, edit_of("llama"), tmp_path / "nowhere" / "edited")
    assert sorted(os.listdir(tmp_path)) == ["file", "full"]
    assert os.listdir(tmp_path / "full") == ["mine"]


@pytest.mark.parametrize("error", [KeyboardInterrupt, OSError(28, "No space left on device")])
def test_nothing_half_written_is_seen_or_stays(error, tmp_path, guarded, monkeypatch):
    model = guarded(by_name("llama").build())
    seen = []

    def fail(self, directory, *args, **options):
        (directory / "model.safetensors").write_text("half")
        seen.extend(name for name in os.listdir(tmp_path) if not name.startswith("."))
        raise error

    monkeypatch.setattr(transformers.PreTrainedModel, "save_pretrained", fail)
    expected = InputError if isinstance(error, OSError) else error
    with pytest.raises(expected, match="no space left" if expected is InputError else None):
        lf.export.checkpoint(model, edit_of("llama"), tmp_path / "edited")
    assert seen == []
    assert os.listdir(tmp_path) == []

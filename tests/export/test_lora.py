from __future__ import annotations

import json
import os
import sys
import warnings

import plain
import pytest
import torch
from families import IDS, MODERN, Family, by_name, layers, shared
from safetensors.torch import load_file
from torch import nn

import lapefast as lf
from lapefast.errors import InputError
from lapefast.models.structure import find_ffns

peft = pytest.importorskip("peft", reason="PEFT is not installed; the extra export lifts it")

NEURONS = [0, 3, 20, 31, 32, 50, 51]
NAMES = ["llama", "gpt2", "opt", "phi3", "gemma", "t5", "t5-v1.1", "falcon-h1", "bert", "albert",
         "zamba2"]  # fmt: skip


def ragged(name):
    """An edit with other numbers of neurons in each site, deactivated and scaled."""
    sites = list(by_name(name).sites)
    edit = lf.deactivate({site: NEURONS[index:] for index, site in enumerate(sites)})
    return edit | lf.scale({sites[0]: [4, 31]}, 1.7) | lf.scale({sites[-1]: [50]}, -2.0)


def adapted(model, path):
    """The model with the adapter, as PEFT loads it, without a warning."""
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        # Of transformers' own making, whoever calls it.
        warnings.filterwarnings("ignore", "`is_gradient_checkpointing`")
        return peft.PeftModel.from_pretrained(model, path).eval()


def adapters(model):
    """Path -> module of those with an adapter, as in the model without."""
    return {
        path.removeprefix("base_model.model."): module
        for path, module in model.named_modules()
        if hasattr(module, "lora_A")
    }


def lasts(model, sites=None):
    """Paths of the last projections, of all sites or of some."""
    paths = {module: path for path, module in model.named_modules()}
    return [paths[ffn.last] for ffn in find_ffns(model) if sites is None or ffn.site.name in sites]


def distance(first, second):
    pairs = zip(plain.tensors(first), plain.tensors(second), strict=True)
    return max(float((a - b).double().norm() / b.double().norm()) for a, b in pairs)


@pytest.mark.parametrize("name", NAMES)
@torch.no_grad()
def test_in_float32_the_adapter_agrees_with_steering_within_1e_5(name, tmp_path):
    family, model = by_name(name), by_name(name).build()
    edit = ragged(name)
    before, attributes = model.state_dict(), plain.attributes(model)
    before = {path: tensor.clone() for path, tensor in before.items()}
    expected = lasts(model)
    with lf.steer(model, edit):
        steered = family.call(model)
    lf.export.lora(model, edit, tmp_path / "adapter")
    plain.assert_untouched(attributes, model)
    assert all(torch.equal(before[path], now) for path, now in model.state_dict().items())
    with_adapter = adapted(model, tmp_path / "adapter")
    found = adapters(with_adapter)
    assert list(found) == expected
    assert {module.scaling["default"] for module in found.values()} == {1.0}
    assert distance(family.call(with_adapter), steered) < 1e-5
    with with_adapter.disable_adapter():
        assert distance(family.call(with_adapter), steered) > 1e-4


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "phi3"])
@torch.no_grad()
def test_tokens_are_those_of_steering(name, tmp_path):
    model, edit = by_name(name).build(), ragged(name)
    options = {"max_new_tokens": 8, "do_sample": False, "eos_token_id": None, "pad_token_id": 0}
    with lf.steer(model, edit):
        expected = model.generate(IDS, **options)
    lf.export.lora(model, edit, tmp_path / "adapter")
    with_adapter = adapted(model, tmp_path / "adapter")
    assert torch.equal(with_adapter.generate(input_ids=IDS, **options), expected)


@pytest.mark.parametrize("name", ["llama", "gpt2", "opt", "t5", "falcon-h1", "bert"])
@torch.no_grad()
def test_in_bfloat16_the_adapter_is_off_by_a_rounding_of_what_it_takes_from(name, tmp_path):
    family, model = by_name(name), by_name(name).build(torch.bfloat16)
    edit = ragged(name)
    ffn = find_ffns(model)[0]
    neurons, scale, _ = edit.tables[ffn.site.name]
    weight = ffn.last.weight.double().abs()
    weight = weight.T if type(ffn.last).__name__ == "Conv1D" else weight
    path = lasts(model)[0]

    def first_call(model, last):
        """What enters and leaves the last projection, where every run has the same input."""
        seen = []
        hook = last.register_forward_hook(lambda module, args, output: seen.append((*args, output)))
        family.call(model)
        hook.remove()
        return seen[0][0].double(), seen[0][1].double()

    entered, output = first_call(model, ffn.last)
    with lf.steer(model, edit):
        _, steered = first_call(model, ffn.last)
    lf.export.lora(model, edit, tmp_path / "adapter")
    with_adapter = adapted(model, tmp_path / "adapter")
    _, found = first_call(with_adapter, adapters(with_adapter)[path])
    info, sums = torch.finfo(torch.bfloat16), torch.finfo(torch.float32)
    # By half a spacing each: W p before the adapter's part is added and both results; the edited
    # activation, the product with it and the adapter's column (s - 1) W, of at most (1 + |s|) W p.
    edited = entered.abs()[..., neurons] * (1 + scale.abs()) @ weight[:, neurons].T
    bound = info.eps * (output.abs() + steered.abs() + found.abs() + 2 * edited)
    bound += 52 * sums.eps * (entered.abs() @ weight.T + edited)
    assert ((found - steered).abs() <= bound).all()


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_the_files_are_those_of_an_ordinary_adapter(name, dtype, tmp_path):
    model, sites = by_name(name).build(dtype), list(by_name(name).sites)
    edit = lf.deactivate({sites[0]: NEURONS, sites[1]: [5, 9]})
    model.name_or_path = "somebody/model"
    lf.export.lora(model, edit, tmp_path / "adapter")
    assert sorted(os.listdir(tmp_path / "adapter")) == [
        "adapter_config.json",
        "adapter_model.safetensors",
    ]
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    first, second = lasts(model, sites[:2])
    assert config["target_modules"] == [first, second]
    assert (config["r"], config["lora_alpha"]) == (7, 7)
    assert config["rank_pattern"] == config["alpha_pattern"] == {second: 2}
    assert config["peft_type"] == "LORA"
    assert config["task_type"] == ("SEQ_2_SEQ_LM" if name == "t5" else "CAUSAL_LM")
    assert config["base_model_name_or_path"] == "somebody/model"
    assert config["fan_in_fan_out"] == (name == "gpt2")
    assert (config["bias"], config["use_rslora"], config["modules_to_save"]) == (
        "none",
        False,
        None,
    )
    tensors = load_file(tmp_path / "adapter" / "adapter_model.safetensors")
    assert set(tensors) == {
        f"base_model.model.{path}.lora_{factor}.weight"
        for path in (first, second)
        for factor in "AB"
    }
    for path, neurons in ((first, NEURONS), (second, [5, 9])):
        weight = model.get_submodule(path).weight.detach()
        weight = weight.T if name == "gpt2" else weight
        down = tensors[f"base_model.model.{path}.lora_A.weight"]
        up = tensors[f"base_model.model.{path}.lora_B.weight"]
        assert down.dtype is up.dtype is weight.dtype  # T5's last projections are float32
        assert torch.equal(down, torch.eye(52, dtype=weight.dtype)[neurons])
        assert torch.equal(up, -weight[:, neurons])


def test_equal_ranks_need_no_patterns(tmp_path):
    lf.export.lora(shared("llama"), lf.scale({"layers.1.mlp": [3, 4]}, 2.0), tmp_path / "adapter")
    config = json.loads((tmp_path / "adapter" / "adapter_config.json").read_text())
    assert config["rank_pattern"] == config["alpha_pattern"] == {}
    assert config["target_modules"] == ["model.layers.1.mlp.down_proj"]


@torch.no_grad()
def test_only_edited_layers_of_a_deep_model_get_an_adapter(tmp_path):
    # With so many targets PEFT looks for shorter names of its own.
    options = {**MODERN, "num_hidden_layers": 48}
    sites = layers("layers.{}.mlp", "layers.{}.mlp.act_fn", 48)
    family = Family("deep", "LlamaForCausalLM", options, sites, replaced=True, gate_scale=1.0)
    model = family.build()
    chosen = [site for index, site in enumerate(sites) if index % 2 or index > 40]
    edit = lf.deactivate({site: range(1 + index % 5) for index, site in enumerate(chosen)})
    expected = lasts(model, chosen)
    with lf.steer(model, edit):
        steered = model(IDS)
    lf.export.lora(model, edit, tmp_path / "adapter")
    with_adapter = adapted(model, tmp_path / "adapter")
    assert list(adapters(with_adapter)) == expected
    assert distance(with_adapter(IDS), steered) < 1e-5


@torch.no_grad()
def test_an_adapter_of_a_bare_model_has_its_paths(tmp_path):
    model = by_name("llama").build().model
    edit = ragged("llama")
    with lf.steer(model, edit):
        steered = model(IDS)
    lf.export.lora(model, edit, tmp_path / "adapter")
    with_adapter = adapted(model, tmp_path / "adapter")
    assert list(adapters(with_adapter)) == ["layers.0.mlp.down_proj", "layers.1.mlp.down_proj"]
    assert distance(with_adapter(IDS), steered) < 1e-5


@torch.no_grad()
def test_two_adapters_and_none_take_turns_on_one_model(tmp_path):
    model = by_name("llama").build()
    edits = {"a": ragged("llama"), "b": lf.scale({"layers.1.mlp": [0, 2]}, 3.0)}
    expected = {}
    for name, edit in edits.items():
        lf.export.lora(model, edit, tmp_path / name)
        with lf.steer(model, edit):
            expected[name] = model(IDS)
    with_adapters = peft.PeftModel.from_pretrained(model, tmp_path / "a", adapter_name="a")
    with_adapters.load_adapter(tmp_path / "b", adapter_name="b")
    for name in ("b", "a"):
        with_adapters.set_adapter(name)
        assert distance(with_adapters(IDS), expected[name]) < 1e-5


# What is refused.


@pytest.mark.parametrize(
    ("edit", "options", "message"),
    [
        (lambda: lf.activate({"layers.1.mlp": [3]}, 1.0), {},
         r"layers\.1\.mlp: neuron 3.*lf\.steer"),
        (lambda: lf.add({"layers.0.mlp": [3]}, 1.0), {}, "vLLM plugin"),
        (lambda: lf.deactivate({"layers.1.mlp": range(9)}), {"max_rank": 8},
         r"layers\.1\.mlp: 9 neurons.*lf\.export\.checkpoint"),
        (lambda: lf.deactivate({"layers.1.mlp": []}), {}, "no neuron"),
        (lambda: lf.scale({"layers.1.mlp": [1, 2]}, 1.0), {}, "no neuron"),
        (lambda: lf.deactivate({"layers.5.mlp": [1]}), {}, "layers.5.mlp"),
        (lambda: None, {}, "deactivate, activate, scale or add"),
        (lambda: lf.deactivate({"layers.1.mlp": [1]}), {"max_rank": 0}, "max_rank"),
        (lambda: lf.deactivate({"layers.1.mlp": [1]}), {"max_rank": 1.5}, "max_rank"),
    ],
)  # fmt: skip
def test_what_is_no_adapter_is_refused_and_leaves_nothing(edit, options, message, tmp_path):
    model = shared("llama")
    before = plain.attributes(model)
    with pytest.raises(InputError, match=message):
        lf.export.lora(model, edit(), tmp_path / "adapter", **options)
    plain.assert_untouched(before, model)
    assert os.listdir(tmp_path) == []


def test_512_neurons_in_a_layer_fit_and_513_do_not(tmp_path):
    options = {**MODERN, "intermediate_size": 520}
    sites = layers("layers.{}.mlp", "layers.{}.mlp.act_fn")
    model = Family("wide", "LlamaForCausalLM", options, sites, gate_scale=1.0).build()
    unchanged = lf.scale({"layers.0.mlp": range(515)}, 1.0)
    lf.export.lora(
        model, unchanged | lf.deactivate({"layers.0.mlp": range(512)}), tmp_path / "adapter"
    )
    with pytest.raises(InputError, match="513"):
        lf.export.lora(model, lf.deactivate({"layers.0.mlp": range(513)}), tmp_path / "more")


def test_weights_that_leave_the_range_of_the_dtype_are_refused(tmp_path):
    model = by_name("llama").build().half()
    nn.init.constant_(model.model.layers[1].mlp.down_proj.weight[:, 3], 40_000)
    with pytest.raises(InputError, match=r"layers\.1\.mlp: .* leave the range of torch\.float16"):
        lf.export.lora(model, lf.scale({"layers.1.mlp": [3]}, 3.0), tmp_path / "adapter")


def test_columns_and_rows_of_one_layer_are_no_adapter(tmp_path):
    edit = lf.scale({"layers.1.mlp": [3]}, 2.0) | lf.scale({"layers.1.mlp.down_proj": [1]}, 2.0)
    with pytest.raises(InputError, match=r"columns and rows of .*layers\.1\.mlp\.down_proj"):
        lf.export.lora(shared("llama"), edit, tmp_path / "adapter")


def test_the_bias_of_edited_outputs_is_refused(tmp_path):
    model = by_name("opt").build()
    layer = model.model.decoder.layers[0].self_attn.q_proj
    nn.init.ones_(layer.bias)
    with pytest.raises(InputError, match=r"q_proj: an adapter leaves the bias"):
        lf.export.lora(
            model, lf.scale({"decoder.layers.0.self_attn.q_proj": [1]}, 2.0), tmp_path / "adapter"
        )


def test_bitnet_whose_norm_an_adapter_can_not_follow_is_refused(tmp_path):
    with pytest.raises(InputError, match=r"layers\.1\.mlp.*lf\.steer"):
        lf.export.lora(shared("bitnet"), lf.deactivate({"layers.1.mlp": [3]}), tmp_path / "adapter")


def test_a_model_with_an_adapter_or_a_fold_or_an_edit_is_refused(tmp_path):
    model, edit = by_name("llama").build(), ragged("llama")
    with lf.steer(model, edit), pytest.raises(InputError, match="remove it first"):
        lf.export.lora(model, edit, tmp_path / "adapter")
    with lf.fold(model, edit), pytest.raises(InputError, match="undo it first"):
        lf.export.lora(model, edit, tmp_path / "adapter")
    with_adapter = peft.get_peft_model(model, peft.LoraConfig(r=2, target_modules=["q_proj"]))
    with pytest.raises(InputError, match="merge it first"):
        lf.export.lora(with_adapter, edit, tmp_path / "adapter")
    assert os.listdir(tmp_path) == []


def test_a_module_whose_path_ends_alike_is_not_taken_along(tmp_path):
    class Both(nn.Module):
        def __init__(self):
            super().__init__()
            self.model, self.config = by_name("llama").build().model, None
            self.draft = nn.ModuleDict({"model": by_name("llama").build().model})

    model = Both()
    model.config = model.model.config
    with pytest.raises(InputError, match=r"draft\.model\.layers\.1\.mlp\.down_proj"):
        lf.export.lora(model, lf.deactivate({"layers.1.mlp": [3]}), tmp_path / "adapter")


def test_without_peft_the_message_says_what_to_install(tmp_path, monkeypatch):
    monkeypatch.setitem(sys.modules, "peft", None)
    with pytest.raises(InputError, match=r"lapefast\[export\]"):
        lf.export.lora(shared("llama"), ragged("llama"), tmp_path / "adapter")


def test_a_path_that_is_taken_is_refused(tmp_path):
    (tmp_path / "adapter").mkdir()
    (tmp_path / "adapter" / "mine").write_text("mine")
    with pytest.raises(InputError, match="exists already"):
        lf.export.lora(shared("llama"), ragged("llama"), tmp_path / "adapter")
    assert os.listdir(tmp_path / "adapter") == ["mine"]

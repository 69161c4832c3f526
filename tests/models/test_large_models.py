"""Models that are offloaded, quantised or adapted, profiled and steered."""

from __future__ import annotations

import dataclasses
import json

import plain
import pytest
import torch
from families import IDS, VOCABULARY, by_name
from same_run import eager, profile_and_gates

import lapefast as lf
from lapefast import models
from lapefast.engines.transformers import Checkpoint, load_model
from lapefast.errors import InputError
from lapefast.models.bare import unwrap
from lapefast.models.fingerprint import _sample, _unpacked

pytestmark = pytest.mark.filterwarnings("ignore")

ROWS = torch.arange(10 * 12).reshape(10, 12) * 29 % (VOCABULARY - 10) + 5
CORPORA = {"en": ROWS[:6], "zh": ROWS[6:]}
# bitsandbytes' blocks are of 64 weights, and of 32 rows where a CPU has bfloat16 products.
WIDE = {"hidden_size": 64, "intermediate_size": 128}
LAYERS = dict.fromkeys(("model.layers.0", "model.layers.1"), "disk")
AROUND = dict.fromkeys(("model.embed_tokens", "model.rotary_emb", "model.norm", "lm_head"), "cpu")
MAPS = {
    "auto": "auto",
    "layers on disk": json.dumps(AROUND | LAYERS),
    "one layer on disk": json.dumps(AROUND | LAYERS | {"model.layers.1": "cpu"}),
}


@pytest.fixture(params=["llama", "phi3", "starcoder2"])
def name(request):
    return request.param


@pytest.fixture(scope="module")
def saved(tmp_path_factory):
    """A family's name -> its saved model."""

    def save(name):
        path = tmp_path_factory.mktemp(name)
        family = by_name(name)
        options = {**family.options, **WIDE}
        dataclasses.replace(family, options=options).build().save_pretrained(path)
        return Checkpoint(str(path))

    held = {}
    return lambda name: held.get(name) or held.setdefault(name, save(name))


def profiled(model):
    return lf.profile(model, CORPORA, batch_size=4, progress=False)


def assert_counts_of_that_run(name, model):
    """The counts equal the eager expression on the gates that the same run made."""
    profile, gates = profile_and_gates(model, CORPORA, batch_size=4)
    for site in profile.sites:
        for label in range(2):
            active = eager(name, gates[site][label]) > 0
            assert torch.equal(profile.counts[site][label], active.sum(0)), site
    return profile


@torch.no_grad()
def assert_steered_as_by_hooks(name, model):
    family = by_name(name)
    sites = list(family.sites)
    off = [2, 9, 51]

    def silence(site, output):
        output = output.clone()
        output[..., off] = 0.0
        return output

    with plain.hooked(family.activations(unwrap(model)), silence):
        expected = model(input_ids=IDS)
    assert not plain.same(expected, model(input_ids=IDS))
    with lf.steer(model, lf.deactivate(dict.fromkeys(sites, off))):
        assert plain.same(model(input_ids=IDS), expected)


# offloaded


@pytest.mark.parametrize("where", MAPS)
@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_an_offloaded_model_is_profiled_and_steered_like_one_in_memory(saved, name, where, dtype):
    pytest.importorskip("accelerate", reason="accelerate is not installed; the extra test lifts it")
    model = load_model(saved(name), dtype, device_map=MAPS[where])
    kinds = {parameter.device.type for parameter in model.parameters()}
    assert ("meta" in kinds) == ("disk" in where)
    expected, found = profiled(load_model(saved(name), dtype, "cpu")), profiled(model)
    assert found.site_info == expected.site_info
    assert found.metadata == expected.metadata
    for site in expected.sites:
        assert torch.equal(found.counts[site], expected.counts[site])
        assert torch.equal(found.sums[site], expected.sums[site])
    assert_steered_as_by_hooks(name, model)


@pytest.mark.parametrize("text", ["{model: cpu}", '{"model": '])
def test_a_device_map_that_can_not_be_read_is_refused(saved, text):
    pytest.importorskip("accelerate", reason="accelerate is not installed; the extra test lifts it")
    with pytest.raises(InputError, match="is not JSON"):
        load_model(saved("llama"), device_map=text)


# quantised


@pytest.fixture(params=["8bit", "4bit"])
def bits(request):
    pytest.importorskip(
        "bitsandbytes", reason="bitsandbytes is not installed; the extra test lifts it"
    )
    return request.param


@pytest.mark.parametrize("dtype", ["float32", "bfloat16"])
def test_a_quantised_models_counts_are_of_what_it_computes(saved, name, bits, dtype):
    model = load_model(saved(name), dtype, "cpu", quantization=bits)
    last = models.bare_model(model).layers[1].mlp
    assert not any(parameter.dim() > 1 and parameter.is_floating_point()
                   for parameter in last.parameters())  # fmt: skip
    print_before = models.fingerprint(model)
    profile = assert_counts_of_that_run(name, model)
    assert profile.metadata["dtype"] == dtype
    assert profile.fingerprint == print_before == models.fingerprint(model)
    assert profile.site_info == models.find_sites(load_model(saved(name), dtype, "cpu"))


def test_a_4bit_weight_that_bitsandbytes_packed_for_a_cpu_is_known_by_the_bytes_it_had():
    functional = pytest.importorskip(
        "bitsandbytes.functional", reason="bitsandbytes is not installed; the extra test lifts it"
    )
    weight = torch.randn(96, 128, generator=torch.Generator().manual_seed(0))
    loaded, state = functional.quantize_4bit(weight, quant_type="nf4")
    before = loaded.clone().reshape(-1)
    packed, state = functional._convert_weight_packed_for_cpu(loaded, state)
    assert not torch.equal(packed.reshape(-1), before)
    places = torch.arange(len(before))
    assert torch.equal(_unpacked(packed.reshape(-1), 128, places), before)
    parameter = torch.nn.Parameter(packed, requires_grad=False)
    parameter.quant_state = state
    layer = torch.nn.Module()
    sampled = _sample(layer, "weight", parameter, 100)
    assert sampled == before[:: len(before) // 100][:100].numpy().tobytes()


def test_a_quantised_model_is_another_model(saved, bits):
    whole = profiled(load_model(saved("llama"), "bfloat16", "cpu"))
    quantised = profiled(load_model(saved("llama"), "bfloat16", "cpu", quantization=bits))
    with pytest.raises(InputError, match="profiles of models that differ"):
        whole + quantised


def test_a_quantised_model_is_steered_as_by_hooks(saved, name, bits):
    assert_steered_as_by_hooks(name, load_model(saved(name), "bfloat16", "cpu", quantization=bits))


# adapted


def adapted(name, model):
    peft = pytest.importorskip("peft", reason="PEFT is not installed; the extra export lifts it")
    owner = models.bare_model(model).layers[0].mlp
    targets = [path for path, _ in owner.named_children() if path[-4:] in ("proj", "c_fc")]
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False)
        return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize("quantization", [None, "4bit"])
def test_an_adapted_model_is_profiled_and_steered_under_the_plain_models_names(
    saved, name, quantization
):
    if quantization:
        pytest.importorskip(
            "bitsandbytes", reason="bitsandbytes is not installed; the extra test lifts it"
        )
    base = load_model(saved(name), "bfloat16", "cpu", quantization=quantization)
    before = profiled(base)
    model = adapted(name, base)
    found = assert_counts_of_that_run(name, model)
    assert found.site_info == before.site_info
    assert found.fingerprint != before.fingerprint
    assert any(not torch.equal(found.counts[site], before.counts[site]) for site in found.sites)
    assert_steered_as_by_hooks(name, model)
    with model.disable_adapter():
        disabled = profiled(model)
    for site in before.sites:
        assert torch.equal(disabled.counts[site], before.counts[site])


def on_attention(model, seed):
    """The model with an adapter where no FFN's projection has one."""
    peft = pytest.importorskip("peft", reason="PEFT is not installed; the extra export lifts it")
    with torch.random.fork_rng():
        torch.manual_seed(seed)
        config = peft.LoraConfig(r=4, target_modules=["q_proj", "v_proj"], init_lora_weights=False)
        return peft.get_peft_model(model, config).eval()


def test_models_that_differ_before_their_ffns_alone_are_kept_apart(saved, tmp_path):
    def base():
        return load_model(saved("llama"), "float32", "cpu")

    adapted, other = on_attention(base(), 1), on_attention(base(), 2)
    first, second = profiled(adapted), profiled(other)
    assert first.fingerprint == second.fingerprint == profiled(base()).fingerprint
    with adapted.disable_adapter():
        disabled = profiled(adapted)
    merged = profiled(on_attention(base(), 1).merge_and_unload())
    for one in (profiled(base()), second, disabled, merged):
        with pytest.raises(InputError, match="have the same last projections, but other weights"):
            first + one
    options = {"batch_size": 4, "progress": False, "resume": tmp_path / "run"}
    lf.profile(adapted, CORPORA, **options)
    for one in (base(), other):
        with pytest.raises(InputError, match="weights: [0-9a-f]{12} there, [0-9a-f]{12} here"):
            lf.profile(one, CORPORA, **options)
    lf.profile(on_attention(base(), 1), CORPORA, **options)


def test_adapters_of_several_kinds_are_an_adapted_model(saved):
    peft = pytest.importorskip("peft", reason="PEFT is not installed; the extra export lifts it")
    base = load_model(saved("llama"), "float32", "cpu")
    before = profiled(base)
    config = peft.LoraConfig(r=2, target_modules=["gate_proj"], init_lora_weights=False)
    adapted = profiled(peft.get_peft_model(base, config, mixed=True).eval())
    assert adapted.site_info == before.site_info
    with pytest.raises(InputError, match="other weights or adapters"):
        before + adapted


def test_a_learned_prompt_is_refused_as_it_would_not_be_read(saved):
    peft = pytest.importorskip("peft", reason="PEFT is not installed; the extra export lifts it")
    config = peft.PromptTuningConfig(task_type="CAUSAL_LM", num_virtual_tokens=3)
    model = peft.get_peft_model(load_model(saved("llama"), "float32", "cpu"), config)
    with pytest.raises(InputError, match="puts a learned prompt before every text"):
        profiled(model)

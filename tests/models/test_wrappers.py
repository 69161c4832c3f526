from __future__ import annotations

import warnings

import peft
import plain
import pytest
import torch
from families import IDS, by_name, shared

import lapefast as lf
from lapefast import models

pytestmark = pytest.mark.filterwarnings("ignore")
LATER = IDS.flip(0)


@torch.no_grad()
def plain_counts(name, model, batches=(IDS,)):
    family = by_name(name)
    total = {}
    for ids in batches:
        with plain.hooked(family.activations(model)) as seen:
            family.call(model, ids)
        for site, calls in seen.items():
            counted = plain.counts(calls, torch.zeros_like(ids), 1)
            total[site] = total.get(site, 0) + counted
    return total


def assert_counts(profile, expected):
    assert profile.counts.keys() == expected.keys()
    for site, counted in expected.items():
        assert torch.equal(profile.counts[site], counted), site


# accelerate


def offloaded(name, how):
    accelerate = pytest.importorskip(
        "accelerate", reason="accelerate is not installed; the extra test lifts it"
    )
    model = by_name(name).build(torch.bfloat16)
    if how == "hook":
        for module in model.modules():
            if not list(module.children()):
                accelerate.hooks.add_hook_to_module(module, accelerate.hooks.ModelHook())
        for owner in list(model.modules()):
            if type(owner).__name__.endswith("MLP"):
                accelerate.hooks.add_hook_to_module(owner, accelerate.hooks.ModelHook())
    elif how == "cpu_offload":
        accelerate.cpu_offload(model, execution_device=torch.device("cpu"))
    else:
        device_map = {"": "cpu"}
        accelerate.dispatch_model(model, device_map=device_map, main_device="cpu", force_hooks=True)
    return model


@pytest.mark.parametrize("how", ["hook", "cpu_offload", "dispatch_model"])
@pytest.mark.parametrize("name", ["llama", "gpt2", "opt"])
@torch.no_grad()
def test_hooks_of_accelerate_keep_running(name, how):
    plain_model = shared(name, torch.bfloat16)
    expected, counts = plain_model(IDS), plain_counts(name, plain_model)
    model = offloaded(name, how)
    assert models.fingerprint(model) == models.fingerprint(plain_model)
    before = plain.attributes(model)
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        assert plain.same(model(IDS), expected)
        assert plain.same(model(IDS), expected)
    assert_counts(recorder.profile(), {site: 2 * counted for site, counted in counts.items()})
    # Offloading itself puts other parameters on a module at every forward pass.
    plain.assert_untouched(before, model, but=("_parameters",) if how == "cpu_offload" else ())
    assert plain.same(model(IDS), expected)


# PEFT


def adapted(name, targets, **options):
    peft = pytest.importorskip("peft", reason="PEFT is not installed; the extra export lifts it")
    model = by_name(name).build(torch.bfloat16)
    with torch.random.fork_rng():
        torch.manual_seed(1)
        config = peft.LoraConfig(r=2, target_modules=targets, init_lora_weights=False, **options)
        return peft.get_peft_model(model, config).eval()


@pytest.mark.parametrize(
    ("name", "targets"),
    [
        ("llama", ["gate_proj", "up_proj", "down_proj"]),
        ("llama", ["up_proj"]),
        ("gpt2", ["c_fc", "c_proj"]),
        ("phi3", ["gate_up_proj"]),
        ("opt", ["fc1", "fc2"]),
    ],
)
@torch.no_grad()
def test_adapters_are_recorded_under_the_names_of_the_plain_model(name, targets):
    model = adapted(name, targets)
    inner = model.get_base_model()
    before = plain.attributes(model)
    expected, counts = model(input_ids=IDS), plain_counts(name, inner)
    assert models.find_sites(model) == models.find_sites(shared(name))
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        assert plain.same(model(input_ids=IDS), expected)
    assert_counts(recorder.profile(), counts)
    plain.assert_untouched(before, model)
    assert plain.same(model(input_ids=IDS), expected)


@torch.no_grad()
def test_a_hook_under_an_adapter_sees_the_same_values():
    model = adapted("llama", ["gate_proj"])
    base = model.get_base_model().model.layers[0].mlp.gate_proj.base_layer
    held = []
    base.register_forward_hook(lambda module, args, output: held.append(output))
    with model.disable_adapter():
        model(input_ids=IDS)
        expected = held[0].clone()
        with lf.record(model, ["a"]) as recorder:
            held.clear()
            recorder.set(label="a")
            model(input_ids=IDS)
    assert torch.equal(held[0], expected)


def test_an_adapter_on_a_last_projection_changes_the_fingerprint_and_others_do_not():
    plain_print = models.fingerprint(shared("llama", torch.bfloat16))
    assert models.fingerprint(adapted("llama", ["gate_proj", "q_proj"])) == plain_print
    with_down = models.fingerprint(adapted("llama", ["down_proj"]))
    assert with_down != plain_print
    assert with_down == models.fingerprint(adapted("llama", ["down_proj"]))


def test_an_adapter_that_is_being_trained_has_the_gradients_it_has_without_a_recorder():
    model = adapted("llama", ["gate_proj", "up_proj", "down_proj"]).train()

    def gradients():
        model.zero_grad()
        model(input_ids=IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in model.parameters() if p.grad is not None]

    expected = gradients()
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        assert all(map(torch.equal, gradients(), expected))


# quantisation


@torch.no_grad()
def test_linears_that_hold_no_parameters_are_recorded():
    model = torch.ao.quantization.quantize_dynamic(
        by_name("llama").build(), {torch.nn.Linear}, dtype=torch.qint8
    )
    assert not list(model.model.layers[0].mlp.parameters())
    counts = plain_counts("llama", model)
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        model(IDS)
    assert_counts(recorder.profile(), counts)


# torch.compile


@pytest.fixture(autouse=True)
def fresh_compiler():
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def compiled_form(model, form):
    if form == "model.compile()":
        model.compile(backend="eager")
        return model
    if form == "bare, fullgraph":
        return torch.compile(models.bare_model(model), fullgraph=True, backend="eager")
    return torch.compile(model, backend="eager")


def recompilations():
    return torch._dynamo.utils.counters["stats"]["unique_graphs"]


@pytest.mark.parametrize(
    ("name", "form"),
    [
        ("llama", "torch.compile(model)"),
        ("llama", "bare, fullgraph"),
        ("llama", "model.compile()"),
        ("gpt2", "bare, fullgraph"),
    ],
)
@torch.no_grad()
def test_a_compiled_model_counts_the_same_and_compiles_once(name, form):
    model = by_name(name).build(torch.bfloat16)
    family = by_name(name)
    counts = plain_counts(name, model, [IDS, LATER, IDS])
    inner = family.bare_of(model) if "bare" in form else model
    expected = inner(IDS, use_cache=False)
    compiled = compiled_form(model, form)
    assert models.find_sites(compiled) == models.find_sites(model)
    assert models.fingerprint(compiled) == models.fingerprint(model)
    with lf.record(compiled, ["a", "b"]) as recorder:
        seen = []
        for ids, label in ((IDS, 0), (LATER, 1), (IDS, 0)):
            recorder.set(groups=torch.full_like(ids, label))
            output = compiled(ids, use_cache=False)
            seen.append((recompilations(), output))
    assert seen[0][0] > 0
    assert seen[0][0] == seen[1][0] == seen[2][0]
    assert plain.same(seen[0][1], expected)
    profile = recorder.profile()
    assert profile.tokens.tolist() == [2 * IDS.numel(), IDS.numel()]
    for site, counted in counts.items():
        assert torch.equal(profile.counts[site].sum(0, keepdim=True), counted), site
    compiled(IDS, use_cache=False)
    assert recorder.profile().tokens.tolist() == [2 * IDS.numel(), IDS.numel()]


@pytest.mark.parametrize(
    ("name", "parts"),
    [
        ("llama", ["model.layers.0.mlp", "model.layers.1.mlp"]),
        ("llama", ["model.layers.1"]),
        ("opt", ["model.decoder.layers.0", "model.decoder.layers.1"]),
    ],
)
@torch.no_grad()
def test_a_model_with_compiled_parts_has_the_plain_models_sites_and_counts(name, parts):
    model = by_name(name).build(torch.bfloat16)
    counts, sites = plain_counts(name, model), models.find_sites(model)
    for part in parts:
        model.set_submodule(part, torch.compile(model.get_submodule(part), backend="eager"))
    assert models.find_sites(model) == sites
    assert models.fingerprint(model) == models.fingerprint(shared(name, torch.bfloat16))
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        model(IDS, use_cache=False)
    assert_counts(recorder.profile(), counts)


@torch.no_grad()
def test_wrapped_parts_of_a_layer_pass_for_what_they_wrap():
    family = by_name("bert")
    model = family.build()
    counts, sites = plain_counts("bert", model), models.find_sites(model)
    layer = family.bare_of(model).encoder.layer[0]
    for name in ("intermediate", "output"):
        setattr(layer, name, torch.compile(getattr(layer, name), backend="eager"))
    assert models.find_sites(model) == sites
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        family.call(model)
    assert_counts(recorder.profile(), counts)


@torch.no_grad()
def test_an_ffn_that_an_adapter_trains_whole_is_one_site_of_the_plain_models_name():
    model = by_name("llama").build()
    sites, ids = models.find_sites(model), IDS
    config = peft.LoraConfig(target_modules=["q_proj"], modules_to_save=["mlp"])
    adapted = peft.get_peft_model(model, config).eval()
    for layer in adapted.get_base_model().model.layers:
        layer.mlp.original_module.gate_proj.weight.zero_()  # does not run
    assert models.find_sites(adapted) == sites
    inner = [
        layer.mlp.modules_to_save["default"] for layer in adapted.get_base_model().model.layers
    ]
    with plain.hooked(
        {site.name: ffn.act_fn for site, ffn in zip(sites, inner, strict=True)}
    ) as seen:
        expected = adapted(input_ids=ids)
    with lf.record(adapted, ["a"]) as recorder:
        recorder.set(label="a")
        assert plain.same(adapted(input_ids=ids), expected)
    groups = torch.zeros_like(ids)
    counts = {site: plain.counts(calls, groups, 1) for site, calls in seen.items()}
    assert all(counted.any() for counted in counts.values())
    assert_counts(recorder.profile(), counts)


@pytest.mark.parametrize("name", ["llama", "opt"])
@torch.no_grad()
def test_a_model_that_was_compiled_and_run_before_counts_too(name):
    model = by_name(name).build(torch.bfloat16)
    counts = plain_counts(name, model)
    compiled = torch.compile(model, backend="eager")
    compiled(IDS, use_cache=False)
    with lf.record(compiled, ["a"]) as recorder:
        recorder.set(label="a")
        compiled(IDS, use_cache=False)
    assert_counts(recorder.profile(), counts)
    with lf.record(compiled, ["a"]) as again:
        again.set(label="a")
        compiled(IDS, use_cache=False)
    assert_counts(again.profile(), counts)


@torch.no_grad()
def test_an_edit_of_a_compiled_model_holds_and_ends():
    model = by_name("llama").build(torch.bfloat16)
    compiled = torch.compile(model, backend="eager")
    edit = lf.deactivate({"layers.0.mlp": list(range(0, 52, 2))})
    expected = compiled(IDS, use_cache=False).logits
    with lf.steer(model, edit):
        edited = model(IDS, use_cache=False).logits
        assert not torch.equal(edited, expected)
        assert torch.equal(compiled(IDS, use_cache=False).logits, edited)
    assert torch.equal(compiled(IDS, use_cache=False).logits, expected)


def test_inductor_counts_as_eager_does():
    model = by_name("llama").build(torch.float32)
    bare = models.bare_model(model)
    with warnings.catch_warnings(), torch.no_grad():
        warnings.simplefilter("ignore")
        with lf.record(model, ["a"]) as recorder:
            recorder.set(label="a")
            compiled = torch.compile(bare, fullgraph=True)
            compiled(input_ids=IDS, use_cache=False)
    found = recorder.profile()
    assert found.tokens.tolist() == [IDS.numel()]
    for site, counted in plain_counts("llama", model).items():
        # Fused arithmetic differs in the last bits, which moves only activations next to zero.
        assert (found.counts[site] - counted).abs().max() <= 1, site

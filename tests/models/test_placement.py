from __future__ import annotations

import copy
import io
import itertools
import pickle
import subprocess
import sys
import threading
import types

import plain
import pytest
import torch
import transformers
from families import IDS, by_name, shared
from torch import nn

import lapefast as lf
from lapefast import models
from lapefast.errors import InputError

SITES = ("layers.0.mlp", "layers.1.mlp")
EDIT = {"layers.0.mlp": [0, 3], "layers.1.mlp": [51]}


@pytest.fixture(params=["llama", "gpt2"])
def model(request):
    """One whose FFNs' forwards are replaced, and one handled at its activations."""
    return shared(request.param, torch.bfloat16)


@pytest.fixture
def llama():
    """A model of a test's own."""
    return by_name("llama").build()


def recorded(recorder) -> dict[str, torch.Tensor]:
    return recorder.profile().counts


def edit_of(model):
    return lf.deactivate({site.name: [0, 3] for site in models.find_sites(model)[:1]})


@torch.no_grad()
def plain_counts(name, model, ids=IDS):
    family = by_name(name)
    with plain.hooked(family.activations(model)) as seen:
        family.call(model, ids)
    return {site: plain.counts(calls, torch.zeros_like(ids), 1) for site, calls in seen.items()}


def assert_counts(found, expected):
    assert found.keys() == expected.keys()
    for site, counted in expected.items():
        assert torch.equal(found[site], counted), site


@pytest.mark.parametrize("first", ["recorder", "steering"])
def test_recorder_and_steering_come_out_in_any_order(model, first):
    before = plain.attributes(model)
    recorder = lf.record(model, ["a"])
    steering = lf.steer(model, edit_of(model))
    order = [recorder, steering] if first == "recorder" else [steering, recorder]
    for handle in (*order, *order):
        handle.remove()
    plain.assert_untouched(before, model)


@pytest.mark.parametrize("order", ["record, steer", "steer, record"])
@torch.no_grad()
def test_the_recorder_sees_edited_activations_and_says_so(model, order):
    site = models.find_sites(model)[0].name
    edit = lf.activate({site: [3]}, 2.0)
    if order == "record, steer":
        recorder = lf.record(model, ["a"], statistics=("counts", "sums"))
        steering = lf.steer(model, edit)
    else:
        steering = lf.steer(model, edit)
        recorder = lf.record(model, ["a"], statistics=("counts", "sums"))
    with recorder, steering:
        recorder.set(label="a")
        model(IDS)
    profile = recorder.profile()
    assert profile.tokens.tolist() == [IDS.numel()]
    assert int(profile.counts[site][0, 3]) == IDS.numel()
    assert float(profile.sums[site][0, 3]) == 2.0 * IDS.numel()
    assert profile.metadata["edited"] is True


@torch.no_grad()
def test_a_probe_of_steering_leaves_what_a_recorder_counted(model):
    with lf.record(model, ["a", "b"]) as recorder:
        recorder.set(groups=torch.ones_like(IDS))
        model(IDS)
        before = recorder.profile()
        with lf.steer(model, edit_of(model)):
            after = recorder.profile()
        model(IDS)
    assert torch.equal(before.tokens, after.tokens)
    assert_counts(after.counts, before.counts)
    twice = recorder.profile()
    assert torch.equal(twice.tokens, 2 * before.tokens)
    assert_counts(twice.counts, {site: 2 * counted for site, counted in before.counts.items()})


def test_a_second_recorder_is_refused_naming_the_first(model):
    with lf.record(model, ["english", "danish"]):
        placed = plain.attributes(model)
        with pytest.raises(InputError, match="recorder is already placed.*english, danish"):
            lf.record(model, ["b"])
        with pytest.raises(InputError, match="recorder is already placed"):
            lf.record(models.bare_model(model), ["b"])
        plain.assert_untouched(placed, model)


def test_a_second_steering_is_refused_naming_the_first(model):
    with lf.steer(model, edit_of(model)):
        with pytest.raises(InputError, match="steering is already placed.*2 neurons in 1 site"):
            lf.steer(model, edit_of(model))


def test_a_recorder_on_a_part_of_a_recorded_model_is_refused():
    model = by_name("t5").build()
    with lf.record(model, ["a"]) as recorder:
        placed = plain.attributes(model)
        with pytest.raises(InputError, match="remove that first"):
            lf.record(model.encoder, ["a"])
        plain.assert_untouched(placed, model)
        assert recorder.unproven == []


@pytest.mark.parametrize("interruption", [RuntimeError, KeyboardInterrupt])
def test_an_exception_in_the_block_gives_the_model_back(model, interruption):
    before = plain.attributes(model)
    with pytest.raises(interruption), lf.record(model, ["a"]), lf.steer(model, edit_of(model)):
        raise interruption
    plain.assert_untouched(before, model)


def test_an_interruption_while_placing_gives_the_model_back(model, monkeypatch):
    before = plain.attributes(model)
    bare = models.bare_model(model)

    def interrupted(*args, **options):
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(type(bare), "forward", interrupted)
        with pytest.raises(KeyboardInterrupt):
            lf.record(model, ["a"])
    plain.assert_untouched(before, model)


def test_placing_uses_no_random_numbers_and_keeps_mixed_training_flags(llama):
    llama.train()
    llama.model.layers[0].mlp.eval()
    before = plain.attributes(llama)
    state = torch.get_rng_state()
    with lf.record(llama, ["a"]):
        pass
    assert torch.equal(torch.get_rng_state(), state)
    plain.assert_untouched(before, llama)


@torch.no_grad()
def test_a_deep_copy_of_a_placed_model_is_unpatched_and_computes_with_its_own_weights(model):
    name = "llama" if hasattr(model, "model") else "gpt2"
    before = plain.attributes(model)
    with lf.record(model, ["a"]) as recorder, lf.steer(model, edit_of(model)):
        recorder.set(groups=torch.zeros_like(IDS))
        duplicate = copy.deepcopy(model)
    recorder_tokens = recorder._stacks
    assert not any("lapefast" in key for m in duplicate.modules() for key in vars(m))
    copied = plain.attributes(duplicate)
    assert {path: list(values) for path, values in copied.items()} == {
        path: list(values) for path, values in before.items()
    }
    assert not models.bare_model(duplicate)._forward_pre_hooks
    for parameter in duplicate.parameters():
        parameter.mul_(1.5)
    reference = by_name(name).build(torch.bfloat16)
    for parameter in reference.parameters():
        parameter.mul_(1.5)
    assert plain.same(duplicate(IDS), reference(IDS))
    with lf.record(duplicate, ["a"]) as again:
        again.set(label="a")
        duplicate(IDS)
    assert_counts(recorded(again), plain_counts(name, reference))
    assert all(int(rows.tokens.sum()) == 0 for rows in recorder_tokens.values())


@torch.no_grad()
def test_a_placed_model_is_saved_as_the_plain_one_is(model, tmp_path):
    expected = model(IDS)
    plain_state = model.state_dict()
    with lf.record(model, ["a"]) as recorder, lf.steer(model, edit_of(model)):
        recorder.set(label="a")
        assert model.state_dict().keys() == plain_state.keys()
        loaded = pickle.loads(pickle.dumps(model))
        whole = io.BytesIO()
        torch.save(model, whole)
        model.save_pretrained(tmp_path / "placed")
    model.save_pretrained(tmp_path / "plain")
    whole.seek(0)
    for other in (loaded, torch.load(whole, weights_only=False)):
        assert plain.same(other(IDS), expected)
        assert not any("lapefast" in key for m in other.modules() for key in vars(m))
        with lf.record(other, ["a"]):
            pass
    placed, unplaced = (
        {file.name: file.read_bytes() for file in (tmp_path / name).iterdir()}
        for name in ("placed", "plain")
    )
    assert placed == unplaced


def test_a_model_saved_while_placed_loads_without_lapefast(llama, tmp_path):
    with lf.record(llama, ["a"]):
        torch.save(llama, tmp_path / "model.pt")
    code = (
        "import sys, torch, transformers; sys.modules['lapefast'] = None\n"
        f"torch.load({str(tmp_path / 'model.pt')!r}, weights_only=False)"
    )
    subprocess.run([sys.executable, "-c", code], check=True, cwd=tmp_path)


@torch.no_grad()
def test_a_model_moved_to_another_dtype_while_placed_computes_and_counts_right(llama):
    with lf.record(llama, ["a"]) as recorder:
        llama.to(torch.bfloat16)
        recorder.set(label="a")
        output = llama(IDS)
    profile = recorder.profile()
    assert plain.same(output, llama(IDS))
    assert_counts(profile.counts, plain_counts("llama", llama))
    assert profile.metadata["dtype"] == "bfloat16"


def test_a_model_moved_to_another_device_while_placed_is_refused(llama):
    with lf.record(llama, ["a"]) as recorder:
        recorder.set(label="a")
        llama.to("meta")
        with pytest.raises(InputError, match="layers.0.mlp: .* on cpu.*place again"):
            llama.model.layers[0].mlp(torch.ones(3, 8, 32, device="meta"))


@torch.no_grad()
def test_a_forward_put_over_ours_is_left_and_ours_passes_through(llama):
    expected = llama(IDS)
    before = plain.attributes(llama)
    ffn = llama.model.layers[0].mlp
    recorder = lf.record(llama, ["a"])
    ours = ffn.forward
    ffn.forward = lambda x: 2 * ours(x) - ours(x)
    with pytest.raises(InputError, match="layers.0.mlp was replaced.*undo that"):
        recorder.remove()
    recorder.remove()
    assert "forward" not in vars(llama.model.layers[1].mlp)
    assert torch.equal(ours(torch.ones(1, 32)), type(ffn).forward(ffn, torch.ones(1, 32)))
    with pytest.raises(InputError, match="layers.0.mlp"):
        lf.record(llama, ["a"])
    ffn.forward = ours
    with lf.record(llama, ["a"]):
        pass
    plain.assert_untouched(before, llama)
    assert plain.same(llama(IDS), expected)


@torch.no_grad()
def test_somebody_elses_forward_on_an_ffn_is_kept_and_its_activation_counted(llama):
    ffn = llama.model.layers[0].mlp

    def halved(self, x):
        return self.down_proj(self.act_fn(self.gate_proj(x) / 2) * self.up_proj(x))

    ffn.forward = types.MethodType(halved, ffn)
    before = plain.attributes(llama)
    expected = llama(IDS)
    counts = plain_counts("llama", llama)
    with lf.record(llama, ["a"]) as recorder:
        recorder.set(label="a")
        assert plain.same(llama(IDS), expected)
    assert_counts(recorded(recorder), counts)
    plain.assert_untouched(before, llama)


@torch.no_grad()
def test_replaced_ffns_may_share_one_activation_module(llama):
    first, second = (layer.mlp for layer in llama.model.layers)
    counts = plain_counts("llama", llama)
    second.act_fn = first.act_fn
    expected = llama(IDS)
    with lf.record(llama, ["a"]) as recorder:
        recorder.set(label="a")
        assert plain.same(llama(IDS), expected)
    assert_counts(recorded(recorder), counts)


@pytest.mark.parametrize("position", [0, 1])
@torch.no_grad()
def test_ffns_that_share_an_activation_are_told_apart_where_one_keeps_its_forward(llama, position):
    counts = plain_counts("llama", llama)
    ffns = [layer.mlp for layer in llama.model.layers]
    ffns[1].act_fn = ffns[0].act_fn
    owner = ffns[position]
    owner.forward = types.MethodType(lambda self, x: type(self).forward(self, x), owner)
    before = plain.attributes(llama)
    expected = llama(IDS)
    with lf.record(llama, ["a"]) as recorder:
        recorder.set(label="a")
        assert plain.same(llama(IDS), expected)
    assert_counts(recorded(recorder), counts)
    plain.assert_untouched(before, llama)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_plain_ffns_may_share_one_activation_module_also_with_another_model(dtype):
    """As GPT-1's do: transformers makes one module for all models of a process."""
    config = transformers.OpenAIGPTConfig(
        vocab_size=97, n_positions=64, n_embd=32, n_layer=3, n_head=4
    )
    model, other = (transformers.OpenAIGPTLMHeadModel(config).to(dtype).eval() for _ in range(2))
    ffns = {f"h.{i}.mlp": block.mlp for i, block in enumerate(model.transformer.h)}
    shared_by_all = {
        ffn.act for one in (model, other) for ffn in one.modules() if hasattr(ffn, "act")
    }
    assert len(shared_by_all) == 1
    products = {}
    for site, ffn in ffns.items():
        ffn.c_proj.register_forward_pre_hook(
            lambda module, given, site=site: products.update({site: given[0]})
        )
    expected, untouched = model(IDS), other(IDS)
    counts = {site: plain.counts([one], torch.zeros_like(IDS), 1) for site, one in products.items()}
    before = plain.attributes(model)
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        assert plain.same(model(IDS), expected)
        assert plain.same(other(IDS), untouched)
    assert_counts(recorded(recorder), counts)
    with lf.steer(model, edit_of(model)):  # of the first FFN alone
        assert not plain.same(model(IDS), expected)
        assert plain.same(other(IDS), untouched)
    edited, *unedited = (products[site][..., [0, 3]] for site in ffns)
    assert not edited.any()
    assert all(one.any() for one in unedited)
    assert {ffn.act for ffn in ffns.values()} == shared_by_all
    plain.assert_untouched(before, model)


def test_a_shared_activation_that_cannot_be_copied_is_refused_and_nothing_is_changed():
    model = by_name("gpt2").build()

    class Uncopied(nn.ReLU):
        def __copy__(self):
            raise RuntimeError("no copies")

    for block in model.transformer.h:
        block.mlp.act = model.transformer.h[0].mlp.act
    model.transformer.h[1].mlp.act = model.transformer.h[0].mlp.act = Uncopied()
    before = plain.attributes(model)
    with pytest.raises(InputError, match=r"h.0.mlp shares .* Uncopied can't be copied \(no copies"):
        lf.record(model, ["a"])
    plain.assert_untouched(before, model)


@torch.no_grad()
def test_a_shared_activation_under_hooks_of_accelerate_is_placed_and_keeps_its_mode():
    from accelerate.hooks import AlignDevicesHook, add_hook_to_module

    model = by_name("gpt2").build()
    blocks = model.transformer.h
    blocks[1].mlp.act = blocks[0].mlp.act
    for module in list(model.modules()):
        add_hook_to_module(module, AlignDevicesHook(execution_device="cpu", io_same_device=True))
    expected, before = model(IDS), plain.attributes(model)
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")
        assert plain.same(model(IDS), expected)
    assert all(counts.any() for counts in recorded(recorder).values())
    plain.assert_untouched(before, model)
    recorder = lf.record(model, ["a"])
    model.train()
    recorder.remove()
    assert all(module.training for module in model.modules())


def test_an_activation_that_is_a_function_is_refused():
    model = by_name("gpt2").build()
    ffn = model.transformer.h[1].mlp
    del ffn.act
    ffn.act = torch.nn.functional.gelu
    with pytest.raises(InputError, match=r"h.1.mlp \(GPT2MLP\) calls its activation as a function"):
        lf.record(model, ["a"])


def test_an_activation_wider_than_the_last_projection_is_refused_by_name(llama):
    class Gated(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(32, 80), nn.SiLU(), nn.Linear(40, 32)

        def forward(self, hidden):
            gate, up = self.act(self.fc1(hidden)).chunk(2, dim=-1)
            return self.fc2(gate * up)

    llama.model.layers[1].mlp = Gated()
    with pytest.raises(InputError, match=r"layers.1.mlp: expected .* width 40, got \[3, 8, 80\]"):
        lf.record(llama, ["a"])


@pytest.mark.parametrize(
    ("last", "message"),
    [
        (1.0, "layers.1.mlp: the placed forward differs from LlamaMLP's own"),
        (0.0, "layers.1.mlp: the placed counts differ from those of LlamaMLP's own activations"),
    ],
)
def test_an_activation_that_is_another_at_every_call_is_refused_by_name(llama, last, message):
    class Alternating(nn.Module):
        signs = itertools.cycle((1, -1))

        def forward(self, gate):
            return gate * next(self.signs)

    ffn = llama.model.layers[1].mlp
    ffn.act_fn = Alternating()
    with torch.no_grad():
        ffn.down_proj.weight.mul_(last)  # by 0, outputs agree
    before = plain.attributes(llama)
    with pytest.raises(InputError, match=message):
        lf.record(llama, ["a"])
    plain.assert_untouched(before, llama)


def test_an_activation_that_is_no_tensor_is_refused_by_name():
    """As I-BERT's, which comes with its scale."""

    class WithScale(nn.GELU):
        def forward(self, hidden):
            return super().forward(hidden), torch.ones(1)

    class Quantised(nn.Module):
        def __init__(self):
            super().__init__()
            self.fc1, self.act, self.fc2 = nn.Linear(32, 40), WithScale(), nn.Linear(40, 32)

        def forward(self, hidden):
            activation, scale = self.act(self.fc1(hidden))
            return self.fc2(activation * scale)

    model = by_name("llama").build()
    model.model.layers[1].mlp = Quantised()
    before = plain.attributes(model)
    with pytest.raises(InputError, match=r"layers.1.mlp: its activation module returns a tuple"):
        lf.record(model, ["a"])
    plain.assert_untouched(before, model)


def test_an_ffn_that_runs_without_its_activation_is_refused_by_name(llama):
    ffn = llama.model.layers[1].mlp
    ffn.forward = types.MethodType(lambda self, x: x, ffn)
    before = plain.attributes(llama)
    with pytest.raises(InputError, match="layers.1.mlp runs without calling its activation"):
        lf.record(llama, ["a"])
    plain.assert_untouched(before, llama)


def test_a_model_of_which_no_ffn_runs_is_refused(llama):
    llama.model.forward = types.MethodType(
        lambda self, input_ids, use_cache=None: self.embed_tokens(input_ids), llama.model
    )
    with pytest.raises(InputError, match="none of the FFNs of LlamaModel runs"):
        lf.record(llama, ["a"])


def test_an_ffn_that_sees_other_rows_than_the_tokens_is_refused_by_name():
    model = by_name("bert").build()
    model.bert.encoder.layer[1].chunk_size_feed_forward = 4
    before = plain.attributes(model)
    with pytest.raises(InputError, match=r"encoder.layer.1 saw 12 rows .* has 24 tokens"):
        lf.record(model, ["a"])
    plain.assert_untouched(before, model)


def test_rows_in_another_order_than_the_tokens_are_refused():
    config = transformers.XLNetConfig(
        vocab_size=97, d_model=32, n_layer=2, n_head=4, d_inner=52, ff_activation="gelu"
    )
    model = transformers.XLNetModel(config).eval()
    with pytest.raises(InputError, match="layer.0.ff saw rows .* another order"):
        lf.record(model, ["a"])


@pytest.mark.parametrize("part", ["gate_proj", "up_proj", "act_fn", "down_proj"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_hooks_of_others_see_the_same_values_while_placed(part, dtype):
    model = by_name("llama").build(dtype)
    modules = {site: model.model.get_submodule(f"{site}.{part}") for site in SITES}
    held = []  # the very tensors, not copies: writing over them would show
    hook = lambda module, args, output: held.append((*args, output))  # noqa: E731
    handles = [module.register_forward_hook(hook) for module in modules.values()]
    model(IDS)
    expected, held[:] = [tuple(t.clone() for t in one) for one in held], []
    with lf.record(model, ["a"]) as recorder:
        held.clear()
        recorder.set(label="a")
        model(IDS)
        assert len(held) == len(expected)
        for seen, wanted in zip(held, expected, strict=True):
            assert all(map(torch.equal, seen, wanted))
    for handle in handles:
        handle.remove()
    assert_counts(recorded(recorder), plain_counts("llama", model))


@torch.no_grad()
def test_hooks_for_every_module_see_the_same_values_while_placed():
    model = shared("llama", torch.bfloat16)
    held = []

    def hook(module, args, output):
        if isinstance(module, nn.Linear):
            held.append(output)

    handle = nn.modules.module.register_module_forward_hook(hook)
    try:
        model(IDS)
        expected, held[:] = [one.clone() for one in held], []
        with lf.record(model, ["a"]) as recorder:
            held.clear()
            recorder.set(label="a")
            model(IDS)
            assert len(held) == len(expected)
            assert all(map(torch.equal, held, expected))
    finally:
        handle.remove()


@torch.no_grad()
def test_a_hook_that_changes_an_activation_is_counted_as_changed(model):
    name = "llama" if hasattr(model, "model") else "gpt2"
    activations = by_name(name).activations(model)
    handles = [
        module.register_forward_hook(lambda module, args, output: output - 0.25)
        for module in activations.values()
    ]
    try:
        expected = model(IDS)
        counts = plain_counts(name, model)
        if name == "llama":
            with lf.record(model, ["a"]) as recorder:
                recorder.set(label="a")
                assert plain.same(model(IDS), expected)
            assert_counts(recorded(recorder), counts)
    finally:
        for handle in handles:
            handle.remove()


@pytest.mark.parametrize("recorder_on", [True, False])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@pytest.mark.parametrize("name", ["llama", "gpt2", "t5-v1.1", "phi3", "opt"])
def test_gradients_with_something_placed_equal_those_without(name, dtype, recorder_on):
    family = by_name(name)
    model = family.build(dtype).train()
    for module in model.modules():
        if isinstance(module, nn.Dropout):
            module.p = 0.0
        if isinstance(getattr(module, "dropout", None), float):
            module.dropout = 0.0
    labels = IDS.flip(1)[:, :5].contiguous() if model.config.is_encoder_decoder else IDS

    def gradients():
        model.zero_grad()
        output = family.call(model, labels=labels)
        output.loss.backward()
        return output.loss.detach(), [p.grad.clone() for p in model.parameters()]

    loss, expected = gradients()
    if recorder_on:
        handle = lf.record(model, ["a"], statistics=("counts", "sums"))
        handle.set(label="a")
    else:
        handle = lf.steer(model, lf.scale({next(iter(family.sites)): [0, 5]}, 1.0))
    with handle:
        placed_loss, placed = gradients()
    assert torch.equal(loss, placed_loss)
    assert all(map(torch.equal, expected, placed))


def test_a_gradient_of_up_alone_works_while_placed(llama):
    llama.requires_grad_(False)
    llama.model.layers[0].mlp.up_proj.weight.requires_grad_(True)

    def gradient():
        llama.zero_grad()
        llama(IDS, labels=IDS).loss.backward()
        return llama.model.layers[0].mlp.up_proj.weight.grad.clone()

    expected = gradient()
    with lf.record(llama, ["a"]) as recorder:
        recorder.set(label="a")
        assert torch.equal(gradient(), expected)


@pytest.mark.filterwarnings("ignore::FutureWarning")
@pytest.mark.parametrize("reentrant", [True, False])
def test_gradient_checkpointing_counts_each_token_once(llama, reentrant):
    llama.train()
    counts = plain_counts("llama", llama)

    def gradients():
        llama.zero_grad()
        llama(IDS, labels=IDS).loss.backward()
        return [p.grad.clone() for p in llama.parameters()]

    llama.gradient_checkpointing_enable({"use_reentrant": reentrant})
    llama.enable_input_require_grads()
    expected = gradients()
    with lf.record(llama, ["a"]) as recorder:
        recorder.set(label="a")
        assert all(map(torch.equal, gradients(), expected))
    profile = recorder.profile()
    assert profile.tokens.tolist() == [IDS.numel()]
    assert_counts(profile.counts, counts)


@torch.no_grad()
def test_autocast_computes_and_counts_as_without(llama):
    with torch.autocast("cpu", torch.bfloat16):
        expected = llama(IDS)
        counts = plain_counts("llama", llama)
        with lf.record(llama, ["a"]) as recorder:
            recorder.set(label="a")
            assert plain.same(llama(IDS), expected)
    assert_counts(recorded(recorder), counts)


def test_inference_mode_around_some_of_the_steps_works(model):
    name = "llama" if hasattr(model, "model") else "gpt2"
    counts = plain_counts(name, model)
    with torch.inference_mode():
        recorder = lf.record(model, ["a", "b"])
        recorder.set(groups=torch.zeros_like(IDS))
        model(IDS)
    with recorder, torch.no_grad():
        recorder.set(groups=torch.zeros_like(IDS))
        model(IDS)
    profile = recorder.profile()
    assert profile.tokens.tolist() == [2 * IDS.numel(), 0]
    for site, counted in counts.items():
        assert torch.equal(profile.counts[site][:1], 2 * counted)


def in_threads(work, arguments):
    failures = []

    def run(*given):
        try:
            work(*given)
        except BaseException as error:
            failures.append(error)

    threads = [threading.Thread(target=run, args=given) for given in arguments]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failures == []


def test_two_models_run_in_two_threads():
    names = ("llama", "gpt2")
    built = [shared(name, torch.bfloat16) for name in names]
    counts = [plain_counts(name, model) for name, model in zip(names, built, strict=True)]
    with lf.record(built[0], ["a"]) as first, lf.record(built[1], ["a"]) as second:

        def work(model, recorder):
            with torch.no_grad():
                for _ in range(5):
                    recorder.set(label="a")
                    model(IDS)

        in_threads(work, [(built[0], first), (built[1], second)])
    for recorder, expected in zip((first, second), counts, strict=True):
        five = {site: 5 * counted for site, counted in expected.items()}
        assert_counts(recorded(recorder), five)


def test_one_model_runs_in_two_threads_with_one_label(model):
    name = "llama" if hasattr(model, "model") else "gpt2"
    # Large enough that the kernels give up the interpreter's lock.
    ids = IDS.repeat(8, 7)
    counts = plain_counts(name, model, ids)
    with lf.record(model, ["a"]) as recorder:
        recorder.set(label="a")

        def work():
            with torch.no_grad():
                for _ in range(5):
                    model(ids)

        in_threads(work, [()] * 4)
    profile = recorder.profile()
    assert profile.tokens.tolist() == [20 * ids.numel()]
    assert_counts(profile.counts, {site: 20 * counted for site, counted in counts.items()})


@torch.no_grad()
def test_an_ffn_that_drops_rows_after_its_proof_is_refused_by_name(llama):
    """As models do that take padding out when they are given a mask."""
    with lf.record(llama, ["a"]) as recorder:
        recorder.set(label="a", mask=torch.ones_like(IDS))
        ffn = llama.model.layers[1].mlp
        hook = ffn.register_forward_pre_hook(lambda module, args: (args[0][:, 1:],))
        with pytest.raises(InputError, match="layers.1.mlp: .*groups must be .*21 elements"):
            llama(IDS)
        hook.remove()


@torch.no_grad()
def test_the_comparison_on_a_device_asks_the_class_and_counts_nothing(monkeypatch):
    # As on a GPU, where nothing is proven before; GPT-2 is handled at its activation.
    monkeypatch.setattr("lapefast.ops.exact._PROVEN", ())
    monkeypatch.setattr("lapefast.ops.exact._found", {})
    model = shared("gpt2", torch.bfloat16)
    activations = by_name("gpt2").activations(model)
    seen = []
    hooks = [
        module.register_forward_hook(lambda module, args, output: seen.append(output.shape))
        for module in activations.values()
    ]
    with plain.hooked(activations) as outputs:
        by_name("gpt2").call(model)
    seen.clear()
    with lf.record(model, ["a"]) as recorder:
        assert set(recorder.how.values()) == {"fused"}
        assert all(shape.numel() < 65536 for shape in seen)
        recorder.set(label="a")
        by_name("gpt2").call(model)
    for hook in hooks:
        hook.remove()
    counts = recorder.profile().counts
    for site, (activation,) in outputs.items():
        assert torch.equal(counts[site][0], (activation > 0).flatten(0, -2).sum(0))

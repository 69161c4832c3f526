from __future__ import annotations

import logging

import plain
import pytest
import torch
from families import IDS, by_name, shared

import lapefast as lf
from lapefast import models
from lapefast.errors import InputError
from lapefast.models import placed
from lapefast.ops.backends import why_not

LABELS = ["en", "zh"]
STATISTICS = ("counts", "sums", "square_sums", "up_abs_sums")
LEFT = torch.tensor([[0, 0, 0, 1, 1, 1, 1, 1], [1] * 8, [0] * 7 + [1]])
RIGHT = LEFT.flip(1)
GROUPS = torch.tensor([[0, 1, -1, 0, 1, -1, 0, 1], [0] * 8, [-1] * 8])


@pytest.fixture(params=["llama", "phi3", "gpt2", "opt"])
def name(request):
    return request.param


@pytest.fixture
def llama():
    return shared("llama")


@torch.no_grad()
def activations(name, model, ids=IDS, **options):
    family = by_name(name)
    with plain.hooked(family.activations(model)) as seen:
        family.call(model, ids, **options)
    return seen


def assert_counts(profile, seen, groups, threshold=0.0):
    for site, calls in seen.items():
        expected = plain.counts(calls, groups, len(profile.labels), threshold)
        assert torch.equal(profile.counts[site], expected), site


@pytest.mark.parametrize("mask", [LEFT, RIGHT, LEFT.bool(), LEFT.float()], ids=lambda m: str(m[0]))
@torch.no_grad()
def test_padding_counts_nowhere(name, mask):
    model = shared(name, torch.bfloat16)
    with lf.record(model, LABELS) as recorder:
        recorder.set(label="zh", mask=mask)
        output = model(IDS, attention_mask=mask.long())
    profile = recorder.profile()
    groups = torch.where(mask != 0, 1, -1)
    assert profile.tokens.tolist() == [0, int((mask != 0).sum())]
    assert_counts(profile, activations(name, model, attention_mask=mask.long()), groups)
    assert plain.same(output, model(IDS, attention_mask=mask.long()))


@torch.no_grad()
def test_labels_mix_within_a_batch_and_a_mask_holds_beside_them(name):
    model = shared(name, torch.bfloat16)
    seen = activations(name, model)
    for groups, mask in ((GROUPS, None), (GROUPS.int(), LEFT), (GROUPS.to(torch.int8), RIGHT)):
        with lf.record(model, LABELS) as recorder:
            recorder.set(groups=groups, mask=mask)
            model(IDS)
        kept = GROUPS if mask is None else torch.where(mask != 0, GROUPS, -1)
        profile = recorder.profile()
        assert profile.tokens.tolist() == [int((kept == i).sum()) for i in range(2)]
        assert_counts(profile, seen, kept)


@torch.no_grad()
def test_batches_of_changing_shape_and_label_add_up(llama):
    batches = [(IDS, "en"), (IDS[:2, :5], "zh"), (IDS[:, :1], "en"), (IDS, "zh"), (IDS, "zh")]
    expected = {}
    with lf.record(llama, LABELS) as recorder:
        for ids, label in batches:
            recorder.set(label=label)
            llama(ids)
    for ids, label in batches:
        groups = torch.full_like(ids, LABELS.index(label))
        for site, calls in activations("llama", llama, ids).items():
            expected[site] = expected.get(site, 0) + plain.counts(calls, groups, 2)
    profile = recorder.profile()
    assert profile.tokens.tolist() == [27, 58]
    for site, counted in expected.items():
        assert torch.equal(profile.counts[site], counted)


@torch.no_grad()
def test_what_was_set_last_holds_for_the_passes_after_it(llama):
    with lf.record(llama, LABELS) as recorder:
        recorder.set(label="en")
        recorder.set(label="zh")
        llama(IDS)
        llama(IDS)
    assert recorder.profile().tokens.tolist() == [0, 2 * IDS.numel()]


@torch.no_grad()
def test_groups_and_masks_of_the_caller_are_copied(llama):
    groups = torch.zeros_like(IDS).int()
    with lf.record(llama, LABELS) as recorder:
        recorder.set(groups=groups)
        groups.fill_(1)
        llama(IDS)
        recorder.set(groups=torch.ones_like(groups))
        llama(IDS)
    assert recorder.profile().tokens.tolist() == [IDS.numel(), IDS.numel()]
    assert bool((groups == 1).all())


@torch.no_grad()
def test_embeddings_are_an_input_too(llama):
    embedded = llama.get_input_embeddings()(IDS)
    with lf.record(llama, LABELS) as recorder:
        recorder.set(label="en")
        llama(inputs_embeds=embedded)
        llama.model(IDS)
    assert recorder.profile().tokens.tolist() == [2 * IDS.numel(), 0]


@torch.no_grad()
def test_generation_is_recorded_token_by_token(llama):
    with lf.record(llama, LABELS) as recorder:
        recorder.set(label="en")
        llama.generate(IDS, max_new_tokens=3, do_sample=False, eos_token_id=None)
    # The last new token is never fed to the model.
    assert recorder.profile().tokens.tolist() == [IDS.numel() + 2 * len(IDS), 0]


@pytest.mark.parametrize(
    ("given", "message"),
    [
        ({}, "either a label or groups"),
        ({"label": "en", "groups": GROUPS}, "either a label or groups"),
        ({"label": "fr"}, "'fr' is none of these labels: en, zh"),
        ({"label": "en", "mask": torch.ones(24)}, r"mask must be \[batch, length\].*\[24\]"),
        ({"label": "en", "mask": torch.ones(3, 1, 8, 8)}, r"mask must be .*\[3, 1, 8, 8\]"),
        ({"groups": GROUPS.reshape(-1)}, r"groups must be \[batch, length\]"),
        ({"groups": GROUPS + 1}, "groups holds 2, but there are 2 labels"),
        ({"groups": GROUPS - 1}, "groups holds -2"),
        ({"groups": GROUPS.float()}, "groups must be integers .* torch.float32"),
        ({"groups": GROUPS > 0}, "groups must be integers .* torch.bool"),
        ({"groups": GROUPS, "mask": LEFT[:2]}, r"one shape, got \[2, 8\] and \[3, 8\]"),
        ({"label": "en", "decoder_mask": LEFT}, "decoder_mask and decoder_groups are for"),
    ],
)
def test_what_can_not_be_meant_is_refused(llama, given, message):
    with lf.record(llama, LABELS) as recorder:
        with pytest.raises(InputError, match=message):
            recorder.set(**given)


@torch.no_grad()
def test_a_mask_of_another_shape_than_the_input_is_refused_by_the_model(llama):
    with lf.record(llama, LABELS) as recorder:
        for mask in (LEFT[:2], LEFT.T):
            recorder.set(label="en", mask=mask)
            with pytest.raises(InputError, match=r"input is \[3, 8\] tokens.*was given"):
                llama(IDS)
        recorder.set(label="en", mask=LEFT)
        llama(IDS)
    assert recorder.profile().tokens.tolist() == [int(LEFT.sum()), 0]


@torch.no_grad()
def test_a_model_that_runs_before_anything_was_set_is_told(llama):
    with lf.record(llama, LABELS), pytest.raises(InputError, match="call recorder.set"):
        llama(IDS)


@torch.no_grad()
def test_a_pass_without_tokens_or_embeddings_is_refused(llama):
    with lf.record(llama, LABELS) as recorder:
        recorder.set(label="en")
        for given in ({}, {"input_ids": IDS[0]}):
            with pytest.raises(InputError, match="called without input_ids or inputs_embeds"):
                llama(**given)


def test_what_another_recorder_counted_is_not_taken_over(llama):
    with lf.record(llama, LABELS, ("counts", "sums")) as recorder:
        whole = recorder.whole()
    with lf.record(llama, LABELS) as recorder:
        with pytest.raises(InputError, match="of another model or other statistics"):
            recorder.restore(whole)


@pytest.mark.parametrize("how", ["no pass", "all padding"])
@torch.no_grad()
def test_nothing_recorded_is_an_error(llama, how):
    with lf.record(llama, LABELS) as recorder:
        recorder.set(label="en", mask=torch.zeros_like(IDS))
        if how == "all padding":
            llama(IDS)
        with pytest.raises(InputError, match="nothing was recorded"):
            recorder.profile()


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"labels": []}, "labels must be a list of names"),
        ({"labels": "en"}, "labels must be a list of names"),
        ({"labels": ["en", "en"]}, "labels must differ"),
        ({"labels": ["en", "\ud800"]}, "strings without lone surrogates"),
        ({"statistics": ("means",)}, "statistics must be some of .*'means'"),
        ({"statistics": ()}, "statistics must be some of"),
        ({"threshold": float("nan")}, "threshold must be a number"),
        ({"threshold": "high"}, "threshold must be a number"),
        ({"backend": "abacus"}, "backend must be one of .*'abacus'"),
    ],
)
def test_a_recorder_that_can_not_be_is_refused_and_the_model_kept(llama, options, message):
    before = plain.attributes(llama)
    with pytest.raises(InputError, match=message):
        lf.record(llama, **{"labels": LABELS, **options})
    plain.assert_untouched(before, llama)


def test_a_model_in_another_dtype_is_refused():
    with pytest.raises(InputError, match="computes in torch.float64; lapefast takes"):
        lf.record(by_name("llama").build().double(), LABELS)


def test_a_model_without_ffns_is_refused():
    with pytest.raises(InputError, match="Linear has no feed-forward block.*adding-a-model"):
        lf.record(torch.nn.Linear(3, 3), LABELS)


def test_statistics_that_a_models_own_code_hides_are_refused_by_name():
    for name, statistic in (("bitnet", "square_sums"), ("bitnet", "up_abs_sums"),
                            ("gpt2", "up_abs_sums")):  # fmt: skip
        with pytest.raises(InputError, match=f"{statistic} can't be recorded at"):
            lf.record(shared(name), LABELS, statistics=("counts", statistic))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_sums_equal_a_float64_oracle(dtype):
    model = shared("llama", dtype)
    modules = {
        f"{site}.{part}": model.model.get_submodule(f"{site}.{part}")
        for site in by_name("llama").sites
        for part in ("act_fn", "up_proj")
    }
    with plain.hooked(modules) as seen:
        model(IDS)
    with lf.record(model, LABELS, statistics=STATISTICS) as recorder:
        recorder.set(groups=GROUPS)
        model(IDS)
    profile = recorder.profile()
    for site in profile.sites:
        activation, up = (seen[f"{site}.{part}"][0].reshape(24, 52) for part in
                          ("act_fn", "up_proj"))  # fmt: skip
        parts = {
            "sums": activation.double(),
            "square_sums": (activation * up).double().square(),
            "up_abs_sums": up.double().abs(),
        }
        for statistic, values in parts.items():
            for group in range(2):
                chosen = values[GROUPS.reshape(-1) == group]
                # Up to 64 rows are added in float32: at most n roundings of at most the sum of
                # the absolute values; a square rounds once more, or underflows.
                bound = (len(chosen) + 1) * 2.0**-24 * chosen.abs().sum(0)
                bound += len(chosen) * torch.finfo(torch.float32).tiny
                found = getattr(profile, statistic)[site][group]
                assert bool(((found - chosen.sum(0)).abs() <= bound).all()), (site, statistic)


@torch.no_grad()
def test_square_sums_of_a_plain_ffn_are_of_its_activations():
    model = shared("gpt2", torch.bfloat16)
    seen = activations("gpt2", model)
    with lf.record(model, LABELS, statistics=("square_sums",)) as recorder:
        recorder.set(label="en")
        model(IDS)
    for site, found in recorder.profile().square_sums.items():
        squares = seen[site][0].reshape(24, 52).double().square()
        bound = 25 * 2.0**-24 * squares.sum(0)
        assert bool(((found[0] - squares.sum(0)).abs() <= bound).all())


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@pytest.mark.parametrize("threshold", [0.1, -0.05, 1.0, 1e-3])
@torch.no_grad()
def test_the_threshold_is_compared_in_float32(name, dtype, threshold):
    model = shared(name, dtype)
    with lf.record(model, LABELS, threshold=threshold) as recorder:
        recorder.set(groups=GROUPS)
        model(IDS)
    profile = recorder.profile()
    assert_counts(profile, activations(name, model), GROUPS, threshold)
    assert profile.metadata["threshold"] == threshold


@torch.no_grad()
def test_an_activation_at_the_rounded_threshold_is_active_in_bfloat16():
    model = by_name("relu-llama").build(torch.bfloat16)
    # bfloat16(0.1) is above 0.1, so an activation of exactly that is active.
    act = model.model.layers[0].mlp.act_fn
    act.register_forward_hook(lambda module, args, output: torch.full_like(output, 0.1))
    with lf.record(model, LABELS, threshold=0.1) as recorder:
        recorder.set(label="en")
        model(IDS)
    assert bool((recorder.profile().counts["layers.0.mlp"][0] == IDS.numel()).all())


@pytest.mark.parametrize("name", ["t5", "t5-v1.1", "bart"])
@torch.no_grad()
def test_an_encoder_decoder_keeps_tokens_per_stack(name):
    family, model = by_name(name), shared(name, torch.bfloat16)
    decoder_mask = RIGHT[:, :5]
    with lf.record(model, LABELS) as recorder:
        recorder.set(label="zh", mask=LEFT, decoder_mask=decoder_mask)
        family.call(model, attention_mask=LEFT, decoder_attention_mask=decoder_mask)
        recorder.set(groups=GROUPS, decoder_groups=GROUPS[:, :5])
        family.call(model)
        with pytest.raises(InputError, match="need decoder_groups"):
            recorder.set(groups=GROUPS)
    profile = recorder.profile()
    masked = activations(name, model, attention_mask=LEFT, decoder_attention_mask=decoder_mask)
    mixed = activations(name, model)
    for site in profile.sites:
        decoder = site.startswith("decoder")
        mask = decoder_mask if decoder else LEFT
        groups = GROUPS[:, :5] if decoder else GROUPS
        expected = plain.counts(masked[site], torch.where(mask != 0, 1, -1), 2)
        expected += plain.counts(mixed[site], groups, 2)
        assert torch.equal(profile.counts[site], expected), site
        tokens = torch.stack([(groups == 0).sum(), (groups == 1).sum() + mask.sum()])
        assert torch.equal(profile.site_tokens(site), tokens)
    assert {site.stack for site in profile.site_info} == {"encoder", "decoder"}


@pytest.mark.parametrize("name", ["gemma", "gpt2", "quick-gelu-llama", "llama", "t5-v1.1"])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
@torch.no_grad()
def test_inexact_recording_fuses_what_a_kernel_exists_for_and_stays_close(name, dtype):
    family, model = by_name(name), shared(name, dtype)
    expected = family.call(model).logits.float()
    with lf.record(model, ["a"], exact=False) as recorder:
        recorder.set(label="a")
        found = family.call(model).logits.float()
        assert set(recorder.how.values()) == {"fused"}
    assert recorder.profile().metadata["exact"] is False
    # A few roundings of an activation each, through two layers: far below what a wrong formula
    # gives, which is of the size of the outputs themselves.
    assert (found - expected).abs().max() <= 64 * torch.finfo(dtype).eps * expected.abs().max()


@pytest.mark.skipif(
    why_not("cpu", "cpu") is not None,
    reason="the package was built without the native library; one with it compares two backends",
)
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16])
@torch.no_grad()
def test_backends_count_the_same(name, dtype, monkeypatch):
    model = shared(name, dtype)
    family = by_name(name)
    profiles, used = [], set()
    op = placed.ops.profile
    for backend in ("cpu", "reference", "LAPEFAST_BACKEND"):
        if backend == "LAPEFAST_BACKEND":
            monkeypatch.setenv("LAPEFAST_BACKEND", "reference")
            backend = None
        with lf.record(model, LABELS, statistics=("counts", "sums"), backend=backend) as recorder:
            used |= {s.backend for s in recorder._statistics.values()}
            recorder.set(groups=GROUPS)
            family.call(model)
        profiles.append(recorder.profile())
    assert op is placed.ops.profile
    assert used == {"cpu", "reference"}
    for other in profiles[1:]:
        for site, counted in profiles[0].counts.items():
            assert torch.equal(other.counts[site], counted)


def test_an_unknown_backend_in_the_environment_is_refused(llama, monkeypatch):
    monkeypatch.setenv("LAPEFAST_BACKEND", "abacus")
    with pytest.raises(InputError, match="'abacus'"):
        lf.record(llama, LABELS)


@pytest.mark.parametrize("name", ["llama", "gpt2", "bitnet"])
@pytest.mark.parametrize("bad", [float("nan"), float("inf")])
@torch.no_grad()
def test_activations_that_are_not_finite_are_named_by_site(name, bad):
    family = by_name(name)
    model = family.build(torch.bfloat16)
    with lf.record(model, LABELS) as recorder:
        recorder.set(label="en")
        family.call(model)
        good = recorder.profile()
        owner = model.get_submodule(f"{family.bare}.{list(family.sites)[1]}")
        gate = getattr(owner, "gate_proj", None) or owner.c_fc
        gate.weight[0, 0] = bad
        family.call(model)
        with pytest.raises(InputError, match=f"{list(family.sites)[1]}: .* not finite"):
            recorder.profile()
    assert good.tokens.tolist() == [IDS.numel(), 0]


@torch.no_grad()
def test_not_finite_activations_of_padding_do_no_harm():
    model = by_name("llama").build()
    last = model.model.layers[1].mlp.act_fn
    padding = torch.zeros(3, 8, 52, dtype=torch.bool)
    padding[:, -1] = True
    last.register_forward_hook(
        lambda module, args, output: (
            output.masked_fill(padding, float("nan")) if output.shape == padding.shape else None
        )
    )
    with lf.record(model, LABELS) as recorder:
        recorder.set(label="en", mask=RIGHT.new_ones(3, 8) - padding[..., 0].long())
        model(IDS)
    assert recorder.profile().tokens.tolist() == [21, 0]


@torch.no_grad()
def test_a_profile_taken_inside_the_block_is_a_copy(llama):
    with lf.record(llama, LABELS, statistics=STATISTICS) as recorder:
        recorder.set(label="en")
        llama(IDS)
        first = recorder.profile()
        held = {site: counted.clone() for site, counted in first.counts.items()}
        llama(IDS)
        inside = recorder.profile()
    after = recorder.profile()
    assert first.tokens.tolist() == [24, 0]
    for site, counted in held.items():
        assert torch.equal(first.counts[site], counted)
        assert torch.equal(inside.counts[site], 2 * counted)
        assert torch.equal(after.counts[site], 2 * counted)


def test_the_probe_leaves_statistics_and_flags_at_zero(name):
    with lf.record(shared(name), LABELS, statistics=("counts", "sums")) as recorder:
        for statistics in recorder._statistics.values():
            assert not any(bool(t.any()) for t in (*statistics.tensors().values(),
                                                   statistics.flags))  # fmt: skip
        assert all(not bool(rows.tokens.any()) for rows in recorder._stacks.values())


@torch.no_grad()
def test_memory_of_the_statistics_does_not_grow(llama):
    with lf.record(llama, LABELS, statistics=STATISTICS) as recorder:
        addresses = [
            tensor.data_ptr()
            for statistics in recorder._statistics.values()
            for tensor in statistics.tensors().values()
        ]
        recorder.set(groups=GROUPS)
        rows = [held.tensor.data_ptr() for held in recorder._stacks["decoder"].indices.values()]
        for _ in range(3):
            recorder.set(groups=GROUPS)
            llama(IDS)
        assert rows == [
            held.tensor.data_ptr() for held in recorder._stacks["decoder"].indices.values()
        ]
    assert addresses == [
        tensor.data_ptr()
        for statistics in recorder._statistics.values()
        for tensor in statistics.tensors().values()
    ]


@torch.no_grad()
def test_metadata_say_what_was_recorded(llama):
    with lf.record(llama, LABELS, threshold=0.5) as recorder:
        recorder.set(label="en")
        llama(IDS)
    metadata = recorder.profile().metadata
    assert metadata["fingerprint"] == models.fingerprint(llama)
    assert metadata["architecture"] == "LlamaForCausalLM"
    assert metadata["dtype"] == "float32"
    assert metadata["threshold"] == 0.5
    assert metadata["edited"] is False
    assert metadata["threads"] == torch.get_num_threads()
    assert metadata["versions"].keys() == {"lapefast", "torch", "transformers"}


@pytest.mark.parametrize("name", ["text", "encoder"])
@torch.no_grad()
def test_sites_that_no_token_reaches_are_left_out_and_named(name, caplog):
    class WithTower(torch.nn.Module):
        """A model with an FFN that text does not pass."""

        def __init__(self):
            super().__init__()
            self.add_module(name, by_name("llama").build().model)
            self.tower = by_name("gpt2").build().transformer.h[0].mlp
            self.config = getattr(self, name).config

        def forward(self, input_ids, use_cache=None):
            return getattr(self, name)(input_ids, use_cache=use_cache)

    model = WithTower()
    with lf.record(model, LABELS) as recorder:
        assert recorder.unproven == ["tower"]
        recorder.set(label="en")
        model(IDS)
    with caplog.at_level(logging.WARNING, "lapefast"):
        profile = recorder.profile()
    assert profile.sites == [f"{name}.layers.0.mlp", f"{name}.layers.1.mlp"]
    assert "tower" in caplog.text


@torch.no_grad()
def test_a_model_with_an_input_of_its_own_proves_itself_when_it_first_runs():
    class Own(torch.nn.Module):
        """A model that bare token ids do not run."""

        def __init__(self):
            super().__init__()
            self.text = by_name("llama").build().model
            self.config = self.text.config

        def forward(self, input_ids, style):
            return self.text(input_ids, use_cache=False)[0] * style

    model = Own()
    with lf.record(model, LABELS) as recorder:
        assert recorder.unproven == ["text.layers.0.mlp", "text.layers.1.mlp"]
        recorder.set(groups=GROUPS)
        model(IDS, 2.0)
        assert recorder.unproven == []
    with plain.hooked({f"text.{site}": model.text.get_submodule(path)
                       for site, path in by_name("llama").sites.items()}) as seen:  # fmt: skip
        model(IDS, 2.0)
    assert_counts(recorder.profile(), seen, GROUPS)

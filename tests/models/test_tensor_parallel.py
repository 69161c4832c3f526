"""Models whose layers are split over two processes, beside the same models in one."""

from __future__ import annotations

import json

import numpy as np
import pytest
import split_worker
import torch
import transformers
from families import IDS, VERSION_4, VOCABULARY, by_name
from launch import torchrun
from same_run import eager
from transformers import AutoModelForCausalLM

import lapefast as lf
from lapefast.detect.lape import criteria

MLP = "model.layers.*.mlp."
WHOLE_FFNS = dict.fromkeys((f"{MLP}gate_proj", f"{MLP}up_proj", f"{MLP}down_proj"), "replicate")
PACKED = {f"{MLP}gate_up_proj": "packed_colwise", f"{MLP}down_proj": "rowwise"}
TORN = {f"{MLP}gate_up_proj": "colwise", f"{MLP}down_proj": "rowwise"}

# case: model, dtype, plan where it is not the model's own, columns that each process computes
CASES = {
    "gated": ("llama", "float32", None, [26, 26]),
    "gated, bfloat16": ("llama", "bfloat16", None, [26, 26]),
    "plain": ("starcoder2", "float32", None, [26, 26]),
    "gathered before the activation": ("phi3", "float32", None, [52, 52]),
}
PLANS = {
    "odd width": ("odd", "float32", None, [26, 25]),
    "gate and up in one": ("phi3", "float32", PACKED, [26, 26]),
    "attention alone": ("llama", "float32", WHOLE_FFNS, [52, 52]),
    "gate and up torn": ("phi3", "float32", TORN, None),
    "no plan": ("gpt2", "float32", None, None),
}
if not VERSION_4:  # there, plans are the models' own, widths divide, and no plan splits nothing
    CASES |= PLANS
COUNTED = [case for case, given in CASES.items() if given[3] is not None]
SPLIT = [case for case in COUNTED if CASES[case][3] != [52, 52]]
FLOAT32 = [case for case in COUNTED if CASES[case][1] == "float32"]
RATES = {"top_rate": 0.2, "filter_rate": 0.5, "activation_bar_ratio": 0.6}


def save(name, path):
    if name != "odd":
        by_name(name).build().save_pretrained(path)
        return
    config = by_name("llama").options | {"intermediate_size": 51}
    torch.manual_seed(0)
    transformers.LlamaForCausalLM(transformers.LlamaConfig(**config)).save_pretrained(path)


@pytest.fixture(scope="module")
def directory(tmp_path_factory):
    """Saved models, and token ids of two labels: over a million comparisons in each."""
    path = tmp_path_factory.mktemp("models")
    for name in {given[0] for given in CASES.values()}:
        save(name, path / name)
    torch.manual_seed(0)
    corpora = {label: torch.randint(5, VOCABULARY, (rows, 64)) for label, rows in
               (("en", 100), ("zh", 80))}  # fmt: skip
    torch.save(corpora, path / "corpora.pt")
    (path / "cases.json").write_text(json.dumps({case: given[:3] for case, given in CASES.items()}))
    return path


@pytest.fixture(scope="module")
def ranks(directory, tmp_path_factory):
    """What each of two processes saw: case -> name -> value."""
    output = tmp_path_factory.mktemp("ranks")
    done = torchrun(split_worker.__file__, directory, output)
    assert done.returncode == 0, done.stderr
    said = [line for line in done.stderr.splitlines() if "Tensor parallelism over 2" in line]
    return [torch.load(output / f"{i}.pt", weights_only=False) for i in range(2)], len(said)


@pytest.fixture(scope="module")
def alone(directory):
    """A case's model in one process, and its profile."""

    def run(case):
        name, dtype = CASES[case][:2]
        model = AutoModelForCausalLM.from_pretrained(directory / name, dtype=getattr(torch, dtype))
        corpora = torch.load(directory / "corpora.pt")
        options = {"batch_size": split_worker.BATCH, "progress": False}
        return model.eval(), lf.profile(model, corpora, **options)

    held = {}
    return lambda case: held.setdefault(case, run(case))


def both(ranks, case, name):
    return [found[case][name] for found in ranks[0]]


@pytest.mark.parametrize("case", COUNTED)
def test_every_process_has_all_neurons_and_the_sites_of_the_plain_model(ranks, alone, case):
    _, expected = alone(case)
    for profile in both(ranks, case, "profile"):
        assert profile.site_info == expected.site_info
        assert profile.tokens.tolist() == expected.tokens.tolist() == [6400, 5120]
        assert profile.fingerprint == expected.fingerprint
        assert profile.metadata["tensor_parallel"] == 2
    assert "tensor_parallel" not in expected.metadata


@pytest.mark.parametrize("case", COUNTED)
def test_a_run_that_was_stopped_goes_on_to_the_same_counts(ranks, case):
    undisturbed = both(ranks, case, "profile")[0]
    for profile in both(ranks, case, "gone on"):
        assert torch.equal(profile.tokens, undisturbed.tokens)
        for site, counts in undisturbed.counts.items():
            assert torch.equal(profile.counts[site], counts)


@pytest.mark.parametrize("case", COUNTED)
def test_counts_equal_the_eager_expression_on_the_gates_of_that_run(ranks, case):
    name, columns = CASES[case][0], CASES[case][3]
    profiles, gates = both(ranks, case, "profile"), both(ranks, case, "gate")
    for site in profiles[0].sites:
        assert [gate[site][0].shape[1] for gate in gates] == columns
        for label in range(2):
            parts = [eager(name, gate[site][label]) for gate in gates]
            # Side by side in the order of the ranks; where each computes all, one is enough.
            values = torch.cat(parts, dim=1) if case in SPLIT else parts[0]
            active = (values > 0).sum(0)
            sums, scale = values.double().sum(0), values.double().abs().sum(0)
            for profile in profiles:
                assert torch.equal(profile.counts[site][label], active)
                # 64 roundings of each sum of 64 rows, and as many spacings for the activation,
                # which float32 rounds one way in a vector and another beside it.
                assert bool(((profile.sums[site][label] - sums).abs() <= 2**-17 * scale).all())


@pytest.mark.parametrize("case", FLOAT32)
def test_in_float32_the_plain_run_is_all_but_equal(ranks, alone, case):
    _, plain = alone(case)
    split = both(ranks, case, "profile")[0]
    comparisons = int(plain.tokens.sum()) * sum(site.width for site in plain.site_info)
    assert comparisons > 1e6
    difference = sum(
        int((split.counts[site] - plain.counts[site]).abs().sum()) for site in plain.sites
    )
    assert difference <= 1e-6 * comparisons

    chosen, expected = (lf.detect.lape(one, **RATES) for one in (split, plain))
    limits = criteria(plain, **RATES)
    offsets = np.cumsum([0, *(site.width for site in plain.site_info)])
    assert sum(len(expected[label][site]) for label in plain.labels for site in plain.sites) > 10
    for label in plain.labels:
        for site, offset in zip(plain.sites, offsets, strict=False):
            ours, theirs = (set(one[label][site].tolist()) for one in (chosen, expected))
            for neuron in ours ^ theirs:
                shares = limits.probabilities[:, offset + neuron]
                cuts = [limits.entropy[offset + neuron] - limits.cut, *(shares - limits.least),
                        *(shares - limits.bar)]  # fmt: skip
                assert min(map(abs, cuts)) <= 1e-6, (label, site, neuron)


@pytest.mark.parametrize("case", COUNTED)
@torch.no_grad()
def test_drained_statistics_are_of_all_neurons_and_start_anew(ranks, case):
    first, second = both(ranks, case, "drained")
    for site, statistics in first.items():
        width = both(ranks, case, "profile")[0].counts[site].shape[1]
        assert statistics["counts"].shape == (2, width)
        assert statistics["counts"][0].sum() == 0
        assert 0 < statistics["counts"][1].max() <= IDS.numel()
        assert torch.equal(statistics["counts"], second[site]["counts"])
    for after in both(ranks, case, "after"):
        assert not any(bool(values["counts"].any()) for values in after.values())


@pytest.mark.parametrize("case", FLOAT32)
@torch.no_grad()
def test_an_edit_reaches_its_neurons_wherever_they_are_computed(ranks, alone, case):
    model, profile = alone(case)
    site = profile.sites[0]
    width = profile.site_info[0].width
    edit = split_worker.edit_of(site, width)
    off = lf.deactivate({site: list(range(width))})
    expected = {"recorded": model(IDS).logits}
    for name, steered in (("steered", edit), ("listed", [None, off, edit])):
        with lf.steer(model, steered):
            expected[name] = model(IDS).logits
            generated = model.generate(IDS, **split_worker.GENERATION)
    scale = expected["recorded"].abs().max()
    assert (expected["steered"] - expected["recorded"]).abs().max() > 0.01 * scale
    assert (expected["listed"][1] - expected["recorded"][1]).abs().max() > 0.01 * scale
    for name, logits in expected.items():
        for found in both(ranks, case, name):
            # Two layers of sums in another order, a few spacings of float32 each.
            assert (found - logits).abs().max() <= 2**-17 * logits.abs().max(), name
    assert all(torch.equal(found, generated) for found in both(ranks, case, "generated"))
    for counts in both(ranks, case, "edited"):
        active = [int(counts[0, i]) for i in (0, width // 2 - 1, width // 2, width - 1)]
        assert active == [128] * 4


@pytest.mark.parametrize("case", COUNTED)
def test_what_needs_whole_layers_is_refused(ranks, case):
    for sizes in both(ranks, case, "sizes"):
        assert sizes == (2, 2)
    for messages in both(ranks, case, "refused"):
        fold, *others = messages
        assert "use lf.steer" in fold
        assert len(others) == 3
        assert all("over 2 processes by tensor parallelism" in message for message in others)


@pytest.mark.parametrize("case", COUNTED)
def test_processes_that_share_layers_cannot_share_the_text(ranks, case):
    for message in both(ranks, case, "text too"):
        assert "share the model's layers already" in message


@pytest.mark.skipif(VERSION_4, reason="transformers 4 takes no plan but the model's")
@pytest.mark.parametrize(
    ("case", "said"),
    [
        (
            "gate and up torn",
            "layers.0.mlp is split over processes in a way that lapefast does not",
        ),
        ("no plan", "`GPT2LMHeadModel` has no `tp_plan`"),
    ],
)
def test_what_can_not_be_split_is_refused(ranks, case, said):
    assert all(said in message for message in both(ranks, case, "error"))


def test_processes_agree_on_the_smallest_batch_that_fits_one(ranks):
    assert both(ranks, "gated", "least") == [3, 3]


@pytest.mark.parametrize("case", SPLIT)
def test_what_is_not_finite_in_one_process_is_raised_by_all(ranks, case):
    for message in both(ranks, case, "not finite"):
        assert message.startswith("layers.1.mlp: ")
        assert "not finite" in message


def test_one_process_says_that_the_arithmetic_is_another(ranks):
    # Each case but those refused places five recorders, and those that are split one more.
    assert ranks[1] == 5 * len(COUNTED) + len(SPLIT)

"""Experts: the clustering, who chooses them, what is read from that, and pruning."""

from __future__ import annotations

import itertools

import families
import numpy as np
import pytest
import torch
from families import IDS, by_name, shared
from tokenizers import Tokenizer, models, pre_tokenizers
from torch.nn import functional
from transformers import PreTrainedTokenizerFast

import lapefast as lf
from lapefast.detect.experts import Experts, experts
from lapefast.detect.experts.clustering import assign_evenly, equal_sizes, size_constrained_kmeans
from lapefast.detect.experts.hierarchy import leaf_order
from lapefast.detect.experts.pruning import prune, pruned_experts, random_experts_like
from lapefast.detect.experts.splitting import split_ffns, up_rows
from lapefast.detect.experts.use import ExpertUse
from lapefast.errors import InputError
from lapefast.evaluate import PerplexityMatrix
from lapefast.evaluate.pruning import pruning_matrix
from lapefast.models.bare import bare_model
from lapefast.models.structure import find_ffns

COUNT = 5  # WIDTH is 52, so that two experts have one neuron more
LABELS = ["en", "zh", "fr"]


# Clustering


@pytest.mark.parametrize(("rows", "clusters"), [(52, 5), (52, 52), (52, 1), (48, 16), (7, 4)])
def test_clusters_have_sizes_that_differ_by_one_at_most(rows, clusters):
    generator = torch.Generator().manual_seed(0)
    found = size_constrained_kmeans(torch.randn(rows, 8, generator=generator), clusters)
    assert found.dtype == torch.int64
    assert torch.equal(found.bincount(minlength=clusters), equal_sizes(rows, clusters))


def test_the_same_seed_gives_the_same_clusters_and_another_one_others():
    rows = torch.randn(60, 8, generator=torch.Generator().manual_seed(1))
    first, again, other = (size_constrained_kmeans(rows, 6, seed) for seed in (0, 0, 1))
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_rows_that_are_all_the_same_are_split_evenly():
    found = size_constrained_kmeans(torch.ones(12, 4), 4)
    assert found.bincount().tolist() == [3, 3, 3, 3]


@pytest.mark.parametrize("seed", range(3))
def test_rows_that_lie_in_two_heaps_are_split_into_these(seed):
    generator = torch.Generator().manual_seed(7)
    heap = torch.randperm(40, generator=generator) % 2
    centres = 10 * torch.eye(2, 6)
    rows = centres[heap] + torch.randn(40, 6, generator=generator)
    found = size_constrained_kmeans(rows, 2, seed)
    assert torch.equal(found, heap) or torch.equal(found, 1 - heap)


@pytest.mark.parametrize("seed", range(20))
def test_the_assignment_gains_as_much_as_the_best_of_all_within_its_bound(seed):
    gain = np.random.default_rng(seed).normal(size=(7, 3))
    sizes = np.array([3, 2, 2])
    found = assign_evenly(gain, sizes)
    assert np.bincount(found).tolist() == sizes.tolist()
    slots = np.repeat(np.arange(3), sizes)
    best = max(
        gain[np.arange(7), list(order)].sum() for order in set(itertools.permutations(slots))
    )
    # The auction's bound: rows times its last step; 1e-12 for the rounding of the sums.
    bound = len(gain) * 1e-3 * (gain.max() - gain.min()) + 1e-12
    assert best - bound <= gain[np.arange(7), found].sum() <= best + 1e-12


@pytest.mark.parametrize("clusters", [0, 53, -1, 2.0, True, None])
def test_more_experts_than_neurons_or_none_are_refused(clusters):
    with pytest.raises(InputError, match="52 neurons can be split into 1 to 52 experts"):
        size_constrained_kmeans(torch.randn(52, 4), clusters)


# Splitting FFNs

UP = {
    "llama": lambda mlp: mlp.up_proj.weight,
    "phi3": lambda mlp: mlp.gate_up_proj.weight[families.WIDTH :],
    "gpt2": lambda mlp: mlp.c_fc.weight.T,
    "gpt-neox": lambda mlp: mlp.dense_h_to_4h.weight,
    "opt": lambda layer: layer.fc1.weight,
    "bert": lambda layer: layer.intermediate.dense.weight,
    "nemotron": lambda mlp: mlp.up_proj.weight,
    "falcon-h1": lambda mlp: mlp.up_proj.weight,
    "t5": lambda ffn: ffn.wi.weight,
    "t5-v1.1": lambda ffn: ffn.wi_1.weight,
    "mpt": lambda ffn: ffn.up_proj.weight,
}


@pytest.mark.parametrize("name", UP)
def test_what_is_clustered_are_the_rows_of_the_up_projection(name):
    for ffn in find_ffns(shared(name)):
        assert torch.equal(up_rows(ffn), UP[name](ffn.owner))


def test_a_gate_and_up_in_one_whose_order_is_not_known_is_refused():
    with pytest.raises(InputError, match="can't be told from the gate's"):
        split_ffns(shared("modernbert"), COUNT)


def test_quantised_weights_are_refused():
    model = by_name("llama").build()
    up = model.model.layers[1].mlp.up_proj
    del up.weight
    up.register_buffer("weight", torch.zeros(families.WIDTH, 32, dtype=torch.int8))
    with pytest.raises(InputError, match=r"layers\.1\.mlp: .*quantised, adapted or offloaded"):
        split_ffns(model, COUNT)


def test_adapted_weights_are_refused():
    import peft

    config = peft.LoraConfig(r=2, target_modules=["up_proj"])
    model = peft.get_peft_model(by_name("llama").build(), config)
    with pytest.raises(InputError, match=r"layers\.0\.mlp: .*quantised, adapted or offloaded"):
        split_ffns(model, COUNT)


def test_weights_that_are_not_finite_are_refused():
    model = by_name("llama").build()
    with torch.no_grad():
        model.model.layers[1].mlp.up_proj.weight[3, 2] = float("nan")
    with pytest.raises(InputError, match=r"layers\.1\.mlp: .*not finite"):
        split_ffns(model, COUNT)


def test_more_experts_than_a_layer_has_neurons_are_refused():
    with pytest.raises(InputError, match=r"layers\.0\.mlp: 52 neurons can be split into 1 to 52"):
        split_ffns(shared("llama"), 53)


def test_half_precision_weights_are_clustered_in_float32():
    model = by_name("llama").build(torch.bfloat16)
    as_float32 = by_name("llama").build(torch.bfloat16).float()
    for site, found in split_ffns(model, COUNT).items():
        assert torch.equal(found, split_ffns(as_float32, COUNT)[site])


@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt"])
def test_the_experts_outputs_add_up_to_the_ffns(name):
    model = shared(name)
    clusters = split_ffns(model, COUNT)
    for ffn in find_ffns(model):
        weight = ffn.last.weight.detach().double()
        weight = weight.T if type(ffn.last).__name__ == "Conv1D" else weight
        product = torch.randn(9, ffn.site.width, dtype=torch.float64)
        parts = [
            (product * (clusters[ffn.site.name] == expert)) @ weight.T for expert in range(COUNT)
        ]
        whole = product @ weight.T
        # Sums of as many terms, in two orders, are off by width * 2^-53 of the magnitudes each.
        bound = 2 * (ffn.site.width + COUNT) * 2**-53 * (product.abs() @ weight.abs().T)
        assert ((sum(parts) - whole).abs() <= bound).all()


def test_neurons_moved_together_by_expert_leave_the_model_as_it_was():
    clusters = split_ffns(shared("llama"), COUNT)
    model = by_name("llama").build().double()
    with torch.no_grad():
        before = model(IDS).logits
        for site, of_neuron in clusters.items():
            order = of_neuron.argsort(stable=True)
            mlp = model.model.get_submodule(site)
            mlp.gate_proj.weight.copy_(mlp.gate_proj.weight[order].clone())
            mlp.up_proj.weight.copy_(mlp.up_proj.weight[order].clone())
            mlp.down_proj.weight.copy_(mlp.down_proj.weight[:, order].clone())
        after = model(IDS).logits
    # Each FFN adds 52 terms in another order, which is off by 52 * 2^-53 of their magnitudes; the
    # second layer's gates, enlarged 3,000 times, carry that on: 2e-11.
    assert (after - before).abs().max() <= 1e-10 * before.abs().max()


# Which experts tokens choose

FUNCTIONS = {
    "identity": lambda product: product,
    "absolute": np.abs,
    "positive": lambda product: np.maximum(product, 0),
}


def products(family, model, ids, **options):
    """Site -> float64 [tokens, width], what enters each last projection, by plain hooks."""
    seen, hooks = {}, []
    for ffn in find_ffns(model):

        def note(_, given, site=ffn.site.name):
            seen[site] = given[0].detach().double().flatten(0, -2).numpy()

        hooks.append(ffn.last.register_forward_pre_hook(note))
    with torch.no_grad():
        family.call(model, ids, **options)
    for hook in hooks:
        hook.remove()
    return seen


def brute_force(seen, sites, clusters, share, form):
    """bool [tokens, layers, experts], token by token, in float64."""
    scores = []
    for site in sites:
        values = FUNCTIONS[form](seen[site])
        of_layer = np.stack(
            [values[:, clusters[site].numpy() == e].sum(1) for e in range(COUNT)], axis=1
        )
        spread = of_layer.std(1, keepdims=True)
        of_layer = of_layer - of_layer.mean(1, keepdims=True)
        scores.append(np.where(spread > 0, of_layer / np.where(spread > 0, spread, 1), 0))
    scores = np.stack(scores, axis=1)
    count = max(1, round(share * len(sites) * COUNT))
    chosen = np.zeros(scores.shape, dtype=bool)
    for token, of_token in enumerate(scores):
        pairs = [(-of_token[j, e], j, e) for j in range(len(sites)) for e in range(COUNT)]
        pairs.sort()
        # What is computed in float32 can only be the same if the scores at the cut differ by more
        # than its errors: some roundings of numbers up to sqrt(5).
        assert count == len(pairs) or pairs[count][0] - pairs[count - 1][0] > 1e-5
        for _, layer, expert in pairs[:count]:
            chosen[token, layer, expert] = True
    return torch.from_numpy(chosen)


GROUPS = torch.tensor(
    [[0, 0, 1, 1, 2, 2, -1, -1], [1] * 7 + [-1], [-1, 2, 0, 2, 0, 2, 0, 1]], dtype=torch.int32
)


@pytest.mark.parametrize("form", FUNCTIONS)
@pytest.mark.parametrize("name", ["llama", "phi3", "gpt2", "opt", "bert"])
def test_tokens_choose_the_experts_of_the_highest_scores(name, form):
    family, model = by_name(name), shared(name)
    clusters = split_ffns(model, COUNT)
    with ExpertUse(model, LABELS, clusters, share=0.3, form=form) as use, torch.no_grad():
        use.set(groups=GROUPS)
        family.call(model)
    chosen = brute_force(products(family, model, IDS), list(clusters), clusters, 0.3, form)
    for index in range(len(LABELS)):
        of_label = chosen[(GROUPS == index).flatten()]
        assert torch.equal(use.chosen[index], of_label.sum(0))
        assert use.tokens[index].tolist() == [len(of_label)] * len(clusters)
    expected = use.chosen.double() / use.tokens[:, :, None]
    assert torch.equal(use.frequency(), expected)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_products_in_half_precision_are_summed_in_float32(dtype):
    family, model = by_name("qwen2"), shared("qwen2", dtype)
    clusters = split_ffns(model, COUNT)
    with ExpertUse(model, ["en"], clusters, share=0.3) as use, torch.no_grad():
        use.set(label="en")
        family.call(model)
    chosen = brute_force(products(family, model, IDS), list(clusters), clusters, 0.3, "identity")
    assert torch.equal(use.chosen[0], chosen.sum(0))


@pytest.mark.parametrize(("share", "count"), [(0.01, 1), (0.1, 1), (0.25, 2), (0.5, 5), (1.0, 10)])
def test_a_share_of_all_pairs_is_chosen_and_at_least_one(share, count):
    model = shared("llama")
    with ExpertUse(model, ["en"], split_ffns(model, COUNT), share) as use, torch.no_grad():
        use.set(label="en")
        model(IDS)
    assert use.chosen.sum() == count * IDS.numel()  # round(2.5) is 2, as Python's is


@pytest.mark.parametrize("name", ["t5", "bart"])
def test_tokens_of_an_encoder_decoder_choose_among_the_layers_of_their_stack(name):
    family, model = by_name(name), shared(name)
    clusters = split_ffns(model, COUNT)
    mask = torch.ones(3, 5)
    mask[1, 3:] = 0
    with ExpertUse(model, LABELS, clusters, share=0.3) as use, torch.no_grad():
        use.set(groups=GROUPS, decoder_groups=GROUPS[:, :5])
        family.call(model)
        use.set(label="fr", decoder_mask=mask)
        family.call(model)
    seen = products(family, model, IDS)
    for stack, first, second in (
        ("encoder", GROUPS, torch.full((3, 8), 2)),
        ("decoder", GROUPS[:, :5], torch.where(mask > 0, 2, -1)),
    ):
        sites = [site for site in clusters if site.startswith(stack)]
        layers = [list(clusters).index(site) for site in sites]
        chosen = brute_force(seen, sites, clusters, 0.3, "identity")
        for index in range(len(LABELS)):
            found = torch.cat([chosen[(one == index).flatten()] for one in (first, second)])
            assert torch.equal(use.chosen[index, layers], found.sum(0))
            assert use.tokens[index, layers].tolist() == [len(found)] * len(sites)


def test_tokens_without_any_difference_choose_the_first_experts():
    model = by_name("llama").build()
    with torch.no_grad():
        for layer in model.model.layers:
            layer.mlp.up_proj.weight.zero_()
        with ExpertUse(model, ["en"], split_ffns(model, COUNT), share=0.7) as use:
            use.set(label="en")
            model(IDS)
    assert use.chosen[0].tolist() == [[24] * 5, [24, 24, 0, 0, 0]]


def test_ties_at_the_cut_go_to_the_lower_pair():
    from lapefast.detect.experts.use import _highest

    scores = torch.randint(0, 4, (200, 12), generator=torch.Generator().manual_seed(0)).float()
    for count in (1, 5, 12):
        found = _highest(scores, count)
        for row, of_row in zip(scores.tolist(), found, strict=True):
            first = sorted(range(12), key=lambda i, row=row: (-row[i], i))[:count]
            assert of_row.nonzero().squeeze(1).tolist() == sorted(first)


def test_a_constant_row_has_a_score_of_zero():
    from lapefast.detect.experts.use import _standardised

    # The mean of three times 0.1 is not 0.1 in float32.
    rows = torch.tensor([[0.1, 0.1, 0.1], [1.0, 2.0, 3.0]])
    expected = [-(1.5**0.5), 0, 1.5**0.5]
    assert _standardised(rows)[0].tolist() == [0, 0, 0]
    assert _standardised(rows)[1].tolist() == pytest.approx(expected, rel=1e-6)  # float32


def test_use_and_a_recorder_see_one_pass_as_each_would_its_own():
    model = shared("llama")
    clusters = split_ffns(model, COUNT)
    with ExpertUse(model, LABELS, clusters, share=0.3) as alone, torch.no_grad():
        alone.set(groups=GROUPS)
        model(IDS)
    with lf.record(model, LABELS) as only, torch.no_grad():
        only.set(groups=GROUPS)
        model(IDS)
    with ExpertUse(model, LABELS, clusters, share=0.3) as use:
        use.set(label="en")  # what a recorder proves itself on counts nowhere
        with lf.record(model, LABELS) as recorder, torch.no_grad():
            for one in (use, recorder):
                one.set(groups=GROUPS)
            model(IDS)
    assert torch.equal(use.chosen, alone.chosen)
    assert torch.equal(use.tokens, alone.tokens)
    for site, counts in only.profile().counts.items():
        assert torch.equal(recorder.profile().counts[site], counts)


def test_counts_made_in_inference_mode_can_be_added_to_outside_of_it():
    model = shared("llama")
    with ExpertUse(model, ["en"], split_ffns(model, COUNT)) as use:
        use.set(label="en")
        with torch.inference_mode():
            model(IDS)
        once = use.chosen.clone()
        model(IDS)
    assert torch.equal(use.chosen, 2 * once)


def test_nothing_of_the_tap_stays_on_the_model():
    model = by_name("llama").build()
    before = [dict(module.__dict__) for module in model.modules()]
    with ExpertUse(model, ["en"], split_ffns(model, COUNT)):
        pass
    for module, was in zip(model.modules(), before, strict=True):
        assert module.__dict__ == was
        assert not module._forward_hooks
        assert not module._forward_pre_hooks


def test_bad_arguments_are_refused():
    model = shared("llama")
    clusters = split_ffns(model, COUNT)
    first, second = clusters
    uneven = {**clusters, first: clusters[first].clamp(min=1)}
    for arguments, message in (
        ((["en"], clusters, 0.0), "share must be over 0 and at most 1, got 0.0"),
        ((["en"], clusters, 1.1), "share must be over 0 and at most 1, got 1.1"),
        ((["en"], clusters, float("nan")), "share must be over 0 and at most 1, got nan"),
        ((["en"], clusters, 0.1, "square"), "form must be one of identity, absolute, positive"),
        ((["en", "en"], clusters), "labels must be a list of distinct names"),
        (("en", clusters), "labels must be a list of distinct names"),
        ((["en"], {**clusters, second: clusters[second] // 2}), "the same number of experts"),
        ((["en"], uneven), "must have floor or ceil of 52 / 5 neurons"),
    ):
        with pytest.raises(InputError, match=message):
            ExpertUse(model, *arguments)
    with (
        pytest.raises(InputError, match="but the model has"),
        ExpertUse(model, ["en"], {first: clusters[first]}),
    ):
        pass
    assert not model._forward_hooks


def test_bad_tokens_are_refused():
    model = shared("llama")
    with ExpertUse(model, LABELS, split_ffns(model, COUNT)) as use, torch.no_grad():
        with pytest.raises(InputError, match=r"call set\(\.\.\.\) before"):
            model(IDS)
        for arguments, message in (
            ({}, "either a label or groups"),
            ({"label": "en", "groups": GROUPS}, "either a label or groups"),
            ({"label": "de"}, "'de' is none of these labels: en, zh, fr"),
            ({"groups": GROUPS.float()}, "groups must be integers like the input ids"),
            ({"groups": GROUPS + 1}, "groups holds 3, but there are 3 labels"),
            ({"groups": GROUPS, "mask": GROUPS[:2]}, "must have one shape"),
            ({"label": "en", "decoder_mask": GROUPS}, "for encoder-decoder models"),
        ):
            with pytest.raises(InputError, match=message):
                use.set(**arguments)
        use.set(label="en", mask=torch.ones(3, 7))
        with pytest.raises(InputError, match="input is 24 tokens, but set was given 21"):
            model(IDS)
        with pytest.raises(InputError, match="no token of label 'en' was seen"):
            use.frequency()


def test_an_encoder_decoder_needs_groups_for_both_stacks():
    model = shared("t5")
    with (
        ExpertUse(model, LABELS, split_ffns(model, COUNT)) as use,
        pytest.raises(InputError, match="need decoder_groups"),
    ):
        use.set(groups=GROUPS)


def test_products_that_are_not_finite_are_refused_by_site():
    model = by_name("llama").build()
    clusters = split_ffns(model, COUNT)
    with torch.no_grad():
        model.model.layers[1].mlp.gate_proj.weight[0] = float("inf")
        with ExpertUse(model, ["en"], clusters) as use:
            use.set(label="en")
            with pytest.raises(InputError, match=r"layers\.1\.mlp: products are not finite"):
                model(IDS)
    assert not use.chosen.any()


def test_an_ffn_that_runs_several_times_is_refused():
    model = shared("albert")
    with ExpertUse(model, ["en"], split_ffns(model, COUNT)) as use, torch.no_grad():
        use.set(label="en")
        with pytest.raises(InputError, match="runs more than once in a forward pass"):
            model(IDS)


def test_a_pass_that_ends_before_the_last_product_is_refused():
    model = shared("llama")
    with (
        lf.record(model, ["en"]) as recorder,
        ExpertUse(model, ["en"], split_ffns(model, COUNT)) as use,
        torch.no_grad(),
    ):
        recorder.end_at_last_site()
        for one in (use, recorder):
            one.set(label="en")
        with pytest.raises(InputError, match=r"layers\.1\.mlp computed no product"):
            bare_model(model)(IDS)


# The pass over documents


@pytest.fixture(scope="module")
def tokenizer():
    words = {f"w{number}": number for number in range(families.VOCABULARY)}
    tokenizer = Tokenizer(models.WordLevel(words, unk_token="w0"))
    tokenizer.pre_tokenizer = pre_tokenizers.WhitespaceSplit()
    return PreTrainedTokenizerFast(tokenizer_object=tokenizer)


@pytest.fixture(scope="module")
def documents():
    """Label -> lists of ids, of 3 to 14 words."""
    generator = torch.Generator().manual_seed(5)
    lengths = {"en": (5, 3, 14, 9), "zh": (4, 11), "fr": (7, 7, 3)}
    return {
        label: [torch.randint(5, families.VOCABULARY, (n,), generator=generator) for n in of_label]
        for label, of_label in lengths.items()
    }


@pytest.fixture(scope="module")
def texts(documents):
    return {
        label: [" ".join(f"w{word}" for word in ids.tolist()) for ids in of_label]
        for label, of_label in documents.items()
    }


@pytest.fixture(scope="module")
def found(texts, tokenizer):
    return experts(
        shared("llama"), texts, tokenizer, COUNT, share=0.3, batch_size=3, progress=False
    )


@pytest.mark.parametrize("name", ["llama", "gpt2", "t5"])
def test_padded_batches_count_what_each_document_alone_does(name, documents, texts, tokenizer):
    family, model = by_name(name), shared(name)
    result = experts(model, texts, tokenizer, COUNT, share=0.3, batch_size=3, progress=False)
    for index, (label, of_label) in enumerate(documents.items()):
        assert result.labels[index] == label
        expected = torch.zeros_like(result.chosen[index])
        for ids in of_label:
            options = {}
            if name == "t5":
                shifted = torch.cat([torch.zeros(1, dtype=torch.int64), ids[:-1]])
                options = {"decoder_input_ids": shifted[None]}
            seen = products(family, model, ids[None], **options)
            for stack in ("encoder", "decoder"):
                sites = [f.site.name for f in find_ffns(model) if f.site.stack == stack]
                if sites:
                    layers = [result.sites.index(site) for site in sites]
                    chosen = brute_force(seen, sites, result.clusters, 0.3, "identity")
                    expected[layers] += chosen.sum(0)
        assert torch.equal(result.chosen[index], expected)
        assert (result.tokens[index] == sum(map(len, of_label))).all()


def test_the_result_says_how_it_was_found(found):
    about = found.metadata
    assert (about["experts"], about["share"], about["form"], about["seed"]) == (
        5,
        0.3,
        "identity",
        0,
    )
    assert about["fingerprint"] == found.layout.fingerprint
    assert [corpus["label"] for corpus in about["corpora"]] == LABELS


def test_earlier_clusters_are_taken_over(found, texts, tokenizer):
    options = {"experts": 9, "share": 0.3, "batch_size": 3, "progress": False}
    again = experts(shared("llama"), texts, tokenizer, clusters=found.clusters, **options)
    assert torch.equal(again.chosen, found.chosen)
    assert again.metadata["experts"] == COUNT
    assert again.metadata["clusters"] == "given"
    assert "seed" not in again.metadata


# What is read from the counts


@pytest.fixture
def counted():
    generator = torch.Generator().manual_seed(11)
    clusters = {"a": torch.arange(12) % 4, "b": torch.arange(10).flip(0) % 4}
    chosen = torch.randint(0, 20, (3, 2, 4), generator=generator)
    tokens = torch.full((3, 2), 20)
    return Experts(LABELS, clusters, chosen, tokens, {"share": 0.25, "model": "m"})


def test_frequency_is_the_share_of_tokens(counted):
    for label, layer, expert in np.ndindex(3, 2, 4):
        expected = int(counted.chosen[label, layer, expert]) / 20
        assert counted.frequency[label, layer, expert].item() == expected


def pairs(mask) -> set[tuple[int, int]]:
    return {tuple(pair) for pair in mask.nonzero().tolist()}


def highest(counted, label, count) -> set[tuple[int, int]]:
    frequency = counted.frequency[counted.labels.index(label)].tolist()
    all_pairs = list(np.ndindex(2, 4))
    return set(sorted(all_pairs, key=lambda p: (-frequency[p[0]][p[1]], p))[:count])


def test_high_frequency_experts_are_the_share_that_tokens_chose_or_another(counted):
    for label in LABELS:
        assert pairs(counted.high_frequency(label)) == highest(counted, label, 2)
        assert pairs(counted.high_frequency(label, top=0.5)) == highest(counted, label, 4)
        assert pairs(counted.high_frequency(label, top=0.01)) == highest(counted, label, 1)
        above = counted.frequency[LABELS.index(label)] > 0.5
        assert torch.equal(counted.high_frequency(label, threshold=0.5), above)


def test_equal_frequencies_go_to_the_lower_expert(counted):
    counted.chosen = torch.full_like(counted.chosen, 3)
    assert pairs(counted.high_frequency("en", top=0.6)) == {(0, 0), (0, 1), (0, 2), (0, 3), (1, 0)}


def test_shared_experts_and_their_jaccard_index(counted):
    sets = {label: highest(counted, label, 4) for label in LABELS}
    assert pairs(counted.shared(top=0.5)) == sets["en"] & sets["zh"] & sets["fr"]
    assert pairs(counted.shared(["en", "fr"], top=0.5)) == sets["en"] & sets["fr"]
    jaccard = counted.jaccard(top=0.5)
    for (i, first), (j, second) in itertools.product(enumerate(sets.values()), repeat=2):
        assert jaccard[i, j].item() == len(first & second) / len(first | second)


def test_labels_without_high_frequency_experts_share_them_all(counted):
    counted.chosen = torch.zeros_like(counted.chosen)
    assert torch.equal(counted.jaccard(threshold=0.5), torch.ones(3, 3, dtype=torch.float64))


def test_similarity_is_the_cosine_of_frequencies(counted):
    vectors = counted.frequency.flatten(1).numpy()
    norms = np.sqrt((vectors**2).sum(1))
    expected = vectors @ vectors.T / np.outer(norms, norms)
    assert counted.similarity().numpy() == pytest.approx(expected, rel=1e-14)  # float64


def test_similar_labels_stand_together():
    similarity = torch.tensor(
        [[1, 0.1, 0.9, 0.2], [0.1, 1, 0.2, 0.8], [0.9, 0.2, 1, 0.1], [0.2, 0.8, 0.1, 1]],
        dtype=torch.float64,
    )
    assert leaf_order(similarity) == [0, 2, 1, 3]
    assert leaf_order(torch.ones(3, 3, dtype=torch.float64)) == [0, 1, 2]
    assert leaf_order(torch.ones(1, 1, dtype=torch.float64)) == [0]


def test_labels_are_ordered_by_what_they_use():
    clusters = {"a": torch.arange(4)}
    chosen = torch.tensor([[[9, 1, 0, 0]], [[0, 0, 9, 1]], [[8, 2, 0, 0]], [[0, 0, 8, 2]]])
    result = Experts(["en", "zh", "de", "ja"], clusters, chosen, torch.full((4, 1), 10))
    assert result.order() == ["en", "de", "zh", "ja"]


def test_families_are_known_for_language_codes(counted):
    counted.labels = ["en", "zh_Hans", "pt-BR", "law"]
    assert counted.families() == {
        "en": "Germanic",
        "zh_Hans": "Sino-Tibetan",
        "pt-BR": "Romance",
        "law": None,
    }


def test_neurons_are_those_of_the_chosen_experts(counted):
    sets = counted.neuron_sets(top=0.5)
    assert sets.metadata["method"] == "experts"
    for label in LABELS:
        chosen = highest(counted, label, 4)
        for layer, (site, of_neuron) in enumerate(counted.clusters.items()):
            expected = [i for i, e in enumerate(of_neuron.tolist()) if (layer, e) in chosen]
            assert sets[label][site].tolist() == expected
            assert counted.neurons(label, top=0.5)[site].tolist() == expected


def test_neurons_of_one_label_only_leave_out_the_experts_of_others(counted):
    sets = {label: highest(counted, label, 4) for label in LABELS}
    only = counted.neuron_sets(top=0.5, only=True)
    for label in LABELS:
        own = sets[label] - set().union(*(sets[other] for other in LABELS if other != label))
        for layer, (site, of_neuron) in enumerate(counted.clusters.items()):
            expected = [i for i, e in enumerate(of_neuron.tolist()) if (layer, e) in own]
            assert only[label][site].tolist() == expected


def test_a_table_has_a_row_for_each_label_layer_and_expert(counted):
    table = counted.to_pandas()
    assert list(table.columns) == ["label", "layer", "expert", "frequency"]
    assert len(table) == 3 * 2 * 4
    for row in table.itertuples():
        expected = counted.frequency[LABELS.index(row.label), row.layer, row.expert]
        assert row.frequency == expected.item()


def test_saved_experts_are_read_again(found, tmp_path):
    found.save(tmp_path / "experts.safetensors")
    again = Experts.load(tmp_path / "experts.safetensors")
    assert (again.labels, again.sites, again.metadata) == (
        found.labels,
        found.sites,
        found.metadata,
    )
    assert torch.equal(again.chosen, found.chosen)
    assert torch.equal(again.tokens, found.tokens)
    for site, of_neuron in found.clusters.items():
        assert torch.equal(again.clusters[site], of_neuron)
    again.save(tmp_path / "again.safetensors")
    assert (tmp_path / "again.safetensors").read_bytes() == (
        tmp_path / "experts.safetensors"
    ).read_bytes()


def test_a_damaged_file_is_refused(found, tmp_path):
    path = tmp_path / "experts.safetensors"
    found.save(path)
    data = path.read_bytes()
    path.write_bytes(data[:-9])
    with pytest.raises(InputError, match="cannot load .*cut short or damaged"):
        Experts.load(path)


def test_bad_results_and_questions_are_refused(counted):
    clusters, chosen, tokens = counted.clusters, counted.chosen, counted.tokens
    for arguments, message in (
        ((["en"], clusters, chosen, tokens), r"chosen must be int64 .*= \[1, 2, experts\]"),
        ((LABELS, clusters, chosen.double(), tokens), "chosen must be int64"),
        ((LABELS, clusters, chosen, tokens[0]), r"tokens must be int64 .*= \[3, 2\]"),
        ((LABELS, clusters, chosen, tokens * 0), "the counts given say otherwise"),
        ((LABELS, clusters, chosen + 20, tokens), "the counts given say otherwise"),
        ((["en"] * 3, clusters, chosen, tokens), "distinct labels"),
        ((LABELS, {**clusters, "a": torch.zeros(3)}, chosen, tokens), "must be int64"),
        ((LABELS, {**clusters, "a": torch.arange(3)}, chosen, tokens), "each of the 4 experts"),
    ):
        with pytest.raises(InputError, match=message):
            Experts(*arguments)
    for arguments, message in (
        ({"label": "de"}, "no experts of label 'de'"),
        ({"label": "en", "top": 0}, "top must be over 0 and at most 1"),
        ({"label": "en", "top": 0.5, "threshold": 0.5}, "either top or threshold"),
        ({"label": "en", "threshold": "a"}, "threshold must be at least 0 and below 1, got 'a'"),
        ({"label": "en", "threshold": 1.0}, "threshold must be at least 0 and below 1"),
    ):
        with pytest.raises(InputError, match=message):
            counted.high_frequency(**arguments)
    with pytest.raises(InputError, match=r"bool \[layers, experts\] = \[2, 4\]"):
        counted.members(torch.ones(2, 4))


# Pruning


@pytest.fixture
def layered():
    """4 layers of 16 experts whose layers are used unequally."""
    generator = torch.Generator().manual_seed(2)
    most = torch.tensor([90, 5, 30, 30])[None, :, None]
    chosen = (torch.rand(2, 4, 16, generator=generator) * most).long()
    clusters = {f"layer{i}": torch.arange(48) % 16 for i in range(4)}
    return Experts(["en", "zh"], clusters, chosen, torch.full((2, 4), 100))


@pytest.mark.parametrize("rate", [0.01, 0.1, 0.5, 0.9])
def test_the_least_used_experts_of_the_whole_model_go_first(layered, rate):
    frequency = layered.frequency[1].tolist()
    order = sorted(np.ndindex(4, 16), key=lambda p: (frequency[p[0]][p[1]], p))
    expected = set(order[: round(rate * 64)])
    assert pairs(pruned_experts(layered, "zh", rate)) == expected


def proportional(total, levels, most):
    """Kept per layer by largest remainder, full layers being taken out one by one."""
    kept = {}
    while True:
        rest = [i for i in range(len(levels)) if i not in kept]
        left = total - sum(kept.values())
        quota = {i: left * levels[i] / sum(levels[j] for j in rest) for i in rest}
        over = [i for i in rest if quota[i] > most]
        if not over:
            break
        kept.update(dict.fromkeys(over, most))
    kept.update({i: int(quota[i]) for i in rest})
    remainders = sorted(rest, key=lambda i: (int(quota[i]) - quota[i], i))
    for i in remainders[: total - sum(kept.values())]:
        kept[i] += 1
    return [kept[i] for i in range(len(levels))]


@pytest.mark.parametrize("label", ["en", "zh"])
@pytest.mark.parametrize("rate", [0.01, 0.1, 0.3, 0.5, 0.9])
def test_layers_keep_experts_in_proportion_to_their_activation_level(layered, label, rate):
    pruned = pruned_experts(layered, label, rate, form="layers")
    frequency = layered.of_label(label).tolist()
    levels = layered.of_label(label).sum(1).tolist()
    total = round(rate * 64)
    kept = proportional(64 - total, levels, 16)
    assert int(pruned.sum()) == total
    for layer, (of_layer, keep) in enumerate(zip(pruned, kept, strict=True)):
        order = sorted(range(16), key=lambda e, of=frequency[layer]: (of[e], e))
        assert of_layer.nonzero().squeeze(1).tolist() == sorted(order[: 16 - keep])


def test_what_full_layers_cannot_keep_goes_to_unused_ones_equally(layered):
    layered.chosen[0, 1:] = 0
    pruned = pruned_experts(layered, "en", 0.5, form="layers")
    assert pruned.sum(1).tolist() == [0, 10, 11, 11]


def test_random_experts_are_as_many_in_each_layer(layered):
    pruned = pruned_experts(layered, "en", 0.4)
    generator = torch.Generator().manual_seed(0)
    first, second = (random_experts_like(pruned, generator) for _ in range(2))
    assert first.sum(1).tolist() == second.sum(1).tolist() == pruned.sum(1).tolist()
    assert not torch.equal(first, second)


def test_pruned_experts_are_neurons_to_deactivate(layered):
    sets = prune(layered, "zh", 0.3, form="layers")
    expected = layered.members(pruned_experts(layered, "zh", 0.3, "layers"))
    assert sets.labels == ["zh"]
    assert sets["zh"] == expected
    assert sets["zh"].total == 3 * round(0.3 * 64)
    assert sets.metadata["method"] == "experts"
    assert sets.metadata["parameters"] == {"pruning": "layers", "rate": 0.3}


def test_bad_pruning_is_refused(layered):
    for arguments, message in (
        (("de", 0.1), "no experts of label 'de'"),
        (("en", 0.0), "rate must be over 0 and below 1, got 0.0"),
        (("en", 1.0), "rate must be over 0 and below 1, got 1.0"),
        (("en", "x"), "rate must be over 0 and below 1, got 'x'"),
        (("en", float("nan")), "rate must be over 0 and below 1, got nan"),
        (("en", 0.1, "released"), "form must be 'frequency' or 'layers'"),
    ):
        with pytest.raises(InputError, match=message):
            pruned_experts(layered, *arguments)


def hooked_nll(model, neurons, ids) -> float:
    """Mean negative log-likelihood with products set to zero by plain hooks."""
    hooks = []
    for ffn in find_ffns(model):

        def zero(_, given, indices=neurons[ffn.site.name]):
            product = given[0].clone()
            product[..., indices] = 0
            return (product,)

        hooks.append(ffn.last.register_forward_pre_hook(zero))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].double()
    for hook in hooks:
        hook.remove()
    return float(functional.cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


# Softmax in float32 and batches of another size: errors of a few units in the last place of logits,
# against a loss near ln 97.
RELATIVE = 1e-5


@pytest.mark.parametrize("form", ["frequency", "layers"])
def test_the_perplexity_of_pruned_models_is_what_plain_hooks_measure(found, form):
    model = shared("llama")
    rows = {"en": IDS, "zh": IDS.flip(1)}
    options = {"random_sets": 3, "seed": 4, "batch_size": 2, "progress": False}
    matrix = pruning_matrix(model, found, rows, rate=0.4, form=form, labels=["zh"], **options)
    assert (matrix.rows, matrix.columns) == (["none", "zh"], ["en", "zh"])
    assert matrix.tokens == [3 * 7, 3 * 7]
    pruned = pruned_experts(found, "zh", 0.4, form)
    generator = torch.Generator().manual_seed(4)
    drawn = [random_experts_like(pruned, generator) for _ in range(3)]
    for column, ids in enumerate(rows.values()):
        nothing, own, *random = (
            hooked_nll(model, found.members(mask), ids)
            for mask in (torch.zeros_like(pruned), pruned, *drawn)
        )
        assert matrix.nll[:, column].tolist() == pytest.approx([nothing, own], rel=RELATIVE)
        mean = sum(random) / 3
        assert matrix.random_nll[:, column].tolist() == pytest.approx([nothing, mean], rel=RELATIVE)
        span = matrix.random_range[1, column].tolist()
        assert span == pytest.approx([min(random), max(random)], rel=RELATIVE)


def test_a_pruning_matrix_is_saved_and_says_how_it_was_made(found, tmp_path):
    options = {"random_sets": 1, "progress": False}
    matrix = pruning_matrix(shared("llama"), found, {"en": IDS}, rate=0.4, **options)
    matrix.save(tmp_path / "matrix.json")
    again = PerplexityMatrix.load(tmp_path / "matrix.json")
    assert torch.equal(again.nll, matrix.nll)
    assert (again.metadata["pruning"], again.metadata["rate"]) == ("frequency", 0.4)
    assert [sum(pruned) for pruned in again.metadata["experts"].values()] == [4, 4, 4]
    assert "(columns) with experts pruned for a label (rows)" in again._repr_html_()
    assert list(again.to_pandas()["pruned_for"]) == again.rows


def test_bad_choices_are_refused_before_anything_runs(texts, tokenizer):
    for options, message in (
        ({"share": 2.0}, "share must be over 0"),
        ({"share": "a"}, "share must be over 0 and at most 1, got 'a'"),
        ({"form": "square"}, "form must be one of"),
        ({"experts": 0}, r"layers\.0\.mlp: 52 neurons can be split"),
        ({"max_documents": 0}, "max_documents must be"),
    ):
        with pytest.raises(InputError, match=message):
            experts(shared("llama"), texts, tokenizer, progress=False, **options)


def test_bad_pruning_matrices_are_refused(found):
    model = shared("llama")
    for options, message in (
        ({"random_sets": 0}, "random_sets must be at least 1"),
        ({"labels": ["none"]}, "stands for the unpruned model"),
        ({"labels": ["de"]}, "no experts of label 'de'"),
        ({"seq_len": 1}, "rows must have at least 2 tokens"),
    ):
        corpora = {"en": IDS.flatten()}
        with pytest.raises(InputError, match=message):
            pruning_matrix(model, found, corpora, progress=False, **options)
    with pytest.raises(InputError, match="use the model that they were found in"):
        pruning_matrix(shared("gpt2"), found, {"en": IDS}, progress=False)

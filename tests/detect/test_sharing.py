"""Sharing, against plain hooks and loops."""

from __future__ import annotations

import json
import logging
from types import SimpleNamespace

import pytest
import torch
from families import VOCABULARY, by_name, shared

import lapefast as lf
from lapefast.detect.sharing import sharing
from lapefast.detect.sharing.categories import Category, sharing_categories
from lapefast.detect.sharing.examples import read_examples
from lapefast.detect.sharing.last_tokens import reading_last_tokens
from lapefast.detect.sharing.result import Sharing
from lapefast.errors import InputError
from lapefast.neurons import NeuronSets

NAMES = ["all-shared", "partial-shared", "specific", "non-activated"]

# Family -> where the last projection is, from the site.
LAST = {
    "llama": "down_proj",
    "phi3": "down_proj",
    "gpt2": "c_proj",
    "opt": "fc2",
    "bitnet": "down_proj",
    "falcon-h1": "down_proj",
    "bert": "output.dense",
    "t5": "wo",
    "t5-v1.1": "wo",
}
ENCODER_DECODERS = ("t5", "t5-v1.1")


class Characters:
    """A token for each character, after one that begins the text."""

    name_or_path = "characters"

    def __call__(self, text, add_special_tokens=True):
        start = [1] if add_special_tokens else []
        return SimpleNamespace(input_ids=start + [ord(one) % (VOCABULARY - 6) + 5 for one in text])


EXAMPLES = [
    {"en": ("the cat sat", " on"), "zh": ("mao zuo zai", " x"), "fr": ("le chat", " est la")},
    {"en": ("a dog", " ran"), "zh": "gou pao le henkuai", "fr": ("un chien court", " ici")},
    {"fr": {"prompt": "la nuit", "answer": " b"}, "en": {"prompt": "the night"}, "zh": "ye"},
    {"en": ("two", " q"), "zh": ("er", " z"), "fr": "deux"},
    {"en": "is this so", "zh": "shi ma", "fr": ("est-ce vrai", " oui")},
]
LABELS = ["en", "zh", "fr"]
ANSWERED = {"en": [0, 1, 3], "zh": [0, 3], "fr": [0, 1, 2, 4]}


def prompt_of(value):
    return value if isinstance(value, str) else value["prompt"] if "prompt" in value else value[0]


def answer_of(value):
    return value.get("answer") if isinstance(value, dict) else None if len(value) != 2 else value[1]


def last_values(family, model, texts):
    """Site -> activations and products [texts, neurons] at the last tokens of one padded batch."""
    bare, found = family.bare_of(model), {}
    ids = [torch.tensor(Characters()(text).input_ids) for text in texts]
    padded = torch.nn.utils.rnn.pad_sequence(ids, batch_first=True)
    mask = (torch.arange(padded.shape[1]) < torch.tensor([[len(one)] for one in ids])).long()

    def pick(values):
        values = values.detach().reshape(*padded.shape, -1)
        return torch.stack([row[len(one) - 1] for row, one in zip(values, ids, strict=True)])

    hooks = []
    for site, activation in family.activations(model).items():
        last = bare.get_submodule(f"{site}.{LAST[family.name]}" if site else LAST[family.name])

        def see_activation(module, given, output, site=site):
            found[site, 0] = pick(output)

        def see_product(module, given, site=site):
            found[site, 1] = pick(given[0])

        hooks.append(activation.register_forward_hook(see_activation))
        hooks.append(last.register_forward_pre_hook(see_product))
    options = {"attention_mask": mask} if not mask.all() else {}
    if family.name in ENCODER_DECODERS:
        start = torch.full_like(padded[:, :1], model.config.decoder_start_token_id)
        options["decoder_input_ids"] = torch.cat([start, padded[:, :-1]], dim=1)
        options["decoder_attention_mask"] = mask
    with torch.no_grad():
        bare(input_ids=padded, use_cache=False, **options) if family.name != "bert" else bare(
            input_ids=padded, **options
        )
    for hook in hooks:
        hook.remove()
    return {site: (found[site, 0], found[site, 1]) for site in family.sites}


def category_of(active):
    """The definition, of one neuron: the index into NAMES of bools, one per label."""
    count = sum(active)
    if count == len(active):
        return 0
    return 3 if count == 0 else 2 if count == 1 else 1


def categories_of(values, threshold):
    """Categories [examples][neurons] of float32 values [examples, labels, neurons]."""
    bar = float(torch.tensor(threshold, dtype=torch.float32))
    return [
        [category_of([value > bar for value in column]) for column in example.T.tolist()]
        for example in values
    ]


def counted(categories):
    return [[row.count(category) for category in range(4)] for row in categories]


def whole_batch(family, model):
    """Site -> activations, products [examples, labels, neurons], all in one batch."""
    texts = [prompt_of(example[label]) for example in EXAMPLES for label in LABELS]
    return {
        site: [one.view(len(EXAMPLES), len(LABELS), -1) for one in pair]
        for site, pair in last_values(family, model, texts).items()
    }


def found_by(name, **options):
    options = {"batch_size": 15, "progress": False, "top": 40} | options
    return sharing(shared(name), Characters(), EXAMPLES, **options)


# --- categories


def test_each_neuron_has_the_category_of_its_definition():
    generator = torch.Generator().manual_seed(0)
    for labels in (2, 3, 7):
        active = torch.rand(labels, 4, 200, generator=generator) < 0.5
        active[:, 0, :3], active[:, 0, 3:6] = True, False
        codes = sharing_categories(active)
        assert codes.dtype == torch.int8
        expected = [[category_of(active[:, i, j].tolist()) for j in range(200)] for i in range(4)]
        assert codes.tolist() == expected
        assert [category.title for category in Category] == NAMES


def test_with_two_labels_nothing_is_partial_shared():
    every = torch.tensor([[True, True, False, False], [True, False, True, False]])
    assert sharing_categories(every).tolist() == [0, 2, 2, 3]


@pytest.mark.parametrize(
    ("active", "message"),
    [
        (torch.ones(1, 5, dtype=torch.bool), "at least two, got 1"),
        (torch.ones(2, 5), r"bool tensor .* got torch.float32 \[2, 5\]"),
        (torch.ones(2, dtype=torch.bool), r"got torch.bool \[2\]"),
        ([[True], [False]], "got list"),
    ],
)
def test_what_is_not_active_neurons_of_labels_is_refused(active, message):
    with pytest.raises(InputError, match=message):
        sharing_categories(active)


# --- the pass


@pytest.mark.parametrize("values", ["activation", "product"])
@pytest.mark.parametrize("name", LAST)
def test_counts_and_sets_are_those_of_plain_hooks(name, values):
    thresholds = (0.0, 0.1, 0.25, 0.5)
    found = found_by(name, values=values, threshold=0.05, thresholds=thresholds)
    hooked = whole_batch(by_name(name), shared(name))
    assert found.labels == LABELS
    assert found.sites == list(hooked)
    for site, pair in enumerate(hooked.values()):
        of_site = pair[values == "product"].float()
        categories = categories_of(of_site, 0.05)
        assert found.counts[:, site].tolist() == counted(categories)
        for row, threshold in enumerate(thresholds):
            swept = torch.tensor(counted(categories_of(of_site, threshold)))
            assert found.sweep_counts[row, site].tolist() == swept.sum(0).tolist()
        kept = [set(column) for column in zip(*categories, strict=True)]
        for category, label in enumerate(NAMES):
            expected = [neuron for neuron, one in enumerate(kept) if one == {category}]
            assert found.persistent.layers(label)[site].tolist() == expected
        for row, label in enumerate(LABELS):
            specific = (of_site[:, row] > 0.05) & ((of_site > 0.05).sum(1) == 1)
            expected = specific.all(0).nonzero()[:, 0].tolist()
            assert found.neurons.layers(label)[site].tolist() == expected


@pytest.mark.parametrize("name", LAST)
def test_contributions_and_effective_scores_are_those_of_their_formulas(name):
    found = found_by(name)
    family, model = by_name(name), shared(name)
    embedding = model.get_output_embeddings().weight.detach().double()
    for index, (site, (activations, products)) in enumerate(whole_batch(family, model).items()):
        categories = categories_of(activations.float(), 0.0)
        weight = family.bare_of(model).get_submodule(f"{site}.{LAST[name]}").weight.detach()
        weight = (weight.T if name == "gpt2" else weight).double()
        norms = weight.square().sum(0).sqrt()
        shares = torch.zeros(len(EXAMPLES), len(LABELS), 4, dtype=torch.float64)
        for example in range(len(EXAMPLES)):
            for label in range(len(LABELS)):
                score = (products[example, label].double().abs() * norms).tolist()
                ranked = sorted(range(len(score)), key=lambda i, score=score: (-score[i], i))
                for neuron in ranked[:40]:
                    shares[example, label, categories[example][neuron]] += 1 / 40
        spread = found.contribution
        assert spread.examples.tolist() == [len(EXAMPLES)] * len(LABELS)
        # Shares are sums of at most 40 terms of 1/40 and means of 5 of these.
        for value, of in (
            (spread.mean, shares.mean(0)),
            (spread.least, shares.amin(0)),
            (spread.largest, shares.amax(0)),
        ):
            assert torch.allclose(value[:, index], of, rtol=0, atol=50 * 2**-53)
        if name in ENCODER_DECODERS:
            assert found.effective is None
            continue
        for row, (label, answered) in enumerate(ANSWERED.items()):
            sums, sizes = [], 0.0
            for example in answered:
                word = Characters()(answer_of(EXAMPLES[example][label]), False).input_ids[0]
                m = products[example, row].double()
                scores = [float(embedding[word] @ (m[i] * weight[:, i])) for i in range(len(m))]
                sums.append(
                    [
                        sum(s for s, c in zip(scores, categories[example], strict=True) if c == one)
                        for one in range(4)
                    ]
                )
                sizes = max(sizes, float(embedding[word].abs() @ weight.abs() @ m.abs()))
            sums = torch.tensor(sums, dtype=torch.float64)
            # Two float64 sums of as many products, in different orders, each with at most so
            # many roundings of the sum of their magnitudes.
            bound = 2 * (weight.numel() + 8) * 2**-53 * sizes
            for value, of in (
                (found.effective.mean, sums.mean(0)),
                (found.effective.least, sums.amin(0)),
                (found.effective.largest, sums.amax(0)),
            ):
                assert torch.allclose(value[row, index], of, rtol=0, atol=bound)
            assert found.effective.examples[row] == len(answered)


def test_the_released_form_takes_the_input_embedding():
    torch.manual_seed(3)
    model = by_name("llama").build()
    options = {"batch_size": 15, "progress": False}
    paper = sharing(model, Characters(), EXAMPLES, **options)
    released = sharing(model, Characters(), EXAMPLES, form="released", **options)
    assert not torch.equal(paper.effective.mean, released.effective.mean)
    model.get_output_embeddings().weight.data = model.get_input_embeddings().weight.detach()
    again = sharing(model, Characters(), EXAMPLES, **options)
    assert torch.equal(again.effective.mean, released.effective.mean)


def test_the_mean_over_labels_weighs_every_prompt_the_same():
    found = found_by("llama").effective
    mean, least, largest = found.over_labels()
    total = sum(count * of for count, of in zip(found.examples.tolist(), found.mean, strict=True))
    # A few roundings of sums of three.
    assert torch.allclose(mean, total / 9, rtol=1e-14, atol=1e-14 * float(found.mean.abs().max()))
    assert torch.equal(least, found.least.amin(0))
    assert torch.equal(largest, found.largest.amax(0))


def test_the_four_counts_always_sum_to_the_width():
    found = found_by("llama", threshold=0.3)
    widths = torch.tensor([found.neurons.widths[site] for site in found.sites])
    assert (found.counts.sum(-1) == widths).all()
    assert (found.sweep_counts.sum(-1) == widths * len(EXAMPLES)).all()
    # Four quotients, each rounded once.
    assert (found.shares.sum(-1) - 1).abs().max() <= 4 * 2**-53
    assert (found.share_range[..., 0] <= found.shares).all()
    assert (found.share_range[..., 1] >= found.shares).all()
    assert torch.equal(found.share_range[..., 0] * widths[:, None], found.counts.amin(0).double())


def test_the_threshold_is_compared_in_float32_and_strictly():
    with reading_last_tokens(shared("llama"), 1) as (_, read):
        found = read([Characters()("the cat sat").input_ids])
    value = float(found["layers.0.mlp"][0][0].max())
    pair = [{"en": "the cat sat", "zh": "the cat sat"}]
    at = sharing(shared("llama"), Characters(), pair, value, (), batch_size=1, progress=False)
    assert at.counts[0, 0].tolist() == [0, 0, 0, 52]
    # Below the value, and the same number once rounded to float32.
    below = value * (1 - 2**-30)
    assert below < value
    near = sharing(shared("llama"), Characters(), pair, below, (), batch_size=1, progress=False)
    assert torch.equal(near.counts, at.counts)


@pytest.mark.parametrize("dtype", [torch.bfloat16, torch.float16])
def test_half_precision_values_are_those_of_plain_hooks(dtype):
    family, model = by_name("llama"), shared("llama", dtype)
    texts = [prompt_of(example[label]) for example in EXAMPLES for label in LABELS]
    hooked = last_values(family, model, texts)
    with reading_last_tokens(model, 15) as (_, read):
        found = read([Characters()(text).input_ids for text in texts])
    for site, (activations, products) in found.items():
        assert activations.dtype == torch.float32
        assert torch.equal(activations, hooked[site][0].float())
        assert torch.equal(products, hooked[site][1])


def test_padding_and_batches_change_values_by_rounding_only():
    model = shared("gpt2")
    texts = [Characters()(prompt_of(one[label])).input_ids for one in EXAMPLES for label in LABELS]
    with reading_last_tokens(model, 4) as (_, read):
        batched = read(texts)
    with reading_last_tokens(model, 1) as (_, read):
        alone = read(texts)
    for site in alone:
        for one, other in zip(batched[site], alone[site], strict=True):
            # float32 sums of some hundred terms in another order, through two layers.
            scale = float(other.abs().max())
            assert torch.allclose(one, other, rtol=0, atol=1e-4 * scale)


def test_groups_of_examples_add_up_to_one():
    # A batch of 6 holds two examples, one of 3 holds one, one of 2 not even one.
    results = [found_by("llama", batch_size=size) for size in (15, 6, 3, 2)]
    first = results[0]
    for other in results[1:]:
        assert torch.equal(first.counts, other.counts)
        assert torch.equal(first.sweep_counts, other.sweep_counts)
        for label in NAMES:
            assert first.persistent[label] == other.persistent[label]
        for label in LABELS:
            assert first.neurons[label] == other.neurons[label]


def test_an_example_without_a_label_is_dropped_and_counted(caplog):
    some = [*EXAMPLES, {"en": "one", "fr": "un"}]
    with caplog.at_level(logging.WARNING, "lapefast"):
        found = sharing(shared("llama"), Characters(), some, batch_size=15, top=40, progress=False)
    assert torch.equal(found.counts, found_by("llama").counts)
    note = "1 of 6 examples lack a label and were dropped"
    assert found.metadata["dropped"] == 1
    assert found.metadata["examples"] == 5
    assert note in found.metadata["notes"]
    assert note in caplog.text


def test_more_highest_than_there_are_neurons_takes_the_whole_site_and_says_so():
    found = found_by("llama", top=800)
    assert any("fewer than 800 neurons" in note for note in found.metadata["notes"])
    # One rounding of each quotient by 52, each mean and each range of one.
    shares = torch.stack([row / 52 for row in found.counts.double()]).mean(0)
    assert torch.allclose(found.contribution.mean[0], shares, rtol=0, atol=8 * 2**-53)


def test_the_model_is_left_as_it_was():
    model = by_name("llama").build().train()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    sharing(model, Characters(), EXAMPLES, progress=False)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


def test_what_is_specific_can_be_steered():
    model = shared("llama")
    found = found_by("llama")
    label = max(NAMES, key=lambda name: found.persistent[name].total)
    ids = torch.tensor([Characters()("the cat").input_ids])
    with torch.no_grad():
        before = model(ids).logits
        with lf.steer(model, lf.deactivate(found.persistent[label])):
            after = model(ids).logits
    assert not torch.equal(before, after)
    assert found.neurons.metadata["method"] == "sharing"
    assert isinstance(found.neurons, NeuronSets)
    assert found.neurons.labels == LABELS


# --- bad models and arguments


def test_an_ffn_that_layers_share_is_refused():
    with pytest.raises(InputError, match="3 layers of AlbertModel share this FFN"):
        found_by("albert", attribution=False)


def test_embeddings_of_another_size_than_the_residual_stream_are_refused():
    with pytest.raises(InputError, match="16 dimensions .* has 32; leave the answers out"):
        found_by("albert")


def test_values_that_are_not_finite_are_refused_by_site():
    model = by_name("llama").build()
    model.model.layers[1].mlp.gate_proj.weight.data[3] = torch.nan
    with pytest.raises(InputError, match=r"layers\.1\.mlp"):
        sharing(model, Characters(), EXAMPLES, progress=False)
    model = by_name("llama").build()
    model.model.layers[1].mlp.up_proj.weight.data[3] = torch.inf
    with pytest.raises(InputError, match=r"layers\.1\.mlp.*not finite"):
        sharing(model, Characters(), EXAMPLES, progress=False)


def test_an_ffn_that_does_not_run_is_refused_by_site():
    model = by_name("llama").build()
    model.config.num_hidden_layers = 1
    with pytest.raises(InputError, match=r"layers\.1\.mlp: this FFN did not run on the text"):
        sharing(model, Characters(), EXAMPLES, progress=False)


def test_attribution_refuses_weights_that_are_not_dense():
    import peft

    config = peft.LoraConfig(target_modules=["down_proj"], r=2)
    model = peft.get_peft_model(by_name("llama").build(), config)
    with pytest.raises(InputError, match="attribution=False"):
        sharing(model, Characters(), EXAMPLES, progress=False)
    found = sharing(model, Characters(), EXAMPLES, attribution=False, progress=False)
    assert found.contribution is None
    assert found.effective is None
    assert torch.equal(found.counts, found_by("llama").counts)


def test_effective_scores_need_an_embedding():
    bare = by_name("llama").build().model
    with pytest.raises(InputError, match="output embedding"):
        sharing(bare, Characters(), EXAMPLES, progress=False)
    assert sharing(bare, Characters(), EXAMPLES, form="released", progress=False).effective
    texts = [{label: prompt_of(value) for label, value in one.items()} for one in EXAMPLES]
    assert sharing(bare, Characters(), texts, progress=False).effective is None


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"threshold": float("nan")}, "thresholds must be finite"),
        ({"thresholds": (0.0, "x")}, "thresholds must be finite"),
        ({"thresholds": 0.1}, "thresholds must be a list of numbers, got 0.1"),
        ({"values": "up"}, "values must be 'activation' or 'product'"),
        ({"form": "other"}, "form must be 'paper' or 'released'"),
        ({"top": 0}, "top must be an integer of at least 1"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        found_by("llama", **options)


# --- examples


@pytest.mark.parametrize(
    ("examples", "message"),
    [
        ({"en": "a", "zh": "b"}, "must be a list of dicts"),
        ([], "at least two, got none"),
        ([{"en": "a"}], "at least two, got en"),
        ([{"en": "a"}, {"zh": "b"}], "none of the 2 examples has every label"),
        (["a"], "example 0 must be a dict"),
        ([{"en": "a", "\ud800": "b"}], "strings without lone surrogates"),
        ([{"en": "a", "zh": ""}], "example 0, label 'zh'"),
        ([{"en": "a", "zh": ("b", "")}], "example 0, label 'zh'"),
        ([{"en": "a", "zh": ("b", "c", "d")}], "example 0, label 'zh'"),
        ([{"en": "a", "zh": {"answer": "b"}}], "example 0, label 'zh'"),
        ([{"en": "a", "zh": 3}], "example 0, label 'zh'"),
        ([{"en": "a", "zh": "b" * 64}], "65 tokens are over the model's limit of 64"),
    ],
)
def test_bad_examples_are_refused(examples, message):
    with pytest.raises(InputError, match=message):
        sharing(shared("llama"), Characters(), examples, progress=False)


def test_a_tokenizer_that_does_not_fit_is_refused():
    with pytest.raises(InputError, match="got NoneType"):
        sharing(shared("llama"), None, EXAMPLES)

    def far(text, **_):
        return SimpleNamespace(input_ids=[VOCABULARY])

    with pytest.raises(InputError, match="the model has 97 tokens"):
        sharing(shared("llama"), far, EXAMPLES)
    with pytest.raises(InputError, match="makes no token of 'the cat sat'"):
        sharing(shared("llama"), lambda text, **_: SimpleNamespace(input_ids=[]), EXAMPLES)


def test_examples_are_read_from_json_lines(tmp_path):
    path = tmp_path / "examples.jsonl"
    path.write_text("\n".join(map(json.dumps, EXAMPLES)) + "\n\n", "utf-8")
    read = [read_examples(one, Characters(), shared("llama")) for one in (path, str(path))]
    assert read == [read_examples(EXAMPLES, Characters(), shared("llama"))] * 2
    path.write_text('{"en": "a", "zh": "b"}\n{"en": \n', "utf-8")
    with pytest.raises(InputError, match="line 2 of the example file"):
        read_examples(path, Characters(), shared("llama"))
    with pytest.raises(InputError, match="cannot read the example file"):
        read_examples(tmp_path / "none", Characters(), shared("llama"))


class Merging(Characters):
    """Reads "ab" as one token, and may end a text with a special one."""

    def __init__(self, end=()):
        self.end = list(end)

    def __call__(self, text, add_special_tokens=True):
        ids = super().__call__(text.replace("ab", "Z"), add_special_tokens).input_ids
        return SimpleNamespace(input_ids=ids + (self.end if add_special_tokens else []))


def test_the_answer_is_what_follows_the_prompts_own_tokens():
    def answer(tokenizer, prompt, answer):
        pair = [{"en": (prompt, answer), "zh": "x"}]
        return read_examples(pair, tokenizer, shared("llama")).examples[0]["en"].answer

    def letters(text):
        return [ord(one) % (VOCABULARY - 6) + 5 for one in text]

    assert answer(Merging(), "xy", "ab") == letters("Z")
    # Read together, the answer's first letter would be part of the prompt's last token.
    assert answer(Merging(), "xa", "bc") == letters("bc")
    # A token that ends every text stands between, and does not belong to the answer.
    assert answer(Merging(end=[2]), "xy", "bc") == letters("bc")


# --- files and tables


def test_a_result_is_read_as_it_was_written(tmp_path):
    found = found_by("llama", threshold=0.1)
    found.save(tmp_path / "sharing.json")
    again = Sharing.load(tmp_path / "sharing.json")
    for name in ("labels", "thresholds", "metadata", "sites"):
        assert getattr(again, name) == getattr(found, name)
    assert torch.equal(again.counts, found.counts)
    assert torch.equal(again.sweep, found.sweep)
    for name in ("neurons", "persistent"):
        mine, other = getattr(found, name), getattr(again, name)
        assert mine.layout == other.layout
        assert mine.metadata == other.metadata
        assert mine.metadata.get("part") == (name if name == "persistent" else None)
        assert mine.labels == other.labels
        assert all(mine[label] == other[label] for label in mine)
    for name in ("contribution", "effective"):
        for part in ("examples", "mean", "least", "largest"):
            mine, other = (getattr(getattr(one, name), part) for one in (found, again))
            assert torch.equal(mine, other)
    bare = found_by("llama", attribution=False)
    bare.save(tmp_path / "bare.json")
    assert Sharing.load(tmp_path / "bare.json").contribution is None


def test_a_broken_file_is_refused_in_a_sentence(tmp_path):
    path = tmp_path / "sharing.json"
    found_by("llama").save(path)
    text = path.read_text("utf-8")
    content = json.loads(text)

    def changed(**entries):
        return json.dumps({**content, **entries})

    counts = json.loads(json.dumps(content["counts"]))
    counts[0][0][0] += 1
    short = {**content["contribution"], "mean": content["contribution"]["mean"][:1]}
    for broken in (
        text[:-40],
        "[]",
        "nonsense",
        changed(format="lapefast neurons"),
        changed(version=9),
        changed(counts=counts),
        changed(counts=[]),
        changed(sweep_counts=content["sweep_counts"][1:]),
        changed(neurons={}),
        changed(persistent={**content["persistent"], "specific": [[52], []]}),
        changed(contribution=short),
        json.dumps({name: value for name, value in content.items() if name != "labels"}),
    ):
        path.write_text(broken, "utf-8")
        with pytest.raises(InputError) as caught:
            Sharing.load(path)
        assert "\n" not in str(caught.value)
    with pytest.raises(InputError, match="cannot read the sharing file"):
        Sharing.load(tmp_path / "none.json")


def test_the_table_has_a_row_per_quantity_label_site_and_category():
    found = found_by("llama")
    table = found.to_pandas()
    assert len(table) == 2 * 4 * (1 + 3 + 3)
    rows = table[(table.quantity == "share") & (table.site == "layers.1.mlp")]
    assert rows.category.tolist() == NAMES
    assert rows["mean"].tolist() == found.shares[1].tolist()
    assert rows.largest.tolist() == found.share_range[1, :, 1].tolist()
    rows = table[(table.quantity == "effective") & (table.label == "fr")]
    assert rows.least.tolist() == found.effective.least[2].flatten().tolist()

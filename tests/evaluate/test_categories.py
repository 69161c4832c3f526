"""Deactivating the neurons of sharing categories, against plain hooks."""

from __future__ import annotations

import json
from types import SimpleNamespace

import pytest
import torch
from families import by_name, shared
from transformers import GPT2Config, GPT2LMHeadModel, LlamaConfig, LlamaForCausalLM

import lapefast as lf
from lapefast.errors import InputError
from lapefast.evaluate import categories
from lapefast.evaluate.categories import CategoryDeactivation, category_deactivation

NAMES = ["all-shared", "partial-shared", "specific", "non-activated"]
WIDTH, VOCABULARY = 48, 60

EXAMPLES = [
    {"en": ("the cat sat", " on"), "zh": ("mao zuo zai", " x"), "fr": ("le chat", " est la")},
    {"en": ("a dog", " ran"), "zh": "gou pao", "fr": ("un chien court vite", " ici")},
    {"fr": ("la nuit", " b"), "en": ("the night", " is"), "zh": ("ye", "wan")},
]
LABELS = ["en", "zh", "fr"]

# float32 logits below 1 in magnitude, of rows batched otherwise: a few units in the last place of
# each, against a loss near ln 60.
RELATIVE = 1e-6


class Characters:
    """A token for each character, after one that begins the text."""

    def __call__(self, text, add_special_tokens=True):
        start = [1] if add_special_tokens else []
        return SimpleNamespace(input_ids=start + [ord(one) % (VOCABULARY - 3) + 2 for one in text])


def llama():
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=4,
            num_key_value_heads=2,
            max_position_embeddings=64,
        )
    )


def gpt2():
    return GPT2LMHeadModel(
        GPT2Config(
            vocab_size=VOCABULARY, n_embd=16, n_layer=2, n_head=2, n_inner=WIDTH, n_positions=64
        )
    )


@pytest.fixture(params=[llama, gpt2])
def model(request):
    torch.manual_seed(0)
    return request.param().eval()


def activations_of(model):
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    return [layer.mlp.act_fn if hasattr(model, "model") else layer.mlp.act for layer in layers]


def products_of(model):
    layers = model.model.layers if hasattr(model, "model") else model.transformer.h
    return [
        layer.mlp.down_proj if hasattr(model, "model") else layer.mlp.c_proj for layer in layers
    ]


def pair(value):
    return (value, None) if isinstance(value, str) else value


def ids(text, special=True):
    return Characters()(text, special).input_ids


def by_hooks(model, threshold=0.0, product=False):
    """(category or None, label) -> [sum of losses, tokens, hits, neurons], a sequence at a time."""
    result = {}
    for example in EXAMPLES:
        active = []
        for label in LABELS:
            seen = at_last(model, ids(pair(example[label])[0]), product)
            active.append([layer > threshold for layer in seen])
        count = [sum(layer.long() for layer in layers) for layers in zip(*active, strict=True)]
        chosen = {
            None: [[], []],
            "all-shared": [layer == 3 for layer in count],
            "partial-shared": [layer == 2 for layer in count],
            "specific": [layer == 1 for layer in count],
            "non-activated": [layer == 0 for layer in count],
        }
        for category, layers in chosen.items():
            for label in LABELS:
                prompt, answer = pair(example[label])
                if answer is None:
                    continue
                loss, hit = likelihood(model, layers, ids(prompt), ids(answer, False))
                sums = result.setdefault((category, label), [0.0, 0, 0, 0])
                sums[0] += loss
                sums[1] += len(answer)
                sums[2] += hit
                sums[3] += sum(int(sum(layer)) for layer in layers)
    return result


def at_last(model, prompt, product):
    """What each layer's activation module gives at the last token, or its last projection takes."""
    seen = []
    if product:
        hooks = [
            one.register_forward_pre_hook(lambda _, given: seen.append(given[0][0, -1]))
            for one in products_of(model)
        ]
    else:
        hooks = [
            one.register_forward_hook(lambda _, __, output: seen.append(output[0, -1]))
            for one in activations_of(model)
        ]
    with torch.no_grad():
        model(torch.tensor([prompt]))
    for hook in hooks:
        hook.remove()
    return seen


def likelihood(model, layers, prompt, answer):
    hooks = []
    for module, layer in zip(activations_of(model), layers, strict=True):

        def zero(_, __, activation, layer=layer):
            return activation if len(layer) == 0 else activation.masked_fill(layer, 0.0)

        hooks.append(module.register_forward_hook(zero))
    with torch.no_grad():
        logits = model(torch.tensor([prompt + answer])).logits[0].double()
    for hook in hooks:
        hook.remove()
    predicted = logits[len(prompt) - 1 : -1].log_softmax(-1)
    loss = -sum(float(row[token]) for row, token in zip(predicted, answer, strict=True))
    return loss, int(predicted[0].argmax()) == answer[0]


@pytest.mark.parametrize("batch_size", [1, 4, 64])
@pytest.mark.parametrize("values", ["activation", "product"])
def test_it_is_what_plain_hooks_measure(model, values, batch_size):
    found = category_deactivation(
        model,
        Characters(),
        EXAMPLES,
        0.001,
        values=values,
        random_sets=1,
        batch_size=batch_size,
        progress=False,
    )
    expected = by_hooks(model, 0.001, values == "product")
    assert [(row.category, row.label) for row in found.rows] == [
        (category, label) for category in ["none", *NAMES] for label in LABELS
    ]
    for row in found.rows:
        category = None if row.category == "none" else row.category
        loss, tokens, hits, neurons = expected[category, row.label]
        answers = 2 if row.label == "zh" else 3
        assert row.answers == answers
        assert row.nll == pytest.approx(loss / tokens, rel=RELATIVE)
        assert row.accuracy == hits / answers
        assert row.neurons == neurons / answers


def test_accuracy_counts_the_answers_that_greedy_decoding_begins():
    torch.manual_seed(0)
    model = llama().eval()
    with torch.no_grad():
        likeliest = [
            int(model(torch.tensor([ids(prompt)])).logits[0, -1].argmax())
            for prompt in ("aa", "bb")
        ]

    class Known(Characters):
        """Reads "+" as the most likely token after "aa"."""

        def __call__(self, text, add_special_tokens=True):
            found = super().__call__(text.rstrip("+"), add_special_tokens).input_ids
            return SimpleNamespace(input_ids=found + [likeliest[0]] * text.count("+"))

    some = [{"en": ("aa", "+"), "zh": ("bb", chr(2 * (VOCABULARY - 3) + likeliest[1] - 1))}]
    found = category_deactivation(model, Known(), some, random_sets=1, progress=False)
    assert [row.accuracy for row in found.rows[:2]] == [1.0, 0.0]
    # With two labels there is no partial sharing.
    assert [row.category for row in found.rows[::2]] == ["none", *NAMES[:1], *NAMES[2:]]


def test_random_sets_are_as_large_in_every_layer(monkeypatch):
    torch.manual_seed(0)
    model, placed = llama().eval(), []

    def steer(model, edits):
        placed.append(edits)
        return lf.steer(model, edits)

    monkeypatch.setattr(categories, "steer", steer)
    category_deactivation(
        model, Characters(), EXAMPLES[:1], random_sets=3, batch_size=100, progress=False
    )
    (edits,) = placed
    # Unedited first, then four sets for each category, for three labels each.
    assert edits[:3] == [None] * 3
    assert len(edits) == 3 * (1 + 4 * 4)

    def sizes(edit):
        return {} if edit is None else {site: len(one[0]) for site, one in edit.tables.items()}

    for start in range(3, len(edits), 12):
        own, *others = edits[start : start + 12 : 3]
        assert sizes(own)
        for other in others:
            assert sizes(other) == sizes(own)
        drawn = {
            str({site: one[0].tolist() for site, one in edit.tables.items()}) for edit in others
        }
        assert len(drawn) > 1


def test_the_seed_decides_the_random_sets():
    torch.manual_seed(0)
    model = llama().eval()
    first, again, other = (
        category_deactivation(model, Characters(), EXAMPLES, seed=seed, progress=False)
        for seed in (0, 0, 1)
    )
    assert first == again
    assert [row.nll for row in first.rows] == [row.nll for row in other.rows]
    assert [row.random_nll for row in first.rows] != [row.random_nll for row in other.rows]
    assert all(len(row.random_nll) == 5 for row in first.rows[3:])
    assert all(row.random_nll == [] for row in first.rows[:3])


def test_a_category_that_no_neuron_has_changes_nothing():
    torch.manual_seed(0)
    found = category_deactivation(
        llama().eval(), Characters(), EXAMPLES, 1e9, random_sets=1, progress=False
    )
    before = {row.label: row.nll for row in found.rows if row.category == "none"}
    for row in found.rows:
        if row.category in NAMES[:3]:
            assert row.neurons == 0
            assert row.nll == pytest.approx(before[row.label], rel=RELATIVE)
        if row.category == "non-activated":
            assert row.neurons == 2 * WIDTH


def test_the_model_is_left_as_it_was():
    model = by_name("llama").build().train()
    before = {name: dict(module.__dict__) for name, module in model.named_modules()}
    category_deactivation(model, Characters(), EXAMPLES, random_sets=1, progress=False)
    assert {name: dict(module.__dict__) for name, module in model.named_modules()} == before


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"random_sets": 0}, "random_sets must be an integer of at least 1"),
        ({"batch_size": 0}, "batch_size must be an integer of at least 1"),
        ({"values": "up"}, "values must be 'activation' or 'product'"),
        ({"threshold": float("nan")}, "threshold must be a finite number"),
        ({"examples": [{"en": "a", "zh": "b"}]}, "no example has an answer"),
        ({"examples": [{"en": ("a", "b")}]}, "at least two"),
    ],
)
def test_bad_arguments_are_refused(options, message):
    arguments = {"examples": EXAMPLES, "progress": False} | options
    with pytest.raises(InputError, match=message):
        category_deactivation(shared("llama"), Characters(), **arguments)


@pytest.mark.parametrize("name", ["t5", "bert"])
def test_a_model_that_predicts_no_next_token_is_refused(name):
    with pytest.raises(InputError, match="causal language model"):
        category_deactivation(shared(name), Characters(), EXAMPLES, progress=False)


def test_a_likelihood_that_is_not_finite_is_refused():
    model = by_name("llama").build()
    model.lm_head.weight.data[3] = torch.nan
    with pytest.raises(InputError, match="not finite"):
        category_deactivation(model, Characters(), EXAMPLES, progress=False)


def test_a_result_is_read_as_it_was_written(tmp_path):
    torch.manual_seed(0)
    found = category_deactivation(
        llama().eval(), Characters(), EXAMPLES, random_sets=2, progress=False
    )
    path = tmp_path / "categories.json"
    found.save(path)
    assert CategoryDeactivation.load(path) == found
    text = path.read_text("utf-8")
    rows = [{**row, "more": 1} for row in json.loads(text)["rows"]]
    for broken in (
        text[:-20],
        "[]",
        json.dumps({**json.loads(text), "version": 2}),
        json.dumps({**json.loads(text), "rows": rows}),
        json.dumps({**json.loads(text), "rows": []}),
    ):
        path.write_text(broken, "utf-8")
        with pytest.raises(InputError, match="the deactivation file"):
            CategoryDeactivation.load(path)


def test_the_table_gives_random_sets_by_mean_and_range():
    torch.manual_seed(0)
    found = category_deactivation(
        llama().eval(), Characters(), EXAMPLES, random_sets=3, progress=False
    )
    table = found.to_pandas()
    assert table.category.tolist() == [row.category for row in found.rows]
    last = found.rows[-1]
    assert table.random_nll.iloc[-1] == sum(last.random_nll) / 3
    assert table.random_nll_least.iloc[-1] == min(last.random_nll)
    assert table.random_nll_largest.iloc[-1] == max(last.random_nll)
    assert table.random_nll[:3].isna().all()

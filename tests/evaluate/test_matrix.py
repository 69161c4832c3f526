"""The perplexity matrix, on a tiny model."""

from __future__ import annotations

import json
import math

import pytest
import torch
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import lapefast as lf
from lapefast.errors import InputError
from lapefast.evaluate import PerplexityMatrix, perplexity_matrix
from lapefast.neurons import NeuronSets
from lapefast.neurons.layout import Layout

WIDTH, VOCABULARY = 24, 50


@pytest.fixture
def model():
    torch.manual_seed(0)
    return LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
        )
    ).eval()


@pytest.fixture
def neurons(model):
    layout = Layout(()).bind(model)
    first, second = layout.sites
    sets = {"en": {first: [1, 5, 9], second: [2]}, "zh": {first: [], second: []}}
    return NeuronSets(sets, layout)


@pytest.fixture
def texts():
    generator = torch.Generator().manual_seed(1)
    return {
        "en": torch.randint(0, VOCABULARY, (5, 16), generator=generator),
        "fr": torch.randint(0, VOCABULARY, (3, 16), generator=generator),
    }


def hooked_nll(model, neurons, ids) -> float:
    """Mean negative log-likelihood by plain hooks that set activations to zero."""
    hooks = []
    for layer, indices in zip(model.model.layers, neurons, strict=True):

        def zero(_, __, activation, indices=indices):
            activation = activation.clone()
            activation[..., indices] = 0
            return activation

        hooks.append(layer.mlp.act_fn.register_forward_hook(zero))
    with torch.no_grad():
        logits = model(input_ids=ids).logits[:, :-1].double()
    for hook in hooks:
        hook.remove()
    return float(cross_entropy(logits.flatten(0, 1), ids[:, 1:].flatten()))


# Softmax in float32 and batches of another size: errors of a few units in the last place of logits
# below 1 in magnitude, against a loss near ln 50.
RELATIVE = 1e-6


def test_it_is_what_plain_hooks_measure(model, neurons, texts):
    matrix = perplexity_matrix(model, neurons, texts, batch_size=2, progress=False)
    assert matrix.rows == ["none", "en", "zh"]
    assert matrix.columns == ["en", "fr"]
    assert matrix.tokens == [5 * 15, 3 * 15]
    nothing = [[], []]
    for row, layers in enumerate((nothing, neurons.layers("en"), nothing)):
        for column, ids in enumerate(texts.values()):
            expected = hooked_nll(model, layers, ids)
            assert matrix.nll[row, column].item() == pytest.approx(expected, rel=RELATIVE)


def test_random_sets_have_the_same_size_in_every_layer(model, neurons, texts, monkeypatch):
    placed = []

    def steer(model, edit):
        placed.append([len(table[0]) for table in edit.tables.values()])
        return lf.steer(model, edit)

    monkeypatch.setattr("lapefast.evaluate.matrix.steer", steer)
    perplexity_matrix(model, neurons, texts, random_sets=3, progress=False)
    assert placed == [[3, 1]] * 4


def test_random_sets_are_summarised_by_mean_and_range(model, neurons, texts):
    matrix = perplexity_matrix(model, neurons, texts, random_sets=4, progress=False)
    least, largest = matrix.random_range.unbind(-1)
    assert (least[1] < matrix.random_nll[1]).all()
    assert (matrix.random_nll[1] < largest[1]).all()
    assert torch.equal(matrix.random_nll[0], matrix.nll[0])
    assert torch.equal(matrix.random_nll[2], matrix.nll[0])


def test_the_seed_decides_the_random_sets(model, neurons, texts):
    first, again, other = (
        perplexity_matrix(model, neurons, texts, seed=seed, progress=False).random_nll
        for seed in (0, 0, 1)
    )
    assert torch.equal(first, again)
    assert not torch.equal(first, other)


def test_changes_are_differences_of_perplexity(model, neurons, texts):
    matrix = perplexity_matrix(model, neurons, texts, progress=False)
    assert torch.equal(matrix.changes()[0], matrix.nll[1].exp() - matrix.nll[0].exp())
    assert matrix.random_changes().shape == (2, 2, 2)


def test_at_most_so_many_tokens_are_read(model, neurons, texts):
    matrix = perplexity_matrix(model, neurons, texts, max_tokens=40, progress=False)
    assert matrix.tokens == [2 * 15, 2 * 15]


def test_published_sets_are_bound_to_the_model(model, neurons, texts, tmp_path):
    neurons.save(tmp_path / "sets.pth")
    published = NeuronSets.load(tmp_path / "sets.pth", labels=["en", "zh"])
    matrix = perplexity_matrix(model, published, texts, progress=False)
    assert torch.equal(matrix.nll, perplexity_matrix(model, neurons, texts, progress=False).nll)


def test_the_model_is_left_as_it_was(model, neurons, texts):
    model.train()
    before = [dict(module.__dict__) for module in model.modules()]
    perplexity_matrix(model, neurons, texts, progress=False)
    assert [module.__dict__ for module in model.modules()] == before


def test_a_saved_matrix_is_read_again(model, neurons, texts, tmp_path):
    matrix = perplexity_matrix(model, neurons, texts, progress=False)
    matrix.save(tmp_path / "matrix.json")
    again = PerplexityMatrix.load(tmp_path / "matrix.json")
    assert torch.equal(again.nll, matrix.nll)
    assert torch.equal(again.random_range, matrix.random_range)
    assert (again.rows, again.columns, again.tokens) == (matrix.rows, matrix.columns, matrix.tokens)
    assert again.metadata == matrix.metadata


@pytest.mark.parametrize(
    "spoil",
    [
        lambda text: text[: len(text) // 2],
        lambda text: "[]",
        lambda text: json.dumps({**json.loads(text), "version": 9}),
        lambda text: json.dumps({**json.loads(text), "rows": ["none"]}),
        lambda text: json.dumps({**json.loads(text), "nll": "x"}),
    ],
    ids=["cut", "other", "version", "shape", "kind"],
)
def test_a_file_that_is_no_matrix_is_refused(model, neurons, texts, tmp_path, spoil):
    path = tmp_path / "matrix.json"
    perplexity_matrix(model, neurons, texts, progress=False).save(path)
    path.write_text(spoil(path.read_text()))
    with pytest.raises(InputError, match="the matrix file"):
        PerplexityMatrix.load(path)


@pytest.mark.parametrize(
    ("changed", "said"),
    [
        ({"rows": []}, "is damaged: it has no rows; make it again"),
        ({"columns": []}, "is damaged: it is of no label or of no text"),
        ({"rows": ["none"]}, "is damaged: it is of no label or of no text"),
        ({"nll": [[math.nan] * 2] * 3}, "is damaged: a likelihood is not finite"),
        ({"random_nll": [[math.inf] * 2] * 3}, "is damaged: a likelihood is not finite"),
    ],
)
def test_a_matrix_without_numbers_is_refused(model, neurons, texts, tmp_path, changed, said):
    path = tmp_path / "matrix.json"
    perplexity_matrix(model, neurons, texts, progress=False).save(path)
    path.write_text(json.dumps(json.loads(path.read_text()) | changed))
    with pytest.raises(InputError, match=said):
        PerplexityMatrix.load(path)


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"batch_size": 0}, "batch_size"),
        ({"random_sets": 0}, "random_sets"),
        ({"seq_len": 64}, "limit"),
        ({"seq_len": 1, "corpora": {"en": torch.zeros(9, dtype=torch.int64)}}, "at least 2"),
        ({"corpora": {"en": torch.full((2, 8), VOCABULARY)}}, "vocabulary"),
        ({"corpora": {}}, "empty"),
    ],
)
def test_bad_arguments_are_refused(model, neurons, texts, change, message):
    with pytest.raises(InputError, match=message):
        perplexity_matrix(model, neurons, **{"corpora": texts, "progress": False, **change})


def test_a_label_named_like_the_unedited_row_is_refused(model, neurons, texts):
    sets = NeuronSets({"none": neurons["en"]}, neurons.layout)
    with pytest.raises(InputError, match="rename it"):
        perplexity_matrix(model, sets, texts, progress=False)


def test_no_label_at_all_is_refused(model, neurons, texts):
    with pytest.raises(InputError, match="a matrix needs a label"):
        perplexity_matrix(model, NeuronSets({}, neurons.layout), texts, progress=False)


def test_neurons_of_another_model_are_refused(model, neurons, texts):
    with torch.no_grad():
        model.model.layers[0].mlp.down_proj.weight.add_(1)
    with pytest.raises(InputError, match="fingerprint"):
        perplexity_matrix(model, neurons, texts, progress=False)


def test_a_likelihood_that_is_not_finite_is_refused_by_its_label(model, neurons, texts):
    with torch.no_grad():
        model.lm_head.weight[3] = float("inf")  # behind every FFN, so that no site is to blame
    with pytest.raises(InputError, match="text of label 'en' is not finite"):
        perplexity_matrix(model, neurons, texts, progress=False)

"""PLND against its formulas, written out: each neuron left out of each document in turn."""

from __future__ import annotations

import math

import pytest
import torch
from families import by_name

import lapefast as lf
from lapefast.detect.plnd.scores import DocumentScores
from lapefast.detect.plnd.zones import zones
from lapefast.errors import InputError
from lapefast.models import find_linears
from lapefast.models.bare import bare_model
from lapefast.models.projections import up_projection
from lapefast.models.structure import find_ffns
from lapefast.profiling.documents import DocumentPass

VOCABULARY = 97
# Two runs of one model in float32 that group its sums otherwise: 128 spacings, as sums of some
# dozens of terms go through two layers; 16 of the map's norm for its changes, which are small.
ROUNDED = {
    "rtol": 128 * torch.finfo(torch.float32).eps,
    "atol": 16 * torch.finfo(torch.float32).eps,
}


def documents(seed, count=4, shortest=3, longest=9):
    generator = torch.Generator().manual_seed(seed)
    lengths = torch.randint(shortest, longest, (count,), generator=generator).tolist()
    return [torch.randint(2, VOCABULARY, (n,), generator=generator).tolist() for n in lengths]


CORPORA = {"en": documents(0), "zh": documents(1), "ja": documents(2)}


def by_hand(model, ids, form):
    """(kind, path) -> the scores of one document, float64, for a Llama or Mistral."""
    model = model.double()
    bare, config, scores = model.model, model.config, {}
    heads, key_heads = config.num_attention_heads, config.num_key_value_heads
    size, served = bare.layers[0].self_attn.head_dim, heads // key_heads
    inputs = {}

    def keep(name):
        return lambda module, given, options: inputs.__setitem__(
            name, (*given, options.get("hidden_states"), options.get("position_embeddings"))
        )

    hooks = []
    for number, layer in enumerate(bare.layers):
        hooks += [
            layer.self_attn.register_forward_pre_hook(keep(f"a{number}"), with_kwargs=True),
            layer.mlp.register_forward_pre_hook(keep(f"f{number}"), with_kwargs=True),
            layer.self_attn.o_proj.register_forward_pre_hook(keep(f"o{number}"), with_kwargs=True),
        ]
    with torch.no_grad():
        model(torch.tensor([ids]))
        for number, layer in enumerate(bare.layers):
            x, mlp = inputs[f"f{number}"][0][0], layer.mlp
            up = mlp.up_proj(x)
            product = mlp.act_fn(mlp.gate_proj(x)) * up
            whole, left = mlp.down_proj(product), []
            for neuron in range(product.shape[1]):
                without = product.clone()
                without[:, neuron] = 0
                left.append((whole - mlp.down_proj(without)).norm())
            paper = torch.stack(left)
            scores["ffn", f"layers.{number}.mlp"] = paper if form == "paper" else up.abs().sum(0)
            path = f"layers.{number}.self_attn"
            scores["value", path] = inputs[f"o{number}"][0][0].abs().sum(0)

            hidden, (cos, sin) = [one for one in inputs[f"a{number}"] if one is not None][-2:]

            def turned(linear, count, hidden=hidden, cos=cos, sin=sin):
                made = linear(hidden)[0].view(len(ids), count, size).transpose(0, 1)
                half = torch.cat([-made[..., size // 2 :], made[..., : size // 2]], -1)
                return made * cos[0] + half * sin[0]

            query = turned(layer.self_attn.q_proj, heads)
            key = turned(layer.self_attn.k_proj, key_heads)
            later = torch.ones(len(ids), len(ids), dtype=torch.bool).triu(1)
            found = []
            for head in range(heads):
                q, k = query[head], key[head // served]
                logits = (q @ k.T / math.sqrt(size)).masked_fill(later, -torch.inf)
                for c in range(size):
                    taken = torch.outer(q[:, c], k[:, c])
                    # The released code takes the product away undivided.
                    taken = taken / math.sqrt(size) if form == "paper" else taken
                    change = (logits - taken).softmax(-1) - logits.softmax(-1)
                    square = change.square().sum()
                    found.append(square.sqrt() if form == "paper" else square)
            scores["query_key", path] = torch.stack(found)
    for hook in hooks:
        hook.remove()
    return scores


@pytest.mark.parametrize("form", ["paper", "released"])
@pytest.mark.parametrize("name", ["llama", "mistral"])
def test_scores_are_those_of_the_formulas(name, form):
    model, reference = by_name(name).build(), by_name(name).build()
    text = DocumentPass(model, CORPORA, None, batch_size=3, progress=False)
    with DocumentScores(model, ("ffn", "query_key", "value"), form, 3) as scores:
        for label in text.labels:
            for batch in text.batches(label):
                found = scores.of(batch)
                for row, number in enumerate(batch.numbers):
                    expected = by_hand(reference, CORPORA[label][number], form)
                    assert set(found) == set(expected)
                    for unit, values in expected.items():
                        # The model's float32 against float64: a few hundred roundings, of values
                        # that are differences in the case of query_key.
                        loose = {"rtol": 2e-4, "atol": 2e-6}
                        torch.testing.assert_close(found[unit][row], values.double(), **loose)


@pytest.mark.parametrize("form", ["paper", "released"])
def test_neurons_are_the_intersection_over_documents_less_what_all_labels_share(form):
    model, reference = by_name("mistral").build(), by_name("mistral").build()
    top = {"ffn": 24, "query_key": 16, "value": 24}
    found = lf.detect.plnd(model, None, CORPORA, form=form, top=top, batch_size=2, progress=False)
    config = model.config
    size = model.model.layers[0].self_attn.head_dim
    served = config.num_attention_heads // config.num_key_value_heads
    common = {}
    for label, texts in CORPORA.items():
        for ids in texts:
            for unit, scores in by_hand(reference, ids, form).items():
                order = sorted(range(len(scores)), key=lambda i: (-float(scores[i]), i))
                best = set(order[: top[unit[0]]])
                common.setdefault(label, {}).setdefault(unit, best)
                common[label][unit] &= best

    def rows_of(units):
        rows = {}
        for (kind, path), chosen in units.items():
            key_rows = {j // size // served * size + j % size for j in chosen}
            if kind == "ffn":
                rows[path] = chosen
            elif kind == "value":
                rows[f"{path}.v_proj"] = key_rows
            else:
                rows[f"{path}.q_proj"] = chosen
                rows[f"{path}.k_proj"] = key_rows
        return rows

    served_twice = 0
    for label, units in common.items():
        shared = {unit: set.intersection(*(of[unit] for of in common.values())) for unit in units}
        specific = rows_of({unit: chosen - shared[unit] for unit, chosen in units.items()})
        in_every = rows_of(shared)
        for site, rows in rows_of(units).items():
            assert set(found.languages[label][site].tolist()) == rows
            assert set(found[label][site].tolist()) == specific[site]
            served_twice += len(specific[site] & in_every[site])
    assert sum(one.total for one in found.values()) > 0
    assert served_twice  # a row of one label by one head's unit, and of all by another's


def test_padding_and_batches_do_not_matter():
    model = by_name("llama").build()
    options = {"top": 10, "progress": False}
    alone = lf.detect.plnd(model, None, CORPORA, batch_size=1, **options)
    together = lf.detect.plnd(model, None, CORPORA, batch_size=4, **options)
    for label in CORPORA:
        for unit, scores in alone.mean_scores[label].items():
            torch.testing.assert_close(scores, together.mean_scores[label][unit], **ROUNDED)


@pytest.mark.parametrize("name", ["gpt2", "phi3", "gemma2", "qwen3", "gpt-neox", "opt"])
def test_other_families_are_scored_and_their_neurons_can_be_deactivated(name):
    model = by_name(name).build()
    found = lf.detect.plnd(model, None, CORPORA, top=12, batch_size=2, progress=False)
    assert found.metadata["failed"] == []
    assert any(site in find_linears(model) for site in found["en"])
    ids = torch.tensor([CORPORA["en"][0]])
    with torch.no_grad():
        before = model(ids)[0]
        with lf.steer(model, lf.deactivate(found.languages["en"])):
            assert not torch.equal(model(ids)[0], before)
        assert torch.equal(model(ids)[0], before)


def test_ffns_alone_need_no_attention():
    for name in ("bloom", "t5-v1.1"):
        model = by_name(name).build()
        found = lf.detect.plnd(
            model, None, CORPORA, kinds=("ffn",), top=5, batch_size=2, progress=False
        )
        assert {kind for kind, _ in found.mean_scores["en"]} == {"ffn"}


@pytest.mark.parametrize(
    ("name", "kinds", "message"),
    [
        ("bloom", ("ffn", "query_key", "value"), "gave no scores of query_key, value; leave these"),
        ("bloom", ("value",), "no self-attention of BloomModel was seen"),
        ("t5-v1.1", ("ffn", "value"), r'models of one stack.*take kinds=\("ffn",\)'),
    ],
)
def test_attentions_that_cannot_be_scored_are_refused(name, kinds, message):
    with pytest.raises(InputError, match=message):
        lf.detect.plnd(by_name(name).build(), None, CORPORA, kinds, top=5, progress=False)


def test_documents_are_refused_whose_pass_runs_other_layers_or_gives_no_numbers():
    model = by_name("llama").build()
    with torch.no_grad():
        model.model.embed_tokens.weight[1] = torch.nan

    def shorten(module, given, options):
        model.config.num_hidden_layers = 1 if options["input_ids"][0, 0] == 2 else 2

    model.model.register_forward_pre_hook(shorten, with_kwargs=True)
    corpora = {"en": [[5, 6, 7], [2, 8, 9], [5, 1, 7]], "zh": [[7, 8], [9, 10]]}
    found = lf.detect.plnd(model, None, corpora, ("value",), top=5, batch_size=1, progress=False)
    assert [(one["document"], one["reason"]) for one in found.metadata["failed"]] == [
        (1, "LlamaModel scored other neurons than of the documents before"),
        (2, "layers.0.self_attn: scores of value are not finite (NaN or infinite)"),
    ]


@pytest.mark.parametrize("name", ["gpt2", "opt", "t5-v1.1"])
def test_the_released_form_sums_what_up_gives_in_any_ffn(name):
    model = by_name(name).build()
    found = lf.detect.plnd(
        model, None, CORPORA, ("ffn",), "released", top=5, batch_size=3, progress=False
    )
    ffns = find_ffns(model)
    for ffn in (ffns[0], ffns[-1]):
        up, first = up_projection(ffn)
        sums = []
        hook = up.register_forward_hook(
            lambda module, given, output, first=first, width=ffn.site.width, sums=sums: sums.append(
                output.reshape(-1, output.shape[-1])[:, first : first + width].abs().sum(0)
            )
        )
        for ids in CORPORA["en"]:
            batch = {"input_ids": torch.tensor([ids])}
            if name.startswith("t5"):
                batch["decoder_input_ids"] = torch.tensor([[0, *ids[:-1]]])
            with torch.no_grad():
                bare_model(model)(**batch)
        hook.remove()
        scores = found.mean_scores["en"]["ffn", ffn.site.name]
        expected = torch.stack(sums).double().mean(0)
        torch.testing.assert_close(scores, expected, **ROUNDED)


def test_a_document_that_fails_is_reported_and_the_others_count():
    model = by_name("llama").build()
    embedding = model.model.embed_tokens.weight
    with torch.no_grad():
        embedding[1] = torch.nan
    broken = {**CORPORA, "en": [CORPORA["en"][0], [5, 1, 7], *CORPORA["en"][1:]]}
    found = lf.detect.plnd(model, None, broken, top=10, batch_size=2, progress=False)
    (failed,) = found.metadata["failed"]
    assert (failed["label"], failed["document"]) == ("en", 1)
    assert "finite" in failed["reason"]
    whole = lf.detect.plnd(model, None, CORPORA, top=10, batch_size=2, progress=False)
    assert all(found[label] == whole[label] for label in CORPORA)
    with pytest.raises(InputError, match="no document of label 'en'"):
        lf.detect.plnd(model, None, {**CORPORA, "en": [[5, 1]]}, top=10, progress=False)


def test_a_threshold_chooses_what_is_above_it():
    model = by_name("llama").build()
    found = lf.detect.plnd(
        model, None, CORPORA, kinds=("ffn",), threshold=0.0, batch_size=2, progress=False
    )
    for label in CORPORA:
        for (_, site), scores in found.mean_scores[label].items():
            # What is above 0 in every document is above 0 in their mean.
            assert bool((scores[found.languages[label][site]] > 0).all())
            assert len(found.languages[label][site]) > len(scores) / 2
    none = lf.detect.plnd(
        model, None, CORPORA, kinds=("ffn",), threshold=1e9, batch_size=2, progress=False
    )
    assert none.languages["en"].total == 0


def test_too_large_a_top_is_clamped_and_says_so():
    model = by_name("llama").build()
    found = lf.detect.plnd(model, None, CORPORA, batch_size=4, progress=False)
    assert any("is all" in note for note in found.metadata["notes"])
    assert found.metadata["parameters"]["top"] == {"ffn": 12000, "query_key": 2000, "value": 2000}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"kinds": ("ffn", "gate")}, "kinds must be"),
        ({"kinds": ()}, "kinds must be"),
        ({"form": "other"}, "form must be"),
        ({"top": 5, "threshold": 0.1}, "one of them"),
        ({"top": 0}, "at least 1"),
        ({"top": {"ffn": 3}}, "one for each"),
        ({"threshold": math.nan}, "must be a number"),
    ],
)
def test_wrong_arguments_are_refused(options, message):
    with pytest.raises(InputError, match=message):
        lf.detect.plnd(by_name("llama").build(), None, CORPORA, progress=False, **options)


def test_documents_without_labels_and_one_label_are_refused():
    with pytest.raises(InputError, match="a dict from label"):
        lf.detect.plnd(by_name("llama").build(), None, None, progress=False)
    with pytest.raises(InputError, match="at least two"):
        lf.detect.plnd(by_name("llama").build(), None, {"en": CORPORA["en"]}, progress=False)


def test_zones_of_an_encoder_lie_before_those_of_its_decoder():
    sites = [f"{stack}.block.{layer}.mlp" for stack in ("encoder", "decoder") for layer in (0, 1)]
    layout = lf.neurons.Layout(tuple(sites))
    parts = zones(lf.NeuronSets({"en": {site: [0] for site in sites}}, layout), 1, 2)
    found = [[site for site, of in part["en"].items() if len(of)] for part in parts.values()]
    assert found == [sites[:1], sites[1:2], sites[2:]]


def test_zones_part_the_layers_and_their_deactivation_is_undone():
    model = by_name("llama").build()
    found = lf.detect.plnd(model, None, CORPORA, top=12, batch_size=2, progress=False).languages
    last = model.config.num_hidden_layers - 1
    parts = zones(found, understanding=1, generation=1)
    assert sum(part["en"].total for part in parts.values()) == found["en"].total
    assert all(".0." in s or not len(i) for s, i in parts["understanding"]["en"].items())
    assert all(f".{last}." in s or not len(i) for s, i in parts["generation"]["en"].items())
    assert [part.metadata["part"] for part in parts.values()] == list(parts)
    assert found.metadata["part"] == "languages"
    ffns = zones(found, 1, 1, parts=("ffn",))["generation"]["en"]
    assert ffns.total
    assert all("mlp" in site or not len(indices) for site, indices in ffns.items())
    ids = torch.tensor([CORPORA["en"][0]])
    with torch.no_grad():
        before = model(ids).logits
        with lf.steer(model, lf.deactivate(ffns)):
            assert not torch.equal(model(ids).logits, before)
        assert torch.equal(model(ids).logits, before)
    for wrong in ((-1, 0), (2, 9), (1.5, 0)):
        with pytest.raises(InputError):
            zones(found, *wrong)
    with pytest.raises(InputError, match="neurons must be NeuronSets, got dict"):
        zones({}, 1, 1)
    with pytest.raises(InputError, match="parts must be"):
        zones(found, 1, 0, parts=("gate",))
    flat = lf.NeuronSets({"en": {"mlp": [0]}}, lf.neurons.Layout(("mlp",)))
    with pytest.raises(InputError, match="the site mlp is in no numbered layer"):
        zones(flat, 0, 0)


def test_it_is_kept_as_other_neuron_sets_are(tmp_path):
    model = by_name("llama").build()
    found = lf.detect.plnd(model, None, CORPORA, top=12, batch_size=2, progress=False)
    found.save(tmp_path / "plnd.json")
    loaded = lf.NeuronSets.load(tmp_path / "plnd.json")
    assert all(loaded[label] == found[label] for label in CORPORA)
    assert loaded.metadata["method"] == "plnd"

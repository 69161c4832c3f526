"""The sweep, on the demo model and on a tiny one."""

from __future__ import annotations

import importlib
import json
import math

import pytest
import torch
from families import shared
from torch.nn.functional import cross_entropy
from transformers import LlamaConfig, LlamaForCausalLM

import lapefast as lf
from lapefast import demo
from lapefast.errors import InputError
from lapefast.evaluate import Sweep, sweep
from lapefast.evaluate.likelihood import TokenLikelihood
from lapefast.evaluate.random_sets import random_like
from lapefast.models import find_sites
from lapefast.neurons import NeuronSets
from lapefast.neurons.layout import Layout
from lapefast.steering import Shift
from lapefast.steering.continuations import continuations

# Of the packages' attributes of this name one is the function.
plan = importlib.import_module("lapefast.evaluate.sweep.plan")

VOCABULARY, WIDTH = 50, 24
PROMPTS = {"en": ["bcd efg", "hij"], "zh": ["klmnop q", "rs"]}


class Letters:
    """A tokenizer that has a token for each of fifty characters."""

    name_or_path = "letters"

    def __call__(self, text: str):
        return type("Encoded", (), {"input_ids": [ord(one) % VOCABULARY for one in text]})

    def decode(self, tokens, skip_special_tokens):
        return "".join(chr(ord("A") + token) for token in tokens)


@pytest.fixture
def model():
    torch.manual_seed(0)
    model = LlamaForCausalLM(
        LlamaConfig(
            vocab_size=VOCABULARY,
            hidden_size=16,
            intermediate_size=WIDTH,
            num_hidden_layers=2,
            num_attention_heads=2,
            max_position_embeddings=32,
            eos_token_id=2,
            pad_token_id=2,
        )
    ).eval()
    with torch.no_grad():  # large enough that edits change what is generated
        for parameter in model.parameters():
            parameter.mul_(4)
    return model


@pytest.fixture
def neurons(model):
    layout = Layout(()).bind(model)
    first, second = layout.sites
    sets = {"en": {first: [1, 5, 9], second: [2]}, "zh": {first: [5, 7], second: []}}
    return NeuronSets(sets, layout)


@pytest.fixture
def profile(model):
    generator = torch.Generator().manual_seed(1)
    texts = {
        label: torch.randint(0, VOCABULARY, (6, 16), generator=generator) for label in ("en", "zh")
    }
    return lf.profile(model, texts, progress=False)


@pytest.fixture
def means(model):
    generator = torch.Generator().manual_seed(2)
    texts = {
        label: torch.randint(0, VOCABULARY, (6, 16), generator=generator) for label in ("en", "zh")
    }
    return lf.residual_means(model, texts, progress=False)


def run(model, neurons, profile, **options):
    given = {"max_new_tokens": 5, "random_sets": 2, "progress": False, "prompts": PROMPTS}
    given |= options
    return sweep(model, neurons, profile, given.pop("prompts"), Letters(), **given)


def by_kind(found, kind):
    return [row for row in found.rows if row.kind == kind]


def test_shared_batches_generate_what_one_pair_at_a_time_generates():
    made = demo.load(progress=False)
    sites = find_sites(made.model)
    generator = torch.Generator().manual_seed(0)
    labels = ("en", "zh", "fr")
    sets = NeuronSets(
        {
            label: {
                site.name: torch.randperm(site.width, generator=generator)[:60] for site in sites
            }
            for label in labels
        },
        Layout(()).bind(made.model),
    )
    profile = lf.profile(
        made.model,
        {label: made.train[label] for label in labels},
        made.tokenizer,
        seq_len=128,
        max_tokens=1024,
        progress=False,
    )
    prompts = {label: demo.prompts(3)[label] for label in labels}
    found = sweep(
        made.model,
        sets,
        profile,
        prompts,
        made.tokenizer,
        max_new_tokens=16,
        batch_size=13,
        random_sets=0,
        progress=False,
    )
    edited = by_kind(found, "edited")
    assert len(edited) == 27
    alone = {}
    for source in labels:
        for target in labels:
            edit = lf.activate(sets[target], profile.means(target))
            if source != target:
                edit = lf.deactivate(sets[source]) | edit
            with lf.steer(made.model, edit), torch.no_grad():
                for prompt in prompts[source]:
                    ids = made.tokenizer(prompt, return_tensors="pt").input_ids
                    new = made.model.generate(
                        ids,
                        attention_mask=torch.ones_like(ids),
                        max_new_tokens=16,
                        do_sample=False,
                    )
                    alone[source, target, prompt] = new[0, ids.shape[1] :].tolist()
    assert {(row.source, row.target, row.prompt): row.tokens for row in edited} == alone
    # Otherwise equality would say nothing of whose edit was whose.
    assert len({tuple(tokens) for tokens in alone.values()}) > 2 * 9


def test_every_kind_of_row_is_there_once_per_prompt(model, neurons, profile, means):
    found = run(model, neurons, profile, means=means)
    assert found.pairs == [("en", "en"), ("en", "zh"), ("zh", "en"), ("zh", "zh")]
    kinds = {kind: len(by_kind(found, kind)) for kind in ("unedited", "edited", "random")}
    assert kinds == {"unedited": 4, "edited": 8, "random": 16}
    assert len(by_kind(found, "diffmean")) == 8
    assert len(found.rows) == 36
    for row in found.rows:
        assert (row.target is None) == (row.kind == "unedited")
        assert (row.set is None) == (row.kind != "random")
        assert row.prompt in PROMPTS[row.source]
        assert row.text == Letters().decode(row.tokens, True)
        assert 1 <= len(row.tokens) <= 5


def test_likelihoods_are_those_of_the_unedited_model(model, neurons, profile):
    for row in run(model, neurons, profile).rows:
        prompt = Letters()(row.prompt).input_ids
        ids = torch.tensor([prompt + row.tokens])
        with torch.no_grad():
            logits = model(ids).logits[0, len(prompt) - 1 : -1].double()
        expected = float(cross_entropy(logits, torch.tensor(row.tokens)))
        # Softmax in float32 of logits below 64: half a unit in their last place is 2^-19, for the
        # token and for the sum, and batches of other shapes err by some units of their own.
        assert row.nll == pytest.approx(expected, abs=16 * 2**-19)


def same_edit(one, other) -> bool:
    return list(one.tables) == list(other.tables) and all(
        torch.equal(mine, theirs)
        for site, table in one.tables.items()
        for mine, theirs in zip(table, other.tables[site], strict=True)
    )


def test_the_edits_are_those_of_source_and_target(model, neurons, profile, means, monkeypatch):
    placed, drawn = [], []

    def steer(model, edits, where):
        placed.append((edits, where))
        return lf.steer(model, edits, where)

    def draw(neurons, generator):
        drawn.append(random_like(neurons, generator))
        return drawn[-1]

    monkeypatch.setattr("lapefast.steering.continuations.steer", steer)
    monkeypatch.setattr(plan, "random_like", draw)
    options = {"pairs": [("en", "zh")], "random_sets": 1, "where": "generated"}
    shifted = {"means": means, "strength": 2.5, "shift_layers": [0]}
    run(model, neurons, profile, **options, **shifted)
    ((edits, where),) = placed  # one batch, steered once
    assert where == "generated"
    distinct = {id(edit): edit for edit in edits if edit is not None}.values()
    edited, random = (edit for edit in distinct if not isinstance(edit, Shift))
    values = profile.means("zh")
    own = lf.deactivate(neurons["en"]) | lf.activate(neurons["zh"], values)
    of_en, of_zh = drawn
    assert same_edit(edited, own)
    assert same_edit(random, lf.deactivate(of_en) | lf.activate(of_zh, values))
    (shift,) = (edit for edit in distinct if isinstance(edit, Shift))
    expected = means.towards("zh", [0], 2.5)
    assert list(shift.vectors) == list(expected.vectors) == ["layers.0"]
    assert torch.equal(shift.vectors["layers.0"], expected.vectors["layers.0"])


def test_equal_edits_of_equal_prompts_are_generated_once(model, neurons, profile, monkeypatch):
    asked = []

    def spy(model, requests, **options):
        asked.append(len(requests))
        return continuations(model, requests, **options)

    monkeypatch.setattr(plan, "continuations", spy)
    same = NeuronSets({"en": neurons["en"], "zh": neurons["en"]}, neurons.layout)
    prompts = {"en": PROMPTS["en"], "zh": PROMPTS["en"]}
    found = run(model, same, profile, prompts=prompts, random_sets=0)
    # Unedited, and activated to either label's means: the source's neurons are all the target's.
    assert asked == [3 * 2]
    assert len(found.rows) == 4 + 8


def test_random_sets_have_the_same_size_in_every_layer(model, neurons, profile, monkeypatch):
    drawn = []

    def spy(neurons, generator):
        drawn.append((neurons, random_like(neurons, generator)))
        return drawn[-1][1]

    monkeypatch.setattr(plan, "random_like", spy)
    run(model, neurons, profile, random_sets=3)
    assert len(drawn) == 2 * 3
    assert all(
        [len(one) for one in given.values()] == [len(one) for one in random.values()]
        for given, random in drawn
    )


def test_the_seed_decides_the_random_sets(model, neurons, profile):
    first, again, other = (run(model, neurons, profile, seed=seed).rows for seed in (0, 0, 1))
    assert first == again
    assert first != other


def test_the_summary_says_how_often_the_target_is_reached(model, neurons, profile, means):
    found = run(model, neurons, profile, means=means)
    (pair,) = (one for one in found.summary() if (one.source, one.target) == ("en", "zh"))
    assert pair.overlap == 1

    def check(summary, kind, target="zh", index=None):
        about = ("en", target, kind, index)
        rows = [row for row in found.rows if (row.source, row.target, row.kind, row.set) == about]
        assert summary.share == sum(row.language == "zh" for row in rows) / 2
        tokens = sum(len(row.tokens) for row in rows)
        nll = sum(row.nll * len(row.tokens) for row in rows) / tokens
        assert summary.perplexity == pytest.approx(math.exp(nll), rel=1e-12)
        return summary.perplexity

    kinds = [check(pair.edited, "edited"), check(pair.diffmean, "diffmean")]
    kinds += [check(one, "random", index=index) for index, one in enumerate(pair.random)]
    kinds += [check(pair.unedited, "unedited", target=None)]
    assert len(set(kinds)) == len(kinds) == 5  # so that none was taken for another
    shares = [one.share for one in pair.random]
    assert pair.random_range == (min(shares), max(shares))
    assert pair.random_mean.share == pytest.approx(sum(shares) / 2)


def test_without_random_sets_and_means_there_is_nothing_of_them(model, neurons, profile):
    pair = run(model, neurons, profile, random_sets=0).summary()[0]
    assert (pair.random, pair.random_mean, pair.random_range, pair.diffmean) == (
        [],
        None,
        None,
        None,
    )


def test_a_saved_sweep_is_a_line_of_json_per_generation_after_its_settings(
    model, neurons, profile, tmp_path
):
    found = run(model, neurons, profile)
    found.save(tmp_path / "sweep.jsonl")
    about, *lines = map(json.loads, (tmp_path / "sweep.jsonl").read_text().splitlines())
    assert about["metadata"] == found.metadata
    assert len(lines) == len(found.rows)
    assert list(lines[0]) == [
        *("source", "target", "kind", "set", "prompt", "text", "tokens", "language", "nll")
    ]
    assert [line["nll"] for line in lines] == [row.nll for row in found.rows]


def test_a_sweep_is_read_as_it_was_written(model, neurons, profile, means, tmp_path):
    found = run(model, neurons, profile, means=means, pairs=[("en", "zh"), ("zh", "zh")])
    path = tmp_path / "sweep.jsonl"
    found.save(path)
    assert Sweep.load(path) == found
    assert found.metadata["versions"]["torch"] == torch.__version__
    assert found.metadata["prompts"] == {"en": 2, "zh": 2}
    assert found.metadata["pairs"] == [["en", "zh"], ["zh", "zh"]]
    assert found.metadata["corpora"] == means.metadata["corpora"]


def test_prompts_may_be_a_file_of_json_lines(model, neurons, profile, tmp_path):
    path = tmp_path / "prompts.jsonl"
    lines = [{"label": label, "prompt": one} for label, given in PROMPTS.items() for one in given]
    path.write_text("\n".join(map(json.dumps, lines)) + "\n")
    read = run(model, neurons, profile, prompts=path)
    assert read.rows == run(model, neurons, profile).rows
    assert read.metadata["prompts_source"] == "prompts.jsonl"


def test_the_model_is_left_as_it_was(model, neurons, profile):
    model.train()
    before = [dict(module.__dict__) for module in model.modules()]
    run(model, neurons, profile)
    assert [module.__dict__ for module in model.modules()] == before


@pytest.mark.parametrize(
    ("change", "message"),
    [
        ({"pairs": []}, "at least one pair"),
        ({"pairs": [("en", "xx")]}, "no neurons of label 'xx'"),
        ({"pairs": [("en", "zh")] * 2}, "distinct pairs"),
        ({"prompts": {"en": ["a"]}}, "no prompts of label 'zh'"),
        ({"prompts": {"en": "a", "zh": "b"}}, "a list of texts"),
        ({"random_sets": -1}, "random_sets"),
        ({"max_new_tokens": 0}, "max_new_tokens"),
        ({"max_new_tokens": 32}, "over the model's limit of 32"),
        ({"batch_size": 0}, "batch_size"),
        ({"where": "nowhere"}, "where must be"),
        ({"languages": {"zh": "klingon"}}, "the code 'klingon' of label 'zh'"),
    ],
)
def test_bad_arguments_are_refused(model, neurons, profile, change, message):
    with pytest.raises(InputError, match=message):
        run(model, neurons, profile, **change)


def test_a_label_without_neurons_is_refused_by_name(model, neurons, profile):
    sets = NeuronSets({"en": neurons["en"], "zh": {}}, neurons.layout)
    with pytest.raises(InputError, match="label 'zh' has no neurons"):
        run(model, sets, profile)


def test_a_profile_of_another_model_is_refused(model, neurons, profile):
    profile.metadata["fingerprint"] = "0" * 64
    with pytest.raises(InputError, match="another model"):
        run(model, neurons, profile)


def test_likelihoods_that_are_not_finite_are_refused(model, neurons, profile, monkeypatch):
    monkeypatch.setattr(
        TokenLikelihood,
        "of_each",
        lambda self, rows, counted: torch.full((len(rows),), float("nan")),
    )
    with pytest.raises(InputError, match="not finite"):
        run(model, neurons, profile)


@pytest.mark.parametrize(
    "content",
    ["", "[]\n", '{"prompt": "x"}\n', '{"label": "en", "prompt": ""}\n', "{", '{"label": 1}'],
)
def test_a_prompt_file_that_is_none_is_refused(model, neurons, profile, tmp_path, content):
    path = tmp_path / "prompts.jsonl"
    path.write_text(content)
    with pytest.raises(InputError, match="the prompt file .*prompts.jsonl"):
        run(model, neurons, profile, prompts=path)


def test_continuations_end_where_the_text_ends(model):
    ids = [[3, 4, 5], [7, 8], [9]]
    free = continuations(model, [(one, None) for one in ids], max_new_tokens=8, progress=False)
    model.generation_config.eos_token_id = [free[0][2], free[1][5]]
    found = continuations(model, [(one, None) for one in ids], max_new_tokens=8, progress=False)
    for before, after in zip(free, found, strict=True):
        ends = [at for at, token in enumerate(before) if token in (free[0][2], free[1][5])]
        assert after == before[: ends[0] + 1 if ends else None]
    assert len(found[0]) <= 3


def test_an_empty_prompt_is_refused(model):
    with pytest.raises(InputError, match="prompt 1 is empty"):
        continuations(model, [([3], None), ([], None)], max_new_tokens=2, progress=False)


def test_what_continues_no_text_is_refused(model):
    for other, message in (
        (model.model, "LlamaModel has no generate"),
        (shared("t5-v1.1"), "T5ForConditionalGeneration is an encoder-decoder"),
    ):
        with pytest.raises(InputError, match=message):
            continuations(other, [([3], None)], max_new_tokens=2, progress=False)


def test_of_each_adds_up_to_the_likelihood_of_the_rows(model):
    rows = torch.randint(3, VOCABULARY, (5, 12), generator=torch.Generator().manual_seed(1))
    likelihood = TokenLikelihood(model)
    assert likelihood.in_chunks
    each = likelihood.of_each(rows, torch.ones_like(rows, dtype=torch.bool))
    assert each.shape == (5,)
    # The same float32 losses, added in float64 in another order.
    assert float(each.sum()) == pytest.approx(likelihood(rows), rel=1e-12)
    counted = torch.zeros_like(rows, dtype=torch.bool)
    counted[:, 7:] = True
    part, rest = likelihood.of_each(rows, counted), likelihood.of_each(rows, ~counted)
    # Chunks of other sizes: the head's products differ by a few units in the last place of logits
    # below 64, 2^-18 each, in 11 predictions.
    assert torch.allclose(part + rest, each, rtol=0, atol=11 * 4 * 2**-18)


def test_of_each_row_by_row_is_what_it_is_in_chunks(model, monkeypatch):
    rows = torch.randint(3, VOCABULARY, (3, 12), generator=torch.Generator().manual_seed(1))
    counted = torch.rand(rows.shape, generator=torch.Generator().manual_seed(2)) < 0.5
    in_chunks = TokenLikelihood(model).of_each(rows, counted)
    monkeypatch.setattr(TokenLikelihood, "_decoders", lambda _: [])
    row_by_row = TokenLikelihood(model)
    assert not row_by_row.in_chunks
    assert torch.allclose(
        row_by_row.of_each(rows, counted), in_chunks, rtol=0, atol=11 * 4 * 2**-18
    )


def test_prompts_are_read_with_every_character_that_json_allows(tmp_path):
    from lapefast.evaluate.prompts import read_prompts

    path = tmp_path / "prompts.jsonl"
    lines = [{"label": "en", "prompt": "a\u2028b\u0085c"}, {"label": "zh", "prompt": "d"}]
    text = "\n".join(json.dumps(line, ensure_ascii=False) for line in lines)
    path.write_text("\ufeff" + text + "\n", "utf-8")
    assert read_prompts(path) == {"en": ["a\u2028b\u0085c"], "zh": ["d"]}

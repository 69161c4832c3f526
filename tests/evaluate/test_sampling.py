"""Texts from nothing, before and after neurons are set."""

from __future__ import annotations

import io

import pytest
import torch
from tqdm.auto import tqdm

import lapefast as lf
from lapefast import demo
from lapefast.errors import InputError
from lapefast.evaluate import SampledLanguages, sampling
from lapefast.evaluate.language import LanguageIdentifier
from lapefast.neurons import Layout

OPTIONS = {"samples": 24, "max_new_tokens": 24, "progress": False}


@pytest.fixture(scope="module")
def made():
    return demo.load(progress=False)


@pytest.fixture(scope="module")
def found(made):
    texts = {label: made.valid[label] for label in ("en", "zh", "ja")}
    return lf.detect.average_precision(
        made.model, made.tokenizer, texts, top=60, bottom=60, max_documents=60, progress=False
    )


def test_texts_are_those_of_the_model_under_a_hook(made, found):
    from lapefast.models import find_linears

    measured = lf.evaluate.sampled_languages(
        made.model, made.tokenizer, found, random_sets=0, restrict=True, **OPTIONS
    )
    row = next(one for one in measured.rows if one.label == "ja")
    medians, layers, hooks = found.medians("ja"), find_linears(made.model), []

    def overwrite(indices, values):
        def hook(module, given, output):
            output = output.clone()
            output[..., indices] = values.to(output.dtype)
            return output

        return hook

    for site, indices in found["ja"].items():
        if len(indices):
            hook = overwrite(indices, medians[site][indices].float())
            hooks.append(layers[site].register_forward_hook(hook))
    prompt = torch.tensor([[made.model.config.bos_token_id]] * OPTIONS["samples"])
    own = made.tokenizer("")["input_ids"]
    if own:
        prompt = torch.tensor([own] * OPTIONS["samples"])
    torch.manual_seed(0)
    with torch.no_grad():
        ids = made.model.generate(
            prompt, attention_mask=torch.ones_like(prompt), do_sample=True, temperature=0.8,
            top_k=0, top_p=1.0, max_new_tokens=OPTIONS["max_new_tokens"],
            pad_token_id=made.model.config.eos_token_id,
        )  # fmt: skip
    for hook in hooks:
        hook.remove()
    texts = made.tokenizer.batch_decode(ids[:, prompt.shape[1] :], skip_special_tokens=True)
    assert [one.rstrip() for one in row.texts] == [one.rstrip() for one in texts]
    identify = LanguageIdentifier(found.labels)
    assert row.after == sum(identify(text) == "ja" for text in row.texts) / len(texts)


def test_rows_stand_beside_random_sets_and_come_out_alike(made, found):
    before = torch.get_rng_state()
    runs = [
        lf.evaluate.sampled_languages(
            made.model, made.tokenizer, found, random_sets=2, restrict=True, **OPTIONS
        )
        for _ in range(2)
    ]
    assert torch.equal(torch.get_rng_state(), before)
    assert runs[0].rows == runs[1].rows
    assert [row.label for row in runs[0].rows] == found.labels
    assert all(len(row.random) == 2 for row in runs[0].rows)
    assert abs(sum(row.before for row in runs[0].rows) - 1) < 0.2  # few texts are of no language
    table = runs[0].to_pandas()
    assert list(table["label"]) == found.labels
    assert (table["random_least"] <= table["random_largest"]).all()


def test_one_bar_is_of_all_texts(made, found, monkeypatch):
    bars = []

    def generating(texts, progress):
        bars.append(tqdm(total=texts, disable=not progress, file=io.StringIO()))
        return bars[-1]

    monkeypatch.setattr(sampling, "generating", generating)
    options = {**OPTIONS, "samples": 3, "max_new_tokens": 2, "progress": True}
    lf.evaluate.sampled_languages(
        made.model, made.tokenizer, found, random_sets=2, restrict=True, **options
    )
    texts = 3 * (1 + 3 * 3)
    assert [(bar.n, bar.total) for bar in bars] == [(texts, texts)]


def test_values_of_any_method_can_be_set(made):
    sets = lf.NeuronSets({"en": {"layers.0.mlp": [1, 2]}}, Layout(("layers.0.mlp",)))
    sets = sets.bind(made.model)
    with pytest.raises(InputError, match="no values to be set to"):
        lf.evaluate.sampled_languages(made.model, made.tokenizer, sets, **OPTIONS)
    values = {"en": {site: torch.ones(width) for site, width in sets.widths.items()}}
    measured = lf.evaluate.sampled_languages(
        made.model, made.tokenizer, sets, values, random_sets=1, **OPTIONS
    )
    assert len(measured.rows) == 1
    with pytest.raises(InputError, match="for label 'en'"):
        lf.evaluate.sampled_languages(made.model, made.tokenizer, sets, {"zh": {}}, **OPTIONS)
    empty = lf.NeuronSets({"en": {}}, sets.layout)
    with pytest.raises(InputError, match="no neurons"):
        lf.evaluate.sampled_languages(made.model, made.tokenizer, empty, values, **OPTIONS)
    wrong_temperatures = [{"temperature": one} for one in (0, 1e-300, float("inf"), "warm")]
    for wrong in ({"samples": 0}, {"random_sets": -1}, *wrong_temperatures):
        with pytest.raises(InputError, match=f"{next(iter(wrong))} must be"):
            lf.evaluate.sampled_languages(
                made.model, made.tokenizer, sets, values, **{**OPTIONS, **wrong}
            )
    with pytest.raises(InputError, match="neurons must be NeuronSets, got dict"):
        lf.evaluate.sampled_languages(made.model, made.tokenizer, dict(sets), values, **OPTIONS)


def test_a_tokenizer_that_begins_no_text_is_refused(made, monkeypatch):
    class Words:
        def __call__(self, text):
            return {"input_ids": []}

    monkeypatch.setattr(made.model.config, "bos_token_id", None)
    sets = lf.NeuronSets({"en": {"layers.0.mlp": [1]}}, Layout(("layers.0.mlp",)))
    with pytest.raises(InputError, match="Words has no token that begins a text"):
        lf.evaluate.sampled_languages(made.model, Words(), sets, **OPTIONS)


def test_a_file_without_rows_is_refused(tmp_path):
    SampledLanguages([]).save(tmp_path / "s.json")
    with pytest.raises(InputError, match="the sampling file .* it has no rows"):
        SampledLanguages.load(tmp_path / "s.json")

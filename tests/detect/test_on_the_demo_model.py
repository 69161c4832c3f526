"""The methods on a trained model, each against plain hooks and the formula."""

from __future__ import annotations

import copy
import functools

import pytest
import torch
from test_plnd import by_hand

import lapefast as lf
from lapefast import demo
from lapefast.models import find_linears

LABELS = ("en", "zh", "ja")


@pytest.fixture(scope="module")
def made():
    return demo.load(progress=False)


@pytest.fixture(scope="module")
def texts(made):
    """Label -> four short texts."""
    lines = {label: made.valid[label].read_text("utf-8").splitlines() for label in LABELS}
    return {label: sorted(of, key=len)[:4] for label, of in lines.items()}


def ids_of(made, text):
    return torch.tensor([made.tokenizer(text)["input_ids"]])


def run(made, text, modules, before=False):
    """Name -> what the module gave (or was given) for one text, float64 [tokens, ...]."""
    seen = {}

    def note(name, module, given, output=None):
        seen[name] = (given[0] if before else output)[0].double()

    hooks = [
        (module.register_forward_pre_hook if before else module.register_forward_hook)(
            functools.partial(note, name)
        )
        for name, module in modules.items()
    ]
    with torch.no_grad():
        made.model(ids_of(made, text))
    for hook in hooks:
        hook.remove()
    return seen


def test_plnd(made, texts):
    top = {"ffn": 128, "query_key": 16, "value": 16}
    found = lf.detect.plnd(made.model, made.tokenizer, texts, top=top, batch_size=3, progress=False)
    model = copy.deepcopy(made.model)
    for label, of in texts.items():
        scores = [by_hand(model, ids_of(made, text)[0].tolist(), "paper") for text in of]
        for unit in scores[0]:
            every = torch.stack([one[unit] for one in scores])
            # float32 against float64 through four layers: a thousand spacings, and of changes of
            # maps, which are small differences, a few of the map's norm.
            torch.testing.assert_close(
                found.mean_scores[label][unit], every.mean(0), rtol=1e-4, atol=1e-6
            )
        site, unit = "layers.1.mlp", ("ffn", "layers.1.mlp")
        chosen = [set(one[unit].topk(top["ffn"]).indices.tolist()) for one in scores]
        common = set.intersection(*chosen)
        # A score at the cut may fall on either side of it.
        near = set.union(
            *(set(one[unit].topk(top["ffn"] + 1).indices[-2:].tolist()) for one in scores)
        )
        assert set(found.languages[label][site].tolist()) ^ common <= near


def test_average_precision(made, texts):
    found = lf.detect.average_precision(
        made.model, made.tokenizer, texts, top=30, bottom=30, batch_size=3, progress=False
    )
    layers = find_linears(made.model)
    means = [
        (label, torch.cat([seen.mean(0) for seen in run(made, text, layers).values()]))
        for label, of in texts.items()
        for text in of
    ]
    scores = torch.stack([mean for _, mean in means])
    for label in LABELS:
        positive = [one == label for one, _ in means]
        ours = torch.cat([*found.scores(label).values()])
        for unit in range(0, scores.shape[1], 211):
            values, expected, before = scores[:, unit].tolist(), 0.0, 0.0
            for threshold in sorted(set(values), reverse=True):
                called = [value >= threshold for value in values]
                hits = sum(a and b for a, b in zip(called, positive, strict=True))
                recall, precision = hits / sum(positive), hits / sum(called)
                expected += (recall - before) * precision
                before = recall
            assert abs(float(ours[unit]) - expected) < 1e-9, unit


def test_sharing(made):
    examples = [{label: one[label] for label in LABELS} for one in demo.examples(5)]
    found = lf.detect.sharing(made.model, made.tokenizer, examples, progress=False)
    acts = {f"layers.{n}.mlp": layer.mlp.act_fn for n, layer in enumerate(made.model.model.layers)}
    for number, example in enumerate(examples):
        active = {
            label: {site: seen[-1] > 0 for site, seen in run(made, prompt, acts).items()}
            for label, (prompt, _) in example.items()
        }
        for at, site in enumerate(acts):
            labels = torch.stack([active[label][site] for label in LABELS]).sum(0)
            counts = [int((labels == 3).sum()), int((labels == 2).sum())]
            counts += [int((labels == 1).sum()), int((labels == 0).sum())]
            assert found.counts[number, at].tolist() == counts


def test_experts(made, texts):
    found = lf.detect.experts(
        made.model, texts, made.tokenizer, 16, share=0.2, batch_size=3, progress=False
    )
    lasts = {
        f"layers.{n}.mlp": layer.mlp.down_proj for n, layer in enumerate(made.model.model.layers)
    }
    for row, label in enumerate(LABELS):
        chosen, tokens = torch.zeros(len(lasts), 16), 0
        for text in texts[label]:
            products = run(made, text, lasts, before=True)
            scores = []
            for site, product in products.items():
                of = torch.stack(
                    [product[:, found.clusters[site] == expert].sum(1) for expert in range(16)], 1
                )
                scores.append(
                    (of - of.mean(1, keepdim=True)) / of.std(1, correction=0, keepdim=True)
                )
            every = torch.stack(scores, 1).flatten(1)  # [tokens, layers * experts]
            best = every.topk(round(0.2 * every.shape[1]), dim=1).indices
            chosen += torch.zeros_like(every).scatter_(1, best, 1).sum(0).view(-1, 16)
            tokens += len(every)
        difference = found.frequency[row] * tokens - chosen
        # Sums in float32 may order two experts otherwise that are the same within their rounding.
        assert difference.abs().sum() <= 2
        assert found.tokens[row].tolist() == [tokens] * len(lasts)

"""Steering every language to every other: all pairs in shared batches, or one pair at a time."""

from __future__ import annotations

import functools
from collections.abc import Callable

import pytest
import torch

import lapefast as lf
from lapefast import demo
from lapefast.demo.model import Recipe
from lapefast.neurons import NeuronSets
from lapefast.neurons.layout import Layout
from lapefast.steering.continuations import continuations

_NEW_TOKENS = 32
_DEFAULT = 128
_SIZES = (64, _DEFAULT)
_TINY = Recipe(
    documents=150,
    valid_documents=20,
    vocabulary=300,
    width=16,
    neurons=64,
    layers=2,
    heads=2,
    seq_len=32,
    batch_size=7,
    steps=4,
)


@pytest.mark.parametrize(("prompts", "bar"), [(4, 5), (8, None)])
def test_sweep(contest, report, device, quick, prompts, bar):
    """All 49 pairs of the demo model's languages, greedy, in float32."""
    made = demo.load(progress=False, recipe=_TINY if quick else None)
    model = made.model.to(device)
    labels = list(demo.LANGUAGES)[: 2 if quick else None]
    # How many neurons an edit holds, and which, costs next to nothing beside the model.
    layout, generator = Layout(()).bind(model), torch.Generator().manual_seed(0)
    sets = NeuronSets(
        {
            label: {
                site: torch.randperm(width, generator=generator)[: width // 64]
                for site, width in layout.widths.items()
            }
            for label in labels
        },
        layout,
    )
    texts = {
        label: [made.tokenizer(text).input_ids for text in given]
        for label, given in demo.prompts(prompts).items()
    }
    pairs = [
        (texts[source], lf.deactivate(sets[source]) | lf.activate(sets[target], 0.5))
        for source in sets
        for target in sets
    ]
    new_tokens = 4 if quick else _NEW_TOKENS

    def shared(size: int) -> list[list[int]]:
        requests = [(ids, edit) for given, edit in pairs for ids in given]
        return continuations(
            model, requests, max_new_tokens=new_tokens, batch_size=size, progress=False
        )

    def one_pair_at_a_time() -> list[list[int]]:
        generate = _padded(model, new_tokens)
        found = []
        for given, edit in pairs:
            with lf.steer(model, edit):
                found += generate(given)
        return found

    def check() -> None:
        alone = one_pair_at_a_time()
        assert all(shared(size) == alone for size in _SIZES)

    what = f"sweep of {len(pairs)} pairs of the demo model, {prompts} prompts each"
    timings = contest(
        what,
        {
            **{f"shared batches of {size}": functools.partial(shared, size) for size in _SIZES},
            "one pair at a time": one_pair_at_a_time,
        },
        [()],
        check,
        rounds=5,
        tokens=len(pairs) * prompts * new_tokens,
    )
    for size in _SIZES:
        report.row(
            f"{what}: one pair at a time",
            timings.ratio("one pair at a time", f"shared batches of {size}"),
            f"x as long as shared batches of {size}",
            at_least=bar if size == _DEFAULT else None,
        )


def _padded(model, new_tokens: int) -> Callable[[list[list[int]]], list[list[int]]]:
    """What a user writes: one batch, padded on the left; tokens up to the end of the text."""
    end = model.config.eos_token_id

    def generate(given: list[list[int]]) -> list[list[int]]:
        longest = max(map(len, given))
        ids = torch.tensor([[end] * (longest - len(one)) + one for one in given])
        mask = torch.tensor([[0] * (longest - len(one)) + [1] * len(one) for one in given])
        new = model.generate(
            input_ids=ids.to(model.device),
            attention_mask=mask.to(model.device),
            max_new_tokens=new_tokens,
            do_sample=False,
        )[:, longest:].tolist()
        return [row[: row.index(end) + 1] if end in row else row for row in new]

    return generate

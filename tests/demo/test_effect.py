"""What the demo is for: deactivated neurons of a language hurt that language's text most."""

from __future__ import annotations

import pytest
import torch

import lapefast as lf
from lapefast import demo


# Training takes a minute on two idle cores, at the first run for a recipe, and longer on busy ones.
@pytest.mark.timeout(1200)
def test_the_diagonal_dominates_and_exceeds_every_random_set():
    made = demo.load(progress=False)
    profile = lf.profile(
        made.model, made.train, made.tokenizer, seq_len=128, max_tokens=2**14, progress=False
    )
    neurons = lf.detect.lape(profile, top_rate=demo.TOP_RATE)
    matrix = lf.evaluate.perplexity_matrix(
        made.model, neurons, made.valid, made.tokenizer, seq_len=128, max_tokens=768, progress=False
    )
    own = range(len(demo.LANGUAGES))
    for changes, random in (
        (matrix.changes(), matrix.random_changes()),
        (matrix.nll[1:] - matrix.nll[0], matrix.random_range[1:] - matrix.nll[0, :, None]),
    ):
        plain = [
            int(changes[row].argmax()) == row and changes[row, row] > random[row, row, 1]
            for row in own
        ]
        assert sum(plain) >= 6, (changes, random)


def test_the_trained_model_reads_its_text_better_than_chance():
    made = demo.load(progress=False)
    ids = made.tokenizer(made.valid["fr"].read_text("utf-8").splitlines()[0], return_tensors="pt")
    with torch.no_grad():
        loss = made.model(**ids, labels=ids.input_ids).loss
    assert loss < torch.tensor(made.model.config.vocab_size).log() / 2

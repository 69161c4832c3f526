"""`lapefast evaluate`: the perplexity matrix."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lapefast.cli import options
from lapefast.cli.options import check_output

__all__ = ["evaluate"]


def evaluate(
    model: options.Model,
    neurons: Annotated[
        Path,
        typer.Option(metavar="FILE", help="The neurons, JSON or .pth.", show_default=False),
    ],
    corpus: options.Corpora,
    output: options.Output,
    labels: Annotated[
        str | None,
        typer.Option(help="Comma-separated labels: those of a .pth file, or a choice of others."),
    ] = None,
    random_sets: Annotated[
        int, typer.Option(min=1, help="Random sets of equal size per layer to compare with.")
    ] = 5,
    text: options.TextOptions = options.TEXT,
    loading: options.ModelOptions = options.LOADING,
    batch_size: options.BatchSize = None,
    seq_len: options.SeqLen = None,
    max_tokens: options.MaxTokens = 2**20,
) -> None:
    """Deactivate each label's neurons in turn and measure the perplexity of every label's text.

    Example: `lapefast evaluate ./my-model --neurons my-model.neurons.json --corpus en=en.valid.txt
    --corpus zh=zh.valid.txt -o matrix.json`
    """
    check_output(output)
    from lapefast.corpus import parse_corpus_arguments
    from lapefast.neurons import NeuronSets

    corpora = parse_corpus_arguments(corpus)
    chosen = None if labels is None else [label.strip() for label in labels.split(",")]
    sets = NeuronSets.load(neurons, chosen)
    loaded = loading.load(model, corpora, text)
    from lapefast.cli.tables import console, show
    from lapefast.evaluate import perplexity_matrix

    matrix = perplexity_matrix(
        loaded.model,
        sets,
        corpora,
        loaded.tokenizer,
        seq_len=seq_len,
        batch_size=batch_size,
        max_tokens=max_tokens,
        random_sets=random_sets,
        seed=loading.seed,
        **asdict(text),
    )
    matrix.save(output)
    show(matrix)
    console.print(f"wrote {output}", highlight=False)

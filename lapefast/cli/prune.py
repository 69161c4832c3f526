"""`lapefast prune`: what pruning experts for a language does to text."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated, Literal

import typer

from lapefast.cli import options
from lapefast.cli.options import check_output

__all__ = ["prune"]


def prune(
    model: options.Model,
    experts: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="The experts, of `lapefast identify --method experts --details`.",
            show_default=False,
        ),
    ],
    corpus: options.Corpora,
    output: options.Output,
    labels: Annotated[
        str | None,
        typer.Option(help="Comma-separated labels to prune for; by default all."),
    ] = None,
    rate: Annotated[float, typer.Option(help="Of all experts, how many are pruned.")] = 0.2,
    form: Annotated[
        Literal["frequency", "layers"],
        typer.Option(
            metavar="FORM",
            help="frequency: those least used, wherever they lie; layers: in each layer as many as "
            "the layer's activation level says.",
        ),
    ] = "frequency",
    random_sets: Annotated[
        int, typer.Option(min=1, help="Random choices of as many experts to compare with.")
    ] = 5,
    text: options.TextOptions = options.TEXT,
    loading: options.ModelOptions = options.LOADING,
    batch_size: options.BatchSize = None,
    seq_len: options.SeqLen = None,
    max_tokens: options.MaxTokens = 2**20,
) -> None:
    """Prune for each label the experts that it uses least, and measure every label's text.

    Example: `lapefast prune ./my-model --experts experts.safetensors --corpus en=en.valid.txt
    --corpus zh=zh.valid.txt -o pruning.json`
    """
    check_output(output)
    from lapefast.corpus import parse_corpus_arguments
    from lapefast.detect.experts import Experts
    from lapefast.detect.experts.pruning import pruned_experts

    corpora = parse_corpus_arguments(corpus)
    found = Experts.load(experts)
    chosen = [one.strip() for one in labels.split(",")] if labels is not None else found.labels
    for label in chosen:
        pruned_experts(found, label, rate, form)  # refuses what it would refuse after the loading
    loaded = loading.load(model, corpora, text)
    from lapefast.cli.tables import console, show
    from lapefast.evaluate import pruning_matrix

    matrix = pruning_matrix(
        loaded.model,
        found,
        corpora,
        loaded.tokenizer,
        rate,
        form,
        chosen,
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

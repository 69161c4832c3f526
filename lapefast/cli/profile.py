"""`lapefast profile`: from a model and text to a profile."""

from __future__ import annotations

from dataclasses import asdict
from typing import Annotated

import typer

from lapefast.cli import options
from lapefast.cli.engines import load_for
from lapefast.cli.options import check_output

__all__ = ["profile"]


def profile(
    model: options.Model,
    corpus: options.Corpora,
    output: options.Output,
    text: options.TextOptions = options.TEXT,
    threshold: Annotated[
        float, typer.Option(help="A neuron is active where its activation is above it.")
    ] = 0.0,
    statistics: Annotated[
        str,
        typer.Option(help="Comma-separated, of counts, sums, square_sums and up_abs_sums."),
    ] = "counts,sums",
    exact: Annotated[
        bool,
        typer.Option("--exact/--no-exact", help="Fuse only activations proven equal bit for bit."),
    ] = True,
    backend: Annotated[
        str | None,
        typer.Option(help="Who computes the ops: cpu or reference; by default the faster."),
    ] = None,
    engine: options.Engine = "transformers",
    tensor_parallel_size: options.TensorParallelSize = 1,
    loading: options.ModelOptions = options.LOADING,
    batch_size: options.BatchSize = None,
    seq_len: options.SeqLen = None,
    max_tokens: options.MaxTokens = None,
) -> None:
    """Count, for each label's text, how often every neuron of a model is active.

    Example: `lapefast profile ./my-model --corpus en=en.txt --corpus zh=zh.txt
    -o my-model.profile.safetensors`
    """
    from lapefast.corpus import parse_corpus_arguments

    check_output(output)
    corpora = parse_corpus_arguments(corpus)
    run, loaded = load_for(
        engine, model, corpora, text, loading, exact, backend, tensor_parallel_size
    )
    counted = run(
        loaded.model,
        corpora,
        loaded.tokenizer,
        seq_len=seq_len,
        batch_size=batch_size,
        max_tokens=max_tokens,
        threshold=threshold,
        statistics=[name.strip() for name in statistics.split(",")],
        **asdict(text),
    )
    counted.save(output)
    from lapefast.cli.tables import console, show

    show(counted)
    console.print(f"wrote {output}", highlight=False)

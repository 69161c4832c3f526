"""`lapefast profile`: from a model and text to a profile."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from typing import TYPE_CHECKING, Annotated

import typer

from lapefast.cli import methods, options
from lapefast.cli.options import check_output
from lapefast.errors import InputError

if TYPE_CHECKING:
    from lapefast.evaluate import UntilStable

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
        typer.Option(
            help="Comma-separated, of counts, sums, square_sums, up_abs_sums and shard_counts."
        ),
    ] = "counts,sums",
    until_stable: Annotated[
        float | None,
        typer.Option(
            metavar="OVERLAP",
            help="Stop once far more text would select, of every label, neurons of at least this "
            "overlap (Jaccard, such as 0.98) with LAPE's. Reads the labels in turn.",
            show_default=False,
        ),
    ] = None,
    lape: methods.LapeOptions = methods.LapeOptions(),  # noqa: B008 - frozen
    exact: Annotated[
        bool,
        typer.Option("--exact/--no-exact", help="Fuse only activations proven equal bit for bit."),
    ] = True,
    backend: Annotated[
        str | None,
        typer.Option(help="Who computes the ops: cpu or reference; by default the faster."),
    ] = None,
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
    measured = [name.strip() for name in statistics.split(",")]
    until = None
    if until_stable is not None:
        from lapefast.detect import lape as select
        from lapefast.evaluate import UntilStable

        if len(corpora) < 2:
            raise InputError("--until-stable compares labels; give the --corpus of two or more")
        until = UntilStable(until_stable, partial(select, **asdict(lape)))
        measured.append("shard_counts")
    elif lape != methods.LapeOptions():
        raise InputError("LAPE's options are for --until-stable; `lapefast identify` takes them")
    loaded = loading.load(model, corpora, text)
    from lapefast import profile as run

    counted = run(
        loaded.model,
        corpora,
        loaded.tokenizer,
        seq_len=seq_len,
        batch_size=batch_size,
        max_tokens=max_tokens,
        threshold=threshold,
        statistics=measured,
        exact=exact,
        backend=backend,
        until=until,
        **asdict(text),
    )
    counted.save(output)
    from lapefast.cli.tables import console, show

    show(counted)
    if until is not None:
        console.print(_ending(until), highlight=False)
    console.print(f"wrote {output}", highlight=False)


def _ending(until: UntilStable) -> str:
    """How the pass ended, and where that leaves each label."""
    found = until.stability
    if found is None:
        return "the text ended before every label had a row for each shard; give more of it"
    overlaps = ", ".join(
        f"{label} {overlap:.3f} at {tokens:,} tokens"
        for (label, overlap), tokens in zip(
            found.announced.items(), found.tokens[-1].tolist(), strict=True
        )
    )
    if until.reached:
        return f"stable: an overlap of at least {until.target} with far more text ({overlaps})"
    return f"the text ended before an overlap of {until.target} was reached ({overlaps})"

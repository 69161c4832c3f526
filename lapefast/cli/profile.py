"""`lapefast profile`: from a model and text to a profile."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lapefast.cli import options
from lapefast.cli.options import RUN_PANEL, TEXT_PANEL, check_output
from lapefast.cli.processes import process_group
from lapefast.errors import InputError

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
    loading: options.ModelOptions = options.LOADING,
    batch_size: options.BatchSize = None,
    seq_len: options.SeqLen = None,
    max_tokens: options.MaxTokens = None,
    resume: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Save the run's state here, and go on from the one that is here.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
    save_every: Annotated[
        float,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Between two saved states.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = 300.0,
    part: Annotated[
        str | None,
        typer.Option(
            metavar="I/N",
            help="Count the I-th of N parts of the text; `lapefast merge` adds them up.",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
    token_cache: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Keep the token ids of texts here, and read those that are here.",
            rich_help_panel=TEXT_PANEL,
        ),
    ] = None,
) -> None:
    """Count, for each label's text, how often every neuron of a model is active.

    Under torchrun, as in the second example, the processes share the work; the profile is the same.

    Example: `lapefast profile ./my-model --corpus en=en.txt --corpus zh=zh.txt
    -o my-model.profile.safetensors`

    Example: `torchrun --nproc-per-node 8 -m lapefast profile ./my-model --corpus en=en.txt
    --resume run --token-cache tokens -o my-model.profile.safetensors`
    """
    from lapefast.corpus import parse_corpus_arguments

    check_output(output)
    corpora = parse_corpus_arguments(corpus)
    chosen = None if part is None else _parsed(part)
    with process_group() as group:
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
            statistics=[name.strip() for name in statistics.split(",")],
            exact=exact,
            backend=backend,
            resume=resume,
            save_every=save_every,
            process_group=group,
            part=chosen,
            token_cache=token_cache,
            **asdict(text),
        )
        if group is not None and group.rank() > 0:
            return
    counted.save(output)
    from lapefast.cli.tables import console, show

    show(counted)
    console.print(f"wrote {output}", highlight=False)


def _parsed(part: str) -> tuple[int, int]:
    """The numbers of I/N."""
    number, _, of = part.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise InputError(f"--part must be I/N with 1 <= I <= N, such as 3/8, got {part!r}")
    return int(number), int(of)

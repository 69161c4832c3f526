"""`lapefast profile`: from a model and text to a profile."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lapefast.cli import methods, options
from lapefast.cli.engines import load_for
from lapefast.cli.options import RUN_PANEL, check_output
from lapefast.cli.processes import process_group
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
        typer.Option(
            help="Who computes the ops: cpu or reference, on a GPU cuda, triton or reference; by "
            "default the first of them that can."
        ),
    ] = None,
    engine: options.Engine = "transformers",
    tensor_parallel_size: options.TensorParallelSize = 1,
    loading: options.ModelOptions = options.LOADING,
    tensor_parallel: options.TensorParallel = False,
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
        float | None,
        typer.Option(
            min=0,
            metavar="SECONDS",
            help="Between two saved states.",
            show_default="300",
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
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
            rich_help_panel=RUN_PANEL,
        ),
    ] = None,
) -> None:
    """Count, for each label's text, how often every neuron of a model is active.

    Under torchrun, as in the second example, the processes share the text, or with
    --tensor-parallel the model's layers.

    Example: `lapefast profile ./my-model --corpus en=en.txt --corpus zh=zh.txt
    -o my-model.profile.safetensors`

    Example: `torchrun --nproc-per-node 8 -m lapefast profile ./my-model --corpus en=en.txt
    --resume run --token-cache tokens -o my-model.profile.safetensors`
    """
    from lapefast.corpus import parse_corpus_arguments

    check_output(output)
    corpora = parse_corpus_arguments(corpus)
    measured = [name.strip() for name in statistics.split(",")]
    until = None
    if until_stable is not None:
        from lapefast.detect.lape import check_rates
        from lapefast.detect.lape import lape as select
        from lapefast.evaluate import UntilStable

        if len(corpora) < 2:
            raise InputError("--until-stable compares labels; give the --corpus of two or more")
        check_rates(lape.top_rate, lape.filter_rate, lape.activation_bar_ratio)
        until = UntilStable(until_stable, partial(select, **asdict(lape)))
        measured.append("shard_counts")
    elif lape != methods.LapeOptions():
        raise InputError("LAPE's options are for --until-stable; `lapefast identify` takes them")
    if save_every is not None and resume is None and engine != "vllm":
        raise InputError("--save-every says how often --resume saves; give --resume DIR too")
    passed = {
        "exact": exact,
        "backend": backend,
        "resume": resume,
        "part": None if part is None else _parsed(part),
        "until": until,
        **({} if save_every is None else {"save_every": save_every}),
    }
    splitting = {"tensor_parallel": tensor_parallel, "tensor_parallel_size": tensor_parallel_size}
    with process_group() as group:
        run, loaded = load_for(engine, model, corpora, text, loading, group, passed, **splitting)
        counted = run(
            loaded.model,
            corpora,
            loaded.tokenizer,
            seq_len=seq_len,
            batch_size=batch_size,
            max_tokens=max_tokens,
            threshold=threshold,
            statistics=measured,
            token_cache=token_cache,
            **asdict(text),
        )
        if group is not None and group.rank() > 0:
            return
    counted.save(output)
    from lapefast.cli.tables import console, show

    show(counted)
    if until is not None:
        console.print(_ending(until), highlight=False)
    console.print(f"wrote {output}", highlight=False)


def _parsed(part: str) -> tuple[int, int]:
    """The numbers of I/N."""
    number, _, of = part.partition("/")
    if not (number.isdecimal() and of.isdecimal() and 1 <= int(number) <= int(of)):
        raise InputError(f"--part must be I/N with 1 <= I <= N, such as 3/8, got {part!r}")
    return int(number), int(of)


def _ending(until: UntilStable) -> str:
    """How the pass ended, and where that leaves each label."""
    found = until.stability
    if found is None:
        return (
            "the text or --max-tokens ended before every label had a row for each shard; give more"
        )
    overlaps = ", ".join(
        f"{label} {overlap:.3f} at {tokens:,} tokens"
        for (label, overlap), tokens in zip(
            found.announced.items(), found.tokens[-1].tolist(), strict=True
        )
    )
    if until.reached:
        return f"stable: an overlap of at least {until.target} with far more text ({overlaps})"
    return (
        f"the text or --max-tokens ended before an overlap of {until.target} was reached "
        f"({overlaps})"
    )

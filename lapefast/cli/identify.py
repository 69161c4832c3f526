"""`lapefast identify`: from a profile, or from a model and text, to each label's neurons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lapefast.cli import methods, options
from lapefast.cli.options import check_output
from lapefast.errors import InputError

__all__ = ["identify"]


def identify(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="For LAPE a profile; for the other methods a model.",
            show_default=False,
        ),
    ],
    output: options.Output,
    method: Annotated[
        Literal["lape", "plnd", "average-precision", "sharing", "experts"],
        typer.Option(help="How neurons are chosen."),
    ] = "lape",
    details: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Also write all that average-precision, sharing or experts measured; a report "
            "shows the last two's.",
            show_default=False,
        ),
    ] = None,
    form: Annotated[
        Literal["paper", "released"],
        typer.Option(help="As the paper defines it, or as the released code computes it."),
    ] = "paper",
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL=SOURCE",
            help="Text of a label, for plnd, average-precision and experts. Once per label.",
            show_default=False,
            rich_help_panel="Text",
        ),
    ] = None,
    max_documents: Annotated[
        int | None,
        typer.Option(min=1, help="Documents to read per label.", rich_help_panel="Run"),
    ] = methods.DOCUMENTS,
    text: options.TextOptions = options.TEXT,
    lape: methods.LapeOptions = methods.LapeOptions(),  # noqa: B008 - frozen
    plnd: methods.PlndOptions = methods.PlndOptions(),  # noqa: B008
    average_precision: methods.AveragePrecisionOptions = methods.AveragePrecisionOptions(),  # noqa: B008
    sharing: methods.SharingOptions = methods.SharingOptions(),  # noqa: B008
    experts: methods.ExpertOptions = methods.ExpertOptions(),  # noqa: B008
    loading: options.ModelOptions = options.LOADING,
    batch_size: options.BatchSize = None,
    seq_len: options.SeqLen = None,
) -> None:
    """Find each label's neurons, by one of the field's five methods.

    A file that ends in .pth is written in the published format.

    Example: `lapefast identify my-model.profile.safetensors -o my-model.neurons.json`

    Example: `lapefast identify ./my-model --method plnd --corpus en=en.txt --corpus zh=zh.txt
    -o plnd.neurons.json`
    """
    check_output(output)
    if details is not None:
        check_output(details)
        if method == "lape":
            raise InputError("lape measures nothing beside its neurons; leave --details out")
        if method == "plnd":
            raise InputError(
                "plnd's scores are kept in no file; leave --details out, and read mean_scores of "
                "what lapefast.detect.plnd returns"
            )
        if method == "average-precision" and details.suffix != ".safetensors":
            raise InputError(f"--details of {method} must end in .safetensors, got {details}")
        if details == output:
            raise InputError("-o and --details are one file; give two")
    chosen = {
        "lape": lape,
        "plnd": plnd,
        "average-precision": average_precision,
        "sharing": sharing,
        "experts": experts,
    }
    methods.refuse_others(method, chosen)
    from lapefast.corpus import parse_corpus_arguments

    material = methods.Material(
        source,
        parse_corpus_arguments(corpus) if corpus else None,
        form,
        text,
        loading,
        batch_size,
        seq_len,
        max_documents,
    )
    neurons, result = methods.METHODS[method](material, chosen[method])
    neurons.save(output)
    if details is not None:
        result.save(details)
    from lapefast.cli.tables import console, show

    show(neurons)
    console.print(f"wrote {output}{f' and {details}' if details else ''}", highlight=False)

"""`lapefast export`: an edited model for other programs."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lapefast.cli import edits, options
from lapefast.cli.options import check_directory, check_output
from lapefast.errors import InputError

__all__ = ["export"]


def export(
    model: options.Model,
    neurons: edits.Neurons,
    format: Annotated[
        Literal["checkpoint", "lora", "edits"],
        typer.Option(
            help="checkpoint: the edited model, whole; lora: an adapter (of --deactivate and "
            "--scale); edits: a file for a server that has lapefast.",
            show_default=False,
        ),
    ],
    output: Annotated[
        Path,
        typer.Option(
            "--output",
            "-o",
            metavar="PATH",
            help="The directory, new or empty, or the file of edits to write.",
            show_default=False,
        ),
    ],
    name: Annotated[
        str, typer.Option(help="Of the edit, by which requests ask for it (edits).")
    ] = "edit",
    for_all: Annotated[
        bool,
        typer.Option("--for-all", help="Requests that ask for no edit have it, too (edits)."),
    ] = False,
    max_rank: Annotated[int, typer.Option(min=1, help="The most neurons in a layer (lora).")] = 512,
    labels: edits.Labels = None,
    deactivate: edits.Deactivate = None,
    scale: edits.Scale = None,
    add: edits.Add = None,
    activate: edits.Activate = None,
    profile: edits.ProfileFile = None,
    strength: edits.Strength = 1.0,
    loading: options.ModelOptions = options.LOADING,
) -> None:
    """Write an edited model: as a checkpoint, as an adapter, or as a file of edits.

    Example: `lapefast export ./my-model --neurons my-model.neurons.json --deactivate en
    --format lora -o without-english`
    """
    if format == "edits":
        check_output(output)
        if not name.strip() or name == "none":
            raise InputError(f"--name must be a text other than none, got {name!r}")
    else:
        check_directory(output)
    edit = edits.build_edit(neurons, labels, profile, deactivate, scale, add, activate, strength)
    loaded = loading.load(model, None, tokenizer=format == "checkpoint")
    import lapefast as lf
    from lapefast.cli.tables import console

    if format == "checkpoint":
        lf.export.checkpoint(loaded.model, edit, output, tokenizer=loaded.tokenizer)
    elif format == "lora":
        lf.export.lora(loaded.model, edit, output, max_rank)
    else:
        lf.export.edits(loaded.model, {name: edit}, output, server=name if for_all else None)
    console.print(f"wrote {output}", highlight=False)

"""`lapefast identify`: from a profile to each label's neurons."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

import typer

from lapefast.cli import options
from lapefast.cli.options import check_output

__all__ = ["identify"]


def identify(
    profile: Annotated[
        Path, typer.Argument(metavar="PROFILE", help="A profile file.", show_default=False)
    ],
    output: options.Output,
    method: Annotated[Literal["lape"], typer.Option(help="How neurons are chosen.")] = "lape",
    top_rate: Annotated[
        float, typer.Option(help="Share of all neurons that remain: those of least entropy.")
    ] = 0.01,
    filter_rate: Annotated[
        float, typer.Option(help="Share of all probabilities too small to keep a neuron.")
    ] = 0.95,
    activation_bar_ratio: Annotated[
        float, typer.Option(help="Share of all probabilities too small to belong to a label.")
    ] = 0.95,
    form: Annotated[
        Literal["paper", "released"],
        typer.Option(
            help="As the paper defines it, or with the released code's precision and ties.",
        ),
    ] = "paper",
) -> None:
    """Find each label's neurons in a profile.

    A file that ends in .pth is written in the published format.

    Example: `lapefast identify my-model.profile.safetensors -o my-model.neurons.json`
    """
    check_output(output)
    from lapefast import Profile
    from lapefast.detect import lape

    neurons = lape(
        Profile.load(profile),
        top_rate=top_rate,
        filter_rate=filter_rate,
        activation_bar_ratio=activation_bar_ratio,
        form=form,
    )
    neurons.save(output)
    from lapefast.cli.tables import console, show

    show(neurons)
    console.print(f"wrote {output}", highlight=False)

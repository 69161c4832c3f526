"""`lapefast merge`: profiles add up."""

from __future__ import annotations

import functools
import operator
from pathlib import Path
from typing import Annotated

import typer

from lapefast.cli import options
from lapefast.cli.options import check_output
from lapefast.errors import InputError

__all__ = ["merge"]


def merge(
    profiles: Annotated[
        list[Path],
        typer.Argument(metavar="PROFILE...", help="Two or more profiles of one model."),
    ],
    output: options.Output,
) -> None:
    """Add profiles of one model: a label in several is added up, others are taken over.

    Example: `lapefast merge en.profile.safetensors zh.profile.safetensors
    -o both.profile.safetensors`
    """
    check_output(output)
    if len(profiles) < 2:
        raise InputError("merge needs two profiles or more, got one")
    from lapefast import Profile
    from lapefast.cli.tables import console, show

    merged = functools.reduce(operator.add, (Profile.load(path) for path in profiles))
    merged.save(output)
    show(merged)
    console.print(f"wrote {output}", highlight=False)

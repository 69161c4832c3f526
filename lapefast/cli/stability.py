"""`lapefast stability`: whether a profile's text was enough."""

from __future__ import annotations

from dataclasses import asdict
from functools import partial
from pathlib import Path
from typing import Annotated

import typer

from lapefast.cli import methods, options
from lapefast.cli.options import check_output
from lapefast.errors import InputError

__all__ = ["stability"]


def stability(
    profile: Annotated[
        Path,
        typer.Argument(metavar="PROFILE", help="A profile with shard_counts.", show_default=False),
    ],
    output: options.Output,
    lape: methods.LapeOptions = methods.LapeOptions(),  # noqa: B008 - frozen
    figure: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="Draw the overlap against tokens; written as PNG and SVG.",
            show_default=False,
        ),
    ] = None,
    seed: options.Seed = 0,
) -> None:
    """Say how far LAPE's neurons are those that far more text of the same kind would select.

    Example: `lapefast stability my-model.profile.safetensors -o stability.json
    --figure stability.png`
    """
    for path in (output, figure):
        if path is not None:
            check_output(path)
    if figure is not None and output in [figure.with_suffix(one) for one in (".png", ".svg")]:
        raise InputError(f"-o {output} is a file of --figure {figure}; give another")
    from lapefast import Profile
    from lapefast.cli.tables import console, show
    from lapefast.detect import lape as select
    from lapefast.evaluate import stability as run

    found = run(Profile.load(profile), partial(select, **asdict(lape)), seed=seed)
    found.save(output)
    written = [output]
    if figure is not None:
        from lapefast.report import draw_stability

        written += draw_stability(found, figure)
    show(found)
    console.print(f"wrote {', '.join(map(str, written))}", highlight=False)

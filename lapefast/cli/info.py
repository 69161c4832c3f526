"""`lapefast info`: what a file holds."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lapefast.errors import InputError

__all__ = ["info"]


def info(
    file: Annotated[
        Path,
        typer.Argument(
            metavar="FILE", help="A profile, neuron or matrix file.", show_default=False
        ),
    ],
) -> None:
    """Say what a profile, neuron or matrix file holds.

    Example: `lapefast info my-model.profile.safetensors`
    """
    from lapefast.cli.tables import show, show_metadata

    content = _read(file)
    show_metadata(content.metadata)
    show(content)


def _read(path: Path) -> Any:
    """The Profile, NeuronSets or PerplexityMatrix in a file; its content decides which."""
    from lapefast import NeuronSets, Profile
    from lapefast.evaluate import PerplexityMatrix
    from lapefast.files import existing_file

    with open(existing_file(path, "file"), "rb") as file:
        start = file.read(64)
    if start.lstrip().startswith(b"{"):
        return PerplexityMatrix.load(path) if _is_matrix(path) else NeuronSets.load(path)
    # Safetensors begin with the length of a JSON header; a published file is a zip or a pickle.
    if start[8:9] == b"{":
        return Profile.load(path)
    if start.startswith((b"PK", b"\x80")):
        return NeuronSets.load(path)
    raise InputError(
        f"{path} is {'not' if start else 'empty, and so not'} a profile, neuron or matrix file"
    )


def _is_matrix(path: Path) -> bool:
    try:
        return "nll" in json.loads(path.read_text("utf-8"))
    except ValueError:
        return False

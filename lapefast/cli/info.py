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
        typer.Argument(metavar="FILE", help="What another command wrote.", show_default=False),
    ],
) -> None:
    """Say what a profile, neurons, a matrix or another method's result holds.

    Example: `lapefast info my-model.profile.safetensors`
    """
    from lapefast.cli.tables import show, show_metadata

    content = _read(file)
    show_metadata(getattr(content, "metadata", {}))
    show(content)


def _read(path: Path) -> Any:
    """What is in a file; its content decides which kind it is."""
    from lapefast import NeuronSets, Profile, ResidualMeans
    from lapefast.detect import AveragePrecisionNeurons, Experts, Sharing
    from lapefast.evaluate import (
        CategoryDeactivation,
        PerplexityMatrix,
        SampledLanguages,
        Stability,
        Sweep,
    )

    readers = {
        "lapefast neurons": NeuronSets.load,
        "lapefast sharing": Sharing.load,
        "lapefast profile": Profile.load,
        "lapefast experts file": Experts.load,
        "lapefast average-precision file": AveragePrecisionNeurons.load,
        "lapefast residual means file": ResidualMeans.load,
        "lapefast stability": Stability.load,
        "lapefast perplexity matrix": PerplexityMatrix.load,
        "lapefast category deactivation": CategoryDeactivation.load,
        "lapefast sampled languages": SampledLanguages.load,
        "lapefast sweep": Sweep.load,
        "published": NeuronSets.load,
    }
    kind = _kind(path)
    if kind not in readers:
        what = "is empty" if kind is None else "is not one of lapefast's files"
        raise InputError(
            f"{path} {what}; give a profile, neurons, a matrix, or what another method found"
        )
    return readers[kind](path)


def _kind(path: Path) -> str | None:
    """What the file says that it is; None for an empty one."""
    from lapefast.files import existing_file

    with open(existing_file(path, "file"), "rb") as file:
        start = file.read(9)
        if not start:
            return None
        # A published file is a zip or a pickle.
        if start.startswith((b"PK", b"\x80")):
            return "published"
        # Safetensors begin with the length of a JSON header.
        sealed = start[8:] == b"{"
        if not sealed and not start.lstrip().startswith(b"{"):
            return "something else"
        file.seek(8 if sealed else 0)
        # Of a file that is not one, the length may be any.
        length = int.from_bytes(start[:8], "little") if sealed else -1
        data = file.read(min(length, path.stat().st_size))
    # Lines of JSON, the first of which says what they are; or, as once written, does not.
    line = data.partition(b"\n")[0]
    if not sealed and (b'"lapefast sweep"' in line or b'"target"' in line):
        return "lapefast sweep"
    try:
        content = json.loads(data)
        return str((content["__metadata__"] if sealed else content)["format"])
    except (ValueError, KeyError, TypeError, RecursionError):
        # Cut short or damaged, which the reader of the likeliest kind says best.
        return "lapefast profile" if sealed else "lapefast neurons"

"""`lapefast info`: what a file holds."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from lapefast.cli.kinds import OTHER_JSON, OTHER_SAFETENSORS, kind_of
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
        # Cut short or damaged, which the reader of the likeliest kind says best.
        OTHER_JSON: NeuronSets.load,
        OTHER_SAFETENSORS: Profile.load,
    }
    kind = kind_of(path)
    if kind not in readers:
        what = "is empty" if kind is None else "is not one of lapefast's files"
        raise InputError(
            f"{path} {what}; give a profile, neurons, a matrix, or what another method found"
        )
    return readers[kind](path)

"""Edits as a file for a server that applies them itself."""

from __future__ import annotations

import os
from collections.abc import Mapping

from torch import nn

from lapefast.errors import InputError
from lapefast.models import find_sites
from lapefast.neurons import Edit, save_edits

__all__ = ["edits"]


def edits(
    model: nn.Module,
    edits: Mapping[str, Edit],
    path: str | os.PathLike[str],
    server: str | None = None,
) -> None:
    """Bind named edits to the model and write them as JSON, as `lapefast.neurons.load_edits` reads.

    Any edit of neurons can be written, since nothing is made of the weights.

    Args:
        model: the model that will be served.
        edits: name -> edit.
        path: the file.
        server: the name of the edit that holds for every request that asks for none.

    Raises:
        InputError: there is no edit, one does not fit the model or is not of FFNs alone, a name is
            not usable, `server` is none of them, or the file can't be written.
    """
    if not isinstance(edits, Mapping) or not all(isinstance(one, Edit) for one in edits.values()):
        raise InputError(
            "edits to export must be given as {name: edit}, each made by deactivate, activate, "
            f"scale or add, got {edits!r:.80}"
        )
    bound = {name: edit.bind(model) for name, edit in edits.items()}
    sites = find_sites(model)
    mixtures = {site.name for site in sites if site.experts}
    for name, edit in bound.items():
        if mixtures & edit.tables.keys():
            raise InputError(
                f"the edit {name} is also of {min(mixtures & edit.tables.keys())}, a mixture of "
                "experts, whose neurons servers do not edit; use lf.steer"
            )
        others = edit.tables.keys() - {site.name for site in sites}
        if others:
            raise InputError(
                f"the edit {name} is also of {min(others)}, a linear layer's outputs, but servers "
                "edit neurons of FFNs; use lf.export.checkpoint or lf.export.lora"
            )
    save_edits(path, bound, server)

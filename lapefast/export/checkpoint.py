"""The edited model as an ordinary checkpoint."""

from __future__ import annotations

import os
from typing import Any

from torch import nn

from lapefast.errors import InputError
from lapefast.files import write_directory
from lapefast.models.bare import unwrap
from lapefast.neurons import Edit
from lapefast.steering import fold
from lapefast.steering.linear import holds_adapter

__all__ = ["checkpoint"]


def checkpoint(
    model: nn.Module, edit: Edit, path: str | os.PathLike[str], tokenizer: Any = None
) -> None:
    """Fold an edit into the model's weights and save it as `save_pretrained` does.

    `from_pretrained` and any engine that reads such directories load it, without lapefast. Its
    outputs are those of `lapefast.fold`, which says how near they are to `lapefast.steer`'s; its
    fingerprint is another than the model's. The model's weights afterwards are bit for bit as
    before.

    Args:
        model: a Hugging Face model.
        edit: as for `lapefast.fold`.
        path: a directory that does not exist yet, or is empty. It appears when all is written.
        tokenizer: saved beside the model, where given.

    Raises:
        InputError: see `lapefast.fold`; an adapter is on the model, the architecture has no place
            for what the edit needs (a bias that its FFN does not have), or the directory can't be
            written.
    """
    saved = unwrap(model)
    if not hasattr(saved, "save_pretrained"):
        raise InputError(
            f"only a Hugging Face model can be saved as a checkpoint, got {type(saved).__name__}"
        )
    if holds_adapter(model):
        raise InputError(
            "the model holds an adapter, whose checkpoint would be the adapter's alone; merge it "
            "first (merge_and_unload)"
        )
    with write_directory(path) as directory:
        known = saved.state_dict().keys()
        with fold(model, edit):
            new = sorted(saved.state_dict().keys() - known)
            if new:
                raise InputError(
                    f"the edit needs a {new[0]}, which a {type(saved).__name__} of this "
                    "configuration does not load; use lf.steer, which edits while the model runs"
                )
            saved.save_pretrained(directory)
        if tokenizer is not None:
            tokenizer.save_pretrained(directory)

"""The linear layers of a model, whose outputs are units like an FFN's neurons."""

from __future__ import annotations

from collections.abc import Iterable

from torch import nn
from transformers.pytorch_utils import Conv1D

from lapefast.errors import InputError
from lapefast.models.bare import bare_model, named_modules
from lapefast.models.structure import find_sites

__all__ = ["find_linears", "known_sites", "out_features"]


def find_linears(model: nn.Module) -> dict[str, nn.Module]:
    """Path inside the bare model -> linear layer, in model order; the head is not among them.

    Quantised layers and those under an adapter count; an adapter's own do not.

    Raises:
        InputError: there is none.
    """
    found: dict[str, nn.Module] = {}
    bare = bare_model(model)
    # T5's bare model owns its head.
    head = getattr(bare, "get_output_embeddings", lambda: None)()
    for path, module in named_modules(bare):
        inside = any(path.startswith(f"{outer}.") for outer in found)
        if not inside and module is not head and out_features(module) is not None:
            found[path] = module
    if not found:
        raise InputError(f"{type(model).__name__} has no linear layers")
    return found


def known_sites(model: nn.Module, named: Iterable[str | int]) -> dict[str, int]:
    """Site -> how many neurons, of the model's FFNs and of those linear layers that are ``named``.

    Raises:
        InputError: see `lapefast.models.find_sites`.
    """
    found = {site.name: site.neurons for site in find_sites(model)}
    others = {name for name in named if isinstance(name, str)} - found.keys()
    if others:
        layers = find_linears(model)
        found |= {name: out_features(layers[name]) for name in layers if name in others}
    return found


def out_features(module: nn.Module) -> int | None:
    """How many outputs a linear layer has; None for any other module."""
    if isinstance(module, Conv1D):
        return module.nf
    if isinstance(module, (nn.Embedding, nn.Bilinear)):
        return None
    weighted = hasattr(module, "in_features") and hasattr(module, "out_features")
    return module.out_features if weighted else None

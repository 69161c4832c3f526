"""Neuron files: lapefast's own JSON, and the published research format."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lapefast.errors import InputError
from lapefast.files import existing_file, read_torch, write_torch
from lapefast.neurons.documents import Document, as_text, block, require
from lapefast.neurons.layout import Key, Layout

__all__ = [
    "PUBLISHED_LABELS",
    "is_json",
    "read_json",
    "read_published",
    "write_json",
    "write_published",
]

_log = logging.getLogger(__name__)

PUBLISHED_LABELS = ("en", "zh", "fr", "es", "vi", "id", "ja")
"""The order of languages in the published neuron files, which carry no names."""

_WHAT = "neuron file"
_DOCUMENT = Document("lapefast neurons", 1, _WHAT, "identify")

Contents = tuple[dict[str, list[Any]], Layout, dict[str, Any]]
"""Label -> one list or tensor of indices per site; the layout; the metadata."""


def is_json(path: str | os.PathLike[str]) -> bool:
    """Whether the file begins like a JSON object."""
    with open(existing_file(path, _WHAT), "rb") as file:
        return file.read(64).lstrip().startswith(b"{")


def write_json(
    path: str | os.PathLike[str],
    neurons: Mapping[str, Sequence[torch.Tensor]],
    layout: Layout,
    metadata: Mapping[str, Any],
) -> None:
    """Write JSON with one line per site and label, in an order that does not change."""
    sets = [
        f"{as_text(label)}: {_by_site(layout.sites, layers)}" for label, layers in neurons.items()
    ]
    _DOCUMENT.write(
        path,
        layout,
        {
            "metadata": as_text(metadata),
            "labels": as_text(list(neurons)),
            "neurons": block("{}", sets, depth=1),
        },
    )


def read_json(path: str | os.PathLike[str]) -> Contents:
    """Read what `write_json` wrote.

    Raises:
        InputError: it is not JSON, not a neuron file, of another version, or inconsistent.
    """
    return _DOCUMENT.read(path, _contents)


def write_published(
    path: str | os.PathLike[str], neurons: Sequence[Sequence[torch.Tensor]]
) -> None:
    """Write the published format: a list over labels of lists over layers of int64 tensors."""
    write_torch({path: [list(layers) for layers in neurons]})


def read_published(path: str | os.PathLike[str], labels: Sequence[str] | None = None) -> Contents:
    """Read the published format; sites are known by position only.

    Raises:
        InputError: the file is not of that format, or `labels` are not as many as it holds.
    """
    with open(existing_file(path, _WHAT), "rb") as file:
        if file.read(9)[8:] == b"{":
            raise InputError(
                f"{path} is a safetensors file, which holds what a method measured; give the "
                f"{_WHAT} that was written beside it (`lapefast identify -o`)"
            )
    content = read_torch(path, f"{_WHAT} (not JSON, so taken for a published one)")
    if not isinstance(content, list) or not all(isinstance(layers, list) for layers in content):
        raise InputError(
            f"the neuron file {path} must hold a list over labels of lists over layers of index "
            f"tensors, but it holds a {type(content).__name__} of something else"
        )
    depths = sorted({len(layers) for layers in content})
    if len(depths) != 1 or depths[0] == 0:
        raise InputError(
            f"the neuron file {path} must hold equally many layers for each label, "
            f"but it holds {depths or 'no labels'}"
        )
    if labels is None and len(content) > len(PUBLISHED_LABELS):
        raise InputError(
            f"the neuron file {path} holds {len(content)} labels without names, more than the "
            f"{len(PUBLISHED_LABELS)} published ones; name them with labels="
        )
    if labels is None and len(content) < len(PUBLISHED_LABELS):
        _log.warning(
            "%s holds %d labels without names; they are taken for %s (labels= names others)",
            path,
            len(content),
            ", ".join(PUBLISHED_LABELS[: len(content)]),
        )
    names = PUBLISHED_LABELS[: len(content)] if labels is None else tuple(labels)
    if len(names) != len(content) or len(set(names)) != len(names):
        raise InputError(
            f"the neuron file {path} holds {len(content)} labels, but labels= names "
            f"{', '.join(names)}; name each once, in the order of the file"
        )
    layout = Layout(tuple(range(depths[0])))
    return dict(zip(names, content, strict=True)), layout, {"method": "published file"}


def _contents(content: dict[str, Any], layout: Layout) -> Contents:
    require(isinstance(content["metadata"], dict), "its metadata is not an object")
    labels: list[str] = content["labels"]
    neurons: dict[str, dict[str, list[int]]] = content["neurons"]
    require(isinstance(neurons, dict), "its neurons are not an object")
    require(labels == list(neurons), "its labels are not those of its neurons")
    names = [str(site) for site in layout.sites]
    for label, by_site in neurons.items():
        require(list(by_site) == names, f"the sites of label {label} are not those listed")
        for site, indices in by_site.items():
            integers = isinstance(indices, list) and all(type(index) is int for index in indices)
            require(integers, f"the neurons of label {label} at site {site} are not integers")
    layers = {label: list(by_site.values()) for label, by_site in neurons.items()}
    return layers, layout, content["metadata"]


def _by_site(sites: Sequence[Key], layers: Sequence[torch.Tensor]) -> str:
    lines = [
        f"{as_text(str(site))}: {as_text(indices.tolist())}"
        for site, indices in zip(sites, layers, strict=True)
    ]
    return block("{}", lines, depth=2)

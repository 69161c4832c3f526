"""Neuron files: lapefast's own JSON, and the published research format."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lapefast.errors import InputError
from lapefast.files import existing_file, read_torch, write_atomically, write_torch
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

_FORMAT = "lapefast neurons"
_VERSION = 1
_WHAT = "neuron file"

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
    sites = [_text({"name": site, "width": layout.widths.get(site)}) for site in layout.sites]
    sets = [
        f"{_text(label)}: {_by_site(layout.sites, layers)}" for label, layers in neurons.items()
    ]
    entries = {
        "format": _text(_FORMAT),
        "version": _text(_VERSION),
        "model": _text(layout.model),
        "fingerprint": _text(layout.fingerprint),
        "metadata": _text(metadata),
        "labels": _text(list(neurons)),
        "sites": _block("[]", sites, depth=1),
        "neurons": _block("{}", sets, depth=1),
    }
    text = _block("{}", [f"{_text(key)}: {value}" for key, value in entries.items()], depth=0)
    with write_atomically(path) as temporary:
        temporary.write_text(text + "\n", encoding="utf-8")


def read_json(path: str | os.PathLike[str]) -> Contents:
    """Read what `write_json` wrote.

    Raises:
        InputError: it is not JSON, not a neuron file, of another version, or inconsistent.
    """
    with open(existing_file(path, _WHAT), "rb") as file:
        data = file.read()
    try:
        content = json.loads(data.decode("utf-8"))
    except (ValueError, RecursionError) as error:
        raise InputError(
            f"the neuron file {path} is not valid JSON ({error}): cut short or damaged; "
            "make it again"
        ) from error
    if not isinstance(content, dict) or content.get("format") != _FORMAT:
        raise InputError(f"{path} is JSON but not a neuron file; give one made by `identify`")
    if content.get("version") != _VERSION:
        raise InputError(
            f"the neuron file {path} has format version {content.get('version')!r}, but this "
            f"lapefast reads version {_VERSION}; use the lapefast that made it"
        )
    try:
        return _contents(content)
    except (AttributeError, KeyError, TypeError, ValueError) as error:
        reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
        raise InputError(f"the neuron file {path} is broken: {reason}; make it again") from error


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


def _contents(content: dict[str, Any]) -> Contents:
    sites = {entry["name"]: entry["width"] for entry in content["sites"]}
    _require(len(sites) == len(content["sites"]), "a site is listed twice")
    for site, width in sites.items():
        known = width is None or (type(width) is int and width > 0)
        _require(known, f"the width of site {site} is {width!r}, not a positive number")
    for key in ("model", "fingerprint"):
        named = content[key] is None or isinstance(content[key], str)
        _require(named, f"its {key} is not a string")
    _require(isinstance(content["metadata"], dict), "its metadata is not an object")
    labels: list[str] = content["labels"]
    neurons: dict[str, dict[str, list[int]]] = content["neurons"]
    _require(isinstance(neurons, dict), "its neurons are not an object")
    _require(labels == list(neurons), "its labels are not those of its neurons")
    names = [str(site) for site in sites]
    for label, by_site in neurons.items():
        _require(list(by_site) == names, f"the sites of label {label} are not those listed")
        for site, indices in by_site.items():
            integers = isinstance(indices, list) and all(type(index) is int for index in indices)
            _require(integers, f"the neurons of label {label} at site {site} are not integers")
    layers = {label: list(by_site.values()) for label, by_site in neurons.items()}
    widths: dict[Key, int] = {site: width for site, width in sites.items() if width is not None}
    layout = Layout(tuple(sites), widths, content["fingerprint"], content["model"])
    return layers, layout, content["metadata"]


def _require(condition: bool, otherwise: str) -> None:
    if not condition:
        raise ValueError(otherwise)


def _by_site(sites: Sequence[Key], layers: Sequence[torch.Tensor]) -> str:
    lines = [
        f"{_text(str(site))}: {_text(indices.tolist())}"
        for site, indices in zip(sites, layers, strict=True)
    ]
    return _block("{}", lines, depth=2)


def _text(value: Any) -> str:
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def _block(brackets: str, lines: list[str], depth: int) -> str:
    if not lines:
        return brackets
    indent = "  " * (depth + 1)
    body = ",\n".join(indent + line for line in lines)
    return f"{brackets[0]}\n{body}\n{'  ' * depth}{brackets[1]}"

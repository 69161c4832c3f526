"""Edit files: edits of one model under names, for an engine that runs in another process."""

from __future__ import annotations

import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lapefast.errors import InputError
from lapefast.labels import check_names
from lapefast.neurons.documents import Document, as_text, block, require
from lapefast.neurons.edits import Edit
from lapefast.neurons.layout import Key, Layout, sorted_indices

__all__ = ["NamedEdits", "load_edits", "save_edits"]

_DOCUMENT = Document("lapefast edits", 1, "edit file", "export")


@dataclass(frozen=True)
class NamedEdits:
    """Edits of one model.

    Attributes:
        edits: name -> edit; all know the sites of the model and their widths.
        server: the name of the edit that holds for every request that asks for none, or None.
    """

    edits: dict[str, Edit]
    server: str | None = None

    @property
    def layout(self) -> Layout:
        """What is known of the model."""
        return next(iter(self.edits.values())).layout


def save_edits(
    path: str | os.PathLike[str], edits: Mapping[str, Edit], server: str | None = None
) -> None:
    """Write edits, bound to a model by `Edit.bind`, as JSON.

    Args:
        path: the file.
        edits: name -> edit.
        server: the one that holds for every request that asks for none.

    Raises:
        InputError: there is none, they are for models that differ or not bound to one, a name is
            not usable, or the file can't be written.
    """
    if not edits or not all(isinstance(edit, Edit) for edit in edits.values()):
        raise InputError("an edit file needs at least one edit, given as {name: edit}")
    layout = Layout(())
    for name, edit in edits.items():
        if not _is_name(name):
            raise InputError(f"an edit's name must be a text other than 'none', got {name!r}")
        if edit.layout.positional or edit.layout.fingerprint is None:
            raise InputError(f"the edit {name} is not bound to a model; call edit.bind(model)")
        layout = layout.merge(edit.layout)
    check_names(edits)
    if server is not None and server not in list(edits):
        raise InputError(f"the server's edit {server!r} is none of the file's: {', '.join(edits)}")
    entries = [f"{as_text(name)}: {_tables(edit)}" for name, edit in edits.items()]
    _DOCUMENT.write(
        path, layout, {"server": as_text(server), "edits": block("{}", entries, depth=1)}
    )


def load_edits(path: str | os.PathLike[str]) -> NamedEdits:
    """Read what `save_edits` wrote.

    Raises:
        InputError: the file is missing, broken, of another kind or of another format version.
    """
    return _DOCUMENT.read(path, _parse)


def _is_name(name: object) -> bool:
    """Whether requests can ask by it: "none" asks for no edit."""
    return isinstance(name, str) and bool(name.strip()) and name != "none"


def _tables(edit: Edit) -> str:
    lines = [
        f"{as_text(site)}: {as_text([column.tolist() for column in table])}"
        for site, table in edit.tables.items()
    ]
    return block("{}", lines, depth=2)


def _parse(content: dict[str, Any], layout: Layout) -> NamedEdits:
    edits, server = content["edits"], content["server"]
    require(isinstance(edits, dict) and bool(edits), "it holds no edits")
    require(all(map(_is_name, edits)), "an edit has no name, or the name none")
    require(
        server is None or server in list(edits), f"its server edit {server!r} is none of its edits"
    )
    require(all(map(bool, edits.values())), "an edit holds no neurons")
    return NamedEdits(
        {
            name: Edit({site: _table(name, site, t, layout) for site, t in sites.items()}, layout)
            for name, sites in edits.items()
        },
        server,
    )


def _table(name: str, site: Key, table: list[list], layout: Layout):
    at = f"edit {name} at site {site}"
    require(site in layout.sites, f"{at}: there is no such site")
    require(len(table) == 3 and all(isinstance(c, list) for c in table), f"{at} is no table")
    require(len({len(column) for column in table}) == 1, f"{at}: its columns differ in length")
    require(bool(table[0]), f"{at}: it holds no neurons")
    require(all(type(index) is int for index in table[0]), f"{at}: neurons are not integers")
    numbers = all(type(value) in (int, float) for column in table[1:] for value in column)
    require(numbers, f"{at}: scale or shift holds something other than numbers")
    neurons = sorted_indices(table[0], site, layout.widths.get(site))
    require(neurons.tolist() == table[0], f"{at}: neurons do not ascend")
    scale, shift = (torch.tensor(column, dtype=torch.float32) for column in table[1:])
    require(bool((scale.isfinite() & shift.isfinite()).all()), f"{at}: a value is not finite")
    return neurons, scale, shift

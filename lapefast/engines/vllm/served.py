"""The edits that a process serves: their names, and what keeps their caches apart."""

from __future__ import annotations

import functools
import hashlib
import os
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import torch

from lapefast.engines.vllm import ARGUMENT, ENVIRONMENT
from lapefast.errors import InputError
from lapefast.neurons import Edit, Layout, load_edits

__all__ = ["NONE", "Served", "served_here"]

NONE = "none"


@dataclass(frozen=True)
class Served:
    """An edit file as it is served.

    Attributes:
        names: the edits' names; the position of a name is its edit's set in every op.
        edits: the edits, in that order.
        digests: SHA-256 of what each edit does, in that order.
        layout: the model's sites and their widths.
        server: the set that holds where a request asks for nothing; -1 for none.
    """

    names: tuple[str, ...]
    edits: tuple[Edit, ...]
    digests: tuple[str, ...]
    layout: Layout
    server: int

    def set_of(self, extra_args: Mapping[str, Any] | None) -> int:
        """The set that a request's extra arguments ask for, or -1.

        Raises:
            InputError: they ask for an edit that there is not.
        """
        if not extra_args:
            return self.server
        for key in extra_args:
            if str(key).startswith("lapefast") and key != ARGUMENT:
                raise InputError(
                    f"a request's extra argument {key} means nothing; {ARGUMENT} asks for an edit"
                )
        if ARGUMENT not in extra_args:
            return self.server
        name = extra_args[ARGUMENT]
        if name == NONE:
            return -1
        if name not in self.names:
            raise InputError(
                f"{ARGUMENT} must name an edit of this server ({', '.join(self.names)}) or be "
                f"{NONE!r}, got {name!r}"
            )
        return self.names.index(name)

    def salted(self, chosen: int, salt: str | None) -> str | None:
        """The cache salt of a request with this set: keys and values of other edits don't serve it.

        Args:
            chosen: the request's set, or -1.
            salt: its own salt, if it brought one.
        """
        if chosen < 0:
            return None if salt is None else f"none {salt}"
        return f"{self.digests[chosen]} {salt or ''}"


def served_here() -> Served | None:
    """What `LAPEFAST_EDITS` in the environment says to serve; None without it.

    Raises:
        InputError: the file is missing or broken.
    """
    path = os.environ.get(ENVIRONMENT)
    if not path:
        return None
    path = os.path.abspath(path)
    state = os.stat(path) if os.path.isfile(path) else None
    return _read(path, state and (state.st_mtime_ns, state.st_size, state.st_ino))


@functools.lru_cache(maxsize=1)
def _read(path: str, state: Any) -> Served:
    """Read the file again only if it has changed: an engine reads it when it starts."""
    named = load_edits(path)
    layout = named.layout
    unknown = [site for site in layout.sites if site not in layout.widths]
    if unknown:
        raise InputError(
            f"the edit file {path} does not say the width of site {unknown[0]}; make it with "
            "lapefast.export.edits"
        )
    names = tuple(named.edits)
    edits = tuple(named.edits.values())
    server = -1 if named.server is None else names.index(named.server)
    return Served(names, edits, tuple(_digest(edit) for edit in edits), layout, server)


def _digest(edit: Edit) -> str:
    digest = hashlib.sha256()
    for site, (neurons, scale, shift) in edit.tables.items():
        digest.update(f"{site}|{len(neurons)}\n".encode())
        for column in (neurons.to(torch.int64), scale, shift):
            digest.update(column.contiguous().numpy().tobytes())
    return digest.hexdigest()

"""What a source of text hands on: documents, in pieces small enough to hold."""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np
import torch

from lapefast.errors import InputError

__all__ = [
    "PIECE",
    "TOKEN_IDS",
    "Piece",
    "Source",
    "as_token_ids",
    "choose_field",
    "content_pieces",
    "token_pieces",
]

PIECE = 1 << 18
"""The most characters (or token ids) of a piece: memory is a few dozen times this."""

TOKEN_IDS = "input_ids"
"""The field that holds ready token ids, as Hugging Face tokenizers name it."""


class Piece(NamedTuple):
    """A part of a document: characters, or ready token ids (integers, [n]). `last` ends it."""

    content: str | np.ndarray
    last: bool


class Source(Protocol):
    """Where documents come from; `pieces` may be called again unless the source says otherwise.

    `name` is what reports call it: a base name, never a path. `row_length` is the length of the
    rows that a source of ready token ids keeps, if it has such rows. `position` and `total` say
    how much was read, in any unit; `total` is None where nobody knows.
    """

    name: str
    row_length: int | None
    position: int
    total: int | None
    signature: Any

    def pieces(self) -> Iterator[Piece]: ...


def choose_field(field: str, names: Sequence[str], prefer_ids: bool) -> str:
    """The field to read of an example with these fields: `field`, or else ready token ids.

    `prefer_ids` (there is no tokenizer) takes the ids first. Raises InputError if both are missing.
    """
    order = (TOKEN_IDS, field) if prefer_ids else (field, TOKEN_IDS)
    for name in order:
        if name in names:
            return name
    found = ", ".join(map(str, names)) or "none"
    raise InputError(f"there is no field {field!r}; the fields found are: {found}")


def content_pieces(item: Any, field: str, prefer_ids: bool) -> Iterator[Piece]:
    """The pieces of one document: a text, a sequence of token ids, or an example holding either.

    None is an empty text, as missing values in data sets are; so is a document of no token ids.
    """
    if isinstance(item, Mapping):
        item = item[choose_field(field, list(item), prefer_ids)]
    if item is None:
        item = ""
    if not isinstance(item, str):
        ids = as_token_ids(item)
        yield from token_pieces(ids) if len(ids) else [Piece("", True)]
    elif len(item) <= PIECE:
        yield Piece(item, True)
    else:
        for begin in range(0, len(item), PIECE):
            yield Piece(item[begin : begin + PIECE], begin + PIECE >= len(item))


def token_pieces(ids: np.ndarray) -> Iterator[Piece]:
    """The pieces of one document of token ids, [n]; none if it is empty."""
    for begin in range(0, len(ids), PIECE):
        yield Piece(ids[begin : begin + PIECE], begin + PIECE >= len(ids))


def as_token_ids(item: Any) -> np.ndarray:
    """A document of token ids as an integer array, [n]. Raises InputError if it is none."""
    if isinstance(item, torch.Tensor):
        item = (item.float() if item.is_floating_point() else item).detach().cpu().numpy()
    if not isinstance(item, (list, tuple, np.ndarray)):
        raise InputError(f"expected a text or a sequence of token ids, got {type(item).__name__}")
    if len(item) == 0:
        return np.empty(0, dtype=np.int64)
    try:
        ids = np.asarray(item)
    except ValueError as error:  # rows of unequal length
        raise InputError("expected one sequence of token ids, got a nested one") from error
    if ids.dtype.kind not in "iu" or ids.ndim != 1:
        raise InputError(
            f"expected a text or integer token ids [n], got {ids.dtype.name} {list(ids.shape)}"
        )
    return ids

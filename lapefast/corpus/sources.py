"""The kinds of source, and which one belongs to what a user hands over."""

from __future__ import annotations

import glob
import io
import math
import os
import re
import stat
from collections.abc import Callable, Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import torch

from lapefast.corpus import data_sets
from lapefast.corpus.pieces import Piece, Source, content_pieces, token_pieces
from lapefast.corpus.reading import file_pieces, is_array_file, load_array
from lapefast.errors import InputError

__all__ = ["find_source", "named_files"]

_ADDRESS = re.compile(r"[A-Za-z][\w+.-]*://")
_DATA_SET_NAME = re.compile(r"(?P<name>[^:]+):(?P<config>[^:]*)(?::(?P<split>.*))?", re.DOTALL)


def find_source(given: Any, document: str, field: str, prefer_ids: bool) -> Source:
    """The source for what a user gave: see `Corpus` for the list. Opens files, reads no text.

    Raises InputError if a path is missing or empty, or what was given is not understood.
    """
    if isinstance(given, (str, os.PathLike)):
        return _named_source(os.fspath(given), document, field, prefer_ids)
    if isinstance(given, (torch.Tensor, np.ndarray)) and not _holds_objects(given):
        return ArraySource(given)
    if data_sets.is_data_set(given):
        return _data_set_source(given, f"<{data_sets.describe(given)}>", field, prefer_ids)
    if isinstance(given, (list, tuple)) and given:
        if all(isinstance(item, os.PathLike) for item in given):
            return FileSource(_expand([os.fspath(i) for i in given]), document, field, prefer_ids)
        if isinstance(given[0], (int, np.integer)) and not isinstance(given[0], bool):
            return ArraySource(_as_array(given))
        if isinstance(given[0], str) and os.path.isfile(given[0]):
            raise InputError(
                f"a list holds texts, but its first is the name of a file, {given[0]}; give files "
                f"as a glob or as pathlib.Path objects"
            )
    ordered = isinstance(given, Iterable) and not isinstance(
        given, (bytes, bytearray, Mapping, set, frozenset)
    )
    if not ordered or hasattr(given, "columns"):
        raise InputError(
            f"a corpus is a path, texts in a list or iterator, a data set, or integer token ids; "
            f"got {type(given).__name__}"
        )
    total = len(given) if hasattr(given, "__len__") else None
    kind = type(given).__name__
    name = f"<{kind}>" if total is None else f"<{kind} of {total}>"
    if iter(given) is given:
        return OnceSource(ItemSource(lambda: given, name, None, field, prefer_ids))
    return ItemSource(lambda: iter(given), name, total, field, prefer_ids)


def named_files(given: str | os.PathLike[str]) -> list[str]:
    """The files that a corpus given by name is read from; none where there are none."""
    path = os.path.expanduser(os.fspath(given))
    name = _DATA_SET_NAME.fullmatch(path)
    if name and not os.path.exists(path) and os.path.exists(name["name"]):
        path = name["name"]
    try:
        return _expand([path])
    except InputError:
        return []


class ArraySource:
    """Ready token ids in one tensor or array: [n] is one document, [rows, n] one per row."""

    def __init__(self, array: Any, name: str | None = None) -> None:
        shape = tuple(array.shape)
        if isinstance(array, torch.Tensor):
            integers = not (array.is_floating_point() or array.is_complex())
            integers = integers and array.dtype != torch.bool
        else:
            integers = array.dtype.kind in "iu"
        self.name = name or f"<token ids {list(shape)}>"
        if not integers:
            raise InputError(f"{self.name}: token ids must be integers, got {array.dtype}")
        if len(shape) not in (1, 2):
            raise InputError(f"{self.name}: token ids must be [n] or [rows, n], got {list(shape)}")
        if 0 in shape:
            raise InputError(f"{self.name}: there are no token ids in it")
        self.array = array
        self.signature = None
        self.row_length = shape[1] if len(shape) == 2 else None
        self.position, self.total = 0, math.prod(shape)

    def pieces(self) -> Iterator[Piece]:
        self.position = 0
        rows = self.array if self.row_length else [self.array]
        for row in rows:
            ids = row.detach().cpu().numpy() if isinstance(row, torch.Tensor) else np.asarray(row)
            for piece in token_pieces(ids):
                self.position += len(piece.content)
                yield piece


class FileSource:
    """Files, one after the other. Their contents are streamed, never held."""

    row_length = None

    def __init__(self, paths: list[str], document: str, field: str, prefer_ids: bool) -> None:
        try:
            found = [os.stat(path) for path in paths]
        except OSError as error:
            raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
        self.paths = paths
        self.sizes = [one.st_size for one in found]
        self.signature = [
            [os.path.realpath(path), one.st_size, one.st_mtime_ns]
            for path, one in zip(paths, found, strict=True)
        ]
        self.arguments = (document, field, prefer_ids)
        self.name = os.path.basename(paths[0])
        if len(paths) > 1:
            self.name += f" and {len(paths) - 1} more"
        self.position, self.total = 0, sum(self.sizes) or None

    def pieces(self) -> Iterator[Piece]:
        before = self.position = 0
        for path, size in zip(self.paths, self.sizes, strict=True):
            with _opened(path) as raw:
                for piece in file_pieces(path, raw, *self.arguments):
                    yield piece
                    self.position = before + (raw.tell() if self.total else 0)
            before += size
        self.position = before


class ItemSource:
    """Texts, token ids, or examples that hold either, from anything that can be iterated."""

    row_length: int | None = None
    signature: Any = None

    def __init__(
        self,
        iterate: Callable[[], Iterator[Any]],
        name: str,
        total: int | None,
        field: str,
        prefer_ids: bool,
    ) -> None:
        self.iterate = iterate
        self.name = name
        self.arguments = (field, prefer_ids)
        self.position, self.total = 0, total

    def pieces(self) -> Iterator[Piece]:
        self.position = 0
        for item in self.iterate():
            try:
                yield from content_pieces(item, *self.arguments)
            except InputError as error:
                raise InputError(f"{self.name}, item {self.position}: {error}") from error
            self.position += 1


class OnceSource:
    """A source that can be read only once. What `peek` reads is kept for `pieces`."""

    row_length = None
    signature = None

    def __init__(self, source: Source) -> None:
        self.name, self.total = source.name, source.total
        self._source = source
        self._pieces = source.pieces()
        self._peeked: list[Piece] = []
        self._consumed = False

    @property
    def position(self) -> int:
        return self._source.position

    def peek(self) -> Iterator[Piece]:
        """Like `pieces`, but leaves the source unread. One peek at a time, before `pieces`."""
        self._refuse_consumed()
        yield from list(self._peeked)
        for piece in self._pieces:
            self._peeked.append(piece)
            yield piece

    def pieces(self) -> Iterator[Piece]:
        self._refuse_consumed()
        self._consumed = True
        while self._peeked:
            yield self._peeked.pop(0)
        yield from self._pieces

    def _refuse_consumed(self) -> None:
        if self._consumed:
            raise InputError(
                f"{self.name} was already consumed by an earlier pass and can be read only once; "
                f"give a list or a file"
            )


def _named_source(given: str, document: str, field: str, prefer_ids: bool) -> Source:
    path = os.path.expanduser(given)
    if not given.strip():
        raise InputError("the path is empty")
    if _ADDRESS.match(given) and not os.path.exists(path):
        raise InputError(
            f"{given.splitlines()[0]:.200} is an address, and texts are read from files alone; "
            "download it first"
        )
    name = _DATA_SET_NAME.fullmatch(given)
    if not os.path.exists(path) and name and not _matches(path):
        data_set = data_sets.load(name["name"], name["config"], name["split"])
        local = os.path.exists(os.path.expanduser(name["name"]))
        base = os.path.basename(name["name"].rstrip(os.sep)) if local else name["name"]
        parts = (base, name["config"], name["split"])
        return _data_set_source(data_set, ":".join(filter(None, parts)), field, prefer_ids)
    base = os.path.basename(path.rstrip(os.sep))
    if data_sets.is_saved(path):
        return _data_set_source(data_sets.load_saved(path, None), base, field, prefer_ids)
    paths = _expand([path])
    if len(paths) == 1 and is_array_file(paths[0]):
        return ArraySource(load_array(paths[0]), os.path.basename(paths[0]))
    source = FileSource(paths, document, field, prefer_ids)
    if os.path.exists(path) and not stat.S_ISREG(os.stat(path).st_mode) and not os.path.isdir(path):
        return OnceSource(source)  # a pipe
    if source.total is None:
        raise InputError(f"{given} is empty")
    if len(paths) > 1:
        source.name = f"{base} ({len(paths)} files)"
    return source


def _data_set_source(data_set: Any, name: str, field: str, prefer_ids: bool) -> ItemSource:
    iterate, total, row_length = data_sets.column(data_set, name, field, prefer_ids)
    source = ItemSource(iterate, name, total, field, prefer_ids)
    source.row_length = row_length
    source.signature = getattr(data_set, "_fingerprint", None)
    return source


def _expand(given: list[str]) -> list[str]:
    """The files that paths, directories and globs name, in order, each sorted by path."""
    paths: list[str] = []
    for path in given:
        found = [path] if os.path.exists(path) else _matches(path)
        if not found:
            reason = "matches no file" if glob.has_magic(path) else "does not exist"
            hint = "; texts are given as a list, a data set as name:config:split"
            raise InputError(f"{path.splitlines()[0]:.200} {reason}{hint}")
        files = [
            file for name in found for file in (_walk(name) if os.path.isdir(name) else [name])
        ]
        if not files:
            raise InputError(f"{path} holds no files")
        paths += files
    # `**` names a directory and also what is in it; a link stands beside its target.
    once: dict[str, str] = {}
    for path in paths:
        once.setdefault(os.path.realpath(path), path)
    return list(once.values())


def _matches(pattern: str) -> list[str]:
    return sorted(glob.glob(pattern, recursive=True)) if glob.has_magic(pattern) else []


def _walk(directory: str) -> list[str]:
    """All files under a directory, linked ones too, sorted by path; see `Corpus` for the names."""
    files: list[str] = []
    seen: set[str] = set()
    # Linked directories come last, so that files are called by the paths that hold them.
    waiting = [directory]
    try:
        for start in waiting:
            for root, directories, names in os.walk(start, onerror=_raise):
                if (real := os.path.realpath(root)) in seen:
                    directories.clear()
                    continue
                seen.add(real)
                directories[:] = sorted(name for name in directories if name[0] not in "._")
                inside = [os.path.join(root, name) for name in directories]
                waiting += filter(os.path.islink, inside)
                files += [os.path.join(root, name) for name in names if name[0] not in "._"]
    except OSError as error:
        raise InputError(f"{error.filename} cannot be read: {error.strerror}") from error
    return sorted(files)


def _raise(error: OSError) -> None:
    raise error


def _opened(path: str) -> io.BufferedReader:
    try:
        return open(path, "rb")
    except OSError as error:
        raise InputError(f"{path} cannot be read: {error.strerror}") from error


def _holds_objects(array: Any) -> bool:
    """Whether a NumPy array holds texts, and so is but another sequence of documents."""
    return isinstance(array, np.ndarray) and array.ndim == 1 and array.dtype.kind in "OUT"


def _as_array(ids: Any) -> np.ndarray:
    try:
        array = np.asarray(ids)
    except (ValueError, OverflowError) as error:
        raise InputError("a list that starts with an integer must hold token ids only") from error
    return array

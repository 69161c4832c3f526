"""Token ids on disk, so that a text is tokenised once however often it is read.

An entry is three files named after what it was made from: the ids, little-endian int32; int64s that
say where documents start, then where empty texts were left out, then the CRC-32 of each chunk of
ids; and, written last, a JSON file without which the others count as absent.
"""

from __future__ import annotations

import fcntl
import hashlib
import json
import os
import secrets
import zlib
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager, suppress
from pathlib import Path
from typing import IO, Any

import numpy as np

from lapefast.corpus.packing import IDENTITY_TOKENS
from lapefast.corpus.tokens import Tokens
from lapefast.errors import InputError
from lapefast.files import write_atomically

__all__ = ["CachedTokens", "TokenCache", "enough", "tokenizer_signature"]

_CHUNK_TOKENS = 1 << 16
_PER_CALL = ("padding", "truncation")


class TokenCache:
    """The place of one text's token ids in a directory of such caches.

    Args:
        directory: made if its parent exists.
        key: all that the ids depend on, as JSON; whatever in it changes makes another entry.

    Raises:
        InputError: the directory cannot be made.
    """

    def __init__(self, directory: str | os.PathLike[str], key: Mapping[str, Any]) -> None:
        self._directory = Path(directory)
        self._key = dict(key)
        try:
            self._directory.mkdir(exist_ok=True)
        except OSError as error:
            raise InputError(
                f"the token cache {directory} is no directory and cannot be made one: "
                f"{error.strerror}"
            ) from error

    def find(self, needed: int | None) -> CachedTokens | None:
        """The ids, if there are at least ``needed`` of them or all of the text's (None)."""
        for limit in dict.fromkeys((None, needed)):
            ids, places, about = self._files(limit)
            try:
                said = json.loads(about.read_text())
                counts = [said[name] for name in ("tokens", "documents", "empty")]
                numbers = np.load(places, allow_pickle=False)
                mapped = np.memmap(ids, dtype="<i4", mode="r")
                whole = said["checksum"] == _checksum(numbers, counts) and len(mapped) == counts[0]
            except (OSError, EOFError, ValueError, KeyError, TypeError):
                continue
            if whole:
                ends = np.cumsum(counts[1:])
                return CachedTokens(ids, mapped, *np.split(numbers, ends))
        return None

    def written(self, tokens: Iterator[Tokens], needed: int | None) -> Iterator[Tokens]:
        """The stream itself, kept in the cache once ``needed`` ids of it (None: all) were read.

        Raises:
            InputError: the cache cannot be written.
        """
        files = self._files(needed)
        ids = files[0]
        _remove_left(ids)
        temporary = ids.with_name(f".{ids.name}.{secrets.token_hex(6)}.tmp")
        starts: list[np.ndarray] = []
        empty: list[np.ndarray] = []
        total = 0
        kept = False
        try:
            with ExitStack() as stack:
                with _writing(self._directory):
                    file = stack.enter_context(open(temporary, "xb"))
                _lock(file)
                for batch in tokens:
                    starts.append(batch.starts + total)
                    empty.append(batch.empty + total)
                    total += len(batch.ids)
                    with _writing(self._directory):
                        file.write(batch.ids.astype("<i4").tobytes())
                        file.flush()
                    if needed is not None and total >= enough(needed):
                        kept = True
                        self._keep(temporary, files, starts, empty, total)
                        yield batch
                        yield from tokens
                        return
                    yield batch
                if total:
                    self._keep(temporary, files, starts, empty, total)
                    kept = True
        finally:
            if not kept:
                temporary.unlink(missing_ok=True)

    def _keep(
        self,
        temporary: Path,
        files: tuple[Path, Path, Path],
        starts: list[np.ndarray],
        empty: list[np.ndarray],
        total: int,
    ) -> None:
        ids, places, about = files
        mapped = np.memmap(temporary, dtype="<i4", mode="r")
        chunks = np.split(mapped, range(_CHUNK_TOKENS, total, _CHUNK_TOKENS))
        numbers = np.concatenate([*starts, *empty, [zlib.crc32(chunk) for chunk in chunks]])
        counts = [total, sum(map(len, starts)), sum(map(len, empty))]
        with _writing(self._directory):
            # Until the last file is there, an entry that is being replaced counts as absent.
            about.unlink(missing_ok=True)
            os.replace(temporary, ids)
        with write_atomically(places) as path, open(path, "wb") as file:
            np.save(file, numbers)
        said = dict(zip(("tokens", "documents", "empty"), counts, strict=True))
        said["checksum"] = _checksum(numbers, counts)
        with write_atomically(about) as path:
            path.write_text(json.dumps({**self._key, **said}, indent=1, sort_keys=True))

    def _files(self, needed: int | None) -> tuple[Path, Path, Path]:
        text = json.dumps({**self._key, "needed": needed}, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        return tuple(self._directory / f"{name}.{kind}" for kind in ("ids", "npy", "json"))


def enough(needed: int) -> int:
    """How many ids are kept where so many are needed: a source's identity is read from them too."""
    return max(needed, IDENTITY_TOKENS)


class CachedTokens:
    """Token ids that were read back.

    Args:
        path: of the ids.
        ids: int32 [n], mapped into memory.
        starts, empty: see `Tokens`; int64, ascending.
        checksums: CRC-32 of each chunk of ids.
    """

    def __init__(
        self,
        path: Path,
        ids: np.ndarray,
        starts: np.ndarray,
        empty: np.ndarray,
        checksums: np.ndarray,
    ) -> None:
        self._path, self._ids, self._checksums = path, ids, checksums
        self._starts, self._empty = starts, empty

    def __len__(self) -> int:
        return len(self._ids)

    def tokens(self, position: int = 0) -> Iterator[Tokens]:
        """The stream from a position on.

        Raises:
            InputError: what is read is not what was written.
        """
        # One chunk at least, as texts may have been left out behind all ids.
        first = min(position, max(len(self._ids) - 1, 0)) // _CHUNK_TOKENS
        for chunk, checksum in enumerate(self._checksums[first:], first):
            start = chunk * _CHUNK_TOKENS
            ids = self._ids[start : start + _CHUNK_TOKENS]
            if zlib.crc32(ids) != checksum:
                raise InputError(
                    f"the kept token ids {self._path} are damaged; remove that file, so that the "
                    "text is tokenised anew"
                )
            begin, end = max(start, position), start + len(ids)
            ends = [begin, end if end < len(self._ids) else end + 1]
            starts, empty = (
                places[slice(*np.searchsorted(places, ends))] - begin
                for places in (self._starts, self._empty)
            )
            yield Tokens(ids[begin - start :].astype(np.int64), starts, empty)

    def before(self, position: int) -> tuple[int, int]:
        """How many documents start, and how many texts were left out, before a position."""
        documents, empty = (
            int(np.searchsorted(places, position)) for places in (self._starts, self._empty)
        )
        return documents, empty


def tokenizer_signature(tokenizer: Any) -> str | None:
    """SHA-256 of all that a tokenizer's ids depend on; None for no tokenizer."""
    if tokenizer is None:
        return None
    said: dict[str, Any] = {"class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"}
    # No part of a fast tokenizer's state, which is told of it in every call.
    said["split_special_tokens"] = getattr(tokenizer, "split_special_tokens", None)
    if getattr(tokenizer, "is_fast", False):
        # How it pads and cuts is said in every call, and stands in its state as last said.
        state = json.loads(tokenizer.backend_tokenizer.to_str())
        said["state"] = {name: of for name, of in state.items() if name not in _PER_CALL}
    else:
        said["vocabulary"] = sorted(tokenizer.get_vocab().items())
        kwargs = getattr(tokenizer, "init_kwargs", {})
        said["settings"] = {name: of for name, of in kwargs.items() if "path" not in name}
    text = json.dumps(said, sort_keys=True, default=str)
    return hashlib.sha256(text.encode()).hexdigest()


@contextmanager
def _writing(directory: Path) -> Iterator[None]:
    try:
        yield
    except OSError as error:
        raise InputError(
            f"the token cache {directory} cannot be written: {error.strerror}; make room or do "
            "without a cache"
        ) from error


def _checksum(numbers: np.ndarray, counts: list[int]) -> int:
    return zlib.crc32(numbers.astype("<i8").tobytes(), zlib.crc32(str(counts).encode()))


def _lock(file: IO[bytes]) -> None:
    """Show that somebody writes the file, as far as its file system can tell others."""
    with suppress(OSError):
        fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)


def _remove_left(ids: Path) -> None:
    """Remove what processes that were killed had written of an entry."""
    for left in ids.parent.glob(f".{ids.name}.*.tmp"):
        # Whoever still writes it, or a file system that can't lock, is left alone.
        with suppress(OSError), open(left, "rb") as file:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            left.unlink()

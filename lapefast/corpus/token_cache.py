"""Token ids on disk, so that a text is tokenised once however often it is read.

An entry is three files named after what it was made from: the ids, little-endian int32; where
documents start, and after that where empty texts were left out; and, written last, a JSON file
without which the others count as absent.
"""

from __future__ import annotations

import hashlib
import json
import os
import secrets
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from pathlib import Path
from typing import Any

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
                found = CachedTokens(
                    np.memmap(ids, dtype="<i4", mode="r", shape=(said["tokens"],)),
                    *np.split(np.load(places, allow_pickle=False), [said["documents"]]),
                )
                counts = said["documents"], said["empty"]
            except (OSError, EOFError, ValueError, KeyError, TypeError):
                continue
            complete = ids.stat().st_size == 4 * said["tokens"]
            if complete and (len(found.starts), len(found.empty)) == counts:
                return found
        return None

    def written(self, tokens: Iterator[Tokens], needed: int | None) -> Iterator[Tokens]:
        """The stream itself, kept in the cache once ``needed`` ids of it (None: all) were read.

        Raises:
            InputError: the cache cannot be written.
        """
        files = self._files(needed)
        ids = files[0]
        temporary = ids.with_name(f".{ids.name}.{secrets.token_hex(6)}.tmp")
        starts: list[np.ndarray] = []
        empty: list[np.ndarray] = []
        total = 0
        kept = False
        try:
            for batch in tokens:
                starts.append(batch.starts + total)
                empty.append(batch.empty + total)
                total += len(batch.ids)
                with _writing(self._directory), open(temporary, "ab") as file:
                    file.write(batch.ids.astype("<i4").tobytes())
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
        counts = {"documents": sum(map(len, starts)), "empty": sum(map(len, empty))}
        with _writing(self._directory):
            # Until the last file is there, an entry that is being replaced counts as absent.
            about.unlink(missing_ok=True)
            os.replace(temporary, ids)
        with write_atomically(places) as path, open(path, "wb") as file:
            np.save(file, np.concatenate([*starts, *empty]))
        said = {**self._key, "tokens": total, **counts}
        with write_atomically(about) as path:
            path.write_text(json.dumps(said, indent=1, sort_keys=True))

    def _files(self, needed: int | None) -> tuple[Path, Path, Path]:
        text = json.dumps({**self._key, "needed": needed}, sort_keys=True)
        name = hashlib.sha256(text.encode()).hexdigest()[:32]
        return tuple(self._directory / f"{name}.{kind}" for kind in ("ids", "npy", "json"))


def enough(needed: int) -> int:
    """How many ids are kept where so many are needed: a source's identity is read from them too."""
    return max(needed, IDENTITY_TOKENS)


class CachedTokens:
    """Token ids that were read back, int32 [n] mapped into memory; see `Tokens` for the others."""

    def __init__(self, ids: np.ndarray, starts: np.ndarray, empty: np.ndarray) -> None:
        self.ids = ids
        self.starts = starts
        self.empty = empty

    def tokens(self, position: int) -> Iterator[Tokens]:
        """The stream from a position on."""
        # One chunk at least, as texts may have been left out behind all ids.
        for begin in range(position, max(position + 1, len(self.ids)), _CHUNK_TOKENS):
            end = min(begin + _CHUNK_TOKENS, len(self.ids))
            ends = [begin, end if end < len(self.ids) else end + 1]
            starts, empty = (
                places[slice(*np.searchsorted(places, ends))] - begin
                for places in (self.starts, self.empty)
            )
            yield Tokens(self.ids[begin:end].astype(np.int64), starts, empty)

    def before(self, position: int) -> tuple[int, int]:
        """How many documents start, and how many texts were left out, before a position."""
        documents, empty = (
            int(np.searchsorted(places, position)) for places in (self.starts, self.empty)
        )
        return documents, empty


def tokenizer_signature(tokenizer: Any) -> str | None:
    """SHA-256 of all that a tokenizer's ids depend on; None for no tokenizer."""
    if tokenizer is None:
        return None
    said: dict[str, Any] = {"class": f"{type(tokenizer).__module__}.{type(tokenizer).__qualname__}"}
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

"""From documents to one stream of token ids."""

from __future__ import annotations

from collections.abc import Iterator, Sequence
from itertools import chain
from typing import Any, NamedTuple

import numpy as np

from lapefast.corpus.pieces import PIECE, Piece
from lapefast.errors import InputError

__all__ = ["Tokenisation", "Tokens"]

_CONTEXT = 4096
_BATCH_DOCUMENTS = 512


class Tokens(NamedTuple):
    """A stretch of the stream: token ids, int64 [n], and where in it documents start.

    `empty` is where texts that are empty or blank would have stood; they are left out.
    """

    ids: np.ndarray
    starts: np.ndarray
    empty: np.ndarray = np.empty(0, dtype=np.int64)


class Tokenisation:
    """Turns documents into token ids, as the tokenizer does by default, in batches.

    A batch goes through the tokenizer's own batch call, which fast tokenizers run in parallel.
    A document of more than `window` characters is tokenised through overlapping windows, so that
    it need not be held; two windows are joined where both have the same token, `context`
    characters or more from either's edge, which gives the tokens of the whole document. Slow
    tokenizers, which don't say where tokens stand in the text, get the document whole.
    `tokenizer` may be None if all documents are token ids.
    """

    def __init__(
        self,
        tokenizer: Any,
        special_tokens: bool,
        *,
        batch: int = _BATCH_DOCUMENTS,
        window: int = PIECE,
        context: int = _CONTEXT,
    ) -> None:
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self._batch_documents = batch
        self._window = window
        self._context = context

    def tokens(self, pieces: Iterator[Piece]) -> Iterator[Tokens]:
        """The stream of all documents, with nothing between. Empty and blank texts are left out."""
        texts: list[str] = []
        empty: list[int] = []  # how many texts stand before each that is left out
        size = 0
        for document in _documents(pieces, self._window):
            whole = isinstance(document, str)
            if whole and (not document or document.isspace()):
                empty.append(len(texts))
                continue
            if whole and self._tokenizer is not None:
                texts.append(document)
                size += len(document)
            full = len(texts) + len(empty) >= self._batch_documents or size >= self._window
            if full or (not whole and (texts or empty)):
                yield self._batch(texts, empty)
                texts, empty, size = [], [], 0
            if isinstance(document, Tokens):
                yield document
            elif self._tokenizer is None:
                raise InputError("these are texts, which need a tokenizer; none was given")
            elif not whole:
                yield from self._long(document)
        if texts or empty:
            yield self._batch(texts, empty)

    def _batch(self, texts: list[str], empty: Sequence[int] = ()) -> Tokens:
        documents = self._call(texts, self._special_tokens)["input_ids"] if texts else []
        lengths = np.fromiter(map(len, documents), dtype=np.int64, count=len(documents))
        ids = np.fromiter(chain.from_iterable(documents), dtype=np.int64, count=lengths.sum())
        ends = np.cumsum(lengths)
        places = np.append(0, ends)[np.array(empty, dtype=np.int64)]
        return Tokens(ids, ends - lengths, places)

    def _call(self, texts: list[str], special_tokens: bool, **options: Any) -> Any:
        # verbose=False: the warning about a sequence longer than the model takes is wrong here,
        # where the stream is cut to rows. Whatever else the tokenizer warns of is still heard.
        try:
            return self._tokenizer(
                texts,
                add_special_tokens=special_tokens,
                padding=False,
                truncation=False,
                return_attention_mask=False,
                verbose=False,
                **options,
            )
        except Exception as error:
            for text in texts:
                _refuse_surrogates(text, error)
            raise

    def _long(self, parts: Iterator[str]) -> Iterator[Tokens]:
        affixes = self._affixes()
        if affixes is None:
            yield self._batch(["".join(parts)])
            return
        before, after = affixes
        yield Tokens(before, _START)
        for ids in self._joined(parts):
            yield Tokens(ids, _NO_START)
        yield Tokens(after, _NO_START)

    def _affixes(self) -> tuple[np.ndarray, np.ndarray] | None:
        """The special tokens around a document; None if it can't be tokenised in windows."""
        if not getattr(self._tokenizer, "is_fast", False):
            return None
        body = self._call(["a"], False)["input_ids"][0]
        ids = self._call(["a"], self._special_tokens)["input_ids"][0]
        for before in range(len(ids) - len(body) + 1):
            after = before + len(body)
            if ids[before:after] == body:
                return np.array(ids[:before], dtype=np.int64), np.array(ids[after:], dtype=np.int64)
        return None

    def _joined(self, parts: Iterator[str]) -> Iterator[np.ndarray]:
        text, offset, held = "", 0, None  # text[0] is the document's character number `offset`
        while True:
            text, ended = _filled(text, parts, self._window)
            window = self._encoded(text[: self._window], offset)
            if held is not None and not len(window.ids):
                yield held.ids
            elif held is not None and len(held.ids):
                seam = _seam(held, window, self._context)
                if seam is None:
                    # Nothing agrees, as in one letter repeated for ever: go on where a token ends.
                    cut = _last_clean(held, offset + self._context)
                    yield held.ids[:cut]
                    skipped = max(0, int(held.ends[cut - 1]) - offset)
                    text, offset, held = text[skipped:], offset + skipped, None
                    continue
                yield held.ids[: seam[0]]
                window = _Window(*(array[seam[1] :] for array in window))
            if ended and len(text) <= self._window:
                yield window.ids
                return
            held = window
            step = self._window - 3 * self._context
            text, offset = text[step:], offset + step

    def _encoded(self, text: str, offset: int) -> _Window:
        encoded = self._call([text], False, return_offsets_mapping=True)
        places = np.array(encoded["offset_mapping"][0], dtype=np.int64).reshape(-1, 2) + offset
        return _Window(
            np.array(encoded["input_ids"][0], dtype=np.int64), places[:, 0], places[:, 1]
        )


class _Window(NamedTuple):
    """Token ids [n], and where each begins and ends in its document, in characters."""

    ids: np.ndarray
    begins: np.ndarray
    ends: np.ndarray


_START = np.zeros(1, dtype=np.int64)
_NO_START = np.empty(0, dtype=np.int64)


def _documents(pieces: Iterator[Piece], window: int) -> Iterator[str | Iterator[str] | Tokens]:
    """Whole texts, the parts of longer ones (to be read before going on), and token ids."""
    parts: list[str] = []
    length, inside = 0, False
    for piece in pieces:
        if not isinstance(piece.content, str):
            ids = piece.content.astype(np.int64, copy=False)
            yield Tokens(ids, _NO_START if inside else _START)
            inside = not piece.last
            continue
        parts.append(piece.content)
        length += len(piece.content)
        if length > window:
            yield _rest(parts, piece.last, pieces)
        elif not piece.last:
            continue
        else:
            yield parts[0] if len(parts) == 1 else "".join(parts)
        parts, length = [], 0


def _rest(parts: list[str], ended: bool, pieces: Iterator[Piece]) -> Iterator[str]:
    yield from parts
    while not ended:
        content, ended = next(pieces)
        yield content


def _filled(text: str, parts: Iterator[str], window: int) -> tuple[str, bool]:
    """The text with more after it, until it is longer than a window; and whether that was all."""
    gathered, length = [text], len(text)
    while length <= window:
        part = next(parts, None)
        if part is None:
            return "".join(gathered), True
        gathered.append(part)
        length += len(part)
    return "".join(gathered), False


def _seam(left: _Window, right: _Window, context: int) -> tuple[int, int] | None:
    """The index of one and the same token in both windows, far from the edges of either."""
    low, high = right.begins[0] + context, left.ends[-1] - context
    ours, theirs = _clean(left, low, high), _clean(right, low, high)
    _, i, j = np.intersect1d(left.begins[ours], right.begins[theirs], return_indices=True)
    ours, theirs = ours[i], theirs[j]
    same = (left.ids[ours] == right.ids[theirs]) & (left.ends[ours] == right.ends[theirs])
    ours, theirs = ours[same], theirs[same]
    if not len(ours):
        return None
    return int(ours[len(ours) // 2]), int(theirs[len(theirs) // 2])


def _clean(window: _Window, low: int, high: int) -> np.ndarray:
    """Indices of tokens in [low, high) that share no character with a token before them."""
    before = np.maximum.accumulate(window.ends)[:-1]
    begins = window.begins[1:]
    return 1 + np.flatnonzero((before <= begins) & (begins >= low) & (begins < high))


def _last_clean(window: _Window, low: int) -> int:
    clean = _clean(window, low, window.ends[-1])
    return int(clean[-1]) if len(clean) else len(window.ids)


def _refuse_surrogates(text: str, cause: Exception) -> None:
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise InputError(
            f"a text holds half of a surrogate pair, U+{ord(text[error.start]):04X} at character "
            f"{error.start}, which no tokenizer takes: {text[:40]!a}"
        ) from cause

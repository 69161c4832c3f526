"""From the stream of token ids to whole rows, and the exact account of both."""

from __future__ import annotations

import hashlib
from collections.abc import Iterator
from dataclasses import asdict, dataclass, replace
from itertools import chain
from typing import Any, NamedTuple

import numpy as np
import torch

from lapefast.corpus.tokens import Tokens
from lapefast.errors import InputError

__all__ = [
    "IDENTITY_TOKENS",
    "CorpusReport",
    "Stream",
    "count_tokens",
    "first_tokens",
    "identity_of",
    "pack",
    "refuse_foreign_ids",
]

_CHUNK_TOKENS = 1 << 16
IDENTITY_TOKENS = 4096


@dataclass(frozen=True)
class CorpusReport:
    """What was read of one label's corpus. JSON-able, without paths of the machine it ran on.

    label: the label.
    source: what the corpus was called: a file's or directory's base name, a data set's name, or
        the kind of object it was.
    identity: SHA-256 of the first 4,096 token ids of the source (of all, if it has fewer). It does
        not depend on names, compression, container or row length, so that the same text is known
        again however it is given; a text that differs from the start is another source.
    seq_len: tokens per row.
    rows: (start, stop), the rows of the source that were handed out.
    documents: documents read from the source's beginning to the last row's end; all of them if the
        source was read to its end.
    tokens: tokens in `rows`.
    dropped: tokens at the source's end that filled no row; 0 if `capped`.
    capped: whether the reading ended at `max_tokens`, whatever else there may be in the source.
    empty: texts that are no `documents` because they are empty or blank, as far as those were read.
    """

    label: str
    source: str
    identity: str
    seq_len: int
    rows: tuple[int, int]
    documents: int
    tokens: int
    dropped: int
    capped: bool
    empty: int = 0

    def to_json(self) -> dict[str, Any]:
        """A dict that `json.dumps` takes."""
        return {**asdict(self), "rows": list(self.rows)}


class Stream(NamedTuple):
    """Token ids from the beginning of a row of the source on.

    tokens: the ids.
    row: the row that they begin with.
    documents: those that begin before it.
    empty: texts before it that were left out.
    identity: the source's, where known; a stream without it begins with row 0.
    """

    tokens: Iterator[Tokens]
    row: int = 0
    documents: int = 0
    empty: int = 0
    identity: str | None = None


def pack(
    stream: Stream,
    report: CorpusReport,
    max_rows: int | None,
    vocab_size: int | None,
) -> Iterator[tuple[torch.Tensor | None, CorpusReport]]:
    """Whole rows, int64 [n, seq_len], each with the report as it stands once they are taken.

    `report` says label, source, seq_len and the first row to hand out. `max_rows` counts from the
    source's beginning. The last item has no rows, only the report. Raises InputError for ids
    outside the vocabulary and for a source that does not fill one row.
    """
    seq_len, first = report.seq_len, report.rows[0]
    tokens, done, documents, empty, identity = stream
    if identity is None:
        beginning, tokens = first_tokens(tokens)
        identity = identity_of(beginning)
    report = replace(report, identity=identity)
    step = max(1, _CHUNK_TOKENS // seq_len)
    parts: list[np.ndarray] = []
    # Of the documents, and of texts left out, those at or after row `done`.
    starts = blanks = np.empty(0, dtype=np.int64)
    held = 0
    if done == max_rows:
        yield None, replace(report, documents=documents, capped=True, empty=empty)
        return
    for batch in tokens:
        place = done * seq_len + held
        starts = np.concatenate([starts, batch.starts + place])
        blanks = np.concatenate([blanks, batch.empty + place])
        parts.append(batch.ids)
        held += len(batch.ids)
        ready = held // seq_len
        if max_rows is not None:
            ready = min(ready, max_rows - done)
        if not ready:
            continue
        ids = np.concatenate(parts)
        refuse_foreign_ids(ids[: ready * seq_len], vocab_size, done * seq_len)
        for row in range(0, ready, step):
            rows = ids[row * seq_len : min(row + step, ready) * seq_len].reshape(-1, seq_len)
            skipped = max(0, first - done)
            done += len(rows)
            begun = int(np.searchsorted(starts, done * seq_len))
            documents, starts = documents + begun, starts[begun:]
            passed = int(np.searchsorted(blanks, done * seq_len))
            empty, blanks = empty + passed, blanks[passed:]
            if skipped < len(rows):
                report = replace(
                    report,
                    rows=(first, done),
                    documents=documents,
                    tokens=(done - first) * seq_len,
                    empty=empty,
                )
                yield torch.from_numpy(rows[skipped:].copy()), report
        parts = [ids[ready * seq_len :].copy()]
        held = len(parts[0])
        if done == max_rows:
            yield None, replace(report, documents=documents, capped=True, empty=empty)
            return
    documents += len(starts)
    if not done:
        raise _too_few(documents, held, seq_len)
    if done < first:
        raise InputError(f"there are only {done} rows of {seq_len} in it, not {first} or more")
    if held:
        refuse_foreign_ids(np.concatenate(parts), vocab_size, done * seq_len)
    empty += len(blanks)
    yield None, replace(report, documents=documents, dropped=held, empty=empty)


def count_tokens(stream: Iterator[Tokens], enough: int, vocab_size: int | None) -> None:
    """Reads until there are `enough` tokens. Raises InputError as `pack` would."""
    documents = tokens = 0
    for batch in stream:
        refuse_foreign_ids(batch.ids, vocab_size, tokens)
        documents += len(batch.starts)
        tokens += len(batch.ids)
        if tokens >= enough:
            return
    raise _too_few(documents, tokens, enough)


def refuse_foreign_ids(ids: np.ndarray, vocab_size: int | None, position: int) -> None:
    """Raises InputError for an id that is negative or not in the vocabulary.

    `position` is where in the source `ids` begin.
    """
    if not len(ids) or (ids.min() >= 0 and (vocab_size is None or ids.max() < vocab_size)):
        return
    wrong = (ids < 0) | (ids >= vocab_size) if vocab_size is not None else ids < 0
    at = int(np.flatnonzero(wrong)[0])
    limit = f"the vocabulary of {vocab_size}" if vocab_size is not None else "any vocabulary"
    raise InputError(f"token id {int(ids[at])} (token {position + at}) is outside {limit}")


def identity_of(ids: np.ndarray) -> str:
    """The identity of a source that begins with these token ids."""
    return hashlib.sha256(ids[:IDENTITY_TOKENS].astype("<i8").tobytes()).hexdigest()


def first_tokens(stream: Iterator[Tokens]) -> tuple[np.ndarray, Iterator[Tokens]]:
    """The ids that make a source's identity, or a few more, and the whole stream anew."""
    head: list[Tokens] = []
    length = 0
    for batch in stream:
        head.append(batch)
        length += len(batch.ids)
        if length >= IDENTITY_TOKENS:
            break
    ids = np.concatenate([batch.ids for batch in head]) if head else np.empty(0, dtype=np.int64)
    return ids, chain(head, stream)


def _too_few(documents: int, tokens: int, needed: int) -> InputError:
    if not documents:
        return InputError("there is no text in it (an iterator may have been consumed before)")
    return InputError(
        f"{tokens} tokens in {documents} documents are too few for one row of {needed}; give more "
        f"text or a shorter seq_len"
    )

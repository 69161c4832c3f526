"""A label's corpus: what a user gave, read as rows of token ids."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Generator, Iterable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from numbers import Integral
from types import TracebackType
from typing import TYPE_CHECKING, Any

import numpy as np
import torch

from lapefast.corpus.background import Ahead
from lapefast.corpus.packing import (
    CorpusReport,
    Stream,
    count_tokens,
    first_tokens,
    identity_of,
    pack,
    refuse_foreign_ids,
)
from lapefast.corpus.reading import DOCUMENTS
from lapefast.corpus.sources import ArraySource, OnceSource, find_source
from lapefast.corpus.token_cache import TokenCache, enough, tokenizer_signature
from lapefast.corpus.tokens import Tokenisation, Tokens
from lapefast.errors import InputError
from lapefast.labels import check_names

if TYPE_CHECKING:
    from typing_extensions import Self

__all__ = ["Corpus", "Rows", "open_corpora", "parse_corpus_argument", "parse_corpus_arguments"]

_CHUNKS_AHEAD = 4
_CHECK_DOCUMENTS = 16


class Corpus:
    """One label's texts or token ids, whatever they come from, as whole rows of token ids.

    Documents are tokenised as the tokenizer does by default, concatenated with nothing between and
    cut to rows; the tail is dropped; nothing is padded. Texts that are empty or blank are no
    documents. Memory does not grow with the corpus, except that one line of JSON is held whole.

    source:
        - a path or a glob of text files, JSON lines (`.jsonl`, `.ndjson`, `.json`), Parquet, each
          also compressed (gzip, bz2, xz, zstd, told by content); a directory stands for all files
          under it, sorted by path, but for names that start with `.` or `_`. A file with another
          extension is text, in UTF-8; its lines end at line feeds only. One `.npy`, `.pt` or `.pth`
          file holds token ids. A list of `Path` objects stands for all their files;
        - a directory that `Dataset.save_to_disk` wrote, or `name:config:split` for what
          `datasets.load_dataset` loads, streamed. An empty config is the default, and an empty
          split `train`, so that `name:` is enough. Names of the hub go through the same loader
          but are not tested against the hub;
        - a Hugging Face `Dataset` or `IterableDataset`;
        - a list or other iterable of texts, of token id sequences, or of mappings that hold them.
          An iterator or generator can be read once;
        - integer token ids, a tensor or array: [rows, n] keeps its rows, [n] is cut into rows.
    tokenizer: a Hugging Face tokenizer; not needed for token ids. Fast ones tokenise in parallel
        unless the environment variable TOKENIZERS_PARALLELISM says otherwise.
    document: what one document of a text file is: "line", "file" or "blank-line" (documents are
        separated by blank lines).
    field: the field of JSON lines, Parquet and data sets. Where it is missing, or where there is no
        tokenizer, `input_ids` is read as token ids.
    special_tokens: whether the tokenizer adds its special tokens to each document.
    vocab_size: the model's; ids outside it are refused. None refuses negative ids only.
    token_cache: a directory that keeps the token ids of files and saved data sets, under all that
        they depend on: the files' paths, sizes and times, the tokenizer and how text is read. What
        is there is read instead of the text. Other sources are read as they are.

    Raises InputError if the source is missing, empty or not understood, and, while it is read, for
    what is found there.
    """

    def __init__(
        self,
        label: str,
        source: Any,
        tokenizer: Any = None,
        *,
        document: str = "line",
        field: str = "text",
        special_tokens: bool = True,
        vocab_size: int | None = None,
        token_cache: str | os.PathLike[str] | None = None,
    ) -> None:
        _check_label(label)
        if document not in DOCUMENTS:
            raise InputError(f"document must be one of {', '.join(DOCUMENTS)}, got {document!r}")
        if tokenizer is not None and (isinstance(tokenizer, str) or not callable(tokenizer)):
            raise InputError(
                f"tokenizer must be a Hugging Face tokenizer, got {type(tokenizer).__name__}"
            )
        self.label = label
        self._tokenizer = tokenizer
        self._special_tokens = special_tokens
        self._vocab_size = vocab_size
        self._report: CorpusReport | None = None
        self.empty = 0
        with _naming(label):
            self._source = find_source(source, document, field, prefer_ids=tokenizer is None)
            signature = self._source.signature
            self._cache: TokenCache | None = None
            if token_cache is not None and signature is not None:
                self._cache = TokenCache(
                    token_cache,
                    {
                        "source": signature,
                        "document": document,
                        "field": field,
                        "special_tokens": special_tokens,
                        "tokenizer": tokenizer_signature(tokenizer),
                    },
                )

    @property
    def name(self) -> str:
        """What the source is called in reports: a base name, not a path."""
        return self._source.name

    @property
    def signature(self) -> str | None:
        """A digest that changes with the files or the data set read; None of other sources."""
        signature = self._source.signature
        if signature is None:
            return None
        return hashlib.sha256(json.dumps(signature).encode()).hexdigest()[:12]

    @property
    def row_length(self) -> int | None:
        """The length of the rows of a source of ready token ids that has rows; None of others."""
        return self._source.row_length

    @property
    def report(self) -> CorpusReport:
        """The account of the rows taken last; of the whole corpus once they have all been taken."""
        if self._report is None:
            raise InputError(f"label {self.label!r}: there is no report before rows were taken")
        return self._report

    def check(self, seq_len: int | None = None, max_tokens: int | None = None) -> None:
        """Reads the start of the corpus, enough for one row, and all ids of a tensor or array.

        An iterator is none the shorter for it. Raises InputError.
        """
        with _naming(self.label):
            seq_len = self._seq_len(seq_len) if seq_len or self.row_length else 1
            _max_rows(seq_len, max_tokens)
            source = self._source
            pieces = source.peek() if isinstance(source, OnceSource) else source.pieces()
            if isinstance(source, ArraySource):
                position = 0
                for piece in source.pieces():
                    refuse_foreign_ids(piece.content, self._vocab_size, position)
                    position += len(piece.content)
            tokenisation = self._tokenisation(batch=_CHECK_DOCUMENTS)
            count_tokens(tokenisation.tokens(pieces), seq_len, self._vocab_size)

    def rows(
        self, seq_len: int | None = None, max_tokens: int | None = None, *, start: int = 0
    ) -> Rows:
        """The corpus as rows, made by a background thread ahead of whoever takes them.

        seq_len: tokens per row; may be None if the source has rows of its own.
        max_tokens: read at most so many tokens, rounded down to whole rows.
        start: the first row to hand out. Those before it are read and counted in
            `report.documents` and against `max_tokens`, but not handed out.

        Raises InputError for bad arguments here, and for the corpus while the rows are taken.
        """
        with _naming(self.label):
            seq_len = self._seq_len(seq_len)
            if start < 0:
                raise InputError(f"start must be a row, 0 or more, got {start}")
            max_rows = _max_rows(seq_len, max_tokens)
        self._report = None
        empty = CorpusReport(self.label, self.name, "", seq_len, (start, start), 0, 0, 0, False)
        return Rows(self, self._made(empty, max_rows), start, max_rows)

    def fill_cache(self, seq_len: int | None = None, max_tokens: int | None = None) -> None:
        """Reads as much of the corpus as `rows` would into the token cache, if it can be kept.

        Raises InputError for bad arguments, for the corpus, and where the cache cannot be written.
        """
        if self._cache is None:
            return
        with _naming(self.label):
            seq_len = self._seq_len(seq_len)
            max_rows = _max_rows(seq_len, max_tokens)
            needed = None if max_rows is None else max_rows * seq_len
            if self._cache.find(needed) is None:
                read = 0
                for tokens in self._tokens(needed):
                    read += len(tokens.ids)
                    if needed is not None and read >= enough(needed):
                        break

    def identity(self) -> str:
        """What `CorpusReport.identity` will be. An iterator is none the shorter for it."""
        with _naming(self.label):
            source = self._source
            pieces = source.peek() if isinstance(source, OnceSource) else source.pieces()
            tokens = self._tokenisation(batch=_CHECK_DOCUMENTS).tokens(pieces)
            return identity_of(first_tokens(tokens)[0])

    def documents(self) -> Iterator[torch.Tensor]:
        """The token ids of each document, whole, int64 [n]. Raises InputError while it is read.

        `empty` is how many texts before the document taken last were left out, being empty or
        blank; once all are taken, how many there are.
        """
        held: list[torch.Tensor] = []
        self.empty = 0
        with _naming(self.label):
            position = empty = 0
            for tokens in self._tokenisation().tokens(self._source.pieces()):
                refuse_foreign_ids(tokens.ids, self._vocab_size, position)
                position += len(tokens.ids)
                # A copy: ids may lie in a file that is mapped to be read only.
                first, *others = torch.tensor(tokens.ids).tensor_split(tokens.starts.tolist())
                held.append(first)
                for part, start in zip(others, tokens.starts, strict=True):
                    if sum(map(len, held)):
                        yield torch.cat(held)
                    held = [part]
                    self.empty = empty + int(np.searchsorted(tokens.empty, start, "right"))
                empty += len(tokens.empty)
            if sum(map(len, held)):
                yield torch.cat(held)
            self.empty = empty

    def _made(
        self, report: CorpusReport, max_rows: int | None
    ) -> Generator[tuple[torch.Tensor | None, CorpusReport], None, None]:
        with _naming(self.label):
            seq_len, (first, _) = report.seq_len, report.rows
            needed = None if max_rows is None else max_rows * seq_len
            cached = self._cache.find(needed) if self._cache else None
            if cached is not None:
                # A text that has become shorter ends before the row to begin with.
                begin = min(first, len(cached) // seq_len)
                stream = Stream(
                    cached.tokens(begin * seq_len),
                    begin,
                    *cached.before(begin * seq_len),
                    identity_of(first_tokens(cached.tokens())[0]),
                )
            else:
                stream = Stream(self._tokens(needed))
            yield from pack(stream, report, max_rows, self._vocab_size)

    def _tokens(self, needed: int | None) -> Iterator[Tokens]:
        """The whole stream from the text, kept in the cache if there is one."""
        tokens = self._tokenisation().tokens(self._source.pieces())
        return self._cache.written(tokens, needed) if self._cache else tokens

    def _tokenisation(self, **options: int) -> Tokenisation:
        return Tokenisation(self._tokenizer, self._special_tokens, **options)

    def _seq_len(self, seq_len: int | None) -> int:
        length = self.row_length
        if seq_len is None and length is None:
            raise InputError(f"{self.name} has no rows of its own, so seq_len must be given")
        if seq_len is not None and seq_len < 1:
            raise InputError(f"seq_len must be at least 1, got {seq_len}")
        if seq_len is not None and length is not None and seq_len != length:
            raise InputError(
                f"{self.name} keeps its rows of {length} token ids, but seq_len is {seq_len}; "
                f"leave seq_len out, or flatten the token ids to have them cut"
            )
        return seq_len or length


@dataclass
class _Made:
    """How many rows were made, the first to hand out included, and whether they are all."""

    rows: int
    ended: bool = False

    def count(self, made: Generator) -> Generator:
        """What is made, counted in the thread that makes it."""
        for rows, report in made:
            self.rows += 0 if rows is None else len(rows)
            yield rows, report
        self.ended = True


class Rows:
    """An iterator over int64 tensors [n, seq_len], n at least 1 and bounded, on the CPU.

    Also a context manager; its thread ends with it, when it is dropped, or at `close`.
    """

    def __init__(self, corpus: Corpus, made: Generator, start: int, max_rows: int | None) -> None:
        self._corpus = corpus
        self._max_rows = max_rows
        self._taken = start
        self._fraction = 0.0
        self._made = _Made(start)
        # Its thread holds no `Rows`, which ends it when it is dropped.
        self._ahead = Ahead(
            self._made.count(made), _CHUNKS_AHEAD, f"lapefast corpus {corpus.label}"
        )

    def __iter__(self) -> Self:
        return self

    def __next__(self) -> torch.Tensor:
        rows, self._corpus._report = next(self._ahead)
        if rows is None:
            return next(self)
        self._taken += len(rows)
        return rows

    def __enter__(self) -> Self:
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        self.close()

    @property
    def fraction(self) -> float | None:
        """The part of the rows that were taken, 0 to 1, for progress bars; None where nobody knows.

        How many there will be is judged by how far the source was read for those that are made;
        however that changes, the fraction never becomes less.
        """
        source, made = self._corpus._source, self._made
        parts = []
        if source.total and made.rows:
            read = 1.0 if made.ended else source.position / source.total
            parts.append(self._taken / made.rows * read)
        if self._max_rows:
            parts.append(self._taken / self._max_rows)
        if not parts:
            return None
        self._fraction = max(self._fraction, min(1.0, max(parts)))
        return self._fraction

    def close(self) -> None:
        """Ends the thread; what it had read ahead is dropped. Safe to call twice."""
        self._ahead.close()


def open_corpora(
    corpora: Mapping[str, Any],
    tokenizer: Any = None,
    *,
    seq_len: int | None = None,
    **options: Any,
) -> list[Corpus]:
    """A Corpus per label, in the mapping's order, each checked as far as that is quickly done.

    What can be known before the work starts is known after this: paths, the kind of each source,
    that a tokenizer is there if one is needed, the ids of tensors, and that each label starts as
    it should and fills one row of `seq_len` (if None, of its own rows, or of one token).
    `options` are those of `Corpus`. Raises InputError.
    """
    if not isinstance(corpora, Mapping):
        raise InputError(f"corpora must map labels to sources, got {type(corpora).__name__}")
    if not corpora:
        raise InputError("corpora is empty; give at least one label with its source")
    iterators: dict[int, str] = {}
    for label, source in corpora.items():
        if isinstance(source, Iterator):
            other = iterators.setdefault(id(source), label)
            if other != label:
                raise InputError(f"labels {other!r} and {label!r} share one iterator")
    opened = [Corpus(label, source, tokenizer, **options) for label, source in corpora.items()]
    for corpus in opened:
        corpus.check(seq_len)
    return opened


def parse_corpus_argument(argument: str) -> tuple[str, str]:
    """Label and source of `label=source`, as in `en=wiki.en.txt` or `en=name:config:split`.

    The source goes to `Corpus` as it is. Raises InputError.
    """
    label, equals, source = argument.partition("=")
    if not equals:
        raise InputError(
            f"a corpus is given as label=source, such as en=wiki.txt; got {argument!r}"
        )
    _check_label(label)
    if not source.strip():
        raise InputError(f"label {label!r}: there is no source after the = in {argument!r}")
    return label, source


def parse_corpus_arguments(arguments: Iterable[str]) -> dict[str, str]:
    """Label to source, for all arguments. Raises InputError, also for a label given twice."""
    corpora: dict[str, str] = {}
    for argument in arguments:
        label, source = parse_corpus_argument(argument)
        if label in corpora:
            raise InputError(
                f"label {label!r} is given twice, as {corpora[label]} and {source}; several files "
                f"of one label are a directory or a glob"
            )
        corpora[label] = source
    return corpora


def _max_rows(seq_len: int, max_tokens: int | None) -> int | None:
    if max_tokens is None:
        return None
    if not isinstance(max_tokens, Integral):
        raise InputError(f"max_tokens must be an integer, got {max_tokens!r}")
    if max_tokens // seq_len < 1:
        raise InputError(f"max_tokens={max_tokens} is less than one row of {seq_len}")
    return max_tokens // seq_len


def _check_label(label: Any) -> None:
    if not isinstance(label, str) or not label.strip():
        raise InputError(f"a label must be a non-empty string, got {label!r}")
    check_names([label])


@contextmanager
def _naming(label: str) -> Iterator[None]:
    try:
        yield
    except InputError as error:
        raise InputError(f"label {label!r}: {error}") from error

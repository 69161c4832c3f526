"""Text to packed blocks of token ids.

`Corpus` reads what a user has; `Corpus.rows` hands out whole rows. `open_corpora` opens and checks
one per label.
"""

from __future__ import annotations

from lapefast.corpus.corpus import (
    Corpus,
    Rows,
    open_corpora,
    parse_corpus_argument,
    parse_corpus_arguments,
)
from lapefast.corpus.packing import CorpusReport
from lapefast.corpus.sources import named_files

__all__ = [
    "Corpus",
    "CorpusReport",
    "Rows",
    "named_files",
    "open_corpora",
    "parse_corpus_argument",
    "parse_corpus_arguments",
]

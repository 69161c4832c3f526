"""Documents as padded batches for a bare model: for passes in which each is a text of its own."""

from __future__ import annotations

import time
from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from itertools import islice
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lapefast.corpus import Corpus, open_corpora
from lapefast.errors import InputError
from lapefast.models.bare import bare_model
from lapefast.models.inputs import forward_inputs, input_device, row_length, vocabulary_size
from lapefast.profiling.batches import fitting_batch_size

__all__ = ["DocumentBatch", "DocumentPass"]

_SORTED_BATCHES = 16  # so many at once are sorted by length, which leaves little padding


@dataclass(frozen=True)
class DocumentBatch:
    """Some documents of one label.

    Attributes:
        inputs: what the bare model is called with; padding stands on the right.
        mask: bool [batch, length], True for tokens, where the inputs lie.
        numbers: which of the corpus's texts they are, counted from 0, empty ones too.
    """

    inputs: dict[str, Any]
    mask: Tensor
    numbers: list[int]

    @property
    def lengths(self) -> list[int]:
        """Tokens of each document."""
        return self.mask.sum(1).tolist()

    def split(self) -> Iterator[DocumentBatch]:
        """The same documents one by one, without padding."""
        for row, length in enumerate(self.lengths):
            # Of a model's inputs only those of tokens are tensors, each [batch, length].
            inputs = {
                name: value[row : row + 1, :length] if isinstance(value, Tensor) else value
                for name, value in self.inputs.items()
            }
            mask = self.mask[row : row + 1, :length]
            yield DocumentBatch(inputs, mask, [self.numbers[row]])


class DocumentPass:
    """Each label's documents, one by one, for one run of a model over all of them.

    Args:
        model: a Hugging Face model.
        corpora: label -> documents, in any form that `lapefast.corpus.Corpus` reads.
        tokenizer: needed for text.
        seq_len: the longest document, in tokens; None is the smaller of the model's limit and
            2,048.
        longer: what becomes of a longer one: "cut" to that length, or "drop".
        max_documents: of each label, the first so many that are read at all; None reads all.
        batch_size: documents per forward pass; None chooses one that fits the memory.
        progress: show a bar.
        text: how text is read; see `lapefast.corpus.Corpus`.

    Attributes:
        labels: in the order of the corpora.
        batch_size, seq_len: as used.

    Raises:
        InputError: for what is wrong with the corpora or the arguments.
    """

    def __init__(
        self,
        model: nn.Module,
        corpora: Mapping[str, Any],
        tokenizer: Any,
        seq_len: int | None = None,
        longer: Literal["cut", "drop"] = "cut",
        max_documents: int | None = None,
        batch_size: int | None = None,
        progress: bool = True,
        **text: Any,
    ) -> None:
        for name, value in (("batch_size", batch_size), ("max_documents", max_documents)):
            if value is not None and (type(value) is not int or value < 1):
                raise InputError(f"{name} must be an integer of at least 1, got {value!r}")
        self.seq_len = row_length(model, seq_len)
        self._opened = {
            corpus.label: corpus
            for corpus in open_corpora(
                corpora, tokenizer, vocab_size=vocabulary_size(model), **text
            )
        }
        for corpus in self._opened.values():
            corpus.check()
        self.labels = list(self._opened)
        self.batch_size = batch_size or fitting_batch_size(model, self.seq_len)
        self._longer, self._max_documents, self._progress = longer, max_documents, progress
        self._text = text
        self._bare, self._device = bare_model(model), input_device(model)
        self._seen = {label: {"documents": 0, "longer": 0, "empty": 0} for label in self.labels}
        self._begun = time.monotonic()

    def batches(self, label: str) -> Iterator[DocumentBatch]:
        """The label's documents, batch after batch.

        Raises:
            InputError: the label has no document that can be used.
        """
        seen = self._seen[label] = {"documents": 0, "longer": 0, "empty": 0}
        used, corpus = 0, self._opened[label]
        # Of labels that take a moment each, those after the first second have bars.
        delay = max(self._begun + 1 - time.monotonic(), 0)
        with tqdm(desc=label, unit="doc", disable=not self._progress, delay=delay) as bar:
            for group in _grouped(self._kept(corpus, seen), self.batch_size * _SORTED_BATCHES):
                group.sort(key=lambda one: len(one[1]))
                for start in range(0, len(group), self.batch_size):
                    part = group[start : start + self.batch_size]
                    yield self._batch(part)
                    used += len(part)
                    bar.update(len(part))
        seen["empty"] = corpus.empty
        if not used:
            raise InputError(
                f"label {label!r} has no document of at most {self.seq_len} tokens; give others "
                "or a larger seq_len"
            )

    def metadata(self) -> dict[str, Any]:
        """What a result says of the documents it came from, as JSON; after the pass."""
        return {
            "seq_len": self.seq_len,
            "longer": self._longer,
            "max_documents": self._max_documents,
            **self._text,
            "batch_size": self.batch_size,
            "corpora": [
                {"label": label, "source": self._opened[label].name, **seen}
                for label, seen in self._seen.items()
            ],
        }

    def _kept(self, corpus: Corpus, seen: dict[str, int]) -> Iterator[tuple[int, Tensor]]:
        for ids in islice(corpus.documents(), self._max_documents):
            number = seen["documents"] + corpus.empty
            seen["documents"] += 1
            if len(ids) > self.seq_len:
                seen["longer"] += 1
                if self._longer == "drop":
                    continue
            yield number, ids[: self.seq_len]

    def _batch(self, documents: list[tuple[int, Tensor]]) -> DocumentBatch:
        numbers, ids = zip(*documents, strict=True)
        padded = nn.utils.rnn.pad_sequence(ids, batch_first=True).to(self._device)
        lengths = torch.tensor([len(one) for one in ids], device=self._device)
        mask = torch.arange(padded.shape[1], device=self._device) < lengths[:, None]
        given = None if bool(mask.all()) else mask.long()
        return DocumentBatch(forward_inputs(self._bare, padded, given), mask, list(numbers))


def _grouped(items: Iterable[Any], size: int) -> Iterator[list[Any]]:
    iterator = iter(items)
    while group := list(islice(iterator, size)):
        yield group

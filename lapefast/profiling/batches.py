"""Corpora as batches for a bare model: what every pass over text does before it looks inside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from numbers import Integral
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lapefast.corpus import open_corpora
from lapefast.errors import InputError
from lapefast.models.bare import bare_model
from lapefast.models.inputs import forward_inputs, input_device, row_length, vocabulary_size
from lapefast.models.placement import dtype_of
from lapefast.models.structure import find_ffns

__all__ = ["CorpusPass", "fitting_batch_size"]


class CorpusPass:
    """Each label's text in batches of full rows, for one run of a model over all of it.

    Args:
        model, corpora, tokenizer, seq_len, batch_size, max_tokens, progress, text: as
            `lapefast.profile` takes them; ``text`` are its ``document``, ``field`` and
            ``special_tokens``.

    Attributes:
        labels: in the order of the corpora.
        longest: tokens of the longest row.
        batch_size: rows per batch, but for the last of a label.

    Raises:
        InputError: for what is wrong with the corpora or the arguments, as far as it can be known
            before the pass.
    """

    def __init__(
        self,
        model: nn.Module,
        corpora: Mapping[str, Any],
        tokenizer: Any,
        seq_len: int | None,
        batch_size: int | None,
        max_tokens: int | None,
        progress: bool,
        **text: Any,
    ) -> None:
        length = row_length(model, seq_len)
        if batch_size is not None and not isinstance(batch_size, Integral):
            raise InputError(f"batch_size must be an integer, got {batch_size!r}")
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        opened = open_corpora(corpora, tokenizer, vocab_size=vocabulary_size(model), **text)
        self._lengths = {
            corpus.label: row_length(model, corpus.row_length) if corpus.row_length else length
            for corpus in opened
        }
        for corpus in opened:
            if seq_len is not None and corpus.row_length is not None:
                self._lengths[corpus.label] = seq_len  # refused by the corpus where its rows differ
            corpus.check(self._lengths[corpus.label])
        self._opened = {corpus.label: corpus for corpus in opened}
        self._bare, self._device = bare_model(model), input_device(model)
        self._max_tokens, self._progress = max_tokens, progress
        self.labels = list(self._opened)
        self.longest = max(self._lengths.values())
        self.batch_size = batch_size or fitting_batch_size(model, self.longest)

    def inputs(self, label: str) -> Iterator[dict[str, Any]]:
        """What the bare model is called with, batch after batch of one label's text."""
        for batch in self.batches(label):
            yield forward_inputs(self._bare, batch.to(self._device))

    def batches(self, label: str) -> Iterator[Tensor]:
        """One label's text: int64 [rows, length] on the CPU, batch after batch."""
        corpus = self._opened[label]
        with (
            corpus.rows(self._lengths[label], self._max_tokens) as rows,
            tqdm(desc=label, unit="tok", unit_scale=True, disable=not self._progress) as bar,
        ):
            for batch in _regrouped(rows, self.batch_size):
                yield batch
                if rows.fraction:
                    bar.total = max(int(bar.n / rows.fraction), bar.n + batch.numel())
                bar.update(batch.numel())
            bar.total = bar.n
            bar.refresh()

    def metadata(self) -> dict[str, Any]:
        """What a result says of the text it came from, as JSON; after the pass."""
        return {
            "seq_len": self.longest,
            "batch_size": self.batch_size,
            "corpora": [corpus.report.to_json() for corpus in self._opened.values()],
        }


def fitting_batch_size(model: nn.Module, length: int) -> int:
    """Rows per forward pass: about 2,048 tokens on a CPU and 16,384 elsewhere, if memory allows.

    Larger batches were not faster on a CPU, where activations should stay near the caches.
    """
    device = input_device(model)
    ffns = find_ffns(model)
    widest = max(ffns, key=lambda ffn: ffn.site.width)
    # Gate, up, product, and about as much again for the attention and the residual stream.
    per_token = 6 * widest.site.width * dtype_of(widest).itemsize
    if device.type == "cuda":
        free, wanted = torch.cuda.mem_get_info(device)[0], 16384
    else:
        free, wanted = psutil.virtual_memory().available, 2048
    return max(1, min(wanted, free // 4 // per_token) // length)


def _regrouped(chunks: Iterable[Tensor], size: int) -> Iterator[Tensor]:
    held: list[Tensor] = []
    for chunk in chunks:
        held.append(chunk)
        if sum(map(len, held)) >= size:
            *full, rest = torch.cat(held).split(size)
            if len(rest) == size:
                full, rest = [*full, rest], rest[:0]
            yield from full
            held = [rest]
    if sum(map(len, held)):
        yield torch.cat(held)

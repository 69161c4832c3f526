"""Corpora as batches for a bare model: what every pass over text does before it looks inside."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass
from numbers import Integral
from time import perf_counter
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lapefast.corpus import Corpus, open_corpora
from lapefast.errors import InputError
from lapefast.models.bare import bare_model, text_config
from lapefast.models.forwards import takes_all_tokens
from lapefast.models.inputs import forward_inputs, input_device, row_length, vocabulary_size
from lapefast.models.parallel import leads, least
from lapefast.models.placement import dtype_of
from lapefast.models.structure import FFN, find_ffns

__all__ = ["Batch", "CorpusPass", "fitting_batch_size"]


@dataclass(frozen=True)
class Batch:
    """Some full rows of one label's text.

    Attributes:
        label: whose text it is.
        first_row: which row of that text comes first.
        ids: token ids, int64 [rows, seq_len], on the CPU.
    """

    label: str
    first_row: int
    ids: Tensor


class CorpusPass:
    """Each label's text in batches of full rows, for one run of a model over all of it.

    Args:
        model, corpora, tokenizer, seq_len, batch_size, max_tokens, progress, text: as
            `lapefast.profile` takes them; ``text`` are its ``document``, ``field``,
            ``special_tokens`` and ``token_cache``.
        part: ``(i, n)``: the batches of each label whose numbers leave ``i - 1`` when divided by
            ``n``; None is all.

    Attributes:
        labels: in the order of the corpora.
        longest: tokens of the longest row.
        batch_size: rows per batch, but for the last of a label.
        ended: label -> what is said of its text, as JSON, once all its batches were taken.
        waited: seconds that whoever took batches waited for them.

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
        part: tuple[int, int] | None = None,
        **text: Any,
    ) -> None:
        length = row_length(model, seq_len)
        if batch_size is not None and not isinstance(batch_size, Integral):
            raise InputError(f"batch_size must be an integer, got {batch_size!r}")
        if batch_size is not None and batch_size < 1:
            raise InputError(f"batch_size must be at least 1, got {batch_size}")
        if part is not None and not 1 <= part[0] <= part[1]:
            raise InputError(f"part must be (i, n) with 1 <= i <= n, got {part}")
        batch_size = None if batch_size is None else int(batch_size)
        opened = open_corpora(corpora, tokenizer, vocab_size=vocabulary_size(model), **text)
        self._lengths = {
            corpus.label: row_length(model, corpus.row_length) if corpus.row_length else length
            for corpus in opened
        }
        for corpus in opened:
            if seq_len is not None and corpus.row_length is not None:
                self._lengths[corpus.label] = seq_len  # refused by the corpus where its rows differ
            corpus.check(self._lengths[corpus.label], max_tokens)
        self._opened = {corpus.label: corpus for corpus in opened}
        self._bare, self._device = bare_model(model), input_device(model)
        self._max_tokens = int(max_tokens) if isinstance(max_tokens, Integral) else max_tokens
        self._part = part
        self._progress = progress and leads()
        self.labels = list(self._opened)
        self.longest = max(self._lengths.values())
        self.batch_size = batch_size or fitting_batch_size(model, self.longest)
        self.ended: dict[str, dict[str, Any]] = {}
        self._identities: dict[str, str] = {}
        self.waited = 0.0

    def inputs(self, label: str) -> Iterator[dict[str, Any]]:
        """What the bare model is called with, batch after batch of one label's text."""
        for batch in self.batches(label):
            yield forward_inputs(self._bare, batch.ids.to(self._device))

    def batches(self, label: str, first_row: int = 0) -> Iterator[Batch]:
        """One label's batches from a row on, which is the first of a batch.

        Raises:
            InputError: for what is wrong with the text.
        """
        corpus, length = self._opened[label], self._lengths[label]
        with (
            corpus.rows(length, self._max_tokens, start=first_row) as rows,
            tqdm(
                desc=label,
                unit="tok",
                unit_scale=True,
                initial=first_row * length,
                disable=not self._progress,
            ) as bar,
        ):
            batches = _regrouped(rows, self.batch_size)
            while (ids := self._next(batches)) is not None:
                if self._takes(first_row):
                    yield Batch(label, first_row, ids)
                first_row += len(ids)
                if rows.fraction:
                    bar.total = max(int(bar.n / rows.fraction), bar.n + ids.numel())
                bar.update(ids.numel())
            bar.total = bar.n
            bar.refresh()
        self.ended[label] = self._said(corpus)

    def all_batches(self, done: Mapping[str, int]) -> Iterator[Batch]:
        """Every label's batches, those of one label after those of another.

        Args:
            done: label -> rows that were taken before. Labels in `ended` are left out.
        """
        for label in self.labels:
            if label not in self.ended:
                yield from self.batches(label, done.get(label, 0))

    def in_turn(self, done: Mapping[str, int]) -> Iterator[Batch | None]:
        """One batch of each label, then the next of each; None after 1, 2, 4, 8 and so on of each.

        Args:
            done: as above; wherever a run was stopped, the batches that follow are the same.
        """
        taken = {
            label: -(-done.get(label, 0) // self.batch_size)
            for label in self.labels
            if label not in self.ended
        }
        waiting = {label: self.batches(label, done.get(label, 0)) for label in taken}
        turn = min(taken.values(), default=0)
        if turn.bit_count() == 1 and set(taken.values()) == {turn}:
            yield None  # whether it was asked before the stop is not known
        while waiting:
            for label in [label for label in waiting if taken[label] == turn]:
                batch = next(waiting[label], None)
                if batch is None:
                    del waiting[label]
                else:
                    taken[label] += 1
                    yield batch
            turn += 1
            if turn.bit_count() == 1:
                yield None

    def fill_cache(self) -> None:
        """Tokenise all texts that a token cache can keep, if there is one, before the pass."""
        for label, corpus in self._opened.items():
            corpus.fill_cache(self._lengths[label], self._max_tokens)

    def sources(self) -> dict[str, str]:
        """Label -> what changes with the files of its text, where it is of files."""
        signed = {label: corpus.signature for label, corpus in self._opened.items()}
        return {label: signature for label, signature in signed.items() if signature is not None}

    def settings(self) -> dict[str, Any]:
        """What decides which batches there are, as JSON; to be asked before the pass."""
        self._identities = {label: corpus.identity() for label, corpus in self._opened.items()}
        return {
            "labels": self.labels,
            "text": self._identities,
            "seq_len": self._lengths,
            "batch_size": self.batch_size,
            "max_tokens": self._max_tokens,
            "part": list(self._part) if self._part else None,
        }

    def metadata(self, done: Mapping[str, int] | None = None) -> dict[str, Any]:
        """What a result says of the text it came from, as JSON; after the pass.

        Args:
            done: label -> rows that were taken, of labels whose text had not ended.
        """
        return {
            "seq_len": self.longest,
            "batch_size": self.batch_size,
            "corpora": [
                self.ended[label] if label in self.ended else self._said_so_far(corpus, done[label])
                for label, corpus in self._opened.items()
            ],
        }

    def _next(self, batches: Iterator[Tensor]) -> Tensor | None:
        begin = perf_counter()
        ids = next(batches, None)
        self.waited += perf_counter() - begin
        return ids

    def _said(self, corpus: Corpus) -> dict[str, Any]:
        """The report of a whole text, whichever row was the first to be taken this time."""
        report = corpus.report.to_json()
        rows, size = report["rows"][1], self.batch_size
        said = {**report, "rows": [0, rows], "tokens": rows * report["seq_len"]}
        if self._part is not None:
            taken = [min(size, rows - row) for row in range(0, rows, size) if self._takes(row)]
            said["tokens"] = sum(taken) * report["seq_len"]
            said["part"] = {
                "number": self._part[0],
                "of": self._part[1],
                "batch_size": size,
                "max_tokens": self._max_tokens,
            }
        return said

    def _said_so_far(self, corpus: Corpus, rows: int) -> dict[str, Any]:
        """The same of a text that has not ended, but for its documents: some were read ahead."""
        length = self._lengths[corpus.label]
        return {
            "label": corpus.label,
            "source": corpus.name,
            "identity": self._identities[corpus.label],
            "seq_len": length,
            "rows": [0, rows],
            "tokens": rows * length,
            "dropped": 0,
            "capped": True,
        }

    def _takes(self, first_row: int) -> bool:
        """Whether the batch that begins with this row belongs to the part that is taken."""
        return self._part is None or first_row // self.batch_size % self._part[1] == (
            self._part[0] - 1
        )


def fitting_batch_size(model: nn.Module, length: int) -> int:
    """Rows per forward pass: about 2,048 tokens on a CPU and 16,384 elsewhere, if memory allows.

    Larger batches were not faster on a CPU, where activations should stay near the caches.
    """
    device = input_device(model)
    ffns = find_ffns(model, mixtures=True)
    chosen = getattr(text_config(model), "num_experts_per_tok", None) or 1
    # Gate, up, product, and about as much again for the attention and the residual stream.
    per_token = 6 * max(
        ffn.site.width * _experts_per_token(ffn, chosen) * dtype_of(ffn).itemsize for ffn in ffns
    )
    if device.type == "cuda":
        free, wanted = torch.cuda.mem_get_info(device)[0], 16384
    else:
        import psutil  # a pass on a GPU, or of a batch size that is given, does without

        free, wanted = psutil.virtual_memory().available, 2048
    # Processes that share the model's layers run the same batches.
    return least(model, max(1, min(wanted, free // 4 // per_token) // length))


def _experts_per_token(ffn: FFN, chosen: int) -> int:
    """How many experts compute a token, whether it is routed to them or not; 1 in a dense FFN."""
    if not ffn.site.experts:
        return 1
    return ffn.site.experts if takes_all_tokens(ffn.owner) else chosen


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

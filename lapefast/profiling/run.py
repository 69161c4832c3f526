"""The pass over a corpus: rows through the bare model, statistics from inside its activations."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping, Sequence
from numbers import Integral
from typing import Any

import psutil
import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lapefast.corpus import Corpus, open_corpora
from lapefast.errors import InputError
from lapefast.models.bare import bare_model, evaluating, headless
from lapefast.models.inputs import forward_inputs, input_device, row_length, vocabulary_size
from lapefast.models.placement import dtype_of
from lapefast.models.structure import find_ffns
from lapefast.profiles import Profile
from lapefast.recording import Recorder


def profile(
    model: nn.Module,
    corpora: Mapping[str, Any],
    tokenizer: Any = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = None,
    threshold: float = 0.0,
    statistics: Sequence[str] = ("counts", "sums"),
    exact: bool = True,
    backend: str | None = None,
    progress: bool = True,
    resume: str | None = None,
    *,
    document: str = "line",
    field: str = "text",
    special_tokens: bool = True,
) -> Profile:
    """Count, for each label's text, how often every FFN neuron of ``model`` is active.

    Texts are tokenised, concatenated with nothing between and cut to full rows; the tail is
    dropped (arXiv 2402.16438). The model runs in ``eval()``, without gradients, cache or head; its
    modules' training flags are given back.

    Args:
        model: a Hugging Face model, or any whose FFNs `lapefast.models.find_sites` finds.
        corpora: label -> text or token ids, in any form that `lapefast.corpus.Corpus` reads.
        tokenizer: needed for text.
        seq_len: tokens per row; None is the smaller of the model's limit and 2,048. A tensor
            ``[rows, n]`` keeps its rows.
        batch_size: rows per forward pass, the same for the whole run and recorded; None chooses
            one that fits the memory.
        max_tokens: at most so many tokens per label; None reads everything. The paper's limit is
            99,999,744.
        threshold: a neuron is active where its activation is strictly above it.
        statistics: of ``counts``, ``sums``, ``square_sums``, ``up_abs_sums`` (see `Profile`).
        exact: fuse only activations proven bit-equal to the model's own.
        backend: who computes the ops; None takes ``LAPEFAST_BACKEND`` or the best for the device.
        progress: show a bar with tokens/s and the time left.
        resume: reserved for resumable runs; must be None.
        document, field, special_tokens: how text is read; see `lapefast.corpus.Corpus`.

    Raises:
        InputError: for what is wrong with the model, the corpora or the arguments, before the pass
            starts where it can be known; during it for text that can't be read and for activations
            that are not finite.
    """
    if resume is not None:
        raise InputError("resume must be None: resumable runs are not available in this version")
    length = row_length(model, seq_len)
    if batch_size is not None and not isinstance(batch_size, Integral):
        raise InputError(f"batch_size must be an integer, got {batch_size!r}")
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    opened = open_corpora(
        corpora,
        tokenizer,
        document=document,
        field=field,
        special_tokens=special_tokens,
        vocab_size=vocabulary_size(model),
    )
    lengths = {
        corpus.label: row_length(model, corpus.row_length) if corpus.row_length else length
        for corpus in opened
    }
    for corpus in opened:
        if seq_len is not None and corpus.row_length is not None:
            lengths[corpus.label] = seq_len  # refused by the corpus where its rows differ
        corpus.check(lengths[corpus.label])
    batch_size = batch_size or fitting_batch_size(model, max(lengths.values()))
    bare, device = bare_model(model), input_device(model)
    with (
        Recorder(model, list(corpora), statistics, threshold, exact, backend) as recorder,
        evaluating(model),
        headless(bare),
        torch.no_grad(),
    ):
        recorder.end_at_last_site()
        for corpus in opened:
            recorder.set(label=corpus.label)
            for batch in _batches(corpus, lengths[corpus.label], max_tokens, batch_size, progress):
                bare(**forward_inputs(bare, batch.to(device)))
            recorder.check()
        counted = recorder.profile()
    counted.metadata.update(
        tokenizer=getattr(tokenizer, "name_or_path", None),
        seq_len=max(lengths.values()),
        batch_size=batch_size,
        corpora=[corpus.report.to_json() for corpus in opened],
    )
    return counted


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


def _batches(
    corpus: Corpus, length: int, max_tokens: int | None, batch_size: int, progress: bool
) -> Iterator[Tensor]:
    """The corpus's rows, ``batch_size`` at a time, the last batch as long as they last."""
    with (
        corpus.rows(length, max_tokens) as rows,
        tqdm(desc=corpus.label, unit="tok", unit_scale=True, disable=not progress) as bar,
    ):
        for batch in _regrouped(rows, batch_size):
            yield batch
            if rows.fraction:
                bar.total = max(int(bar.n / rows.fraction), bar.n + batch.numel())
            bar.update(batch.numel())
        bar.total = bar.n
        bar.refresh()


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


__all__ = ["fitting_batch_size", "profile"]

"""The pass over a corpus: rows through the bare model, statistics from inside its activations."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import ExitStack, closing
from typing import Any

import torch
from torch import nn

from lapefast.errors import InputError
from lapefast.models.bare import bare_model, evaluating, headless
from lapefast.profiles import Profile
from lapefast.profiling.batches import CorpusPass
from lapefast.recording import Recorder

__all__ = ["profile"]


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
    until: Callable[[Profile], bool] | None = None,
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
        statistics: of ``counts``, ``sums``, ``square_sums``, ``up_abs_sums`` and ``shard_counts``
            (see `lapefast.record`).
        exact: fuse only activations proven bit-equal to the model's own.
        backend: who computes the ops; None takes ``LAPEFAST_BACKEND`` or the best for the device.
        progress: show a bar with tokens/s and the time left.
        resume: reserved for resumable runs; must be None.
        document, field, special_tokens: how text is read; see `lapefast.corpus.Corpus`.
        until: whether what was counted so far is enough, such as
            `lapefast.evaluate.UntilStable(0.98)`, which needs ``shard_counts``. The labels are then
            read in turn, a batch of each, and it is asked after 1, 2, 4, 8 and so on batches and at
            the texts' end. A label whose text ends before the others' stays as it is. The profile's
            metadata take over its attribute ``metadata``, if it has one.

    Raises:
        InputError: for what is wrong with the model, the corpora or the arguments, before the pass
            starts where it can be known; during it for text that can't be read and for activations
            that are not finite.
    """
    if resume is not None:
        raise InputError("resume must be None: resumable runs are not available in this version")
    text = CorpusPass(
        model,
        corpora,
        tokenizer,
        seq_len,
        batch_size,
        max_tokens,
        progress,
        document=document,
        field=field,
        special_tokens=special_tokens,
    )
    bare = bare_model(model)
    with (
        Recorder(model, list(corpora), statistics, threshold, exact, backend) as recorder,
        evaluating(model),
        headless(bare),
        torch.no_grad(),
    ):
        recorder.end_at_last_site()
        reading = [_reading(text, label, recorder, bare) for label in text.labels]
        if until is None:
            for label in reading:
                for _ in label:
                    pass
                recorder.check()
        else:
            _in_turn(reading, lambda: until(recorder.profile()))
        counted = recorder.profile()
    counted.metadata.update(
        tokenizer=getattr(tokenizer, "name_or_path", None),
        **text.metadata(),
        **getattr(until, "metadata", {}),
    )
    return counted


def _reading(text: CorpusPass, label: str, recorder: Recorder, bare: nn.Module) -> Iterator[None]:
    """Runs the model on a label's text; stops after every batch."""
    row = 0
    for inputs in text.inputs(label):
        recorder.set(label=label, first_row=row)
        bare(**inputs)
        row += len(inputs["input_ids"])
        yield


def _in_turn(reading: Sequence[Iterator[None]], enough: Callable[[], bool]) -> None:
    """Takes a batch of each label in turn until enough was read, or there is no more."""
    with ExitStack() as stack:
        left = [stack.enter_context(closing(label)) for label in reading]
        rounds, asked = 0, 1
        while left:
            left = [label for label in left if next(label, left) is not left]
            rounds += 1
            if rounds == asked or not left:
                if enough():
                    return
                asked *= 2

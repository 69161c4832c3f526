"""The pass over a corpus: rows through the bare model, statistics from inside its activations."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import closing, nullcontext
from typing import Any

import torch
from torch import nn

from lapefast.errors import InputError, RunStopped
from lapefast.models.bare import bare_model, evaluating, headless
from lapefast.models.parallel import parallel_group
from lapefast.profiles import Profile
from lapefast.profiling.batches import Batch, CorpusPass
from lapefast.profiling.counting import Counting
from lapefast.profiling.saving import Saving
from lapefast.profiling.signals import Signals
from lapefast.profiling.team import Team
from lapefast.recording import Recorder

__all__ = ["profile"]

_log = logging.getLogger(__name__)
_END = object()
# How a round ended, by rising weight; a stop with the number of its signal added.
_GOING, _DUE, _STOPPED, _BROKEN = 0, 1, 2, 1000


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
    resume: str | os.PathLike[str] | None = None,
    *,
    save_every: float = 300.0,
    process_group: torch.distributed.ProcessGroup | None = None,
    part: tuple[int, int] | None = None,
    token_cache: str | os.PathLike[str] | None = None,
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
            one that fits the memory. Where the memory does not suffice after all, a batch's rows go
            through the model in halves from then on, which is recorded too.
        max_tokens: at most so many tokens per label; None reads everything. The paper's limit is
            99,999,744.
        threshold: a neuron is active where its activation is strictly above it.
        statistics: of ``counts``, ``sums``, ``square_sums``, ``up_abs_sums`` and ``shard_counts``
            (see `lapefast.record`).
        exact: fuse only activations proven bit-equal to the model's own.
        backend: who computes the ops; None takes ``LAPEFAST_BACKEND`` or the best for the device.
        progress: show a bar with tokens/s and the time left.
        resume: a directory, made if its parent exists, in which the run saves its state. Where it
            holds one, the run goes on from there; with the same batches, threads and library
            versions its counts are bit-identical to those of a run that was never stopped. SIGINT
            and SIGTERM then save and raise `RunStopped`. An iterator must be given anew, from its
            beginning.
        save_every: seconds between two states; that of the start of a run and of its end are saved
            in any case.
        process_group: processes that share the work, each with a copy of the model; called by all
            of them, and each gets the whole profile. Every process runs whole batches, the same
            ones however many processes there are. None: this process works alone.
        part: ``(i, n)``, 1 <= i <= n: of the batches, those of one of ``n`` jobs that know nothing
            of each other; their profiles add up to the whole one, with counts bit-identical.
        token_cache: a directory that keeps token ids; see `lapefast.corpus.Corpus`. With several
            processes, the first one fills it before the pass.
        document, field, special_tokens: how text is read; see `lapefast.corpus.Corpus`.
        until: whether what was counted so far is enough, such as
            `lapefast.evaluate.UntilStable(0.98)`, which needs ``shard_counts``. The labels are then
            read in turn, a batch of each, and it is asked after 1, 2, 4, 8 and so on batches and at
            the texts' end, by the first process. A label whose text ends before the others' stays
            as it is. The profile's metadata take over its attribute ``metadata``, if it has one.

    Raises:
        InputError: for what is wrong with the model, the corpora or the arguments, before the pass
            starts where it can be known; during it for text that can't be read and for activations
            that are not finite. Where ``resume`` holds a run with other arguments.
        RunStopped: by a signal, once the state is saved.
        RunFailed: where another process has failed or ended.
    """
    if until is not None and part is not None:
        raise InputError(
            "a part of the text can't tell whether the whole is enough: leave out part or until"
        )
    if not save_every >= 0:
        raise InputError(f"save_every must be 0 seconds or more, got {save_every!r}")
    team = _team(model, process_group)
    with Saving(team, resume, save_every) as saving:
        if part is not None and batch_size is None and saving.batch_size is None:
            raise InputError(
                "part needs a batch_size, the same in all jobs, as parts are made of whole batches"
            )
        text = CorpusPass(
            model,
            corpora,
            tokenizer,
            seq_len,
            saving.batch_size if batch_size is None else batch_size,
            max_tokens,
            progress and team.first,
            part,
            document=document,
            field=field,
            special_tokens=special_tokens,
            token_cache=token_cache,
        )
        text.batch_size = -team.highest(-text.batch_size)  # one that fits everywhere
        bare = bare_model(model)
        with (
            Recorder(model, text.labels, statistics, threshold, exact, backend) as recorder,
            evaluating(model),
            headless(bare),
            torch.no_grad(),
        ):
            recorder.check_reads_ids()
            recorder.end_at_last_site()
            settings = {
                **text.settings(),
                "model": recorder.about["fingerprint"],
                "weights": recorder.about["weights"],
                "dtype": recorder.about["dtype"],
                "edited": recorder.about["edited"],
                "tensor_parallel": recorder.about.get("tensor_parallel"),
                "threshold": float(threshold),
                "statistics": list(recorder.statistics),
                "exact": exact,
                "backend": backend,
                "document": document,
                "field": field,
                "special_tokens": special_tokens,
                "until": _described(until),
            }
            saving.begin(settings, recorder, text)
            if token_cache is not None and team.batches > 1:
                team.from_first(text.fill_cache)
            rows_at_once = saving.saved.get("rows_at_once", text.batch_size)
            counting = Counting(bare, recorder, rows_at_once, again=not team.splits_model)
            if not saving.enough:
                _count_all(text, counting, recorder, saving, team, until)
            elif until is not None:
                saving.ask(until, recorder)
            if part is not None and not saving.tokens:
                raise InputError(
                    f"part {part[0]} of {part[1]} has no batch of {text.batch_size} rows: the text "
                    "has fewer; divide it into fewer parts"
                )
            team.share(recorder.tensors.values())
            counted = recorder.profile()
        halved = -team.highest(-counting.rows_at_once)
        counted.metadata.update(
            tokenizer=getattr(tokenizer, "name_or_path", None),
            **text.metadata(saving.rows),
            processes=team.batches,
            **({"rows_at_once": halved} if halved < text.batch_size else {}),
            **({"changes": saving.changes} if saving.changes else {}),
            **team.from_first(lambda: getattr(until, "metadata", {})),
        )
    return counted


def _team(model: nn.Module, group: torch.distributed.ProcessGroup | None) -> Team:
    """Those that share the text, or the model's layers."""
    layers = parallel_group(model)
    if layers is None:
        return Team(group)
    if group is not None:
        raise InputError(
            "the processes share the model's layers already, so they can't share the text too; "
            "leave out process_group"
        )
    return Team(layers, splits_model=True)


def _count_all(
    text: CorpusPass,
    counting: Counting,
    recorder: Recorder,
    saving: Saving,
    team: Team,
    until: Callable[[Profile], bool] | None,
) -> None:
    """Count batches, a round of one for each process at a time, each round wholly or not at all."""
    begin = time.perf_counter()
    batches = text.all_batches(saving.rows) if until is None else text.in_turn(saving.rows)
    if saving.keeps and not saving.saved:
        saving.save(recorder, text, counting.rows_at_once)  # better that it fails now than later
    with closing(batches), Signals() if saving.keeps else nullcontext() as signals:
        going = True
        while going and not saving.enough:
            ended = dict(text.ended)
            round: list[Batch] = []
            ask = False
            problem: BaseException | None = None
            try:
                # Who leaves a forward pass that is split leaves the others waiting in it.
                with signals.heard(not team.splits_model) if signals else nullcontext():
                    round, ask = _next_round(batches, team.batches)
                    for batch in round[team.turn : team.turn + 1]:
                        counting.count(batch)
            except (Exception, RunStopped) as error:
                problem = error
            if team.splits_model and problem and not isinstance(problem, RunStopped):
                # The others wait in the middle of a layer: there is nothing to agree on any more.
                raise saving.leaving(problem) from problem
            mine = _DUE if saving.due else _GOING
            if problem:
                stopped = isinstance(problem, RunStopped)
                mine = _STOPPED + problem.signal if stopped else _BROKEN
            verdict = team.highest(mine)
            if verdict >= _STOPPED:
                counting.take_back()
                text.ended = ended
                if saving.keeps:
                    saving.save(recorder, text, counting.rows_at_once)
                if verdict < _BROKEN:
                    problem = problem or RunStopped(verdict - _STOPPED)  # another process heard it
                raise saving.leaving(problem) from problem
            counting.keep()
            saving.counted(round)
            going = bool(round) or ask
            if verdict == _DUE or ask or not going:
                saving.save(recorder, text, counting.rows_at_once)
            if until is not None and (ask or not going):
                # A process that left alone would leave those with other parts of the model waiting.
                heard = signals.heard if signals and not team.splits_model else nullcontext
                if saving.ask(until, recorder, heard) and saving.keeps:
                    saving.save(recorder, text, counting.rows_at_once)
    spent = time.perf_counter() - begin
    _log.info("Waited for text in %.1f%% of %.1f s", 100 * text.waited / spent, spent)


def _described(until: Callable[[Profile], bool] | None) -> Any:
    """What tells one question from another, as JSON."""
    if until is None:
        return None
    return getattr(until, "settings", getattr(until, "__qualname__", type(until).__qualname__))


def _next_round(batches: Iterator[Batch | None], size: int) -> tuple[list[Batch], bool]:
    """As many batches as there are processes, or fewer before a pause; and whether there is one.

    Rounds end at pauses, so that what is asked then does not depend on the number of processes.
    """
    round: list[Batch] = []
    while len(round) < size:
        batch = next(batches, _END)
        if batch is _END or batch is None:
            return round, batch is None
        round.append(batch)
    return round, False

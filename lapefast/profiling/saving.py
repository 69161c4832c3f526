"""How far a run is, and what of it is saved."""

from __future__ import annotations

import logging
import os
import time
from collections.abc import Callable, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, nullcontext
from typing import Any

import torch
from torch import Tensor

from lapefast.errors import InputError, RunFailed, RunStopped
from lapefast.profiles import Profile
from lapefast.profiling.batches import Batch, CorpusPass
from lapefast.profiling.state import RunDirectory, check_same
from lapefast.profiling.team import Team
from lapefast.recording import Recorder

__all__ = ["Saving"]

_log = logging.getLogger(__name__)


class Saving:
    """A run's state: in memory alone, or also in a directory. A context manager.

    Args:
        team: who shares the run; every method is called by all of them.
        path: the directory, or None.
        every: seconds between two saves.

    Attributes:
        rows: label -> rows that are counted, of the labels that were begun.
        saved: what an earlier run said of itself; empty where there was none.
        tokens: how many are counted; in a part of the text, of that part.
        changes: what was another after an earlier stop, as JSON.
        enough: whether what was counted was found to be enough.

    Raises:
        InputError: the directory can't be used; see `RunDirectory`.
    """

    def __init__(self, team: Team, path: str | os.PathLike[str] | None, every: float) -> None:
        self._team, self._every = team, every
        self._path = None if path is None else os.fspath(path)
        self._stack = ExitStack()
        self._directory: RunDirectory | None = None
        self._tensors: dict[str, Tensor] = {}
        self._settings: dict[str, Any] = {}
        self._sources: dict[str, str] = {}
        self._saved_at = time.monotonic()
        self.saved: dict[str, Any] = {} if path is None else team.from_first(self._open)
        self.rows: dict[str, int] = dict(self.saved.get("rows", {}))
        self.tokens: int = self.saved.get("tokens", 0)
        self._saved_tokens = self.tokens
        self.changes: list[dict[str, Any]] = list(self.saved.get("changes", ()))
        self.enough: bool = self.saved.get("enough", False)

    def __enter__(self) -> Saving:
        return self

    def __exit__(self, *exception: object) -> None:
        self._stack.close()

    @property
    def keeps(self) -> bool:
        """Whether there is a directory."""
        return self._path is not None

    @property
    def batch_size(self) -> int | None:
        """Rows per batch of the saved run, which stay the same."""
        return self.saved["settings"]["batch_size"] if self.saved else None

    @property
    def due(self) -> bool:
        """Whether it is time to look at the statistics, and to save them."""
        return self._team.first and time.monotonic() - self._saved_at >= self._every

    def begin(self, settings: Mapping[str, Any], recorder: Recorder, text: CorpusPass) -> None:
        """Go on from the saved state, if there is one.

        Raises:
            InputError: it is of a run with other settings.
        """
        self._settings, self._sources = dict(settings), text.sources()
        if not self.saved:
            return
        check_same(self._path, self.saved["settings"], settings)
        for name, now in _environment(recorder, self._sources).items():
            then = self.saved["environment"].get(name)
            if then != now:
                _log.warning(
                    "%s: %s before the stop and %s now, so counts may differ a little from those "
                    "of a run that was never stopped. The profile says so.",
                    *(name, then, now),
                )
                self.changes.append({"rows": dict(self.rows), name: [then, now]})
        text.ended.update(self.saved["ended"])
        if self._team.splits_model:
            self._tensors = self._team.from_first(lambda: self._tensors)
        if self._team.first or self._team.splits_model:
            recorder.restore(self._tensors)
        self._tensors = {}

    def save(self, recorder: Recorder, text: CorpusPass, rows_at_once: int) -> None:
        """Bring the statistics together in the first process, check them and save them.

        Raises:
            InputError: an activation was not finite, or the state can't be written; what was saved
                before stands.
        """
        least = -self._team.highest(-rows_at_once)
        self._team.collect(recorder.tensors.values())
        self._team.where_held(recorder.check)
        if self._path is not None:
            about = {
                "settings": self._settings,
                "environment": _environment(recorder, self._sources),
                "changes": self.changes,
                "rows": self.rows,
                "tokens": self.tokens,
                "ended": text.ended,
                "rows_at_once": least,
                "enough": self.enough,
            }
            whole = recorder.whole()
            self._team.from_first(lambda: self._directory.save(about, whole))
        self._saved_at, self._saved_tokens = time.monotonic(), self.tokens

    def ask(
        self,
        until: Callable[[Profile], bool],
        recorder: Recorder,
        heard: Callable[[], AbstractContextManager[None]] = nullcontext,
    ) -> bool:
        """Whether what was saved last is enough, as the first process finds.

        Args:
            until: the question.
            recorder: of the run.
            heard: within it signals raise.

        Raises:
            RunStopped: by a signal; what was saved stands, and the same command asks again.
        """

        def look() -> bool:
            try:
                profile = recorder.profile()
                with heard():
                    return bool(until(profile))
            except RunStopped as stopped:
                raise self.leaving(stopped) from stopped

        self.enough = self._team.where_held(look)
        return self.enough

    def counted(self, batches: Sequence[Batch]) -> None:
        """Take note of a round of batches that all processes have counted."""
        for batch in batches:
            self.rows[batch.label] = batch.first_row + len(batch.ids)
            self.tokens += batch.ids.numel()

    def leaving(self, problem: BaseException | None) -> BaseException:
        """What to raise for a problem of this process's own, or of another's (None)."""
        if self._path is None:
            return problem or RunFailed("another process of this run has failed, and says why")
        stands = f"{self._saved_tokens:,} tokens are counted and saved in {self._path}"
        if isinstance(problem, RunStopped):
            name = "SIGINT" if problem.signal == 2 else "SIGTERM"
            return RunStopped(
                problem.signal, f"stopped by {name}; {stands}, and the same command goes on"
            )
        if problem is None:
            return RunFailed(f"another process of this run has failed, and says why; {stands}")
        if isinstance(problem, InputError):
            return InputError(
                f"{problem}; {stands}, and the same command goes on once it is mended"
            )
        _log.error("The run failed; %s, and the same command goes on.", stands)
        return problem

    def _open(self) -> dict[str, Any]:
        self._directory = self._stack.enter_context(RunDirectory(self._path))
        about, self._tensors = self._directory.load() or ({}, {})
        return about


def _environment(recorder: Recorder, sources: Mapping[str, str]) -> dict[str, Any]:
    """What may change how a model computes, or what it reads, besides its settings."""
    import transformers

    import lapefast

    return {
        "threads": torch.get_num_threads(),
        "lapefast": lapefast.__version__,
        "torch": torch.__version__,
        "transformers": transformers.__version__,
        "device": recorder.about["device"],
        "attention implementation": recorder.about["attention_implementation"],
        "experts_implementation": recorder.experts_implementation,
        **{f"files of {label!r}": digest for label, digest in sources.items()},
    }

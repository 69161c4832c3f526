"""The saved state of a run: a directory with what was counted so far, and of which rows."""

from __future__ import annotations

import fcntl
import logging
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from lapefast.errors import InputError
from lapefast.sealed import SealedFile

__all__ = ["RunDirectory", "SavedRun", "check_same"]

_FILE = SealedFile("run state", "1", "run", "`lapefast profile --resume`")
_SLOTS = ("state-0.safetensors", "state-1.safetensors")
_log = logging.getLogger(__name__)

SavedRun = tuple[dict[str, Any], dict[str, Tensor]]
"""What is said of a run, as JSON, and its statistics, int64 and float64, by name."""


class RunDirectory:
    """A directory that one run at a time saves its state in. A context manager.

    The state is written in turn into two files, so that whatever happens while one is written, the
    other stands. The newest that can be read counts.

    Raises:
        InputError: the directory can't be made, or another run uses it.
    """

    def __init__(self, path: str | os.PathLike[str]) -> None:
        self.path = Path(path)
        self._saves = 0
        try:
            self.path.mkdir(exist_ok=True)
            self._lock = open(self.path / "lock", "w")
        except OSError as error:
            raise InputError(
                f"the state of a run can't be saved in {path}: {error.strerror}; give a directory "
                "that can be written, or a new name in one"
            ) from error
        try:
            fcntl.flock(self._lock, fcntl.LOCK_EX | fcntl.LOCK_NB)
        except BlockingIOError as error:
            self._lock.close()
            raise InputError(
                f"another run that is still going saves its state in {path}; let it end, or give "
                "another directory"
            ) from error
        except OSError as error:
            self._lock.close()
            raise InputError(
                f"the file system of {path} cannot lock files ({error.strerror}), so that two runs "
                "could spoil each other's state; give a directory on another"
            ) from error
        for left in self.path.glob(".state-*.tmp"):  # of a run that was killed while it wrote
            left.unlink(missing_ok=True)

    def __enter__(self) -> RunDirectory:
        return self

    def __exit__(self, *exception: object) -> None:
        self._lock.close()

    def load(self) -> SavedRun | None:
        """The newest state, or None where nothing was saved yet.

        Raises:
            InputError: something was saved, but none of it can be read.
        """
        found: list[tuple[int, SavedRun]] = []
        problems: list[InputError] = []
        for slot in _SLOTS:
            path = self.path / slot
            if path.exists():
                try:
                    saves, run = _FILE.read(path, _parsed)
                    found.append((saves, run))
                except InputError as error:
                    problems.append(InputError(f"{path}: {error}"))
        if not found and problems:
            raise InputError(
                f"{problems[0]}; the state of this run is lost, so start anew in another directory"
            )
        for problem in problems:
            _log.warning("%s. The state saved before it is used instead.", problem)
        if not found:
            return None
        self._saves, newest = max(found, key=lambda one: one[0])
        return newest

    def save(self, about: Mapping[str, Any], tensors: Mapping[str, Tensor]) -> None:
        """Save a state; the one before stays until the next.

        Raises:
            InputError: it cannot be written; then the state saved before stands.
        """
        held = {name: tensor.to("cpu") for name, tensor in tensors.items()}
        slot = self.path / _SLOTS[(self._saves + 1) % len(_SLOTS)]
        content = {"saves": self._saves + 1, "run": dict(about), "tensors": list(held)}
        try:
            _FILE.write(slot, held, content)
        except InputError as error:
            if not self._saves:
                raise
            raise InputError(
                f"{error}; what was counted before stands in {self.path}: mend that and give the "
                "same call to go on from there"
            ) from error
        self._saves += 1


def check_same(directory: Path, saved: Mapping[str, Any], given: Mapping[str, Any]) -> None:
    """Refuse to go on with other settings than those of the run that was saved.

    Raises:
        InputError: naming every difference.
    """
    differences = []
    for name, now in given.items():
        then = saved.get(name)
        mappings = isinstance(now, Mapping) and isinstance(then, Mapping)
        if mappings and now.keys() <= set(given.get("labels", ())):
            # What one of them lacks is named as a difference of labels.
            differences += [
                f"{name} of {key!r}: {_short(then[key])} there, {_short(now[key])} here"
                for key in now
                if key in then and then[key] != now[key]
            ]
        elif then != now:
            differences.append(f"{name}: {_short(then)} there, {_short(now)} here")
    if differences:
        raise InputError(
            f"{directory} holds a run with other arguments ({'; '.join(differences)}); give the "
            "same again to go on, or another directory"
        )


def _short(value: Any) -> str:
    if isinstance(value, Mapping):
        return ", ".join(f"{key}={of}" for key, of in value.items())
    if isinstance(value, list):
        return ", ".join(map(str, value))
    return value[:12] if isinstance(value, str) else str(value)


def _parsed(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> tuple[int, SavedRun]:
    held = {name: tensors.pop(name) for name in about["tensors"]}
    return int(about["saves"]), (dict(about["run"]), held)

"""SIGINT and SIGTERM, for a run that saves its state before it leaves."""

from __future__ import annotations

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any

from lapefast.errors import RunStopped

__all__ = ["Signals"]


class Signals:
    """Within it, SIGINT and SIGTERM raise `RunStopped` where that does no harm: inside `heard`.

    Elsewhere they are remembered until `heard` is entered; a second one raises at once. Python
    gives signals to the main thread alone, so that in another one nothing changes.
    """

    def __init__(self) -> None:
        self._received: int | None = None
        self._listening = False
        self._before: dict[int, Any] = {}

    def __enter__(self) -> Signals:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self,
        kind: type[BaseException] | None,
        error: BaseException | None,
        traceback: TracebackType | None,
    ) -> None:
        for number, handler in self._before.items():
            signal.signal(number, handler)

    @contextmanager
    def heard(self) -> Iterator[None]:
        """Within it a signal raises `RunStopped` at once, and one that came before does too."""
        self._listening = True
        try:
            if self._received is not None:
                raise RunStopped(self._received)
            yield
        finally:
            self._listening = False

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again = self._received is not None
        self._received = number
        if again:
            raise RunStopped(number, "stopped at once; what was saved last stands")
        if self._listening:
            raise RunStopped(number)

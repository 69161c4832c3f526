"""An iterator that is read ahead by a thread of its own."""

from __future__ import annotations

import threading
import weakref
from collections import deque
from collections.abc import Generator
from typing import Generic, TypeVar

__all__ = ["Ahead"]

T = TypeVar("T")
_SECONDS_TO_END = 5.0


class Ahead(Generic[T]):
    """What a generator yields, made by a background thread at most `depth` items ahead.

    What the generator raises is raised here, as it is. The thread ends when the generator does, on
    `close`, at the interpreter's exit, or when this object is dropped; the generator is closed in
    the thread that ran it. A thread that waits in a source of its own cannot be interrupted:
    `close` gives it a few seconds and then leaves it behind.
    """

    def __init__(self, items: Generator[T, None, None], depth: int, name: str) -> None:
        self._channel: _Channel[T] = _Channel(depth)
        # The thread must not refer to this object, or dropping it would never end the thread.
        self._thread = threading.Thread(
            target=_produce, args=(items, self._channel), name=name, daemon=True
        )
        self._finalizer = weakref.finalize(self, _end, self._channel, self._thread)
        self._thread.start()

    def __iter__(self) -> Ahead[T]:
        return self

    def __next__(self) -> T:
        return self._channel.take()

    def close(self) -> None:
        """Ends the thread; what it had made is dropped. Safe to call twice."""
        self._finalizer()


class _Channel(Generic[T]):
    def __init__(self, depth: int) -> None:
        self._depth = depth
        self._items: deque[T] = deque()
        self._closed = False
        self._end: BaseException | None = None
        # Reentrant: the collector may run a finalizer, and so `close`, inside `put` or `take`.
        self._changed = threading.Condition(threading.RLock())

    def put(self, item: T) -> bool:
        """Waits for room. False once nobody will take the item."""
        with self._changed:
            self._changed.wait_for(lambda: self._closed or len(self._items) < self._depth)
            if not self._closed:
                self._items.append(item)
                self._changed.notify_all()
            return not self._closed

    def end(self, error: BaseException) -> None:
        """No more items: `take` raises the error once it has given all of them."""
        with self._changed:
            self._end = error
            self._changed.notify_all()

    def take(self) -> T:
        with self._changed:
            self._changed.wait_for(lambda: self._items or self._end is not None or self._closed)
            if self._items:
                item = self._items.popleft()
                self._changed.notify_all()
                return item
            error, self._end = self._end, StopIteration()
            raise error if error is not None else StopIteration

    def close(self) -> None:
        with self._changed:
            self._closed = True
            self._items.clear()
            self._changed.notify_all()


def _produce(items: Generator[T, None, None], channel: _Channel[T]) -> None:
    error: BaseException = StopIteration()
    try:
        while channel.put(next(items)):
            pass
    except BaseException as raised:  # it must be heard where the items are taken
        error = raised
    finally:
        try:
            items.close()
        finally:
            channel.end(error)


def _end(channel: _Channel[T], thread: threading.Thread) -> None:
    channel.close()
    if thread is not threading.current_thread():
        # At exit a thread that comes back from native code to a dead interpreter would abort.
        thread.join(_SECONDS_TO_END)

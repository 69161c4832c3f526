"""What a user can cause: bad input, and the end of a run before its time."""

from __future__ import annotations

__all__ = ["InputError", "RunFailed", "RunStopped"]


class InputError(ValueError):
    """Something given to lapefast cannot be used.

    The message is one sentence: the thing, what was expected, what came, what to do. The command
    line prints it alone and exits with status 2.
    """


class RunFailed(RuntimeError):
    """A run on several processes has ended because one of them did; the message says how to go on.

    The command line prints it alone and exits with status 1.
    """


class RunStopped(KeyboardInterrupt):
    """A run was told to stop, and its state is saved; the message says how to go on.

    A `KeyboardInterrupt`, as nothing went wrong. The command line prints the message and exits
    with status 128 + `signal`.

    Args:
        signal: the number of the signal.
        message: what to say.
    """

    def __init__(self, signal: int, message: str = "") -> None:
        super().__init__(message)
        self.signal = signal

    def __reduce__(self) -> tuple[type[RunStopped], tuple[int, str]]:
        return type(self), (self.signal, str(self))  # it is sent between processes

"""The error that a user can cause."""

from __future__ import annotations

__all__ = ["InputError"]


class InputError(ValueError):
    """Something given to lapefast cannot be used.

    The message is one sentence: the thing, what was expected, what came, what to do. The command
    line prints it alone and exits with status 2.
    """

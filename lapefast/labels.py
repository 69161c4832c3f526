"""What a label, or another name that files hold, may be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lapefast.errors import InputError

__all__ = ["check_names"]

_SURROGATE = re.compile("[\ud800-\udfff]")


def check_names(names: Iterable[Any]) -> None:
    """Raise InputError unless each is a string that a file of UTF-8 can hold."""
    for name in names:
        if not isinstance(name, str) or _SURROGATE.search(name):
            raise InputError(
                f"labels and names must be strings without lone surrogates, got {name!r}"
            )

"""What a label may be."""

from __future__ import annotations

import re
from collections.abc import Iterable
from typing import Any

from lapefast.errors import InputError

__all__ = ["check_names"]

_SURROGATE = re.compile("[\ud800-\udfff]")


def check_names(labels: Iterable[Any]) -> None:
    """Raise InputError unless each label is a string that a file of UTF-8 can hold."""
    for label in labels:
        if not isinstance(label, str) or _SURROGATE.search(label):
            raise InputError(f"labels must be strings without lone surrogates, got {label!r}")

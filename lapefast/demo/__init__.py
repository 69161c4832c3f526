"""A small multilingual model and its text, made on this machine without any download.

`load` trains the model once, in about a minute, and keeps it in the user's cache directory.
"""

from __future__ import annotations

from lapefast.demo.cache import TOP_RATE, Demo, cache_directory, load
from lapefast.demo.examples import examples
from lapefast.demo.prompts import prompts
from lapefast.demo.text import LANGUAGES, compose

__all__ = [
    "LANGUAGES",
    "TOP_RATE",
    "Demo",
    "cache_directory",
    "compose",
    "examples",
    "load",
    "prompts",
]

"""Parallel examples in the demo's seven languages."""

from __future__ import annotations

import re

from lapefast.demo.text import LANGUAGES, compose

__all__ = ["examples"]

# Neither the text that the demo model is trained on nor the text it is validated on.
_SEED = 4


def examples(count: int = 24) -> list[dict[str, tuple[str, str]]]:
    """`count` examples: language -> a text's beginning and how it goes on, of the same meaning.

    Texts are cut behind their first colon or semicolon, which stands in the same place in all.
    """
    texts = {language: compose(language, count, _SEED, parallel=True) for language in LANGUAGES}
    return [
        {language: _cut(texts[language][number]) for language in LANGUAGES}
        for number in range(count)
    ]


def _cut(text: str) -> tuple[str, str]:
    prompt, answer = re.split(r"(?<=[:;])(?= )", text, maxsplit=1)
    return prompt, answer

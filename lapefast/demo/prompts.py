"""Prompts in the demo's seven languages."""

from __future__ import annotations

from lapefast.demo.text import LANGUAGES, compose

__all__ = ["prompts"]

# Neither the text that the demo model is trained on nor the text it is validated on.
_SEED = 3
_SHORTEST = 12


def prompts(each: int = 8) -> dict[str, list[str]]:
    """Language -> `each` beginnings of texts as the demo's, of texts that its model has not seen.

    A beginning is the first half of a text, cut at a space where there is one.
    """
    return {language: _beginnings(language, each) for language in LANGUAGES}


def _beginnings(language: str, each: int) -> list[str]:
    # One document more for each that is too short to tell its language.
    texts = [text for text in compose(language, 4 * each, _SEED) if len(text) >= 2 * _SHORTEST]
    halves = [text[: len(text) // 2] for text in texts[:each]]
    return [half.rpartition(" ")[0].rstrip() or half for half in halves]

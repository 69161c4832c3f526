"""Which language a text is in, by py3langid, which carries its model."""

from __future__ import annotations

import functools
from collections.abc import Iterable, Mapping, Sequence
from copy import copy
from typing import Any

from lapefast.errors import InputError

__all__ = ["LanguageIdentifier", "languages_in_question"]


class LanguageIdentifier:
    """Tells the languages of texts.

    Texts of a few words are hard to tell apart among the more than a hundred languages that
    `py3langid` knows, since some are close relatives: it takes most short Chinese texts for Wu, and
    many English and Spanish ones for creoles and neighbours. Told which languages are in question,
    it is right about most of all of them (`tests/evaluate/test_language.py` measures both). So by
    default only the labels' languages are in question. The price: text in none of them counts for
    one of them. The unedited text and the random sets pay it too; compare shares with theirs.

    Args:
        labels: each a code as `py3langid` knows it (ISO 639-1 where there is one), perhaps followed
            by a script or region, as in ``zh-Hans`` or ``pt_BR``.
        codes: label -> code, for labels that are none.
        restrict: whether only the labels' languages are in question. Where all labels are of one,
            that would put every text in it, so all languages are.

    Attributes:
        codes: label -> code.
        restricted: whether only the labels' languages are in question.

    Raises:
        InputError: a label's code is not known to `py3langid`.
    """

    def __init__(
        self, labels: Sequence[str], codes: Mapping[str, str] | None = None, restrict: bool = True
    ) -> None:
        self._identifier = copy(_known_to_py3langid())
        known = set(self._identifier.labels)
        given = codes or {}
        self.codes = {label: given.get(label, _code(label)) for label in labels}
        for label, code in self.codes.items():
            if not isinstance(code, str) or code not in known:
                if label in given:
                    raise InputError(
                        f"the code {code!r} of label {label!r} is of no language that can be "
                        f"identified; the codes are {', '.join(sorted(known))}"
                    )
                raise InputError(
                    f"the label {label!r} is no language that can be identified (py3langid knows "
                    f"{len(known)}, by codes such as en, zh, id); say which it is by "
                    f"languages={{{label!r}: code}}, or --language on the command line"
                )
        self.restricted = restrict and len(set(self.codes.values())) > 1
        if self.restricted:
            self._identifier.set_languages(list(self.codes.values()))

    def __call__(self, text: str) -> str | None:
        """The language's code; None where the text has no letter to tell it by."""
        if not any(character.isalpha() for character in text):
            return None
        return self._identifier.classify(text)[0]


def languages_in_question(metadata: Mapping[str, Any], codes: Iterable[str]) -> str:
    """Among which languages texts were told apart, as a sentence; empty where nothing tells.

    Args:
        metadata: of a result; its ``restrict`` is `LanguageIdentifier.restricted`.
        codes: of the labels' languages.
    """
    if "restrict" not in metadata:
        return ""
    if metadata["restrict"]:
        among = f"{', '.join(dict.fromkeys(codes))} alone: text in none of them counts for one"
    else:
        among = "all that py3langid knows"
    return f"Languages are told apart among {among}."


@functools.cache
def _known_to_py3langid():
    """Its identifier of all languages, which takes the better part of a second to load."""
    from py3langid.langid import MODEL_FILE, LanguageIdentifier

    return LanguageIdentifier.from_model_file(MODEL_FILE)


def _code(label: str) -> str:
    return label.replace("_", "-").partition("-")[0].lower()

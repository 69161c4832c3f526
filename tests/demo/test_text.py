"""The demo's text."""

from __future__ import annotations

import pytest

from lapefast.demo import LANGUAGES, compose


def test_the_same_arguments_give_the_same_text():
    assert compose("ja", 50, 3) == compose("ja", 50, 3)


def test_another_seed_gives_other_text():
    assert not set(compose("vi", 50, 0)) & set(compose("vi", 50, 1))


@pytest.mark.parametrize("language", LANGUAGES)
def test_documents_are_lines_of_one_language(language):
    documents = compose(language, 200, 0)
    assert len(documents) == 200
    assert all(text.strip() and len(text.splitlines()) == 1 for text in documents)


def test_no_identifier_stands_where_a_locale_has_no_word():
    text = "".join(compose("zh", 500, 0) + compose("ja", 500, 0))
    assert not any(kind in text for kind in ("length-", "mass-", "duration-", "volume-"))

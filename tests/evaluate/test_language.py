"""Which language a text is in."""

from __future__ import annotations

import pytest

from lapefast import demo
from lapefast.errors import InputError
from lapefast.evaluate.language import LanguageIdentifier, languages_in_question


def test_languages_are_told_apart_among_the_labels_unless_all_are_asked_for():
    text = "秘鲁索尔: 土库曼语、斯瓦希里语和泰米尔语"
    assert LanguageIdentifier(["zh", "en"])(text) == "zh"
    assert LanguageIdentifier(["fr", "en"], restrict=False)(text) not in ("fr", "en")
    assert LanguageIdentifier(["fr", "en"])("1, 2: 3") is None
    assert LanguageIdentifier(["zh-Hans", "german"], {"german": "de"}).codes == {
        "zh-Hans": "zh",
        "german": "de",
    }


def test_the_demos_prompts_are_in_the_languages_of_its_model():
    prompts = demo.prompts(6)
    assert list(prompts) == list(demo.LANGUAGES)
    assert all(len(given) == 6 and all(given) for given in prompts.values())
    assert prompts == demo.prompts(6)
    identify = LanguageIdentifier(demo.LANGUAGES)
    right = sum(identify(one) == label for label in prompts for one in prompts[label])
    assert right >= 36  # of 42; some beginnings are a date or a name or two


def test_short_texts_are_told_apart_better_among_the_labels_alone():
    def right(identify, language: str) -> int:
        texts = demo.compose(language, 100, 5)
        return sum(identify(text[len(text) // 2 :]) == language for text in texts)

    among_all = LanguageIdentifier(demo.LANGUAGES, restrict=False)
    among_labels = LanguageIdentifier(demo.LANGUAGES)
    counts = {one: (right(among_all, one), right(among_labels, one)) for one in demo.LANGUAGES}
    assert all(restricted >= free for free, restricted in counts.values())
    assert all(restricted >= 70 for _, restricted in counts.values())
    assert all(counts[one][0] < 50 for one in ("en", "zh", "es"))


@pytest.mark.parametrize("label", ["klingon", "", "eng_Latn"])
def test_a_label_that_is_no_language_is_refused_by_name(label):
    with pytest.raises(InputError, match=f"the label '{label}' is no language"):
        LanguageIdentifier([label, "en"])


def test_a_code_that_is_no_language_is_refused_with_those_that_are():
    with pytest.raises(InputError, match=r"'klingon' of label 'en' .* the codes are .* zh, zu"):
        LanguageIdentifier(["en"], {"en": "klingon"})


def test_among_one_language_every_text_would_be_in_it_so_all_are_considered():
    identify = LanguageIdentifier(["en"])
    assert not identify.restricted
    assert identify("Das ist ein deutscher Satz, ganz sicher, und kein englischer.") == "de"


@pytest.mark.parametrize(
    ("metadata", "said"),
    [
        ({}, ""),
        ({"restrict": False}, "Languages are told apart among all that py3langid knows."),
        (
            {"restrict": True},
            "Languages are told apart among en, zh alone: text in none of them counts for one.",
        ),
    ],
)
def test_results_say_among_which_languages_texts_were_told_apart(metadata, said):
    assert languages_in_question(metadata, ["en", "zh", "en"]) == said

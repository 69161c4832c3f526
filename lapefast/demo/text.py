"""Text in seven languages, composed from the Unicode CLDR data that the `babel` package carries.

Every phrase is CLDR's own, written by its translators: dates, durations, names of territories,
languages and currencies, measures, amounts and large numbers, enumerated with each language's own
conjunctions. It takes no download, and the same versions write the same text everywhere.
"""

from __future__ import annotations

import functools
import random
from collections.abc import Callable
from datetime import date, timedelta

from babel import Locale
from babel.dates import format_date, format_timedelta
from babel.lists import format_list
from babel.numbers import (
    format_compact_decimal,
    format_currency,
    get_territory_currencies,
)
from babel.units import format_unit

LANGUAGES = ("en", "zh", "fr", "es", "vi", "id", "ja")

_PHRASES = 1000
_NAMES = 50


def compose(language: str, documents: int, seed: int, parallel: bool = False) -> list[str]:
    """Composes `documents` one-line texts in `language`, the same for the same arguments.

    `language` is one of `LANGUAGES`; any locale that CLDR covers works. Where `parallel` is set,
    texts of one number say the same in every language.
    """
    rng = random.Random(f"parallel {seed}" if parallel else f"{language} {seed}")
    locale = Locale.parse(language)
    tables = _tables(locale, rng, min(documents, _PHRASES))
    return [_document(locale, tables, rng) for _ in range(documents)]


def _tables(locale: Locale, rng: random.Random, phrases: int) -> dict[str, list[str]]:
    def many(make: Callable[[], str]) -> list[str]:
        return [make() for _ in range(phrases)]

    def day() -> str:
        when = date(1950, 1, 1) + timedelta(days=rng.randrange(36525))
        return format_date(when, rng.choice(("full", "long")), locale)

    def duration(**how: bool) -> str:
        seconds = int(10 ** rng.uniform(1, 9)) * rng.choice((1, -1))
        return format_timedelta(timedelta(seconds=seconds), threshold=1, locale=locale, **how)

    def amount() -> str:
        return format_currency(
            10 * rng.randrange(1, 100),
            rng.choice(currencies),
            "#,##0",
            locale,
            False,
            "name",
        )

    territories, languages, currencies, units = _codes()
    # Chinese and Japanese have one form only: their words for large numbers are short already.
    words = "long" if "long" in locale.compact_decimal_formats else "short"
    return {
        "territory": [locale.territories[code] for code in territories],
        "language": [locale.languages[code] for code in languages],
        "currency": [locale.currencies[code] for code in currencies],
        "date": many(day),
        "duration": many(duration),
        "relative": many(lambda: duration(add_direction=True)),
        "measure": many(
            lambda: format_unit(rng.randrange(1, 100), rng.choice(units), "long", locale=locale)
        ),
        "amount": many(amount),
        "number": many(
            lambda: format_compact_decimal(
                int(10 ** rng.uniform(3, 12)), format_type=words, locale=locale
            )
        ),
    }


@functools.cache
def _codes() -> tuple[list[str], list[str], list[str], list[str]]:
    # The same names in every language: what differs between texts is the language alone.
    locales = [Locale.parse(language) for language in LANGUAGES]

    def common(kind: str, wanted: Callable[[str], bool]) -> list[str]:
        codes = set.intersection(*(set(getattr(locale, kind)) for locale in locales))
        return sorted(filter(wanted, codes))

    rng = random.Random(0)
    territories = rng.sample(common("territories", lambda c: len(c) == 2 and c.isalpha()), _NAMES)
    languages = rng.sample(common("languages", lambda c: len(c) == 2), _NAMES)
    in_use = {code for territory in territories for code in get_territory_currencies(territory)}

    def is_named(unit: str) -> bool:
        # Where a locale has no pattern, the unit's identifier takes its place.
        return all(unit not in format_unit(2, unit, "long", locale=locale) for locale in locales)

    return (
        territories,
        languages,
        common("currencies", in_use.__contains__),
        common("unit_display_names", is_named),
    )


_TEMPLATES = (
    "{date}: {territories}",
    "{relative}: {territories}; {languages}",
    "{territory}: {languages}",
    "{territory} ({date}): {amounts}",
    "{date}: {measures}",
    "{language}: {territories}; {number}",
    "{languages}; {duration}",
    "{duration}: {measures}; {amounts}",
    "{currency}: {amounts}; {number}",
    "{territory}: {number}; {measures}; {relative}",
    "{date}; {durations}",
    "{currencies}: {territories}",
)
_PLURALS = {
    "territories": "territory",
    "languages": "language",
    "currencies": "currency",
    "amounts": "amount",
    "measures": "measure",
    "durations": "duration",
}


def _document(locale: Locale, tables: dict[str, list[str]], rng: random.Random) -> str:
    def enumeration(table: list[str]) -> str:
        return format_list(
            rng.sample(table, rng.randrange(2, 5)),
            rng.choice(("standard", "or")),
            locale,
        )

    fields = {name: rng.choice(table) for name, table in tables.items()}
    fields |= {plural: enumeration(tables[name]) for plural, name in _PLURALS.items()}
    return rng.choice(_TEMPLATES).format_map(fields)

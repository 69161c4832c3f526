"""A sweep's file, summed up."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping

from lapefast.errors import InputError
from lapefast.evaluate.language import LanguageIdentifier
from lapefast.evaluate.sweep import PairSummary, Sweep, SweepRow
from lapefast.files import existing_file

__all__ = ["read_sweep"]


def read_sweep(
    path: str | os.PathLike[str], languages: Mapping[str, str] | None = None
) -> list[PairSummary]:
    """What became of each pair in a file that `Sweep.save` wrote.

    Args:
        path: the file, which holds every generation but neither the overlaps, which are 0 here, nor
            the labels' languages.
        languages: label -> code of its language, where it is not the label itself.

    Raises:
        InputError: the file is missing or no sweep, or lacks generations of a pair, or a label's
            language is not known.
    """
    try:
        lines = existing_file(path, "sweep file").read_text("utf-8").splitlines()
        rows = [SweepRow(**json.loads(line)) for line in lines if line.strip()]
        if not all(map(_is_row, rows)):
            raise ValueError("a field is of another type")
        pairs = list(
            dict.fromkeys((one.source, one.target) for one in rows if one.kind == "edited")
        )
        labels = list(dict.fromkeys(label for pair in pairs for label in pair))
        sets = len({one.set for one in rows if one.kind == "random"})
    except (ValueError, TypeError, RecursionError) as error:
        raise InputError(
            f"{path} is not a sweep file, or is cut short or damaged; give one made by "
            "`lapefast sweep`"
        ) from error
    if not pairs:
        raise InputError(f"the sweep file {path} holds no edited text; make it again")
    codes = LanguageIdentifier(labels, languages).codes
    found = Sweep(pairs, rows, dict.fromkeys(pairs, 0), codes, {"random_sets": sets})
    try:
        return found.summary()
    except (ZeroDivisionError, TypeError) as error:
        raise InputError(
            f"the sweep file {path} lacks generations of a pair; it is cut short, make it again"
        ) from error


def _is_row(row: SweepRow) -> bool:
    texts = (row.source, row.kind, row.prompt, row.text)
    maybe_texts = (row.target, row.language)
    edited = row.kind == "unedited" or isinstance(row.target, str)
    return (
        edited
        and all(isinstance(text, str) for text in texts)
        and all(text is None or isinstance(text, str) for text in maybe_texts)
        and (row.set is None or type(row.set) is int)
        and isinstance(row.tokens, list)
        and type(row.nll) in (int, float)
    )

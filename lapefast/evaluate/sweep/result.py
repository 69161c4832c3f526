"""What a sweep found, generation by generation, and the file it is kept in."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from dataclasses import asdict, dataclass, field, fields
from typing import Any

from lapefast import display
from lapefast.errors import InputError
from lapefast.evaluate.language import LanguageIdentifier
from lapefast.evaluate.sweep.summary import PairSummary, summarised
from lapefast.files import existing_file, write_atomically

__all__ = ["Sweep", "SweepRow"]

_FORMAT = "lapefast sweep"
_VERSION = 1


@dataclass(frozen=True)
class SweepRow:
    """One generation.

    Attributes:
        source: label of the prompt's language.
        target: label that was steered to; None for the unedited model.
        kind: "unedited"; "edited": the source's neurons deactivated and the target's activated;
            "random": the same with random sets of equal size per layer; "diffmean": the residual
            stream shifted towards the target.
        set: index of the random set; None for the other kinds.
        prompt, text: given and generated.
        tokens: ids of the generated tokens, the one that ends a text included.
        language: code of the text's language; None where it has no letter to tell it by.
        nll: mean of -ln p per generated token under the unedited model, given the prompt, in nats.
    """

    source: str
    target: str | None
    kind: str
    set: int | None
    prompt: str
    text: str
    tokens: list[int]
    language: str | None
    nll: float


@dataclass
class Sweep:
    """What `sweep` found.

    Attributes:
        pairs: (source, target), in order.
        rows: every generation.
        overlaps: pair -> neurons of both, where the target's activation holds.
        codes: label -> code of its language.
        metadata: JSON-able settings.
    """

    pairs: list[tuple[str, str]]
    rows: list[SweepRow]
    overlaps: dict[tuple[str, str], int]
    codes: dict[str, str]
    metadata: dict[str, Any] = field(default_factory=dict)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON lines: the settings, and then a line per generation.

        Raises:
            InputError: the file cannot be written.
        """
        about = {
            "format": _FORMAT,
            "version": _VERSION,
            "pairs": self.pairs,
            "overlaps": [self.overlaps[pair] for pair in self.pairs],
            "codes": self.codes,
            "metadata": self.metadata,
        }
        lines = [json.dumps(one, ensure_ascii=False) for one in (about, *map(asdict, self.rows))]
        with write_atomically(path) as temporary:
            temporary.write_text("\n".join([*lines, ""]), "utf-8", newline="\n")

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], languages: Mapping[str, str] | None = None
    ) -> Sweep:
        """Read what `save` wrote.

        A file without a line of settings, as lapefast once wrote it, is read too: it tells neither
        the settings nor the overlaps, which are 0 then.

        Args:
            path: the file.
            languages: label -> code of its language, where the file does not say it and it is not
                the label itself.

        Raises:
            InputError: the file is missing, no sweep, of another version, cut short or damaged, or
                a label's language is not known.
        """
        try:
            lines = existing_file(path, "sweep file").read_text("utf-8").split("\n")
            first, *others = [json.loads(line) for line in lines if line.strip()]
            if "format" not in first:
                found = _without_settings(_rows([first, *others]), languages)
            elif (first["format"], first["version"]) == (_FORMAT, _VERSION):
                pairs = [(source, target) for source, target in first["pairs"]]
                if not pairs:
                    raise ValueError("it holds no pairs")
                overlaps = dict(zip(pairs, first["overlaps"], strict=True))
                rows = _rows(others)
                codes = first["codes"] | dict(languages or {})
                found = cls(pairs, rows, overlaps, codes, first["metadata"])
            else:
                raise InputError(
                    f"the sweep file {path} must be a {_FORMAT} of version {_VERSION}, got "
                    f"{first['format']!r} of version {first['version']!r}"
                )
        except InputError:
            raise
        except (ValueError, TypeError, KeyError, RecursionError) as error:
            raise InputError(
                f"{path} is not a sweep file, or is cut short or damaged; give one made by "
                "`lapefast sweep`"
            ) from error
        try:
            found.summary()
        except (ZeroDivisionError, TypeError, KeyError) as error:
            raise InputError(
                f"the sweep file {path} lacks generations of a pair; it is cut short, make it again"
            ) from error
        return found

    def summary(self) -> list[PairSummary]:
        """Share of texts in the target's language, and perplexities, of each pair."""
        return summarised(self)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row per generation; its columns are `SweepRow`'s."""
        import pandas

        names = [one.name for one in fields(SweepRow)]
        return pandas.DataFrame([asdict(row) for row in self.rows], columns=names)

    def _repr_html_(self) -> str:
        shares = {(pair.source, pair.target): pair.edited.share for pair in self.summary()}
        sources, targets = (list(dict.fromkeys(side)) for side in zip(*self.pairs, strict=True))
        rows = [[shares.get((source, target)) for target in targets] for source in sources]
        return display.table(
            "Share of answers in the language steered to (columns), by the prompt's (rows)",
            ["", *targets],
            [
                [source, *("" if share is None else f"{share:.0%}" for share in row)]
                for source, row in zip(sources, rows, strict=True)
            ],
            [[share or 0.0 for share in row] for row in rows],
        )


def _without_settings(rows: list[SweepRow], languages: Mapping[str, str] | None) -> Sweep:
    pairs = list(dict.fromkeys((one.source, one.target) for one in rows if one.kind == "edited"))
    if not pairs:
        raise ValueError("it holds no edited text")
    labels = list(dict.fromkeys(label for pair in pairs for label in pair))
    codes = LanguageIdentifier(labels, languages).codes
    sets = len({one.set for one in rows if one.kind == "random"})
    return Sweep(pairs, rows, dict.fromkeys(pairs, 0), codes, {"random_sets": sets})


def _rows(lines: list[dict[str, Any]]) -> list[SweepRow]:
    """The rows that the lines of a file say. Raises ValueError or TypeError for no rows."""
    rows = [SweepRow(**line) for line in lines]
    for row in rows:
        texts = (row.source, row.kind, row.prompt, row.text)
        perhaps = (row.target, row.language)
        if not (
            (row.kind == "unedited" or isinstance(row.target, str))
            and all(isinstance(text, str) for text in texts)
            and all(text is None or isinstance(text, str) for text in perhaps)
            and (row.set is None or type(row.set) is int)
            and isinstance(row.tokens, list)
            and type(row.nll) in (int, float)
        ):
            raise ValueError("a field is of another type")
    return rows

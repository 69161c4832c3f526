"""How options become an edit, for every command that steers or exports."""

from __future__ import annotations

from collections.abc import Collection, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lapefast.errors import InputError

if TYPE_CHECKING:
    from lapefast.neurons import Edit, NeuronSets

__all__ = [
    "Activate",
    "Add",
    "Deactivate",
    "Labels",
    "Neurons",
    "ProfileFile",
    "Scale",
    "Strength",
    "build_edit",
    "check_languages",
    "parse_languages",
    "parse_pairs",
    "read_neurons",
]

_PANEL = "Edit"

Neurons = Annotated[
    Path, typer.Option(metavar="FILE", help="The neurons, JSON or .pth.", show_default=False)
]
Labels = Annotated[
    str | None,
    typer.Option(help="Comma-separated labels: those of a .pth file, or a choice of others."),
]
ProfileFile = Annotated[
    Path | None,
    typer.Option(
        "--profile",
        metavar="FILE",
        help="The profile, with sums: its means are the values that --activate and --add take.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Deactivate = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LABEL",
        help="Set a label's neurons to 0. May be repeated, as the next three.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Scale = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LABEL=FACTOR",
        help="Multiply a label's neurons.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Add = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LABEL",
        help="Add to a label's neurons their means over its text, times --strength.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Activate = Annotated[
    list[str] | None,
    typer.Option(
        metavar="LABEL",
        help="Set a label's neurons to their means over its text. Of two edits of one neuron the "
        "one that stands later in this list holds.",
        show_default=False,
        rich_help_panel=_PANEL,
    ),
]
Strength = Annotated[float, typer.Option(help="Of --add.", rich_help_panel=_PANEL)]


def build_edit(
    neurons: Path,
    labels: str | None,
    profile: Path | None,
    deactivate: list[str] | None,
    scale: list[str] | None,
    add: list[str] | None,
    activate: list[str] | None,
    strength: float,
) -> Edit:
    """The edit of a command's options: ``deactivate | scale | add | activate``.

    The order is fixed, whatever that of the options, so that a neuron of both languages stays
    active when one is deactivated and the other activated.

    Raises:
        InputError: no edit is asked for, a label has no neurons, a factor is no number, a profile
            is missing, has no sums or is of another model; or a file cannot be read.
    """
    import lapefast as lf

    sets = read_neurons(neurons, labels)
    factors = parse_pairs(scale, "--scale", "LABEL=FACTOR, such as en=0.5")
    measured = None
    if add or activate:
        if profile is None:
            option = "--activate" if activate else "--add"
            raise InputError(f"{option} takes means from a profile; give it by --profile")
        measured = lf.Profile.load(profile)
        if None not in (measured.fingerprint, sets.fingerprint) and (
            measured.fingerprint != sets.fingerprint
        ):
            raise InputError(
                f"{profile} and {neurons} are of two models (their fingerprints differ); profile "
                "the model that the neurons were found in"
            )
    steps = [lf.deactivate(_of(sets, label, neurons)) for label in deactivate or ()]
    steps += [
        lf.scale(_of(sets, label, neurons), _number(factor, label)) for label, factor in factors
    ]
    steps += [
        lf.add(_of(sets, label, neurons), measured.means(label), strength) for label in add or ()
    ]
    steps += [
        lf.activate(_of(sets, label, neurons), measured.means(label)) for label in activate or ()
    ]
    if not steps:
        raise InputError(
            "there is no edit; give --deactivate, --scale, --add or --activate with a label"
        )
    edit, *rest = steps
    for step in rest:
        edit = edit | step
    return edit


def read_neurons(path: Path, labels: str | None) -> NeuronSets:
    """The neuron sets of ``--neurons`` and ``--labels``."""
    from lapefast.neurons import NeuronSets

    chosen = None if labels is None else [label.strip() for label in labels.split(",")]
    return NeuronSets.load(path, chosen)


def parse_pairs(given: list[str] | None, option: str, form: str) -> list[tuple[str, str]]:
    """The two sides of each ``LEFT=RIGHT``. Raises InputError for what has another form."""
    pairs = []
    for one in given or ():
        left, _, right = one.rpartition("=")
        if not left or not right:
            raise InputError(f"{option} must be {form}, got {one!r}")
        pairs.append((left, right))
    return pairs


def parse_languages(given: list[str] | None) -> dict[str, str]:
    """Label -> code, as ``--language`` says. Raises InputError for two of a label, or none."""
    codes: dict[str, str] = {}
    for label, code in parse_pairs(given, "--language", "LABEL=CODE, such as chinese=zh"):
        if codes.setdefault(label, code) != code:
            raise InputError(
                f"--language says that {label!r} is {codes[label]} and that it is {code}; give one"
            )
    if codes:
        from lapefast.evaluate.language import LanguageIdentifier

        LanguageIdentifier(list(codes), codes)  # refuses what is no language's code
    return codes


def check_languages(codes: Mapping[str, str], labels: Collection[str]) -> None:
    """Raise InputError where ``--language`` is of a label that is not there."""
    for label in codes:
        if label not in labels:
            raise InputError(
                f"--language says what {label!r} is, but the labels are {', '.join(labels)}"
            )


def _of(sets: NeuronSets, label: str, path: Path):
    if label not in sets:
        raise InputError(
            f"{path} has no neurons of label {label!r}; its labels are {', '.join(sets.labels)}"
        )
    if not sets[label].total:
        raise InputError(f"the label {label!r} has no neurons in {path}; nothing would be edited")
    return sets[label]


def _number(text: str, label: str) -> float:
    try:
        return float(text)
    except ValueError as error:
        raise InputError(
            f"--scale must be LABEL=FACTOR with a number, got {label}={text}"
        ) from error

"""`lapefast report`: what was found, as one page."""

from __future__ import annotations

from collections.abc import Sequence
from pathlib import Path
from typing import TYPE_CHECKING, Annotated

import typer

from lapefast.cli import edits, options
from lapefast.cli.kinds import kind_of
from lapefast.cli.options import check_output
from lapefast.errors import InputError

if TYPE_CHECKING:
    from lapefast.neurons import NeuronSets

__all__ = ["report"]

# Names of inputs that are not their options'.
_OPTIONS = {
    "experts in full": "experts",
    "sharing in full": "sharing",
    "deactivation": "categories",
}
_TAKEN_BY = {
    "lapefast profile": "--profile",
    "lapefast neurons": "--neurons",
    "published": "--neurons",
    "lapefast perplexity matrix": "--matrix",
    "lapefast sweep": "--sweep",
    "lapefast sampled languages": "--sampled",
    "lapefast experts file": "--experts",
    "lapefast sharing": "--sharing",
    "lapefast category deactivation": "--categories",
}
"""Kind of file -> the option that takes it; a matrix of experts pruned is --pruning's."""


def _file(help: str):
    return typer.Option(metavar="FILE", help=help, show_default=False)


def report(
    output: options.Output,
    profile: Annotated[Path | None, _file("A profile.")] = None,
    neurons: Annotated[
        list[Path] | None, _file("A neuron file. May be repeated; several are compared.")
    ] = None,
    matrix: Annotated[Path | None, _file("A matrix of `lapefast evaluate`.")] = None,
    sweep: Annotated[Path | None, _file("What `lapefast sweep` wrote.")] = None,
    sampled: Annotated[Path | None, _file("What `lapefast sample` wrote.")] = None,
    experts: Annotated[Path | None, _file("Experts and their frequencies.")] = None,
    pruning: Annotated[Path | None, _file("A matrix of `lapefast prune`.")] = None,
    sharing: Annotated[Path | None, _file("Categories of shared neurons.")] = None,
    categories: Annotated[Path | None, _file("What `lapefast categories` wrote.")] = None,
    language: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL=CODE",
            help="The language of a sweep's label, where its file does not say it and it is not "
            "the label. May be repeated.",
            show_default=False,
        ),
    ] = None,
    title: Annotated[
        str | None, typer.Option(help="Of the page; by default the model's.", show_default=False)
    ] = None,
    date: Annotated[
        str | None,
        typer.Option(help="Said on the page; by default none is.", show_default=False),
    ] = None,
    figures: Annotated[
        Path | None,
        typer.Option(
            metavar="DIR",
            help="Where to write each figure as PNG, SVG and CSV too.",
            show_default=False,
        ),
    ] = None,
) -> None:
    """Show what was found on one HTML page, which needs no other file and no network.

    Example: `lapefast report --profile my-model.profile.safetensors
    --neurons my-model.neurons.json --matrix matrix.json -o report.html`
    """
    check_output(output)
    if figures is not None:
        try:
            figures.mkdir(parents=True, exist_ok=True)
        except OSError as error:
            raise InputError(
                f"cannot write to {figures}: {error.strerror}; give a directory"
            ) from error
        check_output(figures / "figure.png")
    given = {"profile": profile, "matrix": matrix, "sweep": sweep, "sampled": sampled}
    given |= {"experts in full": experts, "pruning": pruning}
    given |= {"sharing in full": sharing, "deactivation": categories}
    codes = edits.parse_languages(language)
    if codes and sweep is None:
        raise InputError(
            "--language says which languages a sweep's labels are; give one by --sweep"
        )
    from lapefast import NeuronSets, Profile
    from lapefast.detect import Experts, Sharing
    from lapefast.evaluate import (
        CategoryDeactivation,
        PerplexityMatrix,
        SampledLanguages,
        Sweep,
    )
    from lapefast.report import Inputs, write_report

    paths = list(neurons or ())
    for name, path in (*given.items(), *(("neurons", path) for path in paths)):
        if path is not None and path.is_file():
            _check_kind(f"--{_OPTIONS.get(name, name)}", path)
    sets = [NeuronSets.load(path) for path in paths]
    names = _names(paths, sets, [name for name, path in given.items() if path is not None])
    files = {name: path.name for name, path in given.items() if path is not None}
    files |= {name: path.name for name, path in zip(names, paths, strict=True)}
    inputs = Inputs(
        profile=profile and Profile.load(profile),
        neurons=dict(zip(names, sets, strict=True)),
        matrix=matrix and PerplexityMatrix.load(matrix),
        sweep=sweep and Sweep.load(sweep, codes),
        sampled=sampled and SampledLanguages.load(sampled),
        experts=experts and Experts.load(experts),
        pruning=pruning and PerplexityMatrix.load(pruning),
        sharing=sharing and Sharing.load(sharing),
        deactivation=categories and CategoryDeactivation.load(categories),
        files=files,
    )
    if inputs.sweep is not None:
        edits.check_languages(codes, dict.fromkeys(sum(inputs.sweep.pairs, ())))
    written = write_report(output, inputs, title=title, date=date, figures=figures)
    from lapefast.cli.tables import console

    console.print(f"wrote {output}", highlight=False)
    if figures is not None:
        console.print(f"wrote {len(written) - 1} files to {figures}", highlight=False)


def _check_kind(option: str, path: Path) -> None:
    """Raise InputError for a file that another option takes."""
    from lapefast.evaluate import PerplexityMatrix

    right = _TAKEN_BY.get(kind_of(path), option)
    if right == "--matrix" and PerplexityMatrix.load(path).of_experts:
        right = "--pruning"
    if right != option:
        raise InputError(
            f"{path} is not what {option} takes but what {right} does; give it by {right}"
        )


def _names(paths: Sequence[Path], sets: Sequence[NeuronSets], taken: Sequence[str]) -> list[str]:
    """What to call each neuron file: by its method, where that tells them apart, or its name."""
    methods = [
        str(one.metadata.get("method") or path.name) for path, one in zip(paths, sets, strict=True)
    ]
    chosen = methods if len(set(methods)) == len(methods) else [path.name for path in paths]
    names: list[str] = []
    for name in chosen:
        number, distinct = 1, name
        while distinct in names or distinct in taken:
            number += 1
            distinct = f"{name} ({number})"
        names.append(distinct)
    return names

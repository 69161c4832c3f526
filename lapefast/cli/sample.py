"""`lapefast sample`: which languages a model writes in from nothing, with and without edits."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from lapefast.cli import edits, options
from lapefast.cli.kinds import kind_of
from lapefast.cli.options import check_output
from lapefast.errors import InputError

__all__ = ["sample"]


def sample(
    model: options.Model,
    neurons: Annotated[
        Path,
        typer.Option(
            metavar="FILE",
            help="What `lapefast identify --method average-precision --details` wrote, with the "
            "values that neurons are set to; or a neuron file, with --profile.",
            show_default=False,
        ),
    ],
    output: options.Output,
    profile: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="A profile, with sums: neurons are set to their means over the label's text.",
            show_default=False,
        ),
    ] = None,
    labels: edits.Labels = None,
    samples: Annotated[int, typer.Option(min=1, help="Texts per label.")] = 100,
    temperature: Annotated[
        float, typer.Option(help="Of the sampling, over the whole vocabulary.")
    ] = 0.8,
    random_sets: Annotated[
        int, typer.Option(min=0, help="Random sets of equal size per site to compare with.")
    ] = 5,
    max_new_tokens: options.NewTokens = 64,
    language: options.Languages = None,
    any_language: options.AnyLanguage = False,
    loading: options.ModelOptions = options.LOADING,
    batch_size: options.GenerationBatch = 128,
) -> None:
    """Let the model write from an empty prompt, and tell the languages of the texts.

    Before and after each label's neurons are set to their values over its text.

    Example: `lapefast sample ./my-model --neurons average-precision.safetensors -o sampled.json`
    """
    check_output(output)
    from lapefast import Profile
    from lapefast.detect import AveragePrecisionNeurons
    from lapefast.steering.continuations import check_temperature

    check_temperature(temperature, "--temperature")
    codes = edits.parse_languages(language)
    chosen = None if labels is None else [label.strip() for label in labels.split(",")]
    if profile is None:
        if kind_of(neurons) in ("lapefast neurons", "published"):
            raise InputError(
                f"{neurons} does not say to which values its neurons are set; give a profile by "
                "--profile, or what average-precision's --details wrote"
            )
        sets, values = AveragePrecisionNeurons.load(neurons, chosen), None
    else:
        sets, measured = edits.read_neurons(neurons, labels), Profile.load(profile)
        values = {label: measured.means(label) for label in sets}
    edits.check_languages(codes, sets.labels)
    loaded = loading.load(model, None, tokenizer=True)
    from lapefast.cli.tables import console, show
    from lapefast.evaluate import sampled_languages

    found = sampled_languages(
        loaded.model,
        loaded.tokenizer,
        sets,
        values,
        samples,
        max_new_tokens,
        temperature,
        random_sets,
        loading.seed,
        batch_size,
        codes,
        not any_language,
    )
    found.save(output)
    show(found)
    console.print(f"wrote {output}", highlight=False)

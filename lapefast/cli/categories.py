"""`lapefast categories`: what the neurons that labels share do for answers."""

from __future__ import annotations

from typing import Annotated

import typer

from lapefast.cli import methods, options
from lapefast.cli.options import check_output

__all__ = ["categories"]


def categories(
    model: options.Model,
    output: options.Output,
    sharing: methods.SharingOptions = methods.SharingOptions(),  # noqa: B008 - frozen
    random_sets: Annotated[
        int, typer.Option(min=1, help="Random sets of equal size per layer to compare with.")
    ] = 5,
    loading: options.ModelOptions = options.LOADING,
    batch_size: options.BatchSize = None,
) -> None:
    """Deactivate the neurons that parallel examples share, or don't, and look at the answers.

    Of each example, the all-shared, partial-shared, specific and non-activated neurons in turn.

    Example: `lapefast categories ./my-model --examples parallel.jsonl -o categories.json`
    """
    check_output(output)
    methods.check_sharing(sharing)
    loaded = loading.load(model, None, tokenizer=True)
    from lapefast.cli.tables import console, show
    from lapefast.evaluate import category_deactivation

    found = category_deactivation(
        loaded.model,
        loaded.tokenizer,
        sharing.examples,
        sharing.threshold,
        values=sharing.values,
        random_sets=random_sets,
        seed=loading.seed,
        batch_size=batch_size,
    )
    found.save(output)
    show(found)
    console.print(f"wrote {output}", highlight=False)

"""`lapefast sweep`: steering from every language to every other."""

from __future__ import annotations

from dataclasses import asdict
from pathlib import Path
from typing import Annotated

import typer

from lapefast.cli import edits, options
from lapefast.cli.options import check_output
from lapefast.errors import InputError

__all__ = ["sweep"]

_STRENGTH, _MAX_TOKENS = 1.0, 2**20


def sweep(
    model: options.Model,
    neurons: edits.Neurons,
    profile: Annotated[
        Path,
        typer.Option(
            metavar="FILE", help="The profile, with sums, for the means.", show_default=False
        ),
    ],
    output: options.Output,
    labels: edits.Labels = None,
    prompts: Annotated[
        Path | None,
        typer.Option(
            metavar="FILE",
            help="JSON lines with the fields label and prompt; by default beginnings of lists of "
            "names, dates and amounts in en, zh, fr, es, vi, id and ja.",
            show_default=False,
        ),
    ] = None,
    pair: Annotated[
        list[str] | None,
        typer.Option(
            metavar="SOURCE=TARGET",
            help="A pair. May be repeated; by default all of the neurons' labels.",
            show_default=False,
        ),
    ] = None,
    random_sets: Annotated[
        int, typer.Option(min=0, help="Random sets of equal size per layer to compare with.")
    ] = 5,
    where: options.WhereEdited = "all",
    max_new_tokens: options.NewTokens = 32,
    language: options.Languages = None,
    any_language: options.AnyLanguage = False,
    corpus: Annotated[
        list[str] | None,
        typer.Option(
            metavar="LABEL=SOURCE",
            help="Text of a label, to compare with DiffMean. Once per label.",
            show_default=False,
            rich_help_panel="DiffMean",
        ),
    ] = None,
    strength: Annotated[
        float, typer.Option(help="Of the shift.", rich_help_panel="DiffMean")
    ] = _STRENGTH,
    shift_layer: Annotated[
        list[int] | None,
        typer.Option(
            metavar="INDEX",
            help="A layer to shift. May be repeated; by default the middle one.",
            show_default=False,
            rich_help_panel="DiffMean",
        ),
    ] = None,
    text: options.TextOptions = options.TEXT,
    loading: options.ModelOptions = options.LOADING,
    batch_size: options.GenerationBatch = 128,
    seq_len: options.SeqLen = None,
    max_tokens: options.MaxTokens = _MAX_TOKENS,
) -> None:
    """Steer prompts of each language to each other one, and tell the languages of the answers.

    Example: `lapefast sweep ./my-model --neurons my-model.neurons.json
    --profile my-model.profile.safetensors -o sweep.jsonl`
    """
    check_output(output)
    from lapefast import Profile
    from lapefast.corpus import parse_corpus_arguments
    from lapefast.evaluate.prompts import read_prompts

    corpora = parse_corpus_arguments(corpus) if corpus else None
    if corpora is None:
        _refuse_unread(text, strength, shift_layer, seq_len, max_tokens)
    codes = edits.parse_languages(language)
    sets = edits.read_neurons(neurons, labels)
    pairs = edits.parse_pairs(pair, "--pair", "SOURCE=TARGET, such as en=zh") or None
    measured = Profile.load(profile)
    sources = [source for source, _ in pairs] if pairs else sets.labels
    edits.check_languages(codes, dict.fromkeys(sum(pairs, ())) if pairs else sets.labels)
    if prompts is None:
        from lapefast import demo

        texts = demo.prompts()
        for source in sources:
            if source not in texts:
                raise InputError(
                    f"there are prompts of {', '.join(texts)} but none of label {source!r}; give "
                    "some by --prompts"
                )
    else:
        read_prompts(prompts)  # refused before the model is loaded
        texts = prompts
    loaded = loading.load(model, corpora, text, tokenizer=True)
    import lapefast as lf
    from lapefast.cli.tables import console, show
    from lapefast.report.commands import BUILT_IN

    means = None
    if corpora is not None:
        means = lf.residual_means(
            loaded.model,
            corpora,
            loaded.tokenizer,
            seq_len=seq_len,
            max_tokens=max_tokens,
            **asdict(text),
        )
    found = lf.evaluate.sweep(
        loaded.model,
        sets,
        measured,
        texts,
        loaded.tokenizer,
        means=means,
        pairs=pairs,
        max_new_tokens=max_new_tokens,
        batch_size=batch_size,
        where=where,
        random_sets=random_sets,
        strength=strength,
        shift_layers=shift_layer or None,
        languages=codes,
        restrict=not any_language,
        seed=loading.seed,
    )
    if prompts is None:
        found.metadata["prompts_source"] = BUILT_IN
    found.save(output)
    show(found)
    console.print(f"wrote {output}", highlight=False)


def _refuse_unread(
    text: options.TextOptions,
    strength: float,
    shift_layer: list[int] | None,
    seq_len: int | None,
    max_tokens: int | None,
) -> None:
    """No option of DiffMean may have been asked for."""
    given = {
        "--strength": strength != _STRENGTH,
        "--shift-layer": shift_layer,
        "--document": text.document != options.TEXT.document,
        "--field": text.field != options.TEXT.field,
        "--no-special-tokens": not text.special_tokens,
        "--seq-len": seq_len is not None,
        "--max-tokens": max_tokens != _MAX_TOKENS,
    }
    for option, asked in given.items():
        if asked:
            raise InputError(f"{option} is for DiffMean, which reads texts; give --corpus too")

"""`lapefast generate`: continuations of prompts with edited neurons."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Annotated, Any

import typer

from lapefast.cli import edits, options
from lapefast.cli.options import check_output
from lapefast.errors import InputError

__all__ = ["generate"]


def generate(
    model: options.Model,
    neurons: edits.Neurons,
    prompt: Annotated[
        list[str] | None,
        typer.Option(metavar="TEXT", help="A prompt. May be repeated.", show_default=False),
    ] = None,
    prompts: Annotated[
        Path | None,
        typer.Option(metavar="FILE", help="JSON lines with the field prompt.", show_default=False),
    ] = None,
    output: Annotated[
        Path | None,
        typer.Option(
            "--output", "-o", metavar="FILE", help="JSON lines to write.", show_default=False
        ),
    ] = None,
    labels: edits.Labels = None,
    deactivate: edits.Deactivate = None,
    scale: edits.Scale = None,
    add: edits.Add = None,
    activate: edits.Activate = None,
    profile: edits.ProfileFile = None,
    strength: edits.Strength = 1.0,
    where: options.WhereEdited = "all",
    max_new_tokens: options.NewTokens = 64,
    compare: Annotated[
        bool, typer.Option("--compare", help="Print what the unedited model says, too.")
    ] = False,
    chat: Annotated[
        bool,
        typer.Option("--chat", help="Prompts are a user's messages in the model's chat format."),
    ] = False,
    sample: Annotated[
        bool, typer.Option("--sample", help="Draw tokens, instead of the likeliest.")
    ] = False,
    temperature: Annotated[float, typer.Option(help="Of --sample.")] = 1.0,
    loading: options.ModelOptions = options.LOADING,
    batch_size: options.GenerationBatch = 128,
) -> None:
    """Continue prompts with edited neurons.

    Example: `lapefast generate ./my-model --neurons my-model.neurons.json --deactivate en
    --activate zh --profile my-model.profile.safetensors --prompt "The weather today" --compare`
    """
    if output is not None:
        check_output(output)
    from lapefast.steering.continuations import check_temperature, continuations

    if sample:
        check_temperature(temperature, "--temperature")
    elif temperature != 1:
        raise InputError("--temperature is for tokens that are drawn; give --sample too")
    texts = _prompts(prompt, prompts)
    edit = edits.build_edit(neurons, labels, profile, deactivate, scale, add, activate, strength)
    loaded = loading.load(model, None)
    import torch

    from lapefast.cli.tables import console
    from lapefast.files import write_atomically

    tokenizer = loaded.tokenizer
    ids = [_encoded(tokenizer, text, chat) for text in texts]

    def answers(edit: Any) -> list[list[int]]:
        torch.manual_seed(loading.seed)  # edited and unedited tokens are drawn alike
        return continuations(
            loaded.model,
            [(one, edit) for one in ids],
            max_new_tokens=max_new_tokens,
            batch_size=batch_size,
            where=where,
            **({"do_sample": True, "temperature": temperature} if sample else {}),
        )

    rows = []
    for text, tokens in zip(texts, answers(edit), strict=True):
        said = tokenizer.decode(tokens, skip_special_tokens=True)
        rows.append({"prompt": text, "text": said, "tokens": tokens})
    if compare:
        for row, tokens in zip(rows, answers(None), strict=True):
            row["unedited"] = tokenizer.decode(tokens, skip_special_tokens=True)
    for row in rows:
        console.print(f"prompt: {row['prompt']}", soft_wrap=True)
        if compare:
            console.print(f"unedited: {row['unedited']}", soft_wrap=True)
        console.print(f"edited: {row['text']}", soft_wrap=True)
        console.print()
    if output is not None:
        lines = [json.dumps(row, ensure_ascii=False) + "\n" for row in rows]
        with write_atomically(output) as temporary:
            temporary.write_text("".join(lines), "utf-8", newline="\n")
        console.print(f"wrote {output}")


def _prompts(given: list[str] | None, file: Path | None) -> list[str]:
    from lapefast.evaluate.prompts import read_records

    texts = list(given or ())
    if file is not None:
        texts += [text for (text,) in read_records(file, ("prompt",))]
    if not texts or not all(texts):
        raise InputError("there is no prompt; give some text by --prompt, or a file by --prompts")
    return texts


def _encoded(tokenizer: Any, text: str, chat: bool) -> list[int]:
    if not chat:
        return tokenizer(text).input_ids
    if not getattr(tokenizer, "chat_template", None):
        raise InputError("the model's tokenizer has no chat template; leave out --chat")
    message = [{"role": "user", "content": text}]
    said = tokenizer.apply_chat_template(message, add_generation_prompt=True, tokenize=False)
    # The template writes the special tokens itself.
    return tokenizer(said, add_special_tokens=False).input_ids

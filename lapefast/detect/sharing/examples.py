"""Parallel examples: one example in several labels, as token ids of prompts and answers."""

from __future__ import annotations

import json
import logging
import os
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from torch import nn

from lapefast.errors import InputError
from lapefast.files import existing_file
from lapefast.labels import check_names
from lapefast.models.inputs import context_limit, vocabulary_size

__all__ = [
    "Examples",
    "ParallelExamples",
    "Prompt",
    "parallel_texts",
    "read_examples",
    "source_name",
]

_log = logging.getLogger(__name__)

_Text = tuple[str, str | None]
"""A prompt, and its answer, if it has one."""
Examples = Iterable[Mapping[str, Any]] | str | os.PathLike[str]
"""Label -> prompt for each example; or a file of such in JSON lines. See `read_examples`."""


@dataclass(frozen=True)
class Prompt:
    """An example in one label.

    Attributes:
        ids: of the prompt.
        answer: ids of the answer; empty where there is none.
    """

    ids: list[int]
    answer: list[int]


@dataclass(frozen=True)
class ParallelExamples:
    """Examples that each have every label.

    Attributes:
        labels: in the order in which they first come.
        examples: label -> prompt, in the order of the labels.
        dropped: how many were left out, for want of a label.
    """

    labels: list[str]
    examples: list[dict[str, Prompt]]
    dropped: int

    @property
    def longest(self) -> int:
        """Tokens of the longest prompt with its answer."""
        return max(
            len(prompt.ids) + len(prompt.answer)
            for example in self.examples
            for prompt in example.values()
        )

    @property
    def notes(self) -> list[str]:
        """What a result says of the examples that were left out."""
        if not self.dropped:
            return []
        given = len(self.examples) + self.dropped
        return [f"{self.dropped} of {given} examples lack a label and were dropped"]


def read_examples(examples: Examples, tokenizer: Any, model: nn.Module) -> ParallelExamples:
    """Tokenise parallel examples; one that lacks a label that others have is dropped and counted.

    A prompt is tokenised as the tokenizer does by default. An answer continues its prompt with
    nothing between them, so the space that belongs there is the answer's. Its tokens are those
    that the prompt and the answer as one text have after the prompt's own. Where the two run into
    each other, so that the whole does not begin with the prompt's tokens, or where the tokenizer
    ends a text with a special token, they are the answer's own, without special tokens.

    Args:
        examples: label -> a prompt, a pair (prompt, answer), or a dict with ``prompt`` and, if
            there is one, ``answer``; or the path of a file with such a JSON object in each line.
        tokenizer: the model's.
        model: which tells how many tokens a text may have.

    Raises:
        InputError: the examples are something else, have fewer than two labels, or none has every
            label; a text is empty or too long; or the tokenizer does not fit the model.
    """
    if not callable(tokenizer):
        raise InputError(
            f"examples are texts and need the model's tokenizer, got {type(tokenizer).__name__}"
        )
    labels, texts = parallel_texts(examples)
    whole = [number for number, example in enumerate(texts) if len(example) == len(labels)]
    limits = context_limit(model), vocabulary_size(model)
    tokenised = [
        {
            label: _tokenised(
                tokenizer, *texts[number][label], limits, f"example {number}, label {label!r}"
            )
            for label in labels
        }
        for number in whole
    ]
    parallel = ParallelExamples(labels, tokenised, len(texts) - len(whole))
    for note in parallel.notes:
        _log.warning("%s", note)
    return parallel


def parallel_texts(examples: Examples) -> tuple[list[str], list[dict[str, _Text]]]:
    """The labels, and each example as label -> prompt and answer, all labels or not.

    Raises:
        InputError: the examples are something else, have fewer than two labels, or none has every
            label; or a text is empty.
    """
    if isinstance(examples, str | os.PathLike):
        given = _read_lines(examples)
    elif isinstance(examples, Iterable) and not isinstance(examples, Mapping):
        given = list(examples)
    else:
        raise InputError(
            "examples must be a list of dicts from label to prompt, or the path of a file of JSON "
            f"lines, got {type(examples).__name__}"
        )
    texts = [_texts(example, f"example {number}") for number, example in enumerate(given)]
    labels = list(dict.fromkeys(label for example in texts for label in example))
    check_names(labels)
    if len(labels) < 2:
        raise InputError(
            "sharing compares labels, so examples need at least two, got "
            f"{', '.join(labels) or 'none'}; give each example in another label too"
        )
    if not any(len(example) == len(labels) for example in texts):
        raise InputError(
            f"none of the {len(texts)} examples has every label of {', '.join(labels)}; complete "
            "some, or leave out the labels that few examples have"
        )
    return labels, texts


def source_name(examples: Examples) -> str | None:
    """The base name of a file of examples; None of others."""
    return Path(examples).name if isinstance(examples, str | os.PathLike) else None


def _read_lines(path: str | os.PathLike[str]) -> list[Any]:
    try:
        lines = existing_file(path, "example file").read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"the example file {path} is not text in UTF-8") from error
    examples = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            examples.append(json.loads(line))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"line {number} of the example file {path} must be JSON such as "
                f'{{"en": "...", "zh": "..."}}, got {line.strip()[:60]!r}'
            ) from error
    return examples


def _texts(example: Any, where: str) -> dict[str, _Text]:
    if not isinstance(example, Mapping) or not all(isinstance(one, str) and one for one in example):
        raise InputError(f"{where} must be a dict from label to prompt, got {example!r:.60}")
    texts = {}
    for label, value in example.items():
        if isinstance(value, Mapping):
            pair = value.get("prompt"), value.get("answer")
        elif isinstance(value, Sequence) and not isinstance(value, str) and len(value) == 2:
            pair = tuple(value)
        else:
            pair = value, None
        prompt, answer = pair
        for text in (prompt, prompt if answer is None else answer):
            if not isinstance(text, str) or not text:
                raise InputError(
                    f"{where}, label {label!r}: expected a prompt that says something, a pair "
                    '(prompt, answer), or {"prompt": ..., "answer": ...}, '
                    f"got {value!r:.60}"
                )
        texts[label] = prompt, answer
    return texts


def _tokenised(
    tokenizer: Any,
    prompt: str,
    answer: str | None,
    limits: tuple[int | None, int | None],
    where: str,
) -> Prompt:
    ids, continued = list(tokenizer(prompt).input_ids), []
    if answer is not None:
        joint = list(tokenizer(prompt + answer).input_ids)
        continued = joint[len(ids) :] if joint[: len(ids)] == ids else []
        continued = continued or list(tokenizer(answer, add_special_tokens=False).input_ids)
    if not ids or (answer is not None and not continued):
        raise InputError(f"{where}: the tokenizer makes no token of {answer if ids else prompt!r}")
    longest, vocabulary = limits
    tokens = len(ids) + len(continued)
    if longest is not None and tokens > longest:
        raise InputError(
            f"{where}: {tokens} tokens are over the model's limit of {longest}; shorten the text"
        )
    if vocabulary is not None and max(ids + continued) >= vocabulary:
        raise InputError(
            f"{where}: the tokenizer gives the id {max(ids + continued)}, but the model has "
            f"{vocabulary} tokens; give the model's own tokenizer"
        )
    return Prompt(ids, continued)

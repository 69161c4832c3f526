"""Prompts from JSON lines."""

from __future__ import annotations

import json
import os
from collections.abc import Sequence

from lapefast.errors import InputError
from lapefast.files import existing_file

__all__ = ["read_prompts", "read_records"]


def read_prompts(path: str | os.PathLike[str]) -> dict[str, list[str]]:
    """Label -> prompts, in the order of JSON lines with the fields ``label`` and ``prompt``.

    Raises:
        InputError: the file is missing or empty, or a line is something else.
    """
    prompts: dict[str, list[str]] = {}
    for label, prompt in read_records(path, ("label", "prompt")):
        prompts.setdefault(label, []).append(prompt)
    return prompts


def read_records(path: str | os.PathLike[str], fields: Sequence[str]) -> list[tuple[str, ...]]:
    """Those fields, all of them texts, of each line of a file of JSON objects.

    Raises:
        InputError: see `read_prompts`.
    """
    try:
        lines = existing_file(path, "prompt file").read_text("utf-8-sig").split("\n")
    except UnicodeDecodeError as error:
        raise InputError(f"the prompt file {path} is not text in UTF-8") from error
    records = []
    for number, line in enumerate(lines, 1):
        if not line.strip():
            continue
        try:
            content = json.loads(line)
            record = tuple(content[field] for field in fields)
        except (ValueError, KeyError, TypeError, RecursionError):
            record = (None,)
        if not all(isinstance(text, str) and text for text in record):
            example = {field: "..." for field in fields}
            raise InputError(
                f"line {number} of the prompt file {path} must be JSON such as "
                f"{json.dumps(example)}, got {line.strip()[:60]!r}"
            )
        records.append(record)
    if not records:
        raise InputError(f"the prompt file {path} is empty; give one prompt per line")
    return records

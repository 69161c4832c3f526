"""The commands that a file's settings stand for."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from pathlib import PurePosixPath, PureWindowsPath
from typing import Any

__all__ = ["commands", "public_name"]

_PROFILE = ("seq_len", "batch_size", "threshold", "dtype", "threads")
_MATRIX = ("batch_size", "max_tokens", "dtype", "random_sets", "seed", "threads")
_IDENTIFY = ("top_rate", "filter_rate", "activation_bar_ratio", "form")


def commands(described: Mapping[str, Mapping[str, Any]], files: Mapping[str, str]) -> list[str]:
    """The commands that made the files, as far as their settings tell.

    Args:
        described: name -> metadata; the names are those of `lapefast.report.sections.Inputs`.
        files: name -> base name of the file.
    """
    lines = []
    for name, metadata in described.items():
        model = public_name(metadata.get("model") or "MODEL")
        if name not in files:
            continue
        if name == "profile" and "runs" not in metadata:
            given = metadata.get("corpora", ())
            corpora = [
                f"--corpus={one['label']}={public_name(one['source'] or 'SOURCE')}" for one in given
            ]
            options = _options(metadata, _PROFILE)
            if given and all(one.get("capped") for one in given):
                options.append(f"--max-tokens={max(one['tokens'] for one in given)}")
            lines.append(["profile", model, *corpora, *options, "-o", files[name]])
        elif metadata.get("method") == "lape" and "profile" in files:
            options = _options(metadata.get("parameters") or {}, _IDENTIFY)
            lines.append(["identify", files["profile"], *options, "-o", files[name]])
        elif name == "matrix":
            neurons = next((files[one] for one in described if _is_sets(one, files)), "NEURONS")
            texts = [f"--corpus={label}=SOURCE" for label in metadata.get("seq_len", ())]
            lengths = sorted(set(metadata.get("seq_len", {}).values()))
            options = [f"--seq-len={lengths[0]}"] if len(lengths) == 1 else []
            options += _options(metadata, _MATRIX)
            lines.append(
                ["evaluate", model, "--neurons", neurons, *texts, *options, "-o", files[name]]
            )
    return [shlex.join(["lapefast", *line]) for line in lines]


def public_name(name: str) -> str:
    """The name; of an absolute path its last part alone, since the rest is this machine's."""
    for kind in (PurePosixPath, PureWindowsPath):
        if kind(name).is_absolute():
            return kind(name).name
    return name


def _is_sets(name: str, files: Mapping[str, str]) -> bool:
    return name in files and name not in ("profile", "matrix", "sweep", "experts", "sharing")


def _options(metadata: Mapping[str, Any], names: tuple[str, ...]) -> list[str]:
    return [
        f"--{name.replace('_', '-')}={metadata[name]}"
        for name in names
        if metadata.get(name) is not None and not isinstance(metadata[name], (dict, list))
    ]

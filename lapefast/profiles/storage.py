"""The profile file: safetensors, written in one order and sealed by a checksum.

The tensors are `tokens` int64 [labels] (of the main stack; `tokens/{stack}` for another) and
`{statistic}/{site}` [labels, width]. The file's metadata says what it is, its format version, the
rest of the profile as JSON, and a SHA-256 over all bytes of the file but that checksum itself, so
that one flipped bit anywhere is found.
"""

from __future__ import annotations

import dataclasses
import hashlib
import json
import os
from collections.abc import Iterable, Mapping
from typing import TYPE_CHECKING, Any

import safetensors
import safetensors.torch
import torch

from lapefast.errors import InputError
from lapefast.files import existing_file, write_atomically
from lapefast.models.sites import Site

if TYPE_CHECKING:
    from lapefast.profiles.profile import Profile

__all__ = ["main_stack", "read", "write"]

_FORMAT = "lapefast profile"
_VERSION = "1"
_BLANK = "0" * 64
_DTYPES = {torch.int64: "I64", torch.float64: "F64"}


def main_stack(stacks: Iterable[str]) -> str:
    """The stack whose tokens are the profile's: the encoder, where there is one."""
    stacks = list(stacks)
    return "encoder" if "encoder" in stacks else stacks[0]


def write(path: str | os.PathLike[str], profile: Profile) -> None:
    """Write a profile; the same profile gives the same bytes."""
    tensors = _tensors(profile)
    header, offset = {}, 0
    for name, tensor in tensors.items():
        end = offset + tensor.numel() * tensor.element_size()
        header[name] = {
            "dtype": _DTYPES[tensor.dtype],
            "shape": list(tensor.shape),
            "data_offsets": [offset, end],
        }
        offset = end
    about = {
        "labels": profile.labels,
        "sites": [dataclasses.asdict(site) for site in profile.site_info],
        "statistics": list(profile.statistics),
        "metadata": profile.metadata,
    }
    blank = _head(header, about, _BLANK)
    digest = hashlib.sha256(blank)
    for tensor in tensors.values():
        digest.update(_bytes(tensor))
    with write_atomically(path) as temporary, open(temporary, "wb") as file:
        file.write(_head(header, about, digest.hexdigest()))
        for tensor in tensors.values():
            file.write(_bytes(tensor))


def read(
    path: str | os.PathLike[str],
) -> tuple[
    list[str],
    list[Site],
    dict[str, torch.Tensor],
    dict[str, dict[str, torch.Tensor]],
    dict[str, Any],
]:
    """The arguments of `Profile`, from a file.

    Raises:
        InputError: the file is missing, no profile, of another format version, or damaged.
    """
    with open(existing_file(path, "profile"), "rb") as file:
        data = file.read()
    sealed = _sealed(data)
    try:
        about = json.loads(sealed["profile"])
        sites = [Site(**entry) for entry in about["sites"]]
        stacks = list(dict.fromkeys(site.stack for site in sites))
        tensors = safetensors.torch.load(data)
        tokens = {stack: tensors.pop(_tokens_name(stack, stacks)) for stack in stacks}
        statistics = {
            name: {site.name: tensors.pop(f"{name}/{site.name}") for site in sites}
            for name in about["statistics"]
        }
        arguments = (list(about["labels"]), sites, tokens, statistics, dict(about["metadata"]))
    except KeyError as error:
        raise InputError(f"the profile lacks the entry {error}; make it again") from error
    except (TypeError, ValueError, safetensors.SafetensorError) as error:
        raise InputError(f"the profile is inconsistent ({error}); make it again") from error
    if tensors:
        raise InputError(f"the profile holds unknown entries, {', '.join(tensors)}; make it again")
    return arguments


def _tensors(profile: Profile) -> dict[str, torch.Tensor]:
    stacks = list(profile.stack_tokens)
    tensors = {_tokens_name(stack, stacks): profile.stack_tokens[stack] for stack in stacks}
    for name, values in profile.statistics.items():
        tensors |= {f"{name}/{site}": values[site] for site in profile.sites}
    return tensors


def _tokens_name(stack: str, stacks: list[str]) -> str:
    return "tokens" if stack == main_stack(stacks) else f"tokens/{stack}"


def _head(header: Mapping[str, Any], about: Mapping[str, Any], checksum: str) -> bytes:
    """What stands before the tensors: the length of the header, and the header, padded to 8."""
    metadata = {
        "format": _FORMAT,
        "version": _VERSION,
        "sha256": checksum,
        "profile": json.dumps(about, sort_keys=True),
    }
    text = json.dumps({"__metadata__": metadata, **header}).encode()
    text += b" " * (-len(text) % 8)
    return len(text).to_bytes(8, "little") + text


def _sealed(data: bytes) -> dict[str, str]:
    """The file's own metadata, after checking that it is a profile and that no bit has changed."""
    end = 8 + int.from_bytes(data[:8], "little")
    try:
        # UnicodeDecodeError and JSONDecodeError are ValueErrors; nesting can exhaust the stack.
        metadata = json.loads(data[8:end].decode())["__metadata__"] if end <= len(data) else None
        known = metadata["format"] == _FORMAT
        version, checksum = metadata["version"], metadata["sha256"]
    except (ValueError, KeyError, TypeError, RecursionError):
        known = False
    if not known:
        raise InputError(
            "it is not a profile, or one that was cut short or damaged; "
            "give a file made by `lapefast profile`"
        )
    if version != _VERSION:
        raise InputError(
            f"it is a profile of format version {version}, but this lapefast reads version "
            f"{_VERSION}; use the lapefast that made it"
        )
    digest = hashlib.sha256(data[:end].replace(str(checksum).encode(), _BLANK.encode(), 1))
    digest.update(memoryview(data)[end:])
    if digest.hexdigest() != checksum:
        raise InputError(
            "the profile's checksum does not match: it was cut short or damaged; "
            "copy it anew or make it again"
        )
    return metadata


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().numpy()).cast("B")

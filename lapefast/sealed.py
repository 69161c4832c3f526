"""Safetensors files sealed by a checksum, so that one flipped bit anywhere is found.

The file's metadata says what it is, its format version, all else that it says as one JSON text, and
a SHA-256 over all bytes of the file but that checksum itself.
"""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

import safetensors
import safetensors.torch
import torch

from lapefast.errors import InputError
from lapefast.files import existing_file, write_atomically

__all__ = ["SealedFile"]

_BLANK = "0" * 64
_DTYPES = {torch.int64: "I64", torch.int32: "I32", torch.float64: "F64"}
_Content = TypeVar("_Content")


@dataclass(frozen=True)
class SealedFile:
    """One kind of file.

    Attributes:
        what: the kind, in words.
        version: of the format.
        key: the entry of the metadata that holds the JSON text.
        made_by: what makes such a file, in words.
    """

    what: str
    version: str
    key: str
    made_by: str

    def write(
        self,
        path: str | os.PathLike[str],
        tensors: Mapping[str, torch.Tensor],
        about: Mapping[str, Any],
    ) -> None:
        """Write int64, int32 and float64 tensors in order; the same content gives the same bytes.

        Raises:
            InputError: the file cannot be written; then nothing is.
        """
        header, offset = {}, 0
        for name, tensor in tensors.items():
            end = offset + tensor.numel() * tensor.element_size()
            header[name] = {
                "dtype": _DTYPES[tensor.dtype],
                "shape": list(tensor.shape),
                "data_offsets": [offset, end],
            }
            offset = end
        digest = hashlib.sha256(self._head(header, about, _BLANK))
        for tensor in tensors.values():
            digest.update(_bytes(tensor))
        with write_atomically(path) as temporary, open(temporary, "wb") as file:
            file.write(self._head(header, about, digest.hexdigest()))
            for tensor in tensors.values():
                file.write(_bytes(tensor))

    def read(
        self,
        path: str | os.PathLike[str],
        parse: Callable[[dict[str, Any], dict[str, torch.Tensor]], _Content],
    ) -> _Content:
        """What ``parse`` makes of the JSON and of the tensors, all of which it must take out.

        Raises:
            InputError: the file is missing, of another kind or format version, or damaged, or
                ``parse`` finds an entry missing (KeyError) or wrong (TypeError, ValueError).
        """
        try:
            with open(existing_file(path, self.what), "rb") as file:
                data = file.read()
        except OSError as error:
            raise InputError(
                f"the {self.what} cannot be read to its end ({error.strerror}); copy it anew or "
                "make it again"
            ) from error
        sealed = self._checked(data)
        try:
            tensors = safetensors.torch.load(data)
            content = parse(json.loads(sealed[self.key]), tensors)
        except KeyError as error:
            raise InputError(f"the {self.what} lacks the entry {error}; make it again") from error
        except (TypeError, ValueError, safetensors.SafetensorError) as error:
            raise InputError(f"the {self.what} is inconsistent ({error}); make it again") from error
        if tensors:
            raise InputError(
                f"the {self.what} holds unknown entries, {', '.join(tensors)}; make it again"
            )
        return content

    @property
    def _named(self) -> str:
        return f"{'an' if self.what[0] in 'aeio' else 'a'} {self.what}"

    def _head(self, header: Mapping[str, Any], about: Mapping[str, Any], checksum: str) -> bytes:
        """What stands before the tensors: the header's length, and the header, padded to 8."""
        metadata = {
            "format": f"lapefast {self.what}",
            "version": self.version,
            "sha256": checksum,
            self.key: json.dumps(about, sort_keys=True),
        }
        text = json.dumps({"__metadata__": metadata, **header}).encode()
        text += b" " * (-len(text) % 8)
        return len(text).to_bytes(8, "little") + text

    def _checked(self, data: bytes) -> dict[str, str]:
        """The metadata, after checking that it is such a file and that no bit has changed."""
        end = 8 + int.from_bytes(data[:8], "little")
        try:
            # UnicodeDecodeError and JSONDecodeError are ValueErrors; nesting can exhaust the stack.
            header = json.loads(data[8:end].decode()) if end <= len(data) else None
            metadata = header["__metadata__"]
            known = metadata["format"] == f"lapefast {self.what}"
            version, checksum = metadata["version"], metadata["sha256"]
        except (ValueError, KeyError, TypeError, RecursionError):
            known = False
        if not known:
            raise InputError(
                f"it is not {self._named}, or one that was cut short or damaged; "
                f"give a file made by {self.made_by}"
            )
        if version != self.version:
            raise InputError(
                f"it is {self._named} of format version {version}, but this lapefast reads version "
                f"{self.version}; use the lapefast that made it"
            )
        digest = hashlib.sha256(data[:end].replace(str(checksum).encode(), _BLANK.encode(), 1))
        digest.update(memoryview(data)[end:])
        if digest.hexdigest() != checksum:
            raise InputError(
                f"the {self.what}'s checksum does not match: it was cut short or damaged; "
                "copy it anew or make it again"
            )
        return metadata


def _bytes(tensor: torch.Tensor) -> memoryview:
    return memoryview(tensor.contiguous().numpy()).cast("B")

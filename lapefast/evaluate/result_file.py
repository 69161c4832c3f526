"""The JSON file of an evaluation: what it is called, and what is said of one that is none."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lapefast.errors import InputError
from lapefast.files import existing_file, write_atomically

__all__ = ["ResultFile"]

_Result = TypeVar("_Result")


@dataclass(frozen=True)
class ResultFile:
    """One kind of file; its content has rows.

    Attributes:
        what: its name in messages.
        format: what its field "format" says.
        version: the version that is written, and the only one that is read.
    """

    what: str
    format: str
    version: int = 1

    def write(self, path: str | os.PathLike[str], content: Mapping[str, Any]) -> None:
        """Write the content. Raises InputError where the file cannot be written."""
        about = {"format": self.format, "version": self.version}
        with write_atomically(path) as temporary:
            text = json.dumps({**about, **content}, indent=1, ensure_ascii=False)
            temporary.write_text(text, "utf-8")

    def read(
        self, path: str | os.PathLike[str], parse: Callable[[dict[str, Any]], _Result]
    ) -> _Result:
        """What ``parse`` makes of the file's JSON.

        Raises:
            InputError: the file is missing, of another kind or version, or damaged, or has no rows,
                or ``parse`` finds an entry missing (KeyError) or wrong (TypeError, ValueError).
        """
        file = existing_file(path, self.what)
        try:
            content = json.loads(file.read_text("utf-8"))
            found = content["format"], content["version"]
        except (ValueError, KeyError, TypeError, RecursionError) as error:
            raise InputError(
                f"the {self.what} {path} is not one of lapefast's, or is cut short or damaged"
            ) from error
        if found != (self.format, self.version):
            raise InputError(
                f"the {self.what} {path} must be a {self.format} of version {self.version}, got "
                f"{found[0]!r} of version {found[1]!r}"
            )
        try:
            if not content["rows"]:
                raise ValueError("it has no rows")
            return parse(content)
        except (ValueError, KeyError, TypeError) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"the {self.what} {path} is damaged: {reason}; make it again"
            ) from error

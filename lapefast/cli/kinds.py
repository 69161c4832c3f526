"""Which kind of file a file is, by its content."""

from __future__ import annotations

import json
from pathlib import Path

__all__ = ["OTHER_JSON", "OTHER_SAFETENSORS", "kind_of"]

OTHER_JSON = "other JSON"
OTHER_SAFETENSORS = "other safetensors"


def kind_of(path: Path) -> str | None:
    """What the file says that it is; None for an empty one. Raises InputError if it can't be read.

    "published" is a neuron file that torch saved; what is cut short or damaged is `OTHER_JSON` or
    `OTHER_SAFETENSORS`.
    """
    from lapefast.files import existing_file

    with open(existing_file(path, "file"), "rb") as file:
        start = file.read(9)
        if not start:
            return None
        # Safetensors begin with the length of a JSON header, which may be any bytes.
        sealed = start[8:] == b"{"
        # A published file is a zip or a pickle.
        if not sealed and start.startswith((b"PK", b"\x80")):
            return "published"
        if not sealed and not start.lstrip().startswith(b"{"):
            return "something else"
        file.seek(8 if sealed else 0)
        # Of a file that is not one, the length may be any.
        length = int.from_bytes(start[:8], "little") if sealed else -1
        data = file.read(min(length, path.stat().st_size))
    # Lines of JSON, the first of which says what they are; or, as once written, does not.
    line = data.partition(b"\n")[0]
    if not sealed and (b'"lapefast sweep"' in line or b'"target"' in line):
        return "lapefast sweep"
    try:
        content = json.loads(data)
        return str((content["__metadata__"] if sealed else content)["format"])
    except (ValueError, KeyError, TypeError, RecursionError):
        return OTHER_SAFETENSORS if sealed else OTHER_JSON

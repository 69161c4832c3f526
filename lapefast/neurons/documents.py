"""The JSON that neuron sets and edits are kept in: readable, a line per site, checked when read."""

from __future__ import annotations

import json
import os
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from typing import Any, TypeVar

from lapefast.errors import InputError
from lapefast.files import existing_file, write_atomically
from lapefast.neurons.layout import Key, Layout

__all__ = ["Document", "as_text", "block", "require"]

_T = TypeVar("_T")


@dataclass(frozen=True)
class Document:
    """A kind of file.

    Attributes:
        format: what its field "format" says.
        version: the version that is written, and the only one that is read.
        what: its name in messages.
        command: the command that makes one.
    """

    format: str
    version: int
    what: str
    command: str

    def write(
        self, path: str | os.PathLike[str], layout: Layout, entries: Mapping[str, str]
    ) -> None:
        """Write `entries` (name -> JSON) after what is known of the model, in a fixed order."""
        sites = [
            as_text(
                {"name": site, "width": layout.widths.get(site)}
                | ({"experts": layout.experts[site]} if site in layout.experts else {})
            )
            for site in layout.sites
        ]
        everything = {
            "format": as_text(self.format),
            "version": as_text(self.version),
            "model": as_text(layout.model),
            "fingerprint": as_text(layout.fingerprint),
            "sites": block("[]", sites, depth=1),
            **entries,
        }
        lines = [f"{as_text(name)}: {value}" for name, value in everything.items()]
        with write_atomically(path) as temporary:
            temporary.write_text(block("{}", lines, depth=0) + "\n", encoding="utf-8")

    def read(
        self, path: str | os.PathLike[str], parse: Callable[[dict[str, Any], Layout], _T]
    ) -> _T:
        """What `parse` makes of the file's JSON and layout.

        Raises:
            InputError: it is not JSON, of another kind or version, or `parse` finds it broken (by
                a KeyError, AttributeError, TypeError or ValueError).
        """
        with open(existing_file(path, self.what), "rb") as file:
            data = file.read()
        try:
            content = json.loads(data.decode("utf-8"))
        except (ValueError, RecursionError) as error:
            raise InputError(
                f"the {self.what} {path} is not valid JSON ({error}): cut short or damaged; "
                "make it again"
            ) from error
        if not isinstance(content, dict) or content.get("format") != self.format:
            raise InputError(
                f"{path} is JSON but not a {self.what}; give one made by `{self.command}`"
            )
        if content.get("version") != self.version:
            raise InputError(
                f"the {self.what} {path} has format version {content.get('version')!r}, but this "
                f"lapefast reads version {self.version}; use the lapefast that made it"
            )
        try:
            return parse(content, _layout(content))
        except (
            AttributeError,
            KeyError,
            OverflowError,
            RuntimeError,
            TypeError,
            ValueError,
        ) as error:
            reason = f"{error} is missing" if isinstance(error, KeyError) else str(error)
            raise InputError(
                f"the {self.what} {path} is broken: {reason}; make it again"
            ) from error


def as_text(value: Any) -> str:
    """The value as JSON on one line."""
    return json.dumps(value, ensure_ascii=False, allow_nan=False)


def block(brackets: str, lines: list[str], depth: int) -> str:
    """The lines between brackets, indented below `depth`."""
    if not lines:
        return brackets
    indent = "  " * (depth + 1)
    body = ",\n".join(indent + line for line in lines)
    return f"{brackets[0]}\n{body}\n{'  ' * depth}{brackets[1]}"


def require(condition: bool, otherwise: str) -> None:
    """Raise ValueError, which `Document.read` reports, unless the condition holds."""
    if not condition:
        raise ValueError(otherwise)


def _layout(content: dict[str, Any]) -> Layout:
    sites = {entry["name"]: entry["width"] for entry in content["sites"]}
    require(len(sites) == len(content["sites"]), "a site is listed twice")
    for site, width in sites.items():
        known = width is None or (type(width) is int and width > 0)
        require(known, f"the width of site {site} is {width!r}, not a positive number")
    for key in ("model", "fingerprint"):
        named = content[key] is None or isinstance(content[key], str)
        require(named, f"its {key} is not a string")
    widths: dict[Key, int] = {site: width for site, width in sites.items() if width is not None}
    experts = {one["name"]: one["experts"] for one in content["sites"] if "experts" in one}
    for site, count in experts.items():
        fits = type(count) is int and count > 0 and widths.get(site, 0) % count == 0
        require(fits, f"site {site} can't have {count!r} experts")
    return Layout(tuple(sites), widths, content["fingerprint"], content["model"], experts)

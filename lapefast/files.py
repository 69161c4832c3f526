"""Files and directories are written aside and renamed, so that nobody ever sees half of one."""

from __future__ import annotations

import io
import os
import secrets
import shutil
import warnings
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from pathlib import Path
from typing import Any

import torch

from lapefast.errors import InputError

__all__ = ["existing_file", "read_torch", "write_atomically", "write_directory", "write_torch"]


@contextmanager
def write_atomically(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield a temporary path beside `path`; on success it takes the place of `path` at once.

    The temporary file lies in the same directory (a rename is atomic only within a file system),
    is empty at first, and is flushed to the disk before it is renamed. Whatever goes wrong, it is
    removed and what stood at `path` stays as it was. A link is followed: its target is replaced.
    Write through Python's own file objects; a library that opens the path by itself may report a
    full disk by an error of its own, which passes through as it is.

    Raises:
        InputError: the directory is missing or not writable, `path` is no regular file, or the
            operating system refuses to write (a full disk, say).
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not target.is_file():
        raise InputError(f"cannot write {path}: it is not a regular file; give another path")
    if not target.parent.is_dir():
        raise InputError(
            f"cannot write {path}: the directory {target.parent} does not exist; create it first"
        )
    temporary = target.with_name(f".{target.name[:80]}.{secrets.token_hex(6)}.tmp")
    try:
        descriptor = os.open(temporary, os.O_CREAT | os.O_EXCL | os.O_WRONLY, 0o666)
        os.close(descriptor)
        if target.exists():
            os.chmod(temporary, target.stat().st_mode & 0o777)
        yield temporary
        _flush(temporary)
        os.replace(temporary, target)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {_reason(error)}; nothing was changed, "
            "make room or choose another place"
        ) from error
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def write_directory(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Yield an empty directory beside `path`; on success it becomes `path` at once.

    As `write_atomically` does for a file: flushed before it is renamed, and removed with all that
    is in it whatever goes wrong.

    Raises:
        InputError: something stands at `path` that is no empty directory, its parent is missing or
            not writable, or the operating system refuses to write.
    """
    target = Path(os.path.realpath(path))
    if target.exists() and not (target.is_dir() and not any(target.iterdir())):
        raise InputError(
            f"cannot write {path}: it exists already; give a path that does not, or an empty "
            "directory"
        )
    if not target.parent.is_dir():
        raise InputError(
            f"cannot write {path}: the directory {target.parent} does not exist; create it first"
        )
    temporary = target.with_name(f".{target.name[:80]}.{secrets.token_hex(6)}.tmp")
    try:
        temporary.mkdir()
        yield temporary
        for file in temporary.rglob("*"):
            if file.is_file():
                _flush(file)
        # Over an empty directory, too; over anything that came to be in it, the system refuses.
        os.rename(temporary, target)
    except OSError as error:
        raise InputError(
            f"cannot write {path}: {_reason(error)}; nothing was changed, "
            "make room or choose another place"
        ) from error
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def existing_file(path: str | os.PathLike[str], what: str) -> Path:
    """The path of a file that can be read; `what` names it in the InputError if it cannot."""
    file = Path(path)
    try:
        with open(file, "rb"):
            return file
    except OSError as error:
        raise InputError(
            f"cannot read the {what} {path}: {_reason(error)}; check the path"
        ) from error


def read_torch(path: str | os.PathLike[str], what: str) -> Any:
    """Read a file saved by `torch.save` that holds tensors, lists, dicts and numbers alone.

    Nothing else is ever unpickled, since a pickle can run code. Both the zip format and the older
    one are read; tensors arrive on the CPU. `what` names the file in the InputError.
    """
    existing_file(path, what)
    try:
        with warnings.catch_warnings():
            # Of pickles that torch did not write; what they hold is checked here.
            warnings.simplefilter("ignore")
            content = torch.load(path, map_location="cpu", weights_only=True)
        if _is_plain(content):
            return content
        cause = None
    except Exception as error:  # torch, pickle and zip each have errors of their own
        cause = error
    raise InputError(
        f"the {what} {path} must be torch-saved and hold tensors, lists, dicts and numbers alone, "
        "but it holds something else (which is refused), or is cut short or damaged"
    ) from cause


def write_torch(contents: Mapping[str | os.PathLike[str], Any]) -> None:
    """Save each path's content as `torch.save` does, atomically; if one cannot be, none is.

    Raises:
        InputError: see `write_atomically`.
    """
    with ExitStack() as stack:
        for path, content in contents.items():
            temporary = stack.enter_context(write_atomically(path))
            # Through memory: torch reports a full disk by a RuntimeError that does not say so.
            buffer = io.BytesIO()
            torch.save(content, buffer)
            temporary.write_bytes(buffer.getbuffer())


def _is_plain(content: Any) -> bool:
    if isinstance(content, torch.Tensor):
        return content.layout is torch.strided and content.device.type == "cpu"
    if isinstance(content, list):
        return all(map(_is_plain, content))
    if isinstance(content, dict):
        return all(type(key) in (str, int) for key in content) and _is_plain([*content.values()])
    return type(content) in (int, float)


def _reason(error: OSError) -> str:
    reason = error.strerror or str(error)
    return reason[:1].lower() + reason[1:]


def _flush(path: Path) -> None:
    descriptor = os.open(path, os.O_WRONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)

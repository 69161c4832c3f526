"""Documents from files: text, JSON lines, Parquet and arrays of token ids, compressed or not."""

from __future__ import annotations

import bz2
import codecs
import gzip
import io
import json
import lzma
import os
import zipfile
import zlib
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any, BinaryIO, Literal, NamedTuple

import numpy as np
import torch

from lapefast.corpus.pieces import PIECE, Piece, choose_field, content_pieces
from lapefast.errors import InputError

__all__ = ["DOCUMENTS", "Document", "file_pieces", "is_array_file", "load_array"]

Document = Literal["line", "file", "blank-line"]
DOCUMENTS: tuple[str, ...] = ("line", "file", "blank-line")

_COMPRESSED = {
    b"\x1f\x8b": "gzip",
    b"BZh": "bz2",
    b"\xfd7zXZ\x00": "xz",
    b"\x28\xb5\x2f\xfd": "zstd",
}
_COMPRESSED_SUFFIXES = (".gz", ".bz2", ".xz", ".lzma", ".zst", ".zstd")
_JSON_SUFFIXES = (".jsonl", ".ndjson", ".json")
_PARQUET_SUFFIXES = (".parquet", ".pq")
_ARRAY_SUFFIXES = (".npy", ".pt", ".pth")
_BATCH_ROWS = 256


class _Line(NamedTuple):
    """A part of a line; `ends` where a line feed followed it, which `text` leaves out."""

    number: int
    text: str
    ends: bool


def is_array_file(path: str) -> bool:
    """Whether a file's name says that it holds one array of token ids (NumPy's or torch's)."""
    return path.lower().endswith(_ARRAY_SUFFIXES)


def load_array(path: str) -> Any:
    """The array or tensor of token ids in a file, mapped into memory where its format allows."""
    try:
        if path.lower().endswith(".npy"):
            return np.load(path, mmap_mode="r", allow_pickle=False)
        mapped = zipfile.is_zipfile(path)
        array = torch.load(path, map_location="cpu", weights_only=True, mmap=mapped)
    except Exception as error:  # NumPy, torch, pickle and zip each have errors of their own
        raise InputError(f"{path} cannot be read as an array of token ids") from error
    if not isinstance(array, torch.Tensor):
        raise InputError(f"{path} must hold one tensor of token ids, got {type(array).__name__}")
    return array


def file_pieces(
    path: str, raw: io.BufferedReader, document: str, field: str, prefer_ids: bool
) -> Iterator[Piece]:
    """The documents of one open file. Its name says what it holds; what isn't known is text.

    Text must be UTF-8. A line ends at a line feed and nowhere else; a carriage return before it
    goes too, and so does a byte order mark at the start. Raises InputError with file and line.
    """
    with _named(path):
        stream, name = _decompressed(path, raw)
        if name.endswith(_PARQUET_SUFFIXES):
            yield from _parquet_pieces(path, stream, field, prefer_ids)
        elif is_array_file(name):
            raise InputError(f"{path} must be given alone, not compressed or beside other files")
        elif name.endswith(_JSON_SUFFIXES):
            yield from _json_pieces(path, stream, field, prefer_ids)
        else:
            yield from _GROUPING[document](_lines(path, stream))


@contextmanager
def _named(path: str) -> Iterator[None]:
    try:
        yield
    except (OSError, EOFError, zlib.error, lzma.LZMAError) as error:
        raise InputError(
            f"{path} cannot be read to its end, it may be damaged or cut short: {error}"
        ) from error


def _decompressed(path: str, raw: io.BufferedReader) -> tuple[BinaryIO, str]:
    """The content as a stream, and the file's name without what says that it is compressed."""
    magic = raw.peek(8)[:8]
    stem, suffix = os.path.splitext(path.lower())
    name = stem if suffix in _COMPRESSED_SUFFIXES else path.lower()
    method = next((m for start, m in _COMPRESSED.items() if magic.startswith(start)), None)
    if method is None and suffix == ".lzma":
        method = "xz"
    if method == "gzip":
        return gzip.GzipFile(fileobj=raw), name
    if method == "bz2":
        return bz2.BZ2File(raw), name
    if method == "xz":
        return lzma.LZMAFile(raw), name
    if method == "zstd":
        import pyarrow

        return io.BufferedReader(pyarrow.CompressedInputStream(raw, "zstd")), name
    if magic.startswith(b"PAR1") and not name.endswith(_PARQUET_SUFFIXES):
        name += ".parquet"
    return raw, name


def _lines(path: str, stream: BinaryIO) -> Iterator[_Line]:
    decode = codecs.getincrementaldecoder("utf-8")().decode
    number, held = 1, b""
    start = True
    while data := stream.readline(PIECE):
        if start:
            data, start = data.removeprefix(codecs.BOM_UTF8), False
        data = held + data
        ends = data.endswith(b"\n")
        held = b""
        if ends:
            data = data[:-2] if data.endswith(b"\r\n") else data[:-1]
        elif data.endswith(b"\r"):  # the line feed it belongs to may come next
            data, held = data[:-1], b"\r"
        yield _Line(number, _text(path, number, data, decode, ends), ends)
        number += ends
    if rest := _text(path, number, held, decode, True):
        yield _Line(number, rest, False)


def _text(path: str, number: int, data: bytes, decode: Any, final: bool) -> str:
    if b"\0" in data:
        kind = "UTF-16 text" if number == 1 and data[:2] in (b"\xff\xfe", b"\xfe\xff") else "binary"
        raise InputError(f"{path}, line {number}: not UTF-8 text, it looks like {kind}")
    try:
        return decode(data, final)
    except UnicodeDecodeError as error:
        byte = error.object[error.start]
        raise InputError(
            f"{path}, line {number}: not UTF-8 text (byte 0x{byte:02x}); convert the file to UTF-8"
        ) from error


def _by_line(lines: Iterator[_Line]) -> Iterator[Piece]:
    inside = False
    for line in lines:
        yield Piece(line.text, line.ends)
        inside = not line.ends
    if inside:
        yield Piece("", True)


def _by_blank_line(lines: Iterator[_Line]) -> Iterator[Piece]:
    inside, line_start = False, True
    for line in lines:
        if line_start and line.ends and _blank(line.text):
            if inside:
                yield Piece("", True)
            inside = False
        else:
            yield Piece("\n" + line.text if inside and line_start else line.text, False)
            inside = True
        line_start = line.ends
    if inside:
        yield Piece("", True)


def _whole(lines: Iterator[_Line]) -> Iterator[Piece]:
    for line in lines:
        yield Piece(line.text + "\n" if line.ends else line.text, False)
    yield Piece("", True)


_GROUPING = {"line": _by_line, "file": _whole, "blank-line": _by_blank_line}


def _blank(text: str) -> bool:
    return not text or text.isspace()


def _json_pieces(path: str, stream: BinaryIO, field: str, prefer_ids: bool) -> Iterator[Piece]:
    parts: list[str] = []
    for line in _lines(path, stream):
        parts.append(line.text)
        if line.ends:
            yield from _json_document(path, line.number, "".join(parts), field, prefer_ids)
            parts = []
    if parts:
        yield from _json_document(path, line.number, "".join(parts), field, prefer_ids)


def _json_document(
    path: str, number: int, text: str, field: str, prefer_ids: bool
) -> Iterator[Piece]:
    if _blank(text):
        return
    where = f"{path}, line {number}"
    try:
        example = json.loads(text)
    except (ValueError, RecursionError) as error:
        raise InputError(f"{where}: not JSON ({error}); each line must be one object") from error
    if not isinstance(example, dict):
        raise InputError(f"{where}: each line must be one JSON object, got {_kind(example)}")
    try:
        yield from content_pieces(example, field, prefer_ids)
    except InputError as error:
        raise InputError(f"{where}: {error}") from error


def _kind(value: Any) -> str:
    return "an array" if isinstance(value, list) else f"{type(value).__name__} {value!r:.40}"


def _parquet_pieces(path: str, stream: BinaryIO, field: str, prefer_ids: bool) -> Iterator[Piece]:
    import pyarrow.parquet

    try:
        table = pyarrow.parquet.ParquetFile(stream)
    except (pyarrow.ArrowInvalid, OSError) as error:
        raise InputError(f"{path} is not a Parquet file, or it is cut short") from error
    row = 0
    try:
        column = choose_field(field, table.schema_arrow.names, prefer_ids)
        for batch in table.iter_batches(batch_size=_BATCH_ROWS, columns=[column]):
            for item in batch.column(0).to_pylist():
                row += 1
                yield from content_pieces(item, field, prefer_ids)
    except InputError as error:
        raise InputError(f"{path}, row {row}: {error}" if row else f"{path}: {error}") from error

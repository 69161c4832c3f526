"""Per text, the mean output of every linear layer over its tokens, kept on disk."""

from __future__ import annotations

import json
import shutil
import tempfile
from collections.abc import Generator, Iterator, Mapping
from contextlib import closing, contextmanager
from dataclasses import dataclass
from os import PathLike
from pathlib import Path
from typing import IO, Any

import numpy as np
import torch
from torch import Tensor, nn

from lapefast.detect.average_precision.scores import give_back
from lapefast.errors import InputError
from lapefast.files import write_directory
from lapefast.models.bare import bare_model, evaluating, headless
from lapefast.models.linears import find_linears, out_features
from lapefast.profiling.documents import DocumentBatch, DocumentPass

__all__ = ["TextMeans", "linear_widths", "text_means"]

_VALUES, _TEXTS = "text_means.npy", "texts.json"


@dataclass(frozen=True)
class TextMeans:
    """Means of the outputs of a model's linear layers over the tokens of each text.

    Attributes:
        values: float32 [texts, units], a memory map; units are the outputs of all linear layers,
            in model order.
        classes: int32 [texts], the index of each text's label.
    """

    values: np.memmap
    classes: np.ndarray

    def medians(self, index: int, units: np.ndarray) -> np.ndarray:
        """float64 like `units`: the median over the texts of the label with that index.

        Of an even number of texts it is the mean of the two middle values.
        """
        texts = np.flatnonzero(self.classes == index)
        chosen = np.empty((len(texts), len(units)))
        for row, text in enumerate(texts):
            chosen[row] = self.values[text, units]
            give_back(self.values)
        return np.median(chosen, axis=0)


def linear_widths(model: nn.Module) -> dict[str, int]:
    """Path inside the bare model -> outputs, of every linear layer but the head, in model order."""
    with headless(bare_model(model)):  # T5's owns its head
        return {path: out_features(module) for path, module in find_linears(model).items()}


@contextmanager
def text_means(
    model: nn.Module,
    text: DocumentPass,
    most_texts: int = 0,
    directory: str | PathLike[str] | None = None,
) -> Iterator[TextMeans]:
    """Run the model over all texts; within it, the means can be read.

    Args:
        model: run in ``eval()``, without its head.
        text: the pass over the texts.
        most_texts: how many there may be, as far as that is known, to see whether they will fit.
        directory: where the means stay: ``text_means.npy``, float32 [texts, units], and
            ``texts.json`` with the sites' widths and each text's label and number within its
            corpus. None takes a directory for temporary files, and removes it at the end.

    Raises:
        InputError: the disk or the directory cannot take them, a layer's outputs cannot be told
            apart by text or are not finite, or a layer did not run.
    """
    widths = linear_widths(model)
    with _place(directory) as place:
        file_path, texts = place / _VALUES, []
        _check_room(place, most_texts * sum(widths.values()) * 4)
        with _opened(file_path, "wb") as file:
            _write_header(file, 0, sum(widths.values()))
        # Closed at once if something goes wrong, so that the model is left as it was.
        with closing(_rows(model, text, widths)) as batches:
            for label, batch, rows in batches:
                _check_room(place, rows.nbytes)
                with _opened(file_path, "ab") as file:
                    file.write(rows.numpy())
                texts += [(label, number) for number in batch.numbers]
        with _opened(file_path, "r+b") as file:
            _write_header(file, len(texts), sum(widths.values()))
        with _opened(place / _TEXTS, "wb") as file:
            file.write(json.dumps({"sites": widths, "texts": texts}).encode())
        index = {label: number for number, label in enumerate(text.labels)}
        classes = np.array([index[label] for label, _ in texts], np.int32)
        yield TextMeans(np.load(file_path, mmap_mode="r"), classes)


def _rows(
    model: nn.Module, text: DocumentPass, widths: Mapping[str, int]
) -> Generator[tuple[str, DocumentBatch, Tensor], None, None]:
    """Label, batch and the batch's means, float32 [batch, units] on the CPU."""
    bare = bare_model(model)
    with evaluating(model), headless(bare), _Summing(model, widths) as summing, torch.no_grad():
        for label in text.labels:
            for batch in text.batches(label):
                summing.start(batch)
                bare(**batch.inputs)
                yield label, batch, summing.means(label)


class _Summing:
    """Hooks on all linear layers that add up their outputs over each text's tokens."""

    def __init__(self, model: nn.Module, widths: Mapping[str, int]) -> None:
        ends = np.cumsum([*widths.values()]).tolist()
        self._columns = {
            path: slice(end - width, end)
            for (path, width), end in zip(widths.items(), ends, strict=True)
        }
        self._units = ends[-1]
        self._linears = find_linears(model)

    def __enter__(self) -> _Summing:
        self._hooks = [
            module.register_forward_hook(
                lambda module, given, output, path=path: self._add(path, output)
            )
            for path, module in self._linears.items()
        ]
        return self

    def __exit__(self, *exception: object) -> None:
        for hook in self._hooks:
            hook.remove()

    def start(self, batch: DocumentBatch) -> None:
        self._mask, self._lengths = batch.mask, torch.tensor(batch.lengths)
        self._padded = not bool(batch.mask.all())
        self._sums = torch.zeros(len(batch.numbers), self._units)
        self._calls = dict.fromkeys(self._columns, 0)

    def means(self, label: str) -> Tensor:
        """Of what was added since `start`; a layer that ran several times has them all in it."""
        for path, calls in self._calls.items():
            if not calls:
                raise InputError(
                    f"linear layer {path} did not run in a forward pass, so its outputs have no "
                    "means; use a model of which every linear layer runs"
                )
            self._sums[:, self._columns[path]] /= (calls * self._lengths)[:, None]
            if not self._sums[:, self._columns[path]].isfinite().all():
                raise InputError(
                    f"{path}: its mean output over a text of label {label!r} is not finite (NaN or "
                    "infinite); check the model's weights or use a wider dtype"
                )
        return self._sums

    def _add(self, path: str, output: Tensor) -> None:
        shape = self._mask.shape
        if output.shape[:-1] not in (shape, (shape.numel(),)):
            raise InputError(
                f"linear layer {path} must give one output per token, {list(shape)} in front, but "
                f"gives {list(output.shape)}, which cannot be told apart by text; use a model "
                "without such a layer"
            )
        outputs = output.reshape(*shape, -1)
        if self._padded:  # replaced, not multiplied by 0, since padding may give a NaN
            outputs = outputs.masked_fill(~self._mask[..., None].to(output.device), 0)
        self._sums[:, self._columns[path]] += outputs.sum(1, dtype=torch.float32).cpu()
        self._calls[path] += 1


@contextmanager
def _place(directory: str | PathLike[str] | None) -> Iterator[Path]:
    if directory is not None:
        with write_directory(directory) as place:
            yield place
    else:
        with tempfile.TemporaryDirectory(prefix="lapefast-") as place:
            yield Path(place)


def _check_room(place: Path, size: int) -> None:
    free = shutil.disk_usage(place).free
    if size > free:
        raise InputError(
            f"the means of all texts take {size / 2**30:.1f} GiB on disk, but {place.parent} has "
            f"only {free / 2**30:.1f} GiB free; make room or give a directory on another disk"
        )


def _write_header(file: IO[bytes], texts: int, units: int) -> None:
    """That of an array of so many texts; NumPy pads it, so that it has one length for all."""
    content: dict[str, Any] = {"descr": "<f4", "fortran_order": False, "shape": (texts, units)}
    np.lib.format.write_array_header_1_0(file, content)


@contextmanager
def _opened(path: Path, mode: str) -> Iterator[IO[bytes]]:
    """A file to write to; what the disk refuses when the file is closed is told as well."""
    try:
        with open(path, mode) as file:
            yield file
    except OSError as error:
        raise InputError(
            f"cannot write the means of texts to {path.parent.parent}: {error.strerror}; make room "
            "or give a directory on another disk"
        ) from error

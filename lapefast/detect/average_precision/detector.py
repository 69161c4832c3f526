"""Average-precision neurons (Kojima et al., NAACL 2024, arXiv 2404.02431)."""

from __future__ import annotations

import logging
import os
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor, nn

from lapefast.detect.average_precision.scores import (
    average_precision_scores,
    class_precision_scores,
)
from lapefast.detect.average_precision.text_means import linear_widths, text_means
from lapefast.errors import InputError
from lapefast.models.inputs import context_limit
from lapefast.neurons import Layout, NeuronSets
from lapefast.profiling.about import about_run
from lapefast.profiling.documents import DocumentPass
from lapefast.sealed import SealedFile

__all__ = [
    "AveragePrecisionNeurons",
    "average_precision",
    "average_precision_scores",
    "check_request",
]

_FILE = SealedFile(
    "average-precision file", "1", "average_precision", "`lapefast identify --details`"
)

logger = logging.getLogger(__name__)

_LONGEST = 256  # tokens of a text, in the paper


class AveragePrecisionNeurons(NeuronSets):
    """For each label the units that tell its texts best from the others', either way.

    Neuron sets whose sites are linear layers and whose neurons are the layers' outputs. Units are
    also counted through all sites, in model order.

    Args:
        labels: what the texts are grouped by.
        layout: the linear layers with their widths.
        scores: average precision, float64 [labels, units].
        chosen: the label's units, int64 [labels, n]: first those of highest score.
        medians: float64 [labels, n], the median of each such unit over the label's texts.
        top_count: how many of the n are of highest score; the others are of lowest.
        metadata: how they were found, as JSON.

    Attributes:
        top, bottom: `NeuronSets` of the units of highest score, which respond to the label's
            texts, and of lowest, which respond against them.

    Raises:
        InputError: shapes, dtypes or units are not as said.
    """

    def __init__(
        self,
        labels: Sequence[str],
        layout: Layout,
        scores: Tensor,
        chosen: Tensor,
        medians: Tensor,
        top_count: int,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        units = sum(layout.widths[site] for site in layout.sites)
        rows = f"[{len(labels)}"
        if scores.dtype != torch.float64 or scores.shape != (len(labels), units):
            raise InputError(
                f"scores must be float64 [labels, units] = {rows}, {units}], got "
                f"{scores.dtype} {list(scores.shape)}"
            )
        if chosen.dtype != torch.int64 or chosen.dim() != 2 or len(chosen) != len(labels):
            raise InputError(
                f"chosen must be int64 [labels, n] = {rows}, n], got "
                f"{chosen.dtype} {list(chosen.shape)}"
            )
        if medians.dtype != torch.float64 or medians.shape != chosen.shape:
            raise InputError(
                f"medians must be float64 like chosen, {list(chosen.shape)}, got "
                f"{medians.dtype} {list(medians.shape)}"
            )
        if chosen.numel() and not 0 <= int(chosen.min()) <= int(chosen.max()) < units:
            raise InputError(f"chosen must be units from 0 to {units - 1}")

        def sets(columns: slice) -> dict[str, dict[str, Tensor]]:
            return {
                label: _by_site(row[columns].sort().values, layout)
                for label, row in zip(labels, chosen, strict=True)
            }

        super().__init__(sets(slice(None)), layout, metadata)

        def part(name: str, columns: slice) -> NeuronSets:
            return NeuronSets(sets(columns), layout, {**self.metadata, "part": name})

        self.top = part("top", slice(top_count))
        self.bottom = part("bottom", slice(top_count, None))
        self._scores, self._chosen, self._medians = scores, chosen, medians
        self._top_count = top_count

    def scores(self, label: str) -> dict[str, Tensor]:
        """Site -> average precision of its outputs, float64 [width].

        Raises:
            InputError: there is no such label.
        """
        return self._split(self._scores[self._index(label)])

    def medians(self, label: str) -> dict[str, Tensor]:
        """Site -> median over the label's texts of each chosen output's mean, float64 [width].

        ``lf.activate(found["ja"], found.medians("ja"))`` is the paper's control. Outputs that are
        not among the label's have NaN, which no edit takes.

        Raises:
            InputError: there is no such label.
        """
        index = self._index(label)
        values = torch.full_like(self._scores[index], torch.nan)
        values[self._chosen[index]] = self._medians[index]
        return self._split(values)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write everything to a path that ends in `.safetensors`.

        At any other path the sets alone are written, without scores and medians; see
        `NeuronSets.save`.

        Raises:
            InputError: the file cannot be written; then nothing is.
        """
        if not os.fspath(path).endswith(".safetensors"):
            super().save(path)
            return
        about = {
            "labels": self.labels,
            "sites": [[site, self.layout.widths[site]] for site in self.layout.sites],
            "fingerprint": self.layout.fingerprint,
            "model": self.layout.model,
            "top_count": self._top_count,
            "metadata": self.metadata,
        }
        tensors = {"scores": self._scores, "chosen": self._chosen, "medians": self._medians}
        _FILE.write(path, tensors, about)

    @classmethod
    def load(
        cls, path: str | os.PathLike[str], labels: Sequence[str] | None = None
    ) -> AveragePrecisionNeurons:
        """Read a `.safetensors` file that `save` wrote.

        Args:
            path: the file.
            labels: the labels to take; by default all.

        Raises:
            InputError: the file is missing, cut short, damaged, of another kind or of another
                format version, or lacks a label.
        """
        try:
            found = cls(*_FILE.read(path, _arguments))
        except InputError as error:
            raise InputError(f"cannot load {path}: {error}") from error
        if labels is None:
            return found
        rows = [found._index(label) for label in labels]
        tensors = found._scores[rows], found._chosen[rows], found._medians[rows]
        return cls(labels, found.layout, *tensors, found._top_count, found.metadata)

    def _index(self, label: str) -> int:
        if label not in self.labels:
            raise InputError(f"there is no label {label!r}; there are {', '.join(self.labels)}")
        return self.labels.index(label)

    def _split(self, values: Tensor) -> dict[str, Tensor]:
        parts = values.split([self.layout.widths[site] for site in self.layout.sites])
        return dict(zip(self.layout.sites, parts, strict=True))


def average_precision(
    model: nn.Module,
    tokenizer: Any,
    texts: Mapping[str, Any],
    top: int = 1000,
    bottom: int = 1000,
    seq_len: int | None = None,
    batch_size: int | None = None,
    max_documents: int | None = None,
    progress: bool = True,
    *,
    directory: str | os.PathLike[str] | None = None,
    document: str = "line",
    field: str = "text",
    special_tokens: bool = True,
) -> AveragePrecisionNeurons:
    """The linear layers' outputs that tell each label's texts from all other texts.

    A unit is one output of one linear layer, the head aside, before activation and rotary
    embedding. Its score for a text is its mean over the text's tokens, special tokens included;
    for a label it is judged by `average_precision_scores` with the label's texts as the positive
    ones. Over the whole model, the `top` units of highest and the `bottom` of lowest average
    precision are the label's; ties go by site and index, and a unit is taken once.

    Args:
        model: any model whose linear layers all run, one output per token.
        tokenizer: for texts; None for token ids.
        texts: label -> documents, in any form that `lapefast.corpus.Corpus` reads; the paper takes
            500 of each of six languages.
        top, bottom: units per label. Where the model has fewer, all are taken, in this
            proportion, and `metadata["notes"]` says so.
        seq_len: texts of more tokens are dropped, and `metadata["notes"]` says how many; None is
            the smaller of the model's limit and 256.
        batch_size: texts per forward pass; None chooses one that fits the memory.
        max_documents: texts read of each label; None reads all.
        progress: show a bar.
        directory: keep the means of all texts in this new directory, as ``text_means.npy``,
            float32 [texts, units], and ``texts.json``. None takes a temporary one and removes it.
            They take 4 bytes per text and unit: 15 GiB for 3,000 texts and a model of 7B.
        document, field, special_tokens: how text is read, as in `lapefast.profile`.

    Raises:
        InputError: fewer than two labels, or what is wrong with the model, the texts, the
            arguments or the disk.
    """
    check_request(texts, top, bottom)
    text = DocumentPass(
        model,
        texts,
        tokenizer,
        min(context_limit(model) or _LONGEST, _LONGEST) if seq_len is None else seq_len,
        "drop",
        max_documents,
        batch_size,
        progress,
        document=document,
        field=field,
        special_tokens=special_tokens,
    )
    widths, notes = linear_widths(model), []
    if top + bottom > (units := sum(widths.values())):
        notes.append(f"{top + bottom} units were asked for, but the model has only {units}")
        top = units * top // (top + bottom)
        bottom = units - top
    most_texts = sum(_most(source, max_documents) for source in texts.values())
    with text_means(model, text, most_texts, directory) as means:
        scores = class_precision_scores(means.values.T, means.classes, len(text.labels))
        chosen = np.stack([_extremes(row, top, bottom) for row in scores.numpy()])
        medians = np.stack([means.medians(index, row) for index, row in enumerate(chosen)])

    read, about = text.metadata(), about_run(model, tokenizer)
    for corpus in read["corpora"]:
        if corpus["longer"]:
            notes.append(
                f"label {corpus['label']!r}: {corpus['longer']} of {corpus['documents']} texts "
                f"have over {text.seq_len} tokens and were dropped"
            )
    for note in notes:
        logger.warning("average precision: %s", note)
    return AveragePrecisionNeurons(
        text.labels,
        Layout(tuple(widths), widths, about["fingerprint"], about["model"]),
        scores,
        torch.from_numpy(chosen),
        torch.from_numpy(medians),
        top,
        {
            "method": "average-precision",
            "parameters": {"top": top, "bottom": bottom},
            "notes": notes,
            **about,
            **read,
        },
    )


def check_request(texts: Mapping[str, Any], top: int, bottom: int) -> None:
    """Raises InputError for what is wrong with the arguments whatever the model is."""
    if not isinstance(texts, Mapping):
        raise InputError(f"texts must be a dict from label to texts, got {type(texts).__name__}")
    if len(texts) < 2:
        raise InputError(
            "average precision tells a label's texts from those of others and needs at least two "
            f"labels, got {', '.join(map(repr, texts)) or 'none'}"
        )
    for name, value in (("top", top), ("bottom", bottom)):
        if type(value) is not int or value < 0:
            raise InputError(f"{name} must be an integer of at least 0, got {value!r}")
    if not top + bottom:
        raise InputError("top and bottom are both 0; ask for some units")


def _extremes(scores: np.ndarray, top: int, bottom: int) -> np.ndarray:
    """The units of highest and of lowest score, ties by unit; int64 [top + bottom]."""
    highest = np.argsort(-scores, kind="stable")[:top]
    lowest = np.argsort(scores, kind="stable")
    lowest = lowest[np.isin(lowest, highest, invert=True)][:bottom]
    return np.concatenate([np.sort(highest), np.sort(lowest)])


def _most(source: Any, max_documents: int | None) -> int:
    """How many texts a source has at most, where that is plain to see; otherwise 0."""
    return len(source[:max_documents]) if isinstance(source, (list, tuple)) else 0


def _by_site(units: Tensor, layout: Layout) -> dict[str, Tensor]:
    """Units counted through all sites, sorted, as indices within each site."""
    widths = [layout.widths[site] for site in layout.sites]
    ends = torch.tensor(widths).cumsum(0)
    counts = torch.searchsorted(units, ends).diff(prepend=torch.tensor([0]))
    parts = units.split(counts.tolist())
    return {
        site: part - (end - width)
        for site, part, end, width in zip(layout.sites, parts, ends.tolist(), widths, strict=True)
    }


def _arguments(about: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    widths = {site: int(width) for site, width in about["sites"]}
    layout = Layout(tuple(widths), widths, about["fingerprint"], about["model"])
    values = tensors.pop("scores"), tensors.pop("chosen"), tensors.pop("medians")
    return list(about["labels"]), layout, *values, int(about["top_count"]), dict(about["metadata"])

"""The perplexity matrix: what a language's neurons do to the text of every language.

Tang et al., ACL 2024, arXiv 2402.16438, section 4.2.
"""

from __future__ import annotations

import math
import os
from collections.abc import Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, field
from typing import Any

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lapefast import __version__, display
from lapefast.corpus import open_corpora
from lapefast.errors import InputError
from lapefast.evaluate.likelihood import TokenLikelihood
from lapefast.evaluate.random_sets import random_like
from lapefast.evaluate.result_file import ResultFile
from lapefast.models.bare import bare_model, evaluating
from lapefast.models.inputs import input_device, row_length, vocabulary_size
from lapefast.neurons import NeuronSet, NeuronSets, deactivate
from lapefast.profiling.batches import fitting_batch_size
from lapefast.recording import record
from lapefast.steering import steer

__all__ = ["UNEDITED", "PerplexityMatrix", "matrix_of_passes", "perplexity_matrix"]

_FILE = ResultFile("matrix file", "lapefast perplexity matrix")
UNEDITED = "none"


@dataclass
class PerplexityMatrix:
    """Mean negative log-likelihoods per token, in nats.

    Attributes:
        rows: "none" (the unedited model), then the labels whose neurons were deactivated, or that
            experts were pruned for.
        columns: the labels of the texts.
        nll: float64 [rows, columns].
        random_nll: float64 [rows, columns], the mean over random sets of equal size per layer.
        random_range: float64 [rows, columns, 2], the least and the largest of them.
        tokens: predicted tokens per column.
        metadata: JSON-able settings: seq_len, batch_size, random_sets, seed and so on.
    """

    rows: list[str]
    columns: list[str]
    nll: Tensor
    random_nll: Tensor
    random_range: Tensor
    tokens: list[int]
    metadata: dict[str, Any] = field(default_factory=dict)

    @property
    def of_experts(self) -> bool:
        """Whether experts were pruned for the labels, as by `lapefast.evaluate.pruning_matrix`."""
        return "pruning" in self.metadata

    @property
    def perplexity(self) -> Tensor:
        """float64 [rows, columns]."""
        return self.nll.exp()

    def changes(self) -> Tensor:
        """Perplexity less that of the unedited model, float64 [rows - 1, columns]."""
        return self.perplexity[1:] - self.perplexity[0]

    def random_changes(self) -> Tensor:
        """The same for the random sets: least and largest, float64 [rows - 1, columns, 2]."""
        return self.random_range[1:].exp() - self.perplexity[0, :, None]

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row per row of the matrix ("none" first) and text.

        Columns: ``deactivated`` (of experts ``pruned_for``), ``text``, ``tokens``, ``nll`` (nats
        per token), ``perplexity``, ``change`` (of perplexity), ``random_nll``,
        ``random_nll_least``, ``random_nll_largest``.
        """
        import pandas

        perplexity = self.perplexity
        values = torch.stack(
            [
                self.nll,
                perplexity,
                perplexity - perplexity[0],
                self.random_nll,
                *self.random_range.unbind(-1),
            ],
            dim=-1,
        ).tolist()
        rows = [
            (label, text, self.tokens[column], *values[row][column])
            for row, label in enumerate(self.rows)
            for column, text in enumerate(self.columns)
        ]
        names = ["pruned_for" if self.of_experts else "deactivated"]
        names += ["text", "tokens", "nll", "perplexity", "change"]
        names += ["random_nll", "random_nll_least", "random_nll_largest"]
        return pandas.DataFrame(rows, columns=names)

    def _repr_html_(self) -> str:
        changes = self.changes().tolist()
        most = max((abs(one) for row in changes for one in row), default=0) or 1
        done = "with experts pruned for a label" if self.of_experts else "without a label's neurons"
        return display.table(
            f"Change of perplexity of each text (columns) {done} (rows)",
            ["", *self.columns],
            [
                [label, *(f"{one:+.2f}" for one in row)]
                for label, row in zip(self.rows[1:], changes, strict=True)
            ],
            [[one / most for one in row] for row in changes],
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the matrix as JSON. Raises InputError where the file cannot be written."""
        content = {
            "rows": self.rows,
            "columns": self.columns,
            "nll": self.nll.tolist(),
            "random_nll": self.random_nll.tolist(),
            "random_range": self.random_range.tolist(),
            "tokens": self.tokens,
            "metadata": self.metadata,
        }
        _FILE.write(path, content)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> PerplexityMatrix:
        """Read what `save` wrote. Raises InputError for anything else."""
        return _FILE.read(path, _parsed)


def perplexity_matrix(
    model: nn.Module,
    neurons: NeuronSets,
    corpora: Mapping[str, Any],
    tokenizer: Any = None,
    *,
    seq_len: int | None = None,
    batch_size: int | None = None,
    max_tokens: int | None = 2**20,
    random_sets: int = 5,
    seed: int = 0,
    progress: bool = True,
    **corpus_options: Any,
) -> PerplexityMatrix:
    """Deactivate each label's neurons in turn, and measure the likelihood of every label's text.

    Args:
        model: a causal language model with its head.
        neurons: the neuron sets; published ones are bound to the model.
        corpora: label -> text, as for `lapefast.profile`.
        tokenizer: for texts.
        seq_len: tokens per row, of which all but the first are predicted; None takes the model's
            limit, at most 2048.
        batch_size: rows per forward pass; None chooses one that fits the memory.
        max_tokens: tokens read per label, whole rows; None reads all.
        random_sets: how many random sets of equal size per layer each label is compared with.
        seed: of the random sets.
        progress: show a bar.
        corpus_options: `document`, `field`, `special_tokens`.

    Raises:
        InputError: the model predicts no next token, the neurons do not fit it, a corpus cannot
            be read, or a likelihood is not finite.
    """
    if batch_size is not None and batch_size < 1:
        raise InputError(f"batch_size must be at least 1, got {batch_size}")
    if random_sets < 1:
        raise InputError(f"random_sets must be at least 1, got {random_sets}")
    if UNEDITED in neurons.labels:
        raise InputError(f"a label named {UNEDITED!r} stands for the unedited model; rename it")
    neurons = neurons.bind(model)
    TokenLikelihood(model)  # refuses what predicts no next token
    texts, about = _read(model, corpora, tokenizer, seq_len, max_tokens, corpus_options)
    longest = max(rows.shape[1] for rows in texts.values())
    batch_size = batch_size or fitting_batch_size(model, longest)
    generator = torch.Generator().manual_seed(seed)
    passes = [NeuronSet({}, None, neurons.layout)]
    for neuron_set in neurons.values():
        passes += [neuron_set, *(random_like(neuron_set, generator) for _ in range(random_sets))]
    return matrix_of_passes(
        model,
        passes,
        neurons.labels,
        {label: rows.split(batch_size) for label, rows in texts.items()},
        {
            "model": neurons.layout.model,
            "fingerprint": neurons.fingerprint,
            "dtype": str(model.dtype).removeprefix("torch."),
            "seq_len": {label: rows.shape[1] for label, rows in texts.items()},
            "batch_size": batch_size,
            "max_tokens": max_tokens,
            "random_sets": random_sets,
            "seed": seed,
            "threads": torch.get_num_threads(),
            "neurons": {label: neurons[label].total for label in neurons},
            "corpora": about,
            "neurons_method": neurons.metadata.get("method"),
            "lapefast": __version__,
            "torch": torch.__version__,
        },
        progress,
    )


def matrix_of_passes(
    model: nn.Module,
    passes: Sequence[NeuronSet],
    labels: Sequence[str],
    texts: Mapping[str, Sequence[Tensor]],
    metadata: dict[str, Any],
    progress: bool,
) -> PerplexityMatrix:
    """The matrix of passes over all texts, in each of which some neurons are deactivated.

    Args:
        model: a causal language model with its head.
        passes: none, and then for each label its neurons and the random sets in place of them.
        labels: of the rows after the first.
        texts: label -> batches of rows of token ids, int64 [rows, length].
        metadata: of the matrix; its ``random_sets`` says how many there are of each label.
        progress: show a bar.

    Raises:
        InputError: there is no label, the model predicts no next token, a text has rows of one
            token, or a likelihood is not finite.
    """
    if not labels:
        raise InputError("a matrix needs a label whose neurons are deactivated, got none")
    likelihood = TokenLikelihood(model)
    tokens = {label: sum(rows[:, 1:].numel() for rows in texts[label]) for label in texts}
    for label, predicted in tokens.items():
        if not predicted:
            raise InputError(
                f"label {label!r}: rows must have at least 2 tokens, since the first of a row has "
                "no prediction, got 1"
            )
    rows = sum(len(batch) for batches in texts.values() for batch in batches)
    measured = torch.empty(len(passes), len(texts), dtype=torch.float64)
    with (
        evaluating(model),
        tqdm(
            total=len(passes) * rows, desc="perplexity", unit="row", disable=not progress, delay=1
        ) as bar,
    ):
        for row, neurons in zip(measured, passes, strict=True):
            with steer(model, deactivate(neurons)) if neurons.total else nullcontext():
                for column, (label, batches) in enumerate(texts.items()):
                    total = 0.0
                    for batch in batches:
                        total += likelihood(batch)
                        if not math.isfinite(total):
                            raise _not_finite(model, label, batch)
                        bar.update(len(batch))
                    row[column] = total / tokens[label]
    unedited, edited = (
        measured[:1],
        measured[1:].view(len(labels), 1 + metadata["random_sets"], len(texts)),
    )
    own, random = edited[:, 0], edited[:, 1:]
    ends = [torch.cat([unedited, end]) for end in (random.amin(1), random.amax(1))]
    return PerplexityMatrix(
        rows=[UNEDITED, *labels],
        columns=list(texts),
        nll=torch.cat([unedited, own]),
        random_nll=torch.cat([unedited, random.mean(1)]),
        random_range=torch.stack(ends, dim=-1),
        tokens=list(tokens.values()),
        metadata=metadata,
    )


def _parsed(content: Mapping[str, Any]) -> PerplexityMatrix:
    rows, columns = content["rows"], content["columns"]
    values = {
        name: torch.tensor(content[name], dtype=torch.float64)
        for name in ("nll", "random_nll", "random_range")
    }
    if len(rows) < 2 or not columns:
        raise ValueError("it is of no label or of no text")
    if any(tuple(value.shape[:2]) != (len(rows), len(columns)) for value in values.values()):
        raise ValueError("shapes differ")
    if not all(value.isfinite().all() for value in values.values()):
        raise ValueError("a likelihood is not finite")
    tokens, metadata = content["tokens"], content["metadata"]
    return PerplexityMatrix(rows, columns, **values, tokens=tokens, metadata=metadata)


def _not_finite(model: nn.Module, label: str, batch: Tensor) -> InputError:
    """The error of a likelihood that is NaN or infinite; it names the site, if one is to blame."""
    try:
        with torch.no_grad(), record(model, [label]) as recorder:
            recorder.set(label=label)
            bare_model(model)(batch.to(input_device(model)))
            recorder.profile()
    except InputError as error:
        return error
    return InputError(
        f"the likelihood of the text of label {label!r} is not finite (NaN or infinite); check the "
        "model's weights or use a wider dtype"
    )


def _read(
    model: nn.Module,
    corpora: Mapping[str, Any],
    tokenizer: Any,
    seq_len: int | None,
    max_tokens: int | None,
    options: Mapping[str, Any],
) -> tuple[dict[str, Tensor], list[dict[str, Any]]]:
    """Label -> rows of token ids, and what is said of the texts they come from."""
    length = row_length(model, seq_len)
    opened = open_corpora(
        corpora, tokenizer, seq_len=seq_len, vocab_size=vocabulary_size(model), **options
    )
    texts, about = {}, []
    for corpus in opened:
        with corpus.rows(row_length(model, corpus.row_length or length), max_tokens) as rows:
            texts[corpus.label] = torch.cat(list(rows))
        about.append(corpus.report.to_json())
    return texts, about

"""What the neurons of each sharing category do for the answers to parallel prompts.

Wang et al., 2024, arXiv 2406.09265.
"""

from __future__ import annotations

import inspect
import math
import os
from collections import defaultdict
from collections.abc import Iterator, Sequence
from contextlib import nullcontext
from dataclasses import asdict, dataclass, field
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lapefast import __version__
from lapefast.detect.sharing.categories import Category, sharing_categories
from lapefast.detect.sharing.examples import Examples, Prompt, read_examples, source_name
from lapefast.detect.sharing.last_tokens import reading_last_tokens
from lapefast.errors import InputError
from lapefast.evaluate.likelihood import TokenLikelihood
from lapefast.evaluate.random_sets import random_like
from lapefast.evaluate.result_file import ResultFile
from lapefast.models.bare import evaluating, unwrap
from lapefast.models.inputs import forward_inputs, input_device
from lapefast.neurons import Edit, Layout, NeuronSet, deactivate
from lapefast.profiling.batches import fitting_batch_size
from lapefast.steering import steer

__all__ = ["CategoryDeactivation", "CategoryRow", "category_deactivation"]

_FILE = ResultFile("deactivation file", "lapefast category deactivation")
_UNEDITED = "none"

_Condition = tuple[Category | None, int | None]
"""The category deactivated, None for none; the random set in place of it, None for itself."""


@dataclass(frozen=True)
class CategoryRow:
    """The answers to one label's prompts, with one category's neurons deactivated.

    Attributes:
        category: its name; "none" for the unedited model.
        label: of the prompts.
        answers, tokens: how many, and of how many tokens together.
        neurons: deactivated in an example, mean over the answers.
        nll: mean of -ln p per token of the answers, in nats.
        accuracy: share of answers whose first token is the most likely one after the prompt.
        random_nll, random_accuracy: the same with each random set; empty for the unedited model.
    """

    category: str
    label: str
    answers: int
    tokens: int
    neurons: float
    nll: float
    accuracy: float
    random_nll: list[float]
    random_accuracy: list[float]


@dataclass
class CategoryDeactivation:
    """What `category_deactivation` found.

    Attributes:
        rows: of the unedited model, then of each category, by label.
        metadata: JSON-able settings.
    """

    rows: list[CategoryRow]
    metadata: dict[str, Any] = field(default_factory=dict)

    def to_pandas(self) -> Any:
        """A table with a row as each of `rows`, random sets by mean, least and largest."""
        import pandas

        table = pandas.DataFrame([asdict(row) for row in self.rows])
        for name in ("random_nll", "random_accuracy"):
            values = table.pop(name)
            for suffix, of in (("", _mean), ("_least", min), ("_largest", max)):
                table[name + suffix] = [of(one) if one else None for one in values]
        return table

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write JSON. Raises InputError where the file cannot be written."""
        _FILE.write(path, asdict(self))

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> CategoryDeactivation:
        """Read what `save` wrote. Raises InputError for anything else."""
        return _FILE.read(
            path,
            lambda content: cls(
                [CategoryRow(**row) for row in content["rows"]], content["metadata"]
            ),
        )


def category_deactivation(
    model: nn.Module,
    tokenizer: Any,
    examples: Examples,
    threshold: float = 0.0,
    *,
    values: Literal["activation", "product"] = "activation",
    random_sets: int = 5,
    seed: int = 0,
    batch_size: int | None = None,
    progress: bool = True,
) -> CategoryDeactivation:
    """Deactivate each category's neurons, example by example, and see what becomes of the answers.

    An example's categories are found at the last tokens of its own prompts, as by
    `lapefast.detect.sharing`. Then the neurons of one category are deactivated at every position of
    the prompts and answers; beside it stand the unedited model and random sets of equal size per
    layer. Where an example has no neuron of a category, nothing is deactivated, and it counts.

    Args:
        model: a causal language model with its head.
        tokenizer, examples, threshold, values: as `lapefast.detect.sharing` takes them; prompts
            without an answer only serve to find the categories.
        random_sets: how many each category of each example is compared with.
        seed: of the random sets.
        batch_size: sequences per forward pass; None chooses one that fits the memory.
        progress: show a bar.

    Raises:
        InputError: the model predicts no next token, there is no answer, a likelihood is not
            finite, or for what else is wrong with the model, the examples or the arguments.
    """
    for name, count in (("random_sets", random_sets), ("batch_size", batch_size)):
        if (count is not None or name == "random_sets") and (type(count) is not int or count < 1):
            raise InputError(f"{name} must be an integer of at least 1, got {count!r}")
    if values not in ("activation", "product"):
        raise InputError(f"values must be 'activation' or 'product', got {values!r}")
    if type(threshold) not in (int, float) or not math.isfinite(threshold):
        raise InputError(f"threshold must be a finite number, got {threshold!r}")
    TokenLikelihood(model)  # refuses what predicts no next token
    parallel = read_examples(examples, tokenizer, model)
    labels = parallel.labels
    answered = [
        label for label in labels if any(example[label].answer for example in parallel.examples)
    ]
    if not answered:
        raise InputError("no example has an answer; give some, as pairs (prompt, answer)")
    # With two labels there is no partial sharing.
    categories = [one for one in Category if one != Category.PARTIAL_SHARED or len(labels) > 2]
    batch_size = batch_size or fitting_batch_size(model, parallel.longest)
    layout = Layout(()).bind(model)
    generator = torch.Generator().manual_seed(seed)
    found: dict[tuple[_Condition, str], _Answers] = defaultdict(_Answers)
    group = max(1, batch_size // len(labels))
    with (
        evaluating(model),
        tqdm(
            total=len(parallel.examples), desc="categories", unit="example", disable=not progress
        ) as bar,
    ):
        for start in range(0, len(parallel.examples), group):
            part = parallel.examples[start : start + group]
            codes = _categories(model, part, threshold, values, batch_size)
            for number, example in enumerate(part):
                own = {site: of_site[number] for site, of_site in codes.items()}
                sequences = [
                    (condition, label, prompt, edit)
                    for condition, edit in _edits(own, categories, layout, random_sets, generator)
                    for label, prompt in example.items()
                    if prompt.answer
                ]
                for at in range(0, len(sequences), batch_size):
                    batch = sequences[at : at + batch_size]
                    measured = _measure(model, [one[2] for one in batch], [one[3] for one in batch])
                    for (condition, label, prompt, edit), (nll, hit) in zip(
                        batch, measured, strict=True
                    ):
                        found[condition, label].add(prompt, edit, nll, hit)
                bar.update()

    def row(category: Category | None, label: str) -> CategoryRow:
        own = found[(category, None), label]
        sets = range(0 if category is None else random_sets)
        others = [found[(category, index), label] for index in sets]
        return CategoryRow(
            category=_UNEDITED if category is None else category.title,
            label=label,
            answers=own.answers,
            tokens=own.tokens,
            neurons=own.neurons / own.answers,
            nll=own.nll / own.tokens,
            accuracy=own.hits / own.answers,
            random_nll=[one.nll / one.tokens for one in others],
            random_accuracy=[one.hits / one.answers for one in others],
        )

    return CategoryDeactivation(
        [row(category, label) for category in (None, *categories) for label in answered],
        {
            "model": layout.model,
            "fingerprint": layout.fingerprint,
            "dtype": str(unwrap(model).dtype).removeprefix("torch."),
            "tokenizer": getattr(tokenizer, "name_or_path", None),
            "threshold": threshold,
            "values": values,
            "examples": len(parallel.examples),
            "dropped": parallel.dropped,
            "examples_source": source_name(examples),
            "notes": parallel.notes,
            "random_sets": random_sets,
            "seed": seed,
            "batch_size": batch_size,
            "threads": torch.get_num_threads(),
            "lapefast": __version__,
            "torch": torch.__version__,
        },
    )


@dataclass
class _Answers:
    """Sums over the answers of one label under one condition."""

    answers: int = 0
    tokens: int = 0
    neurons: int = 0
    nll: float = 0.0
    hits: int = 0

    def add(self, prompt: Prompt, edit: Edit | None, nll: float, hit: bool) -> None:
        self.answers += 1
        self.tokens += len(prompt.answer)
        self.neurons += 0 if edit is None else edit.total
        self.nll += nll
        self.hits += hit


def _categories(
    model: nn.Module,
    examples: Sequence[dict[str, Prompt]],
    threshold: float,
    values: str,
    batch_size: int,
) -> dict[str, Tensor]:
    """Site -> int8 [examples, neurons], on the CPU."""
    with reading_last_tokens(model, batch_size) as (_, read):
        found = read([prompt.ids for example in examples for prompt in example.values()])
    codes = {}
    for site, (activations, products) in found.items():
        judged = activations if values == "activation" else products.float()
        active = judged > torch.tensor(threshold, dtype=torch.float32, device=judged.device)
        by_example = active.view(len(examples), -1, active.shape[-1])
        codes[site] = sharing_categories(by_example.transpose(0, 1)).cpu()
    return codes


def _edits(
    codes: dict[str, Tensor],
    categories: Sequence[Category],
    layout: Layout,
    random_sets: int,
    generator: torch.Generator,
) -> Iterator[tuple[_Condition, Edit | None]]:
    """The edits of one example, whose neurons' categories are int8 [neurons] by site."""
    yield (None, None), None
    for category in categories:
        chosen = {site: (of_site == category).nonzero()[:, 0] for site, of_site in codes.items()}
        neurons = NeuronSet(chosen, None, layout)
        yield (category, None), _deactivated(neurons)
        for index in range(random_sets):
            yield (category, index), _deactivated(random_like(neurons, generator))


def _deactivated(neurons: NeuronSet) -> Edit | None:
    return deactivate(neurons) if neurons.total else None


@torch.no_grad()
def _measure(
    model: nn.Module, prompts: Sequence[Prompt], edits: Sequence[Edit | None]
) -> list[tuple[float, bool]]:
    """Of each answer: the sum of -ln p, and whether greedy decoding would begin with it."""
    model, device = unwrap(model), input_device(model)
    # Padded on the right by any token: a causal model does not see what follows.
    rows = nn.utils.rnn.pad_sequence(
        [torch.tensor(prompt.ids + prompt.answer) for prompt in prompts], batch_first=True
    ).to(device)
    first, length = min(len(prompt.ids) for prompt in prompts) - 1, rows.shape[1]
    options = {}
    if "logits_to_keep" in inspect.signature(model.forward).parameters:
        options["logits_to_keep"] = torch.arange(first, length - 1, device=device)
    with steer(model, list(edits)) if any(edits) else nullcontext():
        logits = model(**forward_inputs(model, rows), **options).logits
    if logits.shape[1] == length:
        logits = logits[:, first:-1]
    measured = []
    for of_row, prompt in zip(logits, prompts, strict=True):
        at = len(prompt.ids) - 1 - first
        own = of_row[at : at + len(prompt.answer)].float()
        answer = torch.tensor(prompt.answer, device=own.device)
        losses = nn.functional.cross_entropy(own, answer, reduction="none")
        nll = losses.sum(dtype=torch.float64)
        if not nll.isfinite():
            raise InputError(
                "the likelihood of an answer is not finite (NaN or infinite); check the model's "
                "weights or use a wider dtype"
            )
        measured.append((float(nll), int(own[0].argmax()) == prompt.answer[0]))
    return measured


def _mean(values: Sequence[float]) -> float:
    return sum(values) / len(values)

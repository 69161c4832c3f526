"""Sharing: which labels of a parallel example a neuron is active for.

Wang et al., 2024, arXiv 2406.09265.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from typing import Any, Literal

import torch
from torch import Tensor, nn
from tqdm.auto import tqdm

from lapefast.detect.sharing.categories import Category, count_categories, sharing_categories
from lapefast.detect.sharing.examples import (
    Examples,
    ParallelExamples,
    read_examples,
    source_name,
)
from lapefast.detect.sharing.last_tokens import reading_last_tokens
from lapefast.detect.sharing.result import Sharing, Spread
from lapefast.errors import InputError
from lapefast.models.bare import bare_model, is_encoder_decoder, unwrap
from lapefast.models.linears import out_features
from lapefast.models.structure import FFN, find_ffns
from lapefast.neurons import Layout, NeuronSets
from lapefast.profiling.about import about_run
from lapefast.profiling.batches import fitting_batch_size
from lapefast.steering.linear import dense_weight

__all__ = ["sharing"]

Values = Literal["activation", "product"]

_COLUMNS = 1024  # of a last projection's weight, taken to float64 at once


def sharing(
    model: nn.Module,
    tokenizer: Any,
    examples: Examples,
    threshold: float = 0.0,
    thresholds: Sequence[float] = (0.0, 0.1, 0.2, 0.3, 0.4, 0.5),
    *,
    values: Values = "activation",
    attribution: bool = True,
    top: int = 800,
    form: Literal["paper", "released"] = "paper",
    batch_size: int | None = None,
    progress: bool = True,
) -> Sharing:
    """Sort every neuron, example by example, by how many labels' prompts it is active for.

    A neuron is active for a prompt if its activation at the prompt's last token is over the
    threshold, strictly, in float32. With K labels it is, for that example, all-shared (active for
    all K), partial-shared (for at least two), specific (for one) or non-activated.

    Attribution, at the same token: with m a neuron's product and w its column of the last
    projection, its contribution is |m| * ||w||, and its effective score e . (m w), e the embedding
    of the answer's first token.

    Args:
        model: any whose FFNs `lapefast.models.find_sites` finds, one per layer. An encoder-decoder
            reads each prompt in the encoder and, shifted right, in the decoder.
        tokenizer: the model's; its defaults decide on special tokens, and so on the last token.
        examples: for each, label -> a prompt, a pair (prompt, answer), or a dict with ``prompt``
            and ``answer``; or a file with such JSON objects, one per line. An answer continues its
            prompt as it stands: a space between them is the answer's. Which tokens are its own is
            said at `lapefast.detect.sharing.examples.read_examples`. An example that lacks a label
            is dropped, logged, and counted in ``metadata["dropped"]`` and its ``notes``.
        threshold: over which a neuron is active.
        thresholds: of the sweep, which takes no other pass.
        values: what the threshold is for: the activation, or the product, which in a plain FFN is
            the same.
        attribution: whether to look at contributions and effective scores, which need the last
            projections' weights.
        top: how many neurons of a site count as those that contribute most; the whole site where it
            has fewer, which is noted. Ties go to the lower index.
        form: of the effective score: "paper" takes the output embedding, "released" the input
            embedding.
        batch_size: prompts per forward pass; None chooses one that fits the memory.
        progress: show a bar.

    Returns:
        Counts per example, persistent neurons, and attribution. Held at once are the values of one
        group of examples, at their last tokens.

    Raises:
        InputError: for what is wrong with the model, the examples or the arguments; for values that
            are not finite; for attribution where a last projection's weight is not dense, or an
            embedding is not there or of another size than the residual stream.
    """
    try:
        every = [_number(one, "thresholds") for one in (threshold, *thresholds)]
    except TypeError as error:
        raise InputError(f"thresholds must be a list of numbers, got {thresholds!r}") from error
    _check(values, form, top, batch_size)
    parallel = read_examples(examples, tokenizer, model)
    labels, notes = parallel.labels, parallel.notes
    batch_size = batch_size or fitting_batch_size(model, parallel.longest)
    embedding = _embedding(model, parallel, form, notes) if attribution else None
    group = max(1, batch_size // len(labels))
    layout = Layout(()).bind(model)
    with (
        reading_last_tokens(model, batch_size) as (ffns, read),
        tqdm(
            total=len(parallel.examples), desc="sharing", unit="example", disable=not progress
        ) as bar,
    ):
        tallies = [_SiteTally(ffn, labels, every, top if attribution else 0) for ffn in ffns]
        for start in range(0, len(parallel.examples), group):
            prompts = [
                example[label]
                for example in parallel.examples[start : start + group]
                for label in labels
            ]
            found = read([prompt.ids for prompt in prompts])
            words = torch.tensor([prompt.answer[0] if prompt.answer else -1 for prompt in prompts])
            answers = None if embedding is None else embedding[words.to(embedding.device)]
            for ffn, tally in zip(ffns, tallies, strict=True):
                activations, products = found[ffn.site.name]
                judged = activations if values == "activation" else products.float()
                tally.add(judged, products, words >= 0, answers)
            bar.update(len(prompts) // len(labels))
    narrow = [tally.name for tally in tallies if attribution and tally.width < top]
    if narrow:
        notes.append(f"sites with fewer than {top} neurons were taken whole: {', '.join(narrow)}")
    metadata = {
        "method": "sharing",
        "parameters": {
            "threshold": every[0],
            "thresholds": every[1:],
            "values": values,
            "attribution": attribution,
            "top": top,
            "form": form,
        },
        "notes": notes,
        **about_run(model, tokenizer),
        "examples": len(parallel.examples),
        "dropped": parallel.dropped,
        "examples_source": source_name(examples),
        "batch_size": batch_size,
    }

    def sets(names: Sequence[str], kept: str, about: Mapping[str, Any]) -> NeuronSets:
        """Name -> the neurons whose code, the name's index, never changed."""
        chosen = {
            name: {tally.name: (getattr(tally, kept) == code).nonzero()[:, 0] for tally in tallies}
            for code, name in enumerate(names)
        }
        return NeuronSets(chosen, layout, about)

    categories = [category.title for category in Category]
    return Sharing(
        labels=labels,
        counts=torch.stack([torch.cat(tally.counts) for tally in tallies], dim=1),
        thresholds=every[1:],
        sweep_counts=torch.stack([tally.sweep_counts for tally in tallies], dim=1),
        neurons=sets(labels, "owners", metadata),
        persistent=sets(categories, "codes", {**metadata, "part": "persistent"}),
        contribution=_spread(labels, [tally.contribution for tally in tallies]),
        effective=_spread(labels, [tally.effective for tally in tallies]),
        metadata=metadata,
    )


class _SiteTally:
    """What is kept of one site, group of examples after group.

    Attributes:
        counts: int64 [examples, 4] of each group.
        sweep_counts: int64 [thresholds, 4].
        codes: int8 [neurons], the category that a neuron had in every example, or -1.
        owners: int16 [neurons], the label that a neuron was specific to in every example, or -1.
        contribution, effective: over the examples' prompts.
    """

    def __init__(
        self, ffn: FFN, labels: Sequence[str], thresholds: Sequence[float], top: int
    ) -> None:
        self.name, self.width = ffn.site.name, ffn.site.width
        # In float32, as activations are compared.
        self._thresholds = torch.tensor(thresholds, dtype=torch.float32)
        self._labels, self._top = len(labels), min(top, self.width)
        self.counts: list[Tensor] = []
        self.sweep_counts = torch.zeros(len(thresholds) - 1, len(Category), dtype=torch.int64)
        self.codes: Tensor | None = None
        self.owners: Tensor | None = None
        self.contribution, self.effective = _Running(len(labels)), _Running(len(labels))
        if top:
            self._weight = _last_weight(ffn)
            self._norms = torch.cat(
                [
                    torch.linalg.vector_norm(columns.double(), dim=0)
                    for columns in self._weight.split(_COLUMNS, dim=1)
                ]
            )

    def add(
        self, judged: Tensor, products: Tensor, answered: Tensor, answers: Tensor | None
    ) -> None:
        """Take a group of examples, in each the prompts of all labels.

        Args:
            judged: float32 [examples * labels, neurons], what the thresholds are for.
            products: [examples * labels, neurons].
            answered: bool [examples * labels], which have an answer.
            answers: its first token's embedding, [examples * labels, hidden]; anything without one.
        """
        judged = judged.view(-1, self._labels, self.width)
        active, *others = (judged > one for one in self._thresholds.to(judged.device))
        codes = sharing_categories(active.transpose(0, 1))
        self.counts.append(count_categories(codes).cpu())
        for row, other in enumerate(others):
            swept = sharing_categories(other.transpose(0, 1))
            self.sweep_counts[row] += count_categories(swept).sum(0).cpu()
        owners = torch.where(codes == Category.SPECIFIC, active.to(torch.int8).argmax(1), -1)
        self.codes = _unchanged(self.codes, codes.cpu())
        self.owners = _unchanged(self.owners, owners.to(torch.int16).cpu())
        if self._top:
            self._attribute(codes, products, answered, answers)

    def _attribute(
        self, codes: Tensor, products: Tensor, answered: Tensor, answers: Tensor | None
    ) -> None:
        codes = codes.repeat_interleave(self._labels, dim=0)
        products = products.double()
        # A stable sort leaves ties in the order of their indices.
        order = (products.abs() * self._norms).sort(dim=-1, descending=True, stable=True).indices
        highest = codes.gather(-1, order[:, : self._top])
        self.contribution.add(
            count_categories(highest).double() / self._top, torch.ones_like(answered)
        )
        if answers is None or not answered.any():
            return
        at = answered.to(products.device)
        answers = answers.to(products.device)[at].double()
        pushed = [answers @ columns.double() for columns in self._weight.split(_COLUMNS, dim=1)]
        scores = products[at] * torch.cat(pushed, dim=-1)
        sums = [(scores * (codes[at] == category)).sum(-1) for category in Category]
        effective = scores.new_zeros(len(codes), len(Category))
        effective[at] = torch.stack(sums, dim=-1)
        self.effective.add(effective, answered)


class _Running:
    """Sum and range over examples, for each label and category."""

    def __init__(self, labels: int) -> None:
        self.examples = torch.zeros(labels, dtype=torch.int64)
        self.total = torch.zeros(labels, len(Category), dtype=torch.float64)
        self.least = torch.full_like(self.total, math.inf)
        self.largest = torch.full_like(self.total, -math.inf)

    def add(self, values: Tensor, given: Tensor) -> None:
        """Take float64 [examples * labels, 4], where bool [examples * labels] says so."""
        values = values.cpu().view(-1, *self.total.shape)
        given = given.view(len(values), -1)
        self.examples += given.sum(0)
        given = given[..., None]
        self.total += values.where(given, 0.0).sum(0)
        self.least = torch.minimum(self.least, values.where(given, math.inf).amin(0))
        self.largest = torch.maximum(self.largest, values.where(given, -math.inf).amax(0))


def _unchanged(before: Tensor | None, codes: Tensor) -> Tensor:
    """The code [neurons] that all examples [examples, neurons] and those before have, or -1."""
    first = codes[0] if before is None else before
    return torch.where((codes == first).all(0), first, -1)


def _spread(labels: Sequence[str], of_sites: Sequence[_Running]) -> Spread | None:
    examples = of_sites[0].examples
    seen = examples > 0
    if not seen.any():
        return None
    total, least, largest = (
        torch.stack([getattr(one, name)[seen] for one in of_sites], dim=1)
        for name in ("total", "least", "largest")
    )
    chosen = [label for label, any_seen in zip(labels, seen.tolist(), strict=True) if any_seen]
    return Spread(chosen, examples[seen], total / examples[seen][:, None, None], least, largest)


def _last_weight(ffn: FFN) -> Tensor:
    try:
        return dense_weight(ffn.last, ffn.site.name)
    except InputError as error:
        raise InputError(
            f"attribution reads the last projection of {ffn.site.name}, but its weight is not a "
            f"dense one at hand ({type(ffn.last).__name__} is quantised, adapted or offloaded); "
            "load or merge it so, or ask for attribution=False"
        ) from error


def _embedding(
    model: nn.Module, parallel: ParallelExamples, form: str, notes: list[str]
) -> Tensor | None:
    """The embedding that effective scores are taken with, [vocabulary, hidden], if any."""
    if not any(prompt.answer for example in parallel.examples for prompt in example.values()):
        return None
    if is_encoder_decoder(bare_model(model)):
        notes.append(
            "the last token of a prompt predicts no answer in an encoder-decoder, so there are no "
            "effective scores"
        )
        return None
    find = "get_output_embeddings" if form == "paper" else "get_input_embeddings"
    module = getattr(unwrap(model), find, lambda: None)()
    weight = getattr(module, "weight", None)
    if weight is None or not weight.is_floating_point() or weight.is_meta:
        raise InputError(
            f"effective scores need the {find[4:-1].replace('_', ' ')} of "
            f"{type(unwrap(model)).__name__}, which has none at hand; give the model with its head "
            "and all weights, the other form, or examples without answers"
        )
    for ffn in find_ffns(model):
        if out_features(ffn.last) != weight.shape[1]:
            raise InputError(
                f"effective scores compare embeddings of {weight.shape[1]} dimensions with what "
                f"{ffn.site.name} gives, but that has {out_features(ffn.last)}; leave the answers "
                "out of the examples"
            )
    return weight.detach()


def _check(values: str, form: str, top: int, batch_size: int | None) -> None:
    for name, given, known in (
        ("values", values, ("activation", "product")),
        ("form", form, ("paper", "released")),
    ):
        if given not in known:
            raise InputError(f"{name} must be '{known[0]}' or '{known[1]}', got {given!r}")
    for name, count in (("top", top), ("batch_size", batch_size)):
        if (count is not None or name == "top") and (type(count) is not int or count < 1):
            raise InputError(f"{name} must be an integer of at least 1, got {count!r}")


def _number(value: Any, name: str) -> float:
    try:
        number = float(value)
    except (TypeError, ValueError):
        number = math.nan
    if not math.isfinite(number):
        raise InputError(f"{name} must be finite numbers, got {value!r}")
    return number

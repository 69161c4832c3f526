"""PLND: parallel language-specific neuron detection.

Zhao et al., NeurIPS 2024, arXiv 2402.18815.
"""

from __future__ import annotations

import logging
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn

from lapefast.detect.plnd.scores import KINDS, DocumentScores, Form, Kind, Unit
from lapefast.errors import InputError
from lapefast.models import known_sites
from lapefast.models.attention import Projections
from lapefast.models.bare import bare_model, evaluating, headless, text_config
from lapefast.neurons import Layout, NeuronSets
from lapefast.profiling.about import about_run
from lapefast.profiling.documents import DocumentBatch, DocumentPass

__all__ = ["PLND", "check_request", "plnd"]

logger = logging.getLogger(__name__)

# The released defaults: neurons of an FFN and of an attention, per document and layer.
_RELEASED_TOP = {"llama": (12000, 2000), "mistral": (2000, 1000), "gemma2": (2000, 1000)}
_SHOWN = 5  # failed documents that a warning names


class PLND(NeuronSets):
    """What `plnd` found: label -> the neurons that are specific to it.

    FFN neurons lie in the FFNs' sites; queries, keys and values in those of the linear layers that
    make them. A unit of the queries and keys is two neurons: an output of each projection.

    Attributes:
        languages: label -> the neurons of the label, whether or not other labels share them: the
            intersection over its documents.
        mean_scores: label -> (kind, path) -> the mean score over its documents, float64 [width].
            Units of queries, keys and values are counted in the space of query heads.
    """

    def __init__(
        self,
        specific: Mapping[str, Mapping[str, Any]],
        languages: Mapping[str, Mapping[str, Any]],
        mean_scores: Mapping[str, Mapping[Unit, Tensor]],
        layout: Layout,
        metadata: Mapping[str, Any],
    ) -> None:
        super().__init__(specific, layout, metadata)
        note = "neurons of a label, shared with others or not"
        about = {**metadata, "part": "languages", "notes": [note]}
        self.languages = NeuronSets(languages, layout, about)
        self.mean_scores = {label: dict(scores) for label, scores in mean_scores.items()}


def plnd(
    model: nn.Module,
    tokenizer: Any,
    documents: Mapping[str, Any],
    kinds: Sequence[Kind] = KINDS,
    form: Form = "paper",
    top: int | Mapping[Kind, int] | None = None,
    threshold: float | Mapping[Kind, float] | None = None,
    seq_len: int | None = None,
    batch_size: int | None = None,
    max_documents: int | None = 1000,
    progress: bool = True,
    *,
    document: str = "line",
    field: str = "text",
    special_tokens: bool = True,
) -> PLND:
    """The neurons that matter in every document of a label, and in those of no other.

    Each document gives every neuron a score: how much the output of its block changes without it.

    | kind | "paper" | "released" |
    |---|---|---|
    | ffn | norm of down's column times that of the products over tokens | sum of abs(up) |
    | query_key | norm of the change of the map without one dimension | see below |
    | value | sum over tokens of abs(a), a the heads before the output projection | the same |

    The released code squares the norm of the map's change, and takes the product of a query's and
    a key's dimension away without the factor 1 / sqrt(dimensions) of the scores.

    Per document and layer the highest are chosen; a label's neurons are those chosen in all of its
    documents; specific to it are those that are not every label's.

    Args:
        model: a Hugging Face model whose attention goes through transformers' attention functions.
        tokenizer: for text.
        documents: label -> documents, in any form that `lapefast.corpus.Corpus` reads; at least two
            labels.
        kinds: what is scored.
        form: as the paper defines the scores, or as the released code computes them.
        top: neurons per document and layer, one number or one per kind. None takes the released
            code's: of FFN and attention 12,000 and 2,000; for Mistral and Gemma 2, 2,000 and 1,000.
            More than there are is clamped, and `metadata["notes"]` says so.
        threshold: instead of ``top``, the score above which a neuron is chosen.
        seq_len: the longest document in tokens, to which longer ones are cut; None is the smaller
            of the model's limit and 2,048.
        batch_size: documents per forward pass; None chooses one that fits the memory.
        max_documents: of each label; None takes all.
        progress: show a bar.
        document, field, special_tokens: how text is read; see `lapefast.corpus.Corpus`.

    Returns:
        The specific neurons of every label, as `NeuronSets` with more to ask; `metadata["failed"]`
        lists the documents that could not be scored, with the reason.

    Raises:
        InputError: for what is wrong with the model, the documents or the arguments, or a label
            without a document that could be scored.
    """
    kinds = check_request(documents, kinds, form, top, threshold)
    select = _Selection(model, kinds, top, threshold)
    text = DocumentPass(
        model,
        documents,
        tokenizer,
        seq_len,
        "cut",
        max_documents,
        batch_size,
        progress,
        document=document,
        field=field,
        special_tokens=special_tokens,
    )
    common: dict[str, dict[Unit, Tensor]] = {}
    means: dict[str, dict[Unit, Tensor]] = {}
    failed: list[dict[str, Any]] = []
    bare = bare_model(model)
    with (
        DocumentScores(model, kinds, form, text.batch_size) as scores,
        evaluating(model),
        headless(bare),
    ):
        for label in text.labels:
            chosen, sums, used = {}, {}, 0
            for found in _scored(scores, text, label, failed):
                for unit, values in found.items():
                    every = select(unit, values).all(0)
                    chosen[unit] = chosen[unit] & every if unit in chosen else every
                    sums[unit] = sums.get(unit, 0) + values.sum(0)
                used += len(values)
            if not used:
                raise InputError(
                    f"no document of label {label!r} could be scored: {failed[-1]['reason']}"
                )
            common[label] = chosen
            means[label] = {unit: total / used for unit, total in sums.items()}
        projections = scores.projections
    _warn_of(failed)
    # In the space of query heads, so before rows that several heads share come in.
    specific, languages = (
        {label: _by_site(masks, projections) for label, masks in of.items()}
        for of in (_specific(common), common)
    )
    named = {path for one in projections.values() for path, _ in vars(one).values()}
    widths = known_sites(model, named)
    if "ffn" not in kinds:
        widths = {site: width for site, width in widths.items() if site in named}
    about = about_run(model, tokenizer)
    return PLND(
        specific,
        languages,
        means,
        Layout(tuple(widths), widths, about["fingerprint"], about["model"]),
        {
            "method": "plnd",
            "parameters": {"form": form, "kinds": list(kinds), **select.parameters},
            "notes": select.notes,
            "failed": failed,
            **about,
            **text.metadata(),
        },
    )


def check_request(
    documents: Mapping[str, Any],
    kinds: Sequence[Kind],
    form: str,
    top: int | Mapping[Kind, int] | None,
    threshold: float | Mapping[Kind, float] | None,
) -> tuple[Kind, ...]:
    """The kinds; raises InputError for what is wrong with the arguments whatever the model is."""
    given = (kinds,) if isinstance(kinds, str) else tuple(kinds)
    if not given or len(set(given)) != len(given) or not set(given) <= set(KINDS):
        raise InputError(f"kinds must be some of {', '.join(KINDS)}, each once, got {kinds!r}")
    if form not in ("paper", "released"):
        raise InputError(f"form must be 'paper' or 'released', got {form!r}")
    if not isinstance(documents, Mapping):
        raise InputError(
            f"documents must be a dict from label to documents, got {type(documents).__name__}"
        )
    if len(documents) < 2:
        raise InputError(
            f"PLND compares labels and needs documents of at least two, got {len(documents)}"
        )
    if top is not None and threshold is not None:
        raise InputError("PLND chooses by top or by threshold; give one of them")
    _per_kind("threshold", threshold, given)
    for kind, count in _per_kind("top", top, given).items():
        if type(count) is not int or count < 1:
            raise InputError(f"top of {kind} must be an integer of at least 1, got {count!r}")
    return given


class _Selection:
    """Which of a document's neurons are chosen."""

    def __init__(self, model: nn.Module, kinds: Sequence[Kind], top: Any, threshold: Any) -> None:
        self.notes: list[str] = []
        self._threshold = _per_kind("threshold", threshold, kinds)
        if threshold is None and top is None:
            family = getattr(text_config(model), "model_type", None)
            ffn, attention = _RELEASED_TOP.get(family, _RELEASED_TOP["llama"])
            top = {kind: ffn if kind == "ffn" else attention for kind in kinds}
        self._top = _per_kind("top", top, kinds)
        self.parameters = {"top": self._top} if self._top else {"threshold": self._threshold}

    def __call__(self, unit: Unit, scores: Tensor) -> Tensor:
        """Bool [documents, width] of scores float64 [documents, width]."""
        kind, width = unit[0], scores.shape[1]
        if self._threshold:
            return scores > self._threshold[kind]
        asked = self._top[kind]
        if asked >= width:
            note = f"top {asked} of {kind} is all {width} neurons of a layer, so all are chosen"
            if note not in self.notes:
                self.notes.append(note)
                logger.warning("PLND: %s; choose a smaller top", note)
            return torch.ones_like(scores, dtype=torch.bool)
        # The highest, and of equal ones the first.
        order = scores.sort(dim=1, descending=True, stable=True).indices[:, :asked]
        return torch.zeros_like(scores, dtype=torch.bool).scatter_(1, order, True)


def _scored(
    scores: DocumentScores, text: DocumentPass, label: str, failed: list[dict[str, Any]]
) -> Iterator[dict[Unit, Tensor]]:
    """The scores of the label's documents; those that fail are noted, and the others go on."""
    for batch in text.batches(label):
        try:
            yield scores.of(batch)
            continue
        except (InputError, RuntimeError) as error:
            if len(batch.numbers) == 1:
                failed.append(_failure(label, batch, error))
                continue
        for one in batch.split():
            try:
                yield scores.of(one)
            except (InputError, RuntimeError) as error:
                failed.append(_failure(label, one, error))


def _failure(label: str, batch: DocumentBatch, error: Exception) -> dict[str, Any]:
    return {"label": label, "document": batch.numbers[0], "reason": str(error)}


def _warn_of(failed: list[dict[str, Any]]) -> None:
    for one in failed[:_SHOWN]:
        logger.warning(
            "PLND: document %d of %s was left out: %s", one["document"], one["label"], one["reason"]
        )
    if len(failed) > _SHOWN:
        logger.warning("PLND: %d more documents were left out", len(failed) - _SHOWN)


def _by_site(
    chosen: Mapping[Unit, Tensor], projections: Mapping[str, Projections]
) -> dict[str, Tensor]:
    """Units as neurons of sites."""
    neurons: dict[str, list[Tensor]] = {}
    for (kind, path), mask in chosen.items():
        units = mask.nonzero().squeeze(1)
        if kind == "ffn":
            neurons.setdefault(path, []).append(units)
            continue
        made = projections[path]
        for site, rows in (made.query, made.key) if kind == "query_key" else (made.value,):
            neurons.setdefault(site, []).append(rows[units])
    return {site: torch.cat(parts).unique() for site, parts in neurons.items()}


def _specific(common: Mapping[str, Mapping[Unit, Tensor]]) -> dict[str, dict[Unit, Tensor]]:
    """The units of each label but those that all labels have; bool, as given."""
    every = list(common.values())
    shared = {unit: torch.stack([of[unit] for of in every]).all(0) for unit in every[0]}
    return {
        label: {unit: mask & ~shared[unit] for unit, mask in masks.items()}
        for label, masks in common.items()
    }


def _per_kind(name: str, given: Any, kinds: Sequence[Kind]) -> dict[Kind, Any]:
    if given is None:
        return {}
    values = dict(given) if isinstance(given, Mapping) else dict.fromkeys(kinds, given)
    if set(values) != set(kinds):
        raise InputError(f"{name} must be one number or one for each of {', '.join(kinds)}")
    for kind, value in values.items():
        if isinstance(value, bool) or not isinstance(value, (int, float)) or value != value:
            raise InputError(f"{name} of {kind} must be a number, got {value!r}")
    return values

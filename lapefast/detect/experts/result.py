"""Which experts the tokens of each label choose: what is found, and the file it is kept in.

Liu et al., EMNLP 2024, "Unraveling Babel", arXiv 2402.16367.
"""

from __future__ import annotations

import os
from collections.abc import Mapping, Sequence
from numbers import Real
from typing import Any

import torch
from torch import Tensor, nn

from lapefast import display
from lapefast.detect.experts.families import language_family
from lapefast.detect.experts.hierarchy import leaf_order
from lapefast.errors import InputError
from lapefast.labels import check_names
from lapefast.neurons import Layout, NeuronSet, NeuronSets
from lapefast.sealed import SealedFile

__all__ = ["Experts", "check_share", "highest_share"]

_FILE = SealedFile("experts file", "1", "experts", "`lapefast identify --method experts --details`")


class Experts:
    """The experts of every layer and how often each label's tokens chose them.

    Args:
        labels: what the texts were grouped by; distinct.
        clusters: site -> int64 [width], the expert of each neuron, in model order.
        chosen: int64 [labels, layers, experts], tokens that chose the expert.
        tokens: int64 [labels, layers], tokens that passed the layer.
        metadata: how they were found, as JSON: model, fingerprint, share, form, corpora and so on.

    Attributes:
        labels, clusters, chosen, tokens, metadata: as given.
        sites: names of the layers' sites, in model order.

    Raises:
        InputError: shapes, dtypes, names or counts are not as said.
    """

    def __init__(
        self,
        labels: Sequence[str],
        clusters: Mapping[str, Tensor],
        chosen: Tensor,
        tokens: Tensor,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        if not labels or len(set(labels)) < len(labels):
            raise InputError(f"experts need distinct labels, got {list(labels)}")
        check_names(labels)
        shape = len(labels), len(clusters)
        if chosen.dtype != torch.int64 or chosen.dim() != 3 or chosen.shape[:2] != shape:
            raise InputError(
                f"chosen must be int64 [labels, layers, experts] = [{shape[0]}, {shape[1]}, "
                f"experts], got {chosen.dtype} {list(chosen.shape)}"
            )
        if tokens.dtype != torch.int64 or tokens.shape != shape:
            raise InputError(
                f"tokens must be int64 [labels, layers] = {list(shape)}, got {tokens.dtype} "
                f"{list(tokens.shape)}"
            )
        if (tokens < 1).any() or (chosen < 0).any() or (chosen > tokens[:, :, None]).any():
            raise InputError(
                "every label needs tokens in every layer, and from 0 to all of them choose an "
                "expert; the counts given say otherwise"
            )
        for site, experts in clusters.items():
            if experts.dtype != torch.int64 or experts.dim() != 1:
                raise InputError(
                    f"{site}: clusters must be int64 [width], got {experts.dtype} "
                    f"{list(experts.shape)}"
                )
            if not torch.equal(experts.unique(), torch.arange(chosen.shape[2])):
                raise InputError(
                    f"{site}: clusters must name each of the {chosen.shape[2]} experts, got "
                    f"{len(experts.unique())} from {int(experts.min())} to {int(experts.max())}"
                )
        self.labels, self.sites = list(labels), list(clusters)
        self.clusters, self.chosen, self.tokens = dict(clusters), chosen, tokens
        self.metadata = dict(metadata or {})

    @property
    def frequency(self) -> Tensor:
        """Share of the tokens that chose an expert, float64 [labels, layers, experts]."""
        return self.chosen.double() / self.tokens[:, :, None]

    @property
    def layout(self) -> Layout:
        """What is known of the model."""
        widths = {site: len(experts) for site, experts in self.clusters.items()}
        about = self.metadata.get("fingerprint"), self.metadata.get("model")
        return Layout(tuple(self.sites), widths, *about)

    def of_label(self, label: str) -> Tensor:
        """The label's frequency, float64 [layers, experts].

        Raises:
            InputError: there is no such label.
        """
        if label not in self.labels:
            raise InputError(
                f"there are no experts of label {label!r}; there are some of "
                f"{', '.join(self.labels)}"
            )
        return self.frequency[self.labels.index(label)]

    def high_frequency(
        self, label: str, top: float | None = None, threshold: float | None = None
    ) -> Tensor:
        """The experts that a label uses most, bool [layers, experts].

        Args:
            label: the label.
            top: the round(top * layers * experts) with the highest frequency, at least one; ties
                go to the lower layer, then to the lower expert. Unless said otherwise, the share
                that each token chose, 0.1 if it is not known.
            threshold: instead, those whose frequency is above it, strictly.

        Raises:
            InputError: there is no such label, a share is out of range, or both are given.
        """
        frequency = self.of_label(label)
        if threshold is None:
            share = self.metadata.get("share", 0.1) if top is None else top
            return highest_share(frequency, share)
        if top is not None:
            raise InputError(f"give either top or threshold, got {top} and {threshold}")
        if not (isinstance(threshold, Real) and 0 <= threshold < 1):
            raise InputError(f"threshold must be at least 0 and below 1, got {threshold!r}")
        return frequency > threshold

    def shared(self, labels: Sequence[str] | None = None, **which: float) -> Tensor:
        """The experts that all labels (or those given) use most, bool [layers, experts].

        ``which`` and errors as for `high_frequency`.
        """
        high = [self.high_frequency(label, **which) for label in labels or self.labels]
        return torch.stack(high).all(0)

    def jaccard(self, **which: float) -> Tensor:
        """How many of two labels' high-frequency experts are the same, float64 [labels, labels].

        The size of their intersection by that of their union; 1 where both have none. ``which``
        and errors as for `high_frequency`.
        """
        high = [self.high_frequency(label, **which).flatten() for label in self.labels]
        high = torch.stack(high).double()
        both, sizes = high @ high.T, high.sum(1)
        either = sizes[:, None] + sizes - both
        return torch.where(either > 0, both / either.clamp_min(1), 1.0)

    def similarity(self) -> Tensor:
        """Cosine similarity of the labels' frequencies, float64 [labels, labels]."""
        vectors = nn.functional.normalize(self.frequency.flatten(1), dim=1)
        return vectors @ vectors.T

    def order(self) -> list[str]:
        """The labels in an order in which similar ones stand together.

        The leaves of average-linkage clustering by `similarity`, as rows of its heat map.
        """
        return [self.labels[index] for index in leaf_order(self.similarity())]

    def families(self) -> dict[str, str | None]:
        """Label -> language family (of Indo-European, the branch), for labels that are codes."""
        return {label: language_family(label) for label in self.labels}

    def neurons(
        self, label: str, top: float | None = None, threshold: float | None = None
    ) -> NeuronSet:
        """The neurons of the label's high-frequency experts; see `high_frequency`."""
        return self.members(self.high_frequency(label, top, threshold), label)

    def members(self, chosen: Tensor, label: str | None = None) -> NeuronSet:
        """The neurons of the experts that ``chosen``, bool [layers, experts], says.

        Raises:
            InputError: the shape or the dtype is another.
        """
        shape = self.chosen.shape[1:]
        if chosen.dtype != torch.bool or chosen.shape != shape:
            raise InputError(
                f"chosen experts must be bool [layers, experts] = {list(shape)}, got "
                f"{chosen.dtype} {list(chosen.shape)}"
            )
        neurons = {
            site: of_layer[experts].nonzero().squeeze(1)
            for (site, experts), of_layer in zip(self.clusters.items(), chosen, strict=True)
        }
        return NeuronSet(neurons, label, self.layout)

    def neuron_sets(
        self, top: float | None = None, threshold: float | None = None, only: bool = False
    ) -> NeuronSets:
        """The neurons of each label's high-frequency experts.

        Args:
            top, threshold: as for `high_frequency`.
            only: leave out the experts that are another label's, too.

        Raises:
            InputError: as for `high_frequency`.
        """
        high = torch.stack([self.high_frequency(label, top, threshold) for label in self.labels])
        if only:
            high = high & (high.sum(0) == 1)
        sets = {
            label: self.members(of_label) for label, of_label in zip(self.labels, high, strict=True)
        }
        parameters = {"top": top, "threshold": threshold, "only": only}
        return NeuronSets(sets, self.layout, self.about(parameters))

    def about(self, parameters: Mapping[str, Any]) -> dict[str, Any]:
        """The metadata of neuron sets that were made of these experts."""
        known = ("experts", "share", "form", "seed")
        own = {name: self.metadata[name] for name in known if name in self.metadata}
        rest = {name: value for name, value in self.metadata.items() if name not in known}
        return {**rest, "method": "experts", "parameters": {**own, **parameters}, "notes": []}

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row per label, layer and expert.

        Columns: ``label``, ``layer``, ``expert``, ``frequency``.
        """
        import pandas

        layers, count = self.chosen.shape[1:]
        index = pandas.MultiIndex.from_product(
            [self.labels, range(layers), range(count)], names=["label", "layer", "expert"]
        )
        values = {"frequency": self.frequency.flatten().numpy()}
        return pandas.DataFrame(values, index=index).reset_index()

    def _repr_html_(self) -> str:
        order = self.order()
        rows = [self.labels.index(label) for label in order]
        similarity = self.similarity()[rows][:, rows].tolist()
        return display.table(
            "Similarity of the labels' frequencies of experts (cosine)",
            ["", *order],
            [
                [label, *(f"{value:.2f}" for value in row)]
                for label, row in zip(order, similarity, strict=True)
            ],
            similarity,
        )

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write a safetensors file; the same experts give the same bytes.

        Raises:
            InputError: the file cannot be written; then nothing is.
        """
        about = {"labels": self.labels, "sites": self.sites, "metadata": self.metadata}
        tensors = {"chosen": self.chosen, "tokens": self.tokens}
        _FILE.write(path, tensors | {f"clusters.{k}": v for k, v in self.clusters.items()}, about)

    @classmethod
    def load(cls, path: str | os.PathLike[str]) -> Experts:
        """Read what `save` wrote.

        Raises:
            InputError: the file is missing, cut short, damaged, of another kind or of another
                format version.
        """
        try:
            return cls(*_FILE.read(path, _arguments))
        except InputError as error:
            raise InputError(f"cannot load {path}: {error}") from error

    def __repr__(self) -> str:
        layers, count = self.chosen.shape[1:]
        return f"Experts({', '.join(self.labels)}: {count} experts in each of {layers} layers)"


def highest_share(frequency: Tensor, share: float) -> Tensor:
    """The round(share * n) highest of n values, at least one, ties by index; bool, their shape.

    Raises:
        InputError: the share is not over 0 and at most 1.
    """
    check_share(share, "top")
    flat = frequency.flatten()
    order = flat.argsort(descending=True, stable=True)
    high = torch.zeros_like(flat, dtype=torch.bool)
    high[order[: max(1, round(share * len(flat)))]] = True
    return high.view_as(frequency)


def check_share(share: float, name: str) -> None:
    """Raises InputError unless the share is over 0 and at most 1."""
    if not (isinstance(share, Real) and 0 < share <= 1):
        raise InputError(f"{name} must be over 0 and at most 1, got {share!r}")


def _arguments(about: dict[str, Any], tensors: dict[str, Tensor]) -> tuple[Any, ...]:
    clusters = {site: tensors.pop(f"clusters.{site}") for site in about["sites"]}
    counts = tensors.pop("chosen"), tensors.pop("tokens")
    return list(about["labels"]), clusters, *counts, dict(about["metadata"])

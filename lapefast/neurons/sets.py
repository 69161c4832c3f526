"""Neuron sets: which neurons belong to which label."""

from __future__ import annotations

import os
from collections.abc import Iterator, Mapping, Sequence
from typing import Any

import torch

from lapefast import display
from lapefast.errors import InputError
from lapefast.labels import check_names
from lapefast.neurons import files
from lapefast.neurons.layout import Key, Layout, sorted_indices

__all__ = ["NeuronSet", "NeuronSets"]


class NeuronSet(Mapping[Key, torch.Tensor]):
    """The neurons of one label: site -> sorted int64 indices, for every site of the layout.

    Sites without neurons hold an empty tensor. Read from a published file, sites are the positions
    `0 .. n-1` until `bind(model)` names them.

    Args:
        neurons: site -> integers; sites that are left out have none.
        label: what the neurons belong to, if anything.
        layout: the model's sites; without it, the keys of `neurons` are all that is known.

    Raises:
        InputError: a site that the layout does not have, or indices that its width does not allow.
    """

    def __init__(
        self,
        neurons: Mapping[Key, Any],
        label: str | None = None,
        layout: Layout | None = None,
    ) -> None:
        self.label = label
        self.layout = layout or Layout(tuple(neurons))
        for site in neurons:
            if site not in self.layout.sites:
                raise InputError(f"there is no site {site} among those that the neurons lie in")
        self._neurons = {
            site: sorted_indices(neurons.get(site, ()), site, self.layout.widths.get(site))
            for site in self.layout.sites
        }

    @property
    def widths(self) -> dict[Key, int]:
        """Neurons per site, for the sites where that is known."""
        return dict(self.layout.widths)

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the model that the neurons were found in, if known."""
        return self.layout.fingerprint

    @property
    def total(self) -> int:
        """How many neurons there are."""
        return sum(len(indices) for indices in self._neurons.values())

    def bind(self, model: Any, check_fingerprint: bool = True) -> NeuronSet:
        """The same neurons under the site names of `model`, after checking that they fit it.

        Args:
            model: an `nn.Module`.
            check_fingerprint: False takes the model even if its weights are not those that the
                neurons were found in, a fine-tuned form of it, say.

        Raises:
            InputError: sites, widths, indices or the fingerprint do not fit.
        """
        return self._under(self.layout.bind(model, check_fingerprint))

    def _under(self, layout: Layout) -> NeuronSet:
        sites = layout.sites if self.layout.positional else self.layout.sites
        neurons = dict(zip(sites, self._neurons.values(), strict=True))
        return NeuronSet(neurons, self.label, layout)

    def __getitem__(self, site: Key) -> torch.Tensor:
        return self._neurons[site]

    def __iter__(self) -> Iterator[Key]:
        return iter(self._neurons)

    def __len__(self) -> int:
        return len(self._neurons)

    def __eq__(self, other: object) -> bool:
        if not isinstance(other, NeuronSet):
            return NotImplemented
        return self.keys() == other.keys() and all(
            torch.equal(indices, other[site]) for site, indices in self.items()
        )

    __hash__ = None

    def __repr__(self) -> str:
        return f"NeuronSet({self.label!r}: {self.total} neurons in {len(self)} sites)"


class NeuronSets(Mapping[str, NeuronSet]):
    """The neurons of several labels: label -> `NeuronSet`, in the order of the labels.

    Args:
        neurons: label -> site -> integers. A label without neurons keeps its place.
        layout: the sites of the model, shared by all labels.
        metadata: how the neurons were found, as JSON: `method`, `parameters`, `notes` and so on.

    Raises:
        InputError: see `lapefast.labels.check_names` and `NeuronSet`.
    """

    def __init__(
        self,
        neurons: Mapping[str, Mapping[Key, Any]],
        layout: Layout,
        metadata: Mapping[str, Any] | None = None,
    ) -> None:
        check_names(neurons)
        self.layout = layout
        self.metadata = dict(metadata or {})
        self._sets = {label: NeuronSet(sites, label, layout) for label, sites in neurons.items()}

    @property
    def labels(self) -> list[str]:
        return list(self._sets)

    @property
    def sites(self) -> list[Key]:
        """Names of the sites, or positions, if the sets are not bound yet.

        FFNs in model order, then, where a method looks at them, linear layers in model order.
        """
        return list(self.layout.sites)

    @property
    def widths(self) -> dict[Key, int]:
        """Neurons per site, for the sites where that is known."""
        return dict(self.layout.widths)

    @property
    def fingerprint(self) -> str | None:
        """Fingerprint of the model that the neurons were found in, if known."""
        return self.layout.fingerprint

    def layers(self, label: str) -> list[torch.Tensor]:
        """The label's neurons as a list of sorted int64 tensors, one per site of `sites`."""
        return list(self[label].values())

    def bind(self, model: Any, check_fingerprint: bool = True) -> NeuronSets:
        """The same sets under the site names of `model`; see `NeuronSet.bind`."""
        layout = self.layout.bind(model, check_fingerprint)
        sets = {label: neurons._under(layout) for label, neurons in self.items()}
        return NeuronSets(sets, layout, self.metadata)

    def save(self, path: str | os.PathLike[str]) -> None:
        """Write the sets to `path`, as JSON or, if it ends in `.pth`, in the published format.

        The published format holds a list over labels of lists over layers of sorted int64
        tensors, and nothing else: no labels, site names, widths or method. The authors' own file
        has no suffix, `activation_mask/llama-70b`; such a name is written as JSON.

        Raises:
            InputError: the file cannot be written.
        """
        if os.fspath(path).endswith(".pth"):
            files.write_published(path, [self.layers(label) for label in self])
        else:
            neurons = {label: self.layers(label) for label in self}
            files.write_json(path, neurons, self.layout, self.metadata)

    @classmethod
    def load(cls, path: str | os.PathLike[str], labels: Sequence[str] | None = None) -> NeuronSets:
        """Read a JSON file or a published file; the content decides which it is, not the name.

        Args:
            path: the file.
            labels: for a published file, the labels in its order; by default the first n of en,
                zh, fr, es, vi, id, ja. For a JSON file, the labels to take; by default all.

        Raises:
            InputError: the file is missing, broken or of another format version, or the labels do
                not fit it.
        """
        if files.is_json(path):
            neurons, layout, metadata = files.read_json(path)
            for label in labels or ():
                if label not in neurons:
                    raise InputError(
                        f"the neuron file {path} has no label {label!r}; "
                        f"its labels are {', '.join(neurons)}"
                    )
            if labels is not None:
                neurons = {label: neurons[label] for label in labels}
        else:
            neurons, layout, metadata = files.read_published(path, labels)
        try:
            sets = {
                label: dict(zip(layout.sites, layers, strict=True))
                for label, layers in neurons.items()
            }
            return cls(sets, layout, metadata)
        except InputError as error:
            raise InputError(f"the neuron file {path} is broken: {error}") from error

    def __getitem__(self, label: str) -> NeuronSet:
        return self._sets[label]

    def __iter__(self) -> Iterator[str]:
        return iter(self._sets)

    def __len__(self) -> int:
        return len(self._sets)

    def to_pandas(self) -> Any:
        """A `pandas.DataFrame` with a row per neuron; columns ``label``, ``site``, ``neuron``.

        Where there are mixtures, also ``expert`` (missing at dense sites), within which ``neuron``
        counts then.
        """
        import pandas

        rows = [
            (label, site, neuron)
            for label, neurons in self.items()
            for site, indices in neurons.items()
            for neuron in indices.tolist()
        ]
        frame = pandas.DataFrame(rows, columns=("label", "site", "neuron"))
        if self.layout.experts:
            each = {site: self.widths[site] // n for site, n in self.layout.experts.items()}
            width = frame["site"].map(each).astype("Int64")
            frame.insert(2, "expert", frame["neuron"] // width)
            frame["neuron"] %= width.fillna(max(self.widths.values()))
        return frame

    def _repr_html_(self) -> str:
        counts = [[len(layer) for layer in self.layers(label)] for label in self]
        most = max((count for row in counts for count in row), default=0) or 1
        return display.table(
            "Neurons per label, and per site in the order of sites",
            ["label", "all", *map(str, range(len(self.sites)))],
            [
                [label, str(sum(row)), *map(str, row)]
                for label, row in zip(self, counts, strict=True)
            ],
            [[count / most for count in row] for row in counts],
        )

    def __repr__(self) -> str:
        totals = ", ".join(f"{label!r}: {neurons.total}" for label, neurons in self.items())
        return f"NeuronSets({totals} neurons in {len(self.layout.sites)} sites)"

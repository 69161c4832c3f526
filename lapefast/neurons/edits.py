"""Edits: what is done to chosen neurons' activations, `a <- scale * a + shift`."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any

import torch

from lapefast.errors import InputError
from lapefast.neurons.layout import Key, Layout, sorted_indices
from lapefast.neurons.sets import NeuronSet, NeuronSets

__all__ = ["Edit", "Neurons", "Values", "activate", "add", "bind_all", "deactivate", "scale"]

Table = tuple[torch.Tensor, torch.Tensor, torch.Tensor]
"""Neurons int64 [n], sorted; scale float32 [n]; shift float32 [n]."""

Neurons = NeuronSet | NeuronSets | Mapping[str, Any]
"""A label's neurons; several labels' (their union is meant); or site -> integers."""

Values = Mapping[str, Any] | float
"""Site -> one value per neuron of the site, such as `profile.means(label)`; or one number."""


class Edit:
    """What is done to chosen neurons: `a <- scale * a + shift`, once, in float32.

    Made by `deactivate`, `activate`, `scale` and `add`, and combined by `|`.

    Attributes:
        tables: site -> (neurons int64 [n] sorted, scale float32 [n], shift float32 [n]), for the
            sites where a neuron is edited.
        layout: what is known of the model that the edit is for.
    """

    def __init__(self, tables: Mapping[Key, Table], layout: Layout) -> None:
        self.layout = layout
        self.tables = {site: tables[site] for site in layout.sites if site in tables}

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
        """How many neurons are edited."""
        return sum(len(neurons) for neurons, _, _ in self.tables.values())

    def bind(self, model: Any, check_fingerprint: bool = True) -> Edit:
        """The same edit under the site names of `model`, after checking that it fits.

        Raises:
            InputError: see `NeuronSet.bind`.
        """
        return self._under(self.layout.bind(model, check_fingerprint))

    def _under(self, layout: Layout) -> Edit:
        """The same edit under the layout of a model, whose widths its neurons must keep to."""
        tables = self.tables
        if self.layout.positional:
            tables = {layout.sites[position]: table for position, table in tables.items()}
        for site, (neurons, _, _) in tables.items():
            sorted_indices(neurons, site, layout.widths[site])
        return Edit(tables, layout)

    def overlap(self, other: Edit) -> int:
        """How many neurons both edits touch; there the right-hand one holds in `self | other`."""
        if not isinstance(other, Edit):
            raise InputError(f"an edit overlaps with another edit, got {type(other).__name__}")
        self.layout.merge(other.layout)
        return sum(
            int(torch.isin(neurons, other.tables[site][0]).sum())
            for site, (neurons, _, _) in self.tables.items()
            if site in other.tables
        )

    def __or__(self, other: Edit) -> Edit:
        """Both edits; where both touch a neuron the right-hand one holds, as with dicts.

        Raises:
            InputError: the edits are for models that differ.
        """
        if not isinstance(other, Edit):
            return NotImplemented
        tables = dict(self.tables)
        for site, table in other.tables.items():
            tables[site] = _overlaid(tables[site], table) if site in tables else table
        return Edit(tables, self.layout.merge(other.layout))

    def __repr__(self) -> str:
        return f"Edit({self.total} neurons in {len(self.tables)} sites)"


def deactivate(sets: Neurons) -> Edit:
    """Set the neurons' activations to 0, whatever they were.

    Args:
        sets: `neurons[label]`, or site -> integers.

    Raises:
        InputError: there are none, or they are not integers within their sites.
    """
    return _edit(sets, scale=0.0, shift=0.0)


def activate(sets: Neurons, values: Values) -> Edit:
    """Set the neurons' activations to `values`, whatever they were.

    Args:
        sets: `neurons[label]`, or site -> integers.
        values: site -> tensor [width], such as `profile.means(label)`, or one number; of a mixture
            [experts, width] or flat. Neurons known by position take the sites of `values` in their
            order.

    Raises:
        InputError: there are no neurons, they are not integers within their sites, a site has no
            values or too few, or a value is not finite in float32.
    """
    return _edit(sets, scale=0.0, shift=values)


def scale(sets: Neurons, factor: Values) -> Edit:
    """Multiply the neurons' activations by `factor`; see `activate` for the forms it takes."""
    return _edit(sets, scale=factor, shift=0.0)


def add(sets: Neurons, values: Values, strength: float = 1.0) -> Edit:
    """Add `strength * values` to the neurons' activations; see `activate` for the rest."""
    return _edit(sets, scale=1.0, shift=values, strength=strength)


def bind_all(edits: Sequence[Edit], model: Any) -> list[Edit]:
    """Each edit bound to the model, which is looked at once per layout that differs."""
    known: list[tuple[Layout, Layout]] = []
    bound = []
    for edit in edits:
        layout = next((found for own, found in known if own == edit.layout), None)
        if layout is None:
            layout = edit.layout.bind(model)
            known.append((edit.layout, layout))
        bound.append(edit._under(layout))
    return bound


def _edit(sets: Neurons, scale: Values, shift: Values, strength: float = 1.0) -> Edit:
    chosen = _union(sets)
    if not chosen.total:
        of_label = f"the label {chosen.label} has none" if chosen.label else "none are given"
        raise InputError(f"there are no neurons to edit: {of_label}")
    layout = chosen.layout
    for values in (scale, shift):
        if isinstance(values, Mapping) and layout.positional:
            if len(values) != len(layout.sites):
                raise InputError(
                    f"the neurons lie in {len(layout.sites)} sites by position, but there are "
                    f"values for {len(values)}; give values for every site, in model order"
                )
            layout = layout.named(tuple(values))
    tables = {}
    for site, neurons in zip(layout.sites, chosen.values(), strict=True):
        if len(neurons):
            tables[site] = (
                neurons,
                _at(scale, site, neurons, layout, 1.0),
                _at(shift, site, neurons, layout, strength),
            )
    return Edit(tables, layout)


def _union(sets: Neurons) -> NeuronSet:
    if isinstance(sets, NeuronSet):
        return sets
    if isinstance(sets, NeuronSets):
        union = {
            site: torch.cat([neurons[site] for neurons in sets.values()])
            for site in sets.layout.sites
            if len(sets)
        }
        return NeuronSet(union, None, sets.layout)
    named = isinstance(sets, Mapping)
    if not named or not all(isinstance(site, str) for site in sets):
        got = f"the keys {list(sets)!r:.60}" if named else type(sets).__name__
        raise InputError(
            "neurons to edit must be neurons[label] or a dict from site name to indices, such as "
            f"{{'layers.0.mlp': [3]}}, got {got}"
        )
    return NeuronSet(sets)


def _at(
    values: Values, site: Key, neurons: torch.Tensor, layout: Layout, strength: float
) -> torch.Tensor:
    """`strength * values` of the neurons of one site, float32."""
    if isinstance(values, Mapping):
        if site not in values:
            raise InputError(f"there are no values for site {site}; give some for every site")
        given = _numbers(values[site], f"values of site {site}")
        width = layout.widths.get(site)
        experts = layout.experts.get(site, None if width else len(given))
        if given.dim() == 2 and len(given) == experts:
            given = given.flatten()
        short = given.dim() != 1 or len(given) <= int(neurons[-1])
        if short or (width is not None and len(given) != width):
            raise InputError(
                f"values of site {site} must be one per neuron, "
                f"[{width or f'over {int(neurons[-1])}'}], got {list(given.shape)}"
            )
        given = given[neurons]
    else:
        try:
            given = torch.full(neurons.shape, float(values), dtype=torch.float64)
        except (TypeError, ValueError, OverflowError) as error:
            raise InputError(
                f"values must be a number or a dict from site to tensor, got {values!r:.80}"
            ) from error
    factor = _numbers(strength, "strength")
    if factor.dim():
        raise InputError(f"strength must be one number, got {list(factor.shape)}")
    result = (given * factor).to(torch.float32)
    if not torch.isfinite(result).all():
        at = int(neurons[~torch.isfinite(result)][0])
        raise InputError(
            f"values must be finite in float32, but that of neuron {at} of {site} is not"
        )
    return result


def _numbers(values: Any, what: str) -> torch.Tensor:
    """As float64, on the CPU."""
    try:
        given = torch.as_tensor(values).detach().cpu()
        if not given.is_complex():
            return given.to(torch.float64)
    except (TypeError, ValueError, RuntimeError, OverflowError):
        pass
    raise InputError(f"{what} must be real numbers, got {values!r:.60}")


def _overlaid(lower: Table, upper: Table) -> Table:
    kept = ~torch.isin(lower[0], upper[0])
    merged = [torch.cat([low[kept], up]) for low, up in zip(lower, upper, strict=True)]
    order = torch.argsort(merged[0])
    return merged[0][order], merged[1][order], merged[2][order]

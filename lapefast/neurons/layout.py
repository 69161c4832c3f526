"""What is known of the model that neurons belong to, and whether a model is that one."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import torch

from lapefast.errors import InputError

__all__ = ["Key", "Layout", "sorted_indices"]

Key = str | int
"""A site's name, or its position in the model where the name is not known."""

_INTEGERS = (torch.uint8, torch.int8, torch.int16, torch.int32, torch.int64)


@dataclass(frozen=True)
class Layout:
    """The sites of a model as far as they are known.

    Attributes:
        sites: the sites' names in model order, or their positions `0 .. n-1`, as in the published
            neuron files, which carry no names.
        widths: neurons per site, for the sites where that is known; in a mixture those of all its
            experts, with the flat index expert * neurons of one + neuron.
        fingerprint: of the model that the neurons were found in, if known.
        model: the name of that model, if known; for messages only.
        experts: how many a site has, for those known to be mixtures.
    """

    sites: tuple[Key, ...]
    widths: Mapping[Key, int] = field(default_factory=dict)
    fingerprint: str | None = None
    model: str | None = None
    experts: Mapping[Key, int] = field(default_factory=dict)

    def __post_init__(self) -> None:
        names = all(type(site) is str for site in self.sites)
        if not names and self.sites != tuple(range(len(self.sites))):
            raise InputError(
                "sites must be named by strings, or all be the positions 0, 1, 2 ..., "
                f"got {_listed(self.sites)}"
            )
        if len(set(self.sites)) < len(self.sites):
            raise InputError(f"sites must be named once each, got {_listed(self.sites)}")

    @property
    def positional(self) -> bool:
        """Whether sites are known by position only."""
        return bool(self.sites) and type(self.sites[0]) is int

    def named(self, sites: tuple[str, ...]) -> Layout:
        """The same layout with names in place of positions."""
        widths, experts = (
            {sites[site]: number for site, number in of.items()}
            for of in (self.widths, self.experts)
        )
        return Layout(sites, widths, self.fingerprint, self.model, experts)

    def bind(self, model: Any, check_fingerprint: bool = True) -> Layout:
        """The layout of `model`, an `nn.Module`, after checking that this one fits it.

        Raises:
            InputError: another number of sites, a site that the model does not have, another
                width, or (where both are known) another fingerprint.
        """
        from lapefast.models import find_sites, fingerprint, known_sites

        found = known_sites(model, self.sites)
        if self.positional and len(self.sites) != len(found):
            raise InputError(
                f"the neurons lie in {len(self.sites)} sites, but the model has {len(found)}; "
                f"use the model that they were found in{self._origin()}"
            )
        own = self.named(tuple(found)) if self.positional else self
        for site in own.sites:
            if site not in found:
                raise InputError(
                    f"the neurons lie in a site {site}, which the model does not have (it has "
                    f"{_listed(found)}); use the model that they were found in{self._origin()}"
                )
            if own.widths.get(site, found[site]) != found[site]:
                raise InputError(
                    f"the neurons were found in a site {site} of width {own.widths[site]}, but the "
                    f"model's has {found[site]}; use the model that they were found in"
                    f"{self._origin()}"
                )
        actual = fingerprint(model)
        if check_fingerprint and self.fingerprint not in (None, actual):
            raise InputError(
                f"the neurons were found in the model {self.model or 'of another file'} with "
                f"fingerprint {self.fingerprint[:12]}, but this model's is {actual[:12]}; "
                "use that model, or call bind(model, check_fingerprint=False) if these weights "
                "are meant"
            )
        config = getattr(model, "config", None)
        name = getattr(config, "_name_or_path", None) or self.model
        experts = {site.name: site.experts for site in find_sites(model) if site.experts}
        return Layout(tuple(found), found, actual, name, experts)

    def merge(self, other: Layout) -> Layout:
        """What both layouts know together.

        Raises:
            InputError: they do not describe one model.
        """
        if self.sites and other.sites and self.positional != other.positional:
            raise InputError(
                "one edit names its sites and the other knows them by position only; "
                "call bind(model) on the latter first"
            )
        if self.positional and other.positional and len(self.sites) != len(other.sites):
            raise InputError(
                f"the edits are for models with {len(self.sites)} and {len(other.sites)} sites; "
                "edits that are combined must be for one model"
            )
        if self.fingerprint and other.fingerprint and self.fingerprint != other.fingerprint:
            raise InputError(
                f"the edits are for two models, {self.model or self.fingerprint[:12]} and "
                f"{other.model or other.fingerprint[:12]}, whose fingerprints differ; "
                "edits that are combined must be for one model"
            )
        for site, width in self.widths.items():
            if other.widths.get(site, width) != width:
                raise InputError(
                    f"site {site} has width {width} in one edit and {other.widths[site]} in the "
                    "other; edits that are combined must be for one model"
                )
        return Layout(
            tuple(dict.fromkeys(self.sites + other.sites)),
            {**self.widths, **other.widths},
            self.fingerprint or other.fingerprint,
            self.model or other.model,
            {**self.experts, **other.experts},
        )

    def _origin(self) -> str:
        return f", {self.model}" if self.model else ""


def sorted_indices(values: Any, site: Key, width: int | None = None) -> torch.Tensor:
    """Neuron indices as a sorted int64 tensor without repetitions.

    Args:
        values: a one-dimensional integer tensor, array or sequence; an empty one of any type.
        site: names the site in messages.
        width: neurons of the site, if known.

    Raises:
        InputError: not integers, not one-dimensional, negative, or not below `width`.
    """
    try:
        indices = torch.as_tensor(values).detach().cpu()
    except (TypeError, ValueError, RuntimeError) as error:
        raise InputError(f"neurons of site {site} must be integers, got {values!r:.80}") from error
    if indices.dim() != 1 or (indices.dtype not in _INTEGERS and indices.numel()):
        raise InputError(
            f"neurons of site {site} must be a one-dimensional list or tensor of integers, "
            f"got {indices.dtype} {list(indices.shape)}"
        )
    indices = torch.unique(indices.to(torch.int64), sorted=True)
    if indices.numel() and indices[0] < 0:
        raise InputError(f"neurons of site {site} must not be negative, got {int(indices[0])}")
    if indices.numel() and width is not None and indices[-1] >= width:
        raise InputError(
            f"neurons of site {site} must be below its width {width}, got {int(indices[-1])}"
        )
    return indices


def _listed(sites) -> str:
    sites = [str(site) for site in sites]
    return ", ".join(sites if len(sites) <= 4 else [*sites[:2], "...", sites[-1]])

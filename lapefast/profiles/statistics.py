"""The statistics that a profile holds, and whether a profile's tensors are what they must be."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING

import torch

from lapefast.errors import InputError
from lapefast.labels import check_names
from lapefast.models.sites import Site
from lapefast.profiles.shards import SHARDS

if TYPE_CHECKING:
    from lapefast.profiles.profile import Profile

__all__ = ["STATISTICS", "check_structure", "checked_routed", "checked_statistic"]

STATISTICS = {
    "counts": torch.int64,
    "sums": torch.float64,
    "square_sums": torch.float64,
    "up_abs_sums": torch.float64,
    "shard_counts": torch.int32,
}
"""Each statistic's dtype: active tokens, the sum of activations, of squared products, of |up|, and
the active tokens of each shard of the text."""


def check_structure(profile: Profile) -> None:
    """Raise InputError for labels, sites or tokens that no profile has."""
    if not profile.labels or not all(isinstance(name, str) and name for name in profile.labels):
        raise InputError(f"a profile needs labels that are strings, got {profile.labels}")
    check_names(profile.labels)
    if len(set(profile.labels)) < len(profile.labels):
        raise InputError(f"the labels of a profile must be distinct, got {profile.labels}")
    if not profile.site_info or len(profile.sites) < len(profile.site_info):
        raise InputError(
            f"a profile needs sites of distinct names, got {[s.name for s in profile.site_info]}"
        )
    stacks = {site.stack for site in profile.site_info}
    if set(profile.stack_tokens) != stacks:
        raise InputError(
            f"tokens of the stacks {sorted(stacks)} are needed, got {sorted(profile.stack_tokens)}"
        )
    for stack, tokens in profile.stack_tokens.items():
        if tokens.dtype != torch.int64 or tokens.shape != (len(profile.labels),):
            raise InputError(
                f"tokens of stack {stack} must be int64 [labels] = [{len(profile.labels)}], "
                f"got {tokens.dtype} {list(tokens.shape)}"
            )
        if (tokens < 0).any():
            raise InputError(f"tokens of stack {stack} must not be negative")


def checked_routed(profile: Profile, given: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Mixture -> tokens of each label and expert, on the CPU. Raises InputError."""
    routed = dict(given)
    mixtures = {site.name: site.experts for site in profile.site_info if site.experts}
    if routed.keys() != mixtures.keys():
        raise InputError(
            f"routed must hold the profile's mixtures, {list(mixtures)}, got {list(routed)}"
        )
    for site, experts in mixtures.items():
        tensor = routed[site] = routed[site].detach().cpu().contiguous()
        shape = (len(profile.labels), experts)
        if tensor.dtype != torch.int64 or tensor.shape != shape:
            raise InputError(
                f"routed of site {site} must be int64 [labels, experts] = {list(shape)}, got "
                f"{tensor.dtype} {list(tensor.shape)}"
            )
        if (tensor < 0).any() or (tensor > profile.site_tokens(site)[:, None]).any():
            raise InputError(
                f"routed of site {site} must be between 0 and the label's tokens, but one is not"
            )
    return routed


def checked_statistic(
    profile: Profile, name: str, given: Mapping[str, torch.Tensor]
) -> dict[str, torch.Tensor]:
    """Site -> a statistic, on the CPU, in the order of the sites. Raises InputError."""
    if name not in STATISTICS:
        raise InputError(
            f"a profile holds {', '.join(STATISTICS)}, but {name!r} was given; leave it out"
        )
    if set(given) != set(profile.sites):
        raise InputError(f"{name} must hold the profile's sites, all of them and no other")
    sites = profile.site_info
    return {site.name: _checked(profile, name, site, given[site.name]) for site in sites}


def _checked(profile: Profile, name: str, site: Site, values: torch.Tensor) -> torch.Tensor:
    tensor = values.detach().cpu().contiguous()
    shards = (SHARDS,) if name == "shard_counts" else ()
    shape = (len(profile.labels), *shards, *site.shape)
    if tensor.dtype != STATISTICS[name] or tensor.shape != shape:
        raise InputError(
            f"{name} of site {site.name} must be {STATISTICS[name]} [labels, "
            f"{'shards, ' if shards else ''}{'experts, ' if site.experts else ''}width] = "
            f"{list(shape)}, got {tensor.dtype} {list(tensor.shape)}"
        )
    if name == "counts":
        if (tensor < 0).any():
            raise InputError(f"counts of site {site.name} must not be negative")
        if (tensor > profile.seen_tokens(site.name)[..., None]).any():
            raise InputError(
                f"counts of site {site.name} must not exceed the label's tokens, but one does"
            )
    elif tensor.is_floating_point() and not torch.isfinite(tensor).all():
        raise InputError(f"{name} of site {site.name} must be finite, but one is not")
    return tensor

"""The profile file: safetensors, written in one order and sealed by a checksum.

The tensors are `tokens` int64 [labels] (of the main stack; `tokens/{stack}` for another) and
`{statistic}/{site}` [labels, width], in a mixture [labels, experts, width] with `routed/{site}`
int64 [labels, experts]. Where shards were counted, `shard_counts/{site}` has [labels, shards, ...],
and so has `shard_tokens`, named like `tokens`, and of a mixture `shard_tokens/{site}`. The rest of
the profile is the JSON of a sealed file.
"""

from __future__ import annotations

import dataclasses
import os
from collections.abc import Iterable
from typing import TYPE_CHECKING, Any

import torch

from lapefast.models.sites import Site
from lapefast.sealed import SealedFile

if TYPE_CHECKING:
    from lapefast.profiles.profile import Profile

__all__ = ["main_stack", "read", "write"]

_FILE = SealedFile("profile", "1", "profile", "`lapefast profile`")

Arguments = tuple[
    list[str],
    list[Site],
    dict[str, torch.Tensor],
    dict[str, dict[str, torch.Tensor]],
    dict[str, Any],
    dict[str, torch.Tensor],
    dict[str, torch.Tensor],
]
"""Of `Profile`: labels, sites, tokens, statistics, metadata, routed, shard_tokens."""


def main_stack(stacks: Iterable[str]) -> str:
    """The stack whose tokens are the profile's: the encoder, where there is one."""
    stacks = list(stacks)
    return "encoder" if "encoder" in stacks else stacks[0]


def write(path: str | os.PathLike[str], profile: Profile) -> None:
    """Write a profile; the same profile gives the same bytes."""
    about = {
        "labels": profile.labels,
        "sites": [_described(site) for site in profile.site_info],
        "statistics": list(profile.statistics),
        "metadata": profile.metadata,
    }
    _FILE.write(path, _tensors(profile), about)


def read(path: str | os.PathLike[str]) -> Arguments:
    """The arguments of `Profile`, from a file.

    Raises:
        InputError: the file is missing, no profile, of another format version, or damaged.
    """
    return _FILE.read(path, _arguments)


def _arguments(about: dict[str, Any], tensors: dict[str, torch.Tensor]) -> Arguments:
    sites = [_site(**entry) for entry in about["sites"]]
    stacks = list(dict.fromkeys(site.stack for site in sites))
    dealt = [*stacks, *(site.name for site in sites if site.experts)]
    tokens, shard_tokens = (
        {stack: tensors.pop(_tokens_name(stack, stacks, of)) for stack in held}
        for of, held in (
            ("tokens", stacks),
            ("shard_tokens", dealt if "shard_counts" in about["statistics"] else ()),
        )
    )
    statistics = {
        name: {site.name: tensors.pop(f"{name}/{site.name}") for site in sites}
        for name in about["statistics"]
    }
    routed = {site.name: tensors.pop(f"routed/{site.name}") for site in sites if site.experts}
    about_run = dict(about["metadata"])
    return list(about["labels"]), sites, tokens, statistics, about_run, routed, shard_tokens


def _described(site: Site) -> dict[str, Any]:
    """A site's fields; a dense one's as files had them before there were mixtures."""
    fields = dataclasses.asdict(site)
    return fields if site.experts else {k: v for k, v in fields.items() if k != "experts"}


def _site(**entry: Any) -> Site:
    site = Site(**entry)
    texts = all(isinstance(text, str) for text in (site.name, site.activation, site.stack))
    if not texts or not all(type(n) is int and n > 0 for n in (site.width, site.calls)):
        raise ValueError(f"{entry!r:.80} is no site")
    return site


def _tensors(profile: Profile) -> dict[str, torch.Tensor]:
    stacks = list(profile.stack_tokens)
    tensors = {
        _tokens_name(stack, stacks, of): tokens
        for of, per_stack in (
            ("tokens", profile.stack_tokens),
            ("shard_tokens", profile.shard_tokens),
        )
        for stack, tokens in per_stack.items()
    }
    for name, values in profile.statistics.items():
        tensors |= {f"{name}/{site}": values[site] for site in profile.sites}
    tensors |= {f"routed/{site}": routed for site, routed in profile.routed.items()}
    return tensors


def _tokens_name(stack: str, stacks: list[str], of: str) -> str:
    return of if stack == main_stack(stacks) else f"{of}/{stack}"

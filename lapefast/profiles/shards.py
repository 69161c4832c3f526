"""Shards: each label's rows of text dealt out in turn, and counted apart.

How much a selection would change with other text of the same kind shows in how much it changes from
shard to shard. Whole rows are dealt, never tokens, since tokens of one text are not independent.
"""

from __future__ import annotations

from typing import TYPE_CHECKING

import torch
from torch import Tensor

from lapefast.errors import InputError

if TYPE_CHECKING:
    from lapefast.profiles.profile import Profile

__all__ = ["SHARDS", "check_shards", "narrowed"]

SHARDS = 8
"""Row r of a label, counted from 0 over all its text, belongs to shard r % SHARDS."""


def narrowed(counts: Tensor) -> Tensor:
    """Counts of shards, int64, as the int32 that a profile holds them in.

    Raises:
        InputError: one is larger than int32 can say.
    """
    limit = torch.iinfo(torch.int32).max
    if counts.numel() and (largest := int(counts.max())) > limit:
        raise InputError(
            f"shard_counts are int32, but a neuron is active at {largest} tokens of one shard, "
            f"above {limit}; leave shard_counts out of the statistics of so much text"
        )
    return counts.to(torch.int32)


def check_shards(profile: Profile) -> None:
    """Raise InputError unless a profile's shards, if it holds any, add up to its counts and tokens.

    Nor may a shard count more than its tokens.
    """
    held = "shard_counts" in profile.statistics
    whole = profile.stack_tokens | profile.routed
    if profile.shard_tokens.keys() != (whole.keys() if held else set()):
        raise InputError(
            "shard_counts and shard_tokens of every stack and mixture must be given together"
        )
    if not held:
        return
    if "counts" not in profile.statistics:
        raise InputError("shard_counts need counts beside them; give both")
    for name, tokens in profile.shard_tokens.items():
        labels, *experts = whole[name].shape
        shape = (labels, SHARDS, *experts)
        if tokens.dtype != torch.int64 or tokens.shape != shape:
            raise InputError(
                f"shard_tokens of {name} must be int64 [labels, shards"
                f"{', experts' if experts else ''}] = {list(shape)}, got {tokens.dtype} "
                f"{list(tokens.shape)}"
            )
        if (tokens < 0).any() or not torch.equal(tokens.sum(1), whole[name]):
            raise InputError(f"shard_tokens of {name} must add up to the label's tokens")
    for site in profile.site_info:
        counts = profile.shard_counts[site.name]
        if not torch.equal(counts.sum(1), profile.counts[site.name]):
            raise InputError(f"shard_counts of site {site.name} must add up to its counts")
        seen = profile.shard_tokens.get(site.name)
        tokens = profile.shard_tokens[site.stack] * site.calls if seen is None else seen
        if (counts < 0).any() or (counts > tokens[..., None]).any():
            raise InputError(
                f"shard_counts of site {site.name} must lie between 0 and the shard's tokens"
            )

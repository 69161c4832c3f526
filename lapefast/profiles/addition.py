"""Profiles of one model that add up: whether they may, and what the sum says of itself."""

from __future__ import annotations

from collections.abc import Mapping
from typing import TYPE_CHECKING, Any

import torch

from lapefast.errors import InputError
from lapefast.profiles.shards import narrowed

if TYPE_CHECKING:
    from lapefast.profiles.profile import Profile
    from lapefast.profiles.storage import Arguments

__all__ = ["added"]

_SHARED = ("model", "fingerprint", "dtype", "threshold", "edited")
"""Metadata that profiles have in common when they are added; `model` is only a name."""


def added(first: Profile, second: Profile) -> Arguments:
    """What the sum of two profiles is made of; see `Profile.__add__`.

    Raises:
        InputError: the profiles do not belong together, or share text.
    """
    _check_addable(first, second)
    labels = list(dict.fromkeys(first.labels + second.labels))
    my_rows, their_rows = (
        torch.tensor([labels.index(label) for label in part.labels]) for part in (first, second)
    )

    def total(mine: torch.Tensor, theirs: torch.Tensor) -> torch.Tensor:
        if mine.dtype is torch.int32:
            return narrowed(total(mine.long(), theirs.long()))
        zeros = mine.new_zeros(len(labels), *mine.shape[1:])
        return zeros.index_add_(0, my_rows, mine).index_add_(0, their_rows, theirs)

    tokens, shard_tokens = (
        {stack: total(of, theirs[stack]) for stack, of in mine.items()}
        for mine, theirs in (
            (first.stack_tokens, second.stack_tokens),
            (first.shard_tokens, second.shard_tokens),
        )
    )
    statistics = {
        name: {site: total(mine[site], second.statistics[name][site]) for site in mine}
        for name, mine in first.statistics.items()
    }
    routed = {site: total(mine, second.routed[site]) for site, mine in first.routed.items()}
    about_runs = _added_metadata(first, second)
    return labels, first.site_info, tokens, statistics, about_runs, routed, shard_tokens


def _check_addable(first: Profile, second: Profile) -> None:
    for key in _SHARED[1:]:
        mine, theirs = first.metadata.get(key), second.metadata.get(key)
        if None not in (mine, theirs) and mine != theirs:
            if key == "fingerprint":
                models = " and ".join(
                    f"{one.metadata.get('model') or 'one without a name'} "
                    f"(fingerprint {one.metadata[key][:12]})"
                    for one in (first, second)
                )
                raise InputError(
                    f"profiles of models that differ cannot be added: {models}; "
                    "profile both texts with one model"
                )
            raise InputError(
                f"profiles with {key} {mine} and {theirs} cannot be added; "
                "profile both texts with one model and one setting"
            )
    mine, theirs = _weights(first), _weights(second)
    if any(mine[version] != theirs[version] for version in mine.keys() & theirs.keys()):
        raise InputError(
            f"profiles of models that differ cannot be added: {first.metadata.get('model')} and "
            f"{second.metadata.get('model')} have the same last projections, but other weights or "
            "adapters; profile both texts with one model"
        )
    for mine, theirs in zip(first.site_info, second.site_info, strict=False):
        if mine != theirs:
            raise InputError(
                f"profiles of models that differ cannot be added: one has the site {mine} "
                f"where the other has {theirs}"
            )
    if len(first.site_info) != len(second.site_info):
        raise InputError(
            f"profiles of models that differ cannot be added: one has {len(first.site_info)} "
            f"sites and the other {len(second.site_info)}"
        )
    if first.statistics.keys() != second.statistics.keys():
        raise InputError(
            f"profiles of {', '.join(first.statistics)} and of {', '.join(second.statistics)} "
            "cannot be added; profile both texts with the same statistics"
        )
    for mine in _corpora(first):
        for theirs in _corpora(second):
            if _overlap(mine, theirs):
                parts = [one.get("part") for one in (mine, theirs)]
                if all(parts) and parts[0]["number"] != parts[1]["number"]:
                    raise InputError(
                        f"profiles of parts that were not made in one way cannot be added: "
                        f"{_way(mine)} and {_way(theirs)} of {mine['source']}; make all parts "
                        "with one number of parts, batch_size, seq_len and max_tokens"
                    )
                raise InputError(
                    f"profiles that share text cannot be added: rows {mine['rows']} and "
                    f"{theirs['rows']} of {mine['source']} would be counted twice for label "
                    f"{mine['label']!r}; leave one out"
                )


def _added_metadata(first: Profile, second: Profile) -> dict[str, Any]:
    shared = {}
    for key in _SHARED:
        known = first.metadata.get(key)
        shared[key] = second.metadata.get(key) if known is None else known
    corpora = _corpora(first) + _corpora(second)
    return {**shared, "corpora": corpora, "runs": _runs(first) + _runs(second)}


def _corpora(profile: Profile) -> list[dict[str, Any]]:
    """The corpus entries, each with the row length that its row range is measured in."""
    length = profile.metadata.get("seq_len")
    return [{"seq_len": length, **entry} for entry in profile.metadata.get("corpora", ())]


def _weights(profile: Profile) -> dict[str, str]:
    """The digest of the model's weights by the version of transformers, which names them."""
    return {
        run.get("versions", {}).get("transformers"): run["weights"]
        for run in _runs(profile)
        if run.get("weights")
    }


def _overlap(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two corpus entries hold some text in common under one label."""
    # The text itself is known by its identity; names alone may be the same by chance.
    known = "identity" if a.get("identity") and b.get("identity") else "source"
    if a.get(known) is None or a[known] != b.get(known) or a["label"] != b["label"]:
        return False
    if _other_part(a, b):
        return False
    if not (a["seq_len"] and b["seq_len"]):
        a, b = {**a, "seq_len": 1}, {**b, "seq_len": 1}
    # Rows of two lengths are no common measure: compared are their places in the token stream.
    starts, stops = zip(
        *([row * entry["seq_len"] for row in entry["rows"]] for entry in (a, b)), strict=True
    )
    return max(starts) < min(stops)


def _other_part(a: Mapping[str, Any], b: Mapping[str, Any]) -> bool:
    """Whether two entries are different parts of one text that was divided in one way."""
    said = ("of", "batch_size", "max_tokens")
    ways = [
        (entry["seq_len"], *(entry.get("part", {}).get(name) for name in said)) for entry in (a, b)
    ]
    return "part" in a and ways[0] == ways[1] and a["part"]["number"] != b["part"]["number"]


def _way(entry: Mapping[str, Any]) -> str:
    part = entry["part"]
    return (
        f"part {part['number']} of {part['of']} (batches of {part['batch_size']} rows of "
        f"{entry['seq_len']}, max_tokens {part.get('max_tokens')})"
    )


def _runs(profile: Profile) -> list[dict[str, Any]]:
    """The settings of the runs that a profile came from, each without what all of them share."""
    if "runs" in profile.metadata:
        return profile.metadata["runs"]
    apart = (*_SHARED, "corpora")
    return [{key: value for key, value in profile.metadata.items() if key not in apart}]

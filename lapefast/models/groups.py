"""The group of each token of a forward pass, from what a user says of the batch."""

from __future__ import annotations

from collections.abc import Collection, Sequence

import torch
from torch import Tensor

from lapefast.errors import InputError

__all__ = ["shard_groups", "token_groups"]


def token_groups(
    labels: Sequence[str],
    stacks: Collection[str],
    label: str | None = None,
    mask: Tensor | None = None,
    groups: Tensor | None = None,
    decoder_mask: Tensor | None = None,
    decoder_groups: Tensor | None = None,
) -> dict[str, Tensor]:
    """Stack -> the group of each token, integers [batch, length], or of all, [1].

    Args:
        labels: what groups are indices of.
        stacks: of the model.
        label, mask, groups, decoder_mask, decoder_groups: see `lapefast.recording.Recorder.set`.

    Raises:
        InputError: for an unknown label, an index out of range, or not just one of label and
            groups.
    """
    if (label is None) == (groups is None):
        raise InputError("set needs either a label or groups, not both or neither")
    if set(stacks) == {"encoder", "decoder"}:
        if groups is not None and decoder_groups is None:
            raise InputError(
                "groups of an encoder-decoder's input need decoder_groups for its decoder's"
            )
        given = {"encoder": (mask, groups), "decoder": (decoder_mask, decoder_groups)}
    elif decoder_mask is None and decoder_groups is None:
        given = {name: (mask, groups) for name in stacks}
    else:
        raise InputError(
            "decoder_mask and decoder_groups are for encoder-decoder models; this model takes "
            "mask and groups"
        )
    return {name: _indices(labels, label, *pair) for name, pair in given.items()}


def shard_groups(groups: Tensor, first: Tensor, shards: int) -> tuple[Tensor, Tensor]:
    """The groups of tokens whose labels' rows are dealt to shards in turn, and where to go on.

    Args:
        groups: [batch, length], integers; each token's label, or -1.
        first: int64 [labels], the number of each label's first row here. A row that holds tokens
            of several labels is a row of each; one without a token of a label is none of its.
        shards: how many; row r goes to shard r % shards.

    Returns:
        int32 [batch, length], label * shards + shard or -1; and ``first`` of the batch after.
    """
    place = groups.long() + 1  # the first place is for -1
    holds = first.new_zeros(len(groups), len(first) + 1).scatter_(1, place, 1)
    holds[:, 0] = 0
    rows = torch.nn.functional.pad(first, (1, 0)) + holds.cumsum(0)
    shard = ((rows - holds) % shards).gather(1, place)
    index = torch.where(groups >= 0, groups * shards + shard, -1)
    return index.to(torch.int32), first + holds.sum(0)[1:]


def _indices(
    labels: Sequence[str], label: str | None, mask: Tensor | None, groups: Tensor | None
) -> Tensor:
    if groups is None:
        if label not in labels:
            raise InputError(f"label {label!r} is none of these labels: {', '.join(labels)}")
        index = torch.tensor([labels.index(label)], dtype=torch.int32)
        if mask is None:
            return index
        _check_shape("mask", mask)
        return torch.where(mask != 0, index.to(mask.device), -1)
    _check_shape("groups", groups)
    if groups.is_floating_point() or groups.dtype is torch.bool:
        raise InputError(f"groups must be integers like the input ids, got {groups.dtype}")
    outside = (groups < -1) | (groups >= len(labels))
    if bool(outside.any()):
        raise InputError(
            f"groups holds {int(groups[outside][0])}, but there are {len(labels)} "
            "labels, numbered from 0 (-1 for none)"
        )
    if mask is not None:
        if mask.shape != groups.shape:
            raise InputError(
                f"mask and groups must have one shape, got {list(mask.shape)} and "
                f"{list(groups.shape)}"
            )
        groups = torch.where(mask != 0, groups, -1)
    return groups


def _check_shape(name: str, given: Tensor) -> None:
    if given.dim() != 2:
        raise InputError(
            f"{name} must be [batch, length] like the input ids, got shape {list(given.shape)}"
        )

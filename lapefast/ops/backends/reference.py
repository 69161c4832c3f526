"""The ops in plain PyTorch: specification, fallback on every device, and oracle of the tests."""

from __future__ import annotations

import math

import torch
from torch import Tensor

from lapefast.errors import InputError
from lapefast.ops.activations import activate
from lapefast.ops.checks import Size

__all__ = [
    "edit",
    "edited_product",
    "leave_one_out",
    "observe",
    "product",
    "profile",
    "profile_",
    "why_not",
]

_MAPS = 1 << 24  # elements of attention maps that are held at once: 64 MB


def why_not(device_type: str) -> str | None:
    """Why this backend cannot serve a device type; it serves every one."""
    return None


def product(gate: Tensor, up: Tensor | None, activation: str) -> Tensor:
    """`activation(gate) * up`, or the activation itself; rounded after each, as eager does."""
    activated = activate(gate, activation)
    return activated if up is None else activated * up


def edited_product(
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    sets: Tensor | None,
    offsets: Tensor,
    neurons: Tensor,
    scale: Tensor,
    shift: Tensor,
) -> Tensor:
    """`product` with the activations of the named neurons edited; [..., width], differentiable.

    What is out of range edits nothing.
    """
    activated = activate(gate, activation)
    edited, scales, shifts = _dense_tables(gate.shape[-1], offsets, neurons, scale, shift)
    row_sets = gate.new_zeros(1, dtype=torch.int64) if sets is None else sets.reshape(-1).long()
    valid = (row_sets >= 0) & (row_sets < offsets.numel() - 1)
    row_sets = torch.where(valid, row_sets, 0)
    shape = () if row_sets.numel() == 1 else gate.shape[:-1]
    if offsets.numel() > 1:
        edited, scales, shifts = (
            table.index_select(0, row_sets).reshape(*shape, gate.shape[-1])
            for table in (edited, scales, shifts)
        )
        moved = torch.where(scales == 0, shifts, scales * activated.float() + shifts)
        chosen = edited & valid.reshape(*shape, 1)
        activated = torch.where(chosen, moved.to(activated.dtype), activated)
    return activated if up is None else activated * up


def profile(
    size: Size,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    threshold: float,
    groups: Tensor | None,
    counts: Tensor | None,
    sums: Tensor | None,
    square_sums: Tensor | None,
    up_abs_sums: Tensor | None,
    flags: Tensor,
) -> Tensor:
    """See `declarations.compute_profile`."""
    activated = activate(gate, activation)
    made = activated if up is None else activated * up
    _count(activated, made, up, threshold, groups, counts, sums, square_sums, up_abs_sums, flags)
    # A new tensor, as the schema promises: without up the identity would be gate itself.
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device).copy_(made)


def profile_(size: Size, gate: Tensor, *arguments) -> None:
    """See `declarations.compute_profile_`."""
    gate.copy_(profile(size, gate, *arguments))


def observe(
    size: Size,
    gate: Tensor,
    activation: str,
    threshold: float,
    groups: Tensor | None,
    counts: Tensor | None,
    sums: Tensor | None,
    square_sums: Tensor | None,
    up_abs_sums: None,
    flags: Tensor,
) -> None:
    """See `declarations.compute_observe`."""
    activated = activate(gate, activation)
    _count(activated, activated, None, threshold, groups, counts, sums, square_sums, None, flags)


def edit(
    size: Size,
    gate: Tensor,
    up: Tensor | None,
    activation: str,
    sets: Tensor | None,
    offsets: Tensor,
    neurons: Tensor,
    scale: Tensor,
    shift: Tensor,
    flags: Tensor,
) -> Tensor:
    """See `declarations.compute_edit`."""
    number = offsets.numel() - 1
    index = gate.new_zeros(1, dtype=torch.int32) if sets is None else sets
    if size[0]:
        _check_range("edit", "sets", "set", index, number, flags)
        _check_tables(gate.shape[-1], index, offsets, neurons, flags)
    made = edited_product(gate, up, activation, sets, offsets, neurons, scale, shift)
    return torch.empty(gate.shape, dtype=gate.dtype, device=gate.device).copy_(made)


def _count(
    activated: Tensor,
    made: Tensor,
    up: Tensor | None,
    threshold: float,
    groups: Tensor | None,
    counts: Tensor | None,
    sums: Tensor | None,
    square_sums: Tensor | None,
    up_abs_sums: Tensor | None,
    flags: Tensor,
) -> None:
    width = activated.shape[-1]
    given = [s for s in (counts, sums, square_sums, up_abs_sums) if s is not None]
    labels = given[0].shape[0] if given else None
    index = torch.zeros(1, dtype=torch.int32, device=activated.device) if groups is None else groups
    op = "observe" if made is activated and up is None else "profile"
    if math.prod(activated.shape[:-1]):
        _check_range(op, "groups", "group", index, labels, flags)
    index = index.reshape(-1).long()
    valid = index >= 0 if labels is None else (index >= 0) & (index < labels)
    index = torch.where(valid, index, 0)

    def add(statistic: Tensor | None, values: Tensor) -> None:
        if statistic is None or not statistic.shape[0]:
            return
        values = values.to(statistic.dtype)
        if index.numel() == 1:
            values = values.sum(0, keepdim=True)
        statistic.index_add_(0, index, torch.where(valid.unsqueeze(-1), values, 0))

    def rows_of(tensor: Tensor) -> Tensor:
        return tensor.detach().reshape(-1, width) if width else tensor.new_empty(index.numel(), 0)

    values = rows_of(activated)
    limit = torch.tensor(threshold, dtype=torch.float32, device=values.device)
    add(counts, values.float() > limit)
    if sums is not None:
        add(sums, values)
    if square_sums is not None:
        add(square_sums, rows_of(made).double().square())
    if up_abs_sums is not None and up is not None:
        add(up_abs_sums, rows_of(up).abs())
    flags[0] += (~values.isfinite() & valid.unsqueeze(-1)).sum()


def _check_range(
    op: str, name: str, thing: str, index: Tensor, number: int | None, flags: Tensor
) -> None:
    outside = index < -1 if number is None else (index < -1) | (index >= number)
    if index.device.type != "cpu":
        flags[1] += outside.sum()
    elif outside.any():
        held = "any number of" if number is None else number
        raise InputError(
            f"{op}: {name} holds {index[outside][0].item()}, but there are {held} {thing}s, "
            f"numbered from 0 (-1 for none)."
        )


def _check_tables(width: int, index: Tensor, offsets: Tensor, neurons: Tensor, flags: Tensor):
    if index.device.type != "cpu":
        used = torch.arange(neurons.numel(), device=neurons.device) < offsets[-1]
        flags[1] += (used & ((neurons < 0) | (neurons >= width))).sum()
        return
    bounds = offsets.tolist()
    for chosen in index.unique().tolist():
        if chosen < 0:
            continue
        start, stop = bounds[chosen], bounds[chosen + 1]
        if not 0 <= start <= stop <= neurons.numel():
            raise InputError(
                f"edit: offsets[{chosen}:{chosen + 2}] must ascend within [0, {neurons.numel()}], "
                f"got {start} and {stop}."
            )
        members = neurons[start:stop]
        outside = (members < 0) | (members >= width)
        if outside.any():
            raise InputError(
                f"edit: neurons of set {chosen} must lie within [0, {width}), "
                f"got {members[outside][0].item()}."
            )
        if (members[1:] <= members[:-1]).any():
            raise InputError(f"edit: neurons of set {chosen} must ascend without repeats.")


def _dense_tables(
    width: int, offsets: Tensor, neurons: Tensor, scale: Tensor, shift: Tensor
) -> tuple[Tensor, Tensor, Tensor]:
    """What each set does to each neuron: edited bool, scale and shift float32, [sets, width]."""
    number = offsets.numel() - 1
    position = torch.arange(neurons.numel(), device=neurons.device, dtype=torch.int32)
    owner = torch.searchsorted(offsets, position, right=True) - 1
    used = (owner >= 0) & (owner < number) & (neurons >= 0) & (neurons < width)
    # What is unused goes to one more cell, which is cut off again: no data-dependent shapes.
    cell = torch.where(used, owner * width + neurons, number * width)

    def dense(values: Tensor, fill: float | bool) -> Tensor:
        table = torch.full((number * width + 1,), fill, dtype=values.dtype, device=values.device)
        return table.scatter(0, cell, values)[:-1].reshape(number, width)

    return dense(used, False), dense(scale, 1.0), dense(shift, 0.0)


def leave_one_out(
    query: Tensor, key: Tensor, logits: Tensor, factor: float, softcap: float
) -> Tensor:
    """See `declarations.compute_leave_one_out`; a few dimensions of one head at a time."""

    def softmax(values: Tensor) -> Tensor:
        capped = softcap * torch.tanh(values / softcap) if softcap else values
        return torch.where(values == -torch.inf, -torch.inf, capped).softmax(-1)

    heads, length, dimensions = query.shape
    served = heads // key.shape[0]
    step = max(1, _MAPS // max(length * key.shape[1], 1))
    scores = query.new_zeros((heads, dimensions), dtype=torch.float64)
    for head, map_ in enumerate(logits):
        rows = (map_ > -torch.inf).any(-1)
        q, k, map_ = query[head, rows].T, key[head // served].T, map_[rows]
        whole = softmax(map_)
        for start in range(0, dimensions, step):
            some = slice(start, start + step)
            removed = q[some, :, None] * k[some, None, :] * factor
            change = softmax(map_ - removed) - whole
            scores[head, some] = change.square().sum((1, 2), dtype=torch.float64)
    return scores

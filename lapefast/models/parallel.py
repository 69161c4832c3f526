"""Tensor parallelism as a whole: how many processes share a model's layers, and which one speaks.

What is called a collective here must be called by all of the processes, in the same order.
"""

from __future__ import annotations

import torch
from torch import distributed, nn

from lapefast.errors import InputError
from lapefast.models.bare import bare_model, unwrap
from lapefast.models.inputs import input_device

__all__ = ["leads", "least", "parallel_group", "parallel_size", "refuse_split", "split_mesh"]


def parallel_size(model: nn.Module) -> int:
    """Over how many processes the model's layers are split; 1 where one process holds them."""
    meshes = (split_mesh(parameter) for parameter in bare_model(model).parameters())
    found = next((mesh.size() for mesh in meshes if mesh is not None), 1)
    return getattr(unwrap(model), "tp_size", None) or found


def parallel_group(model: nn.Module) -> distributed.ProcessGroup | None:
    """The processes over which the model's layers are split; None where one process holds them."""
    if parallel_size(model) == 1:
        return None
    meshes = (split_mesh(parameter) for parameter in bare_model(model).parameters())
    found = next((mesh.get_group() for mesh in meshes if mesh is not None), None)
    return found if found is not None else distributed.group.WORLD


def split_mesh(weight: object):
    """The device mesh over which a weight is split along its inputs; None where it is not.

    Only tensor parallelism splits a matrix so. Fully sharded data parallelism splits the outputs,
    and gives a forward pass the whole.
    """
    placements = getattr(weight, "placements", ())
    inputs = any(one.is_shard(weight.dim() - 1) for one in placements) and weight.dim() > 1
    return weight.device_mesh if inputs else None


def refuse_split(model: nn.Module, what: str) -> None:
    """Raise InputError, if the model's layers are split, as ``what`` needs them whole."""
    size = parallel_size(model)
    if size > 1:
        raise InputError(
            f"{what} needs whole layers, but this {type(model).__name__}'s are split over {size} "
            "processes by tensor parallelism; load the model without, for example with "
            'device_map="auto"'
        )


def least(model: nn.Module, value: int) -> int:
    """The least of the processes' values; a collective where the model is split."""
    if parallel_size(model) == 1:
        return value
    shared = torch.tensor(value, device=input_device(model))
    distributed.all_reduce(shared, distributed.ReduceOp.MIN)
    return int(shared)


def leads() -> bool:
    """Whether this process speaks and writes for all: the first of them, or the only one."""
    started = distributed.is_available() and distributed.is_initialized()
    return not started or distributed.get_rank() == 0

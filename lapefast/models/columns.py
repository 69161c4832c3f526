"""Which neurons of an FFN this process computes under tensor parallelism, and how to have all.

The projections that widen are split by their outputs and the last one by its inputs, so each
process computes some columns of the activation, in the order of the ranks. Some FFNs gather before
their activation (Phi3's, whose gate and up are one projection): those every process computes whole.
No weight tells the two apart, so a few tokens do.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import TYPE_CHECKING

import torch
from torch import Tensor, distributed, nn

from lapefast.errors import InputError
from lapefast.models.bare import evaluating
from lapefast.models.inputs import forward_inputs, probe_ids
from lapefast.models.parallel import refuse_split, split_mesh
from lapefast.models.projections import up_projection
from lapefast.models.structure import FFN

if TYPE_CHECKING:
    from torch.distributed.device_mesh import DeviceMesh

__all__ = ["Columns", "find_columns"]


@dataclass(frozen=True)
class Columns:
    """Neurons ``start`` to ``stop`` of an FFN, which this process of ``mesh`` computes.

    Attributes:
        width: of the whole FFN.
    """

    start: int
    stop: int
    width: int
    mesh: DeviceMesh

    def gather(self, columns: Tensor) -> Tensor:
        """The columns of all processes, [..., width], from this one's [..., stop - start].

        A collective; nothing is added up.
        """
        from torch.distributed import tensor

        shape = torch.Size((*columns.shape[:-1], self.width))
        stride = torch.empty(shape, device="meta").stride()
        parts = [tensor.Shard(columns.dim() - 1)]
        whole = tensor.DTensor.from_local(
            columns, self.mesh, parts, run_check=False, shape=shape, stride=stride
        )
        return whole.full_tensor()

    def total(self, values: Tensor) -> Tensor:
        """The sum of what each process found among its own neurons; a collective."""
        values = values.clone()
        distributed.all_reduce(values, group=self.mesh.get_group())
        return values

    def own(self, neurons: Tensor, *values: Tensor) -> tuple[Tensor, ...]:
        """Those of ``neurons``, and of their values, that are this process's, by its columns."""
        mine = (neurons >= self.start) & (neurons < self.stop)
        return neurons[mine] - self.start, *(value[mine] for value in values)


def find_columns(bare: nn.Module, ffns: list[FFN]) -> dict[str, Columns]:
    """Site -> this process's neurons, for the FFNs whose activation is split; a collective.

    Raises:
        InputError: where it can't be told which neurons a process computes.
    """
    if any(ffn.site.experts for ffn in ffns):
        refuse_split(bare, "a mixture of experts")
    if all(_mesh(ffn) is None for ffn in ffns):
        return {}
    widths: dict[nn.Module, int] = {}

    def see(module: nn.Module, args: tuple, output: Tensor) -> None:
        widths[module] = output.shape[-1]

    hooks = [ffn.activation.register_forward_hook(see) for ffn in ffns]
    try:
        with evaluating(bare), torch.no_grad():
            bare(**forward_inputs(bare, probe_ids(bare)))
    finally:
        for hook in hooks:
            hook.remove()
    split = [ffn for ffn in ffns if widths.get(ffn.activation) != ffn.site.width]
    return {ffn.site.name: _columns_of(ffn, widths.get(ffn.activation)) for ffn in split}


def _columns_of(ffn: FFN, width: int | None) -> Columns:
    mesh = _mesh(ffn)
    if width is not None and mesh is not None and mesh.ndim == 1:
        # Split as torch.chunk does: the last part may be shorter.
        size = -(-ffn.site.width // mesh.size())
        start, stop = (min(size * (mesh.get_local_rank() + i), ffn.site.width) for i in (0, 1))
        if width == stop - start == ffn.last.weight.to_local().shape[1]:
            columns = Columns(start, stop, ffn.site.width, mesh)
            if not ffn.gated or _pairs(ffn, columns):
                return columns
    raise InputError(
        f"{ffn.site.name} is split over processes in a way that lapefast does not know: which of "
        f"its {ffn.site.width} neurons this process computes can't be told"
    )


def _pairs(ffn: FFN, columns: Columns) -> bool:
    """Whether this process's part of a projection that makes gate and up is of its own neurons."""
    projection, up = up_projection(ffn)
    if up == 0:
        return True
    whole = projection.weight.full_tensor()
    own = torch.cat([whole[first + columns.start : first + columns.stop] for first in (0, up)])
    # What is not finite is told of later, where all processes hear it.
    return torch.equal(projection.weight.to_local().nan_to_num(), own.nan_to_num())


def _mesh(ffn: FFN):
    return split_mesh(getattr(ffn.last, "weight", None))

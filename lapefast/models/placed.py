"""What is placed at a site: statistics, edits, and the ops that they go to.

`SiteState` hangs on the module whose forward was replaced by one of
`lapefast.models.placed_forwards`.
"""

from __future__ import annotations

import functools
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.modules import module as torch_module

from lapefast import ops
from lapefast.models.activations import fused_dtypes
from lapefast.models.columns import Columns
from lapefast.models.forwards import clamped_gate
from lapefast.models.listed import ListedRouting
from lapefast.models.routing import Routing
from lapefast.models.rows import RowIndex
from lapefast.models.structure import FFN
from lapefast.models.traces import Replaced


@dataclass
class SiteStatistics:
    """Where a recorder's ops add up; shapes as in `lapefast.ops`."""

    groups: RowIndex
    threshold: float
    flags: Tensor
    counts: Tensor | None = None
    sums: Tensor | None = None
    square_sums: Tensor | None = None
    up_abs_sums: Tensor | None = None
    routed: Tensor | None = None
    """In a mixture: counted rows per group, int64 [groups]. Groups are labels * experts there."""
    backend: str = "auto"
    exact: bool = True
    last: bool = False
    """Whether nothing reads this FFN's output, so that its product need not be made."""

    def tensors(self) -> dict[str, Tensor]:
        """Name -> statistic, of those asked for."""
        named = ("counts", "sums", "square_sums", "up_abs_sums", "routed")
        return {name: getattr(self, name) for name in named if getattr(self, name) is not None}

    def by_group(self, groups: int) -> dict[str, Tensor]:
        """The same as views [groups, ...] of tokens; in a mixture [groups, experts, ...]."""
        return {
            name: tensor if self.routed is None else tensor.unflatten(0, (groups, -1))
            for name, tensor in self.tensors().items()
        }

    def scratch(self, groups: Tensor) -> SiteStatistics:
        """The same with zeros of its own, for a probe, whose tokens are of one group."""
        few = self.groups.experts
        zeros = {name: torch.zeros_like(tensor[:few]) for name, tensor in self.tensors().items()}
        flags = torch.zeros_like(self.flags)
        return replace(self, groups=self.groups.over(groups.to(flags.device)), flags=flags, **zeros)

    def muted(self) -> SiteStatistics:
        """The same without anything to add to."""
        nothing = dict.fromkeys(self.tensors())
        return replace(self, flags=torch.zeros_like(self.flags), **nothing)


@dataclass
class SiteEdits:
    """One site's edit tables, and which set of them each row has."""

    sets: RowIndex
    tables: ops.EditTables
    exact: bool = True

    @property
    def backend(self) -> str:
        return self.tables.backend


class SiteState:
    """What is placed at one site: a recorder's statistics, a steering's edits, or both."""

    def __init__(self, ffn: FFN, replaced: Replaced | None, columns: Columns | None = None) -> None:
        self.name = ffn.site.name
        self.columns = columns  # this process's neurons, where they are split over several
        self.width = ffn.site.width if columns is None else columns.stop - columns.start
        self.form = ffn.forward
        self.gate = None
        if ffn.activation is ffn.owner:
            self.gate = clamped_gate(ffn.owner, dense=not ffn.site.experts)
        self.replaced = replaced  # None where only its experts' own are
        self.statistics: SiteStatistics | None = None
        self.edits: SiteEdits | None = None
        self.proven = False
        self.dtype: torch.dtype | None = None  # of the activation, once it was seen
        self.fired = 0  # times, while a probe runs
        self.probe: torch.Size | None = None  # what a probe's input is, while one runs
        self.kernel = "identity"
        self.fused: frozenset[torch.dtype] = frozenset()
        self.left = False  # whether a placement that ended could not take this out
        self.foreign = False  # whether somebody else replaced the activation's forward
        self.routing: Routing | ListedRouting | None = None  # in a mixture: says whose rows come
        self.experts: list[SiteState] = []  # of experts that are modules of their own

    @property
    def active(self) -> bool:
        """Whether anything is placed here; without it the module's own forward runs."""
        return self.statistics is not None or self.edits is not None

    def share(self) -> None:
        """Let experts that are modules of their own add to, and be edited by, what is here."""
        for one in self.experts:
            one.statistics, one.edits = self.statistics, self.edits

    def choose_kernel(self, activation: nn.Module, device: torch.device) -> None:
        """Decide, for what is placed now, in which dtypes the kernel computes the activation."""
        # What writes in place is called, as the model may read on from what it gave.
        if self.foreign or (self.form is None and getattr(activation, "inplace", False)):
            return
        for role in self._roles():
            found = fused_dtypes(activation, device, role.backend, self.exact)
            # Either may come to compute the activation.
            self.fused = found[1] if role is self._roles()[0] else self.fused & found[1]
            self.kernel = found[0]

    @property
    def exact(self) -> bool:
        """Whether outputs must equal the model's own bit for bit."""
        return all(role.exact for role in self._roles())

    def _roles(self) -> list[SiteStatistics | SiteEdits]:
        return [role for role in (self.statistics, self.edits) if role is not None]

    def original(self, module: nn.Module) -> Any:
        """The forward, or method, that was there before."""
        before = self.replaced.before
        return before or functools.partial(getattr(type(module), self.replaced.attribute), module)

    def product(self, activation: nn.Module, gate: Tensor, up: Tensor, writable: bool) -> Tensor:
        """`activation(gate) * up`, counted and edited."""
        return self.product_of(*self._given(activation, gate, writable), up)

    def product_of(self, gate: Tensor, kernel: str, writable: bool, up: Tensor) -> Tensor:
        """The same of what the kernel reads, as which activation, which it may write over."""
        if up.dtype is not gate.dtype or up.shape != gate.shape:
            return self.activation_of(gate, kernel) * up
        if self.statistics is None:
            return self._edit(gate, up, kernel)
        if self.edits is not None:
            gate, kernel, writable = self._edit(gate, None, kernel), "identity", True
        statistics = self._counting()
        if writable and not (
            torch.compiler.is_compiling()
            or (torch.is_grad_enabled() and (gate.requires_grad or up.requires_grad))
        ):
            _profile(ops.profile_, gate, up, kernel, statistics)
            return gate
        return _profile(ops.profile, gate, up, kernel, statistics)

    def route(self, experts: Tensor, tokens: Tensor) -> None:
        """Let a mixture's ops know each coming row's expert (-1: none) and token, [rows]."""
        if self.statistics is not None:
            self.statistics.groups.route(experts, tokens)
        if self.edits is not None:
            self.edits.sets.route(experts, tokens)

    def count_routed(self) -> None:
        """Count the rows that come, by their group."""
        statistics = self._counting()
        if statistics is not None and statistics.routed is not None:
            groups = statistics.groups.tensor
            statistics.routed.index_add_(0, groups.clamp(min=0).long(), (groups >= 0).long())

    def input_shape(self) -> tuple[int, int] | None:
        """Batch and length of the input whose tokens come here one by one, where it is known."""
        roles = [self.statistics and self.statistics.groups, self.edits and self.edits.sets]
        known = [role.shape for role in roles if role is not None and role.shape is not None]
        return self.probe or next(iter(known), None)

    def activated(self, module: nn.Module, given: tuple, options: dict) -> Tensor:
        """The activation module's output, counted and edited; the product is the model's own."""
        if getattr(module, "inplace", False):
            made = self.original(module)(*given, **options)
            edited = self.activation_of(made, "identity")
            return made if edited is made else made.copy_(edited)
        if len(given) == 1 and not options and given[0].dtype in self.fused:
            return self.activation_of(given[0], self.kernel)
        return self.activation_of(self.original(module)(*given, **options), "identity")

    def activation_of(self, gate: Tensor, kernel: str) -> Tensor:
        """The activation of what the kernel reads, counted and edited."""
        if self.edits is not None:
            return self.observe(self._edit(gate, None, kernel))
        if kernel == "identity":
            return self.observe(gate)
        return _profile(ops.profile, gate, None, kernel, self._counting())

    def observe(self, activation: Tensor, kernel: str = "identity") -> Tensor:
        """Count an activation that is made (or, by `kernel`, one that nothing else reads)."""
        statistics = self._counting()
        if statistics is not None:
            ops.observe(
                activation,
                kernel,
                statistics.threshold,
                statistics.groups.tensor,
                statistics.counts,
                statistics.sums,
                statistics.square_sums,
                statistics.flags,
                backend=statistics.backend,
            )
        return activation

    def ends_here(self) -> bool:
        """Whether this FFN may stop at its activation: nothing reads on, nothing needs up."""
        statistics = self.statistics
        return (
            statistics is not None
            and statistics.last
            and statistics.square_sums is None
            and statistics.up_abs_sums is None
        )

    def end(self, activation: nn.Module, gate: Tensor) -> None:
        """Count the activation of `gate` without making a product."""
        gate, kernel, _ = self._given(activation, gate, False)
        if self.edits is not None:
            gate, kernel = self._edit(gate, None, kernel), "identity"
        self.observe(gate, kernel)

    def _given(
        self, activation: nn.Module, gate: Tensor, writable: bool
    ) -> tuple[Tensor, str, bool]:
        """What the kernel reads, as which activation, and whether it may be written over."""
        if gate.dtype in self.fused and not has_hooks(activation):
            return gate, self.kernel, writable
        activated = activation(gate)
        fresh = activated is not gate and not activation._modules and not has_hooks(activation)
        return activated, "identity", fresh

    def _counting(self) -> SiteStatistics | None:
        """Where to add up; not what gradient checkpointing runs again for the backward pass."""
        if self.statistics is None or torch.compiler.is_compiling() or not in_backward():
            return self.statistics
        return self.statistics.muted()

    def _edit(self, gate: Tensor, up: Tensor | None, kernel: str) -> Tensor:
        return self.edits.tables.edit(gate, up, kernel, self.edits.sets.tensor)


def _profile(op: Any, gate: Tensor, up: Tensor | None, kernel: str, s: SiteStatistics):
    return op(
        gate,
        up,
        kernel,
        s.threshold,
        s.groups.tensor,
        s.counts,
        s.sums,
        s.square_sums,
        s.up_abs_sums if up is not None else None,
        s.flags,
        backend=s.backend,
    )


def in_backward() -> bool:
    """Whether a backward pass is running in this thread."""
    return torch._C._current_graph_task_id() != -1


def has_hooks(module: nn.Module) -> bool:
    """Whether somebody else watches what the module takes or returns."""
    return bool(
        module._forward_hooks
        or module._forward_pre_hooks
        or module._backward_hooks
        or module._backward_pre_hooks
        or torch_module._global_forward_hooks
        or torch_module._global_forward_pre_hooks
        or torch_module._global_backward_hooks
        or torch_module._global_backward_pre_hooks
    )

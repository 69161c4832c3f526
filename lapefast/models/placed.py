"""What runs at a site while ops are placed there.

`SiteState` hangs on the module whose forward was replaced, and the two forwards below are bound to
that module. Copying and pickling leave both out (`lapefast.models.traces`), so that a copy computes
with its own weights and is unpatched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional
from torch.nn.modules import module as torch_module

from lapefast import ops
from lapefast.errors import InputError
from lapefast.models.activations import fused_dtypes
from lapefast.models.columns import Columns
from lapefast.models.forwards import clamped_gate
from lapefast.models.listed import ListedRouting
from lapefast.models.proof import prove
from lapefast.models.routing import Routing
from lapefast.models.rows import RowIndex
from lapefast.models.structure import FFN
from lapefast.models.traces import SITE, Replaced

# Unless somebody replaced them for every layer.
_LINEAR = nn.Linear.forward
_CALL = nn.Module._wrapped_call_impl


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
        if self.foreign:
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
            # The model may read on from what it gave.
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
        if gate.dtype in self.fused and not _has_hooks(activation):
            return gate, self.kernel, writable
        activated = activation(gate)
        fresh = activated is not gate and not activation._modules and not _has_hooks(activation)
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


def _has_hooks(module: nn.Module) -> bool:
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


def _makes_new(projection: nn.Module) -> bool:
    """Whether a projection's output is a tensor that nothing else can hold."""
    return (
        type(projection) is nn.Linear
        and "forward" not in projection.__dict__
        and not _has_hooks(projection)
    )


def _projected(projection: nn.Module, x: Tensor) -> Tensor:
    """What a projection returns; of a plain linear layer that nobody watches, by its function.

    In a decoding step that saves more than an edit costs: calling a module takes a few microseconds
    before its forward begins.
    """
    parameters = projection._parameters
    plain = _makes_new(projection) and nn.Linear.forward is _LINEAR
    if plain and "weight" in parameters and "bias" in parameters:
        return functional.linear(x, parameters["weight"], parameters["bias"])
    return projection(x)


def gated_forward(self: nn.Module, *given: Tensor, **named: Tensor) -> Tensor:
    """``down(act(gate(x)) * up(x))`` by the module's own submodules, with the ops in between."""
    state: SiteState = self.__dict__[SITE]
    # The forward of its class takes one argument, by any name.
    x = given[0] if len(given) == 1 and not named else _argument(self, given, named)
    if state.statistics is None and state.edits is None:
        return state.original(self)(x)
    if state.gate is not None:
        run = _clamped
    else:
        run = _edited if state.statistics is None else _gated
    if torch.compiler.is_compiling():
        return (_gated if run is _edited else run)(self, state, x)
    if state.probe is not None:
        state.fired += 1
    if not state.proven:
        run = functools.partial(_named_run, state, run, self, state, x)
        return prove(state, self, run, (x,), {})
    try:
        return run(self, state, x)
    except InputError as error:
        raise _named(state, error) from error


def _argument(module: nn.Module, given: tuple, named: dict[str, Any]) -> Tensor:
    """The one argument of a forward; TypeError, as from the forward, for any others."""
    bound = inspect.signature(type(module).forward).bind(module, *given, **named)
    return bound.args[1]


def activation_forward(self: nn.Module, *given: Any, **options: Any) -> Tensor:
    """The activation module's own forward, its output counted and edited."""
    state: SiteState = self.__dict__[SITE]
    if not state.active:
        return state.original(self)(*given, **options)
    if torch.compiler.is_compiling():
        return state.activated(self, given, options)
    if state.probe is not None:
        state.fired += 1
    if not state.proven:
        run = functools.partial(_named_run, state, state.activated, self, given, options)
        return prove(state, self, run, given, options)
    try:
        return state.activated(self, given, options)
    except InputError as error:
        raise _named(state, error) from error


def expert_activation_forward(self: nn.Module, *given: Any, **options: Any) -> Tensor:
    """The same of the activation module that all experts of a mixture call."""
    state: SiteState = self.__dict__[SITE]
    if not state.active:
        return state.original(self)(*given, **options)
    if len(given) != 1 or options:
        raise InputError(
            f"{state.name} gives its activation module more than the gate, so what that returns is "
            "not the activation; lapefast can't handle this model"
        )
    if state.routing.see is not None:
        return state.routing.see(state.original(self)(*given))
    state.routing.advance()
    try:
        return state.activated(self, given, options)
    except InputError as error:
        raise _named(state, error) from error


def clamped_gate_method(self: nn.Module, gate_up: Tensor) -> Tensor:
    """The gate of experts whose activation is no module; see `forwards.ClampedGate`."""
    state: SiteState = self.__dict__[SITE]
    if not state.active:
        return state.original(self)(gate_up)
    activation, factor = state.gate.parts(self, gate_up)
    if state.routing.see is not None:
        return factor * state.routing.see(activation)
    state.routing.advance()
    try:
        return factor * state.activation_of(activation, "identity")
    except InputError as error:
        raise _named(state, error) from error


def _named_run(state: SiteState, run: Callable[..., Tensor], *given: Any) -> Tensor:
    try:
        return run(*given)
    except InputError as error:
        raise _named(state, error) from error


def _named(state: SiteState, error: InputError) -> InputError:
    """What an op refused, with its site and the likeliest reason."""
    return InputError(
        f"{state.name}: {error} Was the model moved, or does this FFN not see each token once? "
        "After a move, place again."
    )


def _edited(self: nn.Module, state: SiteState, x: Tensor) -> Tensor:
    """The forward of an FFN that is only edited, outside of compiled code.

    A decoding step runs it on few rows, so as little as can be stands around the edit: every call
    counts, and an attribute of a module takes ten times as long to find as an entry of a dict.
    """
    form, edits, modules = state.form, state.edits, self._modules
    gate, down = _projected(modules[form.gate], x), form.down
    activation = modules.get(form.activation, form.function)
    up = None
    if form.up is None:
        gate, up = gate.chunk(2, dim=-1)
    watched = _has_hooks(activation)
    if gate.dtype in state.fused and not watched:
        up = _projected(modules[form.up], x) if up is None else up
        return _projected(modules[down], state.product_of(gate, state.kernel, False, up))
    # While the gate is in a cache: before the other projection, as the model does it.
    plain = not watched and type(activation).__call__ is _CALL
    if plain and activation._compiled_call_impl is None:
        activated = activation.forward(gate)
    else:
        activated = activation(gate)
    fresh = activated is not gate and not activation._modules and not watched
    del gate
    edited = fresh and edits.tables.edit_(activated, edits.sets.tensor)
    up = _projected(modules[form.up], x) if up is None else up
    if edited:
        return _projected(modules[down], activated * up)
    return _projected(modules[down], state.product_of(activated, "identity", False, up))


def _clamped(self: nn.Module, state: SiteState, x: Tensor) -> Tensor:
    """The forward of a dense FFN whose activation is no module; see `forwards.ClampedGate`."""
    activation, factor = state.gate.parts(self, self.gate_up_proj(x))
    activation = state.activation_of(activation, "identity")
    if state.statistics is not None and state.statistics.last:
        return torch.zeros_like(x)
    return self.down_proj(factor * activation)


def _gated(self: nn.Module, state: SiteState, x: Tensor) -> Tensor:
    """The forward of an FFN that is counted, edited, or both."""
    form, modules = state.form, self._modules
    projection, activation = modules[form.gate], form.activation_of(self)
    gate = projection(x)
    if form.up is None:
        gate, up = gate.chunk(2, dim=-1)
        if state.ends_here():
            state.end(activation, gate)
            return torch.zeros_like(x)
        product = state.product(activation, gate, up, writable=False)
    else:
        if state.ends_here():
            state.end(activation, gate)
            return torch.zeros_like(x)
        up = modules[form.up](x)
        product = state.product(activation, gate, up, writable=_makes_new(projection))
    if state.statistics is not None and state.statistics.last:
        return torch.zeros_like(x)
    return modules[form.down](product)

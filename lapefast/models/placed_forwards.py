"""The forwards that run in place of a model's own while ops are placed there.

They are bound to the module whose own they stand for, on which `lapefast.models.placed.SiteState`
hangs. Copying and pickling leave both out (`lapefast.models.traces`), so that a copy computes with
its own weights and is unpatched.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lapefast.errors import InputError
from lapefast.models.placed import SiteState, has_hooks
from lapefast.models.proof import prove
from lapefast.models.traces import SITE

# Unless somebody replaced them for every layer.
_LINEAR = nn.Linear.forward
_CALL = nn.Module._wrapped_call_impl


def _makes_new(projection: nn.Module) -> bool:
    """Whether a projection's output is a tensor that nothing else can hold."""
    return (
        type(projection) is nn.Linear
        and "forward" not in projection.__dict__
        and not has_hooks(projection)
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
    watched = has_hooks(activation)
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

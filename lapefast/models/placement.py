"""Placing ops in a model, and taking them out so that nothing of them stays."""

from __future__ import annotations

import functools
import logging
import os
import types
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import replace

import torch
from torch import Tensor, nn
from torch.utils.hooks import RemovableHandle

from lapefast.errors import InputError
from lapefast.models.bare import bare_model, evaluating
from lapefast.models.columns import find_columns
from lapefast.models.copies import separate
from lapefast.models.inputs import forward_inputs, probe_ids
from lapefast.models.listed import ListedRouting
from lapefast.models.placed import SiteState
from lapefast.models.placed_forwards import (
    activation_forward,
    clamped_gate_method,
    expert_activation_forward,
    gated_forward,
)
from lapefast.models.routing import Routing
from lapefast.models.sites import Site
from lapefast.models.structure import FFN, find_ffns
from lapefast.models.traces import HOOK, PLACEMENT, SITE, Replaced, clear, leave
from lapefast.ops.backends import backend_for

_log = logging.getLogger(__name__)


class Placement:
    """The ops placed in one model. A recorder and a steering on the same model share it."""

    def __init__(self, model: nn.Module) -> None:
        self.bare = bare_model(model)
        ffns = find_ffns(model, mixtures=True)
        _refuse_meta(self.bare, ffns)
        self.ffns, self._copies = separate(ffns)
        self.roles: dict[str, tuple[object, str]] = {}
        self.states: dict[str, SiteState] = {}
        self.probing = False
        self.last: str | None = None
        """The site that fires last in a forward pass, where the probe could tell."""
        self.steered = False
        """Whether a steering was ever placed."""
        self.failure: str | None = None
        """Why the model does not run on bare token ids, where the probe found that out."""
        self._placed: list[tuple[nn.Module, SiteState]] = []
        self._hooks: list[tuple[nn.Module, RemovableHandle]] = []
        try:
            self._columns = find_columns(self.bare, self.ffns)
            for ffn in self.ffns:
                self._place(ffn)
            leave(self.bare, PLACEMENT, self)
        except BaseException:
            self._restore()
            raise

    @staticmethod
    def claim(model: nn.Module, role: str, holder: object, name: str) -> Placement:
        """The model's placement, with ``role`` taken by ``holder``, which messages call ``name``.

        Raises:
            InputError: where the role is taken, naming the first.
        """
        bare = bare_model(model)
        placement = bare.__dict__.get(PLACEMENT) or Placement(model)
        if role in placement.roles:
            raise InputError(
                f"a {role} is already placed on this {type(bare).__name__} "
                f"({placement.roles[role][1]}); remove it before placing another"
            )
        placement.roles[role] = (holder, name)
        placement.steered |= role == "steering"
        return placement

    def fill(self, set_role: Callable[[FFN, SiteState], None]) -> None:
        """Let ``set_role`` put its statistics or edits into every site's state."""
        for ffn in self.ffns:
            if dtype_of(ffn) not in (torch.float32, torch.float16, torch.bfloat16):
                raise InputError(
                    f"{ffn.site.name} computes in {dtype_of(ffn)}; lapefast takes float32, float16 "
                    "and bfloat16 models, so load it in one of these"
                )
            set_role(ffn, self.states[ffn.site.name])
            for state in self._chosen(ffn):
                state.proven = not state.active
                if state.routing is not None:
                    state.routing.restart()

    def release(self, role: str, attribute: str, holder: object) -> None:
        """Take a role out, if ``holder`` has it; with the last one, put back every forward.

        Raises:
            InputError: where somebody has replaced a forward since; ours then only passes through.
        """
        if self.roles.get(role, (None, ""))[0] is not holder:
            return
        del self.roles[role]
        for ffn in self.ffns:
            setattr(self.states[ffn.site.name], attribute, None)
            self._chosen(ffn)
        if not self.roles:
            self._restore()

    def _chosen(self, ffn: FFN) -> list[SiteState]:
        """A site's state and its experts' own, with their kernels chosen for what is placed now."""
        state, experts = self.states[ffn.site.name], ffn.listed.experts if ffn.listed else ()
        state.share()
        states = [state, *state.experts]
        for one, of in zip(states, (ffn, *experts), strict=True):
            one.choose_kernel(of.activation, device_of(of))
        return states

    def prove(self) -> None:
        """Run a few tokens through the model, which proves each site that they reach.

        Nothing is counted. Sites that they do not reach are proven when they first fire.

        Raises:
            InputError: where a site's proof fails, an FFN runs without its activation module, or
                none runs at all.
        """
        ids = probe_ids(self.bare)
        ids = torch.cat([ids[:1], ids])  # two sequences that are alike show the order of rows
        try:
            with self._probing(ids.shape) as order:
                self.bare(**forward_inputs(self.bare, ids))
        except InputError:
            raise
        except Exception as error:
            self.failure = f"{type(error).__name__}: {error}"
            _log.info("%s does not run on bare token ids: %s", type(self.bare).__name__, error)
        else:
            self.last = order[-1] if order else None
            self._check_fired(order)
        unproven = [name for name, state in self.states.items() if not state.proven]
        if unproven:
            _log.info("Not reached by the probe, proven when they first fire: %s", unproven)

    @contextmanager
    def _probing(self, shape: torch.Size) -> Iterator[list[str]]:
        """Let recorders count in scratch memory; yields the sites in the order they run."""
        order: list[str] = []
        held = {name: state.statistics for name, state in self.states.items()}
        hooks = []
        group = torch.zeros(1, dtype=torch.int32)
        self.probing = True
        try:
            for ffn in self.ffns:
                state = self.states[ffn.site.name]
                state.fired, state.probe = 0, shape
                if state.statistics is not None:
                    state.statistics = state.statistics.scratch(group)
                    state.share()
                note = functools.partial(_note, order, ffn.site.name)
                runs = ffn.listed.block if ffn.listed else ffn.owner
                hooks.append(runs.register_forward_pre_hook(note))
            with evaluating(self.bare), torch.no_grad(), torch.compiler.set_stance("force_eager"):
                yield order
        finally:
            self.probing = False
            for hook in hooks:
                hook.remove()
            for name, state in self.states.items():
                state.statistics, state.probe = held[name], None
                state.share()

    def _check_fired(self, order: list[str]) -> None:
        active = {name: state for name, state in self.states.items() if state.active}
        for name, state in active.items():
            if name in order and not state.fired:
                raise InputError(
                    f"{name} runs without calling its activation module, so what is placed there "
                    "would do nothing; lapefast can't handle this model"
                )
        missed = [name for name, state in active.items() if state.edits and not state.fired]
        if missed and any(state.fired for state in active.values()):
            _log.warning(
                "Edited, but not reached by tokens alone, so perhaps never: %s", ", ".join(missed)
            )
        if active and not any(state.fired for state in active.values()):
            raise InputError(
                f"none of the FFNs of {type(self.bare).__name__} runs in a forward pass, so what "
                "is placed there would do nothing"
            )

    def sites(self) -> list[Site]:
        """The sites, with the number of calls that the probe saw."""
        return [
            replace(ffn.site, calls=max(self.states[ffn.site.name].fired, 1)) for ffn in self.ffns
        ]

    def how(self) -> dict[str, str]:
        """Site -> who computes its activation: the kernel ("fused") or the module ("given")."""
        states = [(self.states[ffn.site.name], self._dtype(ffn)) for ffn in self.ffns]
        return {state.name: "fused" if dtype in state.fused else "given" for state, dtype in states}

    def experts_implementation(self) -> str | None:
        """See `lapefast.recording.Recorder.experts_implementation`."""
        routings = [state.routing for state in self.states.values() if state.routing is not None]
        ran = {name for one in routings for name in one.implementations}
        return "+".join(sorted(ran or {one.implementation for one in routings})) or None

    def dtype(self) -> str:
        """The dtypes of the activations, such as ``bfloat16``, joined where they differ."""
        dtypes = {str(self._dtype(ffn)) for ffn in self.ffns}
        return "+".join(sorted(dtype.removeprefix("torch.") for dtype in dtypes))

    def _dtype(self, ffn: FFN) -> torch.dtype:
        """The activation's dtype: the weights' or, as quantised ones do not say it, that seen."""
        quantised = not all(weight.is_floating_point() for weight in ffn.owner.parameters())
        return (quantised and self.states[ffn.site.name].dtype) or dtype_of(ffn)

    def _place(self, ffn: FFN) -> None:
        name = ffn.site.name
        if ffn.listed is None:
            state = self.states[name] = self._placed_at(ffn)
            if ffn.site.experts:
                state.routing = Routing(ffn.owner, state, ffn.site.experts)
            return
        state = self.states[name] = SiteState(ffn, None)
        state.experts = [self._placed_at(expert) for expert in ffn.listed.experts]
        state.routing = ListedRouting(ffn.listed, state)

    def _placed_at(self, ffn: FFN) -> SiteState:
        for module in (ffn.owner, ffn.activation):
            _clear_left(module)
            if SITE in module.__dict__:
                raise InputError(
                    f"{ffn.site.name} holds what lapefast placed there through another part of "
                    "the model or what somebody else's forward covers; remove that first"
                )
        foreign = _own_forward(ffn.activation)
        attribute = "forward"
        if ffn.site.experts and ffn.activation is ffn.owner:
            target, forward, attribute = ffn.owner, clamped_gate_method, "_apply_gate"
        elif ffn.site.experts:
            target, forward = ffn.activation, expert_activation_forward
        elif (ffn.forward or ffn.activation is ffn.owner) and not _own_forward(ffn.owner):
            target, forward = ffn.owner, gated_forward
        elif ffn.activation is ffn.owner or (ffn.forward and ffn.forward.function is not None):
            raise InputError(
                f"{ffn.site.name} calls its activation as a function and computes by a forward "
                "that is not its class's, so nothing can be placed there; undo that replacement "
                "first"
            )
        else:
            ffn = replace(ffn, forward=None)
            target, forward = ffn.activation, activation_forward
        # Under accelerate's hooks the module's own forward waits behind this name.
        if attribute == "forward" and "_old_forward" in target.__dict__:
            attribute = "_old_forward"
        replaced = Replaced(
            attribute, target.__dict__.get(attribute), types.MethodType(forward, target)
        )
        state = SiteState(ffn, replaced, self._columns.get(ffn.site.name))
        state.foreign = foreign
        self._placed.append((target, state))
        leave(target, SITE, state)
        target.__dict__[attribute] = replaced.placed
        if isinstance(ffn.owner, nn.TransformerEncoderLayer):
            # Without gradients torch computes the layer past its modules, unless one has a hook.
            self._hooks.append((target, target.register_forward_hook(_pass_on)))
            leave(target, HOOK, self._hooks[-1][1])
        return state

    def _restore(self) -> None:
        clear(self.bare, PLACEMENT)
        covered, left = [], set()
        for state in self.states.values():
            if state.routing is not None:
                state.routing.remove()
        for module, hook in self._hooks:
            hook.remove()
            clear(module, HOOK)
        for module, state in self._placed:
            if state.replaced.undo(module.__dict__):
                clear(module, SITE)
            elif SITE in module.__dict__:
                state.left = True
                covered.append(state.name)
                left.add(module)
        for one in self._copies:
            if one.copied not in left:
                one.put_back()
        if covered:
            raise InputError(
                f"the forward of {covered[0]} was replaced after lapefast's was placed, so it is "
                "left as it is (lapefast's now only passes through); undo that replacement first"
            )


def _refuse_meta(bare: nn.Module, ffns: list[FFN]) -> None:
    """Refuse a model without weights, which accelerate has not put elsewhere."""
    if any(one.is_meta for ffn in ffns for one in ffn.last.parameters()):
        if not any("_hf_hook" in module.__dict__ for module in bare.modules()):
            raise InputError(
                f"{ffns[0].site.name} has no weights: they are on the meta device; load the model "
                "first"
            )


def _clear_left(module: nn.Module) -> None:
    """Take out what a placement had to leave, if nothing covers it any more."""
    state = module.__dict__.get(SITE)
    if state is not None and state.left and state.replaced.undo(module.__dict__):
        clear(module, SITE)


def _pass_on(module: nn.Module, args: tuple, output: Tensor) -> None:
    """A hook that does nothing."""


def _note(order: list[str], name: str, module: nn.Module, args: tuple) -> None:
    order.append(name)


def chosen_backend(name: str | None, device: torch.device) -> str:
    """The backend that serves ``device``: as named, by ``LAPEFAST_BACKEND``, or the best there is.

    Raises:
        InputError: where the one named can't.
    """
    asked = name or os.environ.get("LAPEFAST_BACKEND") or "auto"
    return backend_for(asked, device.type).__name__.rpartition(".")[2]


def device_of(ffn: FFN) -> torch.device:
    """Where an FFN computes: its last projection's device, or the one accelerate runs it on."""
    hook = getattr(ffn.last, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is not None:
        return torch.device(device if not isinstance(device, int) else f"cuda:{device}")
    # Quantised linears may hold neither parameters nor buffers.
    held = (*ffn.last.parameters(), *ffn.owner.parameters(), *ffn.owner.buffers())
    return held[0].device if held else torch.device("cpu")


def dtype_of(ffn: FFN) -> torch.dtype:
    """The dtype in which an FFN's activation is expected."""
    return next((p.dtype for p in ffn.owner.parameters() if p.is_floating_point()), torch.float32)


def _own_forward(module: nn.Module) -> bool:
    """Whether somebody (other than accelerate) replaced the forward on the instance."""
    name = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    forward = module.__dict__.get(name)
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward

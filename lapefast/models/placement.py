"""Placing ops in a model, and taking them out so that nothing of them stays."""

from __future__ import annotations

import logging
import os
import types
import weakref
from collections.abc import Callable
from dataclasses import replace

import torch
from torch import nn

from lapefast.errors import InputError
from lapefast.models.bare import bare_model, evaluating
from lapefast.models.inputs import forward_inputs, input_device, vocabulary_size
from lapefast.models.placed import STATE, SiteState, activation_forward, gated_forward
from lapefast.models.sites import Site
from lapefast.models.structure import FFN, find_ffns
from lapefast.ops.backends import backend_for

_log = logging.getLogger(__name__)
_placements: weakref.WeakKeyDictionary[nn.Module, Placement] = weakref.WeakKeyDictionary()
_ABSENT = object()


class Placement:
    """The ops placed in one model. A recorder and a steering on the same model share it."""

    def __init__(self, model: nn.Module) -> None:
        self.bare = bare_model(model)
        self.ffns = find_ffns(model)
        self.roles: dict[str, tuple[object, str]] = {}
        self.states: dict[str, SiteState] = {}
        self._placed: list[tuple[nn.Module, str, object, object]] = []
        for ffn in self.ffns:
            self._place(ffn)

    @staticmethod
    def claim(model: nn.Module, role: str, holder: object, name: str) -> Placement:
        """The model's placement, with ``role`` taken by ``holder``, which messages call ``name``.

        Raises:
            InputError: where the role is taken, naming the first.
        """
        bare = bare_model(model)
        placement = _placements.get(bare)
        if placement is None:
            placement = _placements[bare] = Placement(model)
        if role in placement.roles:
            raise InputError(
                f"a {role} is already placed on this {type(bare).__name__} "
                f"({placement.roles[role][1]}); remove it before placing another"
            )
        placement.roles[role] = (holder, name)
        return placement

    def fill(self, set_role: Callable[[FFN, SiteState], None]) -> None:
        """Let ``set_role`` put its statistics or edits into every site's state."""
        for ffn in self.ffns:
            state = self.states[ffn.site.name]
            set_role(ffn, state)
            state.choose_kernel(ffn.activation, device_of(ffn))
            state.proven = not state.active

    def release(self, role: str, attribute: str, holder: object) -> None:
        """Take a role out, if ``holder`` has it; with the last one, put back every forward.

        Raises:
            InputError: where somebody has replaced a forward since; ours then only passes through.
        """
        if self.roles.get(role, (None, ""))[0] is not holder:
            return
        del self.roles[role]
        for ffn in self.ffns:
            state = self.states[ffn.site.name]
            setattr(state, attribute, None)
            state.choose_kernel(ffn.activation, device_of(ffn))
        if not self.roles:
            self._restore()

    def prove(self) -> list[str]:
        """Run a few tokens through the model, which proves each site they reach.

        Returns:
            The names of the sites that they did not reach; those are proven when they first fire.
        """
        for state in self.states.values():
            state.fired = 0
        ids = torch.arange(2 * 8, device=input_device(self.bare)).reshape(2, 8) * 7919 + 1
        ids %= vocabulary_size(self.bare) or 16
        for state in self.states.values():
            state.rows = ids.numel()
        try:
            with evaluating(self.bare), torch.no_grad(), torch.compiler.set_stance("force_eager"):
                self.bare(**forward_inputs(self.bare, ids))
        except InputError:
            raise
        except Exception as error:  # noqa: BLE001  a model that takes other inputs proves itself later
            _log.info("%s does not run on bare token ids: %s", type(self.bare).__name__, error)
        finally:
            for state in self.states.values():
                state.rows = None
        unproven = [name for name, state in self.states.items() if not state.proven]
        if unproven:
            _log.info("Not reached by the probe, proven when they first fire: %s", unproven)
        return unproven

    def sites(self) -> list[Site]:
        """The sites, with the number of calls that the probe saw."""
        return [
            replace(ffn.site, calls=max(self.states[ffn.site.name].fired, 1)) for ffn in self.ffns
        ]

    def how(self) -> dict[str, str]:
        """Site -> how its activation is computed: by the kernel ("fused") or by itself ("given")."""
        return {
            ffn.site.name: "fused"
            if dtype_of(ffn) in self.states[ffn.site.name].fused
            else "given"
            for ffn in self.ffns
        }

    def _place(self, ffn: FFN) -> None:
        for module in (ffn.owner, ffn.activation):
            _clear_copy(module, ffn.site.name)
        foreign = _own_forward(ffn.activation)
        if ffn.forward and not _own_forward(ffn.owner):
            target, forward = ffn.owner, gated_forward
        else:
            ffn = replace(ffn, forward=None)
            target, forward = ffn.activation, activation_forward
        # Under accelerate's hooks the module's own forward waits behind this name.
        attribute = "_old_forward" if "_old_forward" in target.__dict__ else "forward"
        before = target.__dict__.get(attribute, _ABSENT)
        state = SiteState(ffn, None if before is _ABSENT else before)
        state.foreign = foreign
        bound = types.MethodType(forward, target)
        target.__dict__[attribute] = bound
        target.__dict__[STATE] = state
        self.states[ffn.site.name] = state
        self._placed.append((target, attribute, before, bound))

    def _restore(self) -> None:
        _placements.pop(self.bare, None)
        covered = []
        for module, attribute, before, bound in self._placed:
            if module.__dict__.get(attribute) is not bound:
                covered.append(module.__dict__[STATE].name)
            elif before is _ABSENT:
                del module.__dict__[attribute]
            else:
                module.__dict__[attribute] = before
        for module, *_ in self._placed:
            if module.__dict__[STATE].name not in covered:
                del module.__dict__[STATE]
        if covered:
            raise InputError(
                f"the forward of {covered[0]} was replaced after lapefast's was placed, so it is "
                "left as it is (lapefast's now only passes through); undo that replacement first"
            )


def _clear_copy(module: nn.Module, name: str) -> None:
    """Take out the inert forward that a copy of a placed model carries."""
    if STATE not in module.__dict__:
        return
    for attribute in ("forward", "_old_forward"):
        forward = module.__dict__.get(attribute)
        if getattr(forward, "__func__", None) in (gated_forward, activation_forward):
            if attribute == "forward":
                del module.__dict__[attribute]
            else:
                module.__dict__[attribute] = types.MethodType(type(module).forward, module)
            del module.__dict__[STATE]
            return
    raise InputError(
        f"the forward of {name} still covers one that lapefast placed before; undo that "
        "replacement first"
    )


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
    return next(ffn.last.parameters()).device


def dtype_of(ffn: FFN) -> torch.dtype:
    """The dtype in which an FFN's activation is expected."""
    return next((p.dtype for p in ffn.owner.parameters() if p.is_floating_point()), torch.float32)


def _own_forward(module: nn.Module) -> bool:
    """Whether somebody (other than accelerate) replaced the forward on the instance."""
    name = "_old_forward" if "_old_forward" in module.__dict__ else "forward"
    forward = module.__dict__.get(name)
    return forward is not None and getattr(forward, "__func__", None) is not type(module).forward

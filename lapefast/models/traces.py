"""What placing leaves on a module, and how copies of the module come out without it.

`copy.deepcopy`, `pickle` and `torch.save` take a module's state from its ``__getstate__``. While
something is placed, the instance carries one of its own that leaves every trace out, so a copy is
unpatched and a saved model loads where lapefast is not installed.
"""

from __future__ import annotations

import types
from dataclasses import dataclass
from typing import Any

from torch import nn

SITE = "_lapefast_site"
GROUPS = "_lapefast_groups"
SETS = "_lapefast_sets"
HOOK = "_lapefast_hook"
GENERATION = "_lapefast_generation"
MASK = "_lapefast_mask"
PLACEMENT = "_lapefast_placement"
ROUTING = "_lapefast_routing"

_COPYING = "__getstate__"
_TRACES = {SITE, GROUPS, SETS, HOOK, GENERATION, MASK, PLACEMENT, ROUTING}
_HOOKS = ("_forward_hooks", "_forward_pre_hooks", "_forward_pre_hooks_with_kwargs")


@dataclass
class Replaced:
    """An instance's method that was replaced.

    Attributes:
        attribute: ``forward``, or ``_old_forward`` under accelerate's hooks; ``generate``.
        before: what the instance had there; None where only its class has one.
        placed: what it has now.
    """

    attribute: str
    before: Any
    placed: Any

    def undo(self, attributes: dict[str, Any]) -> bool:
        """Put back what was there; False, and nothing done, if somebody has covered it."""
        if attributes.get(self.attribute) is not self.placed:
            return False
        if self.before is None:
            del attributes[self.attribute]
        else:
            attributes[self.attribute] = self.before
        return True


def leave(module: nn.Module, name: str, trace: Any) -> None:
    """Put a trace on a module."""
    module.__dict__[name] = trace
    module.__dict__[_COPYING] = types.MethodType(_untraced, module)


def clear(module: nn.Module, name: str) -> None:
    """Take a trace off, and with the last one what keeps them out of copies."""
    module.__dict__.pop(name, None)
    if not _TRACES & module.__dict__.keys():
        module.__dict__.pop(_COPYING, None)


def _untraced(self: nn.Module) -> dict[str, Any]:
    """The module's state without what is placed on it."""
    own = getattr(type(self), _COPYING, None)
    state = dict(own(self) if own is not None else self.__dict__)
    state.pop(_COPYING, None)
    state.pop(PLACEMENT, None)
    if state.pop(MASK, None) is not None:
        state.pop("__deepcopy__", None)
    generation = state.pop(GENERATION, None)
    for replaced in generation.replaced if generation is not None else ():
        replaced.undo(state)
    site = state.pop(SITE, None)
    if site is not None:
        site.replaced.undo(state)
    placed = [one for name in (HOOK, GROUPS, SETS, ROUTING) if (one := state.pop(name, None))]
    for hooks in _HOOKS if placed else ():
        state[hooks] = state[hooks].copy()
        for number in (hook.id for one in placed for hook in getattr(one, "hooks", (one,))):
            state[hooks].pop(number, None)
    return state

"""FFNs that share one activation module, as GPT-1's do: a copy for each, to tell them apart by."""

from __future__ import annotations

import copy
from collections import Counter
from dataclasses import dataclass, replace

from torch import nn

from lapefast.errors import InputError
from lapefast.models.structure import FFN

__all__ = ["ActivationCopy", "separate"]


@dataclass(frozen=True)
class ActivationCopy:
    """A copy that stands for an activation module in one FFN."""

    holder: nn.Module
    name: str
    original: nn.Module
    copied: nn.Module

    def put_back(self) -> None:
        """Give the FFN the module that it shares, unless somebody has replaced the copy."""
        if self.holder._modules.get(self.name) is self.copied:
            self.original.train(self.copied.training)
            self.holder._modules[self.name] = self.original


def separate(ffns: list[FFN]) -> tuple[list[FFN], list[ActivationCopy]]:
    """The FFNs, each with an activation module that no other one calls, and the copies made.

    A copy shares parameters and hooks with the module that it stands for.

    Raises:
        InputError: a module that is shared can't be copied.
    """
    users = Counter(one.activation for ffn in ffns for one in _each(ffn))
    copies: list[ActivationCopy] = []

    def apart(ffn: FFN) -> FFN:
        # What a forward calls as a function is held by no FFN, and needs no copy.
        held = _held(ffn) if users[ffn.activation] > 1 else None
        if held is None:
            return ffn
        copies.append(ActivationCopy(*held, ffn.activation, _copied(ffn)))
        return replace(ffn, activation=copies[-1].copied)

    separated = []
    for ffn in ffns:
        own = tuple(map(apart, _each(ffn)))
        listed = ffn.listed and replace(ffn.listed, experts=own)
        separated.append(replace(ffn, activation=own[0].activation, listed=listed))
    for made in copies:
        made.holder._modules[made.name] = made.copied
    return separated, copies


def _each(ffn: FFN) -> tuple[FFN, ...]:
    """The FFN, or those of its experts that are modules of their own."""
    return ffn.listed.experts if ffn.listed else (ffn,)


def _copied(ffn: FFN) -> nn.Module:
    try:
        copied = copy.copy(ffn.activation)
    except Exception as error:
        raise InputError(
            f"{ffn.site.name} shares its activation module with another FFN, and a "
            f"{type(ffn.activation).__name__} can't be copied ({error}); give each its own"
        ) from error
    hook = copied.__dict__.pop("_hf_hook", None)
    if hook is not None:
        from accelerate.hooks import add_hook_to_module

        # accelerate's forward is bound to the module that it was made for.
        for name in ("forward", "_old_forward"):
            copied.__dict__.pop(name, None)
        add_hook_to_module(copied, hook)
    return copied


def _held(ffn: FFN) -> tuple[nn.Module, str] | None:
    """The module that holds the FFN's activation, and by which name."""
    return next(
        (
            (module, name)
            for module in ffn.owner.modules()
            for name, child in module._modules.items()
            if child is ffn.activation
        ),
        None,
    )

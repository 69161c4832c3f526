"""Hooks that change what modules return, and that copies of the modules come out without."""

from __future__ import annotations

import functools
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lapefast.models.traces import HOOK, clear, leave

__all__ = ["OutputHooks"]


class OutputHooks:
    """What is placed on the outputs of some modules.

    Attributes:
        missed: names of modules that have not run since their hooks were placed.
    """

    def __init__(self) -> None:
        self._fired: dict[str, bool] = {}
        self._placed: list[tuple[nn.Module, Any]] = []

    @property
    def missed(self) -> list[str]:
        return [name for name, fired in self._fired.items() if not fired]

    def place(self, name: str, module: nn.Module, change: Callable[..., Tensor], *more) -> None:
        """Let the module return ``change(name, output, *more)``; of a tuple, its first changed."""
        self._fired[name] = False
        # Last of all hooks placed so far, so that others see and change the output before.
        hook = module.register_forward_hook(functools.partial(self._changed, name, change, more))
        leave(module, HOOK, hook)
        self._placed.append((module, hook))

    def remove(self) -> None:
        """Take the hooks out. Safe to repeat."""
        while self._placed:
            module, hook = self._placed.pop()
            hook.remove()
            clear(module, HOOK)

    def _changed(
        self, name: str, change: Callable[..., Tensor], more: tuple, module, given, output
    ):
        if not torch.compiler.is_compiling():
            self._fired[name] = True
        if isinstance(output, tuple):
            return (change(name, output[0], *more), *output[1:])
        return change(name, output, *more)

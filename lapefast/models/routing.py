"""Whose rows a mixture of experts computes: the expert and the token of each.

transformers runs experts in one of several ways, each with its own order of rows. A hook before the
experts' forward sees what the router chose and so knows which rows will come; the gate, wherever it
is applied, takes the next of them. A hook behind it sees that all came.
"""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable
from dataclasses import dataclass
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lapefast.errors import InputError
from lapefast.models.forwards import takes_all_tokens
from lapefast.models.proof import MixtureProof
from lapefast.models.traces import ROUTING, clear, leave

if TYPE_CHECKING:
    from lapefast.models.placed import SiteState

__all__ = ["Routing", "check_tokens"]


@dataclass(frozen=True)
class Rows:
    """Rows that the gate is applied to at once.

    Attributes:
        experts: whose rows they are, integers [rows].
        tokens: of what, integers [rows].
        routed: the expert, or -1 where the row is computed and not routed to it: the router's
            weight, or what it multiplies, is 0. So ZAYA has a token pass by the experts.
    """

    experts: Tensor
    tokens: Tensor
    routed: Tensor


def _by_expert(chosen: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """One call per expert that any token chose; rows by rank of the choice, then by token."""
    ordered, order = chosen.T.reshape(-1).sort(stable=True)
    sizes = torch.bincount(ordered, minlength=experts).tolist()
    tokens, ranks = order % len(chosen), order // len(chosen)
    places = tokens * chosen.shape[1] + ranks
    pairs = zip(ordered.split(sizes), places.split(sizes), strict=True)
    return [pair for pair in pairs if len(pair[0])]


def _by_token(chosen: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """One call; rows by token, then by rank."""
    return [(chosen.reshape(-1), torch.arange(chosen.numel(), device=chosen.device))]


def _sorted(chosen: Tensor, experts: int) -> list[tuple[Tensor, Tensor]]:
    """One call; rows by expert, ties as the same sort of the same choices leaves them."""
    return [chosen.reshape(-1).sort()]


def _in_blocks(hidden: Tensor, experts: int) -> list[Rows]:
    """One call; each expert's rows of all tokens."""
    rows = torch.arange(len(hidden), device=hidden.device)
    tokens = len(hidden) // experts
    owners = rows // tokens
    routed = torch.where((hidden != 0).any(dim=-1), owners, -1)
    return [Rows(owners, rows % tokens, routed)]


def _chosen(order: Order, chosen: Tensor, weights: Tensor, experts: int) -> list[Rows]:
    """The rows of what the router chose, [tokens, ranks], with its weights of that shape."""
    taken = (weights != 0).reshape(-1)
    return [
        Rows(owners, places // chosen.shape[1], torch.where(taken[places], owners, -1))
        for owners, places in order(chosen, experts)
    ]


Order = Callable[[Tensor, int], list[tuple[Tensor, Tensor]]]
"""``(chosen, experts)`` -> for each call, its rows' experts and places in ``chosen``, flat."""

_ORDERS: dict[str, Order] = {
    "eager": _by_expert,
    "batched_mm": _by_token,
    "grouped_mm": _sorted,
}
"""By the names of transformers' `ALL_EXPERTS_FUNCTIONS`."""


class Routing:
    """The hooks around one mixture's experts. One forward pass runs at a time.

    Attributes:
        implementations: those by which rows were counted or edited, as transformers names them.
        see: while a proof watches, what it takes each activation to, in place of what is placed.
    """

    def __init__(self, experts: nn.Module, state: SiteState, count: int) -> None:
        self._module, self._state, self._count = experts, state, count
        self._in_blocks = takes_all_tokens(experts)
        self._coming: list[Rows] = []
        self._proof: MixtureProof | None = None
        self._proven: set[str] = set()
        self.implementations: set[str] = set()
        self.see: Callable[[Tensor], Tensor] | None = None
        self.hooks = (
            experts.register_forward_pre_hook(self._before, with_kwargs=True),
            experts.register_forward_hook(self._after),
        )
        leave(experts, ROUTING, self)

    @property
    def implementation(self) -> str:
        """How transformers runs the experts now; `generate` may change it behind the prompt.

        ``blocks`` where each takes all tokens, which is Llama 4's only way.

        Raises:
            InputError: in a way whose order of rows is not known.
        """
        if self._in_blocks:
            return "blocks"
        name = getattr(self._module.config, "_experts_implementation", None) or "eager"
        if name not in _ORDERS:
            raise InputError(
                f"{self._state.name} runs its experts by {name}, whose rows can't be told apart; "
                f"choose one of {', '.join(_ORDERS)} by model.set_experts_implementation"
            )
        return name

    def remove(self) -> None:
        """Take the hooks out. Safe to repeat."""
        for hook in self.hooks:
            hook.remove()
        clear(self._module, ROUTING)

    def restart(self) -> None:
        """What is placed now is not proven."""
        self._proven.clear()

    def advance(self) -> None:
        """Before the gate is applied: let the ops know whose rows come next, and count them."""
        if not self._coming:
            raise InputError(f"{self._state.name} applied its gate to rows that were not routed")
        rows = self._coming.pop(0)
        self._state.route(rows.routed, rows.tokens)
        self._state.count_routed()

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        state, self._proof = self._state, None
        if not state.active:
            return
        given = _in_order(module, args, kwargs)
        name = self.implementation
        if self._in_blocks:
            check_tokens(state, len(given[0]) // self._count)
            rows = _in_blocks(given[0], self._count)
        else:
            check_tokens(state, len(given[1]))
            rows = _chosen(_ORDERS[name], *given[1:3], self._count)
        if state.probe is None:
            self.implementations.add(name)
        if name not in self._proven and not torch.compiler.is_compiling():
            self._proof = MixtureProof(state, module, given, rows)
        self._coming = rows

    def _after(self, module: nn.Module, args: tuple, output: Tensor) -> None:
        state = self._state
        if not state.active:
            return
        if self._coming:
            raise InputError(
                f"{state.name} runs without applying its gate to all rows that were routed to it, "
                "so what is placed there would do nothing; lapefast can't handle this model"
            )
        if state.probe is not None:
            state.fired += 1
        if self._proof is not None:
            self._proof.check(output)
            self._proof = None
            self._proven.add(self.implementation)
            state.proven = True


def check_tokens(state: SiteState, count: int) -> None:
    """Raise InputError where a mixture sees another number of tokens than the model's input has."""
    known = [] if state.statistics is None else [state.statistics.groups.tokens]
    known += [] if state.edits is None else [state.edits.sets.tokens]
    expected = {one.tensor.numel() for one in known if one.tensor is not None} - {1}
    expected |= {math.prod(one.shape) for one in known if one.shape is not None}
    if state.probe is not None:
        expected.add(state.probe.numel())
    if expected - {count}:
        raise InputError(
            f"{state.name} saw {count} tokens where the model's input has {max(expected)}, so "
            "its activations can't be assigned to tokens"
        )


def _in_order(module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> tuple[Tensor, ...]:
    """Hidden states [tokens, hidden], chosen experts and their weights [tokens, chosen].

    Only the former of experts that take all tokens.
    """
    if not kwargs:
        return args
    return inspect.signature(module.forward).bind(*args, **kwargs).args

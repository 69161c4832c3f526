"""Whose rows the experts of a mixture compute that are modules of their own.

Their block hands each of them rows of its own input, chosen as its code likes. Which tokens these
are is read off the rows themselves: an equal row is found in the input, bit for bit. Rows that are
equal to each other are taken in their order; where they change places nothing else changes.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from lapefast.errors import InputError
from lapefast.models.routing import check_tokens
from lapefast.models.structure import ListedExperts
from lapefast.models.traces import ROUTING, clear, leave

if TYPE_CHECKING:
    from lapefast.models.placed import SiteState

__all__ = ["ListedRouting"]


class ListedRouting:
    """The hooks around a mixture's block and each of its experts; as `routing.Routing`.

    Attributes:
        implementations: ``{"modules"}`` once rows were counted or edited.
    """

    implementation = "modules"

    def __init__(self, listed: ListedExperts, state: SiteState) -> None:
        self._state, self._block = state, type(listed.block).__name__
        self._tokens: _Tokens | None = None
        self._ran = False
        self.implementations: set[str] = set()
        self._modules = [listed.block, *(ffn.owner for ffn in listed.experts)]
        hooks = [
            listed.block.register_forward_pre_hook(self._before, with_kwargs=True),
            listed.block.register_forward_hook(self._after),
        ]
        for number, ffn in enumerate(listed.experts):
            hooks += [
                ffn.owner.register_forward_pre_hook(
                    functools.partial(self._before_expert, number), with_kwargs=True
                ),
                ffn.owner.register_forward_hook(functools.partial(self._after_expert, number)),
            ]
        self.hooks = tuple(hooks)
        for module in self._modules:
            leave(module, ROUTING, self)

    def remove(self) -> None:
        """Take the hooks out. Safe to repeat."""
        for hook in self.hooks:
            hook.remove()
        for module in self._modules:
            clear(module, ROUTING)

    def restart(self) -> None:
        """Nothing to do: each expert proves itself."""

    def _before(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        if not self._state.active:
            return
        hidden = self._rows(args, kwargs)
        check_tokens(self._state, len(hidden))
        self._tokens, self._ran = _Tokens(hidden), False

    def _before_expert(
        self, number: int, module: nn.Module, args: tuple, kwargs: dict[str, Any]
    ) -> None:
        state = self._state
        if not state.active:
            return
        rows = self._rows(args, kwargs)
        if self._tokens is None:
            raise InputError(f"an expert of {state.name} was called outside of {self._block}")
        try:
            tokens = self._tokens.find(number, rows)
        except _UnknownRows as error:
            raise InputError(
                f"{state.name} gives an expert {error}, so its tokens can't be told; lapefast "
                "can't handle this model"
            ) from None
        state.route(torch.full_like(tokens, number), tokens)
        state.count_routed()
        self._ran = True
        if state.probe is None:
            self.implementations.add(self.implementation)

    def _after_expert(self, number: int, module: nn.Module, args: tuple, output: Tensor) -> None:
        expert = self._state.experts[number]
        if expert.active and not expert.proven and not torch.compiler.is_compiling():
            raise InputError(
                f"{expert.name} runs without calling its activation module, so what is placed "
                "there would do nothing; lapefast can't handle this model"
            )
        self._state.dtype = expert.dtype

    def _after(self, module: nn.Module, args: tuple, output: Any) -> None:
        state, self._tokens = self._state, None
        if not state.active:
            return
        if not self._ran and not state.proven:
            raise InputError(
                f"{state.name} runs without calling its experts as modules, so what is placed "
                "there would do nothing; lapefast can't handle this model"
            )
        if state.probe is not None:
            state.fired += 1
        state.proven = True

    def _rows(self, args: tuple, kwargs: dict[str, Any]) -> Tensor:
        """The hidden states among a call's arguments, [rows, hidden]."""
        for given in (*args, *kwargs.values()):
            if isinstance(given, Tensor) and given.is_floating_point() and given.dim() > 1:
                return given.detach().flatten(0, -2)
        raise InputError(
            f"{self._state.name} is called without hidden states [..., hidden]; lapefast can't "
            "handle this model"
        )


class _Tokens:
    """The rows of a block's input, to be found again by what they hold."""

    def __init__(self, hidden: Tensor) -> None:
        self._bits = _bits(hidden)
        self._keys, self._order = _keys(self._bits).sort(stable=True)
        self._found: dict[int, Tensor] = {}

    def find(self, expert: int, rows: Tensor) -> Tensor:
        """The token of each row, int64 [rows].

        Raises:
            _UnknownRows: where a row is no token's, or one that the expert was given before.
        """
        bits = _bits(rows)
        if bits.dtype != self._bits.dtype or bits.shape[1] != self._bits.shape[1]:
            raise _UnknownRows("rows of another dtype or width than its block was called with")
        known, tokens = self._keys, self._order
        if expert in self._found:
            left = ~torch.isin(tokens, self._found[expert])
            known, tokens = known[left], tokens[left]
        keys, order = _keys(bits).sort(stable=True)
        # The n-th of the rows that are alike is the n-th of the tokens that are.
        nth = torch.arange(len(keys), device=keys.device) - torch.searchsorted(keys, keys)
        place = (torch.searchsorted(known, keys) + nth).clamp(max=len(known))
        found = torch.empty_like(order)
        found[order] = torch.cat([tokens, tokens.new_full((1,), -1)])[place]
        if bool((found < 0).any()) or not torch.equal(self._bits[found], bits):
            repeated = bool(torch.isin(keys, self._keys).all())
            raise _UnknownRows(
                "a token more than once" if repeated else "rows that its block was not called with"
            )
        before = self._found.get(expert)
        self._found[expert] = found if before is None else torch.cat([before, found])
        return found


class _UnknownRows(Exception):
    """What an expert was given that is no token's."""


_INTEGERS = {2: torch.int16, 4: torch.int32}
_SOME = 1024  # rows whose keys are made at once: their products take eight bytes an element


def _bits(rows: Tensor) -> Tensor:
    """What the rows hold, as integers."""
    return rows.contiguous().view(_INTEGERS[rows.element_size()])


def _keys(bits: Tensor) -> Tensor:
    """A number for each row, int64 [rows], which rows that differ hardly ever share."""
    factors = _factors(bits.shape[1], bits.device)
    keys = [(some.long() * factors).sum(1) for some in bits.split(_SOME)]
    return torch.cat(keys) if keys else bits.new_empty(0, dtype=torch.int64)


@functools.lru_cache(maxsize=16)
def _factors(width: int, device: torch.device) -> Tensor:
    generator = torch.Generator().manual_seed(0)
    limits = torch.iinfo(torch.int64)
    drawn = torch.randint(limits.min, limits.max, (width,), generator=generator)
    return (drawn | 1).to(device)

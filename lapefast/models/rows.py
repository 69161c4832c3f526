"""The rows of a stack's input: a hook that sees them first, and says what each belongs to."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from lapefast.errors import InputError
from lapefast.models.sites import Site
from lapefast.models.traces import clear, leave


@dataclass
class RowIndex:
    """Which group or edit set each row of a stack's input belongs to: int32, a row or one each."""

    tensor: Tensor | None = None
    shape: tuple[int, int] | None = None
    """Batch and length of the input that runs, where it is known."""

    experts: ClassVar[int] = 1

    def over(self, tokens: Tensor) -> RowIndex:
        """One like this of other tokens."""
        return RowIndex(tokens)


class ExpertRowIndex(RowIndex):
    """The same of the rows that a mixture's experts see: ``index * experts + expert``.

    Args:
        tokens: the index of the stack's input, which this one is made of.
        experts: how many there are.
    """

    def __init__(self, tokens: RowIndex, experts: int) -> None:
        super().__init__()
        self.tokens, self.experts = tokens, experts

    def over(self, tokens: Tensor) -> ExpertRowIndex:
        return ExpertRowIndex(RowIndex(tokens), self.experts)

    def route(self, experts: Tensor, tokens: Tensor) -> None:
        """Take the rows that come next: each one's expert and token, integers [rows].

        The expert is -1 where a row belongs to nothing.
        """
        index = self.tokens.tensor
        if index is None:
            self.tensor = experts.to(torch.int32)
            return
        own = index if index.numel() == 1 else index[tokens]
        known = (own >= 0) & (experts >= 0)
        self.tensor = torch.where(known, own * self.experts + experts, -1).to(torch.int32)


def rows_at(site: Site, tokens: RowIndex) -> RowIndex:
    """The index of the rows that a site sees, of that of its stack's tokens."""
    return ExpertRowIndex(tokens, site.experts) if site.experts else tokens


class StackRows(ABC):
    """A hook that runs before one stack and fills an index of its rows for the FFNs behind it.

    Attributes:
        device: where the stack's input lies.
        indices: device -> the index there; one per device that holds FFNs, as a model may be
            spread over several.
    """

    def __init__(self, module: nn.Module, device: torch.device, trace: str) -> None:
        self.device = device
        self.indices = {device: RowIndex()}
        self._module, self._trace = module, trace
        self.hooks = (module.register_forward_pre_hook(self._before_forward, with_kwargs=True),)
        leave(module, trace, self)

    def index_on(self, device: torch.device) -> RowIndex:
        """The index that FFNs on ``device`` read."""
        return self.indices.setdefault(device, RowIndex())

    @abstractmethod
    def before_forward(self, batch: int, length: int, options: dict[str, Any]) -> None:
        """Fill the indices for an input of ``batch`` rows of ``length`` tokens."""

    def remove(self) -> None:
        """Take the hook out. Safe to repeat."""
        for hook in self.hooks:
            hook.remove()
        clear(self._module, self._trace)

    def _before_forward(self, module: nn.Module, args: tuple, kwargs: dict[str, Any]) -> None:
        shape = _input_shape(args, kwargs)
        if not torch.compiler.is_compiling():
            for index in self.indices.values():
                index.shape = shape
        self.before_forward(*shape, kwargs)


def _input_shape(args: tuple, kwargs: dict[str, Any]) -> tuple[int, int]:
    """Batch and length of what a stack is called with."""
    ids, embeddings = kwargs.get("input_ids"), kwargs.get("inputs_embeds")
    if ids is None and embeddings is None:
        # Some call them otherwise: idx, tokens.
        integers = (one for one in kwargs.values() if _are_ids(one))
        ids = args[0] if args else next(integers, None)
    given = ids if ids is not None else embeddings
    if not isinstance(given, Tensor) or given.dim() < 2:
        raise InputError("the model was called without input_ids or inputs_embeds [batch, length]")
    return given.shape[0], given.shape[1]


def _are_ids(given: Any) -> bool:
    return isinstance(given, Tensor) and given.dim() == 2 and not given.is_floating_point()


def cache_of(options: dict[str, Any]) -> Any:
    """The cache among a forward's arguments, told by what it can do.

    Its name says too little: `past_key_values`, `cache_params` or `cache`, by version and model.
    """
    for one in options.values():  # torch 2.6 compiles no next()
        if hasattr(one, "get_seq_length"):
            return one
    return None


def past_length(options: dict[str, Any]) -> int | Tensor:
    """How many positions the cache holds already."""
    cache = cache_of(options)
    return 0 if cache is None else cache.get_seq_length()

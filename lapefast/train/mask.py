"""A mask over gradients and steps: only the chosen neurons' weights change."""

from __future__ import annotations

import copy
import functools
import types
from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor, nn
from torch.optim.optimizer import (
    register_optimizer_step_post_hook as after_every_step,
)

from lapefast.errors import InputError
from lapefast.models.bare import unwrap
from lapefast.models.linears import find_linears
from lapefast.models.projections import up_projection
from lapefast.models.structure import FFN, find_ffns
from lapefast.models.traces import MASK, clear, leave
from lapefast.neurons import NeuronSet, NeuronSets, deactivate
from lapefast.steering.linear import dense_weight

__all__ = ["NeuronMask", "neuron_mask"]


def neuron_mask(
    model: nn.Module, neurons: NeuronSet | NeuronSets | Mapping[str, Any]
) -> NeuronMask:
    """Let any optimiser train the weights of some neurons and nothing else.

    Within it, a neuron of an FFN is its row of up (plain FFN: of the first projection) and its
    column of down; a neuron of a linear layer, such as PLND's queries, keys and values, is its row
    of the weight. Gradients elsewhere are 0 from the moment they are made, so that clipping sees
    the chosen ones alone (arXiv 2402.18815; the released code clips first). Whatever an optimiser
    does to the other weights of these matrices, weight decay and momentum included, is undone after
    its step; all other parameters take no gradient. So what is not chosen stays bit for bit the
    same. Works with `transformers.Trainer` and with several optimisers.

    Args:
        model: with dense weights on hand; it may be trained in any dtype.
        neurons: `neurons[label]`, several labels' (their union is meant), or site -> integers.

    Returns:
        A context manager; leaving it, or `remove()`, gives the parameters their `requires_grad`
        back. Its ``parameters`` are what an optimiser needs; giving it all of the model's does no
        harm.

    Raises:
        InputError: the neurons don't fit the model, there are none, or a weight is quantised,
            offloaded or shared between chosen and other neurons.
    """
    return NeuronMask(model, neurons)


class NeuronMask:
    """See `neuron_mask`.

    Attributes:
        parameters: the parameters that hold chosen neurons.
        trained: how many of their elements are trained.
    """

    def __init__(self, model: nn.Module, neurons: Any) -> None:
        self._model = unwrap(model)
        if MASK in self._model.__dict__:
            raise InputError(
                f"this {type(self._model).__name__} has a neuron mask already; remove it first, or "
                "give both masks' neurons at once"
            )
        masks = _masks(model, neurons)
        self._kept = [(one, one.requires_grad) for one in self._model.parameters()]
        self._hooks: list[Any] = []
        self._masked = {
            parameter: (mask, parameter.detach().clone()) for parameter, mask in masks.items()
        }
        self.parameters = list(masks)
        self.trained = sum(int(mask.sum()) for mask in masks.values())
        leave(self._model, MASK, self)
        self._model.__dict__["__deepcopy__"] = types.MethodType(_copied, self._model)
        for parameter, _ in self._kept:
            parameter.requires_grad_(parameter in masks)
            if parameter not in masks:
                parameter.grad = None  # optimisers step, and decay, whatever has a gradient
        for parameter in self.parameters:
            if parameter.grad is not None:
                parameter.grad = self._only(parameter, parameter.grad)
            hook = functools.partial(self._only, parameter)
            self._hooks.append(parameter.register_hook(hook))
        self._hooks.append(after_every_step(self._stepped))

    def __enter__(self) -> NeuronMask:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Let everything be trained again as before. Safe to repeat."""
        if not self._kept:
            return
        while self._hooks:
            self._hooks.pop().remove()
        self._restore()
        self.restore_flags(self._model)
        self._kept.clear()
        self._masked.clear()
        self._model.__dict__.pop("__deepcopy__", None)
        clear(self._model, MASK)

    def restore_flags(self, model: nn.Module) -> None:
        """Give the parameters of the model, or of a copy of it, their `requires_grad` back."""
        for parameter, (_, required) in zip(model.parameters(), self._kept, strict=True):
            parameter.requires_grad_(required)

    def _only(self, parameter: nn.Parameter, gradient: Tensor) -> Tensor:
        mask, _ = self._on_device(parameter)
        # Not times the mask: a NaN elsewhere would stay one.
        return torch.where(mask, gradient, 0)

    def _stepped(self, optimiser: torch.optim.Optimizer, *_: Any) -> None:
        # The hook sees every optimiser of the process.
        groups = optimiser.param_groups
        if any(one in self._masked for group in groups for one in group["params"]):
            self._restore()

    @torch.no_grad()
    def _restore(self) -> None:
        for parameter in self._masked:
            mask, before = self._on_device(parameter)
            parameter.copy_(torch.where(mask, parameter, before))

    def _on_device(self, parameter: nn.Parameter) -> tuple[Tensor, Tensor]:
        """Mask and earlier values, where the parameter is now and in its dtype."""
        mask, before = self._masked[parameter]
        if mask.device != parameter.device or before.dtype != parameter.dtype:
            mask, before = mask.to(parameter.device), before.to(parameter)
            self._masked[parameter] = mask, before
        return mask, before


def _copied(self: nn.Module, memo: dict[int, Any]) -> nn.Module:
    """A deep copy without the mask, which trains whatever the model would have trained."""
    mask: NeuronMask = self.__dict__[MASK]
    placed = self.__dict__.pop("__deepcopy__")
    try:
        made = copy.deepcopy(self, memo)
    finally:
        self.__dict__["__deepcopy__"] = placed
    mask.restore_flags(made)
    return made


def _masks(model: nn.Module, neurons: Any) -> dict[nn.Parameter, Tensor]:
    """Parameter -> bool like it, True where it is trained."""
    chosen = {site: table[0] for site, table in deactivate(neurons).bind(model).tables.items()}
    ffns = {ffn.site.name: ffn for ffn in find_ffns(model, mixtures=True)}
    linears = find_linears(model)
    masks: dict[nn.Parameter, Tensor] = {}
    for site, indices in chosen.items():
        if site in ffns:
            _mark_ffn(masks, ffns[site], indices)
        else:
            _mark(masks, linears[site], site, 0, indices)
    _refuse_shared(model, masks)
    return masks


def _mark_ffn(masks: dict, ffn: FFN, indices: Tensor) -> None:
    if ffn.site.experts:
        raise InputError(
            f"{ffn.site.name} is a mixture of experts, whose weights hold all experts at once and "
            "can't be masked; choose neurons of dense FFNs"
        )
    up, first_row = up_projection(ffn)
    _mark(masks, up, ffn.site.name, 0, indices + first_row)
    _mark(masks, ffn.last, ffn.site.name, 1, indices)


def _mark(
    masks: dict[nn.Parameter, Tensor], module: nn.Module, site: str, dim: int, indices: Tensor
) -> None:
    dense_weight(module, site)  # refuses what holds no plain weight
    parameter = module.weight
    if type(module).__name__ == "Conv1D":
        dim = 1 - dim
    mask = masks.setdefault(parameter, torch.zeros_like(parameter, dtype=torch.bool))
    mask.index_fill_(dim, indices.to(mask.device), True)


def _refuse_shared(model: nn.Module, masks: Mapping[nn.Parameter, Tensor]) -> None:
    users: dict[nn.Parameter, int] = {}
    for module in unwrap(model).modules():
        for parameter in module._parameters.values():
            if parameter is not None and parameter in masks:
                users[parameter] = users.get(parameter, 0) + 1
    if any(count > 1 for count in users.values()):
        raise InputError(
            "a weight of chosen neurons is also another module's, which would be trained with it; "
            "a model whose layers share weights can't be masked"
        )

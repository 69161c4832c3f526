"""A mask over gradients and steps: only the chosen neurons' weights change."""

from __future__ import annotations

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
        masks = _masks(model, neurons)
        self._kept = [(parameter, parameter.requires_grad) for parameter in _all(model)]
        self._hooks: list[Any] = []
        self._masked = [
            (parameter, mask, parameter.detach().clone()) for parameter, mask in masks.items()
        ]
        self.parameters = [parameter for parameter, _, _ in self._masked]
        self.trained = sum(int(mask.sum()) for mask in masks.values())
        for parameter, _ in self._kept:
            parameter.requires_grad_(parameter in masks)
        for parameter, mask, _ in self._masked:
            if parameter.grad is not None:
                parameter.grad.masked_fill_(~mask, 0)
            self._hooks.append(parameter.register_hook(lambda grad, mask=mask: _only(grad, mask)))
        self._hooks.append(after_every_step(self._restore))

    def __enter__(self) -> NeuronMask:
        return self

    def __exit__(self, *exception: object) -> None:
        self.remove()

    def remove(self) -> None:
        """Let everything be trained again as before. Safe to repeat."""
        while self._hooks:
            self._hooks.pop().remove()
        self._restore()
        while self._kept:
            parameter, required = self._kept.pop()
            parameter.requires_grad_(required)
        self._masked.clear()

    @torch.no_grad()
    def _restore(self, *_: Any) -> None:
        for parameter, mask, before in self._masked:
            parameter.copy_(torch.where(mask, parameter, before))


def _only(gradient: Tensor, mask: Tensor) -> Tensor:
    # Not times the mask: a NaN elsewhere would stay one.
    return torch.where(mask, gradient, 0)


def _all(model: nn.Module) -> list[nn.Parameter]:
    return list(unwrap(model).parameters())


def _masks(model: nn.Module, neurons: Any) -> dict[nn.Parameter, Tensor]:
    """Parameter -> bool like it, True where it is trained."""
    chosen = {site: table[0] for site, table in deactivate(neurons).bind(model).tables.items()}
    ffns = {ffn.site.name: ffn for ffn in find_ffns(model)}
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

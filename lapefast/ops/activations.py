"""The activations that the ops know by name, each as the eager PyTorch that defines it."""

from __future__ import annotations

import math
from collections.abc import Callable

import torch
from torch import Tensor
from torch.nn import functional

__all__ = ["ACTIVATIONS", "activate"]


def _identity(gate: Tensor) -> Tensor:
    return gate


def _relu_squared(gate: Tensor) -> Tensor:
    return torch.square(functional.relu(gate))


def _gelu_tanh(gate: Tensor) -> Tensor:
    return functional.gelu(gate, approximate="tanh")


def _gelu_new(gate: Tensor) -> Tensor:
    # One expression, in the order of transformers' own: gradients are added up in that order.
    return (
        0.5
        * gate
        * (1.0 + torch.tanh(math.sqrt(2.0 / math.pi) * (gate + 0.044715 * torch.pow(gate, 3.0))))
    )


def _quick_gelu(gate: Tensor) -> Tensor:
    return gate * torch.sigmoid(1.702 * gate)


# identity: the tensor already is the activation. gelu_new and quick_gelu are composed as the
# classes of transformers compose them, so they round after every operation.
ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "identity": _identity,
    "silu": functional.silu,
    "relu": functional.relu,
    "relu_squared": _relu_squared,
    "gelu": functional.gelu,
    "gelu_tanh": _gelu_tanh,
    "gelu_new": _gelu_new,
    "quick_gelu": _quick_gelu,
}


def activate(gate: Tensor, activation: str) -> Tensor:
    """`activation(gate)` in eager PyTorch; any shape, the dtype of `gate`."""
    return ACTIVATIONS[activation](gate)

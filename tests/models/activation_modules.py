"""Every class that the package takes for the activation of a name that the ops know."""

from __future__ import annotations

from torch import nn
from transformers import activations

MODULES = {
    "silu": [nn.SiLU, activations.SiLUActivation],
    "relu": [nn.ReLU],
    "relu_squared": [activations.ReLUSquaredActivation],
    "gelu": [nn.GELU, activations.GELUActivation],
    "gelu_tanh": [lambda: nn.GELU(approximate="tanh"), activations.GELUTanh],
    "gelu_new": [activations.NewGELUActivation],
    "quick_gelu": [activations.QuickGELUActivation],
}

"""Which kernel, if any, may compute an activation module."""

from __future__ import annotations

import torch
from torch import nn

from lapefast.ops.exact import exact_dtypes

# By module and class, exact types only: a subclass may compute something else. transformers is not
# imported for this. What a name computes is said in lapefast/ops.
_KERNELS = {
    ("torch.nn.modules.activation", "SiLU"): "silu",
    ("torch.nn.modules.activation", "ReLU"): "relu",
    ("transformers.activations", "SiLUActivation"): "silu",
    ("transformers.activations", "ReLUSquaredActivation"): "relu_squared",
    ("transformers.activations", "NewGELUActivation"): "gelu_new",
    ("transformers.activations", "QuickGELUActivation"): "quick_gelu",
    ("transformers.activations", "GELUActivation"): "gelu",
    ("transformers.activations", "GELUTanh"): "gelu_tanh",
    ("transformers.activations", "PytorchGELUTanh"): "gelu_tanh",
}


def kernel_name(activation: nn.Module) -> str | None:
    """The ops' name of what ``activation`` computes, or None where they have none for it."""
    if getattr(activation, "inplace", False):
        return None
    cls = type(activation)
    if cls is nn.GELU:
        return {"none": "gelu", "tanh": "gelu_tanh"}.get(activation.approximate)
    return _KERNELS.get((cls.__module__, cls.__name__))


def fused_dtypes(
    activation: nn.Module, device: torch.device, backend: str, exact: bool
) -> tuple[str, frozenset[torch.dtype]]:
    """The kernel's name and the dtypes in which it computes ``activation`` itself.

    In other dtypes the module runs and the kernel reads its output. With ``exact`` only what is
    proven bit-equal on every value is fused; without it, all that a kernel exists for.
    """
    name = kernel_name(activation)
    if name is None:
        return "identity", frozenset()
    if not exact:
        return name, frozenset({torch.float32, torch.float16, torch.bfloat16})
    return name, exact_dtypes(name, activation, device, backend)

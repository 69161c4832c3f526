"""Where a model's FFNs are under vLLM, and which site each of them is.

vLLM has its own classes for models. A module is an FFN if it owns an activation and one
row-parallel linear layer, which is the last projection.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from torch import nn

from lapefast.errors import InputError
from lapefast.neurons import Layout

__all__ = ["FFN", "find", "matched"]

_NAMES = ("act_fn", "act", "activation_fn", "activation", "gelu_impl")
_PLAIN = {
    "torch.nn.modules.activation": {"GELU", "ReLU", "SiLU", "Sigmoid", "Tanh"},
    "vllm.model_executor.layers.activation": {
        "FastGELU", "GELU", "GELUTanh", "NewGELU", "QuickGELU", "ReLUSquaredActivation",
    },
    "transformers.activations": {
        "FastGELUActivation", "GELUActivation", "GELUTanh", "NewGELUActivation",
        "QuickGELUActivation", "ReLUSquaredActivation", "SiLUActivation",
    },
}  # fmt: skip
"""Classes that compute the activation alone, by module; they run unchanged."""


@dataclass(frozen=True)
class FFN:
    """One FFN.

    Attributes:
        path: of its owner in the model.
        owner: the module that owns the activation.
        name: the activation's name there.
        activation: what computes the activation alone.
        gated: whether it is given gate and up in one tensor, and multiplies.
        width: neurons of the whole FFN.
        start, stop: those that this rank holds.
    """

    path: str
    owner: nn.Module
    name: str
    activation: nn.Module
    gated: bool
    width: int
    start: int
    stop: int


def find(model: nn.Module) -> list[FFN]:
    """The FFNs of a model's language part, in definition order.

    Raises:
        InputError: there is none, or one whose activation can't be handled.
    """
    from vllm.model_executor.layers.linear import RowParallelLinear

    if hasattr(model, "get_language_model"):
        model = model.get_language_model()
    ffns = []
    for path, module in model.named_modules():
        # An adapter wraps a linear layer and keeps it as its base layer.
        layers = (getattr(child, "base_layer", child) for child in module.children())
        last = [layer for layer in layers if isinstance(layer, RowParallelLinear)]
        name = next((name for name in _NAMES if module._modules.get(name) is not None), None)
        if name is None or len(last) != 1:
            continue
        activation, gated = _alone(path, module._modules[name])
        local = last[0].input_size_per_partition
        start = last[0].tp_rank * local
        width = last[0].input_size
        ffns.append(FFN(path, module, name, activation, gated, width, start, start + local))
    if not ffns:
        raise InputError(
            f"in {type(model).__name__} there is no FFN whose activation is a module beside a "
            f"row-parallel projection (as mlp.act_fn beside mlp.down_proj), so its neurons can be "
            "neither edited nor counted under vLLM"
        )
    return ffns


def matched(ffns: Sequence[FFN], layout: Layout, what: str) -> dict[str, FFN]:
    """Site -> its FFN: as many as the layout has, of the same names after one prefix, and widths.

    Args:
        ffns: as found.
        layout: the sites.
        what: is to be done there, in the plural, for messages.

    Raises:
        InputError: they are not the layout's.
    """
    sites, widths = layout.sites, layout.widths
    model, serve = layout.model or "another model", f"serve the model of these {what}"
    if len(ffns) != len(sites):
        raise InputError(
            f"the {what} are for {len(sites)} sites of {model}, but the model that is served has "
            f"{len(ffns)} FFNs; {serve}"
        )
    prefix = ffns[0].path.removesuffix(str(sites[0]))
    for site, ffn in zip(sites, ffns, strict=True):
        if ffn.path != f"{prefix}{site}" or (prefix and not prefix.endswith(".")):
            raise InputError(
                f"the {what} are for a site {site} of {model}, but the model that is served has "
                f"the FFN {ffn.path} there; {serve}"
            )
        if ffn.width != widths[site]:
            raise InputError(
                f"the {what} are for a site {site} of width {widths[site]} of {model}, but the "
                f"model that is served has {ffn.width} neurons there; {serve}"
            )
    return dict(zip(sites, ffns, strict=True))


def _alone(path: str, activation: nn.Module) -> tuple[nn.Module, bool]:
    """What computes the activation alone, and whether the module also multiplied."""
    cls = type(activation)
    if cls.__module__ == "vllm.model_executor.layers.activation":
        if cls.__name__ == "SiluAndMul":
            return nn.SiLU(), True
        if cls.__name__ == "GeluAndMul":
            return nn.GELU(approximate=activation.approximate), True
    if cls.__name__ in _PLAIN.get(cls.__module__, ()):
        return activation, False
    raise InputError(
        f"the FFN {path} has an activation of the class {cls.__module__}.{cls.__name__}, which "
        "lapefast does not know; it knows SiluAndMul, GeluAndMul and "
        f"{', '.join(sorted(set().union(*_PLAIN.values())))}"
    )

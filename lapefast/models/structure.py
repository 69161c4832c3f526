"""Finding a model's FFNs by their structure.

``TABLE`` names the parts of the families' FFNs. A module that the table doesn't know is still an
FFN if its children say so: linear layers that widen and narrow back, and one activation module.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Collection, Iterator, Mapping
from dataclasses import dataclass, replace
from itertools import pairwise

from torch import nn

from lapefast.errors import InputError
from lapefast.models.bare import bare_model, named_modules, stack_of, stacks
from lapefast.models.forwards import (
    GatedForward,
    clamped_gate,
    read_forward,
    takes_all_tokens,
)
from lapefast.models.sites import Site

_ACTIVATION_NAMES = ("act_fn", "activation_fn", "act", "activation", "activation_function")

# What chooses a mixture's experts, beside them.
_ROUTERS = ("gate", "router")

_log = logging.getLogger(__name__)

_Parts = tuple[nn.Module, nn.Module, bool]  # activation, last projection, whether gated


@dataclass(frozen=True)
class Row:
    """The parts of one kind of FFN, as paths from the module that owns them.

    Attributes:
        first: the projections that widen; the first of them makes the gate.
        last: the projection that narrows back.
        activations: the names that the activation module may have.
    """

    first: tuple[str, ...]
    last: str
    activations: tuple[str, ...] = _ACTIVATION_NAMES


TABLE = (
    # gated
    Row(("gate_proj", "up_proj"), "down_proj"),
    Row(("gate_up_proj",), "down_proj"),
    Row(("wi_0", "wi_1"), "wo"),
    Row(("w1", "w3"), "w2"),
    Row(("Wi",), "Wo"),
    Row(("input_linear",), "output_linear"),
    # plain
    Row(("fc1",), "fc2"),
    Row(("c_fc",), "c_proj"),
    Row(("dense_h_to_4h",), "dense_4h_to_h", (*_ACTIVATION_NAMES, "gelu_impl")),
    Row(("fc_in",), "fc_out"),
    Row(("up_proj",), "down_proj"),
    Row(("wi",), "wo"),
    Row(("lin1",), "lin2"),
    Row(("linear1",), "linear2"),
    Row(("layer_1",), "layer_2"),
    Row(("ffn",), "ffn_output"),
    # the two projections stand in two modules of the layer
    Row(("intermediate.dense",), "output.dense", ("intermediate.intermediate_act_fn",)),
)


@dataclass(frozen=True)
class FFN:
    """One FFN, or mixture of experts, as found.

    Attributes:
        site: its name, width and activation.
        owner: the module that holds the parts.
        activation: the activation module, which others may share; the owner, where it gates as in
            `lapefast.models.forwards.ClampedGate`.
        last: the last projection; a mixture's owner, which holds those of all experts.
        gated: whether the activation is multiplied by up before the last projection.
        forward: how to replace the owner's forward, or None where only its activation is handled.
        listed: of a mixture whose experts are modules of their own, else None. The activation is
            then that of its first expert.
    """

    site: Site
    owner: nn.Module
    activation: nn.Module
    last: nn.Module
    gated: bool
    forward: GatedForward | None
    listed: ListedExperts | None = None


@dataclass(frozen=True)
class ListedExperts:
    """The experts of a mixture that are modules of their own, as transformers 4 has them.

    Attributes:
        block: the module that is called with all tokens and hands each expert its own.
        experts: the FFNs, in order.
    """

    block: nn.Module
    experts: tuple[FFN, ...]


def find_sites(model: nn.Module) -> list[Site]:
    """The model's sites, in model order.

    Raises:
        InputError: where no FFN is found, or one is found that can't be handled.
    """
    return [ffn.site for ffn in find_ffns(model, mixtures=True)]


def find_ffns(model: nn.Module, mixtures: bool = False) -> list[FFN]:
    """The model's FFNs, in model order; errors as in `find_sites`.

    Args:
        model: any model.
        mixtures: take mixtures of experts, too; without it a model that has one is refused.
    """
    bare = bare_model(model)
    modules, stack_names = dict(named_modules(bare)), stacks(bare).keys()
    found, listed = [], None
    for path, module in modules.items():
        if listed is None or not path.startswith(listed):
            here = list(_ffn_at(path, module, modules, stack_names))
            found += here
            listed = f"{path}." if any(ffn.listed for ffn in here) else None
    found = _outermost(found)
    for ffn in found:
        if ffn.site.experts and not mixtures:
            raise InputError(
                f"{ffn.site.name} ({type(ffn.owner).__name__}) is a mixture of experts, whose "
                "neurons see only the tokens routed to them; this works on dense FFNs only"
            )
    if not found:
        raise InputError(
            f"{type(model).__name__} has no feed-forward block that lapefast can find; expected "
            "modules with linear layers and an activation module between them (docs/"
            "adding-a-model.md says how to add one)"
        )
    return found


def _outermost(found: list[FFN]) -> list[FFN]:
    """The mixtures, and the dense FFNs that lie in no part of another and choose no experts.

    Those that lie in one beside a projection are adapters, as X-MOD has for its languages, whose
    tokens alone pass through them, or PEFT's copies of a module that it trains whole, whose wrapper
    passes for the one in use. ZAYA's routers look like FFNs. MobileBERT's layers, which are FFNs by
    their names, hold more FFNs as parts of their own.
    """
    dense = [ffn.site.name for ffn in found if not ffn.site.experts]
    # What an FFN holds follows it. To look into each FFN would take a while, and few hold any.
    holders = {name for name, after in pairwise(dense) if after.startswith(f"{name}.")}
    outer = tuple(part for ffn in found if ffn.site.name in holders for part in _parts_of(ffn))
    mixtures = [ffn.site.name for ffn in found if ffn.site.experts]
    blocks = [name[: name.rfind(".") + 1] for name in mixtures]
    routers = tuple(f"{block}{router}." for block in blocks for router in _ROUTERS)
    inner = {name for name in dense if name.startswith(outer) or f"{name}.".startswith(routers)}
    if inner:
        _log.info("Inside other FFNs or routers, so no sites of their own: %s", sorted(inner))
    return [ffn for ffn in found if ffn.site.name not in inner]


def _parts_of(ffn: FFN) -> Iterator[str]:
    """Where in an FFN's module its own parts lie, as the beginnings of paths."""
    prefix = f"{ffn.site.name}." if ffn.site.name else ""
    for name, child in ffn.owner._modules.items():
        if child is not None and {ffn.last, ffn.activation} & set(child.modules()):
            yield f"{prefix}{name}."
    if hasattr(ffn.owner, "modules_to_save"):
        yield prefix


def _ffn_at(
    path: str, module: nn.Module, modules: Mapping[str, nn.Module], stack_names: Collection[str]
) -> Iterator[FFN]:
    if _is_mixture(path, module):
        if isinstance(module, (nn.ModuleList, nn.ModuleDict)):
            yield _listed_mixture(path, module, modules, stack_names)
        else:
            yield _mixture(path, module, stack_names)
        return
    if not module._modules:
        return
    parts = _parts_by_table(path, module) or _parts_by_shape(module) or _parts_by_forward(module)
    if parts is None:
        return
    activation, last, gated = parts
    width = _features(last)[0]
    forward = read_forward(module)
    if forward and forward.activation_of(module) is not activation:
        forward = None
    site = Site(path, width, type(activation).__name__, stack_of(path, stack_names))
    yield FFN(site, module, activation, last, gated, forward)


def _parts_by_table(path: str, module: nn.Module) -> _Parts | None:
    for row in TABLE:
        last = _child(module, row.last)
        if last is None:
            continue
        first = [_child(module, name) for name in row.first]
        if not all(map(_is_linear, (*first, last))):
            continue
        widened, width = _features(first[0])[1], _features(last)[0]
        if widened not in (width, 2 * width):
            continue
        activation = _activation_by(row, module)
        if activation is not None:
            gated = len(first) == 2 or widened != width or _has_another(module, first[0])
            return activation, last, gated
        forward = read_forward(module)
        if forward and forward.function is not None:
            return forward.function, last, True
        if clamped_gate(module, dense=True) is not None:
            return module, last, True
        if hasattr(module, "modules_to_save"):
            raise InputError(
                f"the FFN {path} calls its activation as a function, and PEFT trains it whole, so "
                "nothing can be placed there; merge the adapter first (model.merge_and_unload())"
            )
        raise InputError(
            f"the FFN {path or type(module).__name__} ({type(module).__name__}) calls its "
            "activation as a function, which can't be observed; make it a module of the FFN named "
            f"{row.activations[0]} (docs/adding-a-model.md)"
        )
    return None


def _has_another(module: nn.Module, first: nn.Module) -> bool:
    """Whether a second projection stands beside a plain row's, as in Jais."""
    others = [one for one in module.children() if one is not first and not _is_activation(one)]
    return any(_features(one) == _features(first) for one in others)


def _activation_by(row: Row, module: nn.Module) -> nn.Module | None:
    """The activation module that a row names, or else the only one that there is."""
    for name in row.activations:
        activation = _child(module, name)
        if isinstance(activation, nn.Module):
            return activation
    activations = [child for child in module.children() if _is_activation(child)]
    return activations[0] if len(activations) == 1 else None


def _parts_by_shape(module: nn.Module) -> _Parts | None:
    """The activation and last projection of an FFN that no row of the table names."""
    children = [child for child in module.children() if not _is_passive(child)]
    linears = [child for child in children if _is_linear(child)]
    activations = [child for child in children if _is_activation(child)]
    if (
        len(activations) != 1
        or not 2 <= len(linears) <= 3
        or len(children) != len(linears) + 1
        or next(module.parameters(recurse=False), None) is not None
    ):
        return None
    *first, last = linears
    width, hidden = _features(last)
    widened = [_features(one) for one in first]
    if all(one == (hidden, width) for one in widened) or widened == [(hidden, 2 * width)]:
        return activations[0], last, widened != [(hidden, width)]
    return None


def _parts_by_forward(module: nn.Module) -> _Parts | None:
    """Those of a forward that is exactly a gated FFN, whatever they are called."""
    forward = read_forward(module)
    if forward is None:
        return None
    last, activation = module._modules[forward.down], forward.activation_of(module)
    first = [module._modules[name] for name in (forward.gate, forward.up) if name]
    return (activation, last, True) if all(map(_is_linear, (*first, last))) else None


def _is_mixture(path: str, module: nn.Module) -> bool:
    return (
        isinstance(getattr(module, "down_proj", None), nn.Parameter)
        or path.rpartition(".")[2] == "experts"
        or type(module).__name__.endswith("Experts")
    )


def _mixture(path: str, module: nn.Module, stack_names: Collection[str]) -> FFN:
    """The experts that transformers keeps in one module and runs in its several ways.

    What `use_experts_implementation` makes of their class tells them, and what their weights mean.
    Llama 4's stand without it.
    """
    name = f"{path} ({type(module).__name__})"
    known = hasattr(type(module), "_apply_gate") or takes_all_tokens(module)
    # Experts that are split over processes are numbered anew in each.
    if not known or getattr(module, "_is_expert_parallel", False):
        raise InputError(
            f"{name} is a mixture of experts that lapefast can't handle: expected one module whose "
            "experts transformers (5 or later) runs as eager, batched_mm or grouped_mm, or all at "
            "once as those of Llama 4"
        )
    activation = _child(module, "act_fn")
    if not isinstance(activation, nn.Module):
        if clamped_gate(module, dense=False) is None:
            raise InputError(
                f"{name} is a mixture of experts that calls its activation as a function, which "
                "can't be observed; make it a module named act_fn (docs/adding-a-model.md)"
            )
        activation = module
    shape = module.down_proj.shape
    site = Site(
        path,
        shape[1] if getattr(module, "is_transposed", True) else shape[2],
        type(activation).__name__,
        stack_of(path, stack_names),
        experts=shape[0],
    )
    return FFN(site, module, activation, module, getattr(module, "has_gate", True), None)


def _listed_mixture(
    path: str, module: nn.Module, modules: Mapping[str, nn.Module], stack_names: Collection[str]
) -> FFN:
    """The experts that a list or dict holds, each an FFN of its own."""
    # Among NLLB's experts stands a dropout.
    children = {n: child for n, child in module._modules.items() if not _is_passive(child)}
    experts = tuple(
        ffn
        for name, child in children.items()
        for ffn in _ffn_at(f"{path}.{name}", child, modules, stack_names)
    )
    kinds = {(ffn.site.width, ffn.site.activation, ffn.gated) for ffn in experts}
    if len(kinds) != 1 or len(experts) != len(children) or any(ffn.site.experts for ffn in experts):
        raise InputError(
            f"{path} ({type(module).__name__}) is a mixture of experts that lapefast can't handle: "
            "expected each of its modules to be an FFN, all of one width and activation"
        )
    first = experts[0]
    site = replace(first.site, name=path, experts=len(experts))
    # A plain list has no forward: the module that holds it calls the experts.
    called = type(module).forward is not nn.Module.forward
    block = module if called else modules[path.rpartition(".")[0]]
    listed = ListedExperts(block, experts)
    return FFN(site, module, first.activation, module, first.gated, None, listed)


def _child(module: nn.Module, path: str):
    # Every module of the model is asked for most of these paths, whenever something is placed; to
    # ask for an attribute that is not there takes ten times as long. Wrappers pass for what they
    # wrap (torch.compile's, FSDP's, PEFT's).
    for name in path.split("."):
        found = module._modules.get(name)
        if found is None and (
            name in module.__dict__ or type(module).__getattr__ is not nn.Module.__getattr__
        ):
            found = getattr(module, name, None)
        if found is None:
            return None
        module = found
    return module


def _is_linear(module: object) -> bool:
    return isinstance(module, nn.Module) and _features(module) is not None


def _features(linear: nn.Module) -> tuple[int, int] | None:
    """(in, out) of a linear layer: torch's, transformers' Conv1D, quantised or adapted ones."""
    if hasattr(linear, "in_features") and hasattr(linear, "out_features"):
        return linear.in_features, linear.out_features
    if type(linear).__name__ == "Conv1D" and hasattr(linear, "nf"):
        return tuple(linear.weight.shape)
    return None


def _is_activation(module: nn.Module) -> bool:
    cls = type(module)
    return (
        cls.__module__ in ("torch.nn.modules.activation", "transformers.activations")
        or re.search("gelu|silu|relu|swish|swiglu|mish|tanh|sigmoid|activation", cls.__name__, re.I)
        is not None
    ) and not any(map(_is_linear, module.modules()))


def _is_passive(module: nn.Module) -> bool:
    return isinstance(module, (nn.Dropout, nn.Identity)) or "Norm" in type(module).__name__

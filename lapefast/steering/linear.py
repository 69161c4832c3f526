"""Edits that are changes of weights: what of them the last projection can take, and the proof.

Names and structure alone lie: BitNet normalises the product before its last projection, others
clamp or multiply. So before anything is made of an FFN's weights, its own code runs on a few tokens
with and without edits, and what enters the last projection must follow `scale * p + shift * u` on
the edited columns, and be the same bits elsewhere.
"""

from __future__ import annotations

from collections.abc import Mapping
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn import functional

from lapefast.errors import InputError
from lapefast.models.bare import bare_model, evaluating
from lapefast.models.inputs import forward_inputs, probe_ids
from lapefast.models.placement import dtype_of
from lapefast.models.structure import FFN, find_ffns
from lapefast.models.traces import PLACEMENT
from lapefast.neurons import Edit, activate
from lapefast.steering.steer import steer

__all__ = [
    "Call",
    "LinearEdit",
    "calls_of",
    "check_edit",
    "close",
    "dense_weight",
    "effective_edit",
    "holds_adapter",
    "linear_edits",
    "precision",
    "probing",
    "refusal",
    "run_call",
    "summing",
]

_FLOATS = (torch.float32, torch.float16, torch.bfloat16)
_FLOAT32 = torch.finfo(torch.float32)
_LOUD = 64.0  # a power of two, so that only what is not linear differs by it


@dataclass(frozen=True)
class Call:
    """One call of an FFN's owner in the probe, run alone with and without the edit.

    Attributes:
        args, options: what the owner was called with.
        entered: what enters the last projection without the edit, [..., width], on the CPU.
        edited: the same under the edit.
        output: what leaves the last projection under the edit, [..., hidden], on the CPU.
    """

    args: tuple
    options: dict[str, Any]
    entered: Tensor
    edited: Tensor
    output: Tensor


@dataclass(frozen=True)
class LinearEdit:
    """One FFN's edit, proven to be linear in what enters the last projection.

    Attributes:
        ffn: the FFN.
        neurons: int64 [n], sorted; none with scale 1 and shift 0.
        scale, shift: float32 [n].
        calls: the FFN's calls in the probe, at least one.
    """

    ffn: FFN
    neurons: Tensor
    scale: Tensor
    shift: Tensor
    calls: tuple[Call, ...]


def effective_edit(model: nn.Module, edit: Edit) -> Edit:
    """The edit bound to the model, without the neurons that it leaves as they are.

    Raises:
        InputError: it is not one edit for all, does not fit the model or changes nothing; or
            something is placed in the model.
    """
    check_edit(edit)
    bare = bare_model(model)
    if PLACEMENT in bare.__dict__:
        raise InputError(
            f"something of lapefast is placed in this {type(bare).__name__} (by steer or record); "
            "remove it first"
        )
    return _effective(edit.bind(model))


def linear_edits(model: nn.Module, edit: Edit) -> list[LinearEdit]:
    """The edit of each FFN that it changes, proven by a probe of a few tokens.

    Nothing of the model is changed, then or later, by this function.

    Args:
        model: the model, with dense weights on hand and nothing placed in it.
        edit: as `effective_edit` gives it; of sites that are no FFNs, nothing is made.

    Raises:
        InputError: a last projection is adapted, quantised, offloaded or not reached by the probe;
            or what enters it does not follow the activation linearly.
    """
    ffns = [ffn for ffn in find_ffns(model, mixtures=True) if ffn.site.name in edit.tables]
    if not ffns:
        return []
    for ffn in ffns:
        if ffn.site.experts:
            raise refusal(ffn.site.name, "a mixture of experts is not folded;")
    bare = bare_model(model)
    names = {ffn.site.name for ffn in ffns}
    tables = {site: table for site, table in edit.tables.items() if site in names}
    for ffn in ffns:
        dense_weight(ffn.last, ffn.site.name)
    with probing(bare):
        given = calls_of(bare, {ffn.site.name: ffn.owner for ffn in ffns})
        return _proven(model, Edit(tables, edit.layout), ffns, given)


def check_edit(edit: object) -> None:
    """Raises InputError, where it is not one edit for all."""
    if not isinstance(edit, Edit):
        raise InputError(
            "expected one edit, made by deactivate, activate, scale or add, got "
            f"{type(edit).__name__}; lf.steer takes an edit per sequence and shifts"
        )


def dense_weight(module: nn.Module, site: str) -> Tensor:
    """A linear layer's weight as [out, in]: a view without gradient, also of a Conv1D's.

    Raises:
        InputError: naming the site, where the weight is adapted, quantised or offloaded.
    """
    if holds_adapter(module):
        raise refusal(
            site,
            f"{type(module).__name__} holds an adapter; merge it first (merge_and_unload), or",
        )
    transposed = type(module).__name__ == "Conv1D"
    weight = module._parameters.get("weight")
    if type(weight) is not nn.Parameter or not (transposed or isinstance(module, nn.Linear)):
        raise refusal(site, f"{type(module).__name__} is quantised or no plain linear layer;")
    if weight.device.type == "meta":
        raise refusal(site, "its weights are offloaded; load them all, or")
    view = weight.detach().T if transposed else weight.detach()
    expected = None if transposed else (module.out_features, module.in_features)
    if weight.dtype not in _FLOATS or (expected and view.shape != expected):
        raise refusal(
            site,
            f"a weight {weight.dtype} {list(weight.shape)} is quantised, packed or sharded;",
        )
    return view


def holds_adapter(module: nn.Module) -> bool:
    """Whether a module is a PEFT layer or holds one."""
    return any(
        type(part).__module__.partition(".")[0] == "peft" or hasattr(part, "base_layer")
        for part in module.modules()
    )


def refusal(site: str, why: str) -> InputError:
    """The error that leaves the user `lf.steer`; `why` ends where that may follow."""
    return InputError(f"{site}: {why} use lf.steer, which edits while the model runs")


@contextmanager
def probing(bare: nn.Module):
    """As forward passes for a probe run: in eval mode, without gradient, not compiled."""
    with evaluating(bare), torch.no_grad(), torch.compiler.set_stance("force_eager"):
        yield


def run_call(ffn: FFN, args: tuple, options: dict[str, Any]) -> tuple[Tensor, Tensor]:
    """What enters and what leaves the last projection in one call of the FFN's owner, on the CPU.

    Raises:
        InputError: where the owner does not call it once.
    """
    seen = []

    def note(_module: nn.Module, given: tuple, output: Tensor) -> None:
        seen.append((given[0].detach().to("cpu", copy=True), output.to("cpu", copy=True)))

    hook = ffn.last.register_forward_hook(note)
    try:
        ffn.owner(*args, **options)
    finally:
        hook.remove()
    if len(seen) != 1:
        raise refusal(ffn.site.name, f"it calls its last projection {len(seen)} times in one go;")
    return seen[0]


def precision(ffn: FFN, tensor: Tensor) -> torch.finfo:
    """The coarser of the precisions of the FFN and of what enters its last projection.

    They differ where T5 keeps its last projections in float32.
    """
    return max(torch.finfo(dtype_of(ffn)), torch.finfo(tensor.dtype), key=lambda info: info.eps)


def close(found: Tensor, expected: Tensor, size: Tensor, info: torch.finfo) -> bool:
    """Whether values agree within 4 spacings of `size`, and of what numbers below normal ones have.

    Both sides round at most three times by half a spacing each: the edited activation, the product
    of it, the product without it. NaN equals NaN, and what is over the dtype's range is its end.
    """

    def within(values: Tensor) -> Tensor:
        return values.to("cpu", torch.float64).clamp(-info.max, info.max)

    found, expected = within(found), within(expected)
    smallest = info.smallest_normal * info.eps
    near = (found - expected).abs() <= 4 * (info.eps * size.double() + smallest)
    return bool((near | (found.isnan() & expected.isnan())).all())


def summing(width: int, info: torch.finfo) -> float:
    """Spacings of `info` by which sums of `width` products may differ that are made in two ways.

    A sum in float32 gathers sqrt(width) of float32's spacings, typically; twice that is allowed.
    Where the user lets float32 products be made of shorter factors, these are rounded to bfloat16
    at the shortest.
    """
    if info.eps == _FLOAT32.eps and torch.get_float32_matmul_precision() != "highest":
        return torch.finfo(torch.bfloat16).eps / info.eps
    return 2 * width**0.5 * _FLOAT32.eps / info.eps


def _effective(edit: Edit) -> Edit:
    """The edit without neurons that it leaves as they are."""
    tables = {}
    for site, (neurons, scale, shift) in edit.tables.items():
        if not (scale.isfinite() & shift.isfinite()).all():
            raise InputError(f"the edit of {site} holds values that are not finite")
        changed = (scale != 1) | (shift != 0)
        if changed.any():
            tables[site] = (neurons[changed], scale[changed], shift[changed])
    if not tables:
        raise InputError("the edit changes no neuron, so nothing would be made of it")
    return Edit(tables, edit.layout)


def calls_of(
    bare: nn.Module, modules: Mapping[str, nn.Module]
) -> dict[str, list[tuple[tuple, dict[str, Any]]]]:
    """Site -> what its module is called with when a few tokens run through the model.

    Raises:
        InputError: where they reach a module not at all.
    """
    calls: dict[str, list] = {site: [] for site in modules}

    def note(site: str):
        def hook(_module: nn.Module, args: tuple, options: dict[str, Any]) -> None:
            # Copied, because a layer may write over what it was given.
            copied = {name: _copy(value) for name, value in options.items()}
            calls[site].append((tuple(map(_copy, args)), copied))

        return hook

    ids = probe_ids(bare)
    hooks = [
        module.register_forward_pre_hook(note(site), with_kwargs=True)
        for site, module in modules.items()
    ]
    failed = None
    try:
        bare(**forward_inputs(bare, ids))
    except Exception as error:
        failed = error
    finally:
        for hook in hooks:
            hook.remove()
    for site, seen in calls.items():
        if failed is not None or not seen:
            raise refusal(
                site,
                "a probe of bare token ids does not reach it, so what a change of its weights does "
                "can't be proven;",
            ) from failed
    return calls


def _copy(value: Any) -> Any:
    return value.clone() if isinstance(value, Tensor) else value


def _proven(
    model: nn.Module, edit: Edit, ffns: list[FFN], given: Mapping[str, list]
) -> list[LinearEdit]:
    def under(placed: Edit | None) -> dict[str, list[tuple[Tensor, Tensor]]]:
        """Site -> what enters and leaves its last projection in each call."""
        if placed is None:
            return {
                ffn.site.name: [run_call(ffn, *call) for call in given[ffn.site.name]]
                for ffn in ffns
            }
        with steer(model, placed):
            return under(None)

    chosen = {site: neurons for site, (neurons, _, _) in edit.tables.items()}
    plain, edited = under(None), under(edit)
    # What one unit of activation adds to the product: up, or 1 in a plain FFN. The louder edit
    # shows what small activations hide: clamps, norms.
    unit, loud = under(activate(chosen, 1.0)), under(activate(chosen, _LOUD))
    proven = []
    for ffn in ffns:
        site = ffn.site.name
        table = edit.tables[site]
        for index, (entered, output) in enumerate(plain[site]):
            _prove_linear(ffn, entered, output)
            runs = [run[site][index][0] for run in (unit, loud, edited)]
            _prove_columns(ffn, table, entered, *runs)
        calls = tuple(
            Call(*call, entered, *under_edit)
            for call, (entered, _), under_edit in zip(
                given[site], plain[site], edited[site], strict=True
            )
        )
        proven.append(LinearEdit(ffn, *table, calls))
    return proven


def _prove_columns(
    ffn: FFN, table: tuple, entered: Tensor, unit: Tensor, loud: Tensor, edited: Tensor
) -> None:
    neurons, scale, shift = table
    others = torch.ones(ffn.site.width, dtype=torch.bool)
    others[neurons] = False
    kept = entered[..., others].nan_to_num()
    p, u = entered[..., neurons].double(), unit[..., neurons].double()
    # Scale 0 overwrites, also what is not finite.
    scaled = torch.where(scale == 0, 0.0, scale * p)
    expected = scaled + shift * u
    info = precision(ffn, entered)
    size = scaled.abs() + (shift * u).abs()
    # An activation below the normal numbers is off by a spacing of these, times what multiplies it.
    size = size + info.smallest_normal * (scale.abs() + u.abs())
    follows = (
        all(torch.equal(kept, run[..., others].nan_to_num()) for run in (unit, loud, edited))
        and close(loud[..., neurons], _LOUD * u, _LOUD * u.abs(), info)
        and close(edited[..., neurons], expected, size, info)
        and (ffn.gated or not shift.any() or bool((u == 1).all()))
    )
    if not follows:
        raise refusal(
            ffn.site.name,
            f"{type(ffn.owner).__name__} computes something between the activation and its last "
            "projection, so that the edit is no change of the weights;",
        )


def _prove_linear(ffn: FFN, entered: Tensor, output: Tensor) -> None:
    """The last projection multiplies by its weight and adds its bias, and nothing else."""
    weight, bias = dense_weight(ffn.last, ffn.site.name), ffn.last._parameters.get("bias")
    fits = weight.shape[1] == ffn.site.width and entered.dtype is weight.dtype
    if fits:
        expected = functional.linear(entered.to(weight.device), weight, bias).to("cpu")
        info = torch.finfo(weight.dtype)
        size = expected.double().nan_to_num().abs().amax() * (1 + summing(ffn.site.width, info))
        fits = close(output, expected, size.expand(expected.shape), info)
    if not fits:
        raise refusal(
            ffn.site.name,
            f"{type(ffn.last).__name__} does more than to multiply by its weight and add its bias;",
        )

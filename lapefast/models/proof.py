"""The proof that what is placed at a site computes and counts as the model's own code does."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lapefast import ops
from lapefast.errors import InputError

if TYPE_CHECKING:
    from lapefast.models.placed import SiteState, SiteStatistics


def prove(
    state: SiteState, module: nn.Module, run: Callable[[], Tensor], given: tuple, options: dict
) -> Tensor:
    """Run a replaced forward, as ``run``, beside the original on the same input; both must agree.

    Outputs bit for bit (closely where inexact kernels were asked for), counts exactly, and in a
    probe as many rows as the model's input has tokens, in their order.

    Raises:
        InputError: naming the site, where they do not.
    """
    statistics = state.statistics
    last, before = False, None
    if statistics is not None:
        last, statistics.last = statistics.last, False
        before = None if statistics.counts is None else statistics.counts.clone()
    try:
        expected, activation = _expected(state, module, given, options)
        if activation.shape[-1:] != (state.width,):
            raise InputError(
                f"{state.name}: expected activations of width {state.width}, got "
                f"{list(activation.shape)}"
            )
        if state.probe is not None:
            _check_rows(state, activation)
        actual = run()
    finally:
        if statistics is not None:
            statistics.last = last
    if not _agree(expected, actual.detach(), state.exact):
        raise InputError(
            f"{state.name}: the placed forward differs from {type(module).__name__}'s own on the "
            "same input; please report the model"
        )
    if before is not None and state.exact:
        active = activation.reshape(-1, state.width).float() > torch.tensor(
            statistics.threshold, dtype=torch.float32, device=activation.device
        )
        if not torch.equal(statistics.counts - before, _counted(active, statistics)):
            raise InputError(
                f"{state.name}: the placed counts differ from those of {type(module).__name__}'s "
                "own activations; please report the model"
            )
    state.proven, state.dtype = True, activation.dtype
    return actual


def _check_rows(state: SiteState, activation: Tensor) -> None:
    rows, tokens = activation.numel() // state.width, state.probe.numel()
    if rows != tokens:
        raise InputError(
            f"{state.name} saw {rows} rows where the model's input has {tokens} tokens, so its "
            "activations can't be assigned to tokens"
        )
    leading = activation.shape[:-1]
    if len(leading) > 1 and leading[0] not in (1, state.probe[0]):
        raise InputError(
            f"{state.name} saw rows {list(leading)} where the model's input is "
            f"{list(state.probe)}, so its rows are in another order than the tokens"
        )


@torch.no_grad()
def _expected(state: SiteState, module: nn.Module, given: tuple, options: dict):
    """The original's output with the edits made the plain way, and the edited activation."""
    seen = []

    def edited(_module: nn.Module, _args: tuple, output: Tensor) -> Tensor:
        edits = state.edits
        if edits is not None:
            output = ops.edit(
                output, None, "identity", edits.sets.tensor, *edits.tables, backend="reference"
            )
        seen.append(output)
        return output

    if state.form is None:
        return edited(module, given, state.original(module)(*given, **options)), seen[0]
    hook = getattr(module, state.form.activation).register_forward_hook(edited)
    try:
        return state.original(module)(*given, **options), seen[0]
    finally:
        hook.remove()


def _counted(active: Tensor, statistics: SiteStatistics) -> Tensor:
    counted = torch.zeros_like(statistics.counts)
    groups = statistics.groups.tensor
    if groups is None:
        groups = torch.zeros(1, dtype=torch.int32, device=active.device)
    groups = groups.reshape(-1).expand(len(active))
    kept = groups >= 0
    return counted.index_add_(0, groups[kept].long(), active[kept].long())


def _agree(expected: Tensor, actual: Tensor, exact: bool) -> bool:
    if exact:
        return torch.equal(expected.nan_to_num(), actual.nan_to_num()) and torch.equal(
            expected.isnan(), actual.isnan()
        )
    # A product off by a few roundings, summed over a row: far below what a wrong formula gives.
    scale = expected.float().abs().max().clamp_min(torch.finfo(torch.float32).tiny)
    bound = 64 * torch.finfo(expected.dtype).eps
    return bool(((expected.float() - actual.float()).abs().max() / scale) < bound)

"""The proof that what is placed at a site computes and counts as the model's own code does."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from lapefast import ops
from lapefast.errors import InputError

if TYPE_CHECKING:
    from lapefast.models.placed import SiteState, SiteStatistics
    from lapefast.models.routing import Rows


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
        shape = state.input_shape()
        if shape is not None:
            _check_rows(state, activation, shape)
        if state.probe is not None:
            _check_order(state, activation)
        actual = run()
    finally:
        if statistics is not None:
            statistics.last = last
    if not _agree(expected, actual.detach(), state.exact):
        raise _differs(state, type(module).__name__)
    if before is not None and state.exact:
        active = _active(activation.reshape(-1, state.width), statistics)
        if not torch.equal(statistics.counts - before, _counted(active, statistics)):
            raise _miscounts(state, type(module).__name__)
    state.proven, state.dtype = True, activation.dtype
    return actual


class MixtureProof:
    """The same of a mixture, whose own forward runs before the placed one.

    Raises:
        InputError: here or in `check`, naming the site, where they do not agree, or rows are not
            of the experts and tokens that they were taken for.
    """

    def __init__(
        self,
        state: SiteState,
        module: nn.Module,
        given: tuple[Tensor, ...],
        rows: Sequence[Rows],
    ) -> None:
        self._state, self._class = state, type(module).__name__
        statistics = state.statistics
        counts = None if statistics is None else statistics.counts
        self._before = None if counts is None else counts.clone()
        self._counted = None if counts is None else torch.zeros_like(counts)
        seen: list[Tensor] = []

        def see(activation: Tensor) -> Tensor:
            flat = activation.reshape(-1, activation.shape[-1])
            if len(seen) == len(rows) or flat.shape != (len(rows[len(seen)].tokens), state.width):
                raise InputError(
                    f"{state.name} applied its gate to rows {list(activation.shape)} that were not "
                    "routed so"
                )
            state.route(rows[len(seen)].routed, rows[len(seen)].tokens)
            seen.append(activation)
            edited = _edited(state, activation)
            if self._counted is not None:
                active = _active(edited.reshape(flat.shape), statistics)
                self._counted += _counted(active, statistics)
            return edited

        self._expected = _watched(state, module, given, see)
        # Where no choice is given, the source of the forward says which expert a row is of; the
        # order of tokens is the caller's, as in any FFN.
        if len(seen) == len(rows) and len(given) > 1:
            _check_owners(state, module, given, rows, seen)

    def check(self, output: Tensor) -> None:
        """Compare what the placed forward returned and counted."""
        if not _agree(self._expected, output.detach(), self._state.exact):
            raise _differs(self._state, self._class)
        if self._before is not None and self._state.exact:
            if not torch.equal(self._state.statistics.counts - self._before, self._counted):
                raise _miscounts(self._state, self._class)


_SOME = 4  # tokens whose rows are looked at one by one: each costs a forward per chosen expert


def _check_owners(
    state: SiteState,
    module: nn.Module,
    given: tuple[Tensor, ...],
    rows: Sequence[Rows],
    seen: list[Tensor],
) -> None:
    """Each row must be nearest to what its token gives at its expert, run alone.

    Of a few tokens. Another row may be as near only by what the dtype's rounding can move.
    """
    chosen = given[1]
    if bool((chosen.sort(dim=1).values.diff(dim=1) == 0).any()):
        raise InputError(
            f"{state.name} routes a token to an expert twice, so its tokens can't be counted"
        )
    some = torch.linspace(0, len(chosen) - 1, _SOME, device=chosen.device).long().unique()
    alone: list[Tensor] = []
    for token in some.tolist():
        for rank in range(chosen.shape[1]):
            hidden, *routed = (one[token : token + 1] for one in given)
            routed = [one[:, rank : rank + 1] for one in routed]
            _watched(state, module, (hidden, *routed), lambda own: alone.append(own) or own)
    expected = torch.cat(alone).double()
    experts = torch.cat([one.experts for one in rows])
    tokens = torch.cat([one.tokens for one in rows])
    is_one = (tokens[:, None] == some.repeat_interleave(chosen.shape[1])) & (
        experts[:, None] == chosen[some].reshape(-1)
    )
    looked_at, place = is_one.nonzero(as_tuple=True)
    actual = torch.cat(seen)[looked_at].double()
    distances = torch.cdist(actual, expected, compute_mode="donot_use_mm_for_euclid_dist")
    claimed = distances.gather(1, place[:, None]).squeeze(1)
    # The row is rounded once in its dtype, and its sums in float32 go with their length's root.
    summed = given[0].shape[-1] ** 0.5 * torch.finfo(torch.float32).eps
    bound = 4 * (torch.finfo(seen[0].dtype).eps + summed) * expected[place].norm(dim=1)
    wrong = claimed > distances.amin(1) + bound
    if len(looked_at) != len(expected) or bool(wrong.any()):
        raise InputError(
            f"{state.name}: the rows of {type(module).__name__} are in another order than "
            "transformers' experts have them, so they can't be told apart; please report the model"
        )


@torch.no_grad()
def _watched(
    state: SiteState, module: nn.Module, given: tuple[Tensor, ...], see: Callable[[Tensor], Tensor]
) -> Tensor:
    """The output of the module's own forward, its activations taken through `see`."""
    state.routing.see = see
    try:
        return module.forward(*given)
    finally:
        state.routing.see = None


def _differs(state: SiteState, owner: str) -> InputError:
    return InputError(
        f"{state.name}: the placed forward differs from {owner}'s own on the same input; please "
        "report the model"
    )


def _miscounts(state: SiteState, owner: str) -> InputError:
    return InputError(
        f"{state.name}: the placed counts differ from those of {owner}'s own activations; please "
        "report the model"
    )


def _check_rows(state: SiteState, activation: Tensor, shape: tuple[int, int]) -> None:
    rows, (batch, length) = activation.numel() // state.width, shape
    if rows != batch * length:
        raise InputError(
            f"{state.name} saw {rows} rows where the model's input has {batch * length} tokens, so "
            "its activations can't be assigned to tokens"
        )
    leading = activation.shape[:-1]
    if len(leading) > 1 and leading[0] not in (1, batch):
        raise _reordered(state, f"rows {list(leading)} where the model's input is {list(shape)}")


def _check_order(state: SiteState, activation: Tensor) -> None:
    """The probe's first two sequences are alike, so their rows must be, and no others."""
    first, second, *_, other = activation.detach().reshape(*state.probe, state.width)
    if torch.equal(first, second):
        return
    first, second, other = (one.float().nan_to_num() for one in (first, second, other))
    apart, unlike = (first - other).abs().mean(), (first - second).abs().mean()
    # A product of matrices may round a row by where it stands; that is far below.
    rounding = torch.finfo(activation.dtype).eps * first.abs().mean()
    if bool(unlike > (0.1 * apart).maximum(rounding)):
        raise _reordered(state, "other rows than the model's input has in its sequences")


def _reordered(state: SiteState, saw: str) -> InputError:
    return InputError(f"{state.name} saw {saw}, so its rows are in another order than the tokens")


@torch.no_grad()
def _expected(state: SiteState, module: nn.Module, given: tuple, options: dict):
    """The original's output with the edits made the plain way, and the edited activation."""
    seen = []

    def edited(_module: nn.Module, args: tuple, output: Tensor) -> Tensor:
        if not isinstance(output, Tensor):
            raise InputError(
                f"{state.name}: its activation module returns a {type(output).__name__} and no "
                "tensor; lapefast can't handle this model"
            )
        if len(args) != 1 or output.shape != args[0].shape:
            raise InputError(
                f"{state.name}: its activation module ({type(_module).__name__}) takes more than "
                "the gate, so what it returns is not the activation; lapefast can't handle this "
                "model"
            )
        output = _edited(state, output)
        seen.append(output)
        return output

    if state.gate is not None or (state.form is not None and state.form.function is not None):
        return _composed(state, module, *given)
    if state.form is None:
        if getattr(module, "inplace", False):  # what it writes over is to be read once more
            given = tuple(map(_copied, given))
        return edited(module, given, state.original(module)(*given, **options)), seen[0]
    hook = getattr(module, state.form.activation).register_forward_hook(edited)
    try:
        return state.original(module)(*given, **options), seen[0]
    finally:
        hook.remove()


def _copied(given: Tensor) -> Tensor:
    """A copy of the same strides, by which torch's own arithmetic may differ."""
    return torch.empty_strided(
        given.shape, given.stride(), dtype=given.dtype, device=given.device
    ).copy_(given)


def _composed(state: SiteState, module: nn.Module, x: Tensor) -> tuple[Tensor, Tensor]:
    """The same where the activation is a function, which no hook sees: step by step.

    Raises:
        InputError: where the steps give something else than the original does.
    """
    form, modules = state.form, module._modules
    if state.gate is not None:
        activation, factor = state.gate.parts(module, module.gate_up_proj(x))
        down = module.down_proj
    else:
        gate = modules[form.gate](x)
        gate, factor = gate.chunk(2, dim=-1) if form.up is None else (gate, modules[form.up](x))
        activation, down = form.function(gate), modules[form.down]
    if not _agree(state.original(module)(x), down(activation * factor), exact=True):
        raise _differs(state, type(module).__name__)
    edited = _edited(state, activation)
    return down(edited * factor), edited


def _edited(state: SiteState, activation: Tensor) -> Tensor:
    """The activation edited the plain way, where anything edits it."""
    edits = state.edits
    if edits is None:
        return activation
    return ops.edit(
        activation, None, "identity", edits.sets.tensor, *edits.tables.tensors, backend="reference"
    )


def _active(activation: Tensor, statistics: SiteStatistics) -> Tensor:
    return activation.float() > torch.tensor(
        statistics.threshold, dtype=torch.float32, device=activation.device
    )


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

"""Edits folded into a model's weights, and taken out again bit for bit."""

from __future__ import annotations

import weakref
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lapefast.errors import InputError
from lapefast.models.bare import bare_model, unwrap
from lapefast.models.structure import find_ffns
from lapefast.neurons import Edit
from lapefast.steering.linear import (
    LinearEdit,
    close,
    dense_weight,
    effective_edit,
    linear_edits,
    precision,
    probing,
    refusal,
    run_call,
    summing,
)
from lapefast.steering.output_edits import OutputEdit, output_edits
from lapefast.steering.preimage import preimages

__all__ = ["Fold", "fold", "refuse_folded"]


def fold(model: nn.Module, edit: Edit) -> Fold:
    """Change the model's weights so that it computes what it computes under `lf.steer`.

    Where an edit can be weights, it costs nothing while the model runs:

    | edit | gated FFN, `down(act(gate(x)) * up(x))` | plain FFN, `fc2(act(fc1(x)))` |
    |---|---|---|
    | deactivate, scale | columns of `down` | columns of `fc2` |
    | activate to v | the gate's bias, if it has one and the activation reaches v | bias of `fc2` |
    | add v, or scale and add | refused | columns and bias of `fc2` |

    Outputs of a linear layer are its rows and its bias: any edit of them can be folded, but for one
    of an FFN whose neurons are edited too; a layer (an `nn.Linear`) without a bias may get one.

    Folding is algebraically exact. In float32 outputs agree with those under `lf.steer` within
    1e-5, relative; in half precision within what one rounding of each folded weight makes. An
    activation that is not finite is not hidden by it, as by an edit: 0 * inf is NaN. A plain FFN
    whose last projection (an `nn.Linear`) has no bias may get one.

    Each FFN is proven on a few tokens before its weights are touched and after. While folded, the
    model has another fingerprint, and no second fold: undo the first, or join the edits by ``|``.
    A fold whose handle is gone can't be undone; the model then counts as one of these weights.

    Args:
        model: any whose FFNs `lapefast.models.find_sites` finds, with dense weights on hand and
            nothing placed in it.
        edit: made by `lapefast.deactivate`, `activate`, `scale` or `add`, and joined by ``|``.

    Returns:
        A context manager; leaving it, or `undo()`, puts back the weights, bit for bit.

    Raises:
        InputError: the edit does not fit the model or changes nothing; the model is folded or
            steered already; or the edit can't be weights of this model: the message names the site
            and, where that helps, `lf.steer`. Whatever is raised, nothing stays folded.
    """
    return Fold(model, edit)


class Fold:
    """See `fold`."""

    def __init__(self, model: nn.Module, edit: Edit) -> None:
        self._kept: list[_Kept] = []
        self._name = repr(edit)
        refuse_folded(model)
        edit = effective_edit(model, edit)
        plans, outputs = linear_edits(model, edit), output_edits(model, edit)
        _refuse_inside(plans, outputs)
        changes = [change for plan in plans for change in _changes(plan)]
        changes += [change for plan in outputs for change in _row_changes(plan)]
        changes = _once_each(model, changes)
        try:
            for change in changes:
                self._make(change)
            with probing(bare_model(model)):
                for plan in plans:
                    _check(plan)
                for plan in outputs:
                    plan.check()
            # A model is folded if any of its FFNs is; edits of other layers stand for the first.
            folded = [plan.ffn for plan in plans] or find_ffns(model, mixtures=True)[:1]
            for last in [ffn.last for ffn in folded]:
                _FOLDED[last] = weakref.ref(self)
        except BaseException:
            self.undo()
            raise

    def __enter__(self) -> Fold:
        return self

    def __exit__(self, *exception: object) -> None:
        self.undo()

    def undo(self) -> None:
        """Put back the weights as they were. Safe to repeat.

        Raises:
            InputError: where somebody has put other parameters in the place of the folded ones;
                these are left, and all others put back.
        """
        replaced = set()
        while self._kept:
            kept = self._kept[-1]
            if not kept.restore():
                replaced.add(kept.change.site)
            self._kept.pop()
        for last, holder in list(_FOLDED.items()):
            if holder() is self:
                del _FOLDED[last]
        if replaced:
            raise InputError(
                f"the weights of {', '.join(sorted(replaced))} were replaced by other parameters "
                "after the fold, so they are left as they are"
            )

    def _make(self, change: _Change) -> None:
        parameter = change.module._parameters[change.name]
        if parameter is None:
            new = nn.Parameter(change.values, change.module.weight.requires_grad)
            self._kept.append(_Kept(change, new, None))
            change.module._parameters[change.name] = new
            return
        before = change.place().index_select(change.dim, change.index)
        # Kept before it is written, so that an interrupt in between undoes both.
        self._kept.append(_Kept(change, parameter, before))
        change.write(change.values)


def refuse_folded(model: nn.Module) -> None:
    """Raises InputError, naming the fold, where an FFN of the model is folded already."""
    for ffn in find_ffns(model, mixtures=True):
        holder = _FOLDED.get(ffn.last, lambda: None)()
        if holder is not None:
            raise InputError(
                f"an edit is already folded into this {type(bare_model(model)).__name__} "
                f"({holder._name}); undo it first, or join both by | and fold them at once"
            )


_FOLDED: weakref.WeakKeyDictionary[nn.Module, weakref.ref[Fold]] = weakref.WeakKeyDictionary()
"""Last projection -> the fold that holds it, as long as somebody holds the fold."""


@dataclass(frozen=True)
class _Change:
    """New values of some rows or columns of one parameter.

    Attributes:
        site: the FFN's.
        module, name: whose parameter, "weight" or "bias"; it is made where there is none.
        dim: of the weight as [out, in], or of the bias.
        index: int64 [n], on the parameter's device.
        values: in the parameter's dtype, on its device.
    """

    site: str
    module: nn.Module
    name: str
    dim: int
    index: Tensor
    values: Tensor

    def place(self) -> Tensor:
        """The parameter as it is now, to be written to; a weight as [out, in]."""
        if self.name == "weight":
            return dense_weight(self.module, self.site)
        return self.module._parameters[self.name].detach()

    def write(self, values: Tensor) -> None:
        place = self.place()
        place.index_copy_(self.dim, self.index.to(place.device), values.to(place))


@dataclass(frozen=True)
class _Kept:
    """A change that was made, and what undoes it.

    Attributes:
        change: the change.
        parameter: the module's now.
        before: the values that were there; None where there was no parameter.
    """

    change: _Change
    parameter: nn.Parameter
    before: Tensor | None

    def restore(self) -> bool:
        """Put it back; False, and nothing done, where the parameter is another now."""
        parameters = self.change.module._parameters
        if parameters.get(self.change.name) is not self.parameter:
            # Not yet placed, where an interrupt came between keeping and placing a new bias.
            return self.before is None and parameters.get(self.change.name) is None
        if self.before is None:
            parameters[self.change.name] = None
        else:
            self.change.write(self.before)
        return True


def _changes(plan: LinearEdit) -> list[_Change]:
    """What the edit of one FFN does to its weights."""
    site, last = plan.ffn.site.name, plan.ffn.last
    weight = dense_weight(last, site)
    shifted, changes = plan.shift != 0, []
    columns = plan.scale != 1
    if shifted.any() and plan.ffn.gated:
        added = shifted & (plan.scale != 0)
        if added.any():
            raise refusal(
                site,
                f"adding to an activation that is multiplied afterwards (neuron "
                f"{int(plan.neurons[added][0])}) is no change of the weights;",
            )
        changes += _gate_bias(plan, shifted)
        # The gate's bias sets the activation; the product keeps its column.
        columns &= ~shifted
    elif shifted.any():
        picked = weight[:, plan.neurons.to(weight.device)].cpu().double()
        bias = last._parameters.get("bias")
        before = torch.zeros(len(weight)) if bias is None else bias.detach().cpu()
        like = weight if bias is None else bias.detach()
        after = before.double() + picked @ plan.shift.double()
        every = torch.arange(len(weight), device=weight.device)
        changes.append(_Change(site, last, "bias", 0, every, _rounded(after, before, like, site)))
    if columns.any():
        index = plan.neurons[columns].to(weight.device)
        before, scale = weight[:, index], plan.scale[columns].to(weight.device)
        after = torch.where(scale == 0, 0.0, before.float() * scale)
        changes.append(
            _Change(site, last, "weight", 1, index, _rounded(after, before, weight, site))
        )
    return changes


def _refuse_inside(plans: list[LinearEdit], outputs: list[OutputEdit]) -> None:
    """A module's FFN and its linear layers aren't edited at once: one changes what others read."""
    for plan in plans:
        inside = set(plan.ffn.owner.modules())
        for output in outputs:
            if output.layer in inside:
                raise refusal(
                    plan.ffn.site.name,
                    f"its neurons and outputs of its own {output.site} can't be folded at once;",
                )


def _row_changes(plan: OutputEdit) -> list[_Change]:
    """What the edit of one linear layer's outputs does to its weights: y = W x + b, row by row."""
    site, layer = plan.site, plan.layer
    weight, bias = dense_weight(layer, site), layer._parameters.get("bias")
    index = plan.neurons.to(weight.device)
    scale, shift = plan.scale.to(weight.device), plan.shift.to(weight.device)
    before, changes = weight[index], []
    if (scale != 1).any():
        after = torch.where(scale[:, None] == 0, 0.0, before.float() * scale[:, None])
        changes.append(
            _Change(site, layer, "weight", 0, index, _rounded(after, before, weight, site))
        )
    if bias is not None:
        held = bias.detach()[index.to(bias.device)]
        after = torch.where(scale == 0, shift, held.float() * scale + shift)
        changes.append(_Change(site, layer, "bias", 0, index, _rounded(after, held, held, site)))
    elif shift.any():
        every = torch.arange(len(weight), device=weight.device)
        whole = torch.zeros(len(weight), device=weight.device).index_copy_(0, index, shift)
        changes.append(_Change(site, layer, "bias", 0, every, _rounded(whole, whole, weight, site)))
    return changes


def _gate_bias(plan: LinearEdit, activated: Tensor) -> list[_Change]:
    """A gate that is its bias alone, whatever the input, so that the activation is the value."""
    ffn, site = plan.ffn, plan.ffn.site.name
    gate = ffn.owner._modules.get(ffn.forward.gate) if ffn.forward else None
    weight = None if gate is None else dense_weight(gate, site)
    bias = None if gate is None else gate._parameters.get("bias")
    if bias is None:
        raise refusal(
            site, "activating needs a gate with a bias, as of Llama with mlp_bias, to be weights;"
        )
    neurons, values = plan.neurons[activated], plan.shift[activated]
    found, reached = preimages(ffn.activation, values, bias.dtype, bias.device)
    if not reached.all():
        at = int((~reached).nonzero()[0])
        raise refusal(
            site,
            f"no gate makes the activation of neuron {int(neurons[at])} be {values[at]:.6g} "
            f"({type(ffn.activation).__name__} in {bias.dtype});",
        )
    # Where gate and up are one tensor, the gate's rows come first.
    index = neurons.to(weight.device)
    return [
        _Change(site, gate, "weight", 0, index, torch.zeros_like(weight[index])),
        _Change(site, gate, "bias", 0, index, found),
    ]


def _rounded(after: Tensor, before: Tensor, like: Tensor, site: str) -> Tensor:
    values = after.to(like)
    if (~values.isfinite() & before.isfinite().to(values.device)).any():
        raise refusal(site, f"the folded weights leave the range of {like.dtype};")
    return values


def _once_each(model: nn.Module, changes: list[_Change]) -> list[_Change]:
    """The changes without repetitions, of parameters that no module shares which keeps its own.

    Modules of Zamba2 hold one weight in several FFNs: folding into it changes all of them.
    """
    first: dict[tuple[int, int], _Change] = {}
    covered: dict[int, set[nn.Module]] = {}
    for change in changes:
        parameter = change.module._parameters[change.name]
        # A bias that is made here is its module's own.
        key = id(change.module) if parameter is None else id(parameter)
        covered.setdefault(key, set()).add(change.module)
        other = first.setdefault((key, change.dim), change)
        if not (
            torch.equal(other.index, change.index) and torch.equal(other.values, change.values)
        ):
            raise _shared(change.site)
    for module in unwrap(model).modules():
        for parameter in module._parameters.values():
            users = covered.get(id(parameter))
            if users is not None and module not in users:
                site = next(one.site for (key, _), one in first.items() if key == id(parameter))
                raise _shared(site)
    return list(first.values())


def _shared(site: str) -> InputError:
    return refusal(
        site, "its weights are another module's too, which the edit leaves or changes otherwise;"
    )


def _check(plan: LinearEdit) -> None:
    """The folded FFN gives what the edited one gave, within the roundings of its weights.

    Every factor of an output, W_ij and p_j, was rounded a few times by half a spacing at most (by
    two, where a bias makes the activation), so outputs differ by at most 8 spacings of
    sum_j |W_ij p_j|, which is at most |W_i| |p| (Cauchy-Schwarz), and by those of the sums. p is
    taken before a shift and after it, as one may cancel the other.
    """
    ffn, site = plan.ffn, plan.ffn.site.name
    weight, bias = dense_weight(ffn.last, site), ffn.last._parameters.get("bias")
    rows = torch.linalg.vector_norm(weight, dim=1, dtype=torch.float32).cpu().double()
    # Weights below the normal numbers are rounded by spacings of these.
    rows += torch.finfo(weight.dtype).smallest_normal * len(plan.neurons) ** 0.5
    for call in plan.calls:
        entered, output = run_call(ffn, call.args, call.options)
        info = precision(ffn, entered)
        scaled = call.entered.double()
        scaled[..., plan.neurons] *= plan.scale
        p = torch.cat([scaled, call.edited.double()], -1).nan_to_num()
        size = torch.linalg.vector_norm(p, dim=-1, keepdim=True) * rows
        size = size + (0 if bias is None else bias.detach().abs().cpu().double())
        size = size + call.output.double().nan_to_num().abs()
        if not close(output, call.output, (2 + summing(ffn.site.width, info)) * size, info):
            raise refusal(site, "its folded weights do not give what the edit gives;")

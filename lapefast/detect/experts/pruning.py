"""Which experts to prune for a target label (arXiv 2402.16367): those that its text does without.

Pruned experts are neuron sets to deactivate: `lapefast.steer(model, lapefast.deactivate(pruned))`,
or folded into the weights by `lapefast.fold`.
"""

from __future__ import annotations

from numbers import Real
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from lapefast.detect.experts.result import Experts
from lapefast.errors import InputError
from lapefast.neurons import NeuronSets

__all__ = ["prune", "pruned_experts", "random_experts_like"]


def prune(
    experts: Experts, label: str, rate: float, form: Literal["frequency", "layers"] = "frequency"
) -> NeuronSets:
    """The neurons of the experts that `pruned_experts` chooses, as sets of that one label.

    Raises:
        InputError: as `pruned_experts`.
    """
    neurons = experts.members(pruned_experts(experts, label, rate, form))
    about = experts.about({"pruning": form, "rate": rate}) | {"part": "pruned"}
    return NeuronSets({label: neurons}, experts.layout, about)


def pruned_experts(
    experts: Experts, label: str, rate: float, form: Literal["frequency", "layers"] = "frequency"
) -> Tensor:
    """The experts to prune for a label, bool [layers, experts]; round(rate * n) of all n.

    Args:
        experts: with the label's frequencies.
        label: the target, whose text is to be kept.
        rate: share of all experts that is pruned, over 0 and below 1.
        form: "frequency": the least used experts of the whole model; a layer may lose more than
            another, even all of its experts. "layers": a layer keeps experts in proportion to its
            activation level (how many of its experts a token of the label chooses on average), at
            most all; rounded by largest remainder, so that the total is exact; in each layer the
            least used go first. Ties go to the lower layer, then to the lower expert.

    Raises:
        InputError: there is no such label, the rate is out of range, or the form is unknown.
    """
    frequency = experts.of_label(label).numpy()
    if not (isinstance(rate, Real) and 0 < rate < 1):
        raise InputError(f"rate must be over 0 and below 1, got {rate!r}")
    count = round(rate * frequency.size)
    if form == "frequency":
        return torch.from_numpy(_least(frequency.ravel(), count).reshape(frequency.shape))
    if form != "layers":
        raise InputError(f"form must be 'frequency' or 'layers', got {form!r}")
    kept = _portions(frequency.size - count, frequency.sum(1), frequency.shape[1])
    pruned = [_least(of, len(of) - keep) for of, keep in zip(frequency, kept, strict=True)]
    return torch.from_numpy(np.stack(pruned))


def random_experts_like(pruned: Tensor, generator: torch.Generator) -> Tensor:
    """As many experts in each layer, drawn from all of the layer's; bool [layers, experts]."""
    drawn = torch.zeros_like(pruned)
    for of_layer, count in zip(drawn, pruned.sum(1).tolist(), strict=True):
        of_layer[torch.randperm(len(of_layer), generator=generator)[:count]] = True
    return drawn


def _least(values: np.ndarray, count: int) -> np.ndarray:
    """Whether each of some values is among the ``count`` least, ties by index."""
    least = np.zeros(len(values), dtype=bool)
    least[np.argsort(values, kind="stable")[:count]] = True
    return least


def _portions(total: int, levels: np.ndarray, most: int) -> list[int]:
    """A total in portions proportional to the levels, at most ``most`` each.

    What a full portion can't take goes to the others in proportion, and equally among those whose
    levels are all 0. Rounded by largest remainder, ties by index.
    """
    portions = np.full(len(levels), float(most))
    open_ = np.ones(len(levels), dtype=bool)
    while open_.any():
        weights = levels[open_] if levels[open_].any() else np.ones(open_.sum())
        left = total - most * (~open_).sum()
        portions[open_] = left * weights / weights.sum()
        if not (over := open_ & (portions > most)).any():
            break
        portions[over] = most
        open_ &= ~over
    whole = np.floor(portions)
    short = total - int(whole.sum())
    whole[np.argsort(whole - portions, kind="stable")[:short]] += 1
    return whole.astype(int).tolist()

"""LAPE: language activation probability entropy (Tang et al., ACL 2024, arXiv 2402.16438)."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch

from lapefast.errors import InputError
from lapefast.neurons.layout import Key, Layout
from lapefast.neurons.sets import NeuronSets
from lapefast.profiles import Over, Profile

__all__ = ["Criteria", "check_rates", "criteria", "lape"]

logger = logging.getLogger(__name__)


def lape(
    profile: Profile,
    top_rate: float = 0.01,
    filter_rate: float = 0.95,
    activation_bar_ratio: float = 0.95,
    form: Literal["paper", "released"] = "paper",
    over: Over = "routed",
) -> NeuronSets:
    """The neurons that are active for few labels only.

    With p the share of a label's tokens at which a neuron is active, N neurons and K labels:

    1. v is the k-th smallest of the N*K values of p, k = round(filter_rate * N*K).
    2. A neuron without a p > v is out.
    3. Of the others the round(top_rate * N) of lowest entropy of q = p / sum(p) remain.
    4. With a bar found like v, but by `activation_bar_ratio`, a remaining neuron belongs to every
       label with p > bar.

    Args:
        profile: counts of at least two labels.
        top_rate: share of all neurons that remain, over 0 and at most 1; likewise the others.
        filter_rate: share of all probabilities that are too small to keep a neuron.
        activation_bar_ratio: share of all probabilities that are too small to belong to a label.
        form: "paper" computes in float64 and breaks ties by (entropy, layer, index). "released"
            follows the released code: float32, in which counts above 2^24 are rounded and ties
            arise, and ties as `torch.topk` leaves them.
        over: of a mixture of experts, whether p is a share of the tokens "routed" to the neuron's
            expert (0 where there are none), or of "all" the label's tokens.

    Returns:
        Sets for every label of the profile, in its order, empty ones included. Where fewer
        neurons qualify at step 2 than are asked for, that is logged and stands in
        `metadata["notes"]`.

    Raises:
        InputError: fewer than two labels, a label without tokens, no counts, a rate out of range,
            or an unknown form or over.
    """
    rates = {
        "top_rate": top_rate,
        "filter_rate": filter_rate,
        "activation_bar_ratio": activation_bar_ratio,
    }
    probabilities, least, bar, qualifies, chosen = _select(profile, form, over=over, **rates)
    belongs = probabilities[:, chosen] > bar

    notes = []
    asked = _asked(top_rate, probabilities)
    if (found := int(qualifies.sum())) < asked:
        notes.append(
            f"{asked} neurons were asked for (top_rate {top_rate}), but only {found} are active "
            f"often enough for some label (filter_rate {filter_rate})"
        )
        logger.warning("LAPE: %s", notes[0])
    parameters = {"form": form, **rates} | ({"over": over} if profile.routed else {})
    metadata = {"method": "lape", "parameters": parameters, "notes": notes}
    neurons = {
        label: _by_site(chosen[row], profile)
        for label, row in zip(profile.labels, belongs, strict=True)
    }
    return NeuronSets(neurons, _layout(profile), metadata)


@dataclass(frozen=True)
class Criteria:
    """What `lape` decides by; see there for the words.

    Attributes:
        probabilities: p, [labels, neurons of all sites in order].
        entropy: [neurons], NaN of a neuron that is never active.
        qualifies: bool [neurons], whether some p > v.
        least: v.
        bar: of belonging to a label.
        cut: the highest entropy of a qualifying neuron that remains; None where none does.
    """

    probabilities: np.ndarray
    entropy: np.ndarray
    qualifies: np.ndarray
    least: float
    bar: float
    cut: float | None


def criteria(
    profile: Profile,
    top_rate: float = 0.01,
    filter_rate: float = 0.95,
    activation_bar_ratio: float = 0.95,
    form: Literal["paper", "released"] = "paper",
    over: Over = "routed",
) -> Criteria:
    """The distributions and thresholds by which `lape` decides, given the same arguments.

    Raises:
        InputError: see `lape`.
    """
    probabilities, least, bar, qualifies, chosen = _select(
        profile, form, top_rate, filter_rate, activation_bar_ratio, over
    )
    values = probabilities.numpy()
    active = (values > 0).any(axis=0)
    entropy = np.full(values.shape[1], np.nan, values.dtype)
    entropy[active] = _entropy(values[:, active])
    # The released form pads with neurons that do not qualify where too few do.
    remaining = chosen[qualifies[chosen]].numpy()
    cut = float(entropy[remaining].max()) if len(remaining) else None
    return Criteria(values, entropy, qualifies.numpy(), least, bar, cut)


def check_rates(top_rate: float, filter_rate: float, activation_bar_ratio: float) -> None:
    """Raises InputError unless each is over 0 and at most 1, which needs no profile to tell."""
    rates = {
        "top_rate": top_rate,
        "filter_rate": filter_rate,
        "activation_bar_ratio": activation_bar_ratio,
    }
    for name, rate in rates.items():
        if not 0 < rate <= 1:
            raise InputError(f"{name} must be over 0 and at most 1, got {rate}")


def _select(
    profile: Profile,
    form: Literal["paper", "released"],
    top_rate: float,
    filter_rate: float,
    activation_bar_ratio: float,
    over: Over,
) -> tuple[torch.Tensor, float, float, torch.Tensor, torch.Tensor]:
    """Probabilities, v, bar, which neurons qualify, and the sorted flat indices of those chosen."""
    if len(profile.labels) < 2:
        raise InputError(
            "LAPE compares labels and needs at least two, but the profile has only "
            f"{profile.labels[0]!r}; add a profile of another label to it"
        )
    check_rates(top_rate, filter_rate, activation_bar_ratio)
    if form not in ("paper", "released"):
        raise InputError(f"form must be 'paper' or 'released', got {form!r}")

    dtype = torch.float64 if form == "paper" else torch.float32
    probabilities = _probabilities(profile, dtype, over)
    least = _kth_smallest(probabilities, filter_rate, "filter_rate")
    bar = least
    if activation_bar_ratio != filter_rate:
        bar = _kth_smallest(probabilities, activation_bar_ratio, "activation_bar_ratio")
    qualifies = (probabilities > least).any(dim=0)
    select = _lowest if form == "paper" else _lowest_as_released
    chosen = select(probabilities, qualifies, _asked(top_rate, probabilities))
    return probabilities, least, bar, qualifies, chosen


def _asked(top_rate: float, probabilities: torch.Tensor) -> int:
    return round(top_rate * probabilities.shape[1])


def _probabilities(profile: Profile, dtype: torch.dtype, over: Over) -> torch.Tensor:
    """[labels, neurons of all sites in order]; the counts are converted first, then divided."""
    counts = profile.counts
    widths = [site.neurons for site in profile.site_info]
    probabilities = torch.empty(len(profile.labels), sum(widths), dtype=dtype)
    # Filled in place: joining a copy of each site takes several times longer.
    for site, part in zip(profile.sites, probabilities.split(widths, dim=1), strict=True):
        tokens = profile.site_tokens(site)
        if not tokens.all():
            label = profile.labels[int((tokens == 0).nonzero()[0])]
            raise InputError(f"the profile has no tokens of label {label!r}; add some text of it")
        # An expert that no token reached was active at none of them: 0 / 1.
        seen = profile.seen_tokens(site, over).clamp(min=1)[..., None]
        part.unflatten(1, counts[site].shape[1:]).copy_(counts[site]).div_(seen.to(dtype))
    return probabilities


def _kth_smallest(probabilities: torch.Tensor, rate: float, name: str) -> float:
    """The round(rate * n)-th smallest of n values, counted from 1."""
    values = probabilities.numpy().ravel()
    k = round(rate * values.size)
    if k == 0:
        raise InputError(
            f"{name} {rate} of {values.size} probabilities is none of them; choose a higher one"
        )
    return float(np.partition(values, k - 1)[k - 1])


def _lowest(probabilities: torch.Tensor, qualifies: torch.Tensor, asked: int) -> torch.Tensor:
    """The qualifying neurons of lowest entropy, ties by index; sorted flat indices."""
    candidates = qualifies.nonzero().squeeze(1)
    entropy = _entropy(probabilities[:, candidates].numpy())
    if asked == 0:
        return candidates[:0]
    if asked < len(entropy):
        cut = np.partition(entropy, asked - 1)[asked - 1]
        kept = entropy < cut
        ties = np.flatnonzero(entropy == cut)
        kept[ties[: asked - kept.sum()]] = True
        candidates = candidates[torch.from_numpy(kept)]
    return candidates


def _entropy(probabilities: np.ndarray) -> np.ndarray:
    """Entropy over labels, natural logarithm, of columns that are not all 0.

    Added label by label, in their order: a library's sum along the labels may take them in an
    order that depends on the machine's vectors, and with it the last bit of the entropy, and with
    that what is a tie.
    """
    total = np.zeros_like(probabilities[0])
    for row in probabilities:
        total += row
    entropy = np.zeros_like(total)
    for row in probabilities:
        q = row / total
        entropy -= q * np.log(np.where(q > 0, q, 1.0))
    return entropy


def _lowest_as_released(
    probabilities: torch.Tensor, qualifies: torch.Tensor, asked: int
) -> torch.Tensor:
    """What the released code selects; sorted flat indices.

    The same operations in its memory layout, [neurons, labels], since the order in which torch
    adds decides the last bit, and with it the ties.
    """
    by_neuron = probabilities.T.contiguous()
    q = by_neuron / by_neuron.sum(dim=-1, keepdim=True)
    q[torch.isnan(q)] = 0
    logarithms = torch.where(q > 0, q.log(), 0)
    entropy = -torch.sum(q * logarithms, dim=-1)
    entropy[~qualifies] = torch.inf
    return entropy.topk(asked, largest=False).indices.sort().values


def _by_site(neurons: torch.Tensor, profile: Profile) -> dict[Key, torch.Tensor]:
    """Flat, sorted indices as indices within each site."""
    widths = [site.neurons for site in profile.site_info]
    ends = torch.tensor(widths).cumsum(0)
    counts = torch.searchsorted(neurons, ends).diff(prepend=torch.tensor([0]))
    parts = neurons.split(counts.tolist())
    return {
        site: part - (end - width)
        for site, part, end, width in zip(
            _layout(profile).sites, parts, ends.tolist(), widths, strict=True
        )
    }


def _layout(profile: Profile) -> Layout:
    widths = [site.neurons for site in profile.site_info]
    sites = tuple(range(len(widths))) if profile.positional else tuple(profile.sites)
    named = dict(zip(sites, widths, strict=True))
    experts = {
        name: site.experts
        for name, site in zip(sites, profile.site_info, strict=True)
        if site.experts
    }
    return Layout(sites, named, profile.fingerprint, profile.metadata.get("model"), experts)

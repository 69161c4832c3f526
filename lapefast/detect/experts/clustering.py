"""Size-constrained k-means: Lloyd's steps whose assignment to clusters of equal size is an auction.

The published method (arXiv 2402.16367) takes a min-cost flow, which is exact. On 11,008 rows of
4,096 and 256 clusters, 10 steps of its library (k-means-constrained 0.9.1) took 78 s on two cores,
and these take 3.5 s, with a sum of squares that is 0.1% higher; and the library brings a solver
along that is larger than all of lapefast.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor

from lapefast.errors import InputError

__all__ = ["assign_evenly", "equal_sizes", "size_constrained_kmeans"]

# Of the range of the gains. On 11,008 rows half of which fall to a few of 256 clusters, this takes
# a sixth of the time of the last step alone; rows of weights that are near random take as long.
_STEPS = (1e-1, 1e-2, 1e-3)


def size_constrained_kmeans(
    rows: Tensor, clusters: int, seed: int = 0, iterations: int = 10
) -> Tensor:
    """Which cluster each row belongs to, all clusters being of one size, floor or ceil of n / k.

    The same rows, seed and number of threads give the same clusters. Means start at rows drawn at
    random: k-means++ needs a pass over all rows for every mean.

    Args:
        rows: float32 [n, width], finite.
        clusters: k, from 1 to n; the first n % k clusters have one row more.
        seed: of the means at the start.
        iterations: Lloyd's steps at most; fewer where a step changes nothing.

    Returns:
        int64 [n], on the CPU.

    Raises:
        InputError: k is not from 1 to n, or a row is not finite.
    """
    sizes = equal_sizes(len(rows), clusters)
    if not rows.isfinite().all():
        raise InputError(
            "the weights to be clustered are not finite (NaN or infinite); check the model's"
        )
    generator = torch.Generator().manual_seed(seed)
    chosen = torch.randperm(len(rows), generator=generator)[:clusters]
    means = rows[chosen.to(rows.device)]
    assigned = None
    for _ in range(iterations):
        # Of |row - mean|^2 / 2 only this depends on the pair.
        gain = (rows @ means.T - means.square().sum(1) / 2).double().cpu().numpy()
        before, assigned = assigned, torch.from_numpy(assign_evenly(gain, sizes.numpy()))
        if before is not None and torch.equal(before, assigned):
            break
        sums = torch.zeros_like(means).index_add_(0, assigned.to(rows.device), rows)
        means = sums / sizes.to(rows.device)[:, None]
    return assigned


def equal_sizes(count: int, clusters: int) -> Tensor:
    """int64 [clusters], floor or ceil of count / clusters, the larger ones first.

    Raises:
        InputError: clusters is not an integer from 1 to count.
    """
    if type(clusters) is not int or not 1 <= clusters <= count:
        raise InputError(
            f"{count} neurons can be split into 1 to {count} experts, got {clusters!r}; "
            "choose a number in that range"
        )
    return torch.tensor([count // clusters + (i < count % clusters) for i in range(clusters)])


def assign_evenly(gain: np.ndarray, sizes: np.ndarray) -> np.ndarray:
    """The assignment of rows to clusters of given sizes whose total gain is nearly the highest.

    The auction of Bertsekas and Castañon (1989): a row without a place bids for the cluster that
    is worth most to it at the clusters' prices, as much as makes its second choice worth as much,
    and a step more; a full cluster keeps its highest bids, and the lowest of these is its price.
    It is held with smaller and smaller steps, each time from the prices of the last.

    Args:
        gain: float64 [rows, clusters], finite.
        sizes: int64 [clusters], with sum rows.

    Returns:
        int64 [rows], each cluster as often as its size says. The total gain is below the highest
        by at most a thousandth of the range of the gains per row.
    """
    count, clusters = gain.shape
    if clusters == 1:
        return np.zeros(count, dtype=np.int64)
    span = gain.max() - gain.min() or 1.0
    prices = np.zeros(clusters)
    for step in _STEPS:
        assigned = _auction(gain, sizes, prices, step * span)
    return assigned


def _auction(gain: np.ndarray, sizes: np.ndarray, prices: np.ndarray, step: float) -> np.ndarray:
    """One auction; int64 [rows]. It raises the prices, float64 [clusters], in place."""
    bids, assigned = np.zeros(len(gain)), np.full(len(gain), -1)
    while len(free := np.flatnonzero(assigned < 0)):
        worth = gain[free] - prices
        each = np.arange(len(free))
        best = worth.argmax(1)
        most = worth[each, best]
        worth[each, best] = -np.inf
        bids[free] = prices[best] + (most - worth.max(1)) + step
        assigned[free] = best
        asked = np.zeros(len(sizes), dtype=bool)
        asked[best] = True
        # The rows of each cluster that was asked, its highest bids first, ties by index.
        holders = np.flatnonzero(asked[assigned])
        order = holders[np.lexsort((holders, -bids[holders], assigned[holders]))]
        cluster = assigned[order]
        starts = np.flatnonzero(np.diff(cluster, prepend=-1))
        place = np.arange(len(order)) - np.repeat(starts, np.diff(starts, append=len(order)))
        lowest = order[place == sizes[cluster] - 1]
        prices[assigned[lowest]] = bids[lowest]
        assigned[order[place >= sizes[cluster]]] = -1
    return assigned

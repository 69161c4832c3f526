"""An order in which what is similar stands together: the leaves of a hierarchical clustering."""

from __future__ import annotations

from itertools import combinations

from torch import Tensor

__all__ = ["leaf_order"]


def leaf_order(similarity: Tensor) -> list[int]:
    """The leaves of average-linkage clustering, from left to right.

    The two groups whose members are most similar on average are joined, again and again; ties go
    to the group that holds the lowest index. The group with the lower index stands left.

    Args:
        similarity: float64 [n, n], symmetric, finite.
    """
    groups = [[index] for index in range(len(similarity))]
    while len(groups) > 1:
        # Of equal values max takes the first.
        left, right = max(
            combinations(range(len(groups)), 2),
            key=lambda pair: float(similarity[groups[pair[0]]][:, groups[pair[1]]].mean()),
        )
        groups[left] += groups.pop(right)
    return groups[0] if groups else []

"""How widely a neuron is shared by labels (Wang et al., 2024, arXiv 2406.09265)."""

from __future__ import annotations

from enum import IntEnum

import torch
from torch import Tensor

from lapefast.errors import InputError

__all__ = ["Category", "count_categories", "sharing_categories"]


class Category(IntEnum):
    """Of a neuron, for one example given in K labels; the value is its code.

    With K = 2 no neuron is partial-shared.
    """

    ALL_SHARED = 0
    """Active in all K labels."""
    PARTIAL_SHARED = 1
    """Active in some: in at least two, and fewer than K."""
    SPECIFIC = 2
    """Active in exactly one."""
    NON_ACTIVATED = 3
    """Active in none."""

    @property
    def title(self) -> str:
        """Its name as the paper writes it, such as ``partial-shared``."""
        return self.name.lower().replace("_", "-")


def sharing_categories(active: Tensor) -> Tensor:
    """The category of each neuron.

    Args:
        active: bool [labels, ..., neurons], whether the neuron is active in the label's text.

    Returns:
        `Category` codes, int8 [..., neurons], where ``active`` lies.

    Raises:
        InputError: of another dtype or shape, or with fewer than two labels.
    """
    tensor = isinstance(active, Tensor)
    if not tensor or active.dtype != torch.bool or active.dim() < 2:
        came = f"{active.dtype} {list(active.shape)}" if tensor else type(active).__name__
        raise InputError(f"active must be a bool tensor [labels, ..., neurons], got {came}")
    labels = len(active)
    if labels < 2:
        raise InputError(
            f"sharing compares labels and needs at least two, got {labels}; add the same examples "
            "in another label"
        )
    count = active.sum(0)
    codes = torch.full_like(count, Category.PARTIAL_SHARED, dtype=torch.int8)
    codes[count == 0] = Category.NON_ACTIVATED
    codes[count == 1] = Category.SPECIFIC
    codes[count == labels] = Category.ALL_SHARED
    return codes


def count_categories(codes: Tensor) -> Tensor:
    """How many of the last dimension are of each category: int64 [..., 4] of codes [..., n]."""
    return torch.stack([(codes == category).sum(-1) for category in Category], dim=-1)

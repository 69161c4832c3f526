"""Which group each row of a model's input belongs to, and how many tokens each group had."""

from __future__ import annotations

import functools
import threading
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor, nn

from lapefast.errors import InputError
from lapefast.models.groups import shard_groups
from lapefast.models.placed import in_backward
from lapefast.models.placement import Placement
from lapefast.models.rows import StackRows, past_length
from lapefast.models.traces import GROUPS

__all__ = ["StackGroups"]


class StackGroups(StackRows):
    """The rows of one stack's input: their groups, and how many tokens each group had.

    With ``groups`` (labels, shards), a group is one shard of a label.
    """

    def __init__(
        self,
        module: nn.Module,
        groups: tuple[int, int],
        device: torch.device,
        placement: Placement,
    ) -> None:
        labels, self._shards = groups
        # The first place is for -1, so that counting needs no selection.
        self.tokens = torch.zeros(labels * self._shards + 1, dtype=torch.int64, device=device)
        # The number of each label's next row, and of its first in the batch that runs.
        self.next_row = torch.zeros(labels, dtype=torch.int64, device=device)
        self._first_row = self.next_row
        self._labels: Tensor | None = None
        self._shape: torch.Size | None = None
        self._lock = threading.Lock()
        self._placement = placement
        if self._shards > 1:
            self._deal_uncompiled = _uncompiled_deal()
        super().__init__(module, device, GROUPS)

    def set(self, labels: Tensor) -> None:
        """Take the label of each token, [batch, length], or of all, [1]."""
        self._shape = tuple(labels.shape) if labels.dim() == 2 else None
        # Rows are dealt as they come: of a mere label it is not known yet how many there are.
        self._labels = labels.to(self.device, copy=True)
        if self._shards == 1:
            self._hold(labels)

    def _deal(self, batch: int, length: int, options: dict[str, Any]) -> None:
        labels = self._labels if self._shape else self._labels.expand(batch, length)
        if not past_length(options):
            self._first_row = self.next_row.clone()
        groups, self.next_row = shard_groups(labels, self._first_row, self._shards)
        self._hold(groups)

    def _hold(self, groups: Tensor) -> None:
        groups = groups.reshape(-1)
        for device, held in self.indices.items():
            if held.tensor is None or held.tensor.shape != groups.shape:
                with torch.inference_mode(False):
                    held.tensor = torch.empty(groups.shape, dtype=torch.int32, device=device)
            held.tensor.copy_(groups)  # one address while the shape stays, for compiled graphs

    def before_forward(self, batch: int, length: int, options: dict[str, Any]) -> None:
        if self._placement.probing or (not torch.compiler.is_compiling() and in_backward()):
            return
        if self._labels is None:
            raise InputError(
                "the recorder does not know these tokens: call recorder.set(...) before the model"
            )
        if self._shape is not None and (batch, length) != self._shape:
            raise InputError(
                f"the model's input is {[batch, length]} tokens, but recorder.set was given "
                f"{list(self._shape)}; call it before each forward pass"
            )
        if self._shards > 1:
            self._deal_uncompiled(self, batch, length, options)
        index = self.indices[self.device].tensor
        rows = batch * length
        one = torch.ones(1, dtype=torch.int64, device=index.device).expand(rows)
        place = (index.long() + 1).expand(rows)
        if torch.compiler.is_compiling():
            self.tokens.index_add_(0, place, one)
        else:
            with self._lock:  # torch lets other threads run while it adds
                self.tokens.index_add_(0, place, one)


@functools.cache
def _uncompiled_deal() -> Callable[..., None]:
    # No decorator: it would load the compiler, a second's work, for all who import this.
    return torch.compiler.disable(StackGroups._deal)

"""The op that stands where an FFN's activation stood: the product, with each row's own edit."""

from __future__ import annotations

import itertools
import weakref
from collections.abc import Sequence

import torch
from torch import Tensor, nn

from lapefast.models.activations import fused_dtypes
from lapefast.neurons.edits import Table
from lapefast.ops import edit

__all__ = ["EditedActivation", "Rows"]


class Rows:
    """What the FFNs of one model share in a forward: the edit of each row, and proof of having run.

    Attributes:
        sets: int32 [capacity]: the set of each row, -1 where there is none.
        fired: int64 [FFNs, 2]: how often each FFN ran since `begin`, and over how many rows.
        flags: int64 [2], as the op counts them.
    """

    def __init__(self, capacity: int, ffns: int, device: torch.device) -> None:
        self.sets = torch.full((capacity,), -1, dtype=torch.int32, device=device)
        self.fired = torch.zeros(ffns, 2, dtype=torch.int64, device=device)
        self.flags = torch.zeros(2, dtype=torch.int64, device=device)
        self._used = 0

    def begin(self, sets: Tensor) -> None:
        """Before a forward whose first rows have these sets (int32, on the CPU)."""
        self._used = len(sets)
        self.sets[: self._used].copy_(sets)
        self.fired.zero_()

    def end(self) -> None:
        """After it: the rows of warm-up and dummy forwards have no edit."""
        self.sets[: self._used].fill_(-1)

    def check(self, rows: int, sites: Sequence[str]) -> None:
        """Raise RuntimeError unless every FFN ran exactly once over so many rows."""
        for site, (times, seen) in zip(sites, self.fired.tolist(), strict=True):
            if times != 1 or seen != rows:
                raise RuntimeError(
                    f"the edits' op at {site} must run once in a forward, over its {rows} rows; "
                    f"it ran {times} times, over {seen}. The model was compiled without it, or "
                    "computes this FFN in another way: no answer of this server can be trusted"
                )
        if self.flags[1]:
            raise RuntimeError(f"{int(self.flags[1])} indices of edits were out of range")


class EditedActivation(nn.Module):
    """Takes an activation's place: `act(gate) * up` of a fused input, or `act(x)`, edited.

    Args:
        activation: what computes the activation alone, of `gate` or of the whole input.
        gated: whether the input is `[gate, up]`, [rows, 2 * width].
        width: neurons here, which is a part of the site's under tensor parallelism.
        tables: per set, the edit of these neurons, or None.
        rows: what the model's FFNs share.
        number: which of them this is.
    """

    def __init__(
        self,
        activation: nn.Module,
        gated: bool,
        width: int,
        tables: Sequence[Table | None],
        rows: Rows,
        number: int,
    ) -> None:
        super().__init__()
        self.activation = activation
        self.gated, self.width = gated, width
        device = rows.sets.device
        self._kernel, self._fused = fused_dtypes(activation, device, "auto", True)
        self._tables = tuple(table.to(device) for table in _packed(tables))
        self._rows = rows
        self._calls, self._seen = rows.fired[number]
        # A tensor and not a number: layers that differ in nothing else are compiled once.
        key = next(_keys)
        self.register_buffer("key", torch.tensor(key, device="cpu"), persistent=False)
        _placed[key] = self

    def forward(self, x: Tensor) -> Tensor:
        return torch.ops.lapefast.edit_served(x, self.gated, self.key)

    def compute(self, x: Tensor) -> Tensor:
        """What the op does: [..., 2 * width or width] to [..., width]."""
        if x.shape[-1] != self.width * (2 if self.gated else 1):
            raise RuntimeError(
                f"an FFN of {self.width} neurons was given an input of width {x.shape[-1]}"
            )
        gate, up = (x[..., : self.width], x[..., self.width :]) if self.gated else (x, None)
        number = x.numel() // x.shape[-1]
        self._calls.add_(1)
        self._seen.add_(number)
        kernel = self._kernel
        if x.dtype not in self._fused:
            gate, kernel = self.activation(gate), "identity"
        sets = self._rows.sets[:number]
        return edit(gate, up, kernel, sets, *self._tables, self._rows.flags)


# The op finds its module here, in the way that vLLM's attention finds its layer.
_placed: weakref.WeakValueDictionary[int, EditedActivation] = weakref.WeakValueDictionary()
_keys = itertools.count()

_LIBRARY = torch.library.Library("lapefast", "FRAGMENT")
_LIBRARY.define("edit_served(Tensor x, bool gated, Tensor key) -> Tensor")


def _compute(x: Tensor, gated: bool, key: Tensor) -> Tensor:
    return _placed[int(key)].compute(x)


@torch.library.register_fake("lapefast::edit_served", lib=_LIBRARY)
def _(x, gated, key):
    return x.new_empty(*x.shape[:-1], x.shape[-1] // 2 if gated else x.shape[-1])


_LIBRARY.impl("edit_served", _compute, "CompositeExplicitAutograd")


def _packed(tables: Sequence[Table | None]) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """offsets int32 [sets + 1], neurons int32, scale float32, shift float32, as the op reads."""
    lengths = [0 if table is None else len(table[0]) for table in tables]
    offsets = torch.tensor([0, *itertools.accumulate(lengths)], dtype=torch.int32)
    present = [table for table in tables if table is not None]
    neurons, scale, shift = (
        torch.cat([table[column] for table in present])
        if present
        else torch.empty(0, dtype=torch.float32)
        for column in range(3)
    )
    return offsets, neurons.to(torch.int32), scale, shift

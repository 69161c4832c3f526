"""What the FFNs of a model share in a forward: whose its rows are, and proof that every FFN ran."""

from __future__ import annotations

from collections.abc import Sequence

import torch
from torch import Tensor

__all__ = ["Rows"]


class Rows:
    """The rows of the forward that runs.

    Attributes:
        index: int32 [capacity]: the edit set or the group of each row, -1 where there is none.
        fired: int64 [FFNs, 2]: how often each FFN ran since `begin`, and over how many rows.
        flags: int64 [FFNs, 2], as the ops count them.
    """

    def __init__(self, capacity: int, ffns: int, device: torch.device) -> None:
        self.index = torch.full((capacity,), -1, dtype=torch.int32, device=device)
        self.fired = torch.zeros(ffns, 2, dtype=torch.int64, device=device)
        self.flags = torch.zeros(ffns, 2, dtype=torch.int64, device=device)
        self._used = 0

    def begin(self, index: Tensor) -> None:
        """Before a forward whose first rows have this index (int32, on the CPU)."""
        self._used = len(index)
        self.index[: self._used].copy_(index)
        self.fired.zero_()

    def end(self) -> None:
        """After it: the rows of warm-up and dummy forwards are nobody's."""
        self.index[: self._used].fill_(-1)

    def check(self, rows: int, sites: Sequence[str]) -> None:
        """Raise RuntimeError unless every FFN ran exactly once over so many rows."""
        for site, (times, seen) in zip(sites, self.fired.tolist(), strict=True):
            if times != 1 or seen != rows:
                raise RuntimeError(
                    f"lapefast's op at {site} must run once in a forward, over its {rows} rows; "
                    f"it ran {times} times, over {seen}. The model was compiled without it, or "
                    "computes this FFN in another way: nothing of this engine can be trusted"
                )
        outside = int(self.flags[:, 1].sum())
        if outside:
            raise RuntimeError(f"{outside} indices of lapefast's ops were out of range")

"""A counting worker that also counts by the eager expression, on the gate tensors of its own run.

What each rank finds is written to the directory that `EAGER_COUNTS` names when the engine is asked
for its counts. For SiLU alone.
"""

from __future__ import annotations

import os
from pathlib import Path

import torch
from torch import nn

from lapefast.engines.vllm.worker import counting_worker_class

ENVIRONMENT = "EAGER_COUNTS"


class Worker(counting_worker_class()):
    """The worker that counts, watched."""

    def load_model(self, *args, **kwargs):
        super().load_model(*args, **kwargs)
        labels = len(self._counting.tokens)
        self.watched = {
            site: (counted.start, *_watch(counted, labels))
            for site, counted in self._counting.sites.items()
        }

    def counted(self):
        torch.save(self.watched, Path(os.environ[ENVIRONMENT]) / f"{self.rank}.pt")
        return super().counted()


def _watch(counted, labels: int):
    """Counts int64 and sums of activations and of their absolute values, float64 [labels, here]."""
    counts = torch.zeros(labels, counted.width, dtype=torch.int64)
    sums, absolute = (torch.zeros(labels, counted.width, dtype=torch.float64) for _ in range(2))
    original, threshold = counted.compute, torch.tensor(counted._threshold, dtype=torch.float32)

    def compute(x):
        activation = nn.functional.silu(x[:, : counted.width]).float()
        index = counted._rows.index[: len(x)]
        for label in range(labels):
            own = activation[index == label]
            counts[label] += (own > threshold).sum(0)
            sums[label] += own.double().sum(0)
            absolute[label] += own.double().abs().sum(0)
        return original(x)

    counted.compute = compute
    return counts, sums, absolute


def gathered(directory: Path) -> dict[str, tuple[torch.Tensor, ...]]:
    """Site -> counts, sums and sums of absolute values, [labels, width]: the ranks' joined."""
    ranks = [torch.load(path) for path in sorted(directory.glob("*.pt"))]
    found = {}
    for site in ranks[0]:
        parts = sorted((rank[site] for rank in ranks), key=lambda part: part[0])
        found[site] = tuple(torch.cat(of, dim=1) for of in list(zip(*parts, strict=True))[1:])
    return found

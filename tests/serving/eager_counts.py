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
    """Counts int64 [labels, here], and every sum with that of its absolute values, float64."""
    counts = torch.zeros(labels, counted.width, dtype=torch.int64)
    sums = {
        name: torch.zeros(2, labels, counted.width, dtype=torch.float64)
        for name in ("sums", "square_sums", "up_abs_sums")
    }
    original, threshold = counted.compute, torch.tensor(counted._threshold, dtype=torch.float32)

    def compute(x):
        activation = nn.functional.silu(x[:, : counted.width]).float()
        up = x[:, counted.width :].float()
        terms = {
            "sums": activation.double(),
            "square_sums": (activation.double() * up.double()).square(),
            "up_abs_sums": up.double().abs(),
        }
        index = counted._rows.index[: len(x)]
        for label in range(labels):
            counts[label] += (activation[index == label] > threshold).sum(0)
            for name, values in terms.items():
                own = values[index == label]
                sums[name][:, label] += torch.stack([own, own.abs()]).sum(1)
        return original(x)

    counted.compute = compute
    return counts, sums


def gathered(directory: Path) -> dict[str, tuple[torch.Tensor, dict[str, torch.Tensor]]]:
    """Site -> counts [labels, width], and sums [2, labels, width] by name: the ranks' joined."""
    ranks = [torch.load(path) for path in sorted(directory.glob("*.pt"))]
    found = {}
    for site in ranks[0]:
        parts = sorted((rank[site] for rank in ranks), key=lambda part: part[0])
        _, counts, sums = zip(*parts, strict=True)
        found[site] = (
            torch.cat(counts, dim=1),
            {name: torch.cat([of[name] for of in sums], dim=2) for name in sums[0]},
        )
    return found

"""Time on a CPU or a GPU, and inputs that no cache holds."""

from __future__ import annotations

import functools
import math
import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

Given = tuple[Tensor, ...]

_BEYOND_CACHES = 512 << 20  # bytes of input sets together: more than the caches that we know of
_MOST_SETS = 32  # of inputs so small that a model, too, would find them in a cache


@dataclass(frozen=True)
class Timings:
    """Seconds of every contender in every round."""

    seconds: dict[str, list[float]]

    def __getitem__(self, name: str) -> list[float]:
        return self.seconds[name]

    def ratio(self, name: str, other: str) -> list[float]:
        """How many times as long as ``other`` contender ``name`` took, in each round."""
        return [a / b for a, b in zip(self[name], self[other], strict=True)]


def median_interval(values: Sequence[float]) -> tuple[float, float]:
    """An interval that holds the median of what ``values`` are drawn from with 95% or more.

    The order statistics whose ranks a fair coin's number of heads passes in 2.5% of cases at most:
    it asks nothing of the distribution, so one round that something interrupted does no harm.
    """
    ordered, count = sorted(values), len(values)
    below, tail = 0, 2.0**-count
    while tail + math.comb(count, below + 1) * 2.0**-count <= 0.025:
        below += 1
        tail += math.comb(count, below) * 2.0**-count
    return ordered[below], ordered[count - 1 - below]


def input_sets(*tensors: Tensor) -> list[Given]:
    """Copies of ``tensors``, so many that going through them in turn finds none in a cache."""
    size = sum(tensor.nbytes for tensor in tensors)
    count = min(_MOST_SETS, max(2, math.ceil(_BEYOND_CACHES / size)))
    return [tuple(tensor.clone() for tensor in tensors) for _ in range(count)]


def seconds_per_call(device: str, run: Callable[..., object], inputs: Sequence[Given]) -> float:
    """The mean time of ``run`` over ``inputs``, called one after another without waiting."""
    if device == "cpu":
        started = time.perf_counter()
        for given in inputs:
            run(*given)
        return (time.perf_counter() - started) / len(inputs)
    begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
    # Empties the GPU's cache, and keeps it busy until the first calls are launched.
    _buffer().zero_()
    begin.record()
    for given in inputs:
        run(*given)
    end.record()
    end.synchronize()
    return begin.elapsed_time(end) / 1e3 / len(inputs)


@functools.cache
def _buffer() -> Tensor:
    return torch.empty(_BEYOND_CACHES, dtype=torch.uint8, device="cuda")

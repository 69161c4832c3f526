"""A worker that counts: how often each neuron is active at the tokens of labelled prompts.

Every token of a prompt counts once: not again where a preempted request computes it anew, and no
generated token ever. Warm-up and dummy forwards have no requests.
"""

from __future__ import annotations

import io
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lapefast.engines.vllm.activation import PlacedActivation
from lapefast.engines.vllm.placement import FFN
from lapefast.engines.vllm.rows import Rows
from lapefast.engines.vllm.runner import Task
from lapefast.errors import InputError
from lapefast.neurons import Layout
from lapefast.ops import profile
from lapefast.profiles import STATISTICS

__all__ = ["LABEL", "CountedActivation", "Counting"]

LABEL = "lapefast_label"
"""The extra argument of a request that says its prompt's label."""

_IN_THE_OP = ("counts", "sums", "square_sums", "up_abs_sums")


class Counting(Task):
    """Statistics of every site, per label of the requests.

    Args:
        layout: the sites.
        labels: what prompts are grouped by.
        statistics: names of `lapefast.profiles.STATISTICS`.
        threshold: a neuron is active where its activation is strictly above it.

    Attributes:
        tokens: int64 [labels], prompt tokens so far.
        sites: site -> what counts there.
    """

    what = "counts"

    def __init__(
        self, layout: Layout, labels: Sequence[str], statistics: Sequence[str], threshold: float
    ) -> None:
        self.layout, self._labels = layout, list(labels)
        self._statistics, self._threshold = statistics, threshold
        self.tokens = torch.zeros(len(labels), dtype=torch.int64)
        self.sites: dict[str, CountedActivation] = {}
        self._done: dict[str, int] = {}  # request -> tokens of its prompt that were counted

    def placed(self, site: str, ffn: FFN, rows: Rows, number: int) -> CountedActivation:
        """Zeros for what this rank holds of a site.

        Raises:
            InputError: a statistic needs the product, which the model's own code computes.
        """
        unknown = [name for name in self._statistics if name in ("square_sums", "up_abs_sums")]
        if unknown and not ffn.gated:
            raise InputError(
                f"{unknown[0]} can't be counted at {site}: its activation "
                f"{type(ffn.activation).__name__} stands alone under vLLM, and does not multiply"
            )
        counted = CountedActivation(ffn, rows, number, self._threshold)
        for name in self._statistics:
            counted.statistics[name] = torch.zeros(
                len(self._labels), counted.width, dtype=STATISTICS[name], device=rows.index.device
            )
        self.sites[site] = counted
        return counted

    def index(self, runner: Any) -> Tensor:
        """The label of each row that counts, int32 [rows]; -1 for the others."""
        requests = runner.input_batch.req_ids
        begins = runner.query_start_loc.np[: len(requests) + 1]
        # A preempted request keeps its place here until it ends.
        self._done = {name: done for name, done in self._done.items() if name in runner.requests}
        groups = np.full(begins[-1], -1, dtype=np.int32)
        for number, name in enumerate(requests):
            request, row = runner.requests[name], begins[number]
            start = runner.input_batch.num_computed_tokens_cpu[number]
            first = max(start, self._done.get(name, 0))
            stop = min(start + begins[number + 1] - row, request.num_prompt_tokens)
            if first < stop:
                label = self._labels.index(request.sampling_params.extra_args[LABEL])
                groups[row + first - start : row + stop - start] = label
                self.tokens[label] += stop - first
                self._done[name] = stop
        return torch.from_numpy(groups)

    def dump(self) -> bytes:
        """What this rank counted, as `torch.load(weights_only=True)` reads it.

        A dict: `tokens` int64 [labels]; `threads`; `sites`: site -> (its first neuron here, flags
        int64 [2], name -> statistic [labels, neurons here]).
        """
        sites = {
            site: (
                counted.start,
                counted.flags.cpu(),
                {name: tensor.cpu() for name, tensor in counted.statistics.items()},
            )
            for site, counted in self.sites.items()
        }
        file = io.BytesIO()
        threads = torch.get_num_threads()
        torch.save({"tokens": self.tokens, "threads": threads, "sites": sites}, file)
        return file.getvalue()


class CountedActivation(PlacedActivation):
    """The product, and statistics of the rows that have a label.

    Args:
        ffn, rows, number: as `PlacedActivation` takes them.
        threshold: see `Counting`.

    Attributes:
        start: the first neuron here, of the whole site's.
        statistics: name -> [labels, neurons here].
    """

    def __init__(self, ffn: FFN, rows: Rows, number: int, threshold: float) -> None:
        super().__init__(ffn, rows, number)
        self.start, self.statistics, self._threshold = ffn.start, {}, threshold

    def product(self, gate: Tensor, up: Tensor | None, kernel: str, index: Tensor) -> Tensor:
        statistics = (self.statistics.get(name) for name in _IN_THE_OP)
        return profile(gate, up, kernel, self._threshold, index, *statistics, self.flags)

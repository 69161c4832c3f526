"""A worker that serves edits: each row's own, in place of every FFN's activation."""

from __future__ import annotations

import functools
import itertools
from collections.abc import Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from lapefast.engines.vllm.activation import PlacedActivation
from lapefast.engines.vllm.checkpoint import check_fingerprint
from lapefast.engines.vllm.placement import FFN
from lapefast.engines.vllm.rows import Rows
from lapefast.engines.vllm.runner import Task, load
from lapefast.engines.vllm.served import Served, served_here
from lapefast.neurons.edits import Table
from lapefast.ops import edit

__all__ = ["EditedActivation", "Serving", "install", "installed"]

_MARK = "_lapefast_edits"


def installed() -> bool:
    """Whether workers made in this process serve edits."""
    from vllm.v1.worker.worker_base import WorkerBase

    return hasattr(WorkerBase, _MARK)


def install() -> None:
    """Place edits in the model of every worker made from here on. Safe to repeat."""
    from vllm.v1.worker.worker_base import WorkerBase

    if installed():
        return
    setattr(WorkerBase, _MARK, None)
    original = WorkerBase.__init__

    @functools.wraps(original)
    def construct(self, *args, **kwargs):
        original(self, *args, **kwargs)
        served = served_here()
        if served is not None:
            # On the instance: platforms have workers, and so ways to load a model, of their own.
            self.load_model = functools.partial(_load, self, self.load_model, served)

    WorkerBase.__init__ = construct


def _load(worker: Any, original: Any, served: Served, *args: Any, **kwargs: Any) -> None:
    rows = load(worker, functools.partial(original, *args, **kwargs), Serving(served))
    check_fingerprint(worker.model_config, served)
    setattr(worker.model_runner, _MARK, rows)


class Serving(Task):
    """The edits of a file, each for the requests that ask for it."""

    what = "edits"

    def __init__(self, served: Served) -> None:
        self.served, self.layout = served, served.layout

    def placed(self, site: str, ffn: FFN, rows: Rows, number: int) -> EditedActivation:
        """The edits' tables of what this rank holds of a site."""
        tables = [_part(edit.tables.get(site), ffn) for edit in self.served.edits]
        return EditedActivation(ffn, rows, number, tables)

    def index(self, runner: Any) -> Tensor:
        """The set of each row, int32 [rows]."""
        requests = runner.input_batch.req_ids
        sets = [self.served.set_of(_extra_args(runner.requests[name])) for name in requests]
        lengths = np.diff(runner.query_start_loc.np[: len(requests) + 1])
        return torch.from_numpy(np.repeat(np.array(sets, dtype=np.int32), lengths))


class EditedActivation(PlacedActivation):
    """The product with each row's own edit.

    Args:
        ffn, rows, number: as `PlacedActivation` takes them.
        tables: per set, the edit of these neurons, or None.
    """

    def __init__(self, ffn: FFN, rows: Rows, number: int, tables: Sequence[Table | None]) -> None:
        super().__init__(ffn, rows, number)
        self._tables = tuple(table.to(rows.index.device) for table in _packed(tables))

    def product(self, gate: Tensor, up: Tensor | None, kernel: str, index: Tensor) -> Tensor:
        return edit(gate, up, kernel, index, *self._tables, self.flags)


def _extra_args(request: Any) -> dict[str, Any] | None:
    return getattr(request.sampling_params, "extra_args", None)


def _part(table: Table | None, ffn: FFN) -> Table | None:
    """The part of a site's edit that this rank holds, counted from its first neuron."""
    if table is None:
        return None
    neurons, scale, shift = table
    held = (neurons >= ffn.start) & (neurons < ffn.stop)
    return neurons[held] - ffn.start, scale[held], shift[held]


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

"""The processes that share a pass."""

from __future__ import annotations

import pickle
from collections.abc import Callable, Iterable, Iterator
from contextlib import contextmanager
from typing import TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

from lapefast.errors import RunFailed, RunStopped

__all__ = ["Team"]

_Made = TypeVar("_Made")


class Team:
    """The processes that share a pass, or one alone (None). Every method is called by all of them.

    Args:
        group: the processes.
        splits_model: whether they hold parts of one model, so that each runs every batch and counts
            the neurons of its part; otherwise each holds the model and runs its share of batches.

    Attributes:
        batches: how many are run at once.
        turn: which of them this process runs.

    Raises:
        RunFailed: in any method, where another process has ended.
    """

    def __init__(self, group: dist.ProcessGroup | None = None, splits_model: bool = False) -> None:
        self._group, self.splits_model = group, splits_model
        self.rank = 0 if group is None else dist.get_rank(group)
        self.size = 1 if group is None else dist.get_world_size(group)
        self.batches, self.turn = (1, 0) if splits_model else (self.size, self.rank)
        self._source = 0 if group is None else dist.get_global_rank(group, 0)

    @property
    def first(self) -> bool:
        """Whether this is the process that keeps the sums, writes files and talks."""
        return self.rank == 0

    def highest(self, value: int) -> int:
        """The highest value that any process gives."""
        if self.size == 1:
            return value
        given = torch.tensor(value)
        with _together():
            dist.all_reduce(given, dist.ReduceOp.MAX, self._group)
        return int(given)

    def from_first(self, make: Callable[[], _Made]) -> _Made:
        """What ``make`` returns, or raises, in the first process; it is not called in others.

        What others raise has `elsewhere` set, so that one message is enough.
        """
        if self.size == 1:
            return make()
        made: list[tuple[bool, object]] = [(False, None)]
        if self.first:
            try:
                made = [(True, make())]
            except (Exception, RunStopped) as error:
                made = [(False, _sent(error))]
        with _together():
            dist.broadcast_object_list(made, self._source, self._group)
        good, content = made[0]
        if not good:
            content.elsewhere = not self.first
            raise content
        return content

    def where_held(self, make: Callable[[], _Made]) -> _Made:
        """What ``make`` makes of what was collected: in the first process, or in all that hold it.

        Whatever gathers the parts of a model is called by every process.
        """
        return make() if self.splits_model else self.from_first(make)

    def collect(self, tensors: Iterable[Tensor]) -> None:
        """Add every process's tensors up in the first process's; the others' become zero.

        Those of a model's parts stay where they are.
        """
        if self.batches == 1:
            return
        for tensor in tensors:
            with _together():
                dist.reduce(tensor, self._source, dist.ReduceOp.SUM, self._group)
            if not self.first:
                tensor.zero_()

    def share(self, tensors: Iterable[Tensor]) -> None:
        """Give what was collected to all."""
        if self.batches == 1:
            return
        for tensor in tensors:
            with _together():
                dist.broadcast(tensor, self._source, self._group)


def _sent(error: BaseException) -> BaseException:
    """The error, or one that says the same and can be sent."""
    try:
        pickle.dumps(error)
        return error
    except Exception:  # an object's own pickling may raise anything; what it says is still sent
        return RunFailed(f"{type(error).__name__}: {error}")


@contextmanager
def _together() -> Iterator[None]:
    try:
        yield
    except RuntimeError as error:
        raise RunFailed(
            "another process of this run has ended or did not answer in time, so this one can't go "
            "on; what was saved last stands, and the same command goes on from there "
            f"({str(error).splitlines()[0]:.200})"
        ) from error

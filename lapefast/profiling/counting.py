"""One batch at a time through the model: counted wholly, or not at all."""

from __future__ import annotations

import logging

import torch
from torch import nn

from lapefast.errors import InputError
from lapefast.models.inputs import forward_inputs, input_device
from lapefast.profiling.batches import Batch
from lapefast.recording import Recorder

__all__ = ["Counting"]

_log = logging.getLogger(__name__)


class Counting:
    """Runs batches through a bare model that a recorder is placed in.

    Where the memory does not suffice, the rows of a batch go through the model in halves, quarters
    and so on, from then on; the batch stays what it is.

    Args:
        bare, recorder: the model, and what is placed in it.
        rows_at_once: rows per forward pass.
        again: whether to run fewer rows where memory is short; not in one of several processes that
            split a model, as the others could not know.

    Attributes:
        rows_at_once: as it is now.
    """

    def __init__(
        self, bare: nn.Module, recorder: Recorder, rows_at_once: int, again: bool = True
    ) -> None:
        self._bare, self._recorder, self._again = bare, recorder, again
        self._device = input_device(bare)
        self.rows_at_once = rows_at_once

    def count(self, batch: Batch) -> None:
        """Count a batch; nothing of it, if that fails.

        Raises:
            InputError: the memory does not suffice for one row.
        """
        self._recorder.mark(batch.label)
        while not self._fits(batch):
            self.rows_at_once = max(1, min(self.rows_at_once, len(batch.ids)) // 2)
            if self._device.type == "cuda":
                torch.cuda.empty_cache()
            _log.warning(
                "Out of memory: rows per forward pass are halved to %d. The model's arithmetic "
                "may change by that, which the profile says.",
                self.rows_at_once,
            )

    def keep(self) -> None:
        """Let what was counted stand, so that `take_back` leaves it."""
        self._recorder.unmark()

    def take_back(self) -> None:
        """Undo what was counted since `keep`. Safe to repeat."""
        self._recorder.rewind()

    def _fits(self, batch: Batch) -> bool:
        """Count a batch, or find out that the memory does not suffice for so many rows at once."""
        try:
            row = batch.first_row
            for ids in batch.ids.split(self.rows_at_once):
                self._recorder.set(label=batch.label, first_row=row)
                row += len(ids)
                self._bare(**forward_inputs(self._bare, ids.to(self._device)))
            return True
        except BaseException as error:
            self._recorder.rewind()
            if not _out_of_memory(error):
                raise
            rows = min(self.rows_at_once, len(batch.ids))
            if rows == 1 or not self._again:
                raise InputError(
                    f"out of memory on {'one row' if rows == 1 else f'{rows} rows'} of "
                    f"{batch.ids.shape[1]} tokens; free memory or spread the model over more "
                    "devices (another seq_len or batch_size is another run)"
                ) from error
            return False


def _out_of_memory(error: BaseException) -> bool:
    return isinstance(error, (torch.OutOfMemoryError, MemoryError)) or (
        # What torch's CPU allocator says.
        isinstance(error, RuntimeError) and "can't allocate memory" in str(error)
    )

"""Which edit set each row of a model's input has: an edit per sequence, and where it holds."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Literal, get_args

import torch
from torch import Tensor, nn

from lapefast.models.placed import in_backward
from lapefast.models.placement import Placement
from lapefast.models.rows import StackRows
from lapefast.models.traces import SETS
from lapefast.steering.generation import Generation, wrong_batch

Where = Literal["all", "prompt", "generated"]

WHERE = get_args(Where)


class StackSets(StackRows):
    """The rows of one stack's input: the edit set of each.

    Args:
        module: the stack.
        device: where its input lies.
        sets: the edit set of each sequence, -1 for none; None is set 0 for every sequence.
        where: at which positions edits hold.
        generation: tells prompt and new positions apart.
        has_prompt_only: whether every position is the prompt's, as in an encoder.
        placement: tells a probe.
    """

    def __init__(
        self,
        module: nn.Module,
        device: torch.device,
        sets: Sequence[int] | None,
        where: Where,
        generation: Generation,
        has_prompt_only: bool,
        placement: Placement,
    ) -> None:
        self._sets = torch.tensor([0] if sets is None else sets, dtype=torch.int32, device=device)
        self._per_sequence = sets is not None
        self._where, self._generation, self._placement = where, generation, placement
        self._has_prompt_only = has_prompt_only
        self._held: tuple[int, int, int] | None = None
        super().__init__(module, device, SETS)

    def before_forward(self, batch: int, length: int, options: dict[str, Any]) -> None:
        if torch.compiler.is_compiling():
            self._fill(self._rows(batch, length, self._prompt_columns(length, options)))
            return
        if in_backward():  # what gradient checkpointing runs again is what ran last
            return
        prompt = 0 if self._where == "all" else int(self._prompt_columns(length, options))
        if self._held != (batch, length, prompt) or self._placement.probing:
            self._held = None
            self._fill(self._rows(batch, length, prompt))
            if not self._placement.probing:  # a probe's batch is matched with no edits
                self._held = (batch, length, prompt)

    def _prompt_columns(self, length: int, options: dict[str, Any]) -> int | Tensor:
        if self._where == "all" or self._has_prompt_only or self._placement.probing:
            return length
        return self._generation.prompt_columns(length, options)

    def _rows(self, batch: int, length: int, prompt: int | Tensor) -> Tensor:
        """The edit set of each row of an input [batch, length], int32 [batch * length]."""
        sets = self._of_sequences(batch)[:, None].expand(batch, length)
        if self._where != "all" and not self._placement.probing:
            given = torch.arange(length, device=sets.device) < prompt
            sets = torch.where(given if self._where == "prompt" else ~given, sets, -1)
        return sets.reshape(-1).contiguous()

    def _of_sequences(self, batch: int) -> Tensor:
        """The edit set of each sequence of a batch, int32 [batch]."""
        count = len(self._sets)
        if not self._per_sequence:
            return self._sets.expand(batch)
        if self._placement.probing:
            # The first two sequences are alike, and must stay so.
            probed = self._sets.repeat(batch // count + 1)
            return torch.cat([probed[:1], probed[: batch - 1]])
        if batch != count and (not self._generation.running or batch % count):
            raise wrong_batch(batch, count)
        # Beams and returned sequences of one input stand side by side.
        return self._sets.repeat_interleave(batch // count)

    def _fill(self, rows: Tensor) -> None:
        for device, held in self.indices.items():
            held.tensor = rows.to(device)

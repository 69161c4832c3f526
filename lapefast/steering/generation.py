"""What a forward pass inside `generate` is part of: whether one runs, and how long its prompt is.

A forward pass alone does not say which of its positions the user gave and which are new. So while a
model is steered, two methods of the instance are watched: `generate`, and the one by which it hands
the finished prompt to the decoding loop, whichever mode that is.
"""

from __future__ import annotations

import inspect
import threading
import types
from collections.abc import Iterator
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn

from lapefast.errors import InputError
from lapefast.models.bare import unwrap
from lapefast.models.rows import cache_of, past_length
from lapefast.models.traces import GENERATION, Replaced, clear, leave

_HANDOVER = "_expand_inputs_for_generation"
_CONTINUOUS = ("generate_batch", "init_continuous_batching", "continuous_batching_context_manager")


class Generation:
    """Watches one model's `generate`.

    Args:
        model: the one whose `generate` is called.
        device: of its input.
        edits: how many edits the sequences share out; None for one that all have.

    Attributes:
        running: whether a call of it runs.
        prompt: int64 [1], how many positions of the decoder's input were given to it.
    """

    def __init__(self, model: nn.Module, device: torch.device, edits: int | None) -> None:
        self.running = False
        self._edits = edits
        self.prompt = torch.zeros(1, dtype=torch.int64, device=device)
        self._positions = 0
        self._known = self._first = False
        self._depth = 0
        self._caches: dict[int, tuple[Any, int]] = {}
        self._thread: int | None = None
        self._model = unwrap(model)
        self.replaced: list[Replaced] = []
        if not hasattr(self._model, "generate"):
            return
        methods = {"generate": _generate, _HANDOVER: _hand_over}
        methods |= {name: _refuse for name in _CONTINUOUS if hasattr(self._model, name)}
        for name, placed in methods.items():
            method = types.MethodType(placed, self._model)
            self.replaced.append(Replaced(name, self._model.__dict__.get(name), method))
            self._model.__dict__[name] = method
        leave(self._model, GENERATION, self)

    def prompt_columns(self, length: int, options: dict[str, Any]) -> int | Tensor:
        """How many of the ``length`` positions that the decoder is called with are the prompt's.

        Outside `generate`: all of them, or none where they go on from a filled cache.

        Args:
            length: positions of this forward pass.
            options: its keyword arguments, which hold the cache.
        """
        past = past_length(options)
        if not self.running:
            if isinstance(past, Tensor):
                return torch.where(past > 0, 0, length)
            return 0 if past > 0 else length
        if torch.compiler.is_compiling():
            return (self.prompt - past).clamp(0, length)
        if not self._known:
            raise InputError(
                "generate of this model does not say how long its prompt is, so steering "
                'can\'t tell prompt and generated positions apart; use where="all"'
            )
        past = int(past)
        if self._first:
            self._first = False
            # A prompt that goes on from a filled cache may come without what the cache holds.
            if length >= self._positions and past > 0:
                self._set(self._positions + past)
        return min(max(self._prompt_of(options, past, length) - past, 0), length)

    def _prompt_of(self, options: dict[str, Any], past: int, length: int) -> int:
        """The prompt's length in the cache of this forward pass.

        A second branch, such as classifier-free guidance's, has a cache and a prompt of its own,
        which is what it reads first.
        """
        cache = cache_of(options)
        if self._depth > 1 or (cache is None and not self._caches):
            return self._positions
        if cache is None:  # the model makes one, which the branch's next pass brings
            return length
        if id(cache) not in self._caches:
            own = (past or length) if self._caches else self._positions
            self._caches[id(cache)] = (cache, own)  # held, so that no other takes its place
        return self._caches[id(cache)][1]

    def remove(self) -> None:
        """Give the model its own methods back. Safe to repeat."""
        while self.replaced:
            self.replaced.pop().undo(self._model.__dict__)
        clear(self._model, GENERATION)

    def start(self, positions: int, prompts: int) -> None:
        """Take the length of the prompts that are about to be read, and their number.

        A call inside another one, an assistant's on the same model, guesses what comes after the
        outer one's prompt.

        Raises:
            InputError: an edit's rows would begin or end among the beams of one prompt.
        """
        if self._depth > 1 and self._known:
            return
        if self._edits is not None and prompts % self._edits and self._edits % prompts:
            raise wrong_batch(prompts, self._edits)
        self._known = self._first = True
        self._caches.clear()
        self._set(positions)

    @contextmanager
    def call(self) -> Iterator[None]:
        """Within it, `generate` runs; a call inside another one is part of it.

        Raises:
            InputError: another thread generates with the model, whose rows these would be.
        """
        thread = threading.get_ident()
        if self.running and self._thread != thread:
            raise InputError(
                "the model is steered by sequence or position, and another thread is generating "
                "with it; generate one after the other, or give each thread a model"
            )
        self.running, self._thread = True, thread
        self._depth += 1
        try:
            yield
        finally:
            self._depth -= 1
            if not self._depth:
                self.running = self._known = self._first = False
                self._caches.clear()

    def own(self, name: str) -> Any:
        """The model's own method of that name."""
        before = next(one.before for one in self.replaced if one.attribute == name)
        if before is not None:
            return before
        # As a static method in transformers 4.57, as an ordinary one later.
        kind = type(self._model)
        return inspect.getattr_static(kind, name).__get__(self._model, kind)

    def _set(self, positions: int) -> None:
        self._positions = positions
        self.prompt.fill_(positions)


def _generate(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    generation: Generation = self.__dict__[GENERATION]
    with generation.call():
        return generation.own("generate")(*args, **kwargs)


def _refuse(self: nn.Module, *args: Any, **kwargs: Any) -> Any:
    raise InputError(
        "continuous batching packs all requests into one row, so steering by sequence or position "
        'can\'t tell them apart; use generate, or one edit for all with where="all"'
    )


def wrong_batch(sequences: int, edits: int) -> InputError:
    """What to raise where a batch has another number of sequences than there are edits."""
    return InputError(
        f"the model was called with {sequences} sequences, but steer was given {edits} edits; "
        "give one edit for all, or one per sequence (None for a sequence without)"
    )


def _hand_over(
    self: nn.Module, expand_size: int = 1, *args: Any, **kwargs: Any
) -> tuple[Tensor, dict[str, Any]]:
    """Notes the prompt's length, as it is once start tokens, embeddings and beams are prepared."""
    generation: Generation = self.__dict__[GENERATION]
    ids, options = expanded = generation.own(_HANDOVER)(expand_size, *args, **kwargs)
    embeddings = options.get("inputs_embeds")
    encoder_decoder = getattr(self.config, "is_encoder_decoder", False)
    given = ids if embeddings is None or encoder_decoder else embeddings
    generation.start(given.shape[1], given.shape[0] // max(expand_size, 1))
    return expanded

"""The likelihood that a causal model gives to rows of tokens, in bounded memory."""

from __future__ import annotations

import copy
import logging
from collections.abc import Callable, Iterator
from contextlib import contextmanager

import torch
from torch import Tensor, nn
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_CAUSAL_LM_MAPPING_NAMES as CAUSAL,
)
from transformers.models.auto.modeling_auto import (
    MODEL_FOR_MASKED_LM_MAPPING_NAMES as MASKED,
)

from lapefast.errors import InputError
from lapefast.models.bare import bare_model, evaluating, unwrap
from lapefast.models.inputs import forward_inputs, input_device

__all__ = ["TokenLikelihood"]

_log = logging.getLogger(__name__)

# Logits of a chunk are few enough to stay near the caches, and tokens many enough that the head's
# weights are not read for nothing.
_CHUNK_LOGITS = 1 << 21
_CHUNK_TOKENS = 128
_PROBE_TOKENS = 8


class TokenLikelihood:
    """Negative log-likelihoods under a causal language model, logits of a few tokens at a time.

    The decoder runs once per batch. Then the model's own forward runs on pieces of the decoder's
    output, the decoder passing them through: whatever a family does around its head (scaling,
    soft-capping, a head of several layers) is done by its own code. Before first use the logits
    found this way are compared, bit for bit, with those of the model as it is; where they differ,
    whole rows go through the model one by one.

    Raises:
        InputError: the model predicts no next token.
    """

    def __init__(self, model: nn.Module) -> None:
        self._model = unwrap(model)
        _refuse_by_name(self._model)
        self._device = input_device(model)
        with evaluating(self._model), torch.no_grad():
            logits = self._probe()
            self._vocabulary = logits.shape[-1]
            self.in_chunks = any(self._agrees_in_chunks(one, logits) for one in self._decoders())
        if not self.in_chunks:
            _log.info(
                "%s: the head does not run apart from the decoder; logits of one whole row at a "
                "time are held",
                type(self._model).__name__,
            )

    @torch.no_grad()
    def __call__(self, rows: Tensor) -> float:
        """The sum over all predictions of rows [batch, length], int64, of -ln p(token), in nats.

        Each row predicts its tokens from the second on. Softmax in float32, sum in float64.
        """
        rows = rows.to(self._device)
        total = torch.zeros((), dtype=torch.float64, device=self._device)
        if not self.in_chunks:
            for row in rows.split(1):
                losses = _losses(self._forward(row)[0, :-1], row[0, 1:])
                total += losses.sum(dtype=torch.float64)
            return float(total)
        output = self._decode(rows)
        hidden = output[0][:, :-1].flatten(0, 1)
        for losses in self._losses(output, hidden, rows[:, 1:].flatten()):
            total += losses.sum(dtype=torch.float64)
        return float(total)

    @torch.no_grad()
    def of_each(self, rows: Tensor, counted: Tensor) -> Tensor:
        """The sum over each row's counted tokens of -ln p(token), in nats; float64 [batch].

        Logits of other tokens are not computed where the head runs in chunks. Rows may be padded
        on the right with any token, since a causal model does not see what follows.

        Args:
            rows: int64 [batch, length].
            counted: bool [batch, length]; a row's first token has no prediction and never counts.
        """
        rows, counted = rows.to(self._device), counted[:, 1:].to(self._device)
        if self.in_chunks:
            output = self._decode(rows)
            pieces = self._losses(output, output[0][:, :-1][counted], rows[:, 1:][counted])
        else:
            pieces = (
                _losses(self._forward(row[None])[0, :-1][wanted], row[1:][wanted])
                for row, wanted in zip(rows, counted, strict=True)
            )
        losses = rows.new_zeros(counted.shape, dtype=torch.float64)
        losses[counted] = torch.cat([rows.new_zeros(0, dtype=torch.float64), *pieces])
        return losses.sum(1).cpu()

    def _losses(self, output, hidden: Tensor, targets: Tensor) -> Iterator[Tensor]:
        """The losses of ``targets`` [n] by the decoder's ``hidden`` [n, ...], a piece at a time."""
        step = max(_CHUNK_TOKENS, _CHUNK_LOGITS // self._vocabulary)
        with self._passing() as logits_of:
            for piece, wanted in zip(hidden.split(step), targets.split(step), strict=True):
                yield _losses(logits_of(output, piece[None])[0], wanted)

    def _forward(self, rows: Tensor) -> Tensor:
        return self._model(**forward_inputs(self._model, rows)).logits

    def _decode(self, rows: Tensor):
        return self._decoder(**forward_inputs(self._decoder, rows))

    @contextmanager
    def _passing(self) -> Iterator[Callable[..., Tensor]]:
        """Within it, the model's decoder returns what it is told to."""
        decoder, given = self._decoder, None

        def logits_of(output, hidden: Tensor) -> Tensor:
            nonlocal given
            # A copy keeps the output's class; what else the decoder returned is not for the head.
            given = copy.copy(output)
            given.last_hidden_state = hidden
            ids = torch.zeros(hidden.shape[:2], dtype=torch.int64, device=self._device)
            return self._forward(ids)

        before = decoder.__dict__.get("forward")
        decoder.forward = lambda *args, **kwargs: given
        try:
            yield logits_of
        finally:
            if before is None:
                del decoder.forward
            else:
                decoder.forward = before

    def _probe(self) -> Tensor:
        """Logits [1, n, vocabulary] of a few tokens, after a look at what the first one sees."""
        count = self._model.get_input_embeddings().weight.shape[0]
        ids = torch.arange(2 * _PROBE_TOKENS, device=self._device).view(2, 1, -1) % count
        ids[1, :, 0] = ids[0, :, 0]
        logits, others = self._forward(ids[0]), self._forward(ids[1])
        first, other = logits[:, 0].float(), others[:, 0].float()
        # What follows must not matter, but for the rounding of differently grouped experts.
        slack = 1e-5 if logits.dtype == torch.float32 else 1e-2
        if (first - other).abs().max() > slack * first.abs().max():
            raise InputError(
                f"{type(self._model).__name__} sees the tokens that follow, so it predicts no next "
                "token; perplexity needs a causal language model"
            )
        return logits

    def _decoders(self) -> list[nn.Module]:
        """What the model may call to turn ids into what its head reads."""
        model = self._model
        found = [model.get_decoder()] if hasattr(model, "get_decoder") else []
        return [one for one in (*found, bare_model(model)) if one is not None and one is not model]

    def _agrees_in_chunks(self, decoder: nn.Module, whole: Tensor) -> bool:
        self._decoder = decoder
        ids = torch.arange(_PROBE_TOKENS, device=self._device)[None] % self._vocabulary
        try:
            output = self._decode(ids)
            with self._passing() as logits_of:
                return torch.equal(logits_of(output, output[0]), whole)
        except Exception as error:
            _log.debug("%s in chunks: %s", type(self._model).__name__, error)
            return False


def _losses(logits: Tensor, targets: Tensor) -> Tensor:
    """float32 [n], where the targets lie, of logits [n, vocabulary] and targets [n]."""
    losses = nn.functional.cross_entropy(
        logits.float(), targets.to(logits.device), reduction="none"
    )
    return losses.to(targets.device)


def _refuse_by_name(model: nn.Module) -> None:
    name = type(model).__name__
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(
            f"{name} is an encoder-decoder, which predicts a text from another one; perplexity "
            "needs a causal language model"
        )
    if name in set(MASKED.values()) - set(CAUSAL.values()):
        raise InputError(
            f"{name} predicts masked tokens, not the next one; perplexity needs a causal language "
            "model"
        )
    if not hasattr(model, "get_output_embeddings") or model.get_output_embeddings() is None:
        raise InputError(
            f"{name} has no language-model head, so it predicts no next token; perplexity needs "
            "a causal language model"
        )

"""Continuations of many prompts in shared batches, each prompt with its own edit."""

from __future__ import annotations

from collections.abc import Sequence
from contextlib import nullcontext
from numbers import Real
from typing import Any

import torch
from torch import nn
from tqdm.auto import tqdm

from lapefast.errors import InputError
from lapefast.models.bare import evaluating, unwrap
from lapefast.models.inputs import context_limit, input_device
from lapefast.steering.sequences import Where
from lapefast.steering.steer import Steer, steer

__all__ = ["Request", "check_temperature", "continuations", "generating"]

Request = tuple[Sequence[int], Steer | None]
"""A prompt's token ids, and what its sequence is steered by."""

_GREEDY = {"do_sample": False, "temperature": None, "top_p": None, "top_k": None}
_TEMPERATURES = 1e-4, 1e4  # logits divided by them are finite, and differ, in float32
_PLAIN = {"num_beams": 1, "num_return_sequences": 1, "repetition_penalty": 1.0}


def continuations(
    model: nn.Module,
    requests: Sequence[Request],
    *,
    max_new_tokens: int,
    batch_size: int = 128,
    where: Where = "all",
    progress: bool | tqdm = True,
    **sampling: Any,
) -> list[list[int]]:
    """The tokens that the model generates after each prompt, in the order of the requests.

    Prompts of like length share a batch, whatever their edits, so that little of it is padding; it
    is padded on the left and steered once, by `lapefast.steer` with one edit per sequence.

    Args:
        model: a causal language model with `generate`.
        requests: prompts and edits; an edit that many share should be one object.
        max_new_tokens: at most so many per prompt; the token that ends a text is the last.
        batch_size: sequences per batch.
        where: at which positions edits hold; see `lapefast.steer`.
        progress: show a bar, or which one to move on: `generating`'s, of more than these requests.
        sampling: arguments of `generate`, such as ``do_sample=True``; without any, decoding is
            greedy, whatever the model's own configuration says.

    Raises:
        InputError: the model cannot generate, a prompt is empty or leaves no room for
            `max_new_tokens` within the model's limit, or an edit does not fit the model.
    """
    for name, value in (("max_new_tokens", max_new_tokens), ("batch_size", batch_size)):
        if type(value) is not int or value < 1:
            raise InputError(f"{name} must be an integer of at least 1, got {value!r}")
    if not callable(getattr(model, "generate", None)):
        raise InputError(f"{type(unwrap(model)).__name__} has no generate, so it continues no text")
    if getattr(getattr(model, "config", None), "is_encoder_decoder", False):
        raise InputError(
            f"{type(unwrap(model)).__name__} is an encoder-decoder, which answers a text and does "
            "not continue it; use a causal language model"
        )
    _check_lengths(model, requests, max_new_tokens)
    # Equal edits side by side: a batch then has few tables to place.
    first: dict[int, int] = {}
    for position, (_, edit) in enumerate(requests):
        first.setdefault(id(edit), position)
    order = sorted(
        range(len(requests)), key=lambda i: (len(requests[i][0]), first[id(requests[i][1])])
    )
    tokens: list[list[int]] = [[]] * len(requests)
    with (
        evaluating(model),
        torch.no_grad(),
        nullcontext(progress)
        if isinstance(progress, tqdm)
        else generating(len(order), progress) as bar,
    ):
        for start in range(0, len(order), batch_size):
            chosen = order[start : start + batch_size]
            batch = [requests[i] for i in chosen]
            for i, generated in zip(
                chosen, _generate(model, batch, max_new_tokens, where, sampling), strict=True
            ):
                tokens[i] = generated
            bar.update(len(batch))
    return tokens


def generating(texts: int, progress: bool) -> tqdm:
    """A bar for so many texts."""
    return tqdm(total=texts, desc="generating", unit="text", disable=not progress, delay=1)


def check_temperature(temperature: Any, name: str = "temperature") -> None:
    """Raise InputError unless tokens can be drawn at the temperature."""
    least, largest = _TEMPERATURES
    if not (isinstance(temperature, Real) and least <= temperature <= largest):
        raise InputError(f"{name} must be from {least:g} to {largest:g}, got {temperature!r}")


def _generate(
    model: nn.Module,
    batch: Sequence[Request],
    max_new_tokens: int,
    where: Where,
    sampling: dict[str, Any],
) -> list[list[int]]:
    ends = _end_tokens(model)
    padding = ends[0] if ends else 0
    longest = max(len(prompt) for prompt, _ in batch)
    ids = torch.full((len(batch), longest), padding)
    mask = torch.zeros_like(ids)
    for row, (prompt, _) in enumerate(batch):
        ids[row, longest - len(prompt) :] = torch.tensor(prompt)
        mask[row, longest - len(prompt) :] = 1
    device, edits = input_device(model), [edit for _, edit in batch]
    unedited = all(edit is None for edit in edits)
    with nullcontext() if unedited else steer(model, edits, where):
        generated = model.generate(
            input_ids=ids.to(device),
            attention_mask=mask.to(device),
            max_new_tokens=max_new_tokens,
            pad_token_id=padding,
            **_PLAIN,
            **(sampling or _GREEDY),
        )
    return [_until_end(row, ends) for row in generated[:, longest:].tolist()]


def _until_end(tokens: list[int], ends: Sequence[int]) -> list[int]:
    """The tokens up to the first that ends the text, that one included; padding follows it."""
    stop = next((at for at, token in enumerate(tokens) if token in ends), len(tokens))
    return tokens[: stop + 1]


def _end_tokens(model: nn.Module) -> list[int]:
    config = getattr(unwrap(model), "generation_config", None)
    ends = getattr(config, "eos_token_id", None)
    if ends is None:
        return []
    return [ends] if isinstance(ends, int) else list(ends)


def _check_lengths(model: nn.Module, requests: Sequence[Request], max_new_tokens: int) -> None:
    limit = context_limit(model)
    for index, (prompt, _) in enumerate(requests):
        if not len(prompt):
            raise InputError(f"prompt {index} is empty; a continuation needs at least one token")
        if limit is not None and len(prompt) + max_new_tokens > limit:
            raise InputError(
                f"a prompt of {len(prompt)} tokens and {max_new_tokens} new ones are over the "
                f"model's limit of {limit} tokens; shorten it or ask for fewer"
            )

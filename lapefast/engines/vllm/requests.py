"""The front end: which edit a request asks for, and the salt of its cached keys and values.

Prefixes are cached by their tokens. Those of one edit would serve requests of another, so the
edit's digest is made part of every request's cache salt before it goes to the engine.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Mapping
from typing import Any

from lapefast.engines.vllm import ARGUMENT
from lapefast.engines.vllm.served import Served, served_here
from lapefast.errors import InputError

__all__ = ["install"]

_HELD = "_lapefast_served"


def install() -> None:
    """Check and salt the requests of every front end made from here on. Safe to repeat."""
    from vllm.entrypoints.openai.chat_completion.protocol import ChatCompletionRequest
    from vllm.entrypoints.openai.completion.protocol import CompletionRequest
    from vllm.v1.engine.input_processor import InputProcessor

    if hasattr(InputProcessor, _HELD):
        return
    setattr(InputProcessor, _HELD, None)
    InputProcessor.__init__ = _holding(InputProcessor.__init__)
    InputProcessor.process_inputs = _checking(InputProcessor.process_inputs)
    for request in (CompletionRequest, ChatCompletionRequest):
        request.to_beam_search_params = _refusing(request.to_beam_search_params)


def _holding(original):
    """The constructor of a front end, which then holds what it serves."""

    @functools.wraps(original)
    def construct(self, *args, **kwargs):
        original(self, *args, **kwargs)
        setattr(self, _HELD, served_here())

    return construct


def _checking(original):
    """`process_inputs` for requests with edits."""
    signature = inspect.signature(original)

    @functools.wraps(original)
    def process_inputs(self, *args, **kwargs):
        served = getattr(self, _HELD)
        if served is None:
            return original(self, *args, **kwargs)
        given = signature.bind(self, *args, **kwargs).arguments
        extra_args = _extra_args(given["params"])
        chosen = _chosen(served, extra_args)
        if given.get("resumable") and ARGUMENT in (extra_args or ()):
            raise _refusal(
                f"{ARGUMENT} does not go with input that is streamed, whose parts may each ask "
                "for another edit; let the whole server have the edit"
            )
        request = original(self, *args, **kwargs)
        request.cache_salt = served.salted(chosen, request.cache_salt)
        return request

    return process_inputs


def _refusing(original):
    """`to_beam_search_params`, which drops extra arguments: what it would ignore is refused."""

    @functools.wraps(original)
    def to_beam_search_params(self, *args, **kwargs):
        if ARGUMENT in (self.vllm_xargs or ()):
            raise _refusal(
                f"{ARGUMENT} does not go with beam search, which vLLM gives no extra arguments; "
                "let the whole server have the edit"
            )
        return original(self, *args, **kwargs)

    return to_beam_search_params


def _extra_args(params: Any) -> Mapping[str, Any] | None:
    """The extra arguments by which a request may ask; a pooling request may not."""
    from vllm import SamplingParams

    if isinstance(params, SamplingParams):
        return params.extra_args
    others = getattr(params, "extra_args", None), getattr(params, "extra_kwargs", None)
    if any(str(key).startswith("lapefast") for given in others for key in given or ()):
        raise _refusal(
            f"{ARGUMENT} is for requests that generate, with SamplingParams; this one has "
            f"{type(params).__name__}. Let the whole server have the edit"
        )
    return None


def _chosen(served: Served, extra_args: Mapping[str, Any] | None) -> int:
    try:
        return served.set_of(extra_args)
    except InputError as error:
        raise _refusal(str(error)) from error


def _refusal(message: str) -> Exception:
    """The error that the server answers with HTTP 400."""
    from vllm.exceptions import VLLMValidationError

    return VLLMValidationError(message, parameter=ARGUMENT)

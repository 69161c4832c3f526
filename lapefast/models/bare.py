"""The bare decoder or encoder-decoder inside a model, and the names of what is in it.

A causal, compiled, adapted or sharded form of one model must give the same names, so wrappers are
taken off the model and their prefixes out of every path.
"""

from __future__ import annotations

import inspect
from collections.abc import Collection, Iterator
from contextlib import contextmanager

import torch
from torch import nn

from lapefast.errors import InputError

_PREFIXES = ("_orig_mod.", "_fsdp_wrapped_module.", "base_model.model.")
_WRAPPED = frozenset(("_orig_mod", "_fsdp_wrapped_module"))


def unwrap(model: nn.Module) -> nn.Module:
    """The model without torch.compile, data-parallel, FSDP and PEFT wrappers.

    Raises:
        InputError: where it is no module, such as a model's name.
    """
    if not isinstance(model, nn.Module):
        raise InputError(
            f"the model must be a torch.nn.Module, got {type(model).__name__}; load it first, with "
            "AutoModelForCausalLM.from_pretrained for example"
        )
    if isinstance(model, torch.jit.ScriptModule):
        raise InputError(
            "the model is compiled by torch.jit, which nothing can be placed in; give the one that "
            "it was made of"
        )
    while True:
        kind = type(model).__name__
        if "_orig_mod" in model._modules:
            model = model._orig_mod
        elif "_fsdp_wrapped_module" in model._modules:
            model = model._fsdp_wrapped_module
        elif kind in ("DataParallel", "DistributedDataParallel"):
            model = model.module
        elif hasattr(model, "get_base_model") and "base_model" in model._modules:
            if getattr(model.active_peft_config, "is_prompt_learning", False):
                raise InputError(
                    f"this {kind} puts a learned prompt before every text, which lapefast does not "
                    "read; give the model without it"
                )
            model = model.get_base_model()
        else:
            return model


def bare_model(model: nn.Module) -> nn.Module:
    """The decoder, encoder or encoder-decoder that holds the FFNs, without a task's head.

    Of a multi-modal model it is the language model.
    """
    model = unwrap(model)
    while True:
        base = getattr(model, "base_model", model)
        if not isinstance(base, nn.Module) or base is model:
            # Some causal forms do not say which of their parts is the base.
            parts = (model._modules.get(name) for name in ("language_model", "text_model", "model"))
            base = next((part for part in parts if hasattr(part, "config")), None)
        if base is None:
            return model
        model = unwrap(base)


def is_encoder_decoder(bare: nn.Module) -> bool:
    """Whether the model reads one text and writes another."""
    config = getattr(bare, "config", None)
    return bool(getattr(config, "is_encoder_decoder", False)) and {"encoder", "decoder"} <= set(
        bare._modules
    )


def stacks(bare: nn.Module) -> dict[str, nn.Module]:
    """Stack name -> the module whose input's tokens pass through the stack's FFNs."""
    if is_encoder_decoder(bare):
        return {"encoder": bare.encoder, "decoder": bare.decoder}
    return {"encoder" if "encoder" in bare._modules else "decoder": _reader(bare)}


def stack_of(path: str, names: Collection[str]) -> str:
    """Which of the bare model's stacks sends its tokens through a module, by the module's path."""
    return next(iter(names)) if len(names) == 1 or path.startswith("encoder.") else "decoder"


def _reader(bare: nn.Module) -> nn.Module:
    """What reads the token ids: the model, or its part that a causal form calls past it (OPT)."""
    part = bare._modules.get("decoder")
    if part is not None and "input_ids" in inspect.signature(type(part).forward).parameters:
        return part
    return bare


def named_modules(bare: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Every module once, with its path freed of wrapper prefixes, in definition order.

    Wrappers are left out: they pass for what they wrap, as they have its attributes too.
    """
    for path, module in bare.named_modules():
        if _WRAPPED.isdisjoint(module._modules):
            yield clean_path(path), module


def clean_path(path: str) -> str:
    """A module path without the prefixes that wrappers put into it."""
    path += "."
    for prefix in _PREFIXES:
        path = path.replace(prefix, "")
    return path.rstrip(".")


def text_config(model: nn.Module):
    """The language model's configuration, or None for a module without one."""
    config = getattr(bare_model(model), "config", None)
    return config.get_text_config() if hasattr(config, "get_text_config") else config


@contextmanager
def evaluating(model: nn.Module):
    """Run the model in ``eval()`` and give each module its own training flag back."""
    flags = [(module, module.training) for module in model.modules()]
    model.eval()
    try:
        yield
    finally:
        for module, training in flags:
            module.training = training


@contextmanager
def headless(bare: nn.Module):
    """Let a model that owns its language-model head itself, as T5's does, run without it."""
    head = getattr(bare, "get_output_embeddings", lambda: None)()
    names = [name for name, child in bare._modules.items() if child is head and head is not None]
    for name in names:
        bare._modules[name] = nn.Identity()
    try:
        yield
    finally:
        for name in names:
            bare._modules[name] = head

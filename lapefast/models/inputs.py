"""What a bare model is called with to read rows of token ids, and how long they may be."""

from __future__ import annotations

import inspect
from collections.abc import Mapping
from numbers import Integral

import torch
from torch import Tensor, nn

from lapefast.errors import InputError
from lapefast.models.bare import bare_model, is_encoder_decoder, text_config


def forward_inputs(
    bare: nn.Module, ids: Tensor, mask: Tensor | None = None
) -> dict[str, Tensor | bool]:
    """Keyword arguments that run every FFN of ``bare`` once over ``ids`` [batch, length].

    No cache is kept. An encoder-decoder's decoder reads the same ids, shifted right by its start
    token.

    Args:
        bare: the model.
        ids: token ids, int64 [batch, length].
        mask: integers like ``ids``, 0 for padding, which stands on the right; None for none.
    """
    parameters = inspect.signature(bare.forward).parameters
    inputs: dict[str, Tensor | bool] = {_ids_name(parameters): ids}
    if mask is not None:
        inputs["attention_mask"] = mask
    if "use_cache" in parameters:
        inputs["use_cache"] = False
    if is_encoder_decoder(bare):
        config = bare.config
        start = config.decoder_start_token_id
        if start is None:
            start = config.pad_token_id if config.pad_token_id is not None else 0
        first = torch.full_like(ids[:, :1], start)
        inputs["decoder_input_ids"] = torch.cat([first, ids[:, :-1]], dim=1)
        if mask is not None:
            inputs["decoder_attention_mask"] = mask
    return inputs


def _ids_name(parameters: Mapping[str, inspect.Parameter]) -> str:
    """What a forward calls its token ids: ``input_ids``, or as its first parameter is named."""
    starred = (inspect.Parameter.VAR_POSITIONAL, inspect.Parameter.VAR_KEYWORD)
    if "input_ids" in parameters or any(one.kind in starred for one in parameters.values()):
        return "input_ids"
    return next(iter(parameters), "input_ids")


def probe_ids(bare: nn.Module) -> Tensor:
    """A few different token ids, int64 [2, 8], to run a model on before it is used."""
    ids = torch.arange(2 * 8, device=input_device(bare)).reshape(2, 8) * 7919 + 1
    return ids % (vocabulary_size(bare) or 16)


def input_device(model: nn.Module) -> torch.device:
    """Where a model's token ids belong."""
    bare = bare_model(model)
    embedding = _embedding(bare)
    hook = getattr(embedding, "_hf_hook", None)
    device = getattr(hook, "execution_device", None)
    if device is None:
        device = next((embedding or bare).parameters()).device
    return torch.device(device)


def vocabulary_size(model: nn.Module) -> int | None:
    """How many token ids the model can embed, if known."""
    embedding = _embedding(bare_model(model))
    size = getattr(embedding, "num_embeddings", None)
    return size if size is not None else getattr(text_config(model), "vocab_size", None)


def context_limit(model: nn.Module) -> int | None:
    """The longest row that the model's positions allow, or None where they have no end."""
    bare = bare_model(model)
    # RoBERTa's positions start behind the padding index, so its table says more than it can use.
    for name, module in bare.named_modules():
        padding = getattr(module, "padding_idx", None)
        if name.endswith("position_embeddings") and padding is not None:
            return module.num_embeddings - padding - 1
    config = text_config(model)
    for name in ("max_position_embeddings", "n_positions", "max_seq_len"):
        limit = getattr(config, name, None)
        if isinstance(limit, int) and limit > 0:
            return limit
    return None


def row_length(model: nn.Module, asked: int | None) -> int:
    """The length of rows to read: as asked, or the smaller of the model's limit and 2,048.

    Raises:
        InputError: where more is asked for than the model takes.
    """
    limit = context_limit(model)
    if asked is None:
        return min(limit or 2048, 2048)
    if not isinstance(asked, Integral):
        raise InputError(f"seq_len must be an integer, got {asked!r}")
    if asked < 1:
        raise InputError(f"seq_len must be at least 1, got {asked}")
    if limit is not None and asked > limit:
        raise InputError(f"seq_len {asked} is over the model's limit of {limit} tokens")
    return asked


def _embedding(bare: nn.Module) -> nn.Module | None:
    try:
        return bare.get_input_embeddings()
    except (AttributeError, NotImplementedError):
        return None

"""Looking at self-attention: its queries and keys as they meet, and where its units come from."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor, nn
from transformers import AttentionInterface

from lapefast.errors import InputError
from lapefast.models.bare import bare_model, named_modules
from lapefast.models.linears import out_features

__all__ = ["AttentionCall", "Projections", "projections_of", "watching_attention"]

# Names of the projections of queries, keys and values, in this order.
_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
)
# One projection that makes all three: one after the other, or head by head.
_STACKED = ("qkv_proj", "c_attn", "Wqkv", "qkv")
_BY_HEAD = ("query_key_value",)


@dataclass(frozen=True)
class AttentionCall:
    """One call of one self-attention.

    Attributes:
        path: of the module, inside the bare model.
        module: the module.
        query: [batch, heads, length, dimensions], after the rotary embedding.
        key, value: [batch, key heads, length, dimensions].
        output: [batch, length, heads * dimensions], what enters the output projection.
        scaling: of the scores.
        softcap: of the scaled scores; 0 for none.
    """

    path: str
    module: nn.Module
    query: Tensor
    key: Tensor
    value: Tensor
    output: Tensor
    scaling: float
    softcap: float
    _mask: Tensor | None
    _causal: bool

    def scores(self, row: int, length: int, heads: slice) -> Tensor:
        """The scaled scores of one sequence's first tokens, minus infinity where masked.

        Args:
            row: of the batch.
            length: how many tokens.
            heads: which of the key heads; the query heads that they serve come along.

        Returns:
            float32 [heads, length, length].
        """
        served = self.query.shape[1] // self.key.shape[1]
        query = self.query[row, heads.start * served : heads.stop * served, :length].float()
        key = self.key[row, heads, :length].float().repeat_interleave(served, 0)
        scores = query @ key.transpose(1, 2) * self.scaling
        if self._mask is not None:
            mask = self._mask[row, :, :length, :length]
            if len(mask) > 1:
                mask = mask[heads.start * served : heads.stop * served]
            if mask.dtype is torch.bool:
                return scores.masked_fill(~mask, -torch.inf)
            # Models mask by the dtype's least number; a bias is far from it.
            hidden = mask <= torch.finfo(mask.dtype).min / 2
            return (scores + mask).masked_fill(hidden, -torch.inf)
        if self._causal:
            later = torch.ones(length, length, dtype=torch.bool, device=scores.device).triu(1)
            scores.masked_fill_(later, -torch.inf)
        return scores


@contextmanager
def watching_attention(model: nn.Module, see: Callable[[AttentionCall], None]) -> Iterator[None]:
    """Within it, ``see`` is called after every self-attention of ``model``; nothing is changed.

    That is where transformers dispatches attention: the functions that it looks up by the name of
    an implementation are watched, and pass through for every other model.

    Raises:
        InputError: while the model runs, where an attention can't be read.
    """
    bare = bare_model(model)
    paths = {module: path for path, module in named_modules(bare)}
    configs = [getattr(module, "config", None) for module in (bare, *paths)]
    names = {getattr(config, "_attn_implementation", None) for config in configs} - {None}
    functions = AttentionInterface._global_mapping
    held = {name: functions.get(name) for name in names}

    def watched(name: str):
        def attention(module: nn.Module, query, key, value, mask=None, *args: Any, **options: Any):
            function = held[name] or sys.modules[type(module).__module__].eager_attention_forward
            result = function(module, query, key, value, mask, *args, **options)
            if module in paths and query.shape[2] == key.shape[2]:
                see(_call(paths[module], module, query, key, value, mask, options, result[0]))
            return result

        return attention

    for name in names:
        functions[name] = watched(name)
    try:
        yield
    finally:
        for name, function in held.items():
            if function is None:
                functions.pop(name, None)
            else:
                functions[name] = function


def _call(path, module, query, key, value, mask, options, output) -> AttentionCall:
    if options.get("s_aux") is not None or not isinstance(mask, Tensor | None):
        what = "has sinks" if isinstance(mask, Tensor | None) else f"masks by {type(mask).__name__}"
        raise InputError(
            f"the attention {path} {what}, so its map is no softmax of masked scores; leave the "
            "kinds query_key and value out"
        )
    causal = options.get("is_causal")
    scaling = options.get("scaling")
    return AttentionCall(
        path,
        module,
        query,
        key,
        value,
        output.flatten(2),
        query.shape[-1] ** -0.5 if scaling is None else float(scaling),
        float(options.get("softcap") or 0),
        mask,
        bool(getattr(module, "is_causal", True) if causal is None else causal),
    )


@dataclass(frozen=True)
class Projections:
    """Which outputs of which linear layers are a self-attention's queries, keys and values.

    Attributes:
        query, key, value: the layer's path inside the bare model, and the output of it that each
            unit is, int64 [heads * dimensions]; of keys and values of a grouped attention, the
            units of query heads that share one name the same output.
    """

    query: tuple[str, Tensor]
    key: tuple[str, Tensor]
    value: tuple[str, Tensor]


def projections_of(call: AttentionCall) -> Projections:
    """Where the units of a self-attention come from, found by the names of its projections.

    Raises:
        InputError: naming the module, where its projections aren't known or of another width.
    """
    modules = call.module._modules
    heads, size = call.query.shape[1], call.query.shape[3]
    key_heads = call.key.shape[1]
    unit = torch.arange(heads * size)
    shared = unit // size // (heads // key_heads) * size + unit % size
    widths = (heads * size, key_heads * size, key_heads * size)
    for names in _SEPARATE:
        if all(name in modules for name in names):
            found = tuple(out_features(modules[name]) for name in names)
            if found == widths:
                rows = (unit, shared, shared)
                return Projections(
                    *((f"{call.path}.{name}", row) for name, row in zip(names, rows, strict=True))
                )
    for name in (*_STACKED, *_BY_HEAD):
        if name in modules and out_features(modules[name]) == sum(widths):
            path = f"{call.path}.{name}"
            if name in _STACKED:
                rows = (unit, widths[0] + shared, widths[0] + widths[1] + shared)
            elif key_heads == heads:
                first = unit // size * 3 * size + unit % size
                rows = (first, first + size, first + 2 * size)
            else:
                continue
            return Projections(*((path, row) for row in rows))
    raise InputError(
        f"the projections of the attention {call.path} ({type(call.module).__name__}) are not "
        "known by their names; leave the kinds query_key and value out"
    )

"""Looking at self-attention: its queries and keys as they meet, and where its units come from."""

from __future__ import annotations

import functools
import sys
import threading
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass

import torch
from torch import Tensor, nn

from lapefast.errors import InputError
from lapefast.models.bare import bare_model, named_modules
from lapefast.models.linears import out_features
from lapefast.models.parallel import refuse_split

__all__ = ["AttentionCall", "Projections", "projections_of", "watching_attention"]

# Names of the projections of queries, keys and values, in this order.
_SEPARATE = (
    ("q_proj", "k_proj", "v_proj"),
    ("query", "key", "value"),
    ("q", "k", "v"),
    ("q_lin", "k_lin", "v_lin"),
)


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
    an implementation are watched, and pass through for every other model. Several models may be
    watched at once, also by threads, and end in any order.

    Raises:
        InputError: where heads are split over processes; while the model runs, where an attention
            can't be read.
    """
    refuse_split(model, "looking at attention")
    bare = bare_model(model)
    paths = {module: path for path, module in named_modules(bare)}
    configs = [getattr(module, "config", None) for module in (bare, *paths)]
    names = {getattr(config, "_attn_implementation", None) for config in configs} - {None}
    watcher = _Watcher(paths, see)
    if names:
        _functions()  # it may take seconds, or fail, before anything is locked or watched
    with _LOCK:
        _WATCHERS.append(watcher)
        for name in names:
            _watch(name)
    try:
        yield
    finally:
        with _LOCK:
            _WATCHERS.remove(watcher)
            for name in names:
                _unwatch(name)


@dataclass(frozen=True, eq=False)
class _Watcher:
    paths: dict[nn.Module, str]
    see: Callable[[AttentionCall], None]


_LOCK = threading.Lock()
_WATCHERS: list[_Watcher] = []
_WATCHED: dict[str, tuple[Callable, Callable | None, int]] = {}
"""Implementation -> what is in its place, what was there before, and how often it is watched."""


def _functions() -> dict[str, Callable]:
    """Implementation -> function, where transformers looks it up."""
    # Loads all that models are made of, which takes seconds: who watches nothing need not wait.
    from transformers import AttentionInterface

    return AttentionInterface._global_mapping


def _watch(name: str) -> None:
    functions = _functions()
    placed, before, times = _WATCHED.get(name, (None, functions.get(name), 0))
    if placed is None:
        placed = functions[name] = functools.partial(_watched, before)
    _WATCHED[name] = placed, before, times + 1


def _unwatch(name: str) -> None:
    placed, before, times = _WATCHED.pop(name)
    functions = _functions()
    if times > 1:
        _WATCHED[name] = placed, before, times - 1
    elif functions.get(name) is placed:  # or somebody has registered another since
        if before is None:
            del functions[name]
        else:
            functions[name] = before


def _watched(
    before: Callable | None, module: nn.Module, query, key, value, mask=None, *args, **options
):
    function = before or _eager_of(module)
    result = function(module, query, key, value, mask, *args, **options)
    if query.shape[2] == key.shape[2]:
        for watcher in tuple(_WATCHERS):
            path = watcher.paths.get(module)
            if path is not None:
                watcher.see(_call(path, module, query, key, value, mask, options, result[0]))
    return result


def _eager_of(module: nn.Module) -> Callable:
    """The function that a family's own file has for an attention that is not looked up."""
    for kind in type(module).__mro__:
        function = getattr(sys.modules.get(kind.__module__), "eager_attention_forward", None)
        if function is not None:
            return function
    raise InputError(
        f"{type(module).__name__} has an eager attention of its own that can't be watched; load "
        'the model with attn_implementation="sdpa"'
    )


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


def projections_of(call: AttentionCall, outputs: Mapping[str, Tensor]) -> Projections:
    """Where the units of a self-attention come from, found by the names of its projections.

    What one projection makes queries, keys and values in is told by where the values lie.

    Args:
        call: a call of it.
        outputs: path of a linear layer inside the bare model -> what it gave in this call.

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
    stacked = (unit, widths[0] + shared, widths[0] + widths[1] + shared)
    first = unit // size * 3 * size + unit % size
    layouts = [stacked, (first, first + size, first + 2 * size)]
    for name, module in modules.items():
        path = f"{call.path}.{name}"
        if path not in outputs or out_features(module) != sum(widths):
            continue
        made = outputs[path].reshape(*call.output.shape[:2], -1)
        values = call.value.repeat_interleave(heads // key_heads, 1).transpose(1, 2).flatten(2)
        for rows in layouts if key_heads == heads else layouts[:1]:
            # Some families clip what the projection gives; another place agrees hardly anywhere.
            if (made[..., rows[2]] == values).float().mean() > 0.5:
                return Projections(*((path, row) for row in rows))
    raise InputError(
        f"the projections of the attention {call.path} ({type(call.module).__name__}) can't be "
        "told; leave the kinds query_key and value out"
    )

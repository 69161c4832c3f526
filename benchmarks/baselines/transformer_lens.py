"""TransformerLens: a hooked run of the bridge that it builds around a model already loaded.

The bridge has no hook between the activation and the product (its `hook_post` is the product), so
its users count the gate, whose sign SiLU keeps. It computes attention by itself, for its hooks'
sake, and rounds otherwise than the model does: its counts are right for its own activations.
"""

from __future__ import annotations

import functools

from torch import Tensor, nn
from transformer_lens.model_bridge.sources import build_bridge_from_module

from baselines import Contender, no_counts


def bridged(model: nn.Module) -> Contender:
    counts = no_counts(model)
    bridge = build_bridge_from_module(model, type(model).__name__, hf_config=model.config)
    hooks = [
        (f"blocks.{layer}.mlp.hook_pre", functools.partial(_count, over_zero))
        for layer, over_zero in enumerate(counts)
    ]
    return Contender(
        lambda ids: bridge.run_with_hooks(ids, fwd_hooks=hooks, return_type=None), lambda: counts
    )


def _count(over_zero: Tensor, gate: Tensor, hook: object) -> None:
    over_zero += (gate > 0).sum(dim=(0, 1))

"""A profile, and by plain hooks the gates of the very run that made it.

For models whose arithmetic is their own: quantised ones, adapted ones, those split over processes.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping

import torch
from torch import Tensor, nn
from transformers.activations import ACT2FN

import lapefast as lf
from lapefast import models

_FIRST = ("gate_proj", "gate_up_proj", "c_fc")
_PLAIN = {"gpt2": "gelu_new", "starcoder2": "gelu_pytorch_tanh"}


def profile_and_gates(model: nn.Module, corpora: Mapping[str, Tensor], batch_size: int):
    """The profile of ``corpora``, rows of one length, and site -> each label's gates.

    A label's gates are [tokens, width]. The projections that make the gate are watched, not the
    activation, so that a kernel may compute it.
    """
    seen: dict[str, list[Tensor]] = {site.name: [] for site in models.find_sites(model)}
    hooks = list(_watched(model, seen, next(iter(corpora.values())).shape[1]))
    try:
        profile = lf.profile(model, corpora, batch_size=batch_size, progress=False)
    finally:
        for hook in hooks:
            hook.remove()
    tokens = [rows.numel() for rows in corpora.values()]
    return profile, {site: torch.cat(gates).split(tokens) for site, gates in seen.items()}


def eager(name: str, gate: Tensor) -> Tensor:
    """The activation of a family's FFN, by transformers' own function."""
    return ACT2FN[_PLAIN.get(name, "silu")](gate)


def _watched(model: nn.Module, seen: dict[str, list[Tensor]], length: int) -> Iterator:
    bare = models.bare_model(model)
    for site in seen:
        owner = bare.get_submodule(site)
        name = next(name for name in _FIRST if name in owner._modules)

        def see(module, args, output, site=site, fused=name == "gate_up_proj"):
            if output.shape[1] == length:  # not the proof's few tokens
                gate = output.chunk(2, dim=-1)[0] if fused else output
                seen[site].append(gate.detach().reshape(-1, gate.shape[-1]).clone())

        yield owner._modules[name].register_forward_hook(see)
